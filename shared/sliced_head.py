"""The sliced head: hidden states -> SparseLogits, with its parts the only place that sees the vocabulary axis.

hidden states [n, d] and a head weight [V, d] -> log-probability of the clean token, of k chosen tokens, and the
log-sum-exp at each training temperature. No tensor here is larger than a slice of [n, V], forward or backward
(docs/math.md: The one thing both sides produce; the quantities are those of sparse_logits.py).

The price is one more product per slice: the backward pass computes the logits again. The alternative, keeping [n, V],
costs n V floats three times over. A slice is worked on in up to four buffers of `max_slice_bytes` (head_slices.py).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .head_slices import (
    MAX_SLICE_BYTES,
    Scratch,
    add_product,
    full_dtype,
    slice_logits,
    slices,
    support_bias,
    target_slices,
)
from .sparse_logits import SparseLogits
from .tails import TailBuckets, outside_top, tempered_sums, whole_and_parts


def gather_logits(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], gold_ids: Int[Tensor, " n"],
    top_ids: Int[Tensor, "n k"], *, temperatures: Sequence[float] = (), support: Bool[Tensor, " v"] | None = None,
    max_slice_bytes: int = MAX_SLICE_BYTES,
) -> SparseLogits:  # fmt: skip
    """The student's head with a target at every position: see `gather_at_targets`."""
    every = torch.arange(len(hidden), device=hidden.device)
    return gather_at_targets(
        hidden, weight, gold_ids, every, top_ids,
        temperatures=temperatures, support=support, max_slice_bytes=max_slice_bytes,
    )[1]  # fmt: skip


def gather_at_targets(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], gold_ids: Int[Tensor, " n"],
    target: Int[Tensor, " m"], top_ids: Int[Tensor, "m k"], *,
    temperatures: Sequence[float] = (), support: Bool[Tensor, " v"] | None = None,
    buckets: TailBuckets | None = None, max_slice_bytes: int = MAX_SLICE_BYTES,
) -> tuple[Float[Tensor, " n"], SparseLogits]:  # fmt: skip
    """The student's head: the clean token's log-probability everywhere, exact SparseLogits at targets; with gradient.

    Args:
        hidden: of n positions; under autocast the product runs in its half precision, everything else in float32.
        gold_ids: clean tokens.
        target: distinct positions at which the teacher's top tokens are read. top_ids: those, -1 for absent.
        temperatures: > 0, at which log_z and log_tail are wanted.
        support: tokens that token-level losses range over, those of top_ids included; None: all.
        buckets: ranges of ids by which tails are wanted; None: the whole tail alone.
        max_slice_bytes: bound on one slice of logits in float32.
    Returns: nats at temperature 1 at all n positions, and SparseLogits at the m targets, in the order of `target`.
    """
    temperatures = tuple(temperatures)
    outputs = _SlicedHead.apply(
        hidden, weight, gold_ids, target, top_ids, temperatures, support, buckets, max_slice_bytes
    )
    gold_logp, top_logp, log_z, tails = outputs  # type: ignore[misc]
    log_tail, log_buckets = whole_and_parts(tails, buckets)
    return gold_logp, SparseLogits(gold_logp[target], top_ids, top_logp, log_z, log_tail, temperatures, log_buckets)


@torch.no_grad()
def top_logits(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], gold_ids: Int[Tensor, " n"], *,
    k: int, temperatures: Sequence[float] = (), support: Bool[Tensor, " v"] | None = None,
    drop: Bool[Tensor, " v"] | None = None, buckets: TailBuckets | None = None,
    max_slice_bytes: int = MAX_SLICE_BYTES,
    watch: Callable[[slice, Tensor], None] | None = None,
) -> SparseLogits:  # fmt: skip
    """The teacher's head: its own k most likely tokens of the support, in order, without gradient.

    Args:
        hidden, weight, gold_ids, temperatures, support: as in `gather_at_targets`.
        k: tokens to keep, at most V; 0 when only `gold_logp` is wanted.
        drop: ids removed before normalising (control tokens the teacher should never say); None: none.
        buckets: as in `gather_at_targets`.
        watch: called with each slice of rows and its log-probabilities [rows, V], which the next slice overwrites.
    """
    _check_head(hidden, weight, gold_ids)
    weight = weight.to(hidden.dtype)
    dropped = support_bias(None if drop is None else ~drop, hidden)
    off_support = support_bias(support, hidden)
    top_ids = gold_ids.new_empty(len(hidden), k)
    gold_logp, top_logp, log_z, tails = _empty_outputs(hidden, top_ids, len(temperatures), buckets)
    gold_is_top = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    scratch = Scratch(hidden, weight)
    for rows in slices(len(hidden), weight.shape[0], max_slice_bytes):
        logits = slice_logits(hidden[rows], weight, scratch)
        logits = logits if dropped is None else logits.add_(dropped)
        logp = torch.log_softmax(logits, dim=1, out=scratch("p", len(logits)))
        gold_logp[rows] = logp.gather(1, gold_ids[rows, None])[:, 0]
        gold_is_top[rows] = gold_logp[rows] >= logp.amax(dim=1)
        if watch is not None:
            watch(rows, logp)
        if k:
            inside = logp if off_support is None else torch.add(logp, off_support, out=scratch("tail", len(logp)))
            values, ids = inside.topk(k, dim=1)
            top_logp[rows], top_ids[rows] = values, ids.masked_fill(values == -torch.inf, -1)
        for column, temperature in enumerate(temperatures):
            sums = tempered_sums(logp, top_ids[rows], top_logp[rows], temperature, off_support, scratch, buckets)
            log_z[rows, column], tails[rows, column] = sums
    log_tail, log_buckets = whole_and_parts(tails, buckets)
    return SparseLogits(
        gold_logp, top_ids, top_logp, log_z, log_tail, tuple(temperatures), log_buckets, gold_is_top,
    )  # fmt: skip


class _SlicedHead(torch.autograd.Function):
    """Forward keeps [n] and [m, k] results; backward computes each slice of logits again instead of storing it.

    With G the incoming gradients, p = softmax(z), p_S and p_tail the softmax of z / T on the support and on its tail:
        dz = G_gold 1[gold] + G_top 1[top] - p (G_gold + sum G_top + sum_T G_z / T)
             + sum_T ((G_z - G_tail) p_S + G_tail p_tail) / T
    """

    @staticmethod
    def forward(ctx, hidden, weight, gold_ids, target, top_ids, temperatures, support, buckets, max_slice_bytes):
        _check_head(hidden, weight, gold_ids)
        ctx.hidden_dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight, bias = weight.to(hidden.dtype), support_bias(support, hidden)
            gold_logp, top_logp, log_z, log_tail = _empty_outputs(hidden, top_ids, len(temperatures), buckets)
            scratch = Scratch(hidden, weight)
            for rows, place in target_slices(target, hidden, weight, max_slice_bytes):
                logits = slice_logits(hidden[rows], compute_weight, scratch)
                logp = torch.log_softmax(logits, dim=1, out=scratch("p", len(logits)))
                gold_logp[rows] = logp.gather(1, gold_ids[rows, None])[:, 0]
                if place is None:
                    continue
                index = top_ids[place].clamp(min=0)
                values = logp.gather(1, index) if bias is None else logp.gather(1, index) + bias[index]
                top_logp[place] = values.masked_fill(top_ids[place] < 0, -torch.inf)
                for column, temperature in enumerate(temperatures):
                    sums = tempered_sums(logp, top_ids[place], top_logp[place], temperature, bias, scratch, buckets)
                    log_z[place, column], log_tail[place, column] = sums
        ctx.save_for_backward(hidden, weight, gold_ids, target, top_ids, support, top_logp, log_z, log_tail)
        ctx.temperatures, ctx.buckets, ctx.max_slice_bytes = temperatures, buckets, max_slice_bytes
        return gold_logp, top_logp, log_z, log_tail

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_gold, grad_top, grad_z, grad_tail):  # type: ignore[override]
        hidden, weight, gold_ids, target, top_ids, support, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, dtype=ctx.hidden_dtype)
        grad_weight = torch.zeros_like(weight, dtype=full_dtype(weight)) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight, bias = weight.to(hidden.dtype), support_bias(support, hidden)
            scratch = Scratch(hidden, weight)
            for rows, place in target_slices(target, hidden, weight, ctx.max_slice_bytes):
                logits = slice_logits(hidden[rows], compute_weight, scratch)
                grad = torch.softmax(logits, dim=1, out=scratch("p", len(logits)))
                if place is None:
                    grad.mul_(-grad_gold[rows, None])
                else:
                    grads = grad_gold[rows], grad_top[place], grad_z[place], grad_tail[place]
                    outputs = [value[place] for value in kept]
                    _target_gradient(
                        grad, logits, top_ids[place], grads, outputs, ctx.temperatures, bias, scratch, ctx.buckets
                    )
                grad.scatter_add_(1, gold_ids[rows, None], grad_gold[rows, None])
                grad = grad.to(hidden.dtype)
                grad_hidden[rows] = (grad @ compute_weight).to(ctx.hidden_dtype)
                if grad_weight is not None:
                    add_product(grad_weight, grad.T, hidden[rows])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _target_gradient(
    p: Tensor, logits: Tensor, top_ids: Tensor, grads: Sequence[Tensor], outputs: Sequence[Tensor],
    temperatures: Sequence[float], bias: Tensor | None, scratch: Scratch, buckets: TailBuckets | None,
) -> None:  # fmt: skip
    """Turn `p` = softmax(logits) [rows, V] into the gradient of all outputs but G_gold 1[gold].

    On the tail p_S = p_tail exp(log_tail), so a single softmax over the tail, or over each of its buckets, serves both
    terms of `_SlicedHead`; the top tokens' p_S is known from the forward pass.

    Args:
        grads: incoming, of gold_logp, top_logp, log_z and log_tail. outputs: the last three.
    """
    grad_gold, grad_top, grad_z, grad_tail = grads
    top_logp, log_z, log_tail = outputs
    present = torch.isfinite(top_logp)
    at_top = grad_top.masked_fill(~present, 0.0)
    shared = grad_gold + at_top.sum(1)
    # Without a tail, log_tail = -inf is a constant, and the softmax over nothing would be NaN: keep one entry in it.
    no_tail = log_tail == -torch.inf
    grad_tail = grad_tail.masked_fill(no_tail, 0.0)
    at_tail = []
    for column, temperature in enumerate(temperatures):
        on_support = (grad_z[:, column] - grad_tail[:, column].sum(1)) / temperature
        shared = shared + grad_z[:, column] / temperature
        top_p = torch.exp(top_logp / temperature - log_z[:, column, None])
        at_top = at_top + on_support[:, None] * top_p
        at_tail.append(on_support[:, None] * log_tail[:, column].exp() + grad_tail[:, column] / temperature)
    p.mul_(-shared[:, None])
    for column, temperature in enumerate(temperatures):
        if buckets is None:
            tail = outside_top(logits, top_ids, temperature, bias, scratch, keep_first=no_tail[:, column, 0])
            tail_p = torch.softmax(tail, dim=1, out=scratch("tail p", len(tail)))
            p.addcmul_(tail_p, at_tail[column])
        else:
            tail = outside_top(logits, top_ids, temperature, bias, scratch)
            sums = buckets.log_sums(tail, scratch)
            tail_p = buckets.exp_of_difference(tail, sums.masked_fill(sums == -torch.inf, 0.0), scratch)
            p.addcmul_(tail_p, torch.index_select(at_tail[column], 1, buckets.of_token, out=tail))
    p.scatter_add_(1, top_ids.clamp(min=0), at_top)


def _empty_outputs(
    hidden: Tensor, top_ids: Tensor, num_temperatures: int, buckets: TailBuckets | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for gold_logp [n], top_logp [m, k], log_z [m, T] and log_tail [m, T, 1 or B]."""
    (num_targets, k), num_buckets = top_ids.shape, 1 if buckets is None else buckets.num_buckets
    of_targets = num_targets, num_temperatures
    shapes = (len(hidden),), (num_targets, k), of_targets, (*of_targets, num_buckets)
    gold, top, log_z, log_tail = (hidden.new_empty(shape, dtype=full_dtype(hidden)) for shape in shapes)
    return gold, top, log_z, log_tail


def _check_head(hidden: Tensor, weight: Tensor, gold_ids: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [n, d] and weight [V, d], got {list(hidden.shape)} and {list(weight.shape)}")
    if gold_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one clean token per hidden state, got {list(gold_ids.shape)}")
