"""A cache on the Hub or in an object store, read from where it lies: shards come when needed, the next ones ahead.

The manifest comes first (origin.py). Each shard is fetched whole into this machine's shard cache (shard_cache.py), is
compared with the manifest's size and SHA-256, and checked in a child process like any shard of a stranger; only then is
it read. Iterating holds a few shards at a time. `index()`, and with it training, needs all of them before the first
step, and holds them; once all of them have passed, this user's next readers only compare hashes (trust.py). The audit
stays where it is: nothing that reads from afar needs it (pull-cache brings it).
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ..config import ShardCacheConfig
from ..errors import CacheError
from .files import Pinned
from .manifest import FileEntry, Manifest
from .origin import HubOrigin, Origin, find_origin
from .pull import in_parallel
from .reader import Cache, CacheIndex
from .shard_cache import ShardCache, WrongBytes
from .trust import content_note, is_kept, keep_note
from .verify import VerifyReport, verify_cache, verify_shard
from .verify_shards import noted
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import datasets

    from .hub import HubAddress

READ_AHEAD = 2
"""Shards fetched and checked in the background beyond the one that is being read."""
HELD_SHARDS = 8
"""Shards kept on the disk for reading in any order; older ones may make room for other caches."""


def open_remote_cache(
    name: str, revision: str | None, verify: bool | Literal["quick", "full"], shard_cache: ShardCacheConfig
) -> "RemoteCache":
    """`open_cache` for what is no folder. Raises: CacheError, ConfigError, Unavailable, TryAgain."""
    origin = find_origin(name, revision)
    checked = bool(verify) and verify != "quick"
    cache = RemoteCache(origin, origin.manifest(), shard_cache, checked=checked)
    if isinstance(verify, str):
        cache.verify(verify)
    return cache


class RemoteCache(Cache):
    """A complete cache elsewhere, with the interface of `Cache`; `root` is its folder in the shard cache.

    May be used from several threads and pickled; the copy fetches for itself, from the same local files.
    """

    def __init__(self, origin: Origin, manifest: Manifest, shard_cache: ShardCacheConfig, checked: bool = True) -> None:
        super().__init__(shard_cache.path / "snapshots" / manifest.hash, manifest)
        self.origin, self.shard_cache, self.checked = origin, shard_cache, checked
        self._local = ShardCache(shard_cache)
        self._local.snapshot(manifest)
        self._fetched: OrderedDict[int, Future[None]] = OrderedDict()
        self._fetched_lock = threading.Lock()
        self._verified: set[int] = set()
        self._all_checked = False
        self._known = is_kept(content_note(manifest))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.origin, self.manifest, self.shard_cache, self.checked)

    @property
    def address(self) -> "HubAddress | str":
        """Where it lies: on the Hub with its commit, or the URL."""
        return self.origin.address if isinstance(self.origin, HubOrigin) else str(self.origin)

    def _open(self, shard: int) -> Pinned:
        if not self._all_checked:
            self._wait_for(shard)
        return super()._open(shard)

    def _wait_for(self, shard: int) -> None:
        """Return when the shard is here and checked; the next ones are on their way then."""
        try:
            self._fetch(shard).result()
        except BaseException:
            with self._fetched_lock:
                self._fetched.pop(shard, None)  # the next read tries again
            raise
        for following in range(shard + 1, min(shard + 1 + READ_AHEAD, len(self.manifest.shards))):
            self._fetch(following)
        self._let_go(keep=shard)

    def _fetch(self, shard: int) -> "Future[None]":
        with self._fetched_lock:
            future = self._fetched.get(shard)
            if future is None:
                future = self._fetched[shard] = Future()
                # A daemon: an interrupted command does not wait for shards that nobody will read.
                threading.Thread(target=self._fetch_into, args=(shard, future), daemon=True).start()
            self._fetched.move_to_end(shard)
            return future

    def _fetch_into(self, shard: int, future: "Future[None]") -> None:
        try:
            self._bring(self.manifest.shards[shard])
            if self.checked and not self._known and shard not in self._verified:
                verify_shard(self.root, shard)
                self._verified.add(shard)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _let_go(self, keep: int) -> None:
        """Release the shards that were not read for longest; one that is open stays readable until it is closed."""
        with self._fetched_lock:
            done = [s for s, future in self._fetched.items() if future.done() and not future.exception() and s != keep]
            old = done[: max(0, len(self._fetched) - HELD_SHARDS)]
            for shard in old:
                del self._fetched[shard]
        for shard in old:
            with self._lock:
                self._files.pop(shard, None)
            self._local.release(self.manifest.shards[shard])

    def _bring(self, entry: FileEntry) -> None:
        """Have a file here, and keep it here."""
        try:
            self._local.bring(self.root, entry, lambda target: self.origin.fetch(entry, target))
        except WrongBytes as error:
            raise CacheError(f"{self.origin}: {error}. {self.origin.advice}") from error

    def _bring_all(self) -> None:
        damaged: list[CacheError] = []

        def bring(entry: FileEntry) -> None:
            with noted(damaged):
                self._bring(entry)

        for _ in in_parallel(bring, self.manifest.files(audit=False)):
            pass
        if damaged:
            raise CacheError("; ".join(map(str, damaged)))

    def fetch_all(self) -> None:
        """Bring every file here and run all checks, those that need every shard included; once per user and cache.

        Raises: CacheError: the first check that fails.
        """
        if self._all_checked:
            return
        if self.checked:
            self.verify("quick" if self._known else "full")
        else:
            self._bring_all()
        self._all_checked = True

    def verify(self, mode: Literal["quick", "full"] = "full") -> VerifyReport:
        """Fetch everything but the audit, then check it. Raises: CacheError: the first check that fails."""
        self._bring_all()
        report = replace(verify_cache(self.root, mode=mode, audit=False), root=str(self.origin))
        if mode == "full":
            keep_note(content_note(self.manifest))
            self._all_checked = True
        return report

    def index(self) -> CacheIndex:
        """As `Cache.index`; fetches all shards first."""
        self.fetch_all()
        return super().index()

    def vocabulary(self) -> Vocabulary:
        """As `Cache.vocabulary`."""
        if self.manifest.vocabulary is not None:
            self._bring(self.manifest.vocabulary)
        return super().vocabulary()

    def to_datasets(self, *, decoded: bool = False, temperature: float | None = None) -> "datasets.Dataset":
        """As `Cache.to_datasets`; fetches all shards first."""
        self.fetch_all()
        return super().to_datasets(decoded=decoded, temperature=temperature)
