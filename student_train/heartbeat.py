"""Signs of life between the processes of one training: a dead one ends the run, by name, instead of a long wait.

A process that waits for another's share of a sum cannot know that it will never come: under NCCL it hangs until
train.collective_timeout_s, and then blames itself. So a thread of each process counts up a number in the store through
which the processes met, and watches the numbers of two others; rank 0 watches all.

    beat/<rank>   a number that grows, or "bye"
    who/<rank>    "rank 1 (host gpu-07, process 4242)"
    verdict       what ended the run, once something did: the first process to know writes it, all read it

Times are measured on the watcher's own clock. What cannot be named stays possible: a process that dies before it has
joined the others (the launcher notices), and one that lives and waits for ever (train.collective_timeout_s).
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from ..shared.errors import EXIT_INTERRUPTED, TideError, TryAgain
from ..shared.shown_text import redacted, terminal_text
from ..shared.stop_signals import StopAsked
from .processes import on_main

BEAT_S = 2.0
SILENCE_S = 60.0
"""Without a sign of life for so long, a process counts as dead. Loading, compiling and saving leave threads running."""
SUSPICION_S = 10.0
"""The same where a broken connection has told already that somebody is gone."""
GRACE_S = 5.0
"""A process that hears of another's failure may itself fail with a better message within this time."""
_NOTHING = "-"
_RESUMES = "Run the same command again: it resumes from the newest checkpoint"


class Heartbeat:
    """While active, the death or failure of any process ends all others with a message that names it.

    Does nothing in a run of one process. Use it around everything that waits for other processes.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float) -> None:
        """Args: timeout_s: train.collective_timeout_s, for messages and for the first meeting."""
        self._accelerator, self._timeout_s = accelerator, timeout_s
        self.rank, self.num_ranks = accelerator.process_index, accelerator.num_processes
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._who: list[str] = []
        self._beats: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._answered = 0.0  # when the store last did
        self._verdict: tuple[str, int, float] | None = None  # sentence, exit code, when it was read

    def __enter__(self) -> "Heartbeat":
        if self.num_ranks == 1:
            return self
        name = on_main(self._accelerator, lambda: uuid.uuid4().hex)
        try:
            self._meet(name)
        except RuntimeError as error:  # of the store; too busy to answer, or rank 0 is gone
            raise TryAgain(
                f"rank {self.rank}: the {self.num_ranks} processes of this run met, and then did not all answer within "
                f"train.collective_timeout_s = {self._timeout_s:g} s ({error}). Did one of them die? {_RESUMES}"
            ) from error
        others = range(1, self.num_ranks) if self.rank == 0 else {0, (self.rank + 1) % self.num_ranks}
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(others, self._answered)
        for work in (self._exchange, self._judge):
            thread = threading.Thread(target=work, name=f"tide{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def _meet(self, name: str) -> None:
        """Say who this is, and hear who the others are. Raises: RuntimeError: no answer in time."""
        # The store has no public accessor. A clone has a connection of its own: a wait in it blocks nobody else.
        shared: Any = distributed_c10d._get_default_store()
        self._store = distributed_c10d.PrefixStore(f"tide/{name}", shared.clone())
        self._store.set_timeout(timedelta(seconds=self._timeout_s))
        if self.rank == 0:
            self._store.set("verdict", _NOTHING)
        self._store.set(f"beat/{self.rank}", "0")
        me = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        self._store.set(f"who/{self.rank}", me)
        names = [f"who/{rank}" for rank in range(self.num_ranks)]
        self._store.wait(names)
        self._who = [value.decode() for value in self._store.multi_get(names)]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._threads:
            return
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                self._explain(error)
        except TideError as explained:
            self._leave_word(str(explained), explained.exit_code)
            raise
        else:
            if error is None or isinstance(error, TryAgain):  # in agreement with the others
                self._leave_word()
            else:
                code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
                if isinstance(error, TideError | StopAsked):
                    code = error.exit_code
                elif isinstance(error, SystemExit) and isinstance(error.code, int):
                    code = error.code
                self._leave_word(f"{self._who[self.rank]} failed: {type(error).__name__}: {error}", code)

    def _exchange(self) -> None:
        """Give a sign of life and read the others', over and over; an answer that never comes stops only this."""
        ranks = list(self._heard)
        keys = ["verdict", *(f"beat/{rank}" for rank in ranks)]
        count = 0
        while not self._over.wait(BEAT_S):
            count += 1
            with contextlib.suppress(RuntimeError):  # the store is gone: the silence will tell
                self._store.set(f"beat/{self.rank}", str(count))
                verdict, *beats = (value.decode() for value in self._store.multi_get(keys))
                self._answered = now = time.monotonic()
                for rank, beat in zip(ranks, beats, strict=True):
                    if beat != self._beats.get(rank):
                        self._beats[rank], self._heard[rank] = beat, now
                if verdict != _NOTHING and self._verdict is None:
                    sentence, code = json.loads(verdict)
                    self._verdict = sentence, code, now

    def _judge(self) -> None:
        """End this process when the run cannot go on: its main thread may wait for an answer in native code."""
        before = time.monotonic()
        while not self._over.wait(BEAT_S / 2):
            now = time.monotonic()
            if now - before > 3 * BEAT_S:  # this process itself stood still (a debugger, a suspended machine)
                self._answered, self._heard = now, dict.fromkeys(self._heard, now)
            before = now
            if self._verdict and now - self._verdict[2] > GRACE_S:
                self._end(*self._verdict[:2])
            lost = self._silent(SILENCE_S)
            if lost:
                self._end(lost, TryAgain.exit_code)

    def _silent(self, limit_s: float) -> str | None:
        """A sentence about the watched process that has been silent for longest, if that is too long."""
        now = time.monotonic()
        waits = {rank: now - heard for rank, heard in self._heard.items() if self._beats.get(rank) != "bye"}
        if not waits or max(waits.values()) <= limit_s:
            return None
        rank, where = max(waits, key=lambda rank: waits[rank]), ""
        if now - self._answered > limit_s / 2:  # without the store nobody is heard, and it is rank 0 or beside it
            rank, where = 0, ", nor of the store that it or its launcher holds"
        return (
            f"{self._who[rank]} died: no sign of life for {max(waits.values()):.0f} s{where}. {_RESUMES}; if it "
            "happens again, look for the reason (memory, a preempted node) in that process's own output and in the "
            "system's log"
        )

    def _explain(self, error: RuntimeError) -> None:
        """Raises: TideError: an error of a collective call is due to another process; returns if nothing says so."""
        deadline = time.monotonic() + SUSPICION_S + 2 * BEAT_S
        while time.monotonic() < deadline:
            if self._verdict:
                raise _as_error(*self._verdict[:2]) from error
            lost = self._silent(SUSPICION_S)
            if lost:
                raise TryAgain(lost) from error
            time.sleep(BEAT_S / 10)
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            raise TryAgain(
                f"{self._who[self.rank]} waited for the other processes longer than train.collective_timeout_s = "
                f"{self._timeout_s:g} s, and all of them are alive: one is stuck, or needs longer (a slow disk, an "
                f"evaluation). {_RESUMES}, with a larger train.collective_timeout_s if it was slow"
            ) from error

    def _leave_word(self, sentence: str | None = None, code: int = 0) -> None:
        """Say goodbye, and what happened. Rank 0 stays until the others have read it: the store may end with it."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)
        if any(thread.is_alive() for thread in self._threads):
            return  # no answer from the store, and the one that asks holds the connection
        with contextlib.suppress(RuntimeError):
            if sentence is not None:
                self._store.compare_set("verdict", _NOTHING, json.dumps([sentence, code]))
            self._store.set(f"beat/{self.rank}", "bye")
            start = time.monotonic()
            alive = [rank for rank, heard in self._heard.items() if start - heard < SUSPICION_S]
            while self.rank == 0 and sentence is not None and time.monotonic() < start + GRACE_S + 3 * BEAT_S:
                beats = self._store.multi_get([f"beat/{rank}" for rank in alive]) if alive else []
                if all(beat == b"bye" for beat in beats):
                    return
                time.sleep(BEAT_S / 10)

    def _end(self, sentence: str, code: int) -> None:
        """End the process from a thread; nothing is lost, since files are only ever renamed into place when whole."""
        kind = type(_as_error(sentence, code)).__name__
        sys.stderr.write(terminal_text(redacted(f"{kind}: {sentence}")) + "\n")
        sys.stderr.flush()
        _ended(self._store.compare_set, "verdict", _NOTHING, json.dumps([sentence, code]))
        _ended(self._store.set, f"beat/{self.rank}", "bye")
        if self.rank == 0:  # the others read the verdict from a store that may live in this process
            time.sleep(2 * BEAT_S)
        os._exit(code)


def _ended(call: Callable[..., Any], *arguments: str) -> None:
    """A last word to a store that may be gone: at most one beat is spent on it."""

    def attempt() -> None:
        with contextlib.suppress(RuntimeError):
            call(*arguments)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(BEAT_S)


def _as_error(sentence: str, code: int) -> TideError:
    """What another process said, to be raised here: the command ends with the same code everywhere."""
    if code == TryAgain.exit_code:
        return TryAgain(sentence)
    error = TideError(sentence)
    error.exit_code = code
    return error
