"""Programs in the sandbox: honest ones score as under `exec(program, {})`, forged ends fail, hostile ones do no harm.

Tests that need bubblewrap skip without it; what is refused then is a test as well.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from honest_programs import DISHONEST, HONEST
from hostile_programs import FORGERIES, KINDS
from hostile_scene import BITES_UNSAFE
from tide.shared import bubblewrap
from tide.shared.errors import Unavailable
from tide.student_train import code_runner, code_sandbox
from tide.student_train.code_sandbox import UNSAFE, CodeEval, ProgramResult, protection, run_program

TESTS = Path(__file__).parent
DATA = TESTS.parents[2] / "shared" / "data"
TROUBLE = bubblewrap.trouble()
shut_in = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone")
TWIN = (
    "import json, sys\nprogram = json.loads(sys.argv[1])\ntry:\n    exec(program, {})\n"
    "except BaseException:\n    sys.exit(1)\nimport os\nos._exit(0)\n"
)


def outcome(program: str, *, time_s: float = 30.0, unsafe: bool = False) -> tuple[bool, str]:
    """Passed or not, and why not; patient, because a busy machine starts interpreters slowly."""
    result = run_program(program, time_s=time_s, memory_mb=1024, unsafe=unsafe)
    return result.passed, result.reason


@shut_in
@pytest.mark.parametrize("name", [*HONEST, *DISHONEST])
def test_a_program_scores_as_under_a_plain_exec(name, tmp_path):
    program = (HONEST | DISHONEST)[name]
    twin = subprocess.run(
        [sys.executable, "-I", "-c", TWIN, json.dumps(program)], stdin=subprocess.DEVNULL, capture_output=True,
        cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    assert (twin.returncode == 0) == (name in HONEST), "the list itself"
    passed, reason = outcome(program)
    assert passed == (name in HONEST), reason
    assert outcome(program, unsafe=True)[0] == passed


@shut_in
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_end_does_not_pass(name):
    passed, reason = outcome(FORGERIES[name], time_s=2.0)
    assert not passed
    assert reason


@shut_in
def test_what_ended_a_program_is_said():
    channel = (
        "import os, time\nthere = '/proc/self/fd/'\n"
        "open_ones = [f for f in os.listdir(there) if os.path.exists(there + f)]\nchannel = max(map(int, open_ones))\n"
    )
    for program, reason in (
        ("assert 1 == 2, 'why'", "AssertionError: why"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(7)", "ended early with exit code 7"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        (f"{channel}os.write(channel, b'.')\ntime.sleep(20)", "out of time"),
        (
            f"{channel}os.write(channel, b'.')\nos.write(channel, bytes(32))\ntime.sleep(20)",
            "wrote to the runner's own",
        ),
        (f"{channel}os.write(channel, b'passed')\ntime.sleep(20)", "wrote to the runner's own"),
    ):
        passed, said = outcome(program, time_s=3.0 if reason == "out of time" else 30.0)
        assert not passed
        assert said.startswith(reason), (program, said)
    start = time.monotonic()
    assert outcome("while True: pass", time_s=1.0) == (False, "out of time")
    assert time.monotonic() - start < 20


def run_scene(folder: Path, *, unsafe: bool = False, before: tuple[str, ...] = ()) -> dict:
    """hostile_scene.py in a process of its own."""
    command = [*before, sys.executable, str(TESTS / "hostile_scene.py"), str(folder), *(["unsafe"] if unsafe else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@shut_in
def test_a_hundred_hostile_programs_change_nothing_outside(tmp_path):
    found = run_scene(tmp_path)
    assert found["ran"] == sum(len(programs) for programs in KINDS.values()) >= 100
    assert found["changed"] == {}
    assert found["user"] == os.geteuid()


@pytest.fixture
def as_nobody() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A folder of the user nobody, and what makes nobody run a command, with Python in a home closed to others too."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can become an ordinary user")
    command = ["bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev"]
    for path in (Path(sys.executable).resolve().parents[1], Path(sys.prefix), TESTS.parents[1]):
        for closed in [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001][:1]:
            command += ["--tmpfs", str(closed)]
            for below in [folder for folder in reversed(path.parents) if closed in folder.parents]:
                command += ["--dir", str(below)]
            command += ["--ro-bind", str(path), str(path)]
    folder = Path("/var/tmp") / f"tide-nobody-{os.getpid()}"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    yield folder, (*command, "--chdir", "/", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    shutil.rmtree(folder)


@shut_in
@pytest.mark.slow
def test_a_hundred_hostile_programs_change_nothing_for_an_ordinary_user(as_nobody):
    folder, before = as_nobody
    found = run_scene(folder, before=before)
    assert found["user"] == 65534
    assert found["ran"] >= 100
    assert found["changed"] == {}


@linux
def test_the_scene_notices_what_is_changed_without_bubblewrap(tmp_path):
    found = run_scene(tmp_path, unsafe=True)
    assert sorted(found["changed"]) == sorted(BITES_UNSAFE)


@shut_in
def test_a_program_sees_python_and_no_homes_and_no_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert outcome("import os\nassert 'HF_TOKEN' not in os.environ, dict(os.environ)") == (True, "")
    assert outcome("import sys\nassert sys.flags.isolated and sys.argv == [''], sys.argv") == (True, "")
    hidden = [str(TESTS.parents[1] / "README.md"), "/etc/passwd", "/run", "/var/log", "/sys", "/home", "/boot"]
    assert outcome(f"import os\nfor p in {hidden}: assert not os.path.exists(p), p") == (True, "")
    whose = os.geteuid() or 65534
    assert outcome(f"import os\nassert os.getpid() < 9 and os.getuid() == {whose}, os.getuid()") == (True, "")
    assert outcome("assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()") == (True, "")


@shut_in
def test_nothing_is_left_behind():
    outcome("")
    descriptors = sorted(os.listdir("/proc/self/fd"))
    known = code_sandbox.descendants(os.getpid())
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)"
    assert outcome(daemon) == (True, "")
    assert not outcome("while True: pass", time_s=0.5)[0]
    assert code_sandbox.descendants(os.getpid()) == known
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


@shut_in
def test_memory_of_all_processes_together_is_bounded():
    program = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(90 << 20)\n"
        "        time.sleep(20)\ntime.sleep(20)"
    )
    ended = run_program(program, time_s=30.0, memory_mb=400)
    assert ended.reason == "more than 400 MB of memory in all its processes"
    shared = "x = bytearray(150 << 20)\n" + program.replace("        x = bytearray(90 << 20)\n", "").replace(
        "20)", "1)"
    )
    assert run_program(shared.replace("<< 1)", "<< 20)"), time_s=30.0, memory_mb=400) == ProgramResult(True, ""), (
        "forks share"
    )


def solved() -> list[str]:
    """HumanEval's and MBPP's own answers, with their tests."""
    if not DATA.exists():
        pytest.skip("the data sets are not beside the project")
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    programs = [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})" for row in rows
    ]
    for row in map(json.loads, (DATA / "mbpp.jsonl").read_text().splitlines()):
        programs.append("\n".join([row["code"], row["test_setup_code"], *row["test_list"]]))
    return programs


@shut_in
@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_and_mbpp_pass():
    programs = solved()
    assert len(programs) == 164 + 974
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda program: run_program(program, time_s=30.0, memory_mb=1024), programs))
    assert [(number, end.reason) for number, end in enumerate(ended) if not end.passed] == []


@shut_in
def test_some_canonical_solutions_pass():
    for program in solved()[::97]:
        assert outcome(program) == (True, "")


@pytest.fixture
def without_bwrap(monkeypatch, tmp_path) -> Iterator[Path]:
    """A machine whose PATH is one empty folder."""
    code_sandbox._way.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    code_sandbox._way.cache_clear()


@linux
def test_without_bubblewrap_nothing_runs_and_the_line_that_installs_it_is_said(without_bwrap):
    for attempt in (
        protection,
        lambda: run_program("x = 1", time_s=9.0, memory_mb=512),
        lambda: CodeEval(time_s=9.0, memory_mb=512, allowed=True).compute(references=["pass"], predictions=[["pass"]]),
    ):
        with pytest.raises(Unavailable) as error:
            attempt()
        cures = (
            "apt-get install bubblewrap",
            "dnf install",
            "pacman -S",
            "apk add",
            f"--allow-code-execution={UNSAFE}",
        )
        for part in cures:
            assert part in str(error.value)


@linux
def test_a_bubblewrap_that_does_not_work_is_refused_with_the_cure(monkeypatch, tmp_path):
    switch = tmp_path / "switch"
    switch.write_text("1\n")
    monkeypatch.setattr(bubblewrap, "_SWITCHES", {str(switch): ("1", "turn the switch")})
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: f"/usr/bin/{name}")
    version = "bubblewrap 0.6.1"

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        if command[1] == "--version":
            return subprocess.CompletedProcess(command, 0, version, "")
        return subprocess.CompletedProcess(command, 1, "", "bwrap: setting up uid map: Permission denied")

    monkeypatch.setattr(bubblewrap.subprocess, "run", run)
    assert "0.8 or newer is needed, and /usr/bin/bwrap is bubblewrap 0.6.1" in str(bubblewrap.trouble())
    version = "bubblewrap 0.9.0"
    assert "setting up uid map: Permission denied): turn the switch" in str(bubblewrap.trouble())
    switch.write_text("0\n")
    assert "seccomp=unconfined" in str(bubblewrap.trouble())


@linux
def test_inside_a_container_programs_run_without_protection_when_that_is_said_in_words(without_bwrap):
    assert UNSAFE in protection(unsafe=True)
    assert outcome("x = 1", unsafe=True) == (True, "")
    assert outcome("while True: pass", time_s=1.0, unsafe=True) == (False, "out of time")
    assert outcome("x = bytearray(2 << 30)", unsafe=True)[1].startswith("MemoryError")
    written = "open('left', 'w')\nimport os\nassert os.getcwd() == os.environ['HOME']"
    assert outcome(written, unsafe=True) == (True, "")
    metric = CodeEval(time_s=30.0, memory_mb=1024, allowed=True, unsafe=True)
    assert metric.compute(references=["assert f"], predictions=[["f = 1"]])[0] == {"pass@1": 1.0}


@shut_in
def test_a_runner_that_does_not_start_is_no_failure_of_the_model(tmp_path, monkeypatch):
    (tmp_path / "runner.py").write_text("raise SystemExit(3)")
    code_sandbox._way.cache_clear()
    monkeypatch.setattr(code_sandbox, "_RUNNER", tmp_path / "runner.py")
    with pytest.raises(Unavailable, match="did not start"):
        CodeEval(time_s=30.0, memory_mb=512, allowed=True).compute(references=["pass"], predictions=[["pass"]])


def test_limits_are_not_raised_above_the_users_own():
    code = (
        "import resource, sys\nsys.path.insert(0, sys.argv[1])\nfrom code_runner import limit_resources\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "limit_resources({'NOFILE': 90, 'CORE': 0, 'MSGQUEUE': 0})\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    folder = str(Path(code_runner.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "(40, 40) (0, 0)\n"


@shut_in
def test_pass_at_k_by_hand():
    metric = CodeEval(time_s=30.0, memory_mb=512, allowed=True)
    good, bad = "def f(): return 1", "def f(): return 2"
    scores, details = metric.compute(references=["assert f() == 1"], predictions=[[good, bad, bad]], k=[1, 2, 4])
    assert scores == pytest.approx({"pass@1": 1 / 3, "pass@2": 1 - 1 / 3})  # 1 of 3 pairs holds no good one
    assert [entry["passed"] for _, entry in details[0]] == [True, False, False]


def test_without_leave_nothing_runs():
    with pytest.raises(Unavailable, match="--allow-code-execution"):
        CodeEval(time_s=1.0, memory_mb=512, allowed=False).compute(references=["pass"], predictions=[["pass"]])
