"""Regular files, and nothing else, opened: a pipe, device or socket in a file's place would hang, or never end.

Path -> binary stream, or an error at once. Everything that a stranger names or sends is opened here.
"""

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from .errors import DataError

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a file for reading.

    Raises: DataError: it is a pipe, socket or device. OSError: as `open` does, for the caller to explain.
    """
    _require_regular(path, os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # it may be another by now
    try:
        mode = os.fstat(handle).st_mode
        _require_regular(path, mode)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", str(path))
        return io.BufferedReader(io.FileIO(handle))
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | Path, *, max_bytes: int) -> bytes:
    """A file's content, or a byte more than `max_bytes` of a larger one. Raises: as `open_regular`."""
    with open_regular(path) as file:
        return file.read(max_bytes + 1)


def require_regular(paths: Iterable[Path]) -> None:
    """For files that a library opens itself; folders, and what is not there, pass. Raises: DataError."""
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        _require_regular(path, mode)


def _require_regular(path: str | Path, mode: int) -> None:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    if kind is not None:
        raise DataError(f"{path}: is {kind}; expected a regular file. Copy what it gives to a file first")
