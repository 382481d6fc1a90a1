"""Chunk alignment of two tokenisations of one text (docs/math.md, symbol c).

Bytes of the teacher's tokens, bytes of the student's tokens -> the shortest pairs of token spans that cover the same
bytes. Byte positions are compared and never strings, so a character that is split over tokens needs no special case.
The alternative, dynamic programming over decoded strings, costs a quadratic table and finds the same chunks.
"""

from collections.abc import Sequence

import numpy as np


def align_chunks(teacher: Sequence[bytes], student: Sequence[bytes]) -> np.ndarray:
    """Cut two tokenisations of the same bytes wherever both have a token boundary.

    Either side may be truncated: the bytes must agree up to the end of the shorter side, and what lies beyond the last
    common boundary is dropped. A token without bytes joins the chunk before it; at the very start, the first chunk.

    Args:
        teacher: bytes of the teacher's tokens, in order.
        student: bytes of the student's tokens, in order.
    Returns: int32 [c, 4]: teacher start, teacher end, student start, student end; end exclusive, each span starts where
        the one before it ended.
    Raises: ValueError: the bytes differ before the end of the shorter side.
    """
    _require_same_bytes(b"".join(teacher), b"".join(student))
    teacher_ends = np.cumsum([len(token) for token in teacher], dtype=np.int64)
    student_ends = np.cumsum([len(token) for token in student], dtype=np.int64)
    cuts = np.intersect1d(teacher_ends, student_ends)
    cuts = cuts[cuts > 0]
    ends = [np.searchsorted(side, cuts, side="right") for side in (teacher_ends, student_ends)]
    starts = [np.concatenate([[0], end[:-1]])[: len(end)] for end in ends]
    return np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1).astype(np.int32)


def _require_same_bytes(teacher: bytes, student: bytes) -> None:
    length = min(len(teacher), len(student))
    if teacher[:length] == student[:length]:
        return
    at = next(i for i in range(length) if teacher[i] != student[i])
    near = slice(max(0, at - 10), at + 10)
    raise ValueError(
        f"teacher and student tokens differ at byte {at}: {teacher[near]!r} against {student[near]!r}; "
        "chunks exist only between two tokenisations of the same text"
    )
