"""TIDAL's schedule over training (paper §2.1): how far the target has moved from the student to the teacher.

progress in [0, 1] -> lambda_train. The dependence on the diffusion time, lambda_t, is `losses.lambda_at`.
"""

import math


def lambda_train(progress: float, *, lambda_init: float, lambda_max: float, schedule: str) -> float:
    """lambda_init + (lambda_max - lambda_init) g(progress), g = (1 - cos(pi p)) / 2 (`cosine`) or p (`linear`).

    Args:
        progress: share of the optimiser steps done, in [0, 1]; values outside are clipped.
        lambda_init, lambda_max: weights at the start and the end, in [0, 1].
    Raises: ValueError: unknown schedule.
    """
    progress = min(1.0, max(0.0, progress))
    if schedule == "cosine":
        growth = (1 - math.cos(math.pi * progress)) / 2
    elif schedule == "linear":
        growth = progress
    else:
        raise ValueError(f"schedule = {schedule!r}: expected cosine or linear")
    return lambda_init + (lambda_max - lambda_init) * growth
