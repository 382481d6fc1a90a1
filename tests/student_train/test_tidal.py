"""TIDAL's schedule over training."""

from itertools import pairwise

import pytest
from tide.student_train.losses import lambda_train

ENDS = {"lambda_init": 0.1, "lambda_max": 0.9}


def test_cosine_schedule_is_the_numbers_worked_by_hand() -> None:
    # g(1/4) = (1 - cos(pi / 4)) / 2 = 0.146447; 0.1 + 0.8 * 0.146447 = 0.217157
    expected = {0.0: 0.1, 0.25: 0.217157, 0.5: 0.5, 0.75: 0.782843, 1.0: 0.9}
    for progress, value in expected.items():
        assert lambda_train(progress, **ENDS, schedule="cosine") == pytest.approx(value, abs=1e-6)


def test_linear_schedule_is_a_straight_line() -> None:
    for progress in (0.0, 0.3, 1.0):
        assert lambda_train(progress, **ENDS, schedule="linear") == pytest.approx(0.1 + 0.8 * progress)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_never_falls_and_stops_at_its_ends(schedule: str) -> None:
    values = [lambda_train(step / 100, **ENDS, schedule=schedule) for step in range(-5, 106)]
    assert all(later >= earlier for earlier, later in pairwise(values))
    assert values[0] == 0.1
    assert values[-1] == pytest.approx(0.9)
    assert lambda_train(0.7, lambda_init=0.4, lambda_max=0.4, schedule=schedule) == pytest.approx(0.4)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule = 'step': expected cosine or linear"):
        lambda_train(0.5, **ENDS, schedule="step")
