"""SIGTERM and SIGUSR1 stop a command with exit code 75 at whatever stage: at once, or when the work in hand is done.

    `end_on_signals`   any stage: opening, planning, pulling, evaluating. The entry points arm it before anything large
                       is imported
    `Stop`             a dump: the shard in hand is finished within a grace, or dropped
    `noted_signals`    a training: the loop looks between two steps, and saves its state; Ctrl-C is one of the signals

A second signal ends the process. Nothing that was finished is ever lost: the same command continues.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from .errors import EXIT_INTERRUPTED, TryAgain

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""An operator, a scheduler or a spot instance that goes; Slurm's `--signal=USR1@120`."""
GRACE_S = 10.0
"""After a signal, for clean-up that waits for somebody: a download's threads, a device."""
OVERTIME_S = 2.0
"""After a dump's grace, for what cannot be interrupted between two micro-batches (a hanging disk or device)."""


class StopAsked(BaseException):
    """A signal asks this process to end. No `Exception`: whoever handles failures must not handle this one."""

    exit_code = TryAgain.exit_code


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """While the block runs, the first signal raises StopAsked; a second one, or the end of the grace, ends the process.

    After a signal the handlers stay: an exit that is under way is not to be turned into a death by the next one.
    """

    def first(number: int) -> None:
        _end_after(GRACE_S, "stopped; something did not end within the grace and was left")
        raise StopAsked(_sentence(signal.Signals(number).name))

    with _handled(first, _leave, stay=True):
        yield


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """While the block runs, the first signal is put into a list; a second one raises SystemExit."""
    noted: list[int] = []

    def second(number: int) -> None:
        raise SystemExit(EXIT_INTERRUPTED if number == signal.SIGINT else StopAsked.exit_code)

    with _handled(noted.append, second, (*STOP_SIGNALS, signal.SIGINT)):
        yield noted


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
            raise TryAgain(_sentence(self.asked_by))

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
        """The signals ask for a stop while the block runs.

        Args: second_ends: a second signal ends the process at once. False: of a child, whose parent decides that.
        """

        def second(number: int) -> None:
            if second_ends:
                _leave(number)

        def first(number: int) -> None:
            if self.asked_by:
                second(number)
                return
            self.ask(signal.Signals(number).name)
            if not self._finishing:
                raise StopAsked(_sentence(self.asked_by))
            _end_after(
                self.grace_s + OVERTIME_S * (1 + second_ends),
                "TryAgain: the grace is over; the shard in hand is dropped, the same command continues",
            )

        try:
            with _handled(first, second):
                yield
        except StopAsked as asked:
            raise TryAgain(str(asked)) from None


@contextlib.contextmanager
def _handled(
    first: Callable[[int], object], second: Callable[[int], object], numbers: tuple[int, ...] = STOP_SIGNALS, *,
    stay: bool = False,
) -> Iterator[None]:  # fmt: skip
    """While the block runs, the first signal calls `first` with its number, all others call `second`.

    Outside the main thread nothing is changed: there the caller owns the signals. Children that are forked inside the
    block die of the signals as usual. Args: stay: do not give them back once one has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, asked = os.getpid(), False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif asked:
            second(number)
        else:
            asked = True
            first(number)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        if not (asked and stay):
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _sentence(by: str) -> str:
    return f"stopped by {by}; nothing that was finished is lost, the same command continues"


def _leave(number: int) -> None:
    os._exit(StopAsked.exit_code)


def _end_after(seconds: float, said: str) -> None:
    """End the process from a thread: its main thread hangs where nothing can be raised, or waits for other threads."""

    def end() -> None:
        sys.stderr.write(said + "\n")
        sys.stderr.flush()
        os._exit(StopAsked.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
