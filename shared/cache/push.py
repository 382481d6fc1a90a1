"""A verified cache -> a data set on the Hub: shards first, manifest.json last and alone, then a tag.

What is there already, by size and hash, is not uploaded again, so the same command continues after a kill. Until the
manifest is there, nobody can take what was uploaded for a complete cache. Nothing is written into the cache folder.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CacheError, CacheMismatch, ConfigError, TryAgain
from .card import Licences, card_text, required_licences
from .decoded_views import PREVIEW_NAME, preview_bytes
from .files import file_inside
from .hub import Hub, HubAddress, parse_address
from .hub_push import Repository, Upload, checked_tag, in_batches
from .manifest import MANIFEST_NAME, PLAN_NAME, FileEntry, Manifest, read_manifest
from .pull import fetched_manifest
from .reader import Cache
from .verify import audit_is_here, verify_cache
from .vocabulary import VOCABULARY_NAME

_BESIDE_SHARDS = {"README.md", VOCABULARY_NAME, PLAN_NAME, PREVIEW_NAME, ".gitattributes", ".gitignore", "LICENSE"}


@dataclass(frozen=True)
class PushReport:
    """What was done: the commit that holds the complete cache, its tag, and what had to be uploaded for it."""

    repository: str
    commit: str
    tag: str
    manifest_hash: str
    uploaded_files: int
    uploaded_bytes: int
    files_already_there: int


def push_cache(
    root: str | Path, repository: str, *, private: bool = False, tag: str | None = None,
    teacher_licence: str | None = None, data_licence: str | None = None,
    say: Callable[[str], None] = lambda line: None, sleep: Callable[[float], None] = time.sleep,
) -> PushReport:  # fmt: skip
    """Verify a cache in full and publish it.

    Args:
        repository: owner/name of a data set; made if it is not there.
        private: make it private; a public one that is there already is refused then.
        tag: default: "v-" and the first 12 digits of the manifest's hash.
        teacher_licence, data_licence: where the manifest says "unknown".
        say: called with a line about every commit and every wait; sleep: waits for so many seconds.
    Raises:
        ConfigError: a licence is unknown, or an argument is wrong. CacheError: the cache is not sound.
        CacheMismatch: the repository holds another cache. Unavailable: no login or no permission.
        OutputError: a quota of the Hub is used up. TryAgain: the Hub stays busy; the same command continues.
    """
    root = Path(root)
    address = parse_address(repository)
    if address.revision:
        raise ConfigError(f"{repository}: a push makes a new commit on main; leave the revision out")
    manifest = read_manifest(root)
    licences = required_licences(manifest, teacher=teacher_licence, data=data_licence)
    tag = checked_tag(tag or f"v-{manifest.hash[:12]}")
    say(f"verifying {root}")
    verify_cache(root, mode="full")
    if not audit_is_here(root, manifest):
        raise CacheError(
            f"{root}: its audit was left out when it was pulled, and the manifest names it; pull the cache again with "
            "--audit, then push it"
        )
    push = _Push(root, manifest, address.repository, Hub(say, sleep))
    push.open(private)
    if push.is_complete():
        commit = push.head
        say(f"{repository} holds this cache already")
    else:
        push.upload("shards", manifest.shards)
        if manifest.audit is not None:
            push.upload("audit files", manifest.audit.files)
        push.upload_rest(licences)
        commit = push.upload_manifest()
    push.set_tag(tag, commit, lambda target: getattr(push.manifest_at(target), "hash", None) == manifest.hash)
    return PushReport(
        address.repository, commit, tag, manifest.hash, push.num_uploaded, push.bytes_uploaded, push.num_skipped
    )


class _Push(Repository):
    """One run of `push_cache`."""

    def __init__(self, root: Path, manifest: Manifest, name: str, hub: Hub) -> None:
        super().__init__(hub, name)
        self.root, self.manifest = root, manifest

    def is_complete(self) -> bool:
        """Does the repository hold this very cache? Raises: CacheMismatch: it holds (parts of) another one."""
        theirs = self.manifest_at(self.head)
        if theirs is not None:
            if theirs.hash == self.manifest.hash:
                return True
            raise CacheMismatch(
                f"{self.name} holds another cache: its manifest is {theirs.hash:.12}…, this one's "
                f"{self.manifest.hash:.12}…. Push to a new repository: mixed shards would be taken for one cache"
            )
        named = {entry.name for entry in self.manifest.files()} | _BESIDE_SHARDS
        stray = next((path for path in self.paths() if path not in named), None)
        if stray is not None:
            raise CacheMismatch(
                f"{self.name} holds {stray!r:.150}, which is not of this cache: its readers would mix the two. "
                "Push to a new repository, or remove it there"
            )
        return False

    def manifest_at(self, commit: str) -> Manifest | None:
        """The repository's manifest at a commit; None if it has none."""
        if MANIFEST_NAME not in self.hub.files(self.name, commit, [MANIFEST_NAME]):
            return None
        return fetched_manifest(self.hub, HubAddress(self.name), commit)

    def upload(self, what: str, entries: Sequence[FileEntry]) -> None:
        """All of these files that are not there yet, in commits of limited size."""
        files = [Upload(e.name, file_inside(self.root, e.name), e.bytes, e.sha256) for e in entries]
        missing = self.missing(files)
        self.hub.say(f"{len(files) - len(missing)} of {len(files)} {what} are there")
        done = len(files) - len(missing)
        for batch in in_batches(missing):
            self.commit(batch, f"{what.capitalize()} {done + 1} to {done + len(batch)} of {len(files)}")
            done += len(batch)
            self.hub.say(f"{done} of {len(files)} {what} are there, {self.bytes_uploaded / 1e6:,.1f} MB sent")

    def upload_rest(self, licences: Licences) -> None:
        """Card, preview, vocabulary and plan; receipts stay behind, no reader needs them."""
        card = card_text(self.manifest, licences, repository=self.name).encode()
        preview = preview_bytes(Cache(self.root, self.manifest))
        files: dict[str, Path | bytes] = {"README.md": card, PREVIEW_NAME: preview}
        names = [self.manifest.vocabulary.name] if self.manifest.vocabulary else []
        names += [PLAN_NAME] if (self.root / PLAN_NAME).exists() else []
        files |= {name: file_inside(self.root, name) for name in names}
        missing = self.missing([Upload.of(name, content) for name, content in files.items()])
        if missing:
            self.commit(missing, "Card, preview, vocabulary and plan")

    def upload_manifest(self) -> str:
        """The commit of the cache: only after the Hub confirmed size and SHA-256 of every file that is named."""
        entries = self.manifest.files()
        self.head = self.hub.commit_of(parse_address(self.name))
        remote = self.hub.files(self.name, self.head, [entry.name for entry in entries])
        for entry in entries:
            upload = Upload(entry.name, file_inside(self.root, entry.name), entry.bytes, entry.sha256)
            if not upload.is_same(remote.get(entry.name)):
                raise TryAgain(
                    f"{self.name}: {entry.name} is not on the Hub as it is here; somebody changed one of them "
                    "meanwhile. Run the same command again"
                )
        manifest = Upload.of(MANIFEST_NAME, file_inside(self.root, MANIFEST_NAME))
        # Only this commit depends on what is there: another writer since the check makes it fail.
        self.commit([manifest], "Manifest: the cache is complete", parent=self.head)
        return self.head
