"""What a comparison says of scores made by hand: means, errors, pairing by seed and by document, claims."""

import math
from typing import Any

import numpy as np
import pytest
from tide.student_train.comparison import gain, student_t_p, summarise, verdict_on

T = [0.1, 0.9]


def score(bits: list[float], accuracy: float = 0.25, documents: list | None = None) -> dict[str, Any]:
    return {"t": T, "bits_per_byte": bits, "accuracy": [accuracy] * 2, "documents": documents or [bits[0], None]}


def test_means_and_standard_errors_are_those_worked_by_hand() -> None:
    scores = {("ce", s): score([4.0 + d, 4.0 + d]) for s, d in [(1, 0.0), (2, 0.1), (3, 0.2)]}
    arm = summarise(scores, ["ce"], against=["ce"])["arms"]["ce"]
    assert arm["bits_per_byte"] == pytest.approx(4.1)
    assert arm["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert arm["spread"] == pytest.approx(0.2)
    assert arm["against"] == {}


def test_a_gain_is_paired_by_seed() -> None:
    """Seeds that differ by 1 bit hide nothing: the arm saves 0.1, 0.2 and 0.3 in them."""
    scores = {("ce", s): score([3.0 + s, 3.0 + s]) for s in (1, 2, 3)}
    scores |= {("kl", s): score([3.0 + s - 0.1 * s, 3.0 + s - 0.1 * s]) for s in (1, 2, 3)}
    over = gain(scores, "kl", "ce")
    assert over["gain"] == pytest.approx(0.2)
    assert over["gain_by_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert over["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert over["p"] == pytest.approx(0.0742, abs=1e-4)  # t = 3.4641 with 2 degrees of freedom
    assert verdict_on(over) == "open"


def test_only_seeds_that_both_arms_have_are_paired() -> None:
    scores = {("ce", 1): score([4.0, 4.0]), ("ce", 2): score([9.0, 9.0]), ("kl", 1): score([3.5, 3.5])}
    over = gain(scores, "kl", "ce")
    assert over["gain_by_seed"] == [0.5]
    assert (over["standard_error"], over["p"]) == (None, None)
    assert verdict_on(over).startswith("open: a standard error needs two seeds")
    assert list(summarise(scores, ["ce", "kl", "never-run"], against=["ce"])["arms"]) == ["ce", "kl"]


def test_a_claim_may_be_about_some_times_and_about_accuracy() -> None:
    scores = {("a", s): score([4.0, 3.0 + 0.01 * s], accuracy=0.30) for s in (1, 2)}
    scores |= {("b", s): score([3.0, 3.5 + 0.02 * s], accuracy=0.25 + 0.01 * s) for s in (1, 2)}
    assert gain(scores, "a", "b", at=[0.9])["gain_by_seed"] == pytest.approx([0.51, 0.52])
    assert gain(scores, "a", "b")["gain"] < 0
    assert gain(scores, "a", "b", metric="accuracy")["gain_by_seed"] == pytest.approx([0.04, 0.03])
    assert verdict_on(gain(scores, "a", "b", at=[0.9])) == "holds"
    assert verdict_on(gain(scores, "b", "a", at=[0.9])) == "the other way round"


def test_z_is_paired_by_document() -> None:
    """Gains .1, .3, .2 by document: mean .2, standard error .1 / sqrt(3); a document without a score is left out."""
    scores = {
        (arm, 1): score([3.0, 3.0], documents=values)
        for arm, values in {"ce": [3.0, 2.0, 4.0, None], "kl": [2.9, 1.7, 3.8, None]}.items()
    }
    assert gain(scores, "kl", "ce")["z"] == pytest.approx(0.2 / (0.1 / math.sqrt(3)))
    assert gain(scores, "kl", "kl")["z"] is None


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (29, 2.04523)]
)
def test_students_t_has_its_tabulated_five_per_cent_points(degrees: int, t: float) -> None:
    assert student_t_p(t, degrees) == pytest.approx(0.05, abs=2e-6)
    assert student_t_p(-t, degrees) == student_t_p(t, degrees)
    assert student_t_p(0.0, degrees) == 1


@pytest.mark.parametrize("degrees", [1, 2, 5, 8])
def test_students_t_equals_the_integral_of_its_density(degrees: int) -> None:
    grid = np.linspace(-1.3, 1.3, 200_001)
    constant = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    inside = np.trapezoid(constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2), grid)
    assert student_t_p(1.3, degrees) == pytest.approx(1 - inside, abs=1e-9)
