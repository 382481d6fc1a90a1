"""What a loss loses by the cache: its gradient from stored answers against the dense one, at the student's logits.

z [n, V] student logits, the teacher as stored (SparseLogits) and in full [n, S] -> for every loss and target the inner
product of the two gradients dL/dz and their squared lengths -> by bin of the masked share cosines and ratios as JSON.
The losses are those of training (losses.py), which take the k+1 simplex of a cache and a dense support alike;
everything is float64, so that what differs is what was stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..shared.sparse_logits import SparseLogits
from .losses import calm_loss, kl_loss, tidal_loss

BIN_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the masked share of a response; bin i covers (edge i, edge i + 1]."""
TIDAL_LAMBDAS = (0.1, 0.5, 0.9)
"""Weights of the teacher in TIDAL's mixture at which it is compared: early, midway and late in training."""


class LossName(NamedTuple):
    """A loss as it is compared: `name` as in training's logs, its temperature and, for TIDAL, lambda_t."""

    name: str
    temperature: float
    tidal_lambda: float | None = None


class AuditedTargets(NamedTuple):
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


@dataclass
class AuditSums:
    """What the description of an audit is made of, by bin of the masked share."""

    temperatures: tuple[float, ...]
    bins: list[np.ndarray] = field(default_factory=list)
    tails: dict[float, list[np.ndarray]] = field(default_factory=dict)
    products: dict[str, dict[LossName, np.ndarray]] = field(default_factory=dict)

    def add_tails(self, targets: AuditedTargets, masked_share: Sequence[float]) -> None:
        """Tail masses and divergences of a slice, target by target; the bins that its gradients will be added to."""
        number = np.searchsorted(BIN_EDGES, masked_share, side="left") - 1
        self.bins.append(np.clip(number, 0, len(BIN_EDGES) - 2))
        for temperature, *columns in stored_tails(targets):
            self.tails.setdefault(temperature, []).append(np.stack([column.numpy() for column in columns]))

    def add_gradients(self, student: str, targets: AuditedTargets) -> None:
        """Products of the slice whose tails came last, summed by bin."""
        of_student = self.products.setdefault(student, {})
        for loss, products in gradient_products(targets):
            sums = [np.bincount(self.bins[-1], column.numpy(), len(BIN_EDGES) - 1) for column in products]
            of_student[loss] = of_student.get(loss, 0.0) + np.stack(sums)

    def summary(self) -> dict[str, Any]:
        """Means, percentiles, cosines and ratios; over all bins first, then bin by bin."""
        bins = np.concatenate(self.bins)
        chosen = [np.ones(len(bins), bool), *(bins == number for number in range(len(BIN_EDGES) - 1))]

        def over(column: np.ndarray, how: Any) -> dict[str, Any]:
            return _by_bin([how(column[some]) if some.any() else np.nan for some in chosen])

        by_temperature, students = [], []
        for temperature in self.temperatures:
            stored, exact, kl = np.concatenate(self.tails[temperature], axis=1)
            by_temperature.append({
                "temperature": temperature,
                "tail_stored": over(stored, np.mean), "tail_exact": over(exact, np.mean),
                "tail_error": over(np.abs(stored - exact), np.max),
                "kl_mean": over(kl, np.mean), "kl_p99": over(kl, lambda some: np.quantile(some, 0.99)),
            })  # fmt: skip
        for name, of_student in self.products.items():
            losses = []
            for loss, sums in of_student.items():
                dot, stored, dense = np.concatenate([sums.sum(axis=1, keepdims=True), sums], axis=1)
                with np.errstate(divide="ignore", invalid="ignore"):
                    cosine, ratio = dot / np.sqrt(stored * dense), np.sqrt(stored / dense)
                losses.append({
                    "loss": loss.name, "temperature": loss.temperature, "tidal_lambda": loss.tidal_lambda,
                    "cosine": _by_bin(cosine), "norm_ratio": _by_bin(ratio),
                })  # fmt: skip
            students.append({"name": name, "losses": losses})
        return {
            "compared": len(bins), "bin_edges": list(BIN_EDGES),
            "bin_targets": [int(some.sum()) for some in chosen[1:]],
            "temperatures": by_temperature, "students": students,
        }  # fmt: skip


def _by_bin(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Over all, then by bin; None for what is no number: an empty bin, a gradient of zero."""
    found = [float(value) if np.isfinite(value) else None for value in values]
    return {"all": found[0], "by_bin": found[1:]}


def gradient_products(targets: AuditedTargets) -> Iterator[tuple[LossName, Float64[Tensor, "3 n"]]]:
    """Every loss that a recipe can use on such a cache, at every stored temperature.

    Of its two gradients at each target: inner product, squared length as stored, squared length of the dense one.
    """
    on_support = targets.logits[:, targets.support].requires_grad_()
    for temperature in targets.teacher.temperatures:
        student = torch.log_softmax(on_support / temperature, dim=1)
        simplex = _simplex(student, targets.top_place, targets.bucket)
        stored = targets.teacher.simplex_logp(temperature).double()
        both = (simplex, stored), (student, torch.log_softmax(targets.dense / temperature, dim=1))
        for reverse in (False, True):
            losses = [kl_loss(s, q, temperature=temperature, reverse=reverse) for s, q in both]
            yield LossName("reverse_kl" if reverse else "kl", temperature), _products(losses, on_support)
        for weight in TIDAL_LAMBDAS:
            losses = [
                tidal_loss(
                    s, q, s.new_full((len(s),), 0.5), temperature=temperature, lambda_train=weight, lambda_max=weight,
                    axis="training_only", timestep_weight="uniform",
                ) for s, q in both
            ]  # fmt: skip
            yield LossName("tidal_kl", temperature, weight), _products(losses, on_support)
    logits = targets.logits.requires_grad_()
    gold = targets.support[targets.gold_place]
    exact = targets.dense.gather(1, targets.gold_place[:, None])[:, 0]
    student_gold = torch.log_softmax(logits, dim=1).gather(1, gold[:, None])[:, 0]
    for temperature in targets.teacher.temperatures:
        for reverse in (False, True):
            losses = [
                calm_loss(student_gold, teacher, temperature=temperature, reverse=reverse)
                for teacher in (targets.chunk_logp, exact)
            ]
            yield LossName("reverse_calm" if reverse else "calm", temperature), _products(losses, logits)


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


def _products(losses: Sequence[Tensor], at: Tensor) -> Tensor:
    """Of the gradients of two means over n targets; each target's own, so the factor 1 / n is taken out."""
    ours, full = (len(at) * torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in losses)
    return torch.stack([(ours * full).sum(1), ours.square().sum(1), full.square().sum(1)])


def stored_tails(targets: AuditedTargets) -> Iterator[tuple[float, Tensor, Tensor, Tensor]]:
    """(temperature, stored tail mass, exact tail mass, KL(exact || stored) over kept tokens and tail) [n] each."""
    for temperature in targets.teacher.temperatures:
        stored = targets.teacher.simplex_logp(temperature).double()
        exact = _simplex(torch.log_softmax(targets.dense / temperature, dim=1), targets.top_place, targets.bucket)
        num_top = targets.top_place.shape[1]
        here = exact > -torch.inf
        terms = torch.where(here, exact.exp() * (exact - torch.where(here, stored, 0.0)), 0.0)
        stored_mass, exact_mass = (values[:, num_top:].exp().sum(1) for values in (stored, exact))
        yield temperature, stored_mass, exact_mass, terms.sum(1).clamp(min=0.0)
