"""What each worker says of itself, for `tide status`: `workers/HOST-PID.json`, rewritten every few seconds.

Records are told to people, never relied on: nothing is decided by them, one that cannot be written is left out, and all
of them go when the dump is complete. One that holds an error stays until then. No torch here: status must start fast.
"""

import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..shared.cache.files import from_json, read_json, readable_json, temporary_name
from ..shared.config import to_tree
from ..shared.errors import TideError

RECORDS_NAME = "workers"
MAX_RECORD_BYTES = 256 << 10
MAX_ERROR_CHARACTERS = 1000
MAX_FAILED = 50
"""Failed shards that a record tells, the newest; together they stay far below the record's limit."""

State = Literal["planning", "loading", "working", "waiting", "finishing", "stopped", "failed"]


@dataclass(frozen=True)
class WorkerRecord:
    """One worker, as it last was.

    Args:
        shard: in hand; None: none.
        shards, tokens, seconds: finished by this worker, its teacher's token-forwards, and the time it took them.
        failed: shards that it could not do, with the reason.
        machine: tells hosts and containers apart; "": unknown.
        error: what ended it.
    """

    worker: str
    host: str
    pid: int
    state: State
    shard: int | None = None
    shards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    machine: str = ""


def own_name() -> str:
    """This process's name among the workers."""
    return f"{socket.gethostname()}-{os.getpid()}"


def record_path(root: Path, worker: str) -> Path:
    """Where a worker's record lies."""
    return root / RECORDS_NAME / f"{worker}.json"


def write_record(root: Path, record: WorkerRecord) -> None:
    """Replace the worker's record, as far as that is possible; not fsynced, because nothing is lost with it."""
    path = record_path(root, record.worker)
    temporary = temporary_name(path)
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(readable_json(to_tree(record)))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_records(root: Path) -> list[tuple[WorkerRecord, float]]:
    """Every record that can be read, and seconds since it was written by this machine's clock; newest first."""
    found = []
    for path in (root / RECORDS_NAME).glob("[!.]*.json"):
        with contextlib.suppress(OSError, TideError):
            age_s = max(0.0, time.time() - path.stat().st_mtime)
            found.append((from_json(WorkerRecord, read_json(path, max_bytes=MAX_RECORD_BYTES), str(path)), age_s))
    return sorted(found, key=lambda pair: pair[1])


def count_records(root: Path) -> int:
    """How many there are: one listing."""
    try:
        return len(os.listdir(root / RECORDS_NAME))
    except OSError:
        return 0


def remove_record(root: Path, worker: str) -> None:
    """Forget one worker."""
    with contextlib.suppress(OSError):
        record_path(root, worker).unlink()


def remove_records(root: Path) -> None:
    """Forget them all: the dump is complete."""
    with contextlib.suppress(OSError):
        for path in (root / RECORDS_NAME).iterdir():
            path.unlink()
        (root / RECORDS_NAME).rmdir()
