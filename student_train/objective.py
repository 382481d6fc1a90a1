"""The objective: the recipe's weighted list of losses on one student forward.

`StudentOutput` x `Batch` -> one scalar per loss. Means run over the *global* batch: each loss is scaled by the share of
its positions that this forward holds, so accumulation steps and more processes change nothing (docs/math.md: Losses).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..shared.config import LossConfig
from ..shared.errors import ConfigError
from ..shared.sparse_logits import SparseLogits
from .batches import Batch, GlobalCounts
from .losses import (
    calm_loss,
    calm_tidal_loss,
    clean_token_loss,
    cross_entropy,
    kl_loss,
    lambda_train,
    tidal_loss,
)
from .student import StudentOutput


class Objective:
    """Weighted losses, checked against what the cache can serve.

    Args:
        losses: of the recipe.
        signal: kind of the cache: none, chunk or topk.
        temperatures: for which the cache has a log-sum-exp.
    Raises: ConfigError: a loss needs a signal or a temperature that the cache does not have.
    """

    def __init__(self, losses: Sequence[LossConfig], *, signal: str, temperatures: Sequence[float]) -> None:
        self.losses = tuple(loss for loss in losses if loss.weight > 0)
        names = [loss_name(loss) for loss in self.losses]
        seen = [names[: place + 1].count(name) for place, name in enumerate(names)]
        self.names = tuple(n if count == 1 else f"{n}_{count}" for n, count in zip(names, seen, strict=True))
        """A distinct name per loss, for logs: kl, reverse_kl, tidal_kl, clean_kl, calm, ...; the second kl is kl_2."""
        if not self.losses:
            raise ConfigError("losses: the list is empty or every weight is 0; list at least one loss")
        for loss in self.losses:
            if loss.name == "calm" and signal == "none":
                raise ConfigError("losses.calm needs the teacher's chunks, and this cache has no teacher: dump one")
            if loss.name == "kl" and signal != "topk":
                raise ConfigError(
                    f"losses.kl needs token-level targets, and this cache holds signal {signal!r}: "
                    "dump again with signal.kind=topk, or use a chunk loss (calm)"
                )
            if loss.name == "kl" and loss.temperature not in temperatures:
                raise ConfigError(
                    f"losses.kl.temperature = {loss.temperature}: the cache stores log-sum-exps for "
                    f"{', '.join(map(str, temperatures))} only; use one of them or dump again with signal.temperatures"
                )

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the student's log-sum-exp is needed, ascending; empty without token-level losses."""
        return tuple(sorted({loss.temperature for loss in self.losses if loss.name == "kl"}))

    @property
    def is_ce_only(self) -> bool:
        """Does nothing but cross-entropy remain?"""
        return all(loss.name == "ce" for loss in self.losses)

    def __call__(
        self, output: StudentOutput, batch: Batch, counts: GlobalCounts, *, progress: float, fresh: bool = False
    ) -> dict[str, Tensor]:
        """Unweighted losses by name, each already this forward's share of the global mean.

        Args:
            counts: of the global batch.
            progress: share of training done, in [0, 1], for TIDAL's schedule.
            fresh: a CE-only step; the other losses are left out.
        """
        values = {}
        for name, loss in zip(self.names, self.losses, strict=True):
            if loss.name == "ce":
                weight = 1 / batch.t if loss.timestep_weight == "scheduler" else torch.ones_like(batch.t)
                if loss.normalise == "sequence":
                    weight = weight / batch.maskable
                count = counts.maskable if loss.normalise == "token" else counts.views
                values[name] = cross_entropy(output.gold_logp, weight, max(1, count))
            elif not fresh and loss.name == "kl":
                value = _token_loss(loss, output.targets, batch, progress)
                values[name] = len(batch.target) / max(1, counts.targets) * value
            elif not fresh:
                student, teacher, t, total = (
                    chunk_logp(output.gold_logp, batch), batch.chunk_logp, batch.chunk_t, counts.chunks
                )  # fmt: skip
                if loss.chunks == "unmatched":
                    keep = batch.chunk_unmatched
                    student, teacher, t, total = student[keep], teacher[keep], t[keep], counts.unmatched_chunks
                if loss.tidal is None:
                    value = calm_loss(student, teacher, temperature=loss.temperature, reverse=loss.reverse)
                else:
                    value = calm_tidal_loss(student, teacher, t, **_tidal_arguments(loss, progress))
                values[name] = len(teacher) / max(1, total) * value
        return values

    def total(self, values: dict[str, Tensor]) -> Float[Tensor, ""]:
        """The weighted sum that is differentiated."""
        named = zip(self.names, self.losses, strict=True)
        terms = [loss.weight * values[name] for name, loss in named if name in values]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def loss_name(loss: LossConfig) -> str:
    """The field's name of a loss: `reverse_calm`, `tidal_kl`, `clean_kl`, ..."""
    prefix = "reverse_" if loss.reverse else "tidal_" if loss.tidal else "clean_" if loss.target == "clean" else ""
    return prefix + loss.name


def chunk_logp(gold_logp: Float[Tensor, " n"], batch: Batch) -> Float[Tensor, " c"]:
    """Log-probability of every chunk: the float32 sum of its clean tokens' log-probabilities (paper §2.3)."""
    zeros = gold_logp.new_zeros(len(batch.chunk_logp))
    return zeros.index_add(0, batch.chunk_of_token, gold_logp[batch.chunk_token])


def _token_loss(loss: LossConfig, targets: SparseLogits, batch: Batch, progress: float) -> Tensor:
    if loss.target == "clean":
        return clean_token_loss(targets.gold_logp_at(loss.temperature), temperature=loss.temperature)
    student, teacher = targets.simplex_logp(loss.temperature), batch.teacher.simplex_logp(loss.temperature)
    if loss.tidal is None:
        return kl_loss(student, teacher, temperature=loss.temperature, reverse=loss.reverse)
    return tidal_loss(student, teacher, batch.target_t, **_tidal_arguments(loss, progress))


def _tidal_arguments(loss: LossConfig, progress: float) -> dict:
    assert loss.tidal is not None
    tidal = loss.tidal
    return {
        "temperature": loss.temperature,
        "lambda_train": lambda_train(
            progress, lambda_init=tidal.lambda_init, lambda_max=tidal.lambda_max, schedule=tidal.schedule
        ),
        "lambda_max": tidal.lambda_max,
        "axis": tidal.axis,
        "timestep_weight": tidal.timestep_weight,
    }
