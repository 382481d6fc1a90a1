"""The sliced head: hidden states -> SparseLogits, the only place where the vocabulary axis exists.

hidden states [n, d] and a head weight [V, d] -> log-probability of the clean token, of k chosen tokens, and the
log-sum-exp at each training temperature. No tensor here is larger than a slice of [n, V], forward or backward
(math.md: The one thing both sides produce; the quantities are those of sparse_logits.py).

The price is one more product per slice: the backward pass computes the logits again. The alternative, keeping [n, V],
costs n V floats three times over. A slice is worked on in up to four buffers of `max_slice_bytes`, which serve all
slices of a call: fresh ones would be mapped and zeroed by the kernel each time, a fifth of a KL step on CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .sparse_logits import SparseLogits

MAX_SLICE_BYTES = 64 * 2**20
"""Size of one float32 slice of logits: 110 rows at V = 151,936. There, slices of half the size cost 16 % of a CPU step
(every slice reads the whole weight again), and twice the size saves 9 %."""


class TailBuckets:
    """Which range of ids each token of a vocabulary belongs to, when tails are cut into ranges.

    Args: of_token: [V] numbers 0 .. num_buckets - 1.
    """

    def __init__(self, of_token: Int[Tensor, " v"], num_buckets: int) -> None:
        self.of_token, self.num_buckets = of_token, num_buckets
        self.is_in = torch.nn.functional.one_hot(of_token, num_buckets).float()  # [V, num_buckets]

    @classmethod
    def of_ids(cls, ids: Int[Tensor, " v"], cuts: Sequence[int]) -> "TailBuckets":
        """Ranges of `ids` (of the student, one for each row of the head) that end before each of `cuts`."""
        return cls(torch.bucketize(ids, torch.tensor(cuts, device=ids.device), right=True), len(cuts) + 1)

    def to(self, device: torch.device | str) -> "TailBuckets":
        """The same on another device."""
        return TailBuckets(self.of_token.to(device), self.num_buckets)

    def log_sums(self, tail: Tensor, scratch: "_Scratch") -> Tensor:
        """[rows, num_buckets] log-sum-exps of tail [rows, V]; -inf where a range has nothing in it.

        A product with `is_in` adds in an order of its own, but always in the same: `scatter_add` on CUDA would not.
        """
        largest = tail.new_full((len(tail), self.num_buckets), -torch.inf)
        largest.scatter_reduce_(1, self.of_token.expand(len(tail), -1), tail, reduce="amax")
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        return torch.log(self.exp_of_difference(tail, base, scratch) @ self.is_in.to(tail.dtype)) + base

    def exp_of_difference(self, tail: Tensor, base: Tensor, scratch: "_Scratch") -> Tensor:
        """exp(tail - base of each token's range) [rows, V], in the buffer "tail p"."""
        out = scratch("tail p", len(tail))
        torch.index_select(base, 1, self.of_token, out=out)
        return torch.sub(tail, out, out=out).exp_()


class TailDraws(NamedTuple):
    """What `top_logits` draws at n positions from outside the tokens that are kept.

    Args:
        uniform: float64 in [0, 1), one for each draw.
        temperature: > 0, of the distribution that is drawn from.
        smallest_logp: top tokens below it are not kept, but for the first; exact in float32.
    """

    uniform: Float[Tensor, "n j"]
    temperature: float
    smallest_logp: float = float("-inf")


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
    draw_ids: Int[Tensor, "m j"] | None = None, buckets: TailBuckets | None = None,
    max_slice_bytes: int = MAX_SLICE_BYTES,
) -> tuple[Float[Tensor, " n"], SparseLogits]:  # fmt: skip
    """The student's head: the clean token's log-probability everywhere, exact SparseLogits at targets; with gradient.

    Args:
        hidden: of n positions; under autocast the product runs in its half precision, everything else in float32.
        gold_ids: clean tokens.
        target: distinct positions at which the teacher's top tokens are read. top_ids: those, -1 for absent.
        temperatures: > 0, at which log_z and log_tail are wanted.
        support: tokens that token-level losses range over, those of top_ids included; None: all.
        draw_ids: further tokens whose log-probability is wanted, the teacher's draws; one may stand there twice.
        buckets: ranges of ids by which tails are wanted; None: the whole tail alone.
        max_slice_bytes: bound on one slice of logits in float32.
    Returns: nats at temperature 1 at all n positions, and SparseLogits at the m targets, in the order of `target`.
    """
    temperatures = tuple(temperatures)
    drawn = top_ids[:, :0] if draw_ids is None else draw_ids
    outputs = _SlicedHead.apply(
        hidden, weight, gold_ids, target, top_ids, drawn, temperatures, support, buckets, max_slice_bytes
    )
    gold_logp, top_logp, log_z, tails, draw_logp = outputs  # type: ignore[misc]
    log_tail, log_buckets = _whole_and_parts(tails, buckets)
    return gold_logp, SparseLogits(
        gold_logp[target], top_ids, top_logp, log_z, log_tail, temperatures, draw_ids,
        None if draw_ids is None else draw_logp, log_buckets,
    )  # fmt: skip


@torch.no_grad()
def top_logits(
    hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], gold_ids: Int[Tensor, " n"], *,
    k: int, temperatures: Sequence[float] = (), support: Bool[Tensor, " v"] | None = None,
    drop: Bool[Tensor, " v"] | None = None, draws: TailDraws | None = None, buckets: TailBuckets | None = None,
    max_slice_bytes: int = MAX_SLICE_BYTES,
    watch: Callable[[slice, Tensor], None] | None = None,
) -> SparseLogits:  # fmt: skip
    """The teacher's head: its own k most likely tokens of the support, in order, without gradient.

    Args:
        hidden, weight, gold_ids, temperatures, support: as in `gather_at_targets`.
        k: tokens to keep, at most V; 0 when only `gold_logp` is wanted.
        drop: ids removed before normalising (control tokens the teacher should never say); None: none.
        draws: tokens to draw from the tail; None: none.
        buckets: as in `gather_at_targets`.
        watch: called with each slice of rows and its log-probabilities [rows, V], which the next slice overwrites.
    """
    _check_head(hidden, weight, gold_ids)
    weight = weight.to(hidden.dtype)
    dropped = _bias(None if drop is None else ~drop, hidden)
    off_support = _bias(support, hidden)
    top_ids = gold_ids.new_empty(len(hidden), k)
    gold_logp, top_logp, log_z, tails = _empty_outputs(hidden, top_ids, len(temperatures), buckets)
    draw_ids = None if draws is None else top_ids.new_empty(draws.uniform.shape)
    draw_logp = None if draws is None else top_logp.new_empty(draws.uniform.shape)
    scratch = _Scratch(hidden, weight)
    for rows in _slices(len(hidden), weight.shape[0], max_slice_bytes):
        logits = _slice_logits(hidden[rows], weight, scratch)
        logits = logits if dropped is None else logits.add_(dropped)
        logp = torch.log_softmax(logits, dim=1, out=scratch("p", len(logits)))
        gold_logp[rows] = logp.gather(1, gold_ids[rows, None])[:, 0]
        if watch is not None:
            watch(rows, logp)
        if k:
            inside = logp if off_support is None else torch.add(logp, off_support, out=scratch("tail", len(logp)))
            values, ids = inside.topk(k, dim=1)
            top_logp[rows], top_ids[rows] = values, ids.masked_fill(values == -torch.inf, -1)
        for column, temperature in enumerate(temperatures):
            sums = _tempered_sums(logp, top_ids[rows], top_logp[rows], temperature, off_support, scratch, buckets)
            log_z[rows, column], tails[rows, column] = sums
        if draws is not None and draw_ids is not None and draw_logp is not None:
            draw_ids[rows] = _draw(logp, top_ids[rows], top_logp[rows], draws, rows, off_support, scratch)
            draw_logp[rows] = logp.gather(1, draw_ids[rows])
    log_tail, log_buckets = _whole_and_parts(tails, buckets)
    return SparseLogits(
        gold_logp, top_ids, top_logp, log_z, log_tail, tuple(temperatures), draw_ids, draw_logp, log_buckets
    )


def _whole_and_parts(tails: Tensor, buckets: TailBuckets | None) -> tuple[Tensor, Tensor | None]:
    """log_tail [m, T] and log_buckets [m, T, B] of what the head gives, [m, T, 1 or B]."""
    # A copy: FSDP2 warns users of every view among a module's outputs.
    return (tails[:, :, 0].clone(), None) if buckets is None else (torch.logsumexp(tails, dim=2), tails)


def _draw(
    logp: Tensor, top_ids: Tensor, top_logp: Tensor, draws: TailDraws, rows: slice, bias: Tensor | None,
    scratch: "_Scratch",
) -> Tensor:  # fmt: skip
    """[rows, j] tokens by the inverse of the tail's cumulative distribution; the first top token where none is outside.

    Sums are float64: in float32 the last of 100,000 small terms would be lost in the sum of those before them.
    """
    kept = top_logp >= draws.smallest_logp
    kept[:, :1] = True
    tail = _outside_top(logp, top_ids.masked_fill(~kept, -1), draws.temperature, bias, scratch)
    largest = tail.amax(dim=1, keepdim=True)
    has_tail = largest > -torch.inf
    mass = tail.sub_(largest.masked_fill(~has_tail, 0.0)).exp_()
    below = torch.cumsum(mass, dim=1, dtype=torch.float64)
    total = below[:, -1:]
    # Without its last bit, u * total may round up to total, which no token's sum is above.
    wanted = torch.minimum(draws.uniform[rows].to(below) * total, torch.nextafter(total, total.new_zeros(())))
    ids = torch.searchsorted(below, wanted, right=True).clamp(max=logp.shape[1] - 1)
    return torch.where(has_tail, ids, top_ids[:, :1])


class _SlicedHead(torch.autograd.Function):
    """Forward keeps [n], [m, k] and [m, j] results; backward computes each slice of logits again instead of storing it.

    With G the incoming gradients, p = softmax(z), p_S and p_tail the softmax of z / T on the support and on its tail:
        dz = G_gold 1[gold] + G_top 1[top] + G_draw 1[draw] - p (G_gold + sum G_top + sum G_draw + sum_T G_z / T)
             + sum_T ((G_z - G_tail) p_S + G_tail p_tail) / T
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, gold_ids, target, top_ids, draw_ids, temperatures, support, buckets, max_slice_bytes
    ):
        _check_head(hidden, weight, gold_ids)
        ctx.hidden_dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight, bias = weight.to(hidden.dtype), _bias(support, hidden)
            gold_logp, top_logp, log_z, log_tail = _empty_outputs(hidden, top_ids, len(temperatures), buckets)
            draw_logp = top_logp.new_empty(draw_ids.shape)
            scratch = _Scratch(hidden, weight)
            for rows, place in _target_slices(target, hidden, weight, max_slice_bytes):
                logits = _slice_logits(hidden[rows], compute_weight, scratch)
                logp = torch.log_softmax(logits, dim=1, out=scratch("p", len(logits)))
                gold_logp[rows] = logp.gather(1, gold_ids[rows, None])[:, 0]
                if place is None:
                    continue
                top_logp[place] = _at_top(logp, top_ids[place], bias)
                draw_logp[place] = logp.gather(1, draw_ids[place])
                for column, temperature in enumerate(temperatures):
                    sums = _tempered_sums(logp, top_ids[place], top_logp[place], temperature, bias, scratch, buckets)
                    log_z[place, column], log_tail[place, column] = sums
        ctx.save_for_backward(hidden, weight, gold_ids, target, top_ids, draw_ids, support, top_logp, log_z, log_tail)
        ctx.temperatures, ctx.buckets, ctx.max_slice_bytes = temperatures, buckets, max_slice_bytes
        return gold_logp, top_logp, log_z, log_tail, draw_logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_gold, grad_top, grad_z, grad_tail, grad_draw):  # type: ignore[override]
        hidden, weight, gold_ids, target, top_ids, draw_ids, support, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, dtype=ctx.hidden_dtype)
        grad_weight = torch.zeros_like(weight, dtype=_full_dtype(weight)) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight, bias = weight.to(hidden.dtype), _bias(support, hidden)
            scratch = _Scratch(hidden, weight)
            for rows, place in _target_slices(target, hidden, weight, ctx.max_slice_bytes):
                logits = _slice_logits(hidden[rows], compute_weight, scratch)
                grad = torch.softmax(logits, dim=1, out=scratch("p", len(logits)))
                if place is None:
                    grad.mul_(-grad_gold[rows, None])
                else:
                    gathered = grad_gold[rows] + grad_draw[place].sum(1)
                    grads = gathered, grad_top[place], grad_z[place], grad_tail[place]
                    outputs = [value[place] for value in kept]
                    _target_gradient(
                        grad, logits, top_ids[place], grads, outputs, ctx.temperatures, bias, scratch, ctx.buckets
                    )
                    grad.scatter_add_(1, draw_ids[place], grad_draw[place])
                grad.scatter_add_(1, gold_ids[rows, None], grad_gold[rows, None])
                grad = grad.to(hidden.dtype)
                grad_hidden[rows] = (grad @ compute_weight).to(ctx.hidden_dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, hidden[rows])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 8


def _target_gradient(
    p: Tensor, logits: Tensor, top_ids: Tensor, grads: Sequence[Tensor], outputs: Sequence[Tensor],
    temperatures: Sequence[float], bias: Tensor | None, scratch: "_Scratch", buckets: TailBuckets | None,
) -> None:  # fmt: skip
    """Turn `p` = softmax(logits) [rows, V] into the gradient of all outputs but G_gold 1[gold] and G_draw 1[draw].

    On the tail p_S = p_tail exp(log_tail), so a single softmax over the tail, or over each of its buckets, serves both
    terms of `_SlicedHead`; the top tokens' p_S is known from the forward pass.

    Args:
        grads: incoming, of gold_logp and all draws in sum, of top_logp, log_z and log_tail. outputs: top_logp, log_z
            and log_tail.
    """
    gathered, grad_top, grad_z, grad_tail = grads
    top_logp, log_z, log_tail = outputs
    present = torch.isfinite(top_logp)
    at_top = grad_top.masked_fill(~present, 0.0)
    shared = gathered + at_top.sum(1)
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
            tail = _outside_top(logits, top_ids, temperature, bias, scratch, keep_first=no_tail[:, column, 0])
            tail_p = torch.softmax(tail, dim=1, out=scratch("tail p", len(tail)))
            p.addcmul_(tail_p, at_tail[column])
        else:
            tail = _outside_top(logits, top_ids, temperature, bias, scratch)
            sums = buckets.log_sums(tail, scratch)
            tail_p = buckets.exp_of_difference(tail, sums.masked_fill(sums == -torch.inf, 0.0), scratch)
            p.addcmul_(tail_p, torch.index_select(at_tail[column], 1, buckets.of_token, out=tail))
    p.scatter_add_(1, top_ids.clamp(min=0), at_top)


def _tempered_sums(
    logp: Tensor, top_ids: Tensor, top_logp: Tensor, temperature: float, bias: Tensor | None, scratch: "_Scratch",
    buckets: TailBuckets | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log_z [rows] and log_tail [rows, 1 or B] at one temperature; sums of positive terms only, so nothing cancels."""
    tail, head_sum = _outside_top(logp, top_ids, temperature, bias, scratch), torch.logsumexp(top_logp / temperature, 1)
    if buckets is not None:
        sums = buckets.log_sums(tail, scratch)
        log_z = torch.logaddexp(torch.logsumexp(sums, 1), head_sum)
        return log_z, sums - log_z[:, None]
    largest = tail.amax(dim=1)
    # log_softmax is max - logsumexp at the largest entry: faster than logsumexp on CPU, 14-fold where terms underflow.
    tail_sum = largest - torch.log_softmax(tail, dim=1, out=scratch("logits", len(tail))).amax(dim=1)
    tail_sum = torch.where(largest == -torch.inf, -torch.inf, tail_sum)
    log_z = torch.logaddexp(tail_sum, head_sum)
    return log_z, (tail_sum - log_z)[:, None]


def _outside_top(
    values: Tensor, top_ids: Tensor, temperature: float, bias: Tensor | None, scratch: "_Scratch",
    keep_first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`values` / temperature [rows, V] with -inf off the support and at `top_ids`; absent ids (-1) block nothing.

    Args: keep_first: [rows] bool, rows whose first top token stays.
    """
    tail = scratch("tail", len(values))
    if bias is None:
        torch.mul(values, 1 / temperature, out=tail)
    else:
        torch.add(bias, values, alpha=1 / temperature, out=tail)
    block = torch.where(top_ids >= 0, -torch.inf, torch.inf).to(values.dtype)
    if keep_first is not None:
        block[:, :1].masked_fill_(keep_first[:, None], torch.inf)
    return tail.scatter_reduce_(1, top_ids.clamp(min=0), block, reduce="amin")


def _at_top(logp: Tensor, top_ids: Tensor, bias: Tensor | None) -> Tensor:
    """Log-probabilities [rows, k]; -inf at absent ids and off the support."""
    index = top_ids.clamp(min=0)
    values = logp.gather(1, index)
    values = values if bias is None else values + bias[index]
    return values.masked_fill(top_ids < 0, -torch.inf)


def _bias(keep: Tensor | None, hidden: Tensor) -> Tensor | None:
    """[V]: 0 where `keep`, -inf elsewhere; adding it is several times faster than masked_fill on CPU."""
    return None if keep is None else torch.where(keep, 0.0, -torch.inf).to(_full_dtype(hidden))


def _empty_outputs(
    hidden: Tensor, top_ids: Tensor, num_temperatures: int, buckets: TailBuckets | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for gold_logp [n], top_logp [m, k], log_z [m, T] and log_tail [m, T, 1 or B]."""
    (num_targets, k), num_buckets = top_ids.shape, 1 if buckets is None else buckets.num_buckets
    of_targets = num_targets, num_temperatures
    shapes = (len(hidden),), (num_targets, k), of_targets, (*of_targets, num_buckets)
    gold, top, log_z, log_tail = (hidden.new_empty(shape, dtype=_full_dtype(hidden)) for shape in shapes)
    return gold, top, log_z, log_tail


class _Scratch:
    """Named buffers [rows, V], each made once and used for slice after slice."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._vocab_size = hidden, weight.shape[0]
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, num_rows: int) -> Tensor:
        """The first rows of a buffer, whose content is whatever its last user left."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < num_rows:
            buffer = self._hidden.new_empty(num_rows, self._vocab_size, dtype=_full_dtype(self._hidden))
            self._buffers[name] = buffer
        return buffer[:num_rows]


def _slice_logits(hidden: Tensor, weight: Tensor, scratch: _Scratch) -> Tensor:
    """hidden @ weight.T, returned in float32 (float64 stays).

    On CUDA a half-precision product is never rounded back. On CPU it is, to 2^-9 relative, as everywhere in PyTorch;
    a float32 product would take three times as long.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = scratch("logits", len(hidden))
    if hidden.dtype == logits.dtype:
        return torch.mm(hidden, weight.T, out=logits)
    return logits.copy_(hidden @ weight.T)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, [V, d]; without a second [V, d] where the types allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _full_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _slices(num_rows: int, vocab_size: int, max_slice_bytes: int) -> Iterator[slice]:
    """Even slices over the rows, each at most `max_slice_bytes` of float32 logits (but at least one row)."""
    largest = max(1, max_slice_bytes // (4 * vocab_size))
    step = -(-num_rows // max(1, -(-num_rows // largest)))
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, min(start + step, num_rows))


def _target_slices(
    target: Tensor, hidden: Tensor, weight: Tensor, max_slice_bytes: int
) -> Iterator[tuple[Tensor, slice | None]]:
    """(rows of hidden, their place among the targets), slice by slice: first the targets, then the rest (None)."""
    for place in _slices(len(target), weight.shape[0], max_slice_bytes):
        yield target[place], place
    if len(target) < len(hidden):
        is_rest = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        is_rest[target] = False
        rest = torch.nonzero(is_rest)[:, 0]
        for place in _slices(len(rest), weight.shape[0], max_slice_bytes):
            yield rest[place], None


def _check_head(hidden: Tensor, weight: Tensor, gold_ids: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [n, d] and weight [V, d], got {list(hidden.shape)} and {list(weight.shape)}")
    if gold_ids.shape != hidden.shape[:1]:
        raise ValueError(f"expected one clean token per hidden state, got {list(gold_ids.shape)}")
