"""`signal.codec: compact`: fewer bytes than plain columns, at the price of one lookup and one running sum.

    top_ranks list<int32>   in place of top_ids: the rank of a token. The ids of `signal.frequent_ids` in the manifest
                            have the ranks 0, 1, ... in the order given there, all others follow in ascending order
    top_steps list<int32>   in place of top_logp, in multiples of `logp_step` nats: of a target's first entry how far it
                            lies below 0, of every other how far below the one before

Small numbers are common in both, and BYTE_STREAM_SPLIT brings the bytes that are nearly always zero together. Ranks
come from the planned answers' own tokens, so they are a function of the plan. Nothing is lost: both directions are
exact, and a `RowBatch` never shows which codec it came from.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ..errors import CacheError
from .schema import MAX_FREQUENT_IDS, Layout


def frequent_ids(counts: np.ndarray) -> tuple[int, ...]:
    """Ids by falling count, the lower id first among equals. Args: counts: int [V], how often each id occurs."""
    order = np.argsort(-counts, kind="stable")[:MAX_FREQUENT_IDS]
    return tuple(order[counts[order] > 0].tolist())


def encode_top(
    top_ids: np.ndarray, top_logp: np.ndarray, num_top: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """`top_ranks` and `top_steps`, int32, of entries in the order of a `RowBatch`.

    Raises: CacheError: a log-probability is too low to be counted in steps.
    """
    assert layout.logp_step is not None
    below = np.round(-top_logp.astype(np.float64) / layout.logp_step)
    if below.size and below.max() > np.iinfo(np.int32).max:
        raise CacheError(
            f"a log-probability of {top_logp.min():g} cannot be counted in steps of {layout.logp_step:g}; use a larger "
            "signal.logp_step, or signal.codec=plain"
        )
    steps = np.diff(below, prepend=0)
    first = _first_entries(num_top)
    steps[first] = below[first]
    return rank_tables(layout.frequent_ids, layout.vocab_size)[0][top_ids], steps.astype(np.int32)


def decode_top(
    ranks: np.ndarray, steps: np.ndarray, num_top: np.ndarray, layout: Layout,
    refuse: Callable[[int, str, str], CacheError],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`top_ids` int32 and `top_logp` float32 of what a file holds; `num_top` adds up to their number.

    Args: refuse: (index of a value, its column, what is wrong) -> the error to raise.
    Raises: CacheError: a rank outside the vocabulary, or a negative step.
    """
    id_of_rank = rank_tables(layout.frequent_ids, layout.vocab_size)[1]
    outside = (ranks < 0) | (ranks >= len(id_of_rank))
    for name, values, bad, said in (
        ("top_ranks", ranks, outside, f"not a rank from 0 to {len(id_of_rank) - 1}"),
        ("top_steps", steps, steps < 0, "negative: a target's entries are not in order of probability"),
    ):
        if bad.any():
            index = int(np.argmax(bad))
            raise refuse(index, name, f"{values[index]} is {said}")
    first, sums = _first_entries(num_top), np.cumsum(steps, dtype=np.int64)
    before = np.where(first > 0, sums[first - 1], 0)
    below = sums - np.repeat(before, num_top[num_top > 0])
    assert layout.logp_step is not None
    return id_of_rank[ranks], (0.0 - below * layout.logp_step).astype(np.float32)  # 0.0 - 0.0 is no -0.0


def _first_entries(num_top: np.ndarray) -> np.ndarray:
    """Index of the first entry of every target that has one."""
    kept = num_top[num_top > 0].astype(np.int64)
    return np.cumsum(kept) - kept


@lru_cache(maxsize=4)
def rank_tables(frequent: tuple[int, ...], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [V] each: the rank of every id, and the id of every rank. Args: frequent: distinct ids."""
    rest = np.ones(vocab_size, bool)
    rest[list(frequent)] = False
    id_of_rank = np.concatenate([np.array(frequent, np.int32), np.flatnonzero(rest).astype(np.int32)])
    rank = np.empty(vocab_size, np.int32)
    rank[id_of_rank] = np.arange(vocab_size, dtype=np.int32)
    return rank, id_of_rank
