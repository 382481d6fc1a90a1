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

from ..shared.cache.files import from_json, parse_json, readable_json
from ..shared.cache.store import Store, open_store
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


def record_name(worker: str) -> str:
    """Where a worker's record lies, below the cache folder."""
    return f"{RECORDS_NAME}/{worker}.json"


def write_record(root: Path | Store, record: WorkerRecord) -> None:
    """Replace the worker's record, as far as that is possible; not fsynced, because nothing is lost with it."""
    with contextlib.suppress(OSError, TideError):
        open_store(root).write(record_name(record.worker), readable_json(to_tree(record)), durable=False)


def read_records(root: Path | Store) -> list[tuple[WorkerRecord, float]]:
    """Every record that can be read, and seconds since it was written by this machine's clock; newest first."""
    store, found = open_store(root), []
    for name, entry in store.entries(RECORDS_NAME).items():
        if name.startswith(".") or not name.endswith(".json"):
            continue
        with contextlib.suppress(OSError, TideError):
            file = f"{RECORDS_NAME}/{name}"
            tree = parse_json(
                store.read(file, max_bytes=MAX_RECORD_BYTES), store.path(file), max_bytes=MAX_RECORD_BYTES
            )
            age_s = max(0.0, time.time() - entry.modified)
            found.append((from_json(WorkerRecord, tree, store.path(file)), age_s))
    return sorted(found, key=lambda pair: pair[1])


def remove_records(root: Path | Store) -> None:
    """Forget them all: the dump is complete."""
    open_store(root).remove_folder(RECORDS_NAME)
