"""Keyed random numbers, diffusion times, masks and the CompDemo split (docs/math.md: Noise, CompDemo).

(seed, sample, view, purpose) -> the same draw on every machine, in any order, with any number of workers: each
draw comes from its own counter-based generator, whose key is a hash of those four. There is no global state.

Masks are drawn over *units*: a unit is a chunk (all its tokens on both sides) or a single token that lies in no
chunk. Prompt tokens belong to no unit (-1) and are never masked.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from .config import NoiseConfig

GOLDEN_RATIO = (5**0.5 - 1) / 2


def keyed_generator(seed: int, *key: str | int) -> np.random.Generator:
    """A Philox generator whose 128-bit key is BLAKE2b of (seed, *key); equal keys give equal streams everywhere."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


def timesteps(sample_index: int, sample_id: str, noise: NoiseConfig) -> Float32[np.ndarray, " views"]:
    """Diffusion times of all views of one sample, t = t_min + (t_max - t_min) u with u in [0, 1).

    `stratified`: V consecutive samples of the plan and their V views form a Latin square of the V strata of [0, 1),
    so each sample sees every stratum once and each view (one epoch of training) meets all strata equally often.
    Within its stratum, the position of each view follows a Kronecker sequence over the squares (frac of start plus
    square times the golden ratio), so an epoch's t are spread evenly as well. `uniform`: independent draws, as in the
    paper's code.

    Args:
        sample_index: position of the sample in the plan; only its square (index // V) and its row in it matter.
        sample_id: keys the draws of `uniform`.
    Returns: each in [t_min, t_max].
    """
    num_views = noise.views
    if noise.timesteps == "uniform":
        u = np.array([keyed_generator(noise.seed, sample_id, view, "t").random() for view in range(num_views)])
    else:
        square, row = divmod(sample_index, num_views)
        shuffle = keyed_generator(noise.seed, square, "strata")
        rows, strata = shuffle.permutation(num_views), shuffle.permutation(num_views)
        views = np.arange(num_views)
        stratum = strata[(rows[row] + views) % num_views]
        start = keyed_generator(noise.seed, "strata", "start").random((num_views, num_views))
        inside = (start[views, stratum] + square * GOLDEN_RATIO) % 1.0
        u = (stratum + inside) / num_views
    return np.clip(noise.t_min + (noise.t_max - noise.t_min) * u, noise.t_min, noise.t_max).astype(np.float32)


@dataclass(frozen=True)
class Units:
    """Which masking unit each token of both sides belongs to; -1 for prompt tokens."""

    student: Int32[np.ndarray, " l_student"]
    teacher: Int32[np.ndarray, " l_teacher"]
    num_chunks: int  # units 0 .. num_chunks - 1 are the chunks, in order
    num_units: int


def masking_units(
    chunks: Int[np.ndarray, "c 4"], student_tokens: int, student_prompt: int, teacher_tokens: int = 0,
    teacher_prompt: int = 0,
) -> Units:  # fmt: skip
    """Number the units of a sample: chunks first, then lone student tokens, then lone teacher tokens.

    Args:
        chunks: teacher start, end, student start, end; disjoint, inside both responses.
        student_tokens, student_prompt: length of x_0 and of its prompt; likewise for the teacher.
    """
    student = np.full(student_tokens, -1, np.int32)
    teacher = np.full(teacher_tokens, -1, np.int32)
    for unit, (teacher_start, teacher_end, student_start, student_end) in enumerate(chunks):
        teacher[teacher_start:teacher_end] = unit
        student[student_start:student_end] = unit
    num_units = len(chunks)
    for side, prompt in ((student, student_prompt), (teacher, teacher_prompt)):
        lone = np.flatnonzero(side[prompt:] < 0) + prompt
        side[lone] = num_units + np.arange(len(lone), dtype=np.int32)
        num_units += len(lone)
    return Units(student, teacher, len(chunks), num_units)


@dataclass(frozen=True)
class ViewMasks:
    """One noise draw: the masked sets of both sides, and CompDemo's split of them."""

    student: Bool[np.ndarray, " l_student"]  # M
    teacher_a: Bool[np.ndarray, " l_teacher"]  # M_A, masked in the second pass
    teacher_b: Bool[np.ndarray, " l_teacher"]  # M_B, masked in the first pass; with CompDemo off M_B = M
    active_chunks: Int[np.ndarray, " c"]  # masked chunks, ascending


def draw_masks(units: Units, t: float | np.floating, sample_id: str, view: int, noise: NoiseConfig) -> ViewMasks:
    """Mask each unit with probability t, then split the masked units into CompDemo's halves.

    `unit = chunk`: one draw per unit, so a token's marginal mask probability is exactly t. `unit = token` (the
    paper's code): one draw per token, then every chunk with a masked token is masked whole, so the marginal of a
    token in a chunk of m student tokens is 1 - (1 - t)^m.
    """
    drawn = keyed_generator(noise.seed, sample_id, view, "mask").random(units.num_units)
    masked_units = drawn < t
    if noise.unit == "token":
        of_tokens = keyed_generator(noise.seed, sample_id, view, "token mask").random(len(units.student)) < t
        hit = units.student[of_tokens & (units.student >= 0)]
        in_student = np.zeros(units.num_units, bool)
        in_student[units.student[units.student >= 0]] = True
        masked_units[in_student] = False
        masked_units[hit] = True
    in_a = np.zeros(units.num_units, bool)
    if noise.comp_demo:
        in_a = keyed_generator(noise.seed, sample_id, view, "demo").random(units.num_units) < noise.demo_ratio
    return ViewMasks(
        student=_of_tokens(units.student, masked_units),
        teacher_a=_of_tokens(units.teacher, masked_units & in_a),
        teacher_b=_of_tokens(units.teacher, masked_units & ~in_a),
        active_chunks=np.flatnonzero(masked_units[: units.num_chunks]),
    )


def audited_positions(
    position: Int[np.ndarray, " n"], length: int, sample_id: str, view: int, *, seed: int, share: float
) -> Bool[np.ndarray, " n"]:
    """Which targets are stored in full (`signal.audit_share`): each with probability `share`, drawn by its position.

    Args:
        position: of the targets in the student's x_0; length: of x_0.
        seed: of the noise.
    """
    if not share:
        return np.zeros(len(position), bool)
    return (keyed_generator(seed, "audit", sample_id, view).random(length) < share)[position]


def _of_tokens(unit_of_token: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Per-unit flags spread to tokens; prompt tokens get False."""
    if len(units) == 0:
        return np.zeros(len(unit_of_token), bool)
    return units[unit_of_token] & (unit_of_token >= 0)
