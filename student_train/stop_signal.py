"""Asking a training run to stop: signals -> a flag that the loop reads between two steps."""

import signal
import threading
from typing import Any

from ..shared.errors import EXIT_INTERRUPTED
from ..shared.stop_signals import STOP_SIGNALS, StopAsked

_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)


class StopSignal:
    """While active, the first signal asks for a checkpoint and an orderly stop; a second one ends the process at once.

    In a thread other than the main one nothing is changed: there the caller owns the signals.
    """

    def __enter__(self) -> "StopSignal":
        self.received: int | None = None
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise SystemExit(EXIT_INTERRUPTED if number == signal.SIGINT else StopAsked.exit_code)
        self.received = number
