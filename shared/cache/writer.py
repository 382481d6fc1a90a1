"""Rows -> one shard, or no file at all.

Stages: rows are gathered into batches of about one row group; each is converted, checked for meaning and written to a
temporary file; the file is fsynced, then read again: its bytes must have the SHA-256 of the bytes handed out, and its
decoded rows the digest of the rows meant; then it is renamed and the folder fsynced. The same rows give the same bytes
(for one version of pyarrow).
"""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from ..errors import CacheError, OutputError
from .batch import batch_from_rows, row_bytes
from .checks import SampleOrder, check_batch
from .codec_error import codec_kl
from .files import fsync_folder, leftovers, output_errors, reading, sha256_file, temporary_name
from .schema import ROW_GROUP_BYTES, Layout, ViewRow, arrow_schema, parquet_options, shard_metadata
from .statistics import ShardStatistics, batch_statistics, leaf_bytes
from .table import batch_to_table, read_group


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
        statistics, digest = _write(sink, path, rows, layout, plan_hash=plan_hash, shard=shard)
        sink.sync()
        column_bytes = _read_back(sink, path, layout, digest=digest)
    return dataclasses.replace(statistics, column_bytes=column_bytes)


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator["HashingFile"]:
    """A locked temporary file beside `path`, which gets its name if the block ends without an error.

    The block writes, calls `sync`, and looks at what it wrote. Raises: OutputError.
    """
    temporary = temporary_name(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        file = open(temporary, "xb")  # noqa: SIM115 - held open, and so locked, until after the rename
    try:
        _lock(file)
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
    _write(sink, sink.path, rows, layout, plan_hash="0" * 64, shard=0, group_bytes=group_bytes)
    metadata = pq.read_metadata(memory)
    return EncodedSize(metadata.num_row_groups, leaf_bytes(metadata, layout), memory.getbuffer().nbytes)


def _write(
    file: "HashingFile", path: Path, rows: Iterable[ViewRow], layout: Layout, *, plan_hash: str, shard: int,
    group_bytes: int | None = None,
) -> tuple[ShardStatistics, str]:  # fmt: skip
    """Write all row groups and the footer; statistics and a digest of every batch."""
    schema = arrow_schema(layout)
    digest, statistics, order, num_rows = hashlib.sha256(), ShardStatistics.empty(), SampleOrder(), 0
    writer = None
    try:
        with output_errors(path):
            writer = pq.ParquetWriter(file, schema, **parquet_options(layout))  # type: ignore[arg-type]
        for group in _groups(rows, group_bytes or ROW_GROUP_BYTES):
            batch = batch_from_rows(group, layout, where=str(path), first_row=num_rows)
            num_samples = len(order.seen)
            check_batch(batch, layout, order)
            kl, kl_counts = codec_kl(group, batch, layout)
            of_batch = batch_statistics(batch, len(order.seen) - num_samples)
            statistics = statistics + dataclasses.replace(of_batch, codec_kl=kl, codec_kl_counts=kl_counts)
            batch.update_digest(digest)
            num_rows += len(batch)
            with output_errors(path):
                writer.write_table(batch_to_table(batch, layout, schema), row_group_size=len(batch))
    except BaseException:
        if writer is not None:
            with contextlib.suppress(Exception):  # the file is thrown away, whatever closing it says
                writer.close()
        raise
    with output_errors(path):
        writer.add_key_value_metadata(shard_metadata(plan_hash, shard))
        writer.close()
    return statistics, digest.hexdigest()


def _groups(rows: Iterable[ViewRow], group_bytes: int) -> Iterator[list[ViewRow]]:
    group: list[ViewRow] = []
    size = 0
    for row in rows:
        more = row_bytes(row)
        if group and size + more > group_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += more
    if group:
        yield group


def _read_back(sink: "HashingFile", path: Path, layout: Layout, *, digest: str) -> dict[str, int]:
    """Read the file again, as bytes and as rows, and compare both; compressed bytes by column."""
    again, rows = hashlib.sha256(), 0
    with read_back(sink) as file:
        for group in range(file.num_row_groups):
            batch = read_group(file, group, layout, where=str(path), first_row=rows, full=True)
            batch.update_digest(again)
            rows += len(batch)
        column_bytes = leaf_bytes(file.metadata, layout)
    require_same(path, again.hexdigest(), digest)
    return column_bytes


@contextlib.contextmanager
def read_back(sink: "HashingFile") -> Iterator[pq.ParquetFile]:
    """What was just written, opened again after its bytes were compared. Raises: OutputError, also for the block."""
    try:
        if sha256_file(sink.temporary) != sink.sha256.hexdigest():
            raise CacheError("its bytes are not those that were handed to the disk")
        with reading(sink.temporary), pq.ParquetFile(sink.temporary, page_checksum_verification=True) as file:
            yield file
    except (OutputError, CacheError) as error:
        raise OutputError(f"{sink.path}: cannot be read back after writing ({error}). {_FAULTY}") from error


def require_same(path: Path, found: str, meant: str) -> None:
    """Raises: OutputError: the digests of the rows that were read and of those that were meant differ."""
    if found != meant:
        raise OutputError(f"{path}: what was read back differs from what was written. {_FAULTY}")


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


def _lock(file: IO[bytes]) -> None:
    """Mark a temporary file as in use for as long as it is open."""
    import fcntl

    with contextlib.suppress(OSError):  # file systems without locks: leftovers stay
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of this shard whose writer is dead (its lock is gone)."""
    import fcntl

    for leftover in leftovers(path):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
