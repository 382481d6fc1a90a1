"""What a loss loses by the cache: its gradient from stored answers against the dense one, at the student's logits.

z [n, V] student logits, the teacher as stored (SparseLogits) and in full [n, S] -> for every loss and target the inner
product of the two gradients dL/dz and their squared lengths. The losses are those of training (losses.py), which take
the k+1 simplex of a cache and a dense support alike; everything is float64, so that what differs is what was stored.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..shared.sparse_logits import SparseLogits
from .losses import calm_loss, kl_loss, tidal_loss

TIDAL_LAMBDAS = (0.1, 0.5, 0.9)
"""Weights of the teacher in TIDAL's mixture at which it is compared: early, midway and late in training."""


class LossName(NamedTuple):
    """A loss as it is compared: `name` as in training's logs, its temperature and, for TIDAL, lambda_t."""

    name: str
    temperature: float
    tidal_lambda: float | None = None


class Products(NamedTuple):
    """Of two gradients at each target: inner product, squared length as stored, squared length of the dense one."""

    dot: Float64[Tensor, " n"]
    stored: Float64[Tensor, " n"]
    dense: Float64[Tensor, " n"]


class Answers(NamedTuple):
    """n targets: what both sides say.

    Args:
        logits: of the student over its vocabulary.
        support: columns of `logits` that the loss support consists of, in the order of `dense`.
        dense: the teacher's log-probabilities at T = 1 over the support, in full.
        teacher: as training reads it from the cache.
        top_place: where in the support the ids of `teacher` are; -1 for absent ones.
        gold_place: where in the support the clean token is.
        chunk_logp: stored for the chunk that the target alone makes up.
        bucket: of each token of the support, where the cache cuts tails into ranges of ids; None: it does not.
    """

    logits: Float64[Tensor, "n v"]
    support: Int64[Tensor, " s"]
    dense: Float64[Tensor, "n s"]
    teacher: SparseLogits
    top_place: Int64[Tensor, "n k"]
    gold_place: Int64[Tensor, " n"]
    chunk_logp: Float64[Tensor, " n"]
    bucket: Int64[Tensor, " s"] | None = None


def gradient_products(answers: Answers) -> Iterator[tuple[LossName, Products]]:
    """Every loss that a recipe can use on such a cache, at every stored temperature."""
    on_support = answers.logits[:, answers.support].requires_grad_()
    for temperature in answers.teacher.temperatures:
        student = torch.log_softmax(on_support / temperature, dim=1)
        simplex = _simplex(student, answers.top_place, answers.bucket)
        stored = answers.teacher.simplex_logp(temperature).double()
        dense = torch.log_softmax(answers.dense / temperature, dim=1)
        for name, loss in _token_losses(temperature):
            yield name, _products(loss(simplex, stored), loss(student, dense), on_support)
    logits = answers.logits.requires_grad_()
    gold = answers.support[answers.gold_place]
    exact = answers.dense.gather(1, answers.gold_place[:, None])[:, 0]
    student_gold = torch.log_softmax(logits, dim=1).gather(1, gold[:, None])[:, 0]
    for temperature in answers.teacher.temperatures:
        for reverse in (False, True):
            name = LossName("reverse_calm" if reverse else "calm", temperature)
            ours, full = (
                calm_loss(student_gold, teacher, temperature=temperature, reverse=reverse)
                for teacher in (answers.chunk_logp, exact)
            )
            yield name, _products(ours, full, logits)


def _token_losses(temperature: float) -> Iterator[tuple[LossName, Callable[[Tensor, Tensor], Tensor]]]:
    """Losses of (student, teacher) log-probabilities at `temperature`, over any categories."""
    for reverse in (False, True):
        name = LossName("reverse_kl" if reverse else "kl", temperature)
        yield name, lambda s, q, reverse=reverse: kl_loss(s, q, temperature=temperature, reverse=reverse)
    for weight in TIDAL_LAMBDAS:
        yield (
            LossName("tidal_kl", temperature, weight),
            lambda s, q, weight=weight: tidal_loss(
                s, q, s.new_full((len(s),), 0.5), temperature=temperature, lambda_train=weight, lambda_max=weight,
                axis="training_only", timestep_weight="uniform",
            ),
        )  # fmt: skip


def _simplex(logp: Tensor, top_place: Tensor, bucket: Tensor | None) -> Tensor:
    """[n, k+1] of log-probabilities [n, S]: at `top_place`, and of all the rest together, or of each bucket of it."""
    absent = top_place < 0
    top = logp.gather(1, top_place.clamp(min=0)).masked_fill(absent, -torch.inf)
    outside = torch.ones_like(logp, dtype=torch.bool)
    rows = torch.arange(len(logp), device=logp.device)[:, None].expand_as(top_place)
    outside[rows[~absent], top_place[~absent]] = False
    parts = [outside]
    if bucket is not None:
        parts = [outside & (bucket == number) for number in range(int(bucket.max()) + 1)]
    tails = []
    for part in parts:
        nothing = ~part.any(dim=1, keepdim=True)
        # A softmax over nothing has a gradient of NaN: where there is no tail, any finite entry stands in.
        tail = torch.logsumexp(logp.masked_fill(~part & ~nothing, -torch.inf), dim=1, keepdim=True)
        tails.append(tail.masked_fill(nothing, -torch.inf))
    return torch.cat([top, *tails], dim=1)


def _products(stored: Tensor, dense: Tensor, at: Tensor) -> Products:
    """Of the gradients of two means over n targets; each target's own, so the factor 1 / n is taken out."""
    ours, full = (len(at) * torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in (stored, dense))
    return Products((ours * full).sum(1), ours.square().sum(1), full.square().sum(1))


def stored_tails(answers: Answers) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """(temperature, stored tail mass, exact tail mass, KL(exact || stored) over kept tokens and tail) [n] each."""
    for temperature in answers.teacher.temperatures:
        stored = answers.teacher.simplex_logp(temperature).double()
        exact = _simplex(torch.log_softmax(answers.dense / temperature, dim=1), answers.top_place, answers.bucket)
        num_top = answers.top_place.shape[1]
        here = exact > -torch.inf
        terms = torch.where(here, exact.exp() * (exact - torch.where(here, stored, 0.0)), 0.0)
        stored_mass, exact_mass = (values[:, num_top:].exp().sum(1) for values in (stored, exact))
        yield temperature, stored_mass, exact_mass, terms.sum(1).clamp(min=0.0)


def places(top_ids: Tensor, support: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """Where in `support` (student ids, ascending) each id stands; -1 for -1."""
    ids = torch.as_tensor(support)
    table = torch.full((vocab_size + 1,), -1, dtype=torch.int64)  # the last is for absent ids
    table[ids] = torch.arange(len(ids))
    return table[top_ids]
