"""A model's code, run where it can do no harm: program -> did it run to its end, or why not.

Every program gets a Python of its own (code_runner.py) inside bubblewrap: own user, process, network, IPC and mount
namespaces; of the machine's files it sees those of Python and of the system's libraries, read-only; it may write to
memory of limited size that is thrown away; memory, time, processes and files are limited. Linux only. Where bubblewrap
does not work nothing is run, unless the caller says that harm is acceptable (`unsafe`, for containers).

A program that speaks this file's protocol from inside the runner's process can claim an end that it did not reach:
scores are safe from accidents, early exits and guesses, not from a model that aims at this very file.
"""

import contextlib
import functools
import hmac
import json
import math
import os
import platform
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..shared.bubblewrap import NAMESPACES, NOBODY, cure, trouble
from ..shared.errors import Unavailable

UNSAFE = "unsafe-inside-container"
"""Value of --allow-code-execution and HF_ALLOW_CODE_EVAL that leaves bubblewrap out."""
_RUNNER = Path(__file__).with_name("code_runner.py")
_PROBE_S = 60.0
_WATCH_S = 0.1
_GONE_S = 30.0
_MAX_SAID = 600
_SCRATCH_BYTES = 64 << 20
_MAX_PROCESSES = 128
_MAX_FILES = 256
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime",
    "/etc/alternatives",
)  # fmt: skip
_OWN_COUNTS = (5, 14)
"""First Linux whose user namespaces count their own processes; before, all of a user's count."""


@dataclass(frozen=True)
class ProgramResult:
    """Args: passed: it ran to its end. reason: otherwise, what ended it."""

    passed: bool
    reason: str


def run_program(source: str, *, time_s: float, memory_mb: int, unsafe: bool = False) -> ProgramResult:
    """Run one program as the official metric does: `exec(source, {})`, with nothing to read on standard input.

    Args:
        source: Python; passes if its last line is reached without an exception.
        time_s: longest time, by the clock. memory_mb: largest address space of a process, and memory of all together.
        unsafe: without bubblewrap: it may do whatever this user may, and only limits and a scratch folder remain.
    Raises: Unavailable: this machine cannot shut a program in.
    """
    way = None if unsafe else _way()
    scratch = tempfile.TemporaryDirectory(prefix="tide-code-") if unsafe else contextlib.nullcontext("/")
    with scratch as folder, contextlib.closing(_Run(way, folder, time_s, memory_mb)) as run:
        return run.outcome(source)


def protection(*, unsafe: bool = False) -> str:
    """What shuts programs in on this machine, in words.

    Raises: Unavailable: nothing does.
    """
    if unsafe:
        return f"nothing ({UNSAFE}): limits on time, memory and size of files alone"
    _way()
    return "bubblewrap"


def _unprotected(why: str) -> Unavailable:
    return Unavailable(
        f"this machine cannot shut a model's code in, so none is run: {why}. Or leave --allow-code-execution out. In a "
        f"container that holds nothing of worth, --allow-code-execution={UNSAFE} runs it without protection"
    )


@functools.cache
def _way() -> tuple[list[str], dict[str, Any]]:
    """The command before the runner's, and as whom it is started: the first way in which a program comes to its end.

    Root becomes nobody. Where nobody may not read the folders of Python, as in /root, a first bubblewrap shows them.
    """
    problem = trouble()
    if problem is not None:
        raise _unprotected(problem)
    bwrap = shutil.which("bwrap") or "bwrap"
    inner = [bwrap, *NAMESPACES, *_view()]
    ways: list[tuple[list[str], dict[str, Any]]] = [(inner, {})]
    if os.geteuid() == 0:
        ways = [(inner, NOBODY), ([*_root_view(bwrap), *inner], {})]
    said = []
    for way in ways:
        with contextlib.closing(_Run(way, "/", _PROBE_S, 1024)) as run:
            outcome = run.outcome("")
            if outcome.passed:
                return way
            said.append(f"{outcome.reason} {run.complaint()}".strip()[:300])
    raise _unprotected(f"the test program did not start ({'; '.join(said)}): {cure()}")


def _packages() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _binds() -> Iterator[str]:
    """What a Python program must be able to read: the system's libraries, this interpreter and its packages.

    Read-only at their own places, below folders that anyone may enter and that hold nothing else.
    """
    python = Path(sys.executable).resolve()
    prefixes = dict.fromkeys([str(python.parents[1]), sys.base_prefix, sys.prefix])
    paths = [str(python.parent), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))]
    paths += [f"{prefix}/{name}" for prefix in prefixes for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    paths += _packages()
    own = [path for path in dict.fromkeys(paths) if not path.startswith(("/usr/", "/bin/", "/lib/", "/lib64/"))]
    for path in filter(os.path.exists, (*_SYSTEM, *own)):
        for folder in reversed(Path(path).parents[:-1]):
            yield from ("--dir", str(folder))
        yield from ("--ro-bind", path, path)


def _view() -> list[str]:
    """Python below a scratch folder stays visible: folders in memory come first, in bubblewrap's order."""
    memory = ["--size", str(_SCRATCH_BYTES), "--perms", "1777", "--tmpfs"]
    return [
        *memory, "/tmp", *memory, "/var/tmp", *_binds(), "--proc", "/proc", "--dev", "/dev", *memory, "/dev/shm",
        "--remount-ro", "/dev", "--chdir", "/tmp", "--remount-ro", "/",
    ]  # fmt: skip


def _root_view(bwrap: str) -> list[str]:
    """As root: a view of those folders that nobody may enter, and then no longer root."""
    return [
        bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--die-with-parent", "--cap-drop", "ALL",
        "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", *_binds(), "--dir", "/tmp", "--bind", "/proc", "/proc",
        "--dev", "/dev", "--remount-ro", "/", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
    ]  # fmt: skip


class _Run:
    """One program's processes, from outside. Args: way: of `_way`; None: no protection. folder: to start in."""

    def __init__(
        self, way: tuple[list[str], dict[str, Any]] | None, folder: str, time_s: float, memory_mb: int
    ) -> None:
        self.shut_in = way is not None
        before, as_whom = way or ([], {})
        self.memory_bytes = memory_mb << 20
        seconds = int(time_s) + 1
        self.limits = {
            "AS": self.memory_bytes, "CPU": seconds, "FSIZE": _SCRATCH_BYTES, "NOFILE": _MAX_FILES, "CORE": 0,
            "MSGQUEUE": 0,
        }  # fmt: skip
        scratch = "/tmp" if self.shut_in else folder
        environment = {"PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}
        # several threads in a library would each take address space, and some fail without it
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.channel, theirs = socket.socketpair()
        told, passed = None, [theirs.fileno()]
        if self.shut_in:
            told, says = os.pipe()
            passed.append(says)
            # by a shell: bubblewrap's own first process, which a program might take over, must be limited as well
            limit = f"ulimit -c 0; ulimit -v {memory_mb << 10}; ulimit -t {seconds}; ulimit -n {_MAX_FILES}; exec "
            before = ["/bin/sh", "-c", limit + '"$@"', "sh", before[0], "--info-fd", str(says), *before[1:]]
        python = os.path.realpath(sys.executable) if self.shut_in else sys.executable
        self.complaints, complains = os.pipe()
        os.set_blocking(self.complaints, False)
        try:
            self.process = subprocess.Popen(
                [*before, python, "-I", "-c", _RUNNER.read_text(), str(theirs.fileno())], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=complains, env=environment, cwd=folder, start_new_session=True,
                pass_fds=passed, **as_whom,
            )  # fmt: skip
        finally:
            theirs.close()
            for descriptor in (complains, *passed[1:]):
                os.close(descriptor)
        self.first: int | None = self.process.pid
        if told is not None:
            with open(told, "rb") as file:
                number = re.search(rb'"child-pid":\s*(\d+)', file.read())
            self.first = int(number[1]) if number else None
        self.watched: int | None = None
        if self.first is not None:
            with contextlib.suppress(ProcessLookupError):
                self.watched = os.pidfd_open(self.first)
        self.until = time.monotonic() + time_s

    def outcome(self, source: str) -> ProgramResult:
        """Let it run, and listen."""
        if self.first is None:
            return ProgramResult(False, f"did not start: {self.complaint()}")
        key = secrets.token_bytes(32)
        limits = self.limits | {"NPROC": _MAX_PROCESSES + self._processes_of_others()}
        asked = {"source": source, "key": key.hex(), "limits": limits, "paths": _packages()}
        request = json.dumps(asked).encode()
        try:
            self.channel.settimeout(max(0.01, self.until - time.monotonic()))
            self.channel.sendall(len(request).to_bytes(8, "big") + request)
            said = self._said()
            if isinstance(said, bytes) and said.startswith(b"!"):
                return ProgramResult(False, said[1:].decode(errors="replace"))
            question = secrets.token_bytes(32)
            if said == b".":
                self.channel.sendall(question)
                said = self._said()
            if isinstance(said, ProgramResult):
                return said
        except (TimeoutError, ConnectionError):
            return ProgramResult(False, self._ended())
        right = hmac.compare_digest(said, hmac.digest(key, question, "sha256"))
        return ProgramResult(True, "") if right else ProgramResult(False, "wrote to the runner's own channel")

    def _said(self) -> bytes | ProgramResult:
        """The next message; or how it ended without one."""
        watch = select.poll()
        watch.register(self.channel, select.POLLIN)
        if self.watched is not None:
            watch.register(self.watched, select.POLLIN)
        while True:
            left = self.until - time.monotonic()
            if left <= 0:
                return ProgramResult(False, "out of time")
            ready = dict(watch.poll(1000 * min(left, _WATCH_S)))
            if self.channel.fileno() in ready:
                return self.channel.recv(_MAX_SAID) or ProgramResult(False, self._ended())
            # the first process of the namespace may live on with a daemon
            if ready or self.process.poll() is not None:
                return ProgramResult(False, self._ended())
            excess = self._excess()
            if excess is not None:
                return ProgramResult(False, excess)

    def _ended(self) -> str:
        if time.monotonic() >= self.until:
            return "out of time"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"ended early with exit code {self.process.wait(1.0)}"
        return "ended early"

    def _excess(self) -> str | None:
        """Limits of a process do not bound their sum, which is looked at while the program runs."""
        tree = descendants(self.first) if self.first is not None else []
        threads = resident = proportional = 0
        for process in tree:
            with contextlib.suppress(psutil.Error):
                threads += process.num_threads()
                resident += process.memory_info().rss
        if threads > 2 * _MAX_PROCESSES:
            return f"more than {2 * _MAX_PROCESSES} processes"
        if resident <= self.memory_bytes:
            return None
        for process in tree:  # forks share what they did not change, which is divided among them
            with contextlib.suppress(psutil.NoSuchProcess):
                try:
                    proportional += process.memory_full_info().pss
                except psutil.AccessDenied:
                    proportional += process.memory_info().rss
        if proportional <= self.memory_bytes:
            return None
        return f"more than {self.memory_bytes >> 20} MB of memory in all its processes"

    def _processes_of_others(self) -> int:
        """How many of the user's processes count as the program's own."""
        version = re.match(r"(\d+)\.(\d+)", platform.release())
        if self.shut_in and version and (int(version[1]), int(version[2])) >= _OWN_COUNTS:
            return 0
        user = 65534 if self.shut_in and os.geteuid() == 0 else os.geteuid()
        return sum(
            process.info["num_threads"] or 0 for process in psutil.process_iter(["uids", "num_threads"])
            if process.info["uids"] and process.info["uids"].real == user
        )  # fmt: skip

    def complaint(self) -> str:
        """What was written to standard error before the program began."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self.complaints, 2000).decode(errors="replace").strip()
        return ""

    def close(self) -> None:
        """Kill what is left and wait until it is gone: with the namespace's first process go all others."""
        if not self.shut_in:
            for process in descendants(self.process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.watched is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.watched, signal.SIGKILL)
            gone = select.poll()
            gone.register(self.watched, select.POLLIN)
            gone.poll(1000 * _GONE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GONE_S if self.watched is not None else 1.0)
        self.process.kill()
        self.process.wait()
        if self.shut_in and self.first is not None:  # an orphan of bubblewrap's, where this process inherits orphans
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.first, os.WNOHANG)
        self.channel.close()
        os.close(self.complaints)
        if self.watched is not None:
            os.close(self.watched)


def descendants(first: int) -> list[psutil.Process]:
    """A process and all that came of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(first)
        return [process, *process.children(recursive=True)]
    return []


class CodeEval:
    """Stands in for `evaluate.load("code_eval")`, which would fetch a metric that runs code in this very process.

    Args:
        time_s, memory_mb: of every program. allowed: may anything be run? If not, `compute` says how to allow it.
        unsafe: without bubblewrap.
    """

    def __init__(self, *, time_s: float, memory_mb: int, allowed: bool, unsafe: bool = False) -> None:
        self.time_s, self.memory_mb, self.allowed, self.unsafe = time_s, memory_mb, allowed, unsafe

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k of every problem, averaged, and what became of each completion.

        Args:
            references: the test of each problem. predictions: its completions.
            k: with n completions of which c pass, 1 - C(n - c, k) / C(n, k).
        Raises: Unavailable: code is not allowed to run, or cannot be shut in.
        """
        if not self.allowed:
            raise Unavailable(
                "this benchmark runs code that a model wrote: allow it with tide eval --allow-code-execution, or for "
                "lm-eval's own command with HF_ALLOW_CODE_EVAL=1 in the environment"
            )
        protection(unsafe=self.unsafe)  # a machine without the means must not look like a model without the skill
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (test, completions) in enumerate(zip(references, predictions, strict=True)):
            details[problem] = []
            for number, completion in enumerate(completions):
                program = f"{completion}\n{test}"
                outcome = run_program(program, time_s=self.time_s, memory_mb=self.memory_mb, unsafe=self.unsafe)
                details[problem].append((number, {"passed": outcome.passed, "result": outcome.reason or "passed"}))
        scores = {}
        for wanted in k:
            counts = [(len(tried), sum(not one["passed"] for _, one in tried)) for tried in details.values()]
            if all(num >= wanted for num, _ in counts):
                each = [1 - math.comb(failed, wanted) / math.comb(num, wanted) for num, failed in counts]
                scores[f"pass@{wanted}"] = sum(each) / max(1, len(each))
        return scores, details
