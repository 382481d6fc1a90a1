"""Claims: which worker is busy with what, so that workers pull different shards. A claim is only a hint.

`claims/00007.json` is created exclusively and touched while its worker lives. A claim is stale when its process is
dead (same host) or its last sign of life is older than the lease; then another worker takes it over. Two workers on one
shard are harmless, because a shard is the same bytes whoever writes it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..shared.cache.files import output_errors

LEASE_S = 120.0
"""Seconds without a sign of life after which a claim of another host is stale."""
HEARTBEAT_S = 10.0


@contextlib.contextmanager
def claim(root: Path, name: str, *, lease_s: float = LEASE_S) -> Iterator[bool]:
    """Hold the claim `name` for as long as the block runs; yields False if another living worker has it.

    Raises: OutputError: it cannot be written.
    """
    path = root / "claims" / f"{name}.json"
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = _create(path) or (_is_stale(path, lease_s) and _take_over(path))
    if not taken:
        yield False
        return
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heartbeat.start()
    try:
        yield True
    finally:
        stop.set()
        heartbeat.join()
        with contextlib.suppress(OSError):
            path.unlink()


def remove_claims(root: Path) -> None:
    """Remove the claims of a finished dump; nobody needs them any more."""
    with contextlib.suppress(OSError):
        for path in (root / "claims").iterdir():
            path.unlink()
        (root / "claims").rmdir()


def is_alive(pid: int) -> bool:
    """Is there a process of this number on this host? One that was killed and not yet waited for is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _start_time(pid) is not None or not Path("/proc/self/stat").exists()


def _create(path: Path) -> bool:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    try:
        file = open(path, "x")  # noqa: SIM115 - closed below; only its creation may say that another was faster
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(owner, file)
    except OSError:  # disk full: an empty claim would keep others waiting
        path.unlink()
        raise
    return True


def _take_over(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return _create(path)


def _is_stale(path: Path, lease_s: float) -> bool:
    try:
        silent_s = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text())
        if owner["host"] == socket.gethostname() and _start_time(owner["pid"]) != owner["started"]:
            return True
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):  # being written this moment, or left half-written by a killed worker
        return silent_s > HEARTBEAT_S
    return silent_s > lease_s


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in clock ticks; None if it is dead (or there is no /proc)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZX" else fields[18]


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
