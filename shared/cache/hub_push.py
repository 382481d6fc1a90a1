"""Filling a repository of the Hub: what it takes to publish anything, be it a cache or a student.

A file that is there already, by size and hash, is not uploaded again, so the same command continues after a kill.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CacheMismatch, ConfigError, Unavailable
from .files import sha256_bytes, sha256_file
from .hub import Hub

FILES_PER_COMMIT = 32
BYTES_PER_COMMIT = 8 << 30
"""Large files go up in commits of at most this size, so that a kill costs little and the Hub's limit is far."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_tag(tag: str) -> str:
    """Raises: ConfigError: not a name for a tag."""
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"tag {tag!r:.120}: expected letters, digits, '.', '_' and '-'")
    return tag


@dataclass(frozen=True)
class Upload:
    """A file as it should be on the Hub: a path on disk, or bytes made for the occasion."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, content: Path | bytes) -> "Upload":
        """With size and hash taken now."""
        if isinstance(content, bytes):
            return cls(name, content, len(content), sha256_bytes(content))
        return cls(name, content, content.stat().st_size, sha256_file(content))

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


def in_batches(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    """Cut into commits of limited size."""
    batch: list[Upload] = []
    for upload in uploads:
        if batch and (len(batch) == FILES_PER_COMMIT or sum(u.size for u in batch) + upload.size > BYTES_PER_COMMIT):
            yield batch
            batch = []
        batch.append(upload)
    if batch:
        yield batch


class Repository:
    """A repository that is being filled; `head` is the newest commit known of, and the numbers are for the report.

    Args: hub: its kind is the repository's.
    """

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub, self.name = hub, name
        self.head = ""
        self.num_uploaded = self.bytes_uploaded = self.num_skipped = 0

    def open(self, private: bool) -> None:
        """Make the repository unless it is there, and see whose it is.

        Raises: Unavailable: nobody is logged in, or no permission. ConfigError: it is public, and should be private.
        """
        from huggingface_hub import get_token

        name, api, kind = self.name, self.hub.api, self.hub.kind
        if not get_token():
            raise Unavailable(
                f"{name}: nobody is logged in to the Hub here; run `hf auth login`, or set HF_TOKEN to a token with "
                "write permission"
            )
        self.hub.ask(f"opening {name}", lambda: api.create_repo(
            name, repo_type=kind, private=private or None, exist_ok=True))  # fmt: skip
        info = self.hub.ask(f"opening {name}", lambda: api.repo_info(name, repo_type=kind))
        if private and not info.private:
            raise ConfigError(f"{name} exists and is public, and --private was given; make it private on the Hub first")
        self.head = info.sha or ""

    def paths(self) -> list[str]:
        """Every file at `head`."""
        tree = self.hub.ask(f"looking at the files of {self.name}", lambda: list(self.hub.api.list_repo_tree(
            self.name, recursive=True, repo_type=self.hub.kind, revision=self.head)))  # fmt: skip
        return [entry.path for entry in tree if hasattr(entry, "size")]

    def missing(self, uploads: Sequence[Upload]) -> list[Upload]:
        """Those that are not at `head` as they are here."""
        remote = self.hub.files(self.name, self.head, [upload.name for upload in uploads])
        missing = [upload for upload in uploads if not upload.is_same(remote.get(upload.name))]
        self.num_skipped += len(uploads) - len(missing)
        return missing

    def commit(self, uploads: Sequence[Upload], message: str, *, parent: str | None = None) -> None:
        """Upload and commit.

        Args: parent: the state that this was made for; another writer since then makes the commit fail. None: any.
        """
        from huggingface_hub import CommitOperationAdd

        def send() -> str:
            operations = [CommitOperationAdd(path_in_repo=u.name, path_or_fileobj=u.content) for u in uploads]
            return self.hub.api.create_commit(
                self.name, operations, commit_message=message, repo_type=self.hub.kind, parent_commit=parent
            ).oid

        self.head = self.hub.ask(f"uploading to {self.name}", send)
        self.num_uploaded += len(uploads)
        self.bytes_uploaded += sum(upload.size for upload in uploads)

    def set_tag(self, tag: str, commit: str, is_same: Callable[[str], bool]) -> None:
        """Name the commit; a tag may stay where it is if `is_same` says that its commit holds the same.

        Raises: CacheMismatch: the tag names something else.
        """
        refs = self.hub.ask("looking at tags", lambda: self.hub.api.list_repo_refs(
            self.name, repo_type=self.hub.kind))  # fmt: skip
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if target is None:
            self.hub.ask(f"tagging {tag}", lambda: self.hub.api.create_tag(
                self.name, tag=tag, revision=commit, repo_type=self.hub.kind, exist_ok=True))  # fmt: skip
        elif target != commit and not is_same(target):
            raise CacheMismatch(
                f"{self.name}: tag {tag} names another state ({target:.12}…); what was pushed is complete at "
                f"{commit:.12}…. Give another --tag"
            )
