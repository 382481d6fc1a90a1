"""Files that are either whole or absent: atomic writes, strict JSON, hashes, errors that say what to do.

Write under a temporary hidden name in the same folder, fsync, rename, fsync the folder. A reader therefore never meets
half a file under a final name, also after a crash or a full disk.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import from_tree
from ..errors import CacheError, ConfigError, OutputError
from ..regular_files import open_regular, read_regular, require_regular

T = TypeVar("T")

MAX_JSON_DEPTH = 16
MAX_FOOTER_ITEMS = 1 << 16
"""Columns, row groups or other entries of one list in a Parquet footer."""

CONTINUE = "Finished shards stay valid; free space or fix the folder and run the same command again to continue."
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
}


_CANNOT = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK, errno.EBADF)
"""What file systems without hard links, or without fsync of folders, answer (exFAT, SMB, many FUSE)."""
_EMPTY_S = 2.0
"""How long a file that was made without hard links may be empty: its writer renames the next moment, or was killed."""


@contextlib.contextmanager
def output_errors(path: Path, advice: str = CONTINUE) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError: which file, why, how much space is free, what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason} ({_free_space(path)}). {advice}") from error


def _free_space(path: Path) -> str:
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder}"
    return "free space unknown"


HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())[:32]


def temporary_name(path: Path) -> Path:
    """A fresh hidden name next to `path`; several writers of the same file never share one."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def leftover_owner(name: str) -> int | None:
    """The process of this machine that made a temporary file of this name; None: it is no such name."""
    match = re.fullmatch(rf"\..+\.{HOST}-(\d+)-[0-9a-f]{{8}}\.tmp", name)
    return int(match[1]) if match else None


def leftovers(path: Path) -> list[Path]:
    """Temporary files of `path` made on this machine (on others a lock may not be visible from here)."""
    return sorted(path.parent.glob(f".{path.name}.{HOST}-*.tmp"))


def fsync_folder(folder: Path) -> bool:
    """Make a rename in `folder` survive a power cut; False: the file system has no way to say so."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    finally:
        os.close(handle)
    return True


def file_system_lacks(folder: Path) -> list[str]:
    """What a folder's file system cannot do and tide then does without, tried with files of its own: [] where it can.

    Raises: OSError: nothing can be written there.
    """
    lacks, first = [], temporary_name(folder / "tide-try")
    second = first.with_suffix(".link.tmp")
    try:
        first.write_bytes(b"tide")
        try:
            os.link(first, second)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            lacks.append("hard links")
        if not fsync_folder(folder):
            lacks.append("fsync of folders")
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    return lacks


def atomic_write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file so that it is either the old or the new one.

    Args: durable: it survives a power cut.
    Raises: OutputError: disk full, permission denied, device error; `path` is untouched then.
    """
    with _written_aside(path, data, durable) as temporary:
        os.replace(temporary, path)


def create_once(path: Path, data: bytes) -> None:
    """Write a small file unless it is there: of several writers at once exactly one wins, and nobody sees half of it.

    Raises: OutputError: as `atomic_write`.
    """
    if is_written(path):
        return
    with _written_aside(path, data) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename, fails if another writer was faster
        except OSError as error:
            if error.errno not in (errno.EEXIST, *_CANNOT):
                raise
            if not is_written(path):
                _rename_once(temporary, path)


def is_written(path: Path) -> bool:
    """Is there such a file, with its content? An empty one of `create_once` is still on its way."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _rename_once(temporary: Path, path: Path) -> None:
    """Where there are no hard links: take the name exclusively, empty, and fill it by a rename.

    A writer that is killed between the two leaves an empty file, which counts as none and is filled by the next one.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        end = time.monotonic() + _EMPTY_S
        while not is_written(path) and time.monotonic() < end:
            time.sleep(_EMPTY_S / 100)
        if is_written(path):
            return
    os.replace(temporary, path)


@contextlib.contextmanager
def _written_aside(path: Path, data: bytes, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`, to be given its name in the block; `durable`: file and folder are fsynced."""
    temporary = temporary_name(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if durable:
            fsync_folder(path.parent)


def canonical_json(tree: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, ASCII. Hashes are taken over this."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def readable_json(tree: Any) -> bytes:
    """The same for people: indented, sorted, newline at the end."""
    return (json.dumps(tree, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """A file, or a byte more than `max_bytes` of a larger one. Raises: FileNotFoundError; OutputError: not readable."""
    try:
        return read_regular(path, max_bytes=max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path, *, max_bytes: int) -> Any:
    """Read JSON made by a stranger: bounded size, depth and number of values, no duplicate keys, no NaN.

    Raises:
        FileNotFoundError: for the caller to explain.
        CacheError: too large, too dense, too deep or not JSON; OutputError: the file cannot be read.
    """
    return parse_json(read_bounded(path, max_bytes=max_bytes), str(path), max_bytes=max_bytes)


def parse_json(data: bytes, path: str, *, max_bytes: int) -> Any:
    """What `read_json` reads, from the bytes of the file that `path` names.

    Raises: CacheError: too large, too dense, too deep or not JSON.
    """
    if len(data) > max_bytes:
        raise CacheError(f"{path}: larger than {max_bytes:,} bytes, which no file of this kind needs; refused")
    # A value takes up to 30 times its text in memory; those of a cache are mostly names and hashes, and few.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > 100_000 + len(data) // 16:
        raise CacheError(f"{path}: more values in {len(data):,} bytes than a file of this kind has; refused")
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)
        _check_depth(tree)
        return tree
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{path}: not valid JSON ({str(error)[:200]}); the file is damaged, fetch or make it again"
        ) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item for value in level if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]  # fmt: skip
    if level:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def from_json(kind: type[T], tree: Any, where: str) -> T:
    """Inverse of `config.to_tree` for what a stranger may have written: all fields of the dataclass, no others.

    Raises: CacheError: a field is missing, unknown or of the wrong type, a count is negative or no count.
    """
    try:
        value = from_tree(kind, tree, where)
    except ConfigError as error:
        raise CacheError(str(error)[:500]) from error
    _check_counts(value, where)
    return value


def _check_counts(value: Any, where: str) -> None:
    """Integers of the cache's own dataclasses count something, and so does everything in a `dict[str, int]`."""
    for field in dataclasses.fields(value):
        got, name = getattr(value, field.name), f"{where}.{field.name}"
        items = got if isinstance(got, tuple) else got.values() if field.type == dict[str, int] else [got]
        for item in items:
            if dataclasses.is_dataclass(item):
                _check_counts(item, name)
            elif field.type == dict[str, int] and type(item) is not int:
                raise CacheError(f"{name}: expected counts, got {item!r:.80}")
            elif isinstance(item, int) and not 0 <= item < 2**62:
                raise CacheError(f"{name}: expected a count, got {item!r:.80}")


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _sha256_of(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises: CacheError: it is missing; OutputError: it cannot be read."""
    with reading(path), open_regular(path) as file:
        return _sha256_of(file)


def file_inside(root: Path, name: str) -> Path:
    """The path of `name` under `root`, for names that a stranger chose.

    Plain relative names only; links may not lead out of the root. A snapshot of the Hub consists of links into the
    `blobs` folder beside its `snapshots` folder, and those alone are allowed.
    Raises: CacheError: another kind of name, a link that leads outside, or no file there.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise CacheError(f"{root}: file name {name!r:.150} is not a plain relative path; refused")
    path, base = root / name, root.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CacheError(f"{path}: cannot be followed ({error}); remove the link and fetch the file again") from error
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CacheError(f"{path}: is a link that leads out of the cache folder; refused")
    if not real.is_file():
        raise CacheError(f"{path}: missing; fetch it again, or run the same dump-teacher command again")
    return path


class Pinned:
    """A Parquet file made by a stranger, opened once, with page checksums on and a footer that fits the file.

    With `sha256` its bytes are hashed and read through one descriptor, whatever its name leads to; `require_same` after
    a read says that nobody has written to the file between the hash and the read. A column chunk takes 3 bytes of a
    footer and 700 of memory. Ours take about 200 bytes for some 100 kB of pages, so a footer may have 256 KiB and a
    16th of the file.

    Args:
        sha256: of the whole file; None: nobody else can write it, or its bytes were compared before.
        seen: `self.seen` of an earlier opening: the same file, unchanged, is not hashed again.
    Raises: CacheError: other bytes, or a larger footer; errors of pyarrow for `reading` to explain.
    """

    def __init__(self, path: Path, sha256: str | None, seen: tuple[int, ...] | None = None) -> None:
        require_regular([path])
        self.path, self._source = path, pa.OSFile(str(path))
        self.seen = None if sha256 is None else self._status()
        if sha256 is not None and self.seen != seen and _sha256_of(self._source) != sha256:
            raise CacheError(
                f"{path}: SHA-256 differs from the manifest's; the file is damaged or was exchanged, fetch it again"
            )
        size = self._source.size()
        self._source.seek(max(0, size - 8))
        footer_bytes = int.from_bytes(self._source.read(4), "little")
        if footer_bytes > (256 << 10) + size // 16:
            raise CacheError(
                f"{path}: damaged (a footer of {footer_bytes:,} bytes in a file of {size:,}); fetch it again"
            )
        self.file = pq.ParquetFile(
            self._source, page_checksum_verification=True, thrift_container_size_limit=MAX_FOOTER_ITEMS,
            thrift_string_size_limit=1 << 20,
        )  # fmt: skip

    def require_same(self) -> None:
        """Raises: CacheError: the file was written to since it was opened."""
        if self.seen is not None and self._status() != self.seen:
            raise CacheError(
                f"{self.path}: somebody wrote to it while it was read; nothing of it was used. Read a cache from a "
                "folder that nobody else may write"
            )

    def _status(self) -> tuple[int, ...]:
        status = os.fstat(self._source.fileno())
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def pinned_parquet(path: Path, sha256: str | None) -> Iterator[pq.ParquetFile]:
    """`Pinned` for a block, `reading` included: with `sha256`, only these bytes are read in it."""
    with reading(path):
        pinned = Pinned(path, sha256)
        with pinned.file as file:
            yield file
            pinned.require_same()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A damaged or unreadable Parquet file becomes a CacheError or an OutputError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError) as error:  # the last: absurd sizes in a footer
        if isinstance(error, FileNotFoundError):
            raise CacheError(f"{path}: missing; fetch it again, or dump it again") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error
        raise CacheError(f"{path}: damaged ({str(error)[:300]}); fetch this shard again, or dump it again") from error
