"""A cache below a URL of an object store, through fsspec: s3://, gs://, hf://buckets/..., memory:// in tests.

Objects are put whole, so there is nothing to rename: what has a name is complete. A shard is written and read back in a
local scratch folder, uploaded, and compared with what the store says it got; only then does its receipt follow. A store
that is busy or out of reach is asked again, with growing waits, until its patience ends. docs/operations.md counts
the requests.
"""

import base64
import contextlib
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CacheError, ConfigError, OutputError, TideError, TryAgain
from .files import output_errors, sha256_file
from .scratch import make_scratch
from .store import Entry, Store
from .store_errors import (
    ask_again,
    final_error,
    install_advice,
    is_missing_bucket,
    is_transient,
    lacks_conditions,
    told,
)

T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0
"""Before another try; each wait is twice as long, and shortened at random, so that workers do not come all at once."""
PART_BYTES = 32 << 20
"""An upload of twice as much goes up in parts of this size, a few at a time."""
PARTS_AT_ONCE = 4
CONNECTIONS = 32
"""At a time, of one process: as many as receipts are read at once."""
SETTLE_S = 1.0
"""Where a store cannot create exclusively: after this, whoever wrote last has the claim."""
_CONDITIONAL = ("s3", "s3a", "gs", "gcs", "memory")
_NAME_FIELDS = ("ETag", "etag", "generation", "md5Hash", "xet_hash")
_TIME_FIELDS = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")


class ObjectStore(Store):
    """The objects below a URL.

    Args:
        patience_s: how long to ask again before giving up; a store that was given up is asked once, until it answers.
        scratch: folder for files on their way; None: the system's temporary folder.
        sleep: called with seconds, to wait.
    """

    is_folder = False

    def __init__(
        self, url: str, *, patience_s: float, scratch: str | None = None, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.url, self.patience_s, self.scratch, self.sleep = url.rstrip("/"), patience_s, scratch, sleep
        self.protocol = url.partition("://")[0]
        self.fs, self.base = _connect(self.url, self.protocol)
        self.creates_exclusively = self.protocol in _CONDITIONAL
        self._gave_up = False

    def __str__(self) -> str:
        return self.url

    @cached_property
    def folder(self) -> Path:  # type: ignore[override]
        """The scratch folder, made on first use."""
        return make_scratch(self.scratch)

    def exists(self, name: str) -> bool:
        """As `Store.exists`: one request."""
        # A byte of it: asking for the properties of what is not there costs some clients a listing as well.
        look = partial(self.fs.cat_file, self._key(name), start=0, end=1)
        return self._found(f"looking for {self.path(name)}", look) is not None

    def names(self, folder: str = "") -> set[str]:
        """As `Store.names`: one request for every 1,000 objects."""
        if folder:
            return set(self.entries(folder))
        found = self._found(f"listing {self}", lambda: self.fs.ls(self.base, detail=False)) or []
        return {_last(key) for key in found} - {_last(self.base), ""}

    def entries(self, folder: str) -> dict[str, Entry]:
        """As `Store.entries`: one request for every 1,000 objects."""

        def listing() -> Mapping[str, Any]:
            self.fs.invalidate_cache()
            return self.fs.find(self._key(folder), detail=True)

        found = self._found(f"listing {self.path(folder)}", listing) or {}
        return {_last(key): _entry(info) for key, info in found.items()}

    def entry(self, name: str) -> Entry | None:
        """As `Store.entry`."""
        info = self._info(name)
        return None if info is None else _entry(info)

    def num_bytes(self, name: str) -> int | None:
        """As `Store.num_bytes`: no object leads elsewhere."""
        info = self._info(name)
        return None if info is None else info["size"]

    def read(self, name: str, *, max_bytes: int, inside: bool = False) -> bytes:
        """As `Store.read`: there are no links."""
        return self._ask(
            f"reading {self.path(name)}", lambda: self.fs.cat_file(self._key(name), start=0, end=max_bytes + 1)
        )

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """As `Store.write`: what a store took is durable."""
        self._put(name, data)

    def write_once(self, name: str, data: bytes) -> None:
        """As `Store.write_once`."""
        if not self.exists(name):
            self.create(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """As `Store.create`; where the store cannot, whoever wrote last within a moment has it."""
        if self.creates_exclusively:
            try:
                self._put(name, data, mode="create")
            except FileExistsError:
                return self._holds(name, data)  # ours, if only the answer to our first try was lost
            except _NoConditions:
                self.creates_exclusively = False
            else:
                return True
        if self.exists(name):
            return False
        self._put(name, data)
        self.sleep(SETTLE_S)
        return self._holds(name, data)

    def renew(self, name: str, data: bytes) -> None:
        """Write the object again."""
        self._put(name, data)

    def remove(self, *names: str) -> None:
        """As `Store.remove`."""
        for name in names:
            self._found(f"removing {self.path(name)}", partial(self.fs.rm_file, self._key(name)))

    def remove_folder(self, folder: str) -> None:
        """As `Store.remove_folder`, as far as the store lets it."""
        with contextlib.suppress(TideError, FileNotFoundError):
            keys = [self._key(f"{folder}/{name}") for name in self.entries(folder)]
            if keys:
                self._ask(f"removing {self.path(folder)}", lambda: self.fs.rm(keys))

    def sha256(self, name: str) -> str:
        """As `Store.sha256`: fetched whole into the scratch folder, and hashed there."""
        copy = self.folder / f"read-back-{uuid.uuid4().hex}"
        try:
            self.fetch(name, copy)
            return sha256_file(copy)
        except FileNotFoundError as error:
            raise CacheError(f"{self.path(name)}: missing; run the same dump-teacher command again") from error
        finally:
            copy.unlink(missing_ok=True)

    def fetch(self, name: str, target: Path) -> None:
        """Bring an object here, whole, with one request. Raises: FileNotFoundError."""
        options = {"max_concurrency": 1} if self.protocol in ("s3", "s3a") else {}
        with output_errors(target, "Free space, or give another folder, and run the same command again."):
            target.parent.mkdir(parents=True, exist_ok=True)
        self._ask(f"fetching {self.path(name)}", lambda: self.fs.get_file(self._key(name), str(target), **options))

    def publish(self, names: Sequence[str]) -> None:
        """Upload the files, compare each with what the store says it has, and remove the local ones."""
        for name in names:
            self._upload(name)
        for name in names:
            (self.folder / name).unlink()

    def require_own(self, *folders: str) -> None:
        """As `Store.require_own`: an object store has no links."""

    def require_usable(self, expected: Sequence[str]) -> None:
        """As `Store.require_usable`; writes and deletes a small object."""
        others = sorted(self.names() - set(expected))
        if others:
            raise ConfigError(
                f"--out {self}: holds other objects ({others[0]!r:.80}) and no plan.json; give a new or empty prefix"
            )
        probe = f".tide-probe-{uuid.uuid4().hex[:12]}"  # an hour of planning should not end at a missing permission
        self._put(probe, b"tide looks whether it may write and delete here\n")
        self.remove(probe)

    def _key(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _info(self, name: str) -> Mapping[str, Any] | None:
        def info() -> Mapping[str, Any]:
            self.fs.invalidate_cache()
            return self.fs.info(self._key(name))

        return self._found(f"looking at {self.path(name)}", info)

    def _put(self, name: str, data: bytes, **options: Any) -> None:
        self._ask(f"writing {self.path(name)}", lambda: self.fs.pipe_file(self._key(name), data, **options))

    def _holds(self, name: str, data: bytes) -> bool:
        begin = partial(self.fs.cat_file, self._key(name), start=0, end=len(data) + 1)
        return self._found(f"reading {self.path(name)}", begin) == data

    def _upload(self, name: str) -> None:
        """Put one file and see that the store has it; a second time if it does not."""
        path, options = self.folder / name, {}
        if self.protocol in ("s3", "s3a"):
            options = {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        for _ in range(2):
            self._ask(f"uploading {self.path(name)}", lambda: self.fs.put_file(str(path), self._key(name), **options))
            if self._arrived(name, path):
                return
        self.remove(name)
        raise OutputError(
            f"{self.path(name)}: the store twice has other bytes than were sent; a proxy or the store changes them. "
            "Finished shards stay valid; run the same command again to continue"
        )

    def _arrived(self, name: str, path: Path) -> bool:
        """Size and, where the store tells one that can be compared, checksum; otherwise it is read back."""
        info = self._info(name)
        if info is None or info["size"] != path.stat().st_size:
            return False
        told_md5 = {str(info.get(field, "")).strip('"') for field in ("ETag", "etag", "md5Hash")}
        return not told_md5.isdisjoint(_md5_names(path)) or self.sha256(name) == sha256_file(path)

    def _found(self, what: str, request: Callable[[], T]) -> T | None:
        """As `_ask`; None: there is no such object."""
        try:
            return self._ask(what, request)
        except FileNotFoundError:
            return None

    def _ask(self, what: str, request: Callable[[], T]) -> T:
        """The answer of `request`, which may be called several times.

        Raises: FileNotFoundError, FileExistsError. Unavailable: no bucket, no permission, no credentials, refused.
            TryAgain: busy or out of reach, for longer than the patience.
        """
        wait, began = FIRST_WAIT_S, time.monotonic()

        def judge(error: Exception) -> Exception | float:
            nonlocal wait
            if isinstance(error, FileNotFoundError | FileExistsError) and not is_missing_bucket(error):
                return error
            if lacks_conditions(error):
                return _NoConditions(told(error))
            if not is_transient(error):
                return final_error(error, what, self.protocol)
            spent = time.monotonic() - began
            self._gave_up = self._gave_up or spent + wait > self.patience_s
            if self._gave_up:
                return TryAgain(
                    f"{what}: the store is busy or out of reach, after {spent:.0f} s: {told(error)}. Finished shards "
                    "stay: run the same command again"
                )
            pause, wait = wait * random.uniform(0.5, 1.0), min(LONGEST_WAIT_S, 2 * wait)
            return pause

        answer = ask_again(request, judge, self.sleep)
        self._gave_up = False
        return answer


class _NoConditions(Exception):
    """The store does not know how to create exclusively."""


def _connect(url: str, protocol: str) -> tuple[Any, str]:
    """The client and the path that it knows the URL by.

    Raises: ConfigError: no such protocol, a password in the address. Unavailable: the client is not installed.
    """
    import fsspec
    import fsspec.config

    if "://" not in url:  # nothing was left behind the slashes
        raise ConfigError(f"{url}//: names no bucket; give one and a prefix in it, such as {protocol}://bucket/cache")
    authority = url.partition("://")[2].partition("/")[0]
    if "@" in authority or "?" in url:
        raise ConfigError(
            f"{protocol}://…: user names, passwords and options do not belong into an address, which is shown and "
            "logged; give them to the store's client by its environment variables"
        )
    if protocol not in fsspec.available_protocols():
        raise ConfigError(f"{url}: no such kind of address; expected a folder, s3://, gs:// or hf://buckets/")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        given = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        ours = {
            "connect_timeout": 10, "read_timeout": 60, "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }  # fmt: skip
        options["config_kwargs"] = {**ours, **given}
    try:
        fs, base = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise install_advice(protocol, error) from error
    except Exception as error:
        raise final_error(error, f"opening {url}", protocol) from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # `_ask` decides how often and how long
    return fs, base.rstrip("/")


def _entry(info: Mapping[str, Any]) -> Entry:
    # What the bytes are called, if anything: times are told more or less exactly by listings and looks.
    names = tuple(str(info[field]) for field in _NAME_FIELDS if info.get(field))
    version = names or tuple(_seconds(info[field]) for field in _TIME_FIELDS if info.get(field))
    modified = next((_seconds(info[field]) for field in _TIME_FIELDS if info.get(field)), time.time())
    return Entry(info["size"], (info["size"], *version), (), modified)


def _seconds(moment: Any) -> float:
    """Seconds since the epoch of what a client calls a time."""
    if isinstance(moment, int | float):
        return float(moment)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _last(key: str) -> str:
    return key.rstrip("/").rsplit("/", 1)[-1]


def _md5_names(path: Path) -> set[str]:
    """How stores may call these bytes: MD5 in hexadecimal or base64, or the MD5 of the parts' MD5s and their number."""
    whole = hashlib.md5(usedforsecurity=False)
    parts = []
    with open(path, "rb") as file:
        while part := file.read(PART_BYTES):
            whole.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False).digest())
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return {whole.hexdigest(), base64.b64encode(whole.digest()).decode(), f"{of_parts}-{len(parts)}"}
