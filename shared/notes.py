"""What this user has found out before: small files in the user's own folder, believed only where nobody else may write.

    tide/verified/, tide/hashes/ below XDG_CACHE_HOME, by default ~/.cache

A note is named by a digest of what it is about, so what changes has another one. Where there is no place for notes, or
others may write it, nothing is remembered and everything is looked at again.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_NOTES = 1000
_NOTE = re.compile(r"[0-9a-f]{64}(\.[A-Za-z0-9-]+\.shards)?")
_MAX_LINKS = 40
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""Permission to write, for others than the owner; the mask of an access-control list shows in the group's."""


def notes_folder(kind: str) -> Path:
    """Where notes of a kind lie: tide/KIND below XDG_CACHE_HOME. Raises: RuntimeError: there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tide" / kind


def note_about(kind: str, *about: object) -> Path | None:
    """Where the note about something lies, given as plain JSON, whether it exists or not; None: there is no place."""
    with contextlib.suppress(RuntimeError):  # no home folder
        return notes_folder(kind) / hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return None


def read_note(note: Path | None) -> str | None:
    """What a note says; None: there is none that counts."""
    try:
        if note is None or not is_private(note):
            return None
        with open(note, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def write_note(note: Path | None, text: str = "", *, append: bool = False) -> None:
    """Keep a note, and throw the oldest ones away; where the user's folder cannot be written, nothing happens."""
    if note is None:
        return
    with contextlib.suppress(OSError):
        note.parent.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (note.parent.parent, note.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | (os.O_APPEND if append else os.O_TRUNC)
        handle = os.open(note, flags, 0o600)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
        os.utime(note)
        notes = [path for path in note.parent.iterdir() if _NOTE.fullmatch(path.name)]
        for old in sorted(notes, key=lambda path: path.lstat().st_mtime_ns)[:-MAX_NOTES]:
            old.unlink(missing_ok=True)


def is_private(*paths: Path) -> bool:
    """Are these files and folders there, and can nobody but this user, and root, change or exchange any of them?

    The folders on the way count, and where a link leads. In a folder with the sticky bit (/tmp) others cannot exchange
    what is not theirs.
    """
    known: set[str] = set()
    try:
        for path in paths:
            *way, last = _way(path)
            for place in (place for place in way if place not in known):
                status = os.lstat(place)
                if not _is_own(status, may_add=bool(status.st_mode & stat.S_ISVTX)):
                    return False
                known.add(place)
            if not _is_own(os.lstat(last)):
                return False
    except OSError:
        return False
    return True


def _is_own(status: os.stat_result, *, may_add: bool = False) -> bool:
    if status.st_uid not in (os.geteuid(), 0):
        return False
    return may_add or stat.S_ISLNK(status.st_mode) or not status.st_mode & _OTHERS


def _way(path: Path) -> Iterator[str]:
    """Everything that is looked up to open a path, from the root on; links are followed one by one."""
    here, todo, links = "/", list(path.absolute().parts[:0:-1]), 0
    yield here
    while todo:
        part = todo.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        place = os.path.join(here, part)
        yield place
        if os.path.islink(place):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(f"{path}: links in a circle")
            target = Path(os.readlink(place))
            here = "/" if target.is_absolute() else here
            todo += [part for part in reversed(target.parts) if part != "/"]
        else:
            here = place
