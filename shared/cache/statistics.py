"""Counts and sums of a shard: one pass over its batches -> `ShardStatistics`; they add up to those of the cache.

Taken while writing, kept in receipts and the manifest, read by `inspect-cache` without opening a shard.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .batch import RowBatch
from .checks import segment_sums
from .schema import Layout

NUM_BINS = 20
"""Bins of t and of the mask ratio: bin i covers (i / 20, (i + 1) / 20], ratio 0 falls into the first."""


@dataclass(frozen=True)
class ShardStatistics:
    """Sums over rows, so that `a + b` describes the rows of both; entropies in nats.

    Args:
        tokens: of x_0 over all rows; response_tokens: those that may be masked.
        num_top_counts, chunk_len_counts: how often each value 0, 1, 2, ... occurs.
        t_targets: targets by bin of t; t_head_mass, t_entropy: sums over these targets of the kept probability and of
            the entropy at temperature 1 with all tokens outside the kept ones as one (a lower bound of the entropy).
        t_answered, t_correct, t_clean_logp: by bin of t, the teacher's answered tokens, how many of them it holds for
            the likeliest, and the sum of the clean tokens' log-probabilities; only the dump knows.
        unigram_logp, unigram_correct: the same sums over all answered tokens for a unigram model of the text.
        codec_kl, codec_kl_counts: what rounding cost, by temperature and bin (codec_error.py); only the writer knows.
        column_bytes: compressed bytes on disk by column.
    """

    samples: int
    rows: int
    tokens: int
    response_tokens: int
    masked_positions: int
    chunks: int
    targets: int
    kept_entries: int
    gold_logp: float
    chunk_logp: float
    t_histogram: tuple[int, ...]
    mask_ratio_histogram: tuple[int, ...]
    num_top_counts: tuple[int, ...]
    chunk_len_counts: tuple[int, ...]
    t_targets: tuple[int, ...]
    t_head_mass: tuple[float, ...]
    t_entropy: tuple[float, ...]
    codec_kl: tuple[float, ...]
    codec_kl_counts: tuple[int, ...]
    column_bytes: dict[str, int]
    t_answered: tuple[int, ...] = ()
    t_correct: tuple[int, ...] = ()
    t_clean_logp: tuple[float, ...] = ()
    unigram_logp: float = 0.0
    unigram_correct: float = 0.0

    @classmethod
    def empty(cls) -> "ShardStatistics":
        """Of no rows: the zero of `+`."""
        counts, sums = (0,) * NUM_BINS, (0.0,) * NUM_BINS
        return cls(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, counts, counts, (), (), counts, sums, sums, (), (), {})

    def __add__(self, other: "ShardStatistics") -> "ShardStatistics":
        values: dict[str, Any] = {}
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, tuple):
                values[name] = tuple(a + b for a, b in zip_longest(mine, theirs, fillvalue=0))
            elif isinstance(mine, dict):
                values[name] = {key: mine.get(key, 0) + theirs.get(key, 0) for key in sorted({*mine, *theirs})}
            else:
                values[name] = mine + theirs
        return ShardStatistics(**values)


WRITER_ONLY = (
    "codec_kl", "codec_kl_counts", "t_answered", "t_correct", "t_clean_logp", "unigram_logp", "unigram_correct",
)  # fmt: skip
"""Fields that no reader can compute again from the shards: what was meant, and answers on the teacher's own tokens."""


def merge(parts: Sequence[ShardStatistics]) -> ShardStatistics:
    """Sum in the given order (the order decides the last bit of float sums)."""
    total = ShardStatistics.empty()
    for part in parts:
        total = total + part
    return total


def unit_bin(values: np.ndarray) -> np.ndarray:
    """Bin of each value in [0, 1]."""
    return np.clip(np.ceil(values.astype(np.float64) * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)


def _counts(values: np.ndarray, size: int = 0) -> tuple[int, ...]:
    return tuple(np.bincount(values, minlength=size).tolist())


def batch_statistics(batch: RowBatch, samples: int) -> ShardStatistics:
    """Statistics of one batch in which `samples` samples begin; bytes are known only when the file is closed."""
    lists, num_tokens = batch.lists, batch.counts["num_tokens"].astype(np.int64)
    response = num_tokens - batch.prompt_tokens
    num_masked = batch.counts["num_masked"]
    bins = unit_bin(batch.t)
    values: dict[str, Any] = {
        "samples": samples,
        "rows": len(batch),
        "tokens": int(num_tokens.sum()),
        "response_tokens": int(response.sum()),
        "masked_positions": int(num_masked.sum()),
        "t_histogram": _counts(bins, NUM_BINS),
        "mask_ratio_histogram": _counts(unit_bin(num_masked / np.maximum(response, 1)), NUM_BINS),
    }
    if "chunk_len" in lists:
        length = lists["chunk_len"].values
        values["chunks"] = len(length)
        values["chunk_len_counts"] = _counts(length)
        values["chunk_logp"] = float(lists["chunk_logp"].values.sum(dtype=np.float64))
    if "num_top" in lists:
        num_top = lists["num_top"].values
        logp = lists["top_logp"].values.astype(np.float64)
        target_bin = bins[lists["num_top"].rows()]
        mass = np.minimum(segment_sums(np.exp(logp), num_top), 1.0)
        tail = 1 - mass
        entropy = segment_sums(-np.exp(logp) * logp, num_top) - tail * np.log(np.maximum(tail, 1e-300))
        values |= {
            "targets": len(num_top),
            "kept_entries": len(logp),
            "num_top_counts": _counts(num_top),
            "gold_logp": float(lists["chunk_logp"].values[batch.chunk_of_target()].sum(dtype=np.float64)),
            "t_targets": _counts(target_bin, NUM_BINS),
            "t_head_mass": tuple(np.bincount(target_bin, mass, NUM_BINS).tolist()),
            "t_entropy": tuple(np.bincount(target_bin, entropy, NUM_BINS).tolist()),
        }
    return dataclasses.replace(ShardStatistics.empty(), **values)


def leaf_bytes(metadata: pq.FileMetaData, layout: Layout) -> dict[str, int]:
    """Compressed bytes on disk by column, from a footer."""
    sizes = {column.name: 0 for column in layout.columns}
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        for column in range(info.num_columns):
            leaf = info.column(column)
            sizes[leaf.path_in_schema.split(".list.")[0]] += leaf.total_compressed_size
    return sizes
