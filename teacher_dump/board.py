"""A worker's dealings with the cache folder: what is left, what others hold, what it takes and what it says of itself.

Workers meet nowhere else. Listings stand in for looking at files one by one: a look costs two of them, however many
shards there are. The shard itself and its receipt are published by shard_task.py, the manifest by finalize.py.
"""

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..shared.cache import shard_is_done
from ..shared.cache.files import output_errors
from ..shared.cache.manifest import MANIFEST_NAME
from ..shared.cache.receipts import listed_receipts
from ..shared.cache.store import Store, open_store
from ..shared.config import WorkersConfig
from ..shared.errors import TideError, TryAgain
from .claims import CLAIMS_NAME, Claims, Clock, Held, this_machine
from .worker_records import (
    MAX_ERROR_CHARACTERS,
    MAX_FAILED,
    RECORDS_NAME,
    State,
    WorkerRecord,
    own_name,
    record_name,
    write_record,
)

MAX_BEAT_ERRORS = 3
"""Signs of life in a row that cannot be written: a network file system may hiccup once."""


class Board:
    """The cache folder as one worker sees it.

    Args: clock: monotonic seconds; tests and the simulation bring their own.
    """

    def __init__(
        self, root: Path | Store, plan_hash: str, num_shards: int, workers: WorkersConfig, *, worker: str | None = None,
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        self.store, self.plan_hash, self.num_shards, self.workers, self.clock = (
            open_store(root), plan_hash, num_shards, workers, clock,
        )  # fmt: skip
        self.claims = Claims(self.store, workers, clock=clock)
        name = worker or own_name()
        host, _, pid = own_name().rpartition("-")
        self._record = WorkerRecord(name, host, int(pid), "waiting", machine=this_machine())
        self._random = random.Random(name)
        self._held: Held | None = None
        self._beat_errors: list[OSError | TideError] = []  # in a row
        self._since: float | None = None  # when the shard in hand was begun
        self._lock = threading.Lock()

    def is_complete(self) -> bool:
        """Is the manifest there?"""
        return self.store.exists(MANIFEST_NAME)

    def left(self) -> list[int]:
        """Shards without a receipt, in order."""
        done = listed_receipts(self.store)
        return [shard for shard in range(self.num_shards) if shard not in done]

    def num_workers(self) -> int:
        """Workers that have said something of themselves and not left, about: the dead among them included."""
        with contextlib.suppress(OSError, TideError):
            return len(self.store.names(RECORDS_NAME))
        return 0

    def free(self, shards: Collection[int]) -> list[int]:
        """Those of `shards` that no living worker holds, in order.

        Claims are looked at one by one only when there is no shard without one: those of the dead come last.
        """
        names = self.claims.names()
        unclaimed = [shard for shard in shards if claim_name(shard) not in names]
        if unclaimed:
            return unclaimed
        held = self.claims.held()
        return [shard for shard in shards if claim_name(shard) not in held]

    @contextlib.contextmanager
    def take_one(self, shards: Collection[int]) -> Iterator[int | None]:
        """Hold one of `shards` while the block runs: the first, or any once another worker was faster.

        Yields: its number; None: others hold all of them, or have done them.
        Raises: OutputError: a claim cannot be written.
        """
        left = list(shards)
        shard = left[0] if left else None
        while shard is not None:
            with self.holding(claim_name(shard)) as held:
                if held and shard_is_done(self.store, shard, self.plan_hash) is None:
                    self._since = self.clock()
                    self.say("working", shard=shard)
                    yield shard
                    return
            left.remove(shard)
            shard = self._random.choice(left) if left else None
        yield None

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Hold the claim `name` while the block runs; False: another living worker has it.

        Raises: OutputError: it cannot be written.
        """
        held = self._held = self.claims.take(name)
        try:
            yield held is not None
        finally:
            self._held, self._since = None, None
            if held is not None:
                held.release()

    def progress(self, tokens: int = 0) -> None:
        """The work in hand goes on: a sign of life, and something to tell.

        Raises: OutputError: signs of life could not be written for a while, so the shard could not either.
        """
        if len(self._beat_errors) >= MAX_BEAT_ERRORS:
            with output_errors(Path(self.store.path(CLAIMS_NAME))):
                raise self._beat_errors[-1]
        if self._held is not None:
            self._held.progress()
        with self._lock:
            self._record = dataclasses.replace(self._record, tokens=self._record.tokens + tokens)
            self._spend_time()

    def finished(self) -> None:
        """The shard in hand has its receipt."""
        with self._lock:
            self._spend_time()
        self.say("waiting", shards=self._record.shards + 1)

    def failed(self, shard: int, error: BaseException) -> None:
        """The shard could not be done here."""
        failed = {**self._record.failed, str(shard): describe(error)}
        self.say("waiting", failed=dict(list(failed.items())[-MAX_FAILED:]))

    def say(self, state: State, *, shard: int | None = None, **changes: Any) -> None:
        """Change the record and publish it."""
        with self._lock:
            self._record = dataclasses.replace(self._record, state=state, shard=shard, **changes)
            write_record(self.store, self._record)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """While the block runs, signs of life are given; an error that ends it is left for `tide status` to tell.

        Whatever else ends the block removes the record: a stop that was asked for, or the end of the work.
        """
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.workers.heartbeat_s):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        failure: Exception | None = None
        try:
            yield
        except TryAgain:
            raise
        except Exception as error:
            failure = error
            raise
        finally:
            stop.set()
            thread.join()
            if failure is None:
                with contextlib.suppress(OSError, TideError):
                    self.store.remove(record_name(self._record.worker))
            else:
                self.say("failed", error=describe(failure))

    def _spend_time(self) -> None:
        now = self.clock()
        if self._since is not None:
            self._record = dataclasses.replace(self._record, seconds=self._record.seconds + now - self._since)
            self._since = now

    def beat(self) -> None:
        """Give a sign of life: the claim in hand is touched, the record rewritten."""
        held = self._held
        try:
            if held is not None:
                held.renew()
            self._beat_errors.clear()
        except (OSError, TideError) as error:
            self._beat_errors.append(error)
        with self._lock:
            write_record(self.store, self._record)


def claim_name(shard: int) -> str:
    """The name of a shard's claim."""
    return f"{shard:05d}"


def describe(error: BaseException) -> str:
    """An error in one line, for a record."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:MAX_ERROR_CHARACTERS]
