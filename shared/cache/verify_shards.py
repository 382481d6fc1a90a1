"""Checks 3 to 6 of a cache: footers, pages, meaning. Also a program.

`python -m tide.shared.cache.verify_shards ROOT BYTES [SHARD]` limits its own memory to what the footers call for, at
most BYTES above what it starts with, its time to what that many bytes may take, checks all shards or the one of that
number, and prints one line of JSON:
{"kind": name of the error or null, "error": its message or null}. It imports numpy and pyarrow, and no torch.
"""

import dataclasses
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ..errors import CacheError, TideError
from .batch import RowBatch, read_group, rounded
from .checks import SampleOrder, check_batch
from .files import file_inside, open_parquet, reading
from .manifest import Manifest, read_manifest
from .schema import (
    MAX_ROW_BYTES,
    MAX_ROW_GROUP_BYTES,
    ROW_GROUP_BYTES,
    Layout,
    arrow_schema,
    parquet_options,
    shard_metadata,
)
from .statistics import ShardStatistics, batch_statistics, leaf_bytes, merge
from .vocabulary import read_vocabulary

FOOTER_MEMORY = 96 << 20
"""Bytes the child may take for footers, and for pages besides the two below."""
MEMORY_PER_GROUP_BYTE = 8
"""Measured: an empty cache takes 55 MB of address space, each uncompressed byte of a row group up to 6 more."""
MEMORY_PER_SAMPLE = 400
CPU_S, CPU_S_PER_MB = 10, 2
"""Seconds the child may compute, and per megabyte of shards; it does 10 MB a second here."""
MAX_EXPANSION = 200
"""Uncompressed bytes per byte on disk, beyond two row groups of ordinary size."""


def check_shards(root: Path, manifest: Manifest, *, full: bool) -> None:
    """Check every shard's footer and, if `full`, its pages and their meaning.

    Raises: CacheError: the first check that fails; names shard, row and field.
    """
    check_footers(root, manifest)
    if full:
        check_contents(root, manifest)


def check_footers(root: Path, manifest: Manifest) -> int:
    """Check 3, for every shard. Returns: uncompressed bytes of the largest row group. Raises: CacheError."""
    largest = 0
    for shard in range(len(manifest.shards)):
        largest = max(largest, check_one_footer(root, manifest, shard))
    return largest


def check_contents(root: Path, manifest: Manifest) -> None:
    """Checks 4 and 5, for every shard and the vocabulary. Raises: CacheError."""
    order, statistics = SampleOrder(), []
    for shard in range(len(manifest.shards)):
        statistics.append(check_one_shards_pages(root, manifest, shard, order))
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
    check_one_footer(root, manifest, shard)
    check_one_shards_pages(root, manifest, shard, SampleOrder())


def check_one_footer(root: Path, manifest: Manifest, shard: int) -> int:
    """Check 3 of one shard; uncompressed bytes of its largest row group."""
    path = file_inside(root, manifest.shards[shard].name)
    with reading(path), open_parquet(path) as file:
        return check_footer(file, path, manifest, shard)


def check_one_shards_pages(root: Path, manifest: Manifest, shard: int, order: SampleOrder) -> ShardStatistics:
    """Checks 4 and 5 of one shard."""
    entry = manifest.shards[shard]
    path = file_inside(root, entry.name)
    with reading(path), open_parquet(path) as file:
        found = check_pages(file, path, manifest.layout, order)
    if found.masked_positions != entry.masked_positions:
        raise CacheError(
            f"{path}: {found.masked_positions:,} masked positions, the manifest says {entry.masked_positions:,}"
        )
    return found


def check_footer(file: pq.ParquetFile, path: Path, manifest: Manifest, shard: int) -> int:
    """Columns, types, metadata and row counts are exactly the manifest's; nothing expands beyond its bound.

    Returns: uncompressed bytes of the largest row group.
    """
    info, entry, layout = file.metadata, manifest.shards[shard], manifest.layout
    expected = _expected_schema(layout)
    if not file.schema.equals(expected) or _paths(file.schema) != _paths(expected):
        raise CacheError(
            f"{path}: columns are not those of the manifest's layout; got {file.schema}, expected {expected}"[:2000]
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
    paths, largest, left = _paths(expected), 0, entry.bytes
    for number, num_rows in enumerate(sizes):
        group = info.row_group(number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        where = f"{path}, row group {number}"
        if [leaf.path_in_schema for leaf in leaves] != paths:
            raise CacheError(f"{where}: columns are not those of the file's own schema; it is damaged")
        on_disk = sum(leaf.total_compressed_size for leaf in leaves)
        left -= on_disk
        if left < 0 or min(leaf.total_compressed_size for leaf in leaves) < 0:
            raise CacheError(f"{where}: claims more bytes than the file has; it is damaged")
        limit = MAX_ROW_BYTES if num_rows == 1 else MAX_ROW_GROUP_BYTES
        limit = min(limit, 2 * ROW_GROUP_BYTES + MAX_EXPANSION * on_disk)
        size = max(sum(4 * leaf.num_values for leaf in leaves), sum(leaf.total_uncompressed_size for leaf in leaves))
        if size > limit:
            raise CacheError(f"{where}: expands to {size:,} bytes, more than {limit:,}; refused")
        for leaf in leaves:
            exact = leaf.path_in_schema in scalars
            if leaf.num_values < num_rows or (exact and leaf.num_values != num_rows):
                raise CacheError(f"{where}, {leaf.path_in_schema}: {leaf.num_values:,} values for {num_rows:,} rows")
        largest = max(largest, size)
    return largest


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


def _limit(base: int, more_bytes: int, cpu_s: float | None = None) -> None:
    """Bound this process: `more_bytes` of address space above `base`, and `cpu_s` more seconds of computing."""
    import resource

    wanted = {resource.RLIMIT_AS: base + more_bytes} if base else {}
    if cpu_s is not None:
        wanted[resource.RLIMIT_CPU] = int(time.process_time() + cpu_s) + 1
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)  # whoever runs this may have set a lower one
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def main(root: str, more_bytes: str, shard: str | None = None) -> None:
    """Run the full checks under a memory limit and print the answer."""
    answer: dict[str, str | None] = {"kind": None, "error": None}
    base, most = _address_space(), int(more_bytes)
    try:
        manifest = read_manifest(root)
        _limit(base, min(most, FOOTER_MEMORY), CPU_S + CPU_S_PER_MB * manifest.totals.bytes / 1e6)
        one = None if shard is None else int(shard)
        largest = check_footers(Path(root), manifest) if one is None else check_one_footer(Path(root), manifest, one)
        samples = min(manifest.totals.samples, manifest.totals.bytes)  # distinct ids take a byte each, at least
        needed = FOOTER_MEMORY + MEMORY_PER_GROUP_BYTE * largest + MEMORY_PER_SAMPLE * samples
        _limit(base, min(most, needed))
        if one is None:
            check_contents(Path(root), manifest)
        else:
            check_shard(Path(root), manifest, one)
    except (MemoryError, pa.ArrowMemoryError):
        answer = {"kind": "CacheError", "error": f"{root}: needs more memory than its size explains; refused"}
    except TideError as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
