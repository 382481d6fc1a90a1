"""Somebody else's chat template or tokenizer, run in a child process with limits on time, memory and output.

A template is a program and a regular expression may backtrack for years: neither can be stopped inside this process. So
each rendering, and the reading of each text by a tokenizer that is not of a plain kind, happens in a fork of this
process first, which is killed where it exceeds a limit.

function, arguments -> its text, or one error. A fork has everything loaded already and costs milliseconds; a call takes
a tenth of one. The child touches no device and no file.
"""

import contextlib
import gc
import os
import pickle
import resource
import select
import signal
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DataError, Unavailable

CPU_S, CPU_S_PER_MB = 5, 1
"""Seconds that one call may compute, and per megabyte of its arguments; an ordinary rendering takes under 0.001."""
WAIT_FACTOR = 12
"""How many times as long this process waits: a busy machine is not the template's fault."""
MEMORY_BYTES = 1 << 30
"""What a child may take beyond what it was born with."""
TEXT_BYTES, TEXT_FACTOR = 16 << 20, 16
"""Longest answer, and per byte of the arguments."""
_MOST_FILES = 1 << 20
_OK, _REFUSED, _TOO_MUCH = b"0", b"1", b"2"
_HEADER = struct.Struct("<Q")


class Refused(Exception):
    """The function raised an error within its limits; `str()` says which."""


class Bounded:
    """A function that runs in a child of its own, with limits on every call; the child is born at the first one.

    Args:
        function: arguments -> text; called in the fork only, so what it changes is lost.
        what: names it in messages, for example "tokenizer X: the chat template".
        cpu_s, memory_bytes: of one call, and of the child.
    """

    def __init__(
        self, function: Callable[..., str], what: str, *, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._function, self._what = function, what
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._reset()

    def _reset(self) -> None:
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._child: _Child | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_owner", "_child")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __call__(self, *arguments: Any, **options: Any) -> str:
        """Raises: Refused: the function failed. DataError: it exceeded a limit; says which."""
        request = pickle.dumps((arguments, options))
        cpu_s = self._cpu_s + CPU_S_PER_MB * len(request) / 1e6
        if self._owner != os.getpid():  # a fork, perhaps of a moment in which another thread held the lock
            self._reset()
        with self._lock:
            if self._child is None or self._child.owner != os.getpid():
                self._child = _Child(self._function, self._memory_bytes)
            try:
                status, text = self._child.ask(request, cpu_s)
            except BaseException as error:  # an interrupt, too: half an answer must not be taken for the next one
                self._child.end()
                self._child = None
                if not isinstance(error, _Ended):
                    raise
                raise self._exceeded(f"{error}, the limit is {cpu_s:.0f} s of computing") from None
        if status == _TOO_MUCH:
            raise self._exceeded(text)
        if status == _REFUSED:
            raise Refused(text)
        return text

    def _exceeded(self, how: str) -> DataError:
        return DataError(
            f"{self._what} exceeds what it may take ({how}); it is broken, or made to do harm. Use "
            "another checkpoint's, or correct the file"
        )


class _Ended(Exception):
    """The child is no more, or does not answer."""


class _Child:
    """A fork of this process that answers requests until its pipe is closed."""

    def __init__(self, function: Callable[..., str], memory_bytes: int) -> None:
        self.owner = os.getpid()
        (requests, self._to), (self._from, answers) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child uses none of them
            try:
                self.pid = os.fork()
            except OSError as error:
                raise Unavailable(f"no process can be started for a chat template or tokenizer: {error}") from error
        if self.pid == 0:
            try:
                _serve(function, requests, answers, memory_bytes)
            finally:
                os._exit(1)
        os.close(requests)
        os.close(answers)
        self.end = weakref.finalize(self, _end, self.owner, self.pid, self._to, self._from)

    def ask(self, request: bytes, cpu_s: float) -> tuple[bytes, str]:
        """One call. Raises: _Ended: it exceeded a limit."""
        deadline = time.monotonic() + WAIT_FACTOR * cpu_s
        try:
            _write(self._to, _HEADER.pack(round(cpu_s + 0.5)) + _HEADER.pack(len(request)) + request)
            (size,) = _HEADER.unpack(_read(self._from, _HEADER.size, deadline))
            answer = _read(self._from, size, deadline)
        except (BrokenPipeError, EOFError):
            raise _Ended("it ended early, for lack of time or memory") from None
        except TimeoutError:
            raise _Ended("it did not answer in time") from None
        return answer[:1], answer[1:].decode("utf-8", "surrogatepass")


def _end(owner: int, pid: int, *pipes: int) -> None:
    for pipe in pipes:
        os.close(pipe)
    if os.getpid() == owner:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(function: Callable[..., str], requests: int, answers: int, memory_bytes: int) -> None:
    """The child's life: no file but its pipes, no signal but the kernel's, and nothing of the parent is cleaned up."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    low, high = sorted((requests, answers))
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, min(os.sysconf("SC_OPEN_MAX"), _MOST_FILES))
    limit(resource.RLIMIT_CORE, 0)
    if (born_with := address_space()) > 0:  # elsewhere (macOS) memory has no limit, time and length have
        limit(resource.RLIMIT_AS, born_with + memory_bytes)
    while True:
        try:
            (cpu_s,) = _HEADER.unpack(_read(requests, _HEADER.size))
            request = _read(requests, _HEADER.unpack(_read(requests, _HEADER.size))[0])
        except EOFError:
            os._exit(0)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + cpu_s)
        answer = _answered(function, request)
        _write(answers, _HEADER.pack(len(answer)) + answer)


def _answered(function: Callable[..., str], request: bytes) -> bytes:
    try:
        arguments, options = pickle.loads(request)
        text, most = function(*arguments, **options), TEXT_BYTES + TEXT_FACTOR * len(request)
        if len(text) > most:
            return _TOO_MUCH + f"{len(text):,} characters, the limit is {most:,}".encode()
        return _OK + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return _TOO_MUCH + f"the limit of memory is {MEMORY_BYTES / 1e9:.1f} GB".encode()
    except BaseException as error:  # somebody else's program fails as it likes
        with contextlib.suppress(BaseException):
            return _REFUSED + str(error)[:500].encode("utf-8", "surrogatepass")
        return _REFUSED + type(error).__name__.encode()


def limit(kind: int, most: int) -> None:
    """Lower one of this process's limits; a lower one that is there already stays."""
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):  # what a system cannot limit stays unlimited
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def address_space() -> int:
    """Bytes of address space that this process has; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _read(pipe: int, size: int, deadline: float | None = None) -> bytes:
    parts = []
    while size:
        if deadline is not None:
            wait = deadline - time.monotonic()
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            if wait <= 0 or not poll.poll(wait * 1000):
                raise TimeoutError
        part = os.read(pipe, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
