"""A cache on the Hub, read from where it lies: shards are fetched when they are needed, and the next ones ahead.

The manifest comes first, at one commit. Each shard goes into the Hub client's own cache folder (HF_HOME), is compared
with the manifest's size and SHA-256, and checked in a child process like any shard of a stranger; only then is it
read. Iterating needs a few shards at a time. `index()`, and with it training, needs all of them before the first step.
The audit stays where it is: nothing that reads from afar needs it (pull-cache brings it).
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import CacheError
from .hub import Hub, HubAddress, is_address, parse_address
from .manifest import MANIFEST_NAME, Manifest, NamedFile, read_manifest
from .pull import in_parallel, is_whole, named_files, require_files, require_manifest
from .reader import Cache, CacheIndex
from .schema import ViewRow
from .verify import VerifyReport, verify_cache, verify_shard
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import datasets

READ_AHEAD = 2
"""Shards fetched and checked in the background beyond the one that is being read."""


def open_remote_cache(
    name: str, revision: str | None, verify: bool | Literal["quick", "full"], *, hub: Hub | None = None
) -> "RemoteCache":
    """`open_cache` for the Hub. Raises: CacheError, Unavailable, TryAgain."""
    if not is_address(name):
        raise CacheError(
            f"{name}: no such folder (and not an id of the Hub, which has the form owner/name, owner/name@revision or "
            "hf://datasets/owner/name@revision)"
        )
    address, hub = parse_address(name, revision), hub or Hub()
    commit = hub.commit_of(address)
    require_manifest(hub, address, commit)
    root = _to_client_cache(hub, address, MANIFEST_NAME, commit).parent
    manifest = read_manifest(root)
    require_files(hub, address, commit, named_files(manifest, str(address), audit=False))
    checked = bool(verify) and verify != "quick"
    cache = RemoteCache(root, manifest, HubAddress(address.repository, commit), checked=checked, hub=hub)
    if isinstance(verify, str):
        cache.verify(verify)
    return cache


def _to_client_cache(hub: Hub, address: HubAddress, name: str, commit: str, *, again: bool = False) -> Path:
    """A file's place in the client's cache folder: links named by commit, into blobs named by content."""

    def download() -> Path:
        return Path(hub.api.hf_hub_download(
            address.repository, name, repo_type="dataset", revision=commit, force_download=again))  # fmt: skip

    return hub.ask(f"fetching {name} of {address}", download)


class RemoteCache(Cache):
    """A complete cache on the Hub, with the interface of `Cache`; `address.revision` is the commit.

    May be used from several threads and pickled; the copy fetches for itself, from the same local files.
    """

    def __init__(
        self, root: Path, manifest: Manifest, address: HubAddress, *, checked: bool = True, hub: Hub | None = None,
        read_ahead: int = READ_AHEAD,
    ) -> None:  # fmt: skip
        self.address, self.checked, self.read_ahead = address, checked, read_ahead
        super().__init__(root, manifest)
        self._hub = hub

    def _reset(self) -> None:
        super()._reset()
        self._hub: Hub | None = None
        self._fetched: dict[int, Future[None]] = {}
        self._fetched_lock = threading.Lock()
        self._all_checked = False
        self._shard_starts = np.concatenate([[0], np.cumsum([s.rows for s in self.manifest.shards])]).astype(np.int64)

    def _file(self, shard: int) -> Any:
        self._wait_for(shard)
        return super()._file(shard)

    def _wait_for(self, shard: int) -> None:
        """Return when the shard is here and checked; the next ones are on their way then."""
        try:
            self._fetch(shard).result()
        except BaseException:
            with self._fetched_lock:
                self._fetched.pop(shard, None)  # the next read tries again
            raise
        for following in range(shard + 1, min(shard + 1 + self.read_ahead, len(self.manifest.shards))):
            self._fetch(following)

    def _fetch(self, shard: int) -> "Future[None]":
        with self._fetched_lock:
            future = self._fetched.get(shard)
            if future is None:
                future = self._fetched[shard] = Future()
                # A daemon: an interrupted command does not wait for shards that nobody will read.
                threading.Thread(target=self._fetch_into, args=(shard, future), daemon=True).start()
            return future

    def _fetch_into(self, shard: int, future: "Future[None]") -> None:
        try:
            if not self._all_checked:
                self._bring(self.manifest.shards[shard])
                if self.checked:
                    verify_shard(self.root, shard)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _bring(self, entry: NamedFile) -> None:
        """Fetch a file unless it is here; what lies in the client's folder is not trusted either."""
        hub = self._hub = self._hub or Hub()
        commit = str(self.address.revision)
        for again in (False, True):
            if is_whole(_to_client_cache(hub, self.address, entry.name, commit, again=again), entry):
                return
        raise CacheError(
            f"{self.address}: {entry.name} arrived twice with another size or SHA-256 than the manifest's; refused"
        )

    def _bring_all(self) -> None:
        for _ in in_parallel(self._bring, named_files(self.manifest, str(self.address), audit=False)):
            pass

    def fetch_all(self) -> None:
        """Bring every file here and run all checks, those that need every shard included; once per object.

        Raises: CacheError: the first check that fails.
        """
        if self._all_checked:
            return
        self._bring_all()
        if self.checked:
            verify_cache(self.root, mode="full", audit=False)
        self._all_checked = True

    def verify(self, mode: Literal["quick", "full"] = "full") -> VerifyReport:
        """Fetch everything but the audit, then check it. Raises: CacheError: the first check that fails."""
        self._bring_all()
        report = verify_cache(self.root, mode=mode, audit=False)
        self._all_checked = self._all_checked or mode == "full"
        return report

    def __iter__(self) -> Iterator[ViewRow]:
        for shard in range(len(self.manifest.shards)):
            for group in range(self._file(shard).metadata.num_row_groups):
                yield from self.read_row_group(shard, group)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[ViewRow]:
        """As `Cache.rows`; fetches the shards of these rows alone."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a cache of {len(self)}")
        out: list[Any] = [None] * len(wanted)
        shards = np.searchsorted(self._shard_starts, wanted, side="right") - 1
        for shard in map(int, np.unique(shards)):
            info = self._file(shard).metadata
            sizes = [info.row_group(group).num_rows for group in range(info.num_row_groups)]
            starts = self._shard_starts[shard] + np.concatenate([[0], np.cumsum(sizes)])
            slots = np.flatnonzero(shards == shard)
            groups = np.searchsorted(starts, wanted[slots], side="right") - 1
            for slot, group in sorted(zip(slots, groups, strict=True), key=lambda pair: int(pair[1])):
                out[slot] = self._batch(shard, int(group))[int(wanted[slot] - starts[group])]
        return out

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
