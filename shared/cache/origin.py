"""Where a remote cache is fetched from: a data set of the Hub at one commit, or a URL of an object store.

Both give the manifest first, compare what the place says about the files with it, and then fetch whole files.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from ..addresses import is_url
from ..config import STORE_PATIENCE_S
from ..errors import CacheError, ConfigError
from .hub import Hub, HubAddress, is_address, parse_address
from .manifest import FileEntry, Manifest, read_manifest
from .object_store import ObjectStore
from .pull import fetch, fetched_manifest, require_files
from .receipts import listed_sizes


class HubOrigin:
    """A data set of the Hub that holds one complete cache; `address.revision` is a commit. `str()` names it."""

    advice = "Its owner should push it again"
    """What to do about a file that is damaged there."""

    def __init__(self, address: HubAddress) -> None:
        self.address = address

    def __str__(self) -> str:
        return str(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        return HubOrigin, (self.address,)

    @cached_property
    def hub(self) -> Hub:
        """The client, made on first use."""
        return Hub()

    def manifest(self) -> Manifest:
        """The cache's manifest, after a look at what the Hub says of every file it names. Raises: CacheError."""
        commit = str(self.address.revision)
        manifest = fetched_manifest(self.hub, self.address, commit)
        require_files(self.hub, self.address, commit, manifest.files(audit=False))
        return manifest

    def fetch(self, entry: FileEntry, target: Path) -> None:
        """Write a file of the cache to `target`. Raises: CacheError: it is missing. Unavailable, TryAgain."""
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

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreOrigin, (self.url,)

    @cached_property
    def store(self) -> ObjectStore:
        """The client, made on first use."""
        return ObjectStore(self.url, patience_s=STORE_PATIENCE_S)

    def manifest(self) -> Manifest:
        """As `HubOrigin.manifest`."""
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

    def fetch(self, entry: FileEntry, target: Path) -> None:
        """As `HubOrigin.fetch`."""
        try:
            self.store.fetch(entry.name, target)
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}/{entry.name}: missing. {self.advice}") from error


Origin = HubOrigin | StoreOrigin


def find_origin(name: str, revision: str | None) -> Origin:
    """The origin that a user named.

    Raises: CacheError: no form of address. ConfigError: two revisions, or one where there are none. Unavailable.
    """
    if is_address(name):
        address = parse_address(name, revision)
        return HubOrigin(HubAddress(address.repository, Hub().commit_of(address)))
    if is_url(name):
        if revision is not None:
            raise ConfigError(f"{name}: an object store has no revision {revision!r:.80}; leave revision out")
        return StoreOrigin(name)
    raise CacheError(
        f"{name}: no such folder (and not an id of the Hub, which has the form owner/name, owner/name@revision or "
        "hf://datasets/owner/name@revision, nor a URL of an object store such as s3://bucket/cache)"
    )
