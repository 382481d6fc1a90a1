"""A hostile completion harms nothing and scores as a failure: bounded stand-ins, each tried against every protection.

The stand-ins are harmless where a protection fails: a few dozen children that end at once, one planted file, a socket
on the loopback interface, a loop that a time limit ends, and memory against a small limit.
"""

import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tide.shared.errors import Unavailable
from tide.student_train import code_sandbox
from tide.student_train.code_sandbox import CodeEval, protection, run_program

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="the sandbox is Linux alone"
)
WITHOUT = {"namespaces": "hide_the_world", "Landlock": "write_nowhere_but"}


@pytest.fixture(scope="module", autouse=True)
def some_protection() -> None:
    """Skips where a machine has none."""
    try:
        protection()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=["all", *WITHOUT])
def shut_in(request, tmp_path, monkeypatch) -> str:
    """With every protection, and without each of the two that a machine may lack."""
    missing = request.param
    if missing != "all":
        runner = tmp_path / "runner.py"
        folder = str(Path(code_sandbox.__file__).parent)
        runner.write_text(
            f"import sys\nsys.path.insert(0, {folder!r})\nimport code_runner\n"
            f"code_runner.{WITHOUT[missing]} = lambda scratch: 'left out'\ncode_runner.main()\n"
        )
        monkeypatch.setattr(code_sandbox, "_RUNNER", runner)
    try:
        said = protection()
    except Unavailable as error:
        pytest.skip(str(error))
    assert missing == "all" or "left out" in said
    return missing


def outcome(program: str, *, time_s: float = 30.0) -> tuple[bool, str]:
    """Passed or not, and why not; patient, because a busy machine starts interpreters slowly."""
    result = run_program(program, time_s=time_s, memory_mb=512)
    return result.passed, result.reason


def test_honest_programs_pass(shut_in):
    assert outcome("import math, re, collections\nassert math.gcd(12, 18) == 6") == (True, "")
    written = "open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'"
    assert outcome(written) == (True, ""), "there is a scratch folder"
    threads = "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()"
    assert outcome(threads) == (True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended early"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("", ""),
    ],
)
def test_a_program_passes_only_at_its_last_line(program, reason):
    passed, said = outcome(program)
    assert passed == (program == "")
    assert said.startswith(reason)


def test_planted_files_survive(shut_in, tmp_path):
    planted = tmp_path / "planted"
    planted.write_text("still here")
    planted.chmod(0o644)
    for action in (
        f"os.remove({str(planted)!r})", f"open({str(planted)!r}, 'w')", f"os.truncate({str(planted)!r}, 0)",
        f"os.rename({str(planted)!r}, {str(planted) + '2'!r})", f"os.chmod({str(planted)!r}, 0)",
        f"os.utime({str(planted)!r}, (0, 0))", f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.symlink('/', {str(tmp_path / 'link')!r})",
    ):  # fmt: skip
        passed, reason = outcome(f"import os\n{action}")
        assert not passed, action
        assert reason.startswith(("PermissionError", "OSError: [Errno 30]")), (action, reason)
    assert planted.read_text() == "still here"
    assert planted.stat().st_mode & 0o777 == 0o644
    assert {p.name for p in tmp_path.iterdir()} <= {"planted", "runner.py"}


def test_no_children_and_no_signals(shut_in):
    children = "import os\nfor _ in range(36):\n    if os.fork() == 0: os._exit(0)"
    assert outcome(children)[1].startswith("PermissionError")
    assert outcome("import subprocess\nsubprocess.run(['true'])")[1].startswith("PermissionError")
    swallowed = "import os\ntry:\n    os.fork()\nexcept OSError:\n    refused = True\nassert refused"
    assert outcome(swallowed) == (True, "")
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert outcome(f"import os\nos.kill({bystander.pid}, 9)")[1].startswith("PermissionError")
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=30)
    assert bystander.returncode == 0


def test_no_network(shut_in):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        passed, reason = outcome(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        assert not passed
        assert reason.startswith("PermissionError")
        with pytest.raises(TimeoutError):
            server.accept()


def test_endless_programs_are_ended():
    start = time.monotonic()
    assert outcome("while True: pass", time_s=1.0) == (False, "out of time")
    assert outcome("import time\ntime.sleep(60)", time_s=1.0) == (False, "out of time")
    assert time.monotonic() - start < 20


def test_memory_and_files_are_bounded(shut_in):
    assert outcome("x = bytearray(600 << 20)")[1].startswith("MemoryError")
    assert not outcome("x = []\nwhile True: x.append(bytearray(1 << 20))")[0]
    large = "f = open('large', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))"
    assert not outcome(large)[0]


def test_the_environment_is_clean_and_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(code_sandbox.tempfile, "tempdir", str(tmp_path))
    assert outcome("import os\nassert 'HF_TOKEN' not in os.environ, dict(os.environ)") == (True, "")
    assert outcome("import sys\nassert sys.flags.isolated") == (True, "")
    assert outcome("open('left', 'w').write('x')\nassert 0")[1] == "AssertionError: "
    assert not list(tmp_path.iterdir())


def test_a_machine_without_protection_runs_nothing(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    runner = tmp_path / "runner.py"
    runner.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(code_sandbox.__file__).parent)!r})\nimport code_runner\n"
        "code_runner.hide_the_world = code_runner.write_nowhere_but = lambda scratch: 'not here'\ncode_runner.main()\n"
    )
    monkeypatch.setattr(code_sandbox, "_RUNNER", runner)
    with pytest.raises(Unavailable, match=r"cannot shut a model's code in \(not here; not here\)"):
        protection()
    with pytest.raises(Unavailable, match="so none is run"):
        run_program(f"open({str(marker)!r}, 'w')", time_s=30.0, memory_mb=512)
    assert not marker.exists()


def test_a_runner_that_does_not_start_is_no_failure_of_the_model(tmp_path, monkeypatch):
    (tmp_path / "runner.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(code_sandbox, "_RUNNER", tmp_path / "runner.py")
    with pytest.raises(Unavailable, match="did not start"):
        CodeEval(time_s=30.0, memory_mb=512, allowed=True).compute(references=["pass"], predictions=[["pass"]])


def test_pass_at_k_by_hand():
    metric = CodeEval(time_s=30.0, memory_mb=512, allowed=True)
    good, bad = "def f(): return 1", "def f(): return 2"
    scores, details = metric.compute(references=["assert f() == 1"], predictions=[[good, bad, bad]], k=[1, 2, 4])
    assert scores == pytest.approx({"pass@1": 1 / 3, "pass@2": 1 - 1 / 3})  # 1 of 3 pairs holds no good one
    assert [entry["passed"] for _, entry in details[0]] == [True, False, False]


def test_without_leave_nothing_runs():
    with pytest.raises(Unavailable, match="--allow-code-execution"):
        CodeEval(time_s=1.0, memory_mb=512, allowed=False).compute(references=["pass"], predictions=[["pass"]])
