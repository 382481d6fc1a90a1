"""SIGTERM and SIGUSR1 end a command with exit code 75 at whatever stage it is: opening, planning, pulling, evaluating.

The entry points arm this before anything large is imported. Stages that can finish a piece of work first take the
signals over while they run (teacher_dump/stopping.py, student_train/stop_signal.py).
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from .errors import TryAgain

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""An operator, a scheduler or a spot instance that goes; Slurm's `--signal=USR1@120`."""
GRACE_S = 10.0
"""After a signal, for clean-up that waits for somebody: a download's threads, a device."""


class StopAsked(BaseException):
    """A signal asks this process to end. No `Exception`: whoever handles failures must not handle this one."""

    exit_code = TryAgain.exit_code


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """While the block runs, the first signal raises StopAsked; a second one, or the end of the grace, ends the process.

    Outside the main thread nothing is changed: there the caller owns the signals. Children that are forked inside the
    block die of the signals as usual.
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
            return
        if asked:
            os._exit(StopAsked.exit_code)
        asked = True
        timer = threading.Timer(GRACE_S, _give_up)
        timer.daemon = True
        timer.start()
        raise StopAsked(
            f"stopped by {signal.Signals(number).name}; nothing that was finished is lost, the same command continues"
        )

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if not asked:  # an exit that is under way is not to be turned into a death by the next signal
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _give_up() -> None:
    """End the process from a thread: its main thread hangs where nothing can be raised, or waits for other threads."""
    sys.stderr.write("stopped; something did not end within the grace and was left\n")
    sys.stderr.flush()
    os._exit(StopAsked.exit_code)
