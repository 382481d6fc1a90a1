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
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..shared.cache.files import output_errors
from ..shared.config import WorkersConfig

CLAIMS_NAME = "claims"
Clock = Callable[[], float]


class _Sighting(NamedTuple):
    """A claim of somebody else: what its file looked like, since when it has, and who owns it."""

    signature: tuple[int, int, int]
    since: float
    owner: dict[str, Any]


class Held:
    """A claim that this worker holds."""

    def __init__(self, path: Path, token: str, stuck_s: float, clock: Clock) -> None:
        self.path, self.token, self.stuck_s, self.clock = path, token, stuck_s, clock
        self._last_progress = clock()

    def progress(self) -> None:
        """Say that the work goes on: without this, for `workers.stuck_s`, the claim is left to go stale."""
        self._last_progress = self.clock()

    def renew(self) -> None:
        """Touch the file, unless the work is stuck or the claim was taken over meanwhile.

        Raises: OSError: it cannot be touched.
        """
        if self.clock() - self._last_progress < self.stuck_s and self._is_mine():
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)

    def release(self) -> None:
        """Remove the file if it is still this worker's."""
        if self._is_mine():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _is_mine(self) -> bool:
        return _owner(self.path).get("token") == self.token


class Claims:
    """One worker's view of the claims below `root`, with what it has seen of those of others.

    Args: clock: monotonic seconds; tests and the simulation bring their own.
    """

    def __init__(self, root: Path, workers: WorkersConfig, *, clock: Clock = time.monotonic) -> None:
        self.folder, self.workers, self.clock = root / CLAIMS_NAME, workers, clock
        self._seen: dict[str, _Sighting] = {}

    def names(self) -> set[str]:
        """Names that somebody holds, or held when he died: one listing."""
        try:
            return {name[:-5] for name in os.listdir(self.folder) if name.endswith(".json")}
        except OSError:
            return set()

    def held(self) -> set[str]:
        """Names that living workers hold: one listing, and one look at each file."""
        names = self.names()
        self._seen = {name: sighting for name, sighting in self._seen.items() if name in names}
        return {name for name in names if not self._is_stale(name)}

    def take(self, name: str) -> Held | None:
        """Hold the claim `name`; None if another living worker has it.

        Raises: OutputError: it cannot be written.
        """
        path = self.folder / f"{name}.json"
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            token = _create(path)
            if token is None and self._is_stale(name):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                token = _create(path)
        self._seen.pop(name, None) if token else None
        return Held(path, token, self.workers.stuck_s, self.clock) if token else None

    def _is_stale(self, name: str) -> bool:
        path = self.folder / f"{name}.json"
        try:
            status = path.stat()
        except FileNotFoundError:
            return True
        signature = (status.st_mtime_ns, status.st_ino, status.st_size)
        sighting = self._seen.get(name)
        if sighting is None or sighting.signature != signature:
            known = sighting is not None and sighting.signature[1:] == signature[1:]
            abroad = sighting is not None and sighting.owner.get("machine", _machine()) != _machine()
            owner = sighting.owner if sighting and known and abroad else _owner(path)
            sighting = self._seen[name] = _Sighting(signature, self.clock(), owner)
        owner = sighting.owner
        if owner.get("machine") == _machine() and _start_time(owner["pid"]) != owner["started"]:
            return True
        # Without an owner: being written this moment, or left half-written by a killed worker.
        patience_s = self.workers.lease_s if owner else self.workers.heartbeat_s
        return self.clock() - sighting.since > patience_s


def remove_claims(root: Path) -> None:
    """Remove the claims of a finished dump; nobody needs them any more."""
    with contextlib.suppress(OSError):
        for path in (root / CLAIMS_NAME).iterdir():
            path.unlink()
        (root / CLAIMS_NAME).rmdir()


def is_alive(pid: int) -> bool:
    """Is there a process of this number on this host? One that was killed and not yet waited for is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _start_time(pid) is not None or not Path("/proc/self/stat").exists()


def this_machine() -> str:
    """What tells this host, or container, from all others."""
    return _machine()


def _create(path: Path) -> str | None:
    """Create a claim; the token in it, or None if there is one already."""
    token, pid = uuid.uuid4().hex, os.getpid()
    owner = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _start_time(pid)}
    try:
        file = open(path, "x")  # noqa: SIM115 - closed below; only its creation may say that another was faster
    except FileExistsError:
        return None
    try:
        with file:
            json.dump({**owner, "token": token}, file)
    except OSError:  # disk full: an empty claim would keep others waiting
        path.unlink()
        raise
    return token


def _owner(path: Path) -> dict[str, Any]:
    """What a claim says of its owner; {} if it is gone, damaged or being written."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(owner, dict) and type(owner.get("pid")) is int and {"machine", "started", "token"} <= set(owner)
    return owner if whole else {}


@functools.cache
def _machine() -> str:
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
