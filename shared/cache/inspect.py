"""`tide inspect-cache`: a cache folder -> what is in it, as plain JSON with text that cannot act.

Manifest, sizes and footers are checked first (verify.py, "quick"). Numbers come from the manifest's statistics; the
sample is one view of the first row group, decoded through vocabulary.parquet and checked for meaning like any other.
Neither the student's tokenizer nor torch is needed. report.py turns the answer into lines for people.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..config import to_tree
from ..errors import CacheError
from .checks import check_batch
from .inert import terminal_text
from .manifest import Manifest, read_manifest
from .reader import Cache
from .schema import ViewRow
from .statistics import NUM_BINS, ShardStatistics
from .verify import verify_cache
from .vocabulary import Vocabulary

MAX_TEXT_CHARS = 2000
"""Characters, and tokens, of the decoded text that are shown."""
MAX_TOKEN_BYTES = 256
MAX_TOKEN_CHARS = 40
NUM_SHOWN_POSITIONS = 8
NUM_SHOWN_TOKENS = 5
NEATEST_T = 0.4
"""The sample is the view whose t is closest to this: enough masked, enough left to read."""


def describe_cache(root: str | Path) -> dict[str, Any]:
    """What a cache holds: where it comes from, sizes, distributions and one decoded view.

    Returns: plain JSON: cache, manifest_hash, the manifest's fields but for its lists of files, and size, t, chunks,
        targets, sample; `teacher`, `chunks`, `targets` and `sample` are None where the cache has none.
        Log-probabilities and entropies are nats at temperature 1.
    Raises: CacheError: not a cache, incomplete (with the shards done so far) or damaged. OutputError: not readable.
    """
    root = Path(root)
    if not root.is_dir():
        raise CacheError(f"{root}: no such folder; give the folder that dump-teacher wrote")
    manifest = read_manifest(root)
    verify_cache(root, mode="quick")
    statistics = manifest.statistics
    tree = {k: v for k, v in manifest.to_json().items() if k not in ("shards", "totals", "statistics", "vocabulary")}
    return {
        "cache": str(root),
        "manifest_hash": manifest.hash,
        **tree,
        "size": _size(manifest),
        "t": {
            "bin_edges": [round(edge / NUM_BINS, 4) for edge in range(NUM_BINS + 1)],
            "views": list(statistics.t_histogram),
            "mask_ratio_views": list(statistics.mask_ratio_histogram),
        },
        "chunks": _chunks(statistics) if manifest.signal.kind != "none" else None,
        "targets": _targets(statistics) if manifest.signal.kind == "topk" else None,
        "sample": _sample(Cache(root, manifest)),
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


def _targets(statistics: ShardStatistics) -> dict[str, Any]:
    """Positions with a token-level target; head mass and entropy by bin of t, None where a bin is empty."""
    count, by_t = statistics.targets, statistics.t_targets
    return {
        "count": count,
        "share_of_masked": _mean(count, statistics.masked_positions),
        "mean_gold_logp": _mean(statistics.gold_logp, count),
        "mean_k": _mean(statistics.kept_entries, count),
        "k_counts": list(statistics.num_top_counts),
        "mean_head_mass": _mean(sum(statistics.t_head_mass), count),
        "mean_entropy": _mean(sum(statistics.t_entropy), count),
        "by_t": {
            "targets": list(by_t),
            "head_mass": [_mean(*pair) for pair in zip(statistics.t_head_mass, by_t, strict=True)],
            "entropy": [_mean(*pair) for pair in zip(statistics.t_entropy, by_t, strict=True)],
        },
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _sample(cache: Cache) -> dict[str, Any] | None:
    """One view of the first row group, decoded."""
    if not cache.row_groups:
        return None
    first = cache.row_groups[0]
    batch = cache.read_row_group(first.shard, first.group)
    check_batch(batch, cache.layout)
    words = Words(cache.vocabulary() if cache.manifest.vocabulary else None)
    informative = np.minimum(batch.counts.get("num_targets", batch.counts["num_masked"]), 2)
    row = batch[int(np.lexsort((np.abs(batch.t - NEATEST_T), -informative))[0])]
    return describe_view(row, words, cache.manifest.student.eos_id)


def describe_view(row: ViewRow, words: "Words", eos_id: int) -> dict[str, Any]:
    """One view in text that cannot act: its pieces by kind, and what the teacher says at a few positions."""
    end = _padding_start(row, eos_id)
    return {
        "sample_id": _inert(row.sample_id),
        "view": row.view,
        "t": row.t,
        "tokens": len(row.x_0),
        "prompt_tokens": row.prompt_tokens,
        "masked_positions": int(row.masked.sum()),
        "segments": _segments(row, end, words),
        "padding": {"tokens": len(row.x_0) - end, "masked": int(row.masked[end - row.prompt_tokens :].sum())},
        "teacher": _teacher_says(row, end, words),
    }


class Words:
    """Student ids -> inert text."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.token_bytes = vocabulary.token_bytes if vocabulary else []

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids that the vocabulary does not hold appear as <id>."""
        known = len(self.token_bytes)
        raw = b"".join(self.token_bytes[i][:MAX_TOKEN_BYTES] if i < known else b"<%d>" % i for i in map(int, ids))
        return _inert(raw.decode("utf-8", "replace"))


def _inert(text: str) -> str:
    """terminal_text, and no line breaks but the newline."""
    return terminal_text(text.replace("\u2028", "\n").replace("\u2029", "\n"))


def _padding_start(row: ViewRow, eos_id: int) -> int:
    """Where the trailing run of EOS tokens starts, its first one (the answer's own end) excluded."""
    end = len(row.x_0)
    while end > row.prompt_tokens and row.x_0[end - 1] == eos_id:
        end -= 1
    return min(end + 1, len(row.x_0))


def _segments(row: ViewRow, end: int, words: Words) -> list[dict[str, Any]]:
    """x_0 up to `end` in pieces of one kind: prompt, clean, chunk (masked, with its log-probability), masked."""
    label = np.full(len(row.x_0), -2)  # -3 prompt, -2 clean, -1 masked outside chunks, >= 0 number of a chunk
    label[: row.prompt_tokens] = -3
    label[row.prompt_tokens :][row.masked] = -1
    for number, (start, length) in enumerate(zip(row.chunk_start, row.chunk_len, strict=True)):
        label[start : start + length] = number
    kinds = {-3: "prompt", -2: "clean", -1: "masked"}
    segments, room = [], MAX_TEXT_CHARS
    for value, positions in groupby(range(end), key=lambda position: int(label[position])):
        where = list(positions)
        # The end of a prompt says most about the answer.
        text = words.text(row.x_0[where[-MAX_TEXT_CHARS:] if value == -3 else where[:MAX_TEXT_CHARS]])
        if value == -3 and len(text) > MAX_TEXT_CHARS // 2:
            text = "…" + text[-MAX_TEXT_CHARS // 2 :]
        segment: dict[str, Any] = {"kind": kinds.get(value, "chunk"), "text": terminal_text(text, max_chars=room)}
        if value >= 0:
            segment["logp"] = float(row.chunk_logp[value])
        segments.append(segment)
        room -= len(segment["text"])
        if room <= 0:
            break
    return segments


def _teacher_says(row: ViewRow, end: int, words: Words) -> list[dict[str, Any]]:
    """Probability of the clean token and the teacher's top tokens, at a few targets spread over the answer."""
    before_end = int(np.searchsorted(row.target_position, end))
    if not before_end:
        return []
    chosen = np.unique(np.linspace(0, before_end - 1, NUM_SHOWN_POSITIONS).round().astype(int))
    starts = np.concatenate([[0], np.cumsum(row.num_top)])
    says = []
    for target in chosen:
        kept = slice(starts[target], starts[target] + min(int(row.num_top[target]), NUM_SHOWN_TOKENS))
        position = int(row.target_position[target])
        says.append(
            {
                "position": position,
                "token": words.text(row.x_0[position : position + 1])[:MAX_TOKEN_CHARS],
                "probability": float(np.exp(row.gold_logp[target])),
                "top": [
                    {"token": words.text([token])[:MAX_TOKEN_CHARS], "probability": float(np.exp(logp))}
                    for token, logp in zip(row.top_ids[kept], row.top_logp[kept], strict=True)
                ],
            }
        )
    return says
