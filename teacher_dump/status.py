"""`tide status`: how a dump is doing, from the cache folder alone: plan, receipts and what the workers say.

Reads a few small files per worker and one listing, whatever the number of shards; loads no model and no torch, changes
nothing, and may look on from any machine that sees the folder. How long a worker has been silent is told by this
machine's clock: another host's may differ by its clock's error, and nothing is decided by it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..shared.cache.coverage import sentences
from ..shared.cache.files import parse_json
from ..shared.cache.manifest import MANIFEST_NAME, MAX_PLAN_BYTES, PLAN_NAME, read_manifest
from ..shared.cache.receipts import listed_receipts
from ..shared.cache.store import Store, open_store
from ..shared.errors import CacheError
from ..shared.shown_text import redacted, terminal_text
from .claims import is_alive, this_machine
from .worker_records import WorkerRecord, read_records

ALIVE_S = 60.0
"""A worker whose last sign is older is counted as gone: several signs, and what network file systems delay. One of this
machine is asked for directly."""
MAX_SHOWN = 40
"""Workers, or failed shards, in the table; --json tells all."""


@dataclass(frozen=True)
class WorkerStatus:
    """One worker; `silent_s`: since its last sign of life."""

    worker: str
    host: str
    state: str
    shard: int | None
    shards: int
    tokens_per_second: float
    silent_s: float
    alive: bool


@dataclass(frozen=True)
class DumpStatus:
    """A dump at one moment.

    Args:
        state: running: a living worker is at it; stopped: none is.
        running: shards that living workers have in hand.
        failed: shard -> reason, of shards that some worker could not do and nobody has done.
        tokens_per_second: of the teacher, all living workers together.
        eta_s: shards left over the rate at which living workers finished theirs; None: none has finished one.
        last_error: worker, message and age of the newest one; None: there is none.
        left_out: what does not get into the cache, or only in part, a sentence each: by the plan, and of a complete
            cache by its manifest, which knows what the teacher could not answer as well.
    """

    cache: str
    state: Literal["planning", "running", "stopped", "complete"]
    shards: int
    done: int
    running: tuple[int, ...]
    failed: Mapping[str, str]
    tokens_per_second: float
    eta_s: float | None
    workers: tuple[WorkerStatus, ...]
    last_error: Mapping[str, Any] | None
    left_out: tuple[str, ...] = ()


class PlanFacts(NamedTuple):
    """What the plan of a dump says: its shards, and what is left out or cut."""

    shards: int
    left_out: tuple[str, ...]


def read_planned(root: str | Path | Store) -> PlanFacts | None:
    """None: there is no plan yet. Raises: CacheError: the plan is damaged."""
    store = open_store(root)
    path = store.path(PLAN_NAME)
    try:
        plan = parse_json(store.read(PLAN_NAME, max_bytes=MAX_PLAN_BYTES), path, max_bytes=MAX_PLAN_BYTES)
        num_samples = len(plan["samples"])
        num_shards = -(-num_samples // plan["settings"]["shards"]["samples_per_shard"])
        has_teacher = plan["teacher"] is not None
        said = sentences(plan["dropped"], plan["coverage"], num_samples, has_teacher=has_teacher)
        return PlanFacts(num_shards, tuple(said))
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CacheError(f"{path}: not a plan ({error!r:.200}); give the folder that dump-teacher writes") from error


def dump_status(root: str | Path | Store, planned: PlanFacts | None = None) -> DumpStatus:
    """How the dump below `root` is doing.

    Args: planned: what its plan says, if it is known already (one of millions of samples takes seconds to read).
    Raises: CacheError: there is no dump in that folder.
    """
    store = open_store(root)
    planned = read_planned(store) if planned is None else planned
    num_shards = None if planned is None else planned.shards
    records = read_records(store)
    if num_shards is None and not records:
        raise CacheError(
            f"{store}: no {PLAN_NAME} and no worker. If a dump-teacher was just started, it is still planning: look "
            "again in a moment. Otherwise give the folder that dump-teacher writes (--out)"
        )
    done = {shard for shard in listed_receipts(store) if shard < (num_shards or 0)}
    complete = store.exists(MANIFEST_NAME)
    alive = [r for r, silent_s in records if _is_alive(r, silent_s)]
    rates = [(r.shards / r.seconds, r.tokens / r.seconds) for r in alive if r.seconds > 0]
    shard_rate, left = sum(rate for rate, _ in rates), (num_shards or 0) - len(done)
    failed = {
        shard: reason for record, _ in reversed(records) for shard, reason in record.failed.items()
        if not (shard.isdecimal() and int(shard) in done)
    }  # fmt: skip
    workers = tuple(
        WorkerStatus(
            r.worker, r.host, r.state, r.shard, r.shards, r.tokens / r.seconds if r.seconds > 0 else 0.0,
            silent_s, _is_alive(r, silent_s),
        )
        for r, silent_s in records
    )  # fmt: skip
    errors = [(r, silent_s) for r, silent_s in records if r.error or r.failed]
    return DumpStatus(
        cache=str(store),
        state="complete" if complete else "planning" if num_shards is None else "running" if alive else "stopped",
        shards=num_shards or 0,
        done=len(done),
        running=tuple(sorted(r.shard for r in alive if r.shard is not None and r.shard not in done)),
        failed=dict(sorted(failed.items())),
        tokens_per_second=sum(rate for _, rate in rates),
        eta_s=0.0 if complete else left / shard_rate if shard_rate > 0 else None,
        workers=workers,
        last_error=None if not errors else {
            "worker": errors[0][0].worker, "age_s": errors[0][1],
            "error": errors[0][0].error or list(errors[0][0].failed.values())[-1],
        },
        left_out=_left_out_of(store, planned, complete=complete),
    )  # fmt: skip


def _left_out_of(store: Store, planned: PlanFacts | None, *, complete: bool) -> tuple[str, ...]:
    if complete:
        with contextlib.suppress(CacheError):  # for verify-cache to tell
            made = read_manifest(store)
            samples, has_teacher = made.totals.samples, made.teacher is not None
            return tuple(sentences(made.dropped, made.coverage, samples, has_teacher=has_teacher))
    return planned.left_out if planned else ()


def _is_alive(record: WorkerRecord, silent_s: float) -> bool:
    """Without an error, heard of lately and, where that can be asked, running."""
    is_here = record.machine == this_machine()
    return record.error is None and silent_s <= ALIVE_S and not (is_here and not is_alive(record.pid))


def watch(
    root: str | Path | Store, every_s: float, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[DumpStatus]:
    """The status again and again, until the dump is complete."""
    store, planned = open_store(root), None
    while True:
        planned = read_planned(store) if planned is None else planned
        status = dump_status(store, planned)
        yield status
        if status.state == "complete":
            return
        sleep(every_s)


def status_table(status: DumpStatus) -> RenderableType:
    """The status for a terminal."""
    head = Table.grid(padding=(0, 2))
    share = f"{status.done / status.shards:.1%}" if status.shards else "0 %"
    rows = [
        ("state", _STATES[status.state]),
        ("shards", f"{status.done:,} of {status.shards:,} done ({share}), {len(status.running):,} running, "
                   f"{len(status.failed):,} failed"),
        ("tokens", f"{status.tokens_per_second:,.0f} a second"),
        ("time left", "unknown until a living worker has finished a shard" if status.eta_s is None
                      else f"about {duration(status.eta_s)}"),
    ]  # fmt: skip
    said = status.left_out or ("nothing",)
    rows += [("" if number else "left out", text) for number, text in enumerate(said if status.shards else ())]
    if status.last_error is not None:
        error = status.last_error
        rows.append(("last error", f"{error['error']} ({error['worker']}, {duration(error['age_s'])} ago)"))
    for name, value in rows:
        head.add_row(name, _text(value))
    parts: list[RenderableType] = [head]
    if status.failed:
        failed = Table(title="Failed shards (another worker, or the same command, tries them again)")
        for name in ("shard", "reason"):
            failed.add_column(name)
        for shard, reason in list(status.failed.items())[:MAX_SHOWN]:
            failed.add_row(_text(shard), _text(reason))
        parts.append(failed)
        if len(status.failed) > MAX_SHOWN:
            parts.append(_text(f"and {len(status.failed) - MAX_SHOWN} more; --json tells all"))
    if status.workers:
        workers = Table()
        for name in ("worker", "state", "shard", "done", "tokens/s", "last sign of life"):
            workers.add_column(name, justify="left" if name in ("worker", "state") else "right")
        for w in status.workers[:MAX_SHOWN]:
            state = w.state if w.alive or w.state == "failed" else "gone"
            workers.add_row(
                _text(w.worker), state, "" if w.shard is None else str(w.shard), f"{w.shards:,}",
                f"{w.tokens_per_second:,.0f}", f"{duration(w.silent_s)} ago",
            )  # fmt: skip
        parts.append(workers)
        if len(status.workers) > MAX_SHOWN:
            parts.append(_text(f"and {len(status.workers) - MAX_SHOWN} more; --json tells all"))
    return Group(*parts)


_STATES = {
    "planning": "planning: conversations are being tokenised",
    "running": "running",
    "stopped": "stopped: no worker gives signs of life (one just started soon will); the same dump-teacher command "
               "continues",
    "complete": "complete: manifest.json is written",
}  # fmt: skip


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3.4 h, 2.1 days."""
    if not math.isfinite(seconds):
        return "forever"
    for size, unit, digits in ((86400 * 2, "days", 1), (5400, "h", 1), (90, "min", 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _text(value: str) -> Text:
    """Other processes' words, which may quote a stranger's, as text that cannot act."""
    return Text(terminal_text(redacted(value)))
