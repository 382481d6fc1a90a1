"""Repair: files that differ from the manifest go to `quarantine/`, and the same bytes are put in their place.

1. find what is damaged: every named file's size and SHA-256, and files in `data/` and `audit/` that nobody named;
2. move it below `quarantine/0001/` (0002, ... the next time) under the name it had: nothing is ever deleted;
3. fetch the same bytes from the Hub or another folder (here), or ask the teacher again (teacher_dump/repair.py).

Nothing else is touched, and no reader looks into `quarantine/`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..addresses import require_apart
from ..errors import CacheError
from .files import file_inside, fsync_folder, output_errors, temporary_name
from .hub import Hub, is_address, parse_address
from .manifest import FileEntry, Manifest, read_manifest
from .pull import fetch
from .receipts import read_receipt, receipt_path
from .verify import audit_is_here, check_file, unnamed_files, verify_cache

QUARANTINE = "quarantine"
_COPIED_BYTES = 1 << 20


@dataclass(frozen=True)
class Damage:
    """What a repair has to replace: numbers of shards and of audits, the vocabulary, and files that nobody named.

    Args:
        audits: numbers of the shards whose audit is damaged; none if the audit was left out as a whole.
        reasons: one message per finding, in the words of `verify_cache`.
    """

    shards: tuple[int, ...]
    audits: tuple[int, ...]
    vocabulary: bool
    unnamed: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class RepairReport:
    """What was done.

    Args:
        replaced: names of files that are whole again; moved: names now below `quarantine` (None: nothing was moved).
        same_manifest: is the manifest's hash what it was before? None: there was none to compare with.
    """

    root: str
    replaced: tuple[str, ...]
    moved: tuple[str, ...]
    quarantine: str | None
    manifest_hash: str
    same_manifest: bool | None


def find_damage(root: str | Path, manifest: Manifest) -> Damage:
    """Compare every file with the manifest: size, SHA-256, and that it lies in the folder."""
    root = Path(root)
    reasons: list[str] = []

    def is_damaged(entry: FileEntry) -> bool:
        try:
            check_file(root, entry, full=True)
        except CacheError as error:
            reasons.append(str(error))
            return True
        return False

    shards = tuple(number for number, entry in enumerate(manifest.shards) if is_damaged(entry))
    audits = manifest.audit_of if audit_is_here(root, manifest) else {}
    damaged_audits = tuple(number for number, entry in audits.items() if is_damaged(entry))
    vocabulary = manifest.vocabulary is not None and is_damaged(manifest.vocabulary)
    unnamed = unnamed_files(root, manifest)
    reasons += [f"{root / name}: the manifest does not name this file" for name in unnamed]
    return Damage(shards, damaged_audits, vocabulary, tuple(unnamed), tuple(reasons))


class Quarantine:
    """The folder that one repair moves things to; it is made when the first one comes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        taken = [int(path.name) for path in (root / QUARANTINE).glob("[0-9]*") if path.name.isdigit()]
        self.folder = root / QUARANTINE / f"{max(taken, default=0) + 1:04d}"
        self.moved: list[str] = []

    def take(self, name: str) -> None:
        """Move `root / name` here, if it is there; a link is moved as such.

        Raises: CacheError: a folder on the way is a link that leads out of the cache. OutputError.
        """
        path, place = self.root / name, self.folder / name
        if not os.path.lexists(path):
            return
        for folder in (path.parent, place.parent):
            if not folder.resolve().is_relative_to(self.root.resolve()):
                raise CacheError(f"{folder}: is a link that leads out of the cache folder; remove the link first")
        with output_errors(place, "Free space or fix the folder, then repair again."):
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
            fsync_folder(place.parent)
            fsync_folder(path.parent)
        self.moved.append(name)

    @property
    def path(self) -> str | None:
        """The folder, or None if nothing was moved."""
        return str(self.folder) if self.moved else None


def repair_from(root: str | Path, source: str, *, revision: str | None = None) -> RepairReport:
    """Replace what is damaged by the same files of another copy of this cache; the manifest stays as it is.

    Args:
        source: a folder that holds the same cache, or a data set of the Hub; revision: commit, tag or branch there.
    Raises:
        CacheError: the manifest is missing or damaged, the source has other bytes, or the files are what the manifest
            says and verification still fails. ConfigError: the copies lie in each other. Unavailable: the Hub cannot be
            reached. OutputError.
    """
    root = Path(root)
    require_apart(root, {"--from": source}, what="the cache", makes_cache=True)
    manifest = read_manifest(root)
    damage, quarantine = find_damage(root, manifest), Quarantine(root)
    damaged: list[FileEntry] = [manifest.shards[shard] for shard in damage.shards]
    damaged += [manifest.audit_of[shard] for shard in damage.audits]
    if damage.vocabulary and manifest.vocabulary is not None:
        damaged.append(manifest.vocabulary)
    other = _locate(source, revision, damaged) if damaged else root
    for entry in damaged:
        with _copied(other, root, entry) as copy:
            quarantine.take(entry.name)
            with output_errors(root / entry.name):
                os.replace(copy, root / entry.name)
                fsync_folder((root / entry.name).parent)
    for shard in sorted({*damage.shards, *damage.audits}):
        receipt, entry = read_receipt(root, shard), manifest.shards[shard]
        same = receipt is not None and (receipt.sha256, receipt.bytes) == (entry.sha256, entry.bytes)
        if receipt is None or not same or receipt.audit != manifest.audit_of.get(shard):
            quarantine.take(str(receipt_path(root, shard).relative_to(root)))
    for name in damage.unnamed:
        quarantine.take(name)
    require_sound(root)
    names = tuple(entry.name for entry in damaged)
    return RepairReport(str(root), names, tuple(quarantine.moved), quarantine.path, manifest.hash, True)


def require_undamaged(root: str | Path) -> RepairReport:
    """Look, and touch nothing. Raises: CacheError: something is damaged; says what, and how to repair it."""
    root = Path(root)
    manifest = read_manifest(root)
    damage = find_damage(root, manifest)
    if damage.reasons:
        raise CacheError(
            "; ".join(damage.reasons[:8]) + (f"; and {len(damage.reasons) - 8} more" if damage.reasons[8:] else "")
            + ". To repair: give --from another copy of this cache, or the options of its dump-teacher command"
        )  # fmt: skip
    require_sound(root)
    return RepairReport(str(root), (), (), None, manifest.hash, True)


def require_sound(root: Path) -> None:
    """All checks, once every file is what the manifest says. Raises: CacheError."""
    try:
        verify_cache(root, mode="full")
    except CacheError as error:
        raise CacheError(
            f"{error} (Its files are what the manifest names, so a repair would bring the same bytes again: whoever "
            "made this cache made it so; make or fetch another one.)"
        ) from error


def _locate(source: str, revision: str | None, entries: Sequence[FileEntry]) -> Path:
    """The folder of another copy; of one on the Hub, these files alone are fetched."""
    if Path(source).is_dir():
        if revision is not None:
            raise CacheError(f"{source} is a folder and has no revision {revision!r}; leave revision out")
        return Path(source)
    if not is_address(source):
        raise CacheError(f"{source}: no such folder (and not an id of the Hub, which has the form owner/name)")
    address, hub = parse_address(source, revision), Hub()
    paths = [fetch(hub, address.repository, e.name, address.revision, None, most_bytes=e.bytes) for e in entries]
    return paths[0].parents[entries[0].name.count("/")]


@contextlib.contextmanager
def _copied(other: Path, root: Path, entry: FileEntry) -> Iterator[Path]:
    """A fsynced hidden copy of the other cache's file beside its future place, compared with the manifest."""
    source, target = file_inside(other, entry.name), root / entry.name
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise CacheError(f"{target.parent}: is a link that leads out of the cache folder; remove the link first")
    temporary, digest, left = temporary_name(target), hashlib.sha256(), entry.bytes
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output_errors(target), open(source, "rb") as file, open(temporary, "xb") as copy:
            while left >= 0 and (data := file.read(min(_COPIED_BYTES, left + 1))):
                digest.update(data)
                copy.write(data)
                left -= len(data)
            copy.flush()
            os.fsync(copy.fileno())
        if left != 0 or digest.hexdigest() != entry.sha256:
            raise CacheError(
                f"{source}: its bytes are not those that {root / 'manifest.json'} names; it is damaged too, or of "
                "another cache. Nothing of it was taken; give another source"
            )
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
