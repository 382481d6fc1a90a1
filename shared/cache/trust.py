"""Which caches were checked in full before, by this user on this machine: the others are, whenever they are opened.

A folder is recognised by its manifest's hash and by what the file system says of every file: size, inode, time of the
last write and of the last change. No archive and no download can bring along the last one, and the note lies in the
user's own folder (notes.py), not in the cache: a stranger cannot ship a cache that counts as checked. Bytes that rot
later are found by the page checksums of every read. What lies elsewhere is recognised by its manifest's hash alone,
because each of its files is compared with the manifest's SHA-256 whenever it is used. Another version of tide looks
again.

Nothing is noted of files that somebody else may write. Noted, too, is every shard that this user's own dump has
written: any other one is checked in full before a manifest vouches for it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ... import __version__
from ..config import to_tree
from ..notes import is_private, note_about, notes_folder, read_note, write_note
from .files import HOST
from .manifest import MANIFEST_NAME, Manifest
from .receipts import Receipt

_KIND = "verified"


def trust_note(root: Path, manifest: Manifest) -> Path | None:
    """The note that vouches for a folder as it is now, whether it exists or not.

    Take it before the checks and keep it afterwards: files that change in between are not what was checked.
    Returns: None: a file is missing (those of an audit may be left out), others may write one, or there is no place for
        notes.
    """
    names = [MANIFEST_NAME, *(entry.name for entry in manifest.files())]
    if not is_private(root, *(root / name for name in names if os.path.lexists(root / name))):
        return None
    seen: dict[str, list[int] | None] = dict.fromkeys(names[1:])
    for name in seen:
        with suppress(OSError):
            status = (root / name).stat()
            seen[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    if any(seen[entry.name] is None for entry in manifest.files(audit=False)):
        return None
    return note_about(_KIND, __version__, manifest.hash, seen)


def content_note(manifest: Manifest) -> Path | None:
    """The note that vouches for the bytes of a cache wherever they lie, its audit excepted.

    It says nothing to who has not compared every file's SHA-256 with the manifest's himself.
    Returns: None: there is no place for notes.
    """
    return note_about(_KIND, __version__, manifest.hash, "content")


def is_trusted(root: Path, manifest: Manifest) -> bool:
    """Was just this folder checked in full, or made here, and has no file of it changed since?"""
    return is_kept(trust_note(root, manifest))


def is_kept(note: Path | None) -> bool:
    """Did what the note vouches for pass every check before?"""
    return read_note(note) is not None


def keep_note(note: Path | None) -> None:
    """Every check has passed. Where the user's folder cannot be written, checks are simply made again."""
    write_note(note)


def note_written(receipt: Receipt) -> None:
    """This user's own dump has just written a shard, and checked every row of it.

    One note for each machine: several that append to one over a network lose lines.
    """
    with suppress(RuntimeError):  # no home folder
        write_note(notes_folder(_KIND) / f"{receipt.plan_hash}.{HOST}.shards", f"{_digest(receipt)}\n", append=True)


def made_by_others(plan_hash: str, receipts: Iterable[Receipt]) -> list[int]:
    """Numbers of the shards that this user's own dump has not written, as their receipts describe them."""
    known: set[str] = set()
    with suppress(OSError, RuntimeError):
        for note in notes_folder(_KIND).glob(f"{plan_hash}.*.shards"):
            known.update((read_note(note) or "").split())
    return [receipt.shard for receipt in receipts if _digest(receipt) not in known]


def _digest(receipt: Receipt) -> str:
    return hashlib.sha256(json.dumps([__version__, to_tree(receipt)], sort_keys=True).encode()).hexdigest()
