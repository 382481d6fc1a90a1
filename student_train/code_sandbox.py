"""A model's code, run where it can do no harm: program -> did it run to its end, or why not.

Every program gets a process of its own (code_runner.py) without network, further processes or signals to others, with
bounded time, memory and files; it may read what this user may read, write to a scratch folder that is thrown away, and
nothing else. Linux only, on x86-64 and 64-bit Arm, by what any user may do there: user namespaces where the machine
allows them, Landlock, and a filter of system calls. Where neither of the first two is to be had, nothing is run.

A program that looks for the proof of its end in the memory of its own process could forge it: scores are safe from
accidents and from early exits, not from a model that aims at this very file.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.errors import Unavailable

_RUNNER = Path(__file__).with_name("code_runner.py")
_PROBE_S = 60.0
_MAX_WORD = 600


@dataclass(frozen=True)
class Outcome:
    """Args: passed: it ran to its end. reason: otherwise, what ended it."""

    passed: bool
    reason: str


def run_program(source: str, *, time_s: float, memory_mb: int) -> Outcome:
    """Run one program.

    Args:
        source: Python; passes if its last line is reached without an exception.
        time_s: longest time, by the clock. memory_mb: largest address space.
    Raises: Unavailable: this machine cannot shut a program in.
    """
    word = secrets.token_hex(16)
    ended, said = _run(source, word, time_s, memory_mb)
    if said == word:
        return Outcome(True, "")
    if said.startswith("unprotected: "):
        raise _unprotected(said.removeprefix("unprotected: "))
    return Outcome(False, "out of time" if ended is None else said or f"ended early with exit code {ended}")


def protection() -> str:
    """What shuts programs in on this machine, in words.

    Raises: Unavailable: nothing does.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise _unprotected(f"it is {sys.platform} on {platform.machine()}, and Linux on x86-64 or Arm is needed")
    _, said = _run(None, "", _PROBE_S, 1024)
    if not said.startswith("namespaces: "):
        raise _unprotected(said.removeprefix("unprotected: ") or "the test program did not start")
    return f"filter of system calls: yes; {said}"


def _unprotected(why: str) -> Unavailable:
    return Unavailable(
        f"this machine cannot shut a model's code in ({why}), so none is run. Leave --allow-code-execution out, or "
        "evaluate on a machine with user namespaces or Landlock"
    )


def _run(source: str | None, word: str, time_s: float, memory_mb: int) -> tuple[int | None, str]:
    """Exit code, None: out of time; and what was left in the result file."""
    with tempfile.TemporaryDirectory(prefix="tide-code-") as folder, tempfile.TemporaryFile("w+") as request:
        scratch, result = Path(folder) / "scratch", Path(folder) / "result"
        scratch.mkdir(mode=0o700)
        result.touch(mode=0o600)
        asked = {
            "source": source, "word": word, "scratch": str(scratch), "result": str(result), "time_s": time_s,
            "memory_mb": memory_mb,
        }  # fmt: skip
        json.dump(asked, request)
        request.seek(0)
        environment = {"PATH": os.defpath, "HOME": str(scratch), "TMPDIR": str(scratch), "LANG": "C.UTF-8"}
        # several threads in a library would each take address space, and some fail without it
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER)], stdin=request, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment, cwd=scratch, start_new_session=True,
        )  # fmt: skip
        ended: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = process.wait(timeout=time_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with open(result, "rb") as file:
            return ended, file.read(_MAX_WORD).decode(errors="replace")


class CodeEval:
    """Stands in for `evaluate.load("code_eval")`, which would fetch a metric that runs code in this very process.

    Args: time_s, memory_mb: of every program. allowed: may anything be run? If not, `compute` says how to allow it.
    """

    def __init__(self, *, time_s: float, memory_mb: int, allowed: bool) -> None:
        self.time_s, self.memory_mb, self.allowed = time_s, memory_mb, allowed
        self._probed = False

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
        if not self._probed:  # a machine without the means must not look like a model without the skill
            protection()
            self._probed = True
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (test, completions) in enumerate(zip(references, predictions, strict=True)):
            details[problem] = []
            for number, completion in enumerate(completions):
                outcome = run_program(f"{completion}\n{test}", time_s=self.time_s, memory_mb=self.memory_mb)
                details[problem].append((number, {"passed": outcome.passed, "result": outcome.reason or "passed"}))
        scores = {}
        for wanted in k:
            each = [_pass_at_k([d["passed"] for _, d in details[p]], wanted) for p in details]
            if all(value is not None for value in each):
                scores[f"pass@{wanted}"] = sum(value or 0.0 for value in each) / max(1, len(each))
        return scores, details


def _pass_at_k(passed: Sequence[bool], k: int) -> float | None:
    """None: fewer completions than k."""
    if len(passed) < k:
        return None
    failed, none_passes = passed.count(False), 1.0
    for drawn in range(k):
        none_passes *= max(0, failed - drawn) / (len(passed) - drawn)
    return 1.0 - none_passes
