"""A verified cache -> a data set on the Hub: shards first, manifest.json last and alone, then a tag.

What is there already, by size and hash, is not uploaded again, so the same command continues after a kill. Until the
manifest is there, nobody can take what was uploaded for a complete cache. Nothing is written into the cache folder.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CacheError, CacheMismatch, ConfigError, TryAgain, Unavailable
from .card import Licences, card_text, required_licences
from .files import file_inside, sha256_bytes, sha256_file
from .hub import Hub, parse_address
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, PLAN_NAME, Manifest, NamedFile, read_manifest
from .preview import PREVIEW_NAME, preview_bytes
from .pull import fetched_manifest
from .reader import Cache
from .verify import audit_is_here, verify_cache
from .vocabulary import VOCABULARY_NAME

FILES_PER_COMMIT = 32
BYTES_PER_COMMIT = 8 << 30
"""Shards go up in commits of at most this size, so that a kill costs little and the Hub's limit on commits is far."""
_BESIDE_SHARDS = {"README.md", VOCABULARY_NAME, PLAN_NAME, PREVIEW_NAME, ".gitattributes", ".gitignore", "LICENSE"}
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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


@dataclass(frozen=True)
class Upload:
    """A file as it should be on the Hub: a path on disk, or bytes made for the occasion."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    def is_same(self, remote: Any) -> bool:
        """Does the Hub's entry (huggingface_hub.RepoFile or None) have this content?"""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.sha256
        return remote.blob_id == self.git_oid()

    def git_oid(self) -> str:
        """How git names the content of a file that is not in large-file storage."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


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
    tag = tag or f"v-{manifest.hash[:12]}"
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"tag {tag!r:.120}: expected letters, digits, '.', '_' and '-'")
    say(f"verifying {root}")
    verify_cache(root, mode="full")
    if not audit_is_here(root, manifest):
        raise CacheError(
            f"{root}: its audit was left out when it was pulled, and the manifest names it; pull the cache again with "
            "--audit, then push it"
        )
    push = _Push(root, manifest, address.repository, Hub(say, sleep))
    push.open_repository(private)
    if push.is_complete():
        commit = push.head
        say(f"{repository} holds this cache already")
    else:
        push.upload_shards()
        push.upload_rest(licences)
        commit = push.upload_manifest()
    push.set_tag(tag, commit)
    return PushReport(
        address.repository, commit, tag, manifest.hash, push.num_uploaded, push.bytes_uploaded, push.num_skipped
    )


class _Push:
    """One run of `push_cache`; `head` is the newest commit it knows of."""

    def __init__(self, root: Path, manifest: Manifest, repository: str, hub: Hub) -> None:
        self.root, self.manifest, self.repository, self.hub = root, manifest, repository, hub
        self.head = ""
        self.num_uploaded = self.bytes_uploaded = self.num_skipped = 0

    def open_repository(self, private: bool) -> None:
        """Make the repository unless it is there, and see whose it is."""
        from huggingface_hub import get_token

        name, api = self.repository, self.hub.api
        if not get_token():
            raise Unavailable(
                f"{name}: nobody is logged in to the Hub here; run `hf auth login`, or set HF_TOKEN to a token with "
                "write permission"
            )
        self.hub.ask(f"opening {name}", lambda: api.create_repo(
            name, repo_type="dataset", private=private or None, exist_ok=True))  # fmt: skip
        info = self.hub.ask(f"opening {name}", lambda: api.dataset_info(name))
        if private and not info.private:
            raise ConfigError(f"{name} exists and is public, and --private was given; make it private on the Hub first")
        self.head = info.sha or ""

    def is_complete(self) -> bool:
        """Does the repository hold this very cache? Raises: CacheMismatch: it holds (parts of) another one."""
        theirs = self._manifest_at(self.head)
        if theirs is not None:
            if theirs.hash == self.manifest.hash:
                return True
            raise CacheMismatch(
                f"{self.repository} holds another cache: its manifest is {theirs.hash:.12}…, this one's "
                f"{self.manifest.hash:.12}…. Push to a new repository: mixed shards would be taken for one cache"
            )
        named = {entry.name for entry in self.manifest.files()} | _BESIDE_SHARDS
        tree = self.hub.ask(f"looking at the files of {self.repository}", lambda: list(self.hub.api.list_repo_tree(
            self.repository, recursive=True, repo_type="dataset", revision=self.head)))  # fmt: skip
        files = [entry.path for entry in tree if hasattr(entry, "size")]
        stray = next((path for path in files if path not in named), None)
        if stray is not None:
            raise CacheMismatch(
                f"{self.repository} holds {stray!r:.150}, which is not of this cache: its readers would mix the two. "
                "Push to a new repository, or remove it there"
            )
        return False

    def _manifest_at(self, commit: str) -> Manifest | None:
        """The repository's manifest at a commit; None if it has none."""
        remote = self.hub.files(self.repository, commit, [MANIFEST_NAME]).get(MANIFEST_NAME)
        if remote is None:
            return None
        if remote.size > MAX_MANIFEST_BYTES:
            raise CacheMismatch(f"{self.repository}: its {MANIFEST_NAME} is not one of tide; push to a new repository")
        return fetched_manifest(self.hub, self.repository, commit)

    def upload_shards(self) -> None:
        """All shards, then all audit files, that are not there yet, in commits of limited size."""
        self._upload_large("shards", self.manifest.shards)
        if self.manifest.audit is not None:
            self._upload_large("audit files", self.manifest.audit.files)

    def _upload_large(self, what: str, entries: Sequence[NamedFile]) -> None:
        files = [Upload(e.name, file_inside(self.root, e.name), e.bytes, e.sha256) for e in entries]
        missing = self._missing(files)
        self.hub.say(f"{len(files) - len(missing)} of {len(files)} {what} are there")
        done = len(files) - len(missing)
        for batch in _batches(missing):
            self._commit(batch, f"{what.capitalize()} {done + 1} to {done + len(batch)} of {len(files)}")
            done += len(batch)
            self.hub.say(f"{done} of {len(files)} {what} are there, {self.bytes_uploaded / 1e6:,.1f} MB sent")

    def upload_rest(self, licences: Licences) -> None:
        """Card, preview, vocabulary and plan; receipts stay behind, no reader needs them."""
        card = card_text(self.manifest, licences, repository=self.repository).encode()
        preview = preview_bytes(Cache(self.root, self.manifest))
        files: dict[str, Path | bytes] = {"README.md": card, PREVIEW_NAME: preview}
        names = [self.manifest.vocabulary.name] if self.manifest.vocabulary else []
        names += [PLAN_NAME] if (self.root / PLAN_NAME).exists() else []
        files |= {name: file_inside(self.root, name) for name in names}
        missing = self._missing([_upload(name, content) for name, content in files.items()])
        if missing:
            self._commit(missing, "Card, preview, vocabulary and plan")

    def upload_manifest(self) -> str:
        """The commit of the cache: only after the Hub confirmed size and SHA-256 of every file that is named."""
        entries = self.manifest.files()
        self.head = self.hub.commit_of(parse_address(self.repository))
        remote = self.hub.files(self.repository, self.head, [entry.name for entry in entries])
        for entry in entries:
            upload = Upload(entry.name, file_inside(self.root, entry.name), entry.bytes, entry.sha256)
            if not upload.is_same(remote.get(entry.name)):
                raise TryAgain(
                    f"{self.repository}: {entry.name} is not on the Hub as it is here; somebody changed one of them "
                    "meanwhile. Run the same command again"
                )
        self._commit([_upload(MANIFEST_NAME, file_inside(self.root, MANIFEST_NAME))], "Manifest: the cache is complete")
        return self.head

    def set_tag(self, tag: str, commit: str) -> None:
        """Name the commit; a tag that names this cache already may stay."""
        refs = self.hub.ask("looking at tags", lambda: self.hub.api.list_repo_refs(
            self.repository, repo_type="dataset"))  # fmt: skip
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if target is None:
            self.hub.ask(f"tagging {tag}", lambda: self.hub.api.create_tag(
                self.repository, tag=tag, revision=commit, repo_type="dataset", exist_ok=True))  # fmt: skip
            return
        theirs = None if target == commit else self._manifest_at(target)
        if target != commit and (theirs is None or theirs.hash != self.manifest.hash):
            raise CacheMismatch(
                f"{self.repository}: tag {tag} names another state ({target:.12}…); the cache itself is complete at "
                f"{commit:.12}…. Give another --tag"
            )

    def _missing(self, uploads: list[Upload]) -> list[Upload]:
        remote = self.hub.files(self.repository, self.head, [upload.name for upload in uploads])
        missing = [upload for upload in uploads if not upload.is_same(remote.get(upload.name))]
        self.num_skipped += len(uploads) - len(missing)
        return missing

    def _commit(self, uploads: list[Upload], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        # Only the manifest's commit depends on what is there: another writer since the check makes it fail.
        parent = self.head if uploads[0].name == MANIFEST_NAME else None

        def send() -> str:
            operations = [CommitOperationAdd(path_in_repo=u.name, path_or_fileobj=u.content) for u in uploads]
            return self.hub.api.create_commit(
                self.repository, operations, commit_message=message, repo_type="dataset", parent_commit=parent
            ).oid

        self.head = self.hub.ask(f"uploading to {self.repository}", send)
        self.num_uploaded += len(uploads)
        self.bytes_uploaded += sum(upload.size for upload in uploads)


def _upload(name: str, content: Path | bytes) -> Upload:
    if isinstance(content, bytes):
        return Upload(name, content, len(content), sha256_bytes(content))
    return Upload(name, content, content.stat().st_size, sha256_file(content))


def _batches(uploads: list[Upload]) -> Iterator[list[Upload]]:
    batch: list[Upload] = []
    for upload in uploads:
        if batch and (len(batch) == FILES_PER_COMMIT or sum(u.size for u in batch) + upload.size > BYTES_PER_COMMIT):
            yield batch
            batch = []
        batch.append(upload)
    if batch:
        yield batch
