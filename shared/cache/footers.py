"""Check 3 of a cache: what the footer of a Parquet file promises, before a page of it is decoded.

A few hundred bytes can expand to gigabytes; a footer says how many values and bytes to expect, and here it is held to
what the manifest and the file's own size allow. Shards (verify_shards.py) and audit files (verify_audit.py) alike.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError
from .manifest_fields import AuditEntry, ShardEntry
from .schema import MAX_ROW_BYTES, MAX_ROW_GROUP_BYTES, ROW_GROUP_BYTES

MAX_EXPANSION = 200
"""Uncompressed bytes per byte on disk, beyond two row groups of ordinary size."""


def check_parquet_footer(
    file: pq.ParquetFile, path: Path, *, expected: pq.ParquetSchema, metadata: Mapping[str, str],
    entry: ShardEntry | AuditEntry, values_per_row: Mapping[str, int],
) -> int:  # fmt: skip
    """Columns, types, metadata and row counts are exactly those expected; nothing expands beyond its bound.

    Args:
        entry: bytes and rows by the manifest.
        values_per_row: of the leaves that hold a fixed number in every row; others may hold any from 1.
    Returns: uncompressed bytes of the largest row group.
    Raises: CacheError.
    """
    info = file.metadata
    if not file.schema.equals(expected) or _paths(file.schema) != _paths(expected):
        raise CacheError(
            f"{path}: columns are not those of the manifest's layout; got {file.schema}, expected {expected}"[:2000]
        )
    found = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (info.metadata or {}).items()}
    for key, value in metadata.items():
        got = found.get(key)
        if got != value:
            raise CacheError(f"{path}: its metadata says {key} = {got!r:.80}, expected {value!r}; it belongs elsewhere")
    sizes = [info.row_group(g).num_rows for g in range(info.num_row_groups)]
    if info.num_rows != entry.rows or sum(sizes) != entry.rows or min(sizes, default=1) < 1:
        raise CacheError(f"{path}: {info.num_rows:,} rows in groups of {sizes!r:.80}, the manifest says {entry.rows:,}")
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
            exact = values_per_row.get(leaf.path_in_schema)
            if leaf.num_values < num_rows or (exact is not None and leaf.num_values != exact * num_rows):
                raise CacheError(f"{where}, {leaf.path_in_schema}: {leaf.num_values:,} values for {num_rows:,} rows")
        largest = max(largest, size)
    return largest


def written_schema(schema: pa.Schema, options: Mapping[str, object]) -> pq.ParquetSchema:
    """The Parquet schema of a file that is written with these options."""
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema, **options).close()  # type: ignore[arg-type]
    return pq.ParquetFile(io.BytesIO(sink.getvalue())).schema


def _paths(schema: pq.ParquetSchema) -> list[str]:
    # ParquetSchema.equals compares the last name of a path only
    return [schema.column(number).path for number in range(len(schema))]
