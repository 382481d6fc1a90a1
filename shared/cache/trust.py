"""Which caches were checked in full before, by this user on this machine: the others are, whenever they are opened.

A folder is recognised by its manifest's hash and by what the file system says of every file: size, inode, time of the
last write and of the last change. No archive and no download can bring along the last one, and the note lies in the
user's own folder, not in the cache: a stranger cannot ship a cache that counts as checked. Bytes that rot later are
found by the page checksums of every read. What lies elsewhere is recognised by its manifest's hash alone, because each
of its files is compared with the manifest's SHA-256 whenever it is used. Another version of tide looks again.

Nothing is noted of files that somebody else may write, and notes that somebody else may write do not count. Noted, too,
is every shard that this user's own dump has written: any other one is checked in full before a manifest vouches for it.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ... import __version__
from ..config import to_tree
from .files import HOST
from .manifest import MANIFEST_NAME, Manifest
from .receipts import Receipt

MAX_NOTES = 1000
_MAX_LINKS = 40
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""Permission to write, for others than the owner; the mask of an access-control list shows in the group's."""


def notes_folder() -> Path:
    """Where checked caches are noted: tide/verified below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tide" / "verified"


def trust_note(root: Path, manifest: Manifest) -> Path | None:
    """The note that vouches for a folder as it is now, whether it exists or not.

    Take it before the checks and keep it afterwards: files that change in between are not what was checked.
    Returns: None: a file is missing (those of an audit may be left out), others may write one, or there is no place for
        notes.
    """
    names = [MANIFEST_NAME, *(entry.name for entry in manifest.files())]
    if not is_private(root, *(root / name for name in names if os.path.lexists(root / name))):
        return None
    seen = {entry.name: _seen(root / entry.name) for entry in manifest.files()}
    if any(seen[entry.name] is None for entry in manifest.files(audit=False)):
        return None
    return _note(manifest, seen)


def content_note(manifest: Manifest) -> Path | None:
    """The note that vouches for the bytes of a cache wherever they lie, its audit excepted.

    It says nothing to who has not compared every file's SHA-256 with the manifest's himself.
    Returns: None: there is no place for notes.
    """
    return _note(manifest, "content")


def is_trusted(root: Path, manifest: Manifest) -> bool:
    """Was just this folder checked in full, or made here, and has no file of it changed since?"""
    return is_kept(trust_note(root, manifest))


def is_kept(note: Path | None) -> bool:
    """Did what the note vouches for pass every check before?"""
    return note is not None and is_private(note)


def keep_note(note: Path | None) -> None:
    """Every check has passed. Where the user's folder cannot be written, checks are simply made again."""
    if note is None:
        return
    with contextlib.suppress(OSError):
        _write_note(note, b"")


def note_written(receipt: Receipt) -> None:
    """This user's own dump has just written a shard, and checked every row of it."""
    with contextlib.suppress(OSError, RuntimeError):
        _write_note(_written(receipt.plan_hash), f"{_digest(receipt)}\n".encode())


def made_by_others(plan_hash: str, receipts: Iterable[Receipt]) -> list[int]:
    """Numbers of the shards that this user's own dump has not written, as their receipts describe them."""
    try:
        notes = [note for note in notes_folder().glob(f"{plan_hash}.*.shards") if is_private(note)]
        known = {line for note in notes for line in note.read_text().split()}
    except (OSError, RuntimeError, UnicodeDecodeError):
        known = set()
    return [receipt.shard for receipt in receipts if _digest(receipt) not in known]


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


def _write_note(note: Path, line: bytes) -> None:
    """Append to a note, and throw the oldest ones away."""
    note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(note, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)
    os.utime(note)
    notes = [
        path for path in note.parent.iterdir() if re.fullmatch(r"[0-9a-f]{64}(\.[A-Za-z0-9-]+\.shards)?", path.name)
    ]
    for old in sorted(notes, key=lambda path: path.lstat().st_mtime_ns)[:-MAX_NOTES]:
        old.unlink(missing_ok=True)


def _written(plan_hash: str) -> Path:
    """One file for each machine: several that append to one over a network lose lines."""
    return notes_folder() / f"{plan_hash}.{HOST}.shards"


def _digest(receipt: Receipt) -> str:
    return hashlib.sha256(json.dumps([__version__, to_tree(receipt)], sort_keys=True).encode()).hexdigest()


def _note(manifest: Manifest, seen: object) -> Path | None:
    signature = json.dumps([__version__, manifest.hash, seen]).encode()
    with contextlib.suppress(RuntimeError):  # no home folder
        return notes_folder() / hashlib.sha256(signature).hexdigest()
    return None


def _seen(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
