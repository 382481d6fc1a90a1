"""A worker: opens the teacher once and pulls undone shards until none is left.

Workers share nothing but the cache folder (board.py). One that dies costs at most the shard it was busy with; running
the same command again continues. Whoever finds every shard done writes the manifest (finalize.py).

A shard that fails (the device's memory is exhausted, twice; an error nobody foresaw) is left to the others, and the
worker takes the next; three in a row end it. What would fail every shard (a full disk, other data, other weights) or
must not be passed over in silence (a sample that cannot be answered, without `data.skip_bad`) ends it at once.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from ..shared.addresses import require_apart
from ..shared.cache import Receipt
from ..shared.cache.receipts import AUDIT_FOLDER, RECEIPTS_FOLDER, SHARD_FOLDER, listed_receipts, receipt_name
from ..shared.cache.store import Store, open_store
from ..shared.config import RunConfig
from ..shared.conversations import parse_sources
from ..shared.errors import DataError, TideError, Unavailable
from ..shared.models.loading import local_folder
from ..shared.shown_text import redacted
from ..shared.stop_signals import Stop
from ..shared.tails import TailBuckets
from .board import Board
from .claims import CLAIMS_NAME
from .finalize import finalize, tidy
from .placement import open_placed, replica_devices
from .plan import Plan, open_samples, read_plan
from .shard_task import ShardTask
from .teacher import Teacher
from .verdict import require_sound
from .weights_record import record_doubts, require_same_weights
from .worker_records import RECORDS_NAME

MIN_WAIT_S, MAX_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0, 60.0
"""Between two looks at the folder while others are busy with all that is left; it grows by half each time."""
MAX_FAILURES = 3
"""A worker stops when so many shards in a row failed."""
LOOKS_PER_S = 10.0
"""Of all waiting workers together: each look costs the file system two listings and a glance at every claim."""

Report = Callable[[int, int], None]
"""Called with (shards finished by this worker, token-forwards) since the last call."""


class OutOfDeviceMemory(Unavailable):
    """The teacher's memory did not suffice for one micro-batch, also after a second try."""


class Worker:
    """One worker, shard by shard.

    Args:
        config: of the command; the plan's settings, with the paths where things lie here.
        name: among the workers; None: host and process.
    Raises: CacheError: no plan, or not this one.
    """

    def __init__(
        self, root: Path | Store, config: RunConfig, *, stop: Stop | None = None, name: str | None = None
    ) -> None:
        self.store = open_output(root, config)
        self.plan = read_plan(self.store).at(config, self.store)
        self.stop = stop or Stop(config.workers.grace_s)
        self.board = Board(self.store, self.plan.hash, self.plan.num_shards, config.workers, worker=name)
        self.task: ShardTask | None = None
        self._failures: dict[int, Exception] = {}
        self._in_a_row: list[int] = []
        self._wait_s = 0.0

    def step(self, report: Report) -> bool:
        """Do one shard, or the manifest, or wait for others a moment; False: the cache is complete.

        Raises: TideError: see `open_task`, `ShardTask.run`, `finalize`; TryAgain: asked to stop.
        """
        self.stop.check()
        if self.board.is_complete():
            return False
        left = self.board.left()
        mine = [shard for shard in left if shard not in self._failures]
        if left and not mine:
            raise list(self._failures.values())[-1]
        if self._do_one(mine, report) if left else self._commit():
            self._wait_s = 0.0
        elif not self.board.is_complete():
            self._wait_s = next_wait_s(self._wait_s, self.board.num_workers())
            self.stop.sleep(self._wait_s)
        return True

    def _do_one(self, shards: list[int], report: Report) -> bool:
        """Do one of these shards; False: others hold all of them."""
        free = self.board.free(shards)
        if not free:
            return False
        if self.task is None:  # before a claim: loading takes long, and others could do the shard meanwhile
            self.board.say("loading")
            self.task = open_task(self.store, self.plan)
            if self.task.teacher is not None and not listed_receipts(self.store):
                record_doubts(self.store, require_sound(self.task))
        with self.board.take_one(free) as shard:
            if shard is None:
                return False
            try:
                with self.stop.finishing():
                    receipt = self._attempt(self.task, shard, report)
                    self.board.finished()
                    report(1, 0)
                    self._in_a_row = [] if receipt.rows else [*self._in_a_row, shard]
            except Exception as error:
                if isinstance(error, TideError) and not isinstance(error, OutOfDeviceMemory):
                    raise
                self._failures[shard] = error
                self._in_a_row.append(shard)
                self.board.failed(shard, error)
                if len(self._in_a_row) >= MAX_FAILURES:
                    error.add_note(f"shards {_listed(self._in_a_row)} failed one after another: this worker stops")
                    raise
        if len(self._in_a_row) >= MAX_FAILURES and shard not in self._failures:
            raise DataError(
                f"shards {_listed(self._in_a_row)}: not one sample of them could be answered. The teacher's weights "
                "are damaged or overflow in teacher.dtype: look at it before you leave out more"
            )
        return True

    def _attempt(self, task: ShardTask, shard: int, report: Report) -> Receipt:
        """Run the shard; a second time, with all caches cleared, if the device's memory did not suffice."""

        def progress(tokens: int) -> None:
            self.board.progress(tokens)
            report(0, tokens)
            self.stop.check()

        for is_last in (False, True):
            try:
                receipt = task.run(self.store.folder, shard, progress)
                break
            except torch.OutOfMemoryError as error:
                if is_last:
                    raise OutOfDeviceMemory(
                        f"shard {shard}: the device's memory does not suffice ({str(error)[:200]}), also after a "
                        "second try. Either lower teacher.tokens_per_batch (it is part of the plan: give a new --out), "
                        "or keep the plan and raise teacher.devices_per_replica; teacher.quantization=nf4 makes the "
                        "weights small, and a new plan. Micro-batches are never shrunk silently, because that would "
                        "change bytes"
                    ) from error
            clear_device_cache(garbage_collection=True)  # after the handler: the error's frames hold tensors
        audit = [receipt.audit.name] if receipt.audit else []
        self.store.publish([receipt.name, *audit, receipt_name(shard)])
        return receipt

    def _commit(self) -> bool:
        """Write the manifest, unless another worker is at it; False: it is."""
        with self.board.holding("manifest") as mine:
            if mine and not self.board.is_complete():
                self.board.say("finishing")
                finalize(self.store, self.plan, self.task.pairing if self.task else None, progress=self.board.progress)
            return mine


def next_wait_s(wait_s: float, num_workers: int) -> float:
    """How long to wait after a wait of `wait_s` (0: after work); with hundreds of workers, none is short."""
    share = num_workers / LOOKS_PER_S
    longest = min(LONGEST_WAIT_S, max(MAX_WAIT_S, share))
    return min(longest, max(MIN_WAIT_S, share / 8, 1.5 * wait_s))


def work(
    root: Path | Store, config: RunConfig, *, report: Report = lambda shards, tokens: None, stop: Stop | None = None
) -> None:
    """Do undone shards until the cache is complete; those of a worker that dies are taken over.

    Args: config: of the command; the plan's settings, with the paths where things lie here.
    Raises: TideError: see `Worker.step`.
    """
    worker = Worker(root, config, stop=stop)
    with worker.board.present():
        while worker.step(report):
            pass
    tidy(worker.store)


def work_and_tell(root: str | Path | Store, config: RunConfig, *, report: Report, stop: Stop) -> TideError | None:
    """`work` in a process of its own: an error is given back for the command to tell, one that nobody foresaw with its
    traceback on stderr. What is no Exception passes.
    """
    try:
        work(open_output(root, config), config, report=report, stop=stop)
    except TideError as error:
        return error
    except Exception as error:
        sys.stderr.write(redacted(traceback.format_exc()))
        return TideError(". ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
    return None


def open_output(root: str | Path | Store, config: RunConfig) -> Store:
    """The place of `--out`, with the patience and the scratch folder of the configuration.

    Raises: ConfigError: it lies in what is read, or around it. OutputError: a folder that tide keeps there is a link,
        and what it leads to is somebody else's.
    """
    if isinstance(root, str | Path):
        sources = enumerate(parse_sources(config.data.source), 1)
        read = {f"source {number}": source.path for number, source in sources if source.path != "stdlib"}
        for side, of in (("teacher", config.teacher), ("student", config.student)):
            read |= {f"{side}.path": of.path, f"{side}.tokenizer": of.tokenizer}
        require_apart(root, read, makes_cache=True)
    workers = config.workers
    store = open_store(root, patience_s=workers.store_patience_s, scratch=workers.scratch)
    store.require_own(SHARD_FOLDER, AUDIT_FOLDER, RECEIPTS_FOLDER, CLAIMS_NAME, RECORDS_NAME)
    return store


def open_task(root: Path | Store, plan: Plan) -> ShardTask:
    """Load data, tokenizers and the teacher for this worker's devices.

    Raises: CacheMismatch: the teacher's weights are not those that earlier shards were made with. DataError: they
        cannot be loaded, or the data changed since the plan was made.
    """
    config = plan.config
    conversations, pairing = open_samples(plan)
    if pairing.teacher_folder is None or pairing.spec is None or plan.teacher is None:
        return ShardTask(plan, conversations, pairing, None)
    folder = local_folder(config.teacher.path, plan.teacher["revision"] or config.teacher.revision)
    device = replica_devices(config.teacher)[0]
    if device.type == "cpu":
        torch.set_num_threads(config.shards.cpu_threads)
    model = open_placed(config.teacher, folder)
    require_same_weights(root, folder)
    support = audit_ids = buckets = None
    if plan.signal_kind == "topk":
        support, teacher_id = torch.from_numpy(pairing.student_id >= 0), pairing.teacher_id()
        audit_ids = torch.from_numpy(teacher_id[teacher_id >= 0].astype(np.int64))
        if config.signal.tail_buckets:
            student_id = torch.from_numpy(pairing.student_id).clamp(min=0)  # what is outside the support is in no tail
            buckets = TailBuckets.of_ids(student_id, config.signal.tail_buckets)
    teacher = Teacher(model, pairing.spec, support=support, audit_ids=audit_ids, buckets=buckets)
    return ShardTask(plan, conversations, pairing, teacher)


def _listed(shards: list[int]) -> str:
    return ", ".join(map(str, shards))
