"""SHA-256 of large files, each hashed once: remembered by path, device, inode, size and times (notes.py).

A file that was written a moment ago is not remembered: it may change within the same tick of the file system's clock.
"""

import hashlib
import os
import re
import time
from pathlib import Path

from .errors import DataError
from .notes import note_about, read_note, write_note
from .regular_files import open_regular

_SETTLED_S = 2.0
"""Age of a file's last change from which its times tell the next one; FAT counts in steps of two seconds."""


def file_sha256(path: Path) -> str:
    """SHA-256 over every byte of a file, hexadecimal.

    Raises: DataError: no regular file, or it changed while it was read. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        seen = _seen(file.fileno())
        note = note_about("hashes", os.path.realpath(path), *seen)
        known = read_note(note)
        if known and re.fullmatch(r"[0-9a-f]{64}", known):
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _seen(file.fileno()) != seen:
            raise DataError(f"{path}: changed while it was read; wait until it is written, and try again")
    if time.time() - max(seen[-2:]) / 1e9 > _SETTLED_S:
        write_note(note, digest)
    return digest


def _seen(handle: int) -> tuple[int, ...]:
    """What the file system says of a file; its times come last."""
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
