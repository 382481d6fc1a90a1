"""SHA-256 of large files, each hashed once: remembered by path, device, inode, size and times in the user's own folder.

A note counts only where it and its folder belong to this user and nobody else may write them; without such a place
files are simply hashed again. A file that was written a moment ago is not remembered: it may change within the same
tick of the file system's clock.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import uuid
from pathlib import Path

from .errors import DataError
from .regular_files import open_regular

MAX_NOTES = 1000
_SETTLED_S = 2.0
"""Age of a file's last change from which its times tell the next one; FAT counts in steps of two seconds."""


def notes_folder() -> Path:
    """Where hashes are noted: tide/hashes below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tide" / "hashes"


def file_sha256(path: Path) -> str:
    """SHA-256 over every byte of a file, hexadecimal.

    Raises: DataError: no regular file, or it changed while it was read. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        seen = _seen(file.fileno())
        note = _note(path, seen)
        known = _read_note(note) if note else None
        if known is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _seen(file.fileno()) != seen:
            raise DataError(f"{path}: changed while it was read; wait until it is written, and try again")
    if note and time.time() - max(seen[-2:]) / 1e9 > _SETTLED_S:
        _keep_note(note, digest)
    return digest


def _seen(handle: int) -> tuple[int, ...]:
    """What the file system says of a file; its times come last."""
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _note(path: Path, seen: tuple[int, ...]) -> Path | None:
    with contextlib.suppress(RuntimeError, OSError):  # no home folder; links in a circle
        signature = json.dumps([str(path.resolve()), *seen]).encode()
        return notes_folder() / hashlib.sha256(signature).hexdigest()
    return None


def _read_note(note: Path) -> str | None:
    """The hash that a note of this user holds; None: there is none that counts."""
    try:
        if not all(_is_own(folder) for folder in (note.parent, note.parent.parent)):
            return None
        handle = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not (stat.S_ISREG(status.st_mode) and _belongs(status)):
                return None
            text = file.read(65).decode(errors="replace")
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _keep_note(note: Path, digest: str) -> None:
    """Where the user's folder cannot be written, files are simply hashed again."""
    temporary = note.with_name(f".{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        note.parent.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (note.parent.parent, note.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not all(_is_own(folder) for folder in (note.parent, note.parent.parent)):
            return
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(digest)
            os.replace(temporary, note)
        finally:
            temporary.unlink(missing_ok=True)
        notes = [path for path in note.parent.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.name)]
        for old in sorted(notes, key=lambda path: path.lstat().st_mtime_ns)[:-MAX_NOTES]:
            old.unlink(missing_ok=True)


def _is_own(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and _belongs(status)


def _belongs(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
