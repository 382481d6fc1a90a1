"""The losses of "Turning the TIDE" (arXiv 2604.26951) as pure functions (docs/math.md: Losses).

log-probabilities of student and teacher in, one scalar in nats out. All arithmetic is float32 (float64 stays).
Token-level losses run on any [n, m] log-probabilities: the k+1 simplex of SparseLogits, or a dense vocabulary.
Chunk-level losses run on one number per chunk, the summed log-probability of its clean tokens.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..shared.sparse_logits import log1mexp

CHUNK_CLAMP = 1e-7
"""Teacher chunk probabilities are clamped to [1e-7, 1 - 1e-7]: the bound on Reverse CALM's gradient (paper §2.3)."""


def cross_entropy(
    student_gold_logp: Float[Tensor, " n"], weight: Float[Tensor, " n"], denominator: int | float
) -> Float[Tensor, ""]:
    """BD3LM's denoising cross-entropy: sum over masked positions of -log s(clean) w(t), divided by N.

    Args:
        student_gold_logp: nats <= 0 at temperature 1; carries the gradient.
        weight: w(t) of each position (1/t, or 1), times any per-sequence factor.
        denominator: N > 0, counted over the global batch so that accumulation and more ranks change nothing.
    Returns: nats; 0 and attached to the graph when n = 0.
    """
    return -(_full(student_gold_logp) * weight).sum() / denominator


def kl_loss(
    student_logp: Float[Tensor, "n m"], teacher_logp: Float[Tensor, "n m"], *, temperature: float, reverse: bool = False
) -> Float[Tensor, ""]:
    """T^2 times the mean KL(q || s) (paper §2; reversed: KL(s || q)), both sides already at temperature T.

    Args:
        student_logp: log-probabilities at `temperature`, nats; carries the gradient.
        teacher_logp: the same for the teacher; no gradient. -inf on both sides: the entry does not exist.
        temperature: > 0; enters as the factor T^2 alone.
    Returns: nats (times T^2); 0 and attached to the graph when n = 0.
    Raises: ValueError: temperature <= 0 or shapes differ.
    """
    _check(student_logp, teacher_logp, temperature)
    student_logp, teacher_logp = _full(student_logp), _full(teacher_logp.detach())
    divergence = _kl(student_logp, teacher_logp) if reverse else _kl(teacher_logp, student_logp)
    return temperature**2 * _mean(divergence)


def clean_token_loss(student_gold_logp: Float[Tensor, " n"], *, temperature: float) -> Float[Tensor, ""]:
    """The hard-label control: `kl_loss` with every teacher distribution replaced by the clean token.

    KL(one-hot || s) = -log s(clean), with the same positions, temperature and factor T^2.

    Args:
        student_gold_logp: log-probability of the clean token at `temperature`, nats; carries the gradient.
        temperature: > 0; enters as the factor T^2 alone.
    Returns: nats (times T^2); 0 and attached to the graph when n = 0.
    Raises: ValueError: temperature <= 0.
    """
    _check(student_gold_logp, student_gold_logp, temperature)
    return temperature**2 * _mean(-_full(student_gold_logp))


def tidal_loss(
    student_logp: Float[Tensor, "n m"], teacher_logp: Float[Tensor, "n m"], t: Float[Tensor, " n"], *,
    temperature: float, lambda_train: float, lambda_max: float, axis: str, timestep_weight: str,
) -> Float[Tensor, ""]:  # fmt: skip
    """TIDAL (paper §2.1): KL towards a detached log-linear mixture of student and teacher.

    r = softmax((1 - lambda_t) log s + lambda_t log q); T^2 * mean_M w(t) KL(r || s).

    Args:
        student_logp, teacher_logp: as in `kl_loss`.
        t: diffusion time of each position's view, in (0, 1].
        temperature: > 0, unitless.
        lambda_train, lambda_max, axis: give lambda_t, see `lambda_at`.
        timestep_weight: `uniform` or `midrange`, see `timestep_weights`.
    Returns: nats (times T^2); 0 and attached to the graph when n = 0. The mean divides by n, not by the weights' sum.
    Raises: ValueError: temperature <= 0, shapes differ, unknown axis or weight.
    """
    _check(student_logp, teacher_logp, temperature, t)
    student_logp, teacher_logp = _full(student_logp), _full(teacher_logp)
    lambda_t = lambda_at(t, lambda_train=lambda_train, lambda_max=lambda_max, axis=axis)[:, None]
    with torch.no_grad():
        exists = torch.isfinite(teacher_logp)
        mixed = (1 - lambda_t) * _finite(student_logp, exists) + lambda_t * _finite(teacher_logp, exists)
        target_logp = torch.log_softmax(mixed.masked_fill(~exists, -torch.inf), dim=1)
    return temperature**2 * _mean(timestep_weights(t, timestep_weight) * _kl(target_logp, student_logp))


def calm_loss(
    student_chunk_logp: Float[Tensor, " c"], teacher_chunk_logp: Float[Tensor, " c"], *,
    temperature: float, reverse: bool = False,
) -> Float[Tensor, ""]:  # fmt: skip
    """Bernoulli cross-entropy between chunk probabilities (paper §2.3; forward: CALM, reverse: Reverse CALM).

    Mean over chunks of -[q log s + (1 - q) log(1 - s)]; reversed: -[s log q + (1 - s) log(1 - q)],
    with s, q = exp(logp / temperature) and q clamped to [1e-7, 1 - 1e-7].

    Args:
        student_chunk_logp: sum of the clean tokens' log-probabilities in each chunk; nats, <= 0; carries the
            gradient. Not clamped: a clamp would silently kill the gradient of hard chunks.
        teacher_chunk_logp: the same from the cache; nats, <= 0; no gradient.
        temperature: > 0, unitless.
    Returns: nats; 0 and attached to the graph when c = 0.
    Raises: ValueError: temperature <= 0 or shapes differ.
    """
    _check(student_chunk_logp, teacher_chunk_logp, temperature)
    log_q, log_not_q = _teacher_bernoulli(teacher_chunk_logp, temperature)
    log_s = _full(student_chunk_logp) / temperature
    if reverse:
        s = log_s.exp()
        return _mean(-(s * log_q + (1 - s) * log_not_q))
    return _mean(_bernoulli_cross_entropy(log_q.exp(), log_not_q.exp(), log_s))


def calm_tidal_loss(
    student_chunk_logp: Float[Tensor, " c"], teacher_chunk_logp: Float[Tensor, " c"], t: Float[Tensor, " c"], *,
    temperature: float, lambda_train: float, lambda_max: float, axis: str, timestep_weight: str,
) -> Float[Tensor, ""]:  # fmt: skip
    """CALM against the detached mixture (1 - lambda_t) s + lambda_t q of chunk probabilities (paper §2.1 on §2.3).

    Args:
        student_chunk_logp, teacher_chunk_logp: as in `calm_loss`.
        t: diffusion time of each chunk's view.
        temperature, lambda_train, lambda_max, axis, timestep_weight: as in `tidal_loss`.
    Returns: nats; 0 and attached to the graph when c = 0.
    Raises: ValueError: temperature <= 0, shapes differ, unknown axis or weight.
    """
    _check(student_chunk_logp, teacher_chunk_logp, temperature, t)
    lambda_t = lambda_at(t, lambda_train=lambda_train, lambda_max=lambda_max, axis=axis)
    log_q, log_not_q = _teacher_bernoulli(teacher_chunk_logp, temperature)
    log_s = _full(student_chunk_logp) / temperature
    with torch.no_grad():
        target = (1 - lambda_t) * log_s.exp() + lambda_t * log_q.exp()
        not_target = (1 - lambda_t) * -torch.expm1(log_s) + lambda_t * log_not_q.exp()
    return _mean(timestep_weights(t, timestep_weight) * _bernoulli_cross_entropy(target, not_target, log_s))


def lambda_train(progress: float, *, lambda_init: float, lambda_max: float, schedule: str) -> float:
    """TIDAL's schedule over training (§2.1): how far the target has moved from the student to the teacher.

    lambda_init + (lambda_max - lambda_init) g(progress), g = (1 - cos(pi p)) / 2 (`cosine`) or p (`linear`).

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


def lambda_at(t: Float[Tensor, " n"], *, lambda_train: float, lambda_max: float, axis: str) -> Float[Tensor, " n"]:
    """TIDAL's interpolation weight per position, in [0, 1]: more teacher late in training and at low noise (§2.1).

    axis `both`: lambda_train (1 - t); `training_only`: lambda_train; `timestep_only`: lambda_max (1 - t).

    Raises: ValueError: unknown axis.
    """
    if axis == "both":
        return lambda_train * (1 - t)
    if axis == "training_only":
        return torch.full_like(t, lambda_train)
    if axis == "timestep_only":
        return lambda_max * (1 - t)
    raise ValueError(f"axis = {axis!r}: expected both, training_only or timestep_only")


def timestep_weights(t: Float[Tensor, " n"], name: str) -> Float[Tensor, " n"]:
    """w(t) of TIDAL: `uniform` = 1; `midrange` = exp(-(t - 0.5)^2 / (2 * 0.15^2)).

    Raises: ValueError: unknown name.
    """
    if name == "uniform":
        return torch.ones_like(t)
    if name == "midrange":
        return torch.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))
    raise ValueError(f"timestep_weight = {name!r}: expected uniform or midrange")


def _kl(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """KL(p || q) [n] of log-probabilities [n, m], with 0 log 0 = 0; infinite where q alone is 0.

    An entry that does not exist (padding of an adaptive top-k, an empty tail) is -inf on both sides.
    """
    exists = p_logp > -torch.inf
    p_logp, q_logp = _finite(p_logp, exists), _finite(q_logp, exists)
    return (torch.where(exists, p_logp.exp(), 0.0) * (p_logp - q_logp)).sum(dim=1)


def _finite(values: Tensor, exists: Tensor) -> Tensor:
    """`values` with 0 where the entry does not exist, so that neither value nor gradient becomes NaN."""
    return torch.where(exists, values, 0.0)


def _teacher_bernoulli(chunk_logp: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log q, log(1 - q)) of the teacher's chunk probabilities, clamped on both ends in log space."""
    log_q = _full(chunk_logp.detach()) / temperature
    log_q = log_q.clamp(math.log(CHUNK_CLAMP), math.log1p(-CHUNK_CLAMP))
    return log_q, log1mexp(log_q)


def _bernoulli_cross_entropy(target: Tensor, not_target: Tensor, log_s: Tensor) -> Tensor:
    """-[target log s + (1 - target) log(1 - s)] per chunk, exact from log s = -200 up to s = 1 - 1e-6 in float32.

    Nearer to 1, log(1 - s) carries the rounding of log s itself, and its gradient fades with it (by a fifth at
    s = 1 - 1e-7): it matters only where a saturated student meets a teacher that is much less sure.
    """
    # s = 1 stands for the largest float below 1. The clamp is on the value alone: with its gradient cut off, a student
    # that is surer than the teacher would hear nothing. d log s / dz shrinks as 1 - s, so the product stays bounded.
    largest = -torch.finfo(log_s.dtype).eps / 2
    below_one = log_s + (log_s.clamp(max=largest) - log_s).detach()
    return -(target * log_s + not_target * log1mexp(below_one))


def _mean(values: Tensor) -> Tensor:
    """Mean that is 0 and attached to the graph when there is nothing to average."""
    return values.sum() / max(1, values.numel())


def _full(values: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _check(student: Tensor, teacher: Tensor, temperature: float, t: Tensor | None = None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: expected a number > 0")
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape")
    if t is not None and t.shape != student.shape[:1]:
        raise ValueError(f"t {list(t.shape)}: expected one diffusion time per row of {list(student.shape)}")
