"""Chunk alignment of two tokenisations of one text (docs/math.md, symbol c).

Bytes of the teacher's tokens, bytes of the student's tokens -> the shortest pairs of token spans that cover the same
bytes. Byte positions are compared and never strings, so a character that is split over tokens needs no special case.
Where normalisers changed the text, `align_stretches` leaves out what the sides spell differently and keeps the rest.
The alternative, dynamic programming over decoded strings, costs a quadratic table and finds the same chunks.
"""

from collections.abc import Callable, Sequence

import numpy as np

Align = Callable[[Sequence[bytes], Sequence[bytes]], np.ndarray]
"""`align_chunks`, or what does the same."""


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
    texts = b"".join(teacher), b"".join(student)
    if not (texts[0].startswith(texts[1]) or texts[1].startswith(texts[0])):
        at = next(i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
        near = slice(max(0, at - 10), at + 10)
        raise ValueError(
            f"teacher and student tokens differ at byte {at}: {texts[0][near]!r} against {texts[1][near]!r}; "
            "chunks exist only between two tokenisations of the same text"
        )
    teacher_ends = np.cumsum([len(token) for token in teacher], dtype=np.int64)
    student_ends = np.cumsum([len(token) for token in student], dtype=np.int64)
    cuts = np.intersect1d(teacher_ends, student_ends)
    cuts = cuts[cuts > 0]
    ends = [np.searchsorted(side, cuts, side="right") for side in (teacher_ends, student_ends)]
    starts = [np.concatenate([[0], end[:-1]])[: len(end)] for end in ends]
    return np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1).astype(np.int32)


def align_stretches(
    teacher: Sequence[bytes], student: Sequence[bytes], teacher_cuts: np.ndarray, student_cuts: np.ndarray,
    align: Align | None = None,
) -> np.ndarray:  # fmt: skip
    """Chunks of two tokenisations of one text, which each side may have spelt in its own way.

    The text is cut where both sides know a token boundary. Between two such cuts both sides stand for the same part of
    the text; where they spell it with the same bytes, neighbours are joined and `align` cuts them. A part that
    is spelt differently, or that one side does not know how to spell, ends the stretch and has no chunk.

    Args:
        teacher: bytes of the teacher's tokens, in order.
        student: bytes of the student's tokens, in order.
        teacher_cuts, student_cuts: int [n, 3]: byte of the common text, ascending; number of the token that begins
            there; 0 if the bytes of what begins there are not known, else 1. The last row is the end.
        align: what cuts two tokenisations of the same bytes; None: `align_chunks`.
    Returns: int32 [c, 4]: teacher start, teacher end, student start, student end; ascending, spans do not overlap.
    """
    sides = (teacher, student)
    _, *rows = np.intersect1d(teacher_cuts[:, 0], student_cuts[:, 0], assume_unique=True, return_indices=True)
    if len(rows[0]) < 2:
        return np.zeros((0, 4), dtype=np.int32)
    at = [cuts[row, 1].copy() for cuts, row in zip((teacher_cuts, student_cuts), rows, strict=True)]
    for side, other in ((0, 1), (1, 0)):
        if rows[other][0] > rows[side][0] == 0:  # tokens without bytes belong to what this side began too late for
            at[side][0] = next((i for i in range(at[side][0], at[side][1]) if sides[side][i]), at[side][1])
    equal = (teacher_cuts[rows[0][:-1], 2] & student_cuts[rows[1][:-1], 2]).astype(bool)
    ends = [np.cumsum([0, *map(len, side)], dtype=np.int64) for side in sides]
    places = [end[tokens] for end, tokens in zip(ends, at, strict=True)]
    equal &= np.diff(places[0]) == np.diff(places[1])
    spelt = [b"".join(side) for side in sides]
    if not equal.all() or spelt[0][places[0][0] : places[0][-1]] != spelt[1][places[1][0] : places[1][-1]]:
        for n in np.flatnonzero(equal):
            (a, b), (c, d) = places[0][n : n + 2], places[1][n : n + 2]
            equal[n] = spelt[0][a:b] == spelt[1][c:d]
    known = len(teacher_cuts) == len(teacher) + 1 and len(student_cuts) == len(student) + 1
    if align is None and equal.all() and known and all((np.diff(side) > 0).all() for side in (*at, *places)):
        return np.stack([at[0][:-1], at[0][1:], at[1][:-1], at[1][1:]], axis=1)  # every boundary is known already
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(np.int8), [0]])))
    chunks = [np.zeros((0, 4), dtype=np.int32)]
    for low, high in edges.reshape(-1, 2):
        (a, b), (c, d) = at[0][[low, high]], at[1][[low, high]]
        chunks.append((align or align_chunks)(teacher[a:b], student[c:d]) + np.array([a, a, c, c], dtype=np.int32))
    return np.concatenate(chunks)
