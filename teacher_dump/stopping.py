"""Stopping a worker: a signal -> the shard in hand is finished or dropped within a grace, then exit code 75.

SIGTERM (an operator, a scheduler, a spot instance that goes) and SIGUSR1 (Slurm's warning before the end of time) ask
for it; a second signal ends the process at once. Nothing is ever lost: a dropped shard is simply not done.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from ..shared.errors import TryAgain
from ..shared.stop_signals import STOP_SIGNALS, StopAsked

OVERTIME_S = 2.0
"""After the grace, for what cannot be interrupted between two micro-batches (a hanging disk or device)."""


class Stop:
    """Whether this worker was asked to stop, and how long it may still take."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.asked_by = ""
        self._deadline = math.inf
        self._finishing = False
        self._forward: Callable[[], None] | None = None

    def ask(self, by: str) -> None:
        """Ask for a stop; repeated asking changes nothing."""
        if not self.asked_by:
            self.asked_by, self._deadline = by, time.monotonic() + self.grace_s
            if self._forward is not None:
                self._forward()

    def check(self) -> None:
        """Called between two pieces of work. Raises: TryAgain: asked to stop, and no time is left to finish."""
        if self.asked_by and (not self._finishing or time.monotonic() >= self._deadline):
            raise self._error()

    def sleep(self, seconds: float) -> None:
        """Wait. Raises: TryAgain: asked to stop."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            self.check()

    @contextlib.contextmanager
    def finishing(self, forward: Callable[[], None] | None = None) -> Iterator[None]:
        """A block that may end by itself within the grace; after it, a stop that was asked for raises TryAgain.

        Args: forward: called when the stop is asked for, to pass it on to other processes.
        """
        self._finishing, self._forward = True, forward
        try:
            yield
        finally:
            self._finishing, self._forward = False, None
        self.check()

    @contextlib.contextmanager
    def on_signals(self, *, second_ends: bool = True) -> Iterator[None]:
        """The signals ask for a stop while the block runs; only the main thread can be told by signals.

        Args: second_ends: a second signal ends the process at once. False: of a child, whose parent decides that.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: object) -> None:
            if self.asked_by:
                if second_ends:
                    os._exit(TryAgain.exit_code)
                return
            self.ask(signal.Signals(number).name)
            if not self._finishing:
                raise StopAsked(str(self._error()))
            timer = threading.Timer(self.grace_s + OVERTIME_S * (1 + second_ends), _give_up)
            timer.daemon = True
            timer.start()

        before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
        try:
            yield
        except StopAsked:
            raise self._error() from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _error(self) -> TryAgain:
        return TryAgain(f"stopped by {self.asked_by}; nothing that was finished is lost, the same command continues")


def _give_up() -> None:
    """End the process from a thread: its main thread hangs where nothing can be raised."""
    sys.stderr.write("TryAgain: the grace is over; the shard in hand is dropped, the same command continues\n")
    sys.stderr.flush()
    os._exit(TryAgain.exit_code)
