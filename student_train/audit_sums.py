"""What an audit says by mask ratio: sums over targets, by bin of the masked share -> means, cosines, ratios as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .audit_gradients import Answers, LossName, gradient_products, stored_tails

BIN_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the masked share of a response; bin i covers (edge i, edge i + 1]."""


def bins_of(masked_share: np.ndarray) -> np.ndarray:
    """Bin of each share in (0, 1]."""
    return np.clip(np.searchsorted(BIN_EDGES, masked_share, side="left") - 1, 0, len(BIN_EDGES) - 2)


@dataclass
class AuditSums:
    """What the description is made of, by bin."""

    temperatures: tuple[float, ...]
    names: list[str]
    bins: list[np.ndarray] = field(default_factory=list)
    tails: dict[float, list[np.ndarray]] = field(default_factory=dict)
    products: dict[str, dict[LossName, np.ndarray]] = field(default_factory=dict)

    def add_tails(self, answers: Answers, bins: np.ndarray) -> None:
        """Tail masses and divergences of a slice, target by target."""
        self.bins.append(bins)
        for temperature, *columns in stored_tails(answers):
            self.tails.setdefault(temperature, []).append(np.stack([column.numpy() for column in columns]))

    def add_gradients(self, name: str, answers: Answers, bins: np.ndarray) -> None:
        """Products of a slice, summed by bin."""
        of_student = self.products.setdefault(name, {})
        for loss, products in gradient_products(answers):
            sums = [np.bincount(bins, column.numpy(), len(BIN_EDGES) - 1) for column in products]
            of_student[loss] = of_student.get(loss, 0.0) + np.stack(sums)

    def summary(self) -> dict[str, Any]:
        """Means, percentiles, cosines and ratios; over all bins first, then bin by bin."""
        bins = np.concatenate(self.bins)
        chosen = [np.ones(len(bins), bool), *(bins == number for number in range(len(BIN_EDGES) - 1))]
        return {
            "compared": len(bins), "bin_edges": list(BIN_EDGES),
            "bin_targets": [int(some.sum()) for some in chosen[1:]],
            "temperatures": [
                _by_temperature(temperature, np.concatenate(self.tails[temperature], axis=1), chosen)
                for temperature in self.temperatures
            ],
            "students": [
                {"name": name, "losses": [_loss(loss, sums) for loss, sums in self.products[name].items()]}
                for name in self.names
            ],
        }  # fmt: skip


def _by_temperature(temperature: float, values: np.ndarray, chosen: Sequence[np.ndarray]) -> dict[str, Any]:
    """`values`: stored tail, exact tail, divergence [3, n]."""

    def over(column: np.ndarray, how: Any) -> dict[str, Any]:
        found = [_number(how(column[some])) if some.any() else None for some in chosen]
        return {"all": found[0], "by_bin": found[1:]}

    stored, exact, kl = values
    return {
        "temperature": temperature,
        "tail_stored": over(stored, np.mean), "tail_exact": over(exact, np.mean),
        "tail_error": over(np.abs(stored - exact), np.max),
        "kl_mean": over(kl, np.mean), "kl_p99": over(kl, lambda some: np.quantile(some, 0.99)),
    }  # fmt: skip


def _loss(loss: LossName, sums: np.ndarray) -> dict[str, Any]:
    """`sums`: inner product and both squared lengths by bin, [3, bins]."""
    columns = np.concatenate([sums.sum(axis=1, keepdims=True), sums], axis=1)
    dot, stored, dense = columns
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine, ratio = dot / np.sqrt(stored * dense), np.sqrt(stored / dense)
    values = {"cosine": cosine, "norm_ratio": ratio}
    return {
        "loss": loss.name, "temperature": loss.temperature, "tidal_lambda": loss.tidal_lambda,
        **{name: {"all": _number(v[0]), "by_bin": [_number(x) for x in v[1:]]} for name, v in values.items()},
    }  # fmt: skip


def _number(value: Any) -> float | None:
    """None for what is no number: an empty bin, a gradient of zero."""
    return float(value) if np.isfinite(value) else None
