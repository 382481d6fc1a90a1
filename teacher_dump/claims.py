"""Claims: which worker is busy with what, so that workers pull different shards. A claim is only a hint.

`claims/00007.json` is created exclusively and touched while its owner makes progress. It is stale when its process is
dead (same machine), or when the file has not changed for the lease, measured on the observer's own monotonic clock:
clocks of two hosts are never compared. A stale claim is taken over. Two workers on one shard are harmless, because a
shard is the same bytes whoever writes it.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..shared.cache.files import canonical_json, output_errors
from ..shared.cache.store import Entry, Store, open_store
from ..shared.config import WorkersConfig
from ..shared.errors import OutputError, TideError

CLAIMS_NAME = "claims"
MAX_CLAIM_BYTES = 64 << 10
Clock = Callable[[], float]


class _Sighting(NamedTuple):
    """A claim of somebody else: what its file looked like, since when it has, and who owns it."""

    version: tuple[object, ...]
    identity: tuple[object, ...]
    since: float
    owner: dict[str, Any]


class Held:
    """A claim that this worker holds."""

    def __init__(self, store: Store, name: str, owner: dict[str, Any], stuck_s: float, clock: Clock) -> None:
        self.store, self.name, self.owner, self.stuck_s, self.clock = store, name, owner, stuck_s, clock
        self._last_progress = clock()
        self._renewals = 0
        self._lock, self._released = threading.Lock(), False

    def progress(self) -> None:
        """Say that the work goes on: without this, for `workers.stuck_s`, the claim is left to go stale."""
        self._last_progress = self.clock()

    def renew(self) -> None:
        """Give the file another version, unless the work is stuck or the claim was taken over meanwhile.

        Raises: OSError, TideError: it cannot be done.
        """
        with self._lock:  # a renewal under way must not bring a released claim back
            if not self._released and self.clock() - self._last_progress < self.stuck_s and self._is_mine():
                self._renewals += 1
                self.store.renew(self.name, canonical_json({**self.owner, "renewals": self._renewals}))

    def release(self) -> None:
        """Remove the file if it is still this worker's."""
        with self._lock, contextlib.suppress(OSError, TideError):
            self._released = True
            if self._is_mine():
                self.store.remove(self.name)

    def _is_mine(self) -> bool:
        return _owner(self.store, self.name).get("token") == self.owner["token"]


class Claims:
    """One worker's view of the claims below `root`, with what it has seen of those of others.

    Args: clock: monotonic seconds; tests and the simulation bring their own.
    """

    def __init__(self, root: Path | Store, workers: WorkersConfig, *, clock: Clock = time.monotonic) -> None:
        self.store, self.workers, self.clock = open_store(root), workers, clock
        self._seen: dict[str, _Sighting] = {}

    def names(self) -> set[str]:
        """Names that somebody holds, or held when he died: one listing."""
        return {name[:-5] for name in self.store.names(CLAIMS_NAME) if name.endswith(".json")}

    def held(self) -> set[str]:
        """Names that living workers hold: one listing, and one look at each file (none in an object store)."""
        found = self.store.entries(CLAIMS_NAME)
        entries = {name[:-5]: entry for name, entry in found.items() if name.endswith(".json")}
        self._seen = {name: sighting for name, sighting in self._seen.items() if name in entries}
        return {name for name, entry in entries.items() if not self._is_stale(name, entry)}

    def take(self, name: str) -> Held | None:
        """Hold the claim `name`; None if another living worker has it.

        Raises: OutputError: it cannot be written.
        """
        file, pid = _file(name), os.getpid()
        owner = {
            "host": socket.gethostname(), "machine": this_machine(), "pid": pid, "started": _start_time(pid),
            "token": uuid.uuid4().hex,
        }  # fmt: skip
        data = canonical_json(owner)
        mine = self.store.create(file, data)
        if not mine and self._is_stale(name, self.store.entry(file)):
            with output_errors(Path(self.store.path(file))):
                self.store.remove(file)
            mine = self.store.create(file, data)
        if not mine:
            return None
        self._seen.pop(name, None)
        return Held(self.store, file, owner, self.workers.stuck_s, self.clock)

    def _is_stale(self, name: str, entry: Entry | None) -> bool:
        if entry is None:
            return True
        sighting = self._seen.get(name)
        if sighting is None or sighting.version != entry.version:
            known = sighting is not None and sighting.identity == entry.identity
            abroad = sighting is not None and sighting.owner.get("machine", this_machine()) != this_machine()
            owner = sighting.owner if sighting and known and abroad else _owner(self.store, _file(name))
            sighting = self._seen[name] = _Sighting(entry.version, entry.identity, self.clock(), owner)
        owner = sighting.owner
        if owner.get("machine") == this_machine() and _start_time(owner["pid"]) != owner["started"]:
            return True
        # Without an owner: being written this moment, or left half-written by a killed worker.
        patience_s = self.workers.lease_s if owner else self.workers.heartbeat_s
        return self.clock() - sighting.since > patience_s


def is_alive(pid: int) -> bool:
    """Is there a process of this number on this host? One that was killed and not yet waited for is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _start_time(pid) is not None or not Path("/proc/self/stat").exists()


def _file(name: str) -> str:
    return f"{CLAIMS_NAME}/{name}.json"


def _owner(store: Store, file: str) -> dict[str, Any]:
    """What a claim says of its owner; {} if it is gone, damaged or being written."""
    try:
        owner = json.loads(store.read(file, max_bytes=MAX_CLAIM_BYTES))
    except (OSError, ValueError, OutputError):
        return {}
    whole = isinstance(owner, dict) and type(owner.get("pid")) is int and {"machine", "started", "token"} <= set(owner)
    return owner if whole else {}


@functools.cache
def this_machine() -> str:
    """Tells apart hosts, and containers of one host, whatever they call themselves: process ids mean nothing beyond."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in clock ticks; None if it is dead (or there is no /proc)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZX" else fields[18]
