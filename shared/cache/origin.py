"""Where a remote cache is fetched from: a data set of the Hub at one commit, or a URL of an object store.

Both give the manifest first, compare what the place says about the files with it, and then fetch whole files.
"""

import shutil
from pathlib import Path
from typing import Protocol

from ..addresses import is_url
from ..errors import CacheError, ConfigError
from .hub import Hub, HubAddress, is_address, parse_address
from .manifest import Manifest, NamedFile, read_manifest
from .object_store import ObjectStore
from .pull import fetch, fetched_manifest, named_files, require_files, require_manifest
from .receipts import listed_sizes
from .store import open_store


class Origin(Protocol):
    """A place that holds one complete cache; may be pickled. `str()` names it in messages."""

    advice: str
    """What to do about a file that is damaged there."""

    def manifest(self) -> Manifest:
        """The cache's manifest, after a look at what the place says of every file it names. Raises: CacheError."""
        ...

    def fetch(self, entry: NamedFile, target: Path) -> None:
        """Write a file of the cache to `target`. Raises: CacheError: it is missing. Unavailable, TryAgain."""
        ...


class HubOrigin:
    """A data set of the Hub; `address.revision` is a commit."""

    advice = "Its owner should push it again"

    def __init__(self, address: HubAddress, hub: Hub | None = None) -> None:
        self.address = address
        self._hub = hub

    def __str__(self) -> str:
        return str(self.address)

    def __getstate__(self) -> dict[str, object]:
        return {"address": self.address, "_hub": None}

    @property
    def hub(self) -> Hub:
        """The client, made on first use."""
        self._hub = self._hub or Hub()
        return self._hub

    def manifest(self) -> Manifest:
        """As `Origin.manifest`."""
        address, commit = self.address, str(self.address.revision)
        require_manifest(self.hub, address, commit)
        manifest = fetched_manifest(self.hub, address.repository, commit)
        require_files(self.hub, address, commit, named_files(manifest, str(address), audit=False))
        return manifest

    def fetch(self, entry: NamedFile, target: Path) -> None:
        """As `Origin.fetch`."""
        commit, folder = str(self.address.revision), target.with_name(f".hub{target.name}")  # hidden like the target
        try:
            fetched = fetch(
                self.hub, self.address.repository, entry.name, commit, folder, most_bytes=entry.bytes, again=True
            )
            fetched.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class StoreOrigin:
    """A cache below a URL; the manifest's hash says which one, whatever happens there later."""

    advice = "Run its dump-teacher command with --verify: it compares every byte and makes damaged shards again"

    def __init__(self, url: str) -> None:
        self.url = url
        self._store: ObjectStore | None = None

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "_store": None}

    @property
    def store(self) -> ObjectStore:
        """The client, made on first use."""
        if self._store is None:
            store = open_store(self.url)
            assert isinstance(store, ObjectStore)
            self._store = store
        return self._store

    def manifest(self) -> Manifest:
        """As `Origin.manifest`."""
        manifest = read_manifest(self.store)
        sizes, named, damaged = listed_sizes(self.store), manifest.files(), list[str]()
        for entry in (*manifest.shards, *(manifest.audit.files if manifest.audit else ())):
            if sizes.get(entry.name) != entry.bytes:
                found = "missing" if entry.name not in sizes else f"{sizes[entry.name]:,} bytes"
                damaged.append(f"{self.url}/{entry.name}: {found}, the manifest says {entry.bytes:,} bytes")
        if damaged:
            raise CacheError(f"{'; '.join(damaged)}. {self.advice}")
        stray = sorted(sizes.keys() - {entry.name for entry in named})
        if stray:
            raise CacheError(
                f"{self.url}/{stray[0]}: the manifest does not name this object; remove it, readers would mix it in"
            )
        return manifest

    def fetch(self, entry: NamedFile, target: Path) -> None:
        """As `Origin.fetch`."""
        try:
            self.store.fetch(entry.name, target)
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}/{entry.name}: missing. {self.advice}") from error


def find_origin(name: str, revision: str | None) -> Origin:
    """The origin that a user named.

    Raises: CacheError: no form of address. ConfigError: two revisions, or one where there are none. Unavailable.
    """
    if is_address(name):
        address, hub = parse_address(name, revision), Hub()
        return HubOrigin(HubAddress(address.repository, hub.commit_of(address)), hub)
    if is_url(name):
        if revision is not None:
            raise ConfigError(f"{name}: an object store has no revision {revision!r:.80}; leave revision out")
        return StoreOrigin(name)
    raise CacheError(
        f"{name}: no such folder (and not an id of the Hub, which has the form owner/name, owner/name@revision or "
        "hf://datasets/owner/name@revision, nor a URL of an object store such as s3://bucket/cache)"
    )
