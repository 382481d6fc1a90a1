"""SIGTERM and SIGUSR1 end every long command with exit code 75 at whatever stage, from its first moment on."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tide import cli
from tide.shared import stop_signals
from tide.shared.stop_signals import STOP_SIGNALS, StopAsked, end_on_signals
from tiny_runs import hybrid, make_cache, settings

STAGES = {
    "planning": ("plan", "tide.teacher_dump.plan.open_pairing"),
    "the dump's plan": ("dump-teacher", "tide.teacher_dump.dump.make_plan"),
    "the dump's output": ("dump-teacher", "tide.teacher_dump.dump.open_output"),
    "opening the cache to train": ("train-student", "tide.student_train.trainer.open_cache"),
    "opening the student": ("train-student", "tide.student_train.trainer.open_model"),
    "opening the student's tokenizer": ("train-student", "tide.student_train.trainer.open_encoder"),
    "the first question to a held-out cache": ("train-student", "tide.student_train.trainer.HeldoutQuestions"),
    "verifying": ("verify-cache", "tide.shared.cache.verify.sha256_file"),
    "looking": ("inspect-cache", "tide.shared.cache.inspect.describe_cache"),
    "pulling": ("pull-cache", "tide.shared.cache.pull.pull_cache"),
    "pushing": ("push-cache", "tide.shared.cache.push.push_cache"),
    "evaluating": ("eval", "tide.student_train.evaluate.evaluate_students"),
    "comparing": ("ablate", "tide.student_train.ablation.plan_ablation"),
    "writing": ("generate", "tide.student_train.open_decoder.load_model"),
    "a chat": ("chat", "tide.student_train.open_decoder.load_model"),
    "converting": ("convert", "tide.student_train.convert.local_folder"),
    "the demo": ("demo", "tide.demo.run_demo"),
    "looking at the machine": ("doctor", "tide.shared.doctor.examine"),
}


@pytest.fixture
def before() -> Iterator[None]:
    """Handlers are as they were, whatever a test left: a command that was stopped keeps its own until it ends."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(tiny_root: Path, tmp_path: Path) -> dict[str, list[str]]:
    sets = [item for setting in settings(tiny_root) for item in ("--set", setting)]
    cache, student, out = str(make_cache(tiny_root, "hybrid", hybrid(tiny_root))), str(tiny_root / "student"), tmp_path
    return {
        "plan": sets,
        "dump-teacher": [*sets, "--out", str(out / "cache")],
        "train-student": [*sets, "--cache", cache, "--heldout", cache, "--out", str(out / "run")],
        "verify-cache": [cache],
        "inspect-cache": [cache],
        "pull-cache": ["owner/name", str(out / "pulled")],
        "push-cache": [cache, "owner/name"],
        "eval": ["--student", student, "--out", str(out / "eval")],
        "ablate": [*sets, "--cache", cache, "--heldout", cache, "--out", str(out / "ablation")],
        "generate": ["--student", student, "What?"],
        "chat": ["--student", student],
        "convert": [student, "--out", str(out / "converted")],
        "demo": ["--out", str(out / "demo")],
        "doctor": [],
    }


def asked_by(number: int):
    """Something that takes long, and is asked to end."""

    def run(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:
            pass
        pytest.fail("the signal did nothing")

    return run


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_any_stage_with_75(stage, number, arguments, monkeypatch, capsys, before, tmp_path):
    command, place = STAGES[stage]
    monkeypatch.setattr(place, asked_by(number))
    monkeypatch.setattr(sys, "argv", ["tide", command, *arguments[command]])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(stop_signals, "GRACE_S", 3600.0)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert (ended.value.code, "Traceback" in said) == (75, False), said
    assert f"stopped by {number.name}" in said
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_command_is_stopped_while_it_still_loads(number):
    """As soon as the signal can be handled at all, before the command line is read."""
    program = [sys.executable, "-m", "tide", "dump-teacher", "--recipe", "tide-cross"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        until = time.monotonic() + 60
        while not handles(running.pid, number):
            assert time.monotonic() < until
            time.sleep(0.001)
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75
    assert b"Traceback" not in said


def handles(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("body", ["while True: pass", "signal.pause()", "thread.join()", "hang()"])
def test_what_cannot_be_interrupted_ends_after_the_grace_or_at_the_second_signal(body):
    """`hang` swallows the first signal, as a library's `except BaseException` does."""
    program = f"""
import os, signal, sys, threading, time
from tide.shared import stop_signals
stop_signals.GRACE_S = float(sys.argv[1])
thread = threading.Thread(target=time.sleep, args=(60,))
thread.start()
def hang():
    while True:
        try: time.sleep(60)
        except BaseException: pass
try:
    with stop_signals.end_on_signals():
        print("ready", flush=True)
        {body}
except stop_signals.StopAsked as stop:
    sys.exit(stop.exit_code)
"""
    for grace, signals in (("0.2", 1), ("60", 2)):
        with subprocess.Popen([sys.executable, "-c", program, grace], stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            running.stdout.readline()
            for _ in range(signals):
                running.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert running.wait(30) == 75


def test_a_forked_child_dies_of_the_signal_and_a_block_that_ended_leaves_no_trace(before):
    handler = signal.getsignal(signal.SIGTERM)
    with end_on_signals():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not issubclass(StopAsked, Exception)
