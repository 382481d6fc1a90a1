"""Entries that tide makes below a folder: opened, listed and removed without ever following a link.

Whoever may write in a folder can put a link where tide expects `claims/` or `blobs/`; what is then listed and removed
would be somebody's own files. So each part of a name below the root is opened by itself, a link there is an error that
names it, and only names that tide makes are removed. The root itself may be a link: the user named it.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

_NO_FOLDER = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
"""What opening a link as a folder fails with, by system."""


@contextlib.contextmanager
def opened(root: Path, folder: str = "", *, create: bool = False) -> Iterator[int]:
    """A descriptor of a folder below `root`, for the functions of `os` that take `dir_fd`.

    Args: folder: plain name with forward slashes, "" for `root` itself; create: make what is missing, `root` included.
    Raises: OutputError: a part of it is a link or a file. FileNotFoundError, OSError.
    """
    if create:
        root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in filter(None, folder.split("/")):
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                if error.errno not in _NO_FOLDER:
                    raise
                raise OutputError(
                    f"{root / folder}: {part!r} is a link or a file where tide keeps a folder of its own, so somebody "
                    "else's files could be read or removed through it; nothing was touched. Remove the link (not what "
                    "it leads to), or give a folder that others cannot write"
                ) from error
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def no_link(path: str, flags: int) -> int:
    """The opener for `open`: a link in the place of a file is an OSError, and what it leads to is not touched."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def require_own_folders(root: Path, *folders: str) -> None:
    """Raises: OutputError: one of these names below `root` is there, and is a link or a file."""
    for folder in folders if root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError), opened(root, folder):
            pass


def names(root: Path, folder: str = "") -> set[str]:
    """Names directly below a folder; none if it is not there. Raises: OutputError: it is a link."""
    try:
        with opened(root, folder) as handle:
            return set(os.listdir(handle))
    except OSError:
        return set()


def status(root: Path, name: str) -> os.stat_result | None:
    """Size and times of a file; None: there is none, or it is a link or no file. Raises: OutputError: see `opened`."""
    folder, _, base = name.rpartition("/")
    try:
        with opened(root, folder) as handle:
            found = os.stat(base, dir_fd=handle, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def remove(root: Path, name: str) -> None:
    """Remove a file, or a link in its place, if it is there. Raises: OutputError: see `opened`. OSError."""
    folder, _, base = name.rpartition("/")
    with contextlib.suppress(FileNotFoundError), opened(root, folder) as handle:
        os.unlink(base, dir_fd=handle)


def remove_all(root: Path, folder: str, pattern: str) -> None:
    """Remove the files of a folder whose whole name matches `pattern`, and the folder if nothing else is in it.

    Raises: OutputError: see `opened`. OSError.
    """
    with contextlib.suppress(FileNotFoundError), opened(root, folder) as handle:
        for name in os.listdir(handle):
            with contextlib.suppress(FileNotFoundError):
                is_own = re.fullmatch(pattern, name) is not None
                if is_own and not stat.S_ISDIR(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=handle)
    parent, _, base = folder.rpartition("/")
    with contextlib.suppress(OSError), opened(root, parent) as handle:
        os.rmdir(base, dir_fd=handle)


def remove_tree(root: Path, name: str) -> None:
    """Remove a folder that tide made, with all in it; links inside are removed, what they lead to is not.

    Raises: OutputError: it, or a folder on the way, is a link. OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        require_own_folders(root, name)
        folder, _, base = name.rpartition("/")
        with opened(root, folder) as handle:
            shutil.rmtree(base, dir_fd=handle)
