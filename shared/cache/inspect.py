"""`tide inspect-cache`: a cache folder -> what is in it, as plain JSON with text that cannot act.

The folder is checked first (verify.py, "auto"). Numbers come from the manifest's statistics; the
sample is one decoded view (decoded_views.py). Neither the student's tokenizer nor torch is needed. report.py turns the
answer into lines for a terminal, html_report.py into a page.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..addresses import is_url, local_path
from ..config import to_tree
from ..errors import CacheError
from .decoded_views import sample_view
from .manifest import Manifest
from .reader import open_cache
from .statistics import NUM_BINS, ShardStatistics
from .verdict import verdict

_LISTS = ("shards", "totals", "statistics", "vocabulary", "audit")
"""Fields of the manifest that a description leaves out or tells in its own words."""


def describe_cache(path: str | Path) -> dict[str, Any]:
    """What a cache holds: where it comes from, sizes, distributions and one decoded view.

    Returns: plain JSON: cache, manifest_hash, the manifest's fields but for its lists of files, and size, t, chunks,
        targets, verdict, sample; of these and `teacher`, what the cache has not is None.
        Log-probabilities and entropies are nats at temperature 1.
    Raises: CacheError: not a cache, incomplete (with the shards done so far) or damaged. OutputError: not readable.
    """
    if is_url(path):
        cache = open_cache(path)  # compares every file's size; the shard with the sample is fetched and checked
    else:
        root = local_path(path)
        if not root.is_dir():
            raise CacheError(f"{root}: no such folder; give the folder that dump-teacher wrote")
        cache = open_cache(root)
    manifest = cache.manifest
    statistics = manifest.statistics
    tree = {k: v for k, v in manifest.to_json().items() if k not in _LISTS}
    return {
        "cache": str(path),
        "manifest_hash": manifest.hash,
        **tree,
        "size": _size(manifest),
        "t": {
            "bin_edges": [round(edge / NUM_BINS, 4) for edge in range(NUM_BINS + 1)],
            "views": list(statistics.t_histogram),
            "mask_ratio_views": list(statistics.mask_ratio_histogram),
        },
        "chunks": _chunks(statistics) if manifest.signal.kind != "none" else None,
        "targets": _targets(statistics, manifest.student.vocab_size) if manifest.signal.kind == "topk" else None,
        "verdict": verdict(manifest),
        "sample": sample_view(cache),
    }


def _size(manifest: Manifest) -> dict[str, Any]:
    statistics = manifest.statistics
    return {
        **to_tree(manifest.totals),
        "response_tokens": statistics.response_tokens,
        "bytes_per_masked_position": _mean(manifest.totals.bytes, statistics.masked_positions),
        "column_bytes": dict(statistics.column_bytes),
    }


def _chunks(statistics: ShardStatistics) -> dict[str, Any]:
    """Active chunks; `one_to_one` is the share that carries a token-level target: one token on each side."""
    lengths = np.arange(len(statistics.chunk_len_counts)) @ np.array(statistics.chunk_len_counts, np.int64)
    return {
        "count": statistics.chunks,
        "mean_logp": _mean(statistics.chunk_logp, statistics.chunks),
        "mean_length": _mean(int(lengths), statistics.chunks),
        "length_counts": list(statistics.chunk_len_counts),
        "one_to_one": _mean(statistics.targets, statistics.chunks),
    }


def _targets(statistics: ShardStatistics, vocab_size: int) -> dict[str, Any]:
    """Positions with a token-level target; head mass and entropy by bin of t, None where a bin is empty.

    How the tokens that were not kept share their mass is unknown: `entropy` counts them as one, which is the least it
    can be, `entropy_most` spreads them evenly over the vocabulary.
    """
    count, by_t = statistics.targets, statistics.t_targets
    spread = math.log(vocab_size)
    most = [
        entropy + max(0.0, number - mass) * spread
        for entropy, mass, number in zip(statistics.t_entropy, statistics.t_head_mass, by_t, strict=True)
    ]
    return {
        "count": count,
        "share_of_masked": _mean(count, statistics.masked_positions),
        "mean_gold_logp": _mean(statistics.gold_logp, count),
        "mean_k": _mean(statistics.kept_entries, count),
        "k_counts": list(statistics.num_top_counts),
        "mean_head_mass": _mean(sum(statistics.t_head_mass), count),
        "mean_entropy": _mean(sum(statistics.t_entropy), count),
        "mean_entropy_most": _mean(sum(most), count),
        "by_t": {
            "targets": list(by_t),
            "head_mass": [_mean(*pair) for pair in zip(statistics.t_head_mass, by_t, strict=True)],
            "entropy": [_mean(*pair) for pair in zip(statistics.t_entropy, by_t, strict=True)],
            "entropy_most": [_mean(*pair) for pair in zip(most, by_t, strict=True)],
        },
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
