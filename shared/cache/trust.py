"""Which caches were checked in full before, by this user on this machine: the others are, whenever they are opened.

A folder is recognised by its manifest's hash and by what the file system says of every file: size, inode, time of the
last write and of the last change. No archive and no download can bring along the last one, and the note lies in the
user's own folder, not in the cache: a stranger cannot ship a cache that counts as checked. Bytes that rot later are
found by the page checksums of every read. What lies elsewhere is recognised by its manifest's hash alone, because each
of its files is compared with the manifest's SHA-256 whenever it is used. Another version of tide looks again.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from ... import __version__
from .manifest import Manifest

MAX_NOTES = 1000


def notes_folder() -> Path:
    """Where checked caches are noted: tide/verified below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tide" / "verified"


def trust_note(root: Path, manifest: Manifest) -> Path | None:
    """The note that vouches for a folder as it is now, whether it exists or not.

    Take it before the checks and keep it afterwards: files that change in between are not what was checked.
    Returns: None: a file is missing (those of an audit may be left out), or there is no place for notes.
    """
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
    return note is not None and note.exists()


def keep_note(note: Path | None) -> None:
    """Every check has passed. Where the user's folder cannot be written, checks are simply made again."""
    if note is None:
        return
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
        notes = [path for path in note.parent.iterdir() if re.fullmatch(r"[0-9a-f]{64}", path.name)]
        for old in sorted(notes, key=lambda path: path.lstat().st_mtime_ns)[:-MAX_NOTES]:
            old.unlink(missing_ok=True)


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
