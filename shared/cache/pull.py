"""A cache on the Hub -> a folder here: the files its manifest names, at one commit, verified before they appear.

Files arrive in `OUT/.pull/`, which is checked in full like any cache of a stranger; then they are moved to OUT, the
manifest last. A kill leaves OUT without a manifest, and the same command continues.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..addresses import require_apart
from ..errors import CacheError, CacheMismatch, OutputError
from . import own_entries
from .files import atomic_write, fsync_folder, output_errors, readable_json
from .hub import Hub, HubAddress, parse_address
from .manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    STAGING_NAME,
    FileEntry,
    Manifest,
    is_whole,
    read_manifest,
    sealed_json,
)
from .receipts import AUDIT_FOLDER
from .verify import AuditState, verify_cache

T = TypeVar("T")

NUM_DOWNLOADS = 4
"""Files fetched at the same time."""
FOLDERS = ("data", AUDIT_FOLDER)
RECORD_NAME = "hub.json"
"""Where a pulled cache came from: `repository`, `commit` and `manifest_hash`. Nothing in tide depends on it."""


@dataclass(frozen=True)
class PullReport:
    """What was done; `commit` is what the revision named when the pull began."""

    repository: str
    commit: str
    cache: str
    manifest_hash: str
    downloaded_files: int
    downloaded_bytes: int
    files_already_there: int
    audit: AuditState


def require_files(hub: Hub, address: HubAddress, commit: str, entries: list[FileEntry]) -> None:
    """Compare what the Hub says about the files with the manifest, before anything large is fetched.

    Raises: CacheError: a file is missing or has another size or SHA-256.
    """
    remote = hub.files(address.repository, commit, [entry.name for entry in entries])
    for entry in entries:
        file = remote.get(entry.name)
        if file is None:
            raise CacheError(
                f"{address} at {commit:.12}: {entry.name} is missing there; its owner should push it again"
            )
        if file.size != entry.bytes or (file.lfs is not None and file.lfs.sha256 != entry.sha256):
            raise CacheError(
                f"{address} at {commit:.12}: {entry.name} is not the file that the manifest names (size or SHA-256 "
                "differ); refused, its owner should push it again"
            )


def fetched_manifest(hub: Hub, address: HubAddress, commit: str) -> Manifest:
    """The manifest at a commit, fetched into a folder that is gone afterwards.

    Raises: CacheError: there is none at that commit, or one that is too large or damaged.
    """
    entry = hub.files(address.repository, commit, [MANIFEST_NAME]).get(MANIFEST_NAME)
    if entry is None:
        raise CacheError(
            f"{address} at {commit:.12} is incomplete: it holds no {MANIFEST_NAME}, which a push writes last. Ask its "
            "owner to run the same push-cache command again, or give the revision of a complete one (or it is no cache)"
        )
    if entry.size > MAX_MANIFEST_BYTES:
        raise CacheError(f"{address}: {MANIFEST_NAME} has {entry.size:,} bytes, which no cache needs; refused")
    with tempfile.TemporaryDirectory() as folder:
        fetch(hub, address.repository, MANIFEST_NAME, commit, Path(folder), most_bytes=MAX_MANIFEST_BYTES)
        return read_manifest(folder)


def fetch(
    hub: Hub, repository: str, name: str, commit: str | None, folder: Path | None, *, most_bytes: int,
    again: bool = False,
) -> Path:  # fmt: skip
    """Download one file to `folder / name`; the client continues after broken connections.

    Args:
        folder: None: into the client's own cache.
        most_bytes: of the file; where more are sent, the transfer is cut off.
    Raises: CacheError: more bytes are sent. As `Hub.ask`.
    """
    gauge = _gauge(f"{repository}: {name}", most_bytes)

    def download() -> Path:
        return Path(hub.api.hf_hub_download(
            repository, name, repo_type="dataset", revision=commit, local_dir=folder, force_download=again,
            tqdm_class=gauge,
        ))  # fmt: skip

    return hub.ask(f"fetching {name} of {repository}", download)


def _gauge(what: str, most_bytes: int) -> Any:
    """A progress bar of the client, which is told of bytes before they are written: it ends a transfer of too many."""
    from huggingface_hub.utils import tqdm

    class Gauge(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        num_bytes = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.num_bytes += n or 0
            if self.num_bytes > most_bytes:
                raise CacheError(
                    f"{what}: the Hub sends more than the {most_bytes:,} bytes that the manifest names; cut off and "
                    "refused, its owner should push it again"
                )
            return super().update(n)

    return Gauge


def pull_cache(
    address: str, out: str | Path, *, revision: str | None = None, audit: bool = True,
    say: Callable[[str], None] = lambda line: None, sleep: Callable[[float], None] = time.sleep,
) -> PullReport:  # fmt: skip
    """Fetch a cache from the Hub into a new folder and verify it in full; mends a folder that holds it damaged.

    Args:
        address: owner/name, owner/name@revision or hf://datasets/owner/name@revision.
        audit: fetch the audit too, which `inspect-cache --audit` alone reads; verification says if it is absent.
    Raises:
        CacheError: incomplete, damaged or not a cache; nothing appears in `out` then. CacheMismatch: `out` holds
            another cache. ConfigError: `out` lies in a cache. OutputError: `out` cannot be written, or is not empty.
        Unavailable, TryAgain: as `Hub.ask`.
    """
    wanted, out = parse_address(address, revision), Path(out)
    require_apart(out, {}, what="OUT", makes_cache=True)
    hub = Hub(say, sleep)
    commit = hub.commit_of(wanted)
    say(f"{wanted} is {commit}")
    manifest = fetched_manifest(hub, wanted, commit)
    entries = manifest.files(audit=audit)
    counts: dict[str, Any] = {"downloaded_files": 0, "downloaded_bytes": 0, "files_already_there": len(entries)}
    if _holds(out, manifest, entries, hub):
        say(f"{out} holds this cache already; verifying it")
        verified = verify_cache(out, mode="full")
    else:
        require_files(hub, wanted, commit, entries)
        staging = out / STAGING_NAME
        _prepare(out, staging, entries)
        counts = _fetch_all(hub, wanted.repository, commit, entries, staging)
        atomic_write(staging / MANIFEST_NAME, sealed_json(manifest.to_json()))
        say(f"verifying {len(manifest.shards)} shards")
        verified = verify_cache(staging, mode="full")
        _move(staging, out, [*(entry.name for entry in entries), MANIFEST_NAME])
    record = {"repository": wanted.repository, "commit": commit, "manifest_hash": manifest.hash}
    atomic_write(out / RECORD_NAME, readable_json(record))
    return PullReport(wanted.repository, commit, str(out), manifest.hash, **counts, audit=verified.audit)


def _holds(out: Path, manifest: Manifest, entries: list[FileEntry], hub: Hub) -> bool:
    """Is all of this cache in `out` already? Raises: CacheMismatch, OutputError: something else is."""
    if (out / MANIFEST_NAME).exists():
        ours = read_manifest(out)
        if ours.hash != manifest.hash:
            raise CacheMismatch(
                f"{out} holds another cache: its manifest is {ours.hash:.12}…, that on the Hub {manifest.hash:.12}…. "
                "Give a new folder"
            )
        damaged = [entry.name for entry in entries if not is_whole(out / entry.name, entry)]
        if damaged:
            hub.say(f"{out}: {len(damaged)} files are missing or damaged ({damaged[0]}, ...) and are fetched again")
        return not damaged
    named = {entry.name for entry in manifest.files()}
    own = {STAGING_NAME, RECORD_NAME, *FOLDERS, *named}
    held = [path for folder in (out, *(out / name for name in FOLDERS)) for path in folder.glob("*")]
    stray = next((path for path in held if path.relative_to(out).as_posix() not in own), None)
    if stray is not None:
        raise OutputError(f"{out}: is not empty: it holds {str(stray.relative_to(out))!r:.100}; give a new folder")
    return False


def _prepare(out: Path, staging: Path, entries: list[FileEntry]) -> None:
    """Gather in `staging` what is there already, and drop there what this cache does not name."""
    named = {entry.name for entry in entries}
    with output_errors(staging):
        own_entries.require_own_folders(out, *FOLDERS)
        for folder in FOLDERS:
            with own_entries.opened(out, f"{STAGING_NAME}/{folder}", create=True):
                pass
        (out / MANIFEST_NAME).unlink(missing_ok=True)  # from here on `out` is incomplete, and says so
        for name in named:
            if (out / name).is_file() and not (out / name).is_symlink():
                (out / name).replace(staging / name)
        for name in (f"{folder}/{base}" for folder in FOLDERS for base in own_entries.names(staging, folder)):
            if name not in named:
                own_entries.remove(staging, name)


def _fetch_all(hub: Hub, repository: str, commit: str, entries: list[FileEntry], staging: Path) -> dict[str, int]:
    missing = [entry for entry in entries if not is_whole(staging / entry.name, entry)]

    def bring(entry: FileEntry) -> None:
        path = staging / entry.name
        fetch(hub, repository, entry.name, commit, staging, most_bytes=entry.bytes, again=True)
        if not is_whole(path, entry):
            path.unlink(missing_ok=True)
            raise CacheError(
                f"{repository} at {commit:.12}: {entry.name} arrived with another size or SHA-256; refused"
            )

    num_bytes = 0
    for number, entry in enumerate(in_parallel(bring, missing), 1):
        num_bytes += entry.bytes
        hub.say(f"{number} of {len(missing)} files have arrived, {num_bytes / 1e6:,.1f} MB")
    return {
        "downloaded_files": len(missing), "downloaded_bytes": num_bytes,
        "files_already_there": len(entries) - len(missing),
    }  # fmt: skip


def in_parallel(action: Callable[[T], None], items: Sequence[T]) -> Iterator[T]:
    """Do something with every item, a few at a time; gives each item back, in order, when it is done.

    Raises: the first error; what had not begun by then does not begin.
    """
    pool = ThreadPoolExecutor(NUM_DOWNLOADS, thread_name_prefix="tide-fetch")
    try:
        for item, _ in zip(items, pool.map(action, items), strict=True):
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _move(staging: Path, out: Path, names: list[str]) -> None:
    with output_errors(out):
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(out / name)
        for folder in {(out / name).parent for name in names}:
            fsync_folder(folder)
        own_entries.remove_tree(out, STAGING_NAME)
