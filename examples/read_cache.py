"""An independent reader of tide caches, written from docs/cache_format.md: json, numpy and pyarrow alone.

    python examples/read_cache.py CACHE 2.0     # what the teacher says at temperature 2, one masked position a line

It checks what it uses and no more: `tide verify-cache` first, if a stranger made the cache.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def read_views(root: str | Path) -> Iterator[dict]:
    """Every view in order: its columns as Python values, lists as arrays, and "distributions", see below."""
    manifest = json.loads((Path(root) / "manifest.json").read_text(encoding="utf-8"))
    signal = manifest["signal"]
    if (manifest["schema_version"], signal["codec"]) != (1, "plain"):
        raise SystemExit(f"{root}: schema {manifest['schema_version']}, codec {signal['codec']}; this reads 1, plain")
    for shard in manifest["shards"]:
        with pq.ParquetFile(Path(root) / shard["name"], page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                columns = {name: table[name].combine_chunks() for name in table.column_names}
                for row in range(len(table)):
                    view = {name: _value(column[row]) for name, column in columns.items()}
                    if signal["kind"] != "none":
                        view["chunk_start"], view["chunk_len"] = _chunks(view)
                    temperatures = signal["temperatures"] if signal["kind"] == "topk" else []
                    view["distributions"] = {t: _distributions(view, float(t)) for t in temperatures}
                    yield view


def _value(scalar):
    """A number or text as such, a list as a numpy array."""
    return scalar.values.to_numpy(zero_copy_only=False) if hasattr(scalar, "values") else scalar.as_py()


def _chunks(view: dict) -> tuple[np.ndarray, np.ndarray]:
    """First position and length of every chunk: chunk_len walks along the masked positions, 0 for one in no chunk."""
    units, masked = view["chunk_len"], view["prompt_tokens"] + np.flatnonzero(view["masked"])
    width = np.maximum(units, 1)
    return masked[np.cumsum(width) - width][units > 0], units[units > 0]


def _distributions(view: dict, temperature: float) -> list[tuple]:
    """For each target (position, kept ids, their log-probabilities, the clean token's, the tail's), in nats."""
    ends, num_targets = np.cumsum(view["num_top"]), len(view["num_top"])
    tails = view[f"log_tail_{temperature!r}"].astype(np.float64).reshape(num_targets, -1 if num_targets else 1)
    tails = np.minimum(np.logaddexp.reduce(tails, axis=1), 0.0)  # of all buckets, where the tail is cut into such
    top = view["top_logp"].astype(np.float64) / temperature
    out, gold_logp = [], view["chunk_logp"][np.searchsorted(view["chunk_start"], view["target_position"])]
    for j, (position, end) in enumerate(zip(view["target_position"], ends, strict=True)):
        kept = slice(end - view["num_top"][j], end)
        log_z = np.logaddexp.reduce(top[kept]) - np.log(-np.expm1(tails[j])) if view["num_top"][j] else 0.0
        gold = float(gold_logp[j]) / temperature - log_z
        out.append((int(position), view["top_ids"][kept], top[kept] - log_z, gold, tails[j]))
    return out


if __name__ == "__main__":
    for found in read_views(sys.argv[1]):
        for position, ids, logp, _, tail in found["distributions"].get(float(sys.argv[2]), []):
            said = "  ".join(f"{i}: {p:.3f}" for i, p in zip(ids, np.exp(logp), strict=True))
            print(f"{found['sample_id']} view {found['view']} position {position}  {said}  rest: {np.exp(tail):.3f}")
