"""Shards of remote caches on this machine's disk: each is fetched once, whoever reads it, and the oldest make room.

    FOLDER/blobs/SHA256               a file of some cache, named by its content; its time says when it was last used
    FOLDER/snapshots/MANIFEST_HASH/   a cache as a folder: manifest.json, and links into blobs/
    FOLDER/in_use/NAME                what one reader uses, a name a line; locked for as long as its process lives
    FOLDER/fetching/XX                locked by whoever fetches a blob whose name begins so
    FOLDER/lock                       held while names are written to in_use/, and while blobs are chosen for removal

A file is named as in use before it is looked for, so nothing disappears between the two. Locks are the kernel's: those
of a killed process are gone with it. What running processes use is never removed, even if it is more than the limit.
"""

import contextlib
import fcntl
import os
import re
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import ShardCacheConfig
from ..errors import CacheError
from . import own_entries
from .files import atomic_write, output_errors
from .manifest import MANIFEST_NAME, FileEntry, Manifest, is_whole, sealed_json

_ADVICE = (
    "Free space there, or give another folder or a smaller limit with shard_cache.folder and shard_cache.limit_gb, and "
    "run the same command again."
)


_SHA256 = r"[0-9a-f]{64}"
_READER = r"[0-9a-f]{32}"
_TEMPORARY = rf"\.(?:hub\.)?{_SHA256}\.({_READER})"
"""Names below blobs/ of what a reader is fetching: a file, or the folder that the Hub's client works in."""


class WrongBytes(CacheError):
    """What a remote place sends is not the file that the manifest names."""


class ShardCache:
    """One reader's part of the folder that all readers on this machine share."""

    def __init__(self, config: ShardCacheConfig) -> None:
        self.folder, self.limit_bytes = config.path, round(config.limit_gb * 1e9)
        self._used: Counter[str] = Counter()
        self._warned = False
        self._name = uuid.uuid4().hex
        with output_errors(self.folder / "blobs", _ADVICE):
            for name in ("blobs", "snapshots", "in_use", "fetching"):
                with own_entries.opened(self.folder, name, create=True):
                    pass
            with self._locked("lock"):
                self._list = os.open(self.folder / "in_use" / self._name, os.O_CREAT | os.O_RDWR)
                fcntl.flock(self._list, fcntl.LOCK_EX)
        # Closed with this object, which unlocks the list; removed by whoever next makes room. A forked child shares it.
        weakref.finalize(self, os.close, self._list).atexit = False

    def snapshot(self, manifest: Manifest) -> Path:
        """The folder of a cache, with its manifest and without its shards."""
        root = self.folder / "snapshots" / manifest.hash
        self._use(manifest.hash)
        atomic_write(root / MANIFEST_NAME, sealed_json(manifest.to_json()))
        return root

    def bring(self, root: Path, entry: FileEntry, fetch: Callable[[Path], None]) -> None:
        """Make `root / entry.name` the file that the manifest names; whoever calls this uses it until `release`.

        Args: fetch: called with a path to write, if the file is not here or damaged.
        Raises: WrongBytes: what arrives is another file, twice. OutputError: no space. What `fetch` raises.
        """
        blob = self.folder / "blobs" / entry.sha256
        with output_errors(blob, _ADVICE):
            self._use(entry.sha256)
            try:
                if not is_whole(blob, entry):
                    with self._locked(f"fetching/{entry.sha256[:2]}"):
                        if not is_whole(blob, entry):  # another reader was not faster
                            self._fetch(blob, entry, fetch)
                os.utime(blob)
                _link(root / entry.name, blob)
            except BaseException:
                self.release(entry)
                raise

    def release(self, entry: FileEntry) -> None:
        """The file may be removed again, unless others use it."""
        self._use(entry.sha256, -1)

    def _fetch(self, blob: Path, entry: FileEntry, fetch: Callable[[Path], None]) -> None:
        temporary = blob.with_name(f".{entry.sha256}.{self._name}")
        try:
            for _ in range(2):
                self._make_room(entry.bytes)
                fetch(temporary)
                if is_whole(temporary, entry):
                    temporary.replace(blob)
                    return
        finally:
            temporary.unlink(missing_ok=True)
        raise WrongBytes(f"{entry.name} arrived twice with another size or SHA-256 than the manifest's; refused")

    def _use(self, name: str, times: int = 1) -> None:
        with self._locked("lock"):
            self._used[name] += times
            os.ftruncate(self._list, 0)
            os.pwrite(self._list, "".join(f"{name}\n" for name in +self._used).encode(), 0)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest until so many bytes fit, or nothing is left that may be removed."""
        with self._locked("lock"):
            readers, used = self._living()
            blobs = []
            for name in own_entries.names(self.folder, "blobs"):
                reader = re.fullmatch(_TEMPORARY, name)
                if reader and reader[1] not in readers:  # of a killed process
                    self._remove_temporary(f"blobs/{name}")
                elif reader or re.fullmatch(_SHA256, name):
                    status = own_entries.status(self.folder, f"blobs/{name}")
                    if status is not None:  # None: it got its final name meanwhile
                        blobs.append((status.st_mtime_ns, status.st_size, name))
            total = sum(size for _, size, _ in blobs)
            for _, size, name in sorted(blobs):
                if total + num_bytes <= self.limit_bytes:
                    break
                if name not in used and not name.startswith("."):
                    own_entries.remove(self.folder, f"blobs/{name}")
                    total -= size
            self._drop_empty_snapshots(used)
        if total + num_bytes > self.limit_bytes and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.folder}: what running commands read takes {(total + num_bytes) / 1e9:,.1f} GB, more than "
                f"shard_cache.limit_gb = {self.limit_bytes / 1e9:g}; none of it is removed while they run",
                stacklevel=2,
            )

    def _living(self) -> tuple[set[str], set[str]]:
        """Readers that live, and all that they use; what dead ones left is removed."""
        readers, used = set(), set()
        for name in own_entries.names(self.folder, "in_use"):
            if re.fullmatch(_READER, name) is None or own_entries.status(self.folder, f"in_use/{name}") is None:
                continue
            with open(self.folder / "in_use" / name, opener=own_entries.no_link) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    readers.add(name)
                    used.update(file.read().split())
                else:
                    own_entries.remove(self.folder, f"in_use/{name}")
        return readers, used

    def _remove_temporary(self, name: str) -> None:
        if own_entries.status(self.folder, name) is None:
            with contextlib.suppress(NotADirectoryError):
                own_entries.remove_tree(self.folder, name)
        else:
            own_entries.remove(self.folder, name)

    def _drop_empty_snapshots(self, used: set[str]) -> None:
        for name in own_entries.names(self.folder, "snapshots"):
            if re.fullmatch(_SHA256, name) is None or name in used:
                continue
            links = [path for path in (self.folder / "snapshots" / name).rglob("*") if path.is_symlink()]
            if not any(path.exists() for path in links):
                own_entries.remove_tree(self.folder, f"snapshots/{name}")

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / name, "w", opener=own_entries.no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _link(link: Path, blob: Path) -> None:
    target = os.path.relpath(blob, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
