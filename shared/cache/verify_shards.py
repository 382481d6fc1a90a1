"""Checks 3 to 6 of a cache: footers, pages, meaning. Also a program.

`python -m tide.shared.cache.verify_shards ROOT BYTES [SHARD]` limits its own memory to BYTES above what it starts with,
checks all shards or the one of that number, and prints one line of JSON:
{"kind": name of the error or null, "error": its message or null}. It imports numpy and pyarrow, and no torch.
"""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError, TideError
from .batch import RowBatch, read_group, rounded
from .checks import SampleOrder, check_batch
from .files import file_inside, reading
from .manifest import Manifest, read_manifest
from .schema import (
    MAX_ROW_BYTES,
    MAX_ROW_GROUP_BYTES,
    Layout,
    arrow_schema,
    parquet_options,
    shard_metadata,
)
from .statistics import ShardStatistics, batch_statistics, leaf_bytes, merge
from .vocabulary import read_vocabulary


def check_shards(root: Path, manifest: Manifest, *, full: bool) -> None:
    """Check every shard's footer and, if `full`, its pages and their meaning.

    Raises: CacheError: the first check that fails; names shard, row and field.
    """
    for shard in range(len(manifest.shards)):
        _check_one_footer(root, manifest, shard)
    if not full:
        return
    order, statistics = SampleOrder(), []
    for shard in range(len(manifest.shards)):
        statistics.append(_check_one_shards_pages(root, manifest, shard, order))
        order.last = None  # a sample never continues in the next shard
    _check_statistics(root, manifest.statistics, merge(statistics))
    if manifest.vocabulary is not None:
        num_tokens, limit = len(read_vocabulary(root).token_bytes), manifest.student.vocab_size
        if num_tokens > limit:
            raise CacheError(f"{root / manifest.vocabulary.name}: {num_tokens:,} tokens, the manifest says {limit:,}")


def check_shard(root: Path, manifest: Manifest, shard: int) -> None:
    """All that can be said of one shard while the others are not here: its footer, its pages and their meaning.

    Raises: CacheError: the first check that fails; names shard, row and field.
    """
    _check_one_footer(root, manifest, shard)
    _check_one_shards_pages(root, manifest, shard, SampleOrder())


def _check_one_footer(root: Path, manifest: Manifest, shard: int) -> None:
    path = file_inside(root, manifest.shards[shard].name)
    with reading(path), pq.ParquetFile(path) as file:
        check_footer(file, path, manifest, shard)


def _check_one_shards_pages(root: Path, manifest: Manifest, shard: int, order: SampleOrder) -> ShardStatistics:
    entry = manifest.shards[shard]
    path = file_inside(root, entry.name)
    with reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        found = check_pages(file, path, manifest.layout, order)
    if found.masked_positions != entry.masked_positions:
        raise CacheError(
            f"{path}: {found.masked_positions:,} masked positions, the manifest says {entry.masked_positions:,}"
        )
    return found


def check_footer(file: pq.ParquetFile, path: Path, manifest: Manifest, shard: int) -> None:
    """Columns, types, metadata and row counts are exactly the manifest's; nothing expands beyond its bound."""
    info, entry, layout = file.metadata, manifest.shards[shard], manifest.layout
    expected = _expected_schema(layout)
    if not file.schema.equals(expected) or _paths(file.schema) != _paths(expected):
        raise CacheError(
            f"{path}: columns are not those of the manifest's layout; got {file.schema}, expected {expected}"
        )
    found = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (info.metadata or {}).items()}
    for key, value in shard_metadata(manifest.plan_hash, shard).items():
        got = found.get(key)
        if got != value:
            raise CacheError(f"{path}: its metadata says {key} = {got!r:.80}, expected {value!r}; it belongs elsewhere")
    sizes = [info.row_group(g).num_rows for g in range(info.num_row_groups)]
    if info.num_rows != entry.rows or sum(sizes) != entry.rows or min(sizes, default=1) < 1:
        raise CacheError(f"{path}: {info.num_rows:,} rows in groups of {sizes!r:.80}, the manifest says {entry.rows:,}")
    scalars = {column.leaf for column in layout.columns if column.encoding == "scalar"}
    for number, num_rows in enumerate(sizes):
        group = info.row_group(number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        if [leaf.path_in_schema for leaf in leaves] != _paths(expected):
            raise CacheError(
                f"{path}, row group {number}: columns are not those of the file's own schema; it is damaged"
            )
        limit = MAX_ROW_BYTES if num_rows == 1 else MAX_ROW_GROUP_BYTES
        size = max(sum(4 * leaf.num_values for leaf in leaves), sum(leaf.total_uncompressed_size for leaf in leaves))
        if size > limit:
            raise CacheError(f"{path}, row group {number}: expands to {size:,} bytes, more than {limit:,}; refused")
        for leaf in leaves:
            exact = leaf.path_in_schema in scalars
            if leaf.num_values < num_rows or (exact and leaf.num_values != num_rows):
                name = f"{path}, row group {number}, {leaf.path_in_schema}"
                raise CacheError(f"{name}: {leaf.num_values:,} values for {num_rows:,} rows")


def _expected_schema(layout: Layout) -> pq.ParquetSchema:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, arrow_schema(layout), **parquet_options(layout)).close()  # type: ignore[arg-type]
    return pq.ParquetFile(io.BytesIO(sink.getvalue())).schema


def _paths(schema: pq.ParquetSchema) -> list[str]:
    # ParquetSchema.equals compares the last name of a path only
    return [schema.column(number).path for number in range(len(schema))]


def check_pages(file: pq.ParquetFile, path: Path, layout: Layout, order: SampleOrder) -> ShardStatistics:
    """Decode and check all row groups of a shard; its statistics as they should be in the manifest."""
    statistics, first_row = ShardStatistics.empty(), 0
    for group in range(file.num_row_groups):
        batch = read_group(file, group, layout, where=str(path), first_row=first_row, full=True)
        num_samples = len(order.seen)
        check_batch(batch, layout, order)
        _check_precision(batch, layout)
        statistics = statistics + batch_statistics(batch, len(order.seen) - num_samples)
        first_row += len(batch)
    return dataclasses.replace(statistics, column_bytes=leaf_bytes(file.metadata, layout))


def _check_precision(batch: RowBatch, layout: Layout) -> None:
    """Values of a float16 cache are float16 numbers, and so on: what the manifest says about precision is true."""
    for name in ("chunk_logp", "gold_logp", "top_logp"):
        column = batch.lists.get(name)
        if column is None:
            continue
        wrong = column.values != rounded(column.values, layout, name)
        if wrong.any():
            index = int(np.argmax(wrong))
            step = layout.logp_step if name == "top_logp" else None
            kind = f"{layout.logp_dtype} number" if step is None else f"multiple of {step}"
            raise batch.error(
                column.row_of(index), name, f"{column.values[index]} is not a {kind} as the manifest says"
            )


def _check_statistics(root: Path, claimed: ShardStatistics, found: ShardStatistics) -> None:
    for field in dataclasses.fields(ShardStatistics):
        if field.name in ("codec_kl", "codec_kl_counts"):  # against what was meant, which is nowhere stored
            continue
        ours, theirs = getattr(found, field.name), getattr(claimed, field.name)
        same = ours == theirs
        if not same and field.type in (float, tuple[float, ...]):  # exp differs in the last bits between machines
            pairs = zip(ours, theirs, strict=False) if isinstance(ours, tuple) else [(ours, theirs)]
            lengths = len(ours) == len(theirs) if isinstance(ours, tuple) else True
            same = lengths and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in pairs)
        if not same:
            raise CacheError(
                f"{root}/manifest.json: statistics.{field.name} is {theirs!r:.80}, the shards give {ours!r:.80}"
            )


def _limit_memory(more: int) -> None:
    import resource

    size = 0
    status = Path("/proc/self/statm")
    if status.exists():
        size = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(root: str, more_bytes: str, shard: str | None = None) -> None:
    """Run the full checks under a memory limit and print the answer."""
    answer: dict[str, str | None] = {"kind": None, "error": None}
    try:
        manifest = read_manifest(root)
        _limit_memory(int(more_bytes))
        if shard is None:
            check_shards(Path(root), manifest, full=True)
        else:
            check_shard(Path(root), manifest, int(shard))
    except (MemoryError, pa.ArrowMemoryError):
        answer = {"kind": "CacheError", "error": f"{root}: needs more than {more_bytes} bytes to check; refused"}
    except TideError as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
