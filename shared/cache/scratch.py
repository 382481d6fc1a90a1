"""A folder of this process for files on their way to an object store; gone with it, also after a kill.

Each holds a file that its owner keeps locked. A folder whose file can be locked has lost its owner, and whoever makes
the next one in the same place removes it.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from .files import output_errors

_PREFIX = "tide-scratch-"
_LOCK_NAME = ".lock"


def make_scratch(parent: str | None) -> Path:
    """A new empty folder below `parent` (None: the system's temporary folder), for as long as this process lives.

    Raises: OutputError: it cannot be made.
    """
    place = Path(parent or tempfile.gettempdir())
    with output_errors(place / _PREFIX, "Give a folder that can be written with --set workers.scratch=FOLDER."):
        place.mkdir(parents=True, exist_ok=True)
        _remove_orphans(place)
        folder = _locked_folder(place)
        while not (folder / _LOCK_NAME).exists():  # taken for an orphan before it was locked
            folder = _locked_folder(place)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _locked_folder(place: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    fcntl.flock(os.open(folder / _LOCK_NAME, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)  # open until the process ends
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not take its parent's folder away
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(place: Path) -> None:
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder / _LOCK_NAME, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(handle)
