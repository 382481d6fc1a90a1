"""The command line itself: what it imports, how it ends, where it writes."""

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from tide import __version__, cli
from tide.shared.errors import CacheMismatch, OutputError, TryAgain
from tide.shared.progress import dump_progress, train_progress

COMMANDS = [
    "plan", "dump-teacher", "train-student", "inspect-cache", "verify-cache", "repair-cache", "merge-caches",
    "push-cache", "pull-cache", "push-student", "ablate", "generate", "status",
    "cache-to-datasets", "demo", "doctor", "models",
]  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "pyarrow", "matplotlib"}


@pytest.fixture
def tide(monkeypatch, capsys):
    """tide("plan", "--help") -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_help_names_every_command(tide):
    code, out, err = tide("--help")
    assert (code, err) == (0, "")
    assert [name for name in [*COMMANDS, "chat"] if name not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(tide, command):
    code, out, _ = tide(command, "--help")
    assert code == 0
    assert "--json" in out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect-cache", "--help"], ["generate", "--help"], ["chat", "--help"]]
)
def test_help_loads_nothing_heavy(arguments):
    program = (
        "import sys; from tide.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "tide" in done.stderr.split()
    assert not HEAVY & set(done.stderr.split())


def test_version_and_python_m(tide):
    assert tide("--version") == (0, __version__ + "\n", "")
    done = subprocess.run([sys.executable, "-m", "tide", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments", [["plan", "--nonsense"], ["inspect-cache"], ["nonsense"], ["plan", "--recipe", "no"]]
)
def test_a_mistake_in_usage_ends_with_2(tide, arguments):
    code, out, err = tide(*arguments)
    assert (code, out) == (2, "")
    assert err


def raising(error: BaseException):
    def run(*_: object, **__: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(CacheMismatch("made for another"), 65), (OutputError("disk full"), 74), (TryAgain("again"), 75)],
)
def test_an_error_of_tide_is_one_message_and_its_exit_code(tide, monkeypatch, error, code):
    monkeypatch.setattr("tide.shared.doctor.examine", raising(error))
    assert tide("doctor") == (code, "", f"{type(error).__name__}: {error}\n")


def test_a_message_that_quotes_a_stranger_cannot_act(tide, monkeypatch):
    monkeypatch.setattr("tide.shared.doctor.examine", raising(CacheMismatch("\x1b[2Jrow \u202e7")))
    assert tide("doctor")[2] == "CacheMismatch: row �7\n"


def test_an_unexpected_error_shows_where_and_ends_with_1(tide, monkeypatch):
    monkeypatch.setattr("tide.shared.doctor.examine", raising(ZeroDivisionError("zero")))
    code, out, err = tide("doctor")
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "ZeroDivisionError: zero" in err
    assert "bug in tide" in err


def test_no_message_shows_a_token(tide, monkeypatch):
    token = "hf_" + "t" * 34
    for error, ending in [(CacheMismatch(f"Bearer {token}"), 65), (ZeroDivisionError(f"Bearer {token}"), 1)]:
        monkeypatch.setattr("tide.shared.doctor.examine", raising(error))
        code, out, err = tide("doctor")
        assert (code, out) == (ending, "")
        assert "Bearer <token>" in err
        assert token not in err
    assert token not in warnings.formatwarning(UserWarning(token), UserWarning, "file.py", 1)


def test_an_interruption_ends_with_130(tide, monkeypatch):
    monkeypatch.setattr("tide.shared.doctor.examine", raising(KeyboardInterrupt()))
    code, out, err = tide("doctor")
    assert (code, out) == (130, "")
    assert "same command continues" in err


def test_control_c_ends_with_130():
    program = (
        "import sys, time; from tide import cli; from tide.shared import doctor\n"
        "def wait(folder): sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(60)\n"
        "doctor.examine = wait; sys.argv = ['tide', 'doctor']; cli.main()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 130


def test_a_terminal_that_cannot_show_a_character_does_not_end_the_command():
    program = (
        "from rich.text import Text; from tide import cli; from tide.commands.printing import print_text\n"
        "cli.app = lambda: print_text(Text('\u00e9t\u00e9 \u27e6x\u27e7')); cli.main()"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
    assert done.stdout == b"?t? ?x?\n"


def test_a_closed_pipe_is_no_bug(tmp_path):
    command = f"{sys.executable} -m tide --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_progress_in_a_log_is_one_line_per_shard_or_step_on_stderr(tmp_path, capsys, monkeypatch):
    """Rates and the time left count from the first answer and the first shard: loading a teacher tells nothing."""
    times = iter([0.0, 100.0, 101.0, 111.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    with dump_progress(lambda: 4, tmp_path) as report:
        report(0, 1000)
        report(1, 0)
        report(2, 5500)
    monkeypatch.undo()
    with train_progress() as report:
        report({"step": 1200.0, "epoch": 1.5, "loss": 2.34567, "lr": 1e-4})
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "planning" not in line]
    assert out == ""
    assert lines == [
        "shards 1/4  101 s",
        "shards 3/4  500 tokens/s  111 s  about 5 s left",
        "step 1,200  epoch 1.50  loss 2.346  lr 0.0001",
    ]


def test_a_warning_is_one_line(tide):
    tide("--version")
    assert warnings.formatwarning(UserWarning("shard 3 is made again"), UserWarning, "file.py", 1) == (
        "UserWarning: shard 3 is made again\n"
    )


@pytest.mark.parametrize(
    "options, resume",
    [
        ([], True), (["--resume", "auto"], True), (["--resume", "never"], False), (["--no-resume"], False),
        (["--resume", "never", "--no-resume"], False), (["--resume", "o/checkpoints/x"], Path("o/checkpoints/x")),
    ],
)  # fmt: skip
def test_resume_is_automatic_never_or_from_a_checkpoint(tide, monkeypatch, options, resume):
    seen = {}
    monkeypatch.setattr(
        "tide.student_train.trainer.train_student",
        lambda config, cache, out, **more: seen.update(more) or out / "student",
    )
    code, out, _ = tide("train-student", "--cache", "c", "--out", "o", "--student", "s", *options)
    assert code == 0
    assert seen["resume"] == resume
    assert seen["heldout"] is None
    assert "student" in out


def test_contradicting_ways_to_resume_are_refused(tide):
    code, _, err = tide("train-student", "--cache", "c", "--out", "o", "--no-resume", "--resume", "o/checkpoints/x")
    assert code == 2
    assert "exclude each other" in err
