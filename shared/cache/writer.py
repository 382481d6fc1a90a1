"""Rows -> one shard, or no file at all.

Stages: rows are gathered into batches of about one row group; each is converted, checked for meaning and written to a
temporary file; the file is fsynced, then read again: its bytes must have the SHA-256 of the bytes handed out, and its
decoded rows the digest of the rows meant; then it is renamed and the folder fsynced. The same rows give the same bytes
(for one version of pyarrow).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError, OutputError
from .batch import RowBatch, batch_from_rows, row_bytes
from .checks import SampleOrder, check_batch
from .codec_error import codec_kl
from .files import fsync_folder, leftovers, output_errors, reading, sha256_file, temporary_name
from .schema import ROW_GROUP_BYTES, Layout, ViewRow, arrow_schema, parquet_options, shard_metadata
from .statistics import ShardStatistics, batch_statistics, leaf_bytes
from .table import batch_to_table, read_group

if TYPE_CHECKING:
    from .audit import AuditBatch

T = TypeVar("T")


def write_shard(
    path: str | Path, rows: Iterable[ViewRow], layout: Layout, *, plan_hash: str, shard: int
) -> ShardStatistics:
    """Write one shard atomically: afterwards `path` is complete and was read back, or it is as it was before.

    Args:
        rows: views, those of a sample adjacent and in order of `view`.
        plan_hash, shard: kept in the file's metadata, so that a shard cannot pass for another.
    Raises:
        CacheError: a row is out of range; names row, sample and field.
        OutputError: disk full, permission denied, device error, or what was read back is not what was written.
    """
    path = Path(path)
    with whole_or_absent(path) as sink:
        statistics, digest = _write(sink, rows, layout, plan_hash=plan_hash, shard=shard)

        def read(file: pq.ParquetFile, group: int, first_row: int) -> RowBatch:
            return read_group(file, group, layout, where=str(path), first_row=first_row, full=True)

        metadata = read_back(sink, digest, read)
    return dataclasses.replace(statistics, column_bytes=leaf_bytes(metadata, layout))


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator["HashingFile"]:
    """A locked temporary file beside `path`, which gets its name if the block ends without an error.

    The block writes, and looks with `read_back` at what it wrote. Raises: OutputError.
    """
    temporary = temporary_name(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        file = open(temporary, "xb")  # noqa: SIM115 - held open, and so locked, until after the rename
    try:
        with contextlib.suppress(OSError):  # file systems without locks: leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield HashingFile(file, path, temporary)
        with output_errors(path):
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # after a full disk, closing fails once more
            file.close()
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclass(frozen=True)
class EncodedSize:
    """What rows take as a shard.

    Args: groups: number of row groups; column_bytes: compressed, by column; bytes: of the whole file.
    """

    groups: int
    column_bytes: dict[str, int]
    bytes: int


def encoded_size(rows: Iterable[ViewRow], layout: Layout, *, group_bytes: int | None = None) -> EncodedSize:
    """Encode rows as `write_shard` does, in memory and unread, to learn their size.

    Args: group_bytes: uncompressed bytes at which a row group ends; None: as in every shard.
    """
    memory = io.BytesIO()
    sink = HashingFile(memory, Path("memory"), Path("memory"))
    _write(sink, rows, layout, plan_hash="0" * 64, shard=0, group_bytes=group_bytes)
    metadata = pq.read_metadata(memory)
    return EncodedSize(metadata.num_row_groups, leaf_bytes(metadata, layout), memory.getbuffer().nbytes)


def _write(
    sink: "HashingFile", rows: Iterable[ViewRow], layout: Layout, *, plan_hash: str, shard: int,
    group_bytes: int | None = None,
) -> tuple[ShardStatistics, str]:  # fmt: skip
    """Write all row groups and the footer; statistics and a digest of every batch."""
    digest, statistics, order, num_rows = hashlib.sha256(), ShardStatistics.empty(), SampleOrder(), 0
    schema, path = arrow_schema(layout), str(sink.path)

    def tables() -> Iterator[pa.Table]:
        nonlocal statistics, num_rows
        for group in grouped(rows, row_bytes, group_bytes or ROW_GROUP_BYTES):
            batch = batch_from_rows(group, layout, where=path, first_row=num_rows)
            num_samples = len(order.seen)
            check_batch(batch, layout, order)
            kl, kl_counts = codec_kl(group, batch, layout)
            of_batch = batch_statistics(batch, len(order.seen) - num_samples)
            statistics = statistics + dataclasses.replace(of_batch, codec_kl=kl, codec_kl_counts=kl_counts)
            batch.update_digest(digest)
            num_rows += len(batch)
            yield batch_to_table(batch, layout, schema)

    write_tables(sink, schema, parquet_options(layout), tables(), shard_metadata(plan_hash, shard))
    return statistics, digest.hexdigest()


def grouped(rows: Iterable[T], size_of: Callable[[T], int], most_bytes: int) -> Iterator[list[T]]:
    """Rows in lists of at most so many bytes, or of one row."""
    group: list[T] = []
    size = 0
    for row in rows:
        more = size_of(row)
        if group and size + more > most_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += more
    if group:
        yield group


def write_tables(
    sink: "HashingFile", schema: pa.Schema, options: Mapping[str, object], tables: Iterable[pa.Table],
    metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """A whole Parquet file: each table becomes a row group, `metadata` goes into the footer. Raises: OutputError."""
    writer = None
    try:
        with output_errors(sink.path):
            writer = pq.ParquetWriter(sink, schema, **options)  # type: ignore[arg-type]
        for table in tables:
            with output_errors(sink.path):
                writer.write_table(table, row_group_size=len(table))
    except BaseException:
        if writer is not None:
            with contextlib.suppress(Exception):  # the file is thrown away, whatever closing it says
                writer.close()
        raise
    with output_errors(sink.path):
        writer.add_key_value_metadata(metadata)
        writer.close()


def read_back(
    sink: "HashingFile", digest: str, read: Callable[[pq.ParquetFile, int, int], "RowBatch | AuditBatch"]
) -> pq.FileMetaData:
    """Bring what was written to the disk, read it again, as bytes and as rows, and compare both.

    Args: digest: of the rows that were meant. read: decodes a row group, by its number and that of its first row.
    Returns: the footer. Raises: OutputError.
    """
    sink.sync()
    again, num_rows = hashlib.sha256(), 0
    try:
        if sha256_file(sink.temporary) != sink.sha256.hexdigest():
            raise CacheError("its bytes are not those that were handed to the disk")
        with reading(sink.temporary), pq.ParquetFile(sink.temporary, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                batch = read(file, group, num_rows)
                batch.update_digest(again)
                num_rows += len(batch)
            metadata = file.metadata
    except (OutputError, CacheError) as error:
        raise OutputError(f"{sink.path}: cannot be read back after writing ({error}). {_FAULTY}") from error
    if again.hexdigest() != digest:
        raise OutputError(f"{sink.path}: what was read back differs from what was written. {_FAULTY}")
    return metadata


_FAULTY = (
    "The disk or the memory may be failing: check it, then run the same command again; finished shards stay valid."
)


class HashingFile(io.RawIOBase):
    """An append-only file that hashes the bytes it hands on; `path` is the name it will get."""

    def __init__(self, file: IO[bytes], path: Path, temporary: Path) -> None:
        self.file, self.path, self.temporary = file, path, temporary
        self.sha256 = hashlib.sha256()

    def sync(self) -> None:
        """Bring everything to the disk. Raises: OutputError."""
        with output_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Hand on and hash; number of bytes taken."""
        self.sha256.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.file.tell()


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of this shard whose writer is dead (its lock is gone)."""
    for leftover in leftovers(path):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
