"""What a comparison of students says: scores of arms x seeds -> means, standard errors, paired differences, claims.

Two students are compared seed by seed, because a seed gives both the same first weights and the same order. With gains
g_s = control_s - arm_s (bits per byte that the arm saves) over n seeds:

    gain = mean(g)      standard error = sd(g) / sqrt(n)      p: two-sided, Student's t with n - 1 degrees of freedom

which is about training anew on the same data. z is about other documents: the mean over documents of the gain averaged
over seeds, divided by its standard error over documents.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

AllScores = Mapping[tuple[str, int], Mapping[str, Any]]
"""Of each (arm, seed), the content of `heldout.json` (student_train/arms.py)."""
Metric = Literal["bits_per_byte", "accuracy"]
CERTAIN_P = 0.05
"""Below it, a difference counts as more than chance."""


def summarise(scores: AllScores, arms: Sequence[str], *, against: Sequence[str]) -> dict[str, Any]:
    """Everything that a table or a picture shows.

    Args:
        arms: in order; those without any score are left out.
        against: arms that the others are compared with.
    """
    arms = [arm for arm in arms if seeds_of(scores, arm)]
    by_arm = {}
    for arm in arms:
        seeds = seeds_of(scores, arm)
        bits = np.array([scores[arm, seed]["bits_per_byte"] for seed in seeds])
        accuracy = np.array([scores[arm, seed]["accuracy"] for seed in seeds])
        per_seed = bits.mean(1)
        by_arm[arm] = {
            "bits_per_byte": float(per_seed.mean()), "standard_error": standard_error(per_seed),
            "seeds": per_seed.tolist(), "spread": float(np.ptp(per_seed)), "bits_per_byte_by_t": bits.mean(0).tolist(),
            "accuracy": float(accuracy.mean()), "accuracy_by_t": accuracy.mean(0).tolist(),
            "against": {c: gain(scores, arm, c) for c in against if c in arms and c != arm},
        }  # fmt: skip
    first = next(iter(scores.values()))
    all_seeds = sorted({seed for _, seed in scores})
    return {"arms": by_arm, "t": first["t"], "seeds": all_seeds, "documents": len(first["documents"])}


def seeds_of(scores: AllScores, *arms: str) -> list[int]:
    """Seeds that all of these arms were scored with."""
    return sorted(set.intersection(*({seed for name, seed in scores if name == arm} for arm in arms)))


def gain(
    scores: AllScores, arm: str, control: str, *, at: Sequence[float] | None = None, metric: Metric = "bits_per_byte"
) -> dict[str, Any]:
    """How much better `arm` is than `control`: fewer bits per byte, or a larger share of right answers.

    Args: at: some of the times that were asked; None: the mean over all. Only those have no z.
    Returns: None for what needs more seeds or documents than there are.
    """
    seeds = seeds_of(scores, arm, control)
    sign = 1 if metric == "bits_per_byte" else -1

    def values(name: str) -> np.ndarray:
        asked = [zip(scores[name, seed]["t"], scores[name, seed][metric], strict=True) for seed in seeds]
        return np.array([np.mean([value for t, value in pairs if at is None or t in at]) for pairs in asked])

    per_seed = sign * (values(control) - values(arm))
    error = standard_error(per_seed)
    return {
        "gain": float(per_seed.mean()) if seeds else None, "standard_error": error, "gain_by_seed": per_seed.tolist(),
        "p": student_t_p(float(per_seed.mean()) / error, len(per_seed) - 1) if error else None,
        "z": document_z(scores, arm, control) if at is None and metric == "bits_per_byte" else None,
    }  # fmt: skip


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Of the mean; None for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def document_z(scores: AllScores, arm: str, control: str) -> float | None:
    """z of the gain over documents; None if it does not vary or a single document is left."""
    seeds = seeds_of(scores, arm, control)
    ours, theirs = (
        np.array([[np.nan if v is None else v for v in scores[name, seed]["documents"]] for seed in seeds])
        for name in (arm, control)
    )  # [seeds, documents]; NaN where a document was never masked
    paired = (theirs - ours).mean(0)
    paired = paired[~np.isnan(paired)]
    error = standard_error(paired)
    return float(paired.mean() / error) if error else None


def student_t_p(t: float, degrees: int) -> float:
    """Two-sided p of Student's t: 1 - P(|T| <= t), by the finite series for whole degrees of freedom.

    With a = arctan(t / sqrt(n)), P is, for odd n, 2/pi (a + sin a (cos a + 2/3 cos^3 a + ...)), up to cos^(n-2); for
    even n, sin a (1 + 1/2 cos^2 a + (1 3)/(2 4) cos^4 a + ...), up to cos^(n-2) (Abramowitz and Stegun, 26.7.3-4).
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    inside = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def verdict_on(over: Mapping[str, Any]) -> str:
    """A gain in words: does the claim hold, is it the other way round, or is that open?"""
    if over["p"] is None:
        return "open: a standard error needs two seeds or more"
    if over["p"] >= CERTAIN_P:
        return "open"
    return "holds" if over["gain"] > 0 else "the other way round"
