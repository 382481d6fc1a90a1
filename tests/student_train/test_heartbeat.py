"""A process that dies, stops, fails or waits for ever ends the whole run, with its name, in good time.

The first tests fork ranks from one process that has torch loaded, with short limits, all cases at once; the slow ones
run the command with the limits that users have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tide.shared.errors import TryAgain
from tide.student_train import heartbeat
from tide.student_train.heartbeat import Heartbeat
from tiny_runs import settings
from training_ranks import free_ports, rank_environment

CASES = {"killed": 1, "killed-first": 0, "stopped": 1, "failed": 1, "failed-first": 0, "stuck": 1, "fine": None}
"""What happens to which of three ranks."""

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from tide.shared.config import TrainConfig
from tide.shared.errors import OutputError, TideError
from tide.student_train import heartbeat
from tide.student_train.heartbeat import Heartbeat
from tide.student_train.processes import join_processes, on_any_process

heartbeat.BEAT_S, heartbeat.SILENCE_S, heartbeat.SUSPICION_S, heartbeat.GRACE_S = 0.2, 4.0, 1.5, 1.0
job = json.loads(sys.argv[1])


def suffer(case):
    if case.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if case.startswith("failed"):
        raise OutputError("the disk is full")
    time.sleep(60)


def train(case, victim, limit_s):
    accelerator = join_processes(TrainConfig(precision="fp32", collective_timeout_s=limit_s), Path("unused"))
    with Heartbeat(accelerator, timeout_s=limit_s):
        for step in range(15):
            time.sleep(0.1)
            if step == 10 and accelerator.process_index == victim:
                suffer(case)
            assert not on_any_process(accelerator, False)


def rank(case, victim, number, environment, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    try:
        train(case, victim, 8.0 if case == "stuck" else 60.0)
        os._exit(0)
    except TideError as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(error.exit_code)


children = {}
for name, case in job.items():
    for number, environment in enumerate(case["environments"]):
        child = os.fork()
        if not child:
            rank(name, case["victim"], number, environment, case["logs"][number])
        children[child] = name, number
start, ends = time.monotonic(), []
stopped = {child for child, (name, number) in children.items() if name in ("stopped", "stuck") and number == 1}
while set(children) - stopped:
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        ends.append([*children.pop(child), os.waitstatus_to_exitcode(status), time.monotonic() - start])
        stopped.discard(child)
    assert time.monotonic() < start + 50, children
    time.sleep(0.02)
for child in stopped:
    os.kill(child, signal.SIGKILL)
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, SimpleNamespace]]:
    """By case and rank: code, seconds and what was said on stderr."""
    folder = tmp_path_factory.mktemp("heartbeat")
    job: dict[str, Any] = {}
    for (name, victim), port in zip(CASES.items(), free_ports(len(CASES)), strict=True):
        logs = [str(folder / f"{name}-{rank}.log") for rank in range(3)]
        environments = [rank_environment(rank, 3, port) for rank in range(3)]
        job[name] = {"victim": victim, "logs": logs, "environments": environments}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(job)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, dict[int, SimpleNamespace]] = {name: {} for name in CASES}
    for name, rank, code, seconds in json.loads(done.stdout):
        said = Path(job[name]["logs"][rank]).read_text()
        found[name][rank] = SimpleNamespace(code=code, seconds=seconds, said=said)
    return found


@pytest.mark.parametrize("case", ["killed", "killed-first", "stopped"])
def test_every_other_process_names_the_one_that_died_and_can_be_tried_again(ends: dict, case: str) -> None:
    others = [end for rank, end in ends[case].items() if rank != CASES[case]]
    assert len(others) == 2
    for end in others:
        assert end.code == 75, end.said
        assert f"TryAgain: rank {CASES[case]} (host " in end.said
        assert "died: no sign of life for" in end.said
        assert "Run the same command again" in end.said


@pytest.mark.parametrize("case", ["failed", "failed-first"])
def test_the_error_of_one_process_is_the_message_and_the_code_of_all(ends: dict, case: str) -> None:
    assert ends[case][CASES[case]].said.endswith("OutputError: the disk is full")
    for end in ends[case].values():
        assert end.code == 74, end.said
        assert "OutputError: the disk is full" in end.said
    others = [end for rank, end in ends[case].items() if rank != CASES[case]]
    assert all(f"rank {CASES[case]} (host " in end.said and ") failed:" in end.said for end in others)


def test_a_store_that_does_not_answer_the_first_question_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def clone(self) -> None:
            raise torch.distributed.DistNetworkError("The client socket has timed out")

    monkeypatch.setattr(heartbeat, "on_main", lambda accelerator, decide: decide())
    monkeypatch.setattr(heartbeat.distributed_c10d, "_get_default_store", Silent)
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=2)
    with pytest.raises(TryAgain, match=r"train\.collective_timeout_s = 3 s \(The client socket has timed out\)"):
        Heartbeat(accelerator, timeout_s=3).__enter__()


def test_a_wait_for_a_living_process_ends_at_the_time_limit_and_says_which_setting_it_is(ends: dict) -> None:
    for rank in (0, 2):
        assert ends["stuck"][rank].code == 75, ends["stuck"][rank].said
        assert "train.collective_timeout_s = 8 s" in ends["stuck"][rank].said


def test_a_run_that_is_fine_ends_in_silence(ends: dict) -> None:
    assert [ends["fine"][rank].code for rank in range(3)] == [0, 0, 0]
    assert "died" not in "".join(end.said for end in ends["fine"].values())


def test_the_limits_that_users_have_name_a_dead_process_within_90_s() -> None:
    assert heartbeat.SILENCE_S + 3 * heartbeat.BEAT_S + heartbeat.GRACE_S < 90
    assert 2 * heartbeat.BEAT_S < heartbeat.SUSPICION_S < heartbeat.SILENCE_S


def by_hand(command: list[str], num_ranks: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    (port,) = free_ports(1)
    return [([sys.executable, *command], rank_environment(rank, num_ranks, port)) for rank in range(num_ranks)]


def by_launcher(*launcher: str) -> Callable[..., list[tuple[list[str], dict[str, str]]]]:
    def start(command: list[str], num_ranks: int, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
        (port,) = free_ports(1)
        options = [option.format(num=num_ranks, port=port) for option in launcher]
        return [([sys.executable, "-m", *options, *command], {})]

    return start


RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
TORCHRUN = by_launcher("torch.distributed.run", "--nproc-per-node={num}", "--master-port={port}")
ACCELERATE = by_launcher(
    "accelerate.commands.launch", f"--config_file={RECIPES / 'fsdp2.yaml'}", "--num_processes={num}",
    "--main_process_port={port}",
)  # fmt: skip


def process_of_rank(rank: int, processes: list[subprocess.Popen]) -> int:
    """Process id of a rank, started by hand or by a launcher."""
    for process in processes:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (str(process.pid), *children):
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return int(pid)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "start, number, code, name",
    [
        (by_hand, signal.SIGKILL, 75, "TryAgain: rank 1 (host "),
        (by_hand, signal.SIGSTOP, 75, "TryAgain: rank 1 (host "),
        (TORCHRUN, signal.SIGKILL, 1, "rank      : 1 "),
        (ACCELERATE, signal.SIGKILL, 1, "rank      : 1 "),
    ],
    ids=["killed", "stopped", "killed-under-torchrun", "killed-under-accelerate-fsdp2"],
)
def test_the_command_ends_with_the_dead_ranks_name_within_90_s(
    tiny: SimpleNamespace, tmp_path: Path, start: Callable, number: int, code: int, name: str
) -> None:
    command = [
        "-m", "tide", "train-student", "--cache", str(tiny.cache), "--out", str(tiny.out), "--recipe", "tide-hybrid",
        *(f"--set={s}" for s in settings(tiny.root, train__steps=1_000_000, train__save_every=20)),
    ]  # fmt: skip
    if start is not by_hand:
        command = command[1:] if start is TORCHRUN else command
        command = ["-m", *command] if start is TORCHRUN else command
    processes = []
    try:
        for index, (words, environment) in enumerate(start(command, 2, tmp_path)):
            with (tmp_path / f"{index}.log").open("w") as log:
                full = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
                processes.append(subprocess.Popen(words, env=full, stderr=log, stdout=log))
        until = time.monotonic() + 90
        while not list(tiny.out.glob("checkpoints/step-*")):
            assert time.monotonic() < until, (tmp_path / "0.log").read_text()
            time.sleep(0.1)
        os.kill(process_of_rank(1, processes), number)
        assert processes[0].wait(timeout=90) == code
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert name in (tmp_path / "0.log").read_text()
