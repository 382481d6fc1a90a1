"""`--launcher ray` on a Ray of two CPUs: the same bytes, dead actors replaced, a killed driver resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dump_checks import file_hashes, require_sound_files
from tide import cli
from tide.shared.config import RunConfig
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import settings, tiny_config

SMALL = {"shards__samples_per_shard": 1, "noise__views": 1}
DRIVER = Path(__file__).parent / "ray_driver.py"
PATIENCE_S = 150
"""Ray needs 20 s to start on two cores, and several times that where they are busy."""
pytestmark = pytest.mark.timeout(450)


@pytest.fixture
def config(tiny_root: Path) -> RunConfig:
    return tiny_config(tiny_root, **SMALL)


@pytest.fixture
def driver(tiny_root: Path, tmp_path: Path):
    """driver() starts the command in a session of its own; all that is left of it is ended after the test."""
    pytest.importorskip("ray")
    started: list[subprocess.Popen] = []

    def start(*, shard_s: float = 0.5, num_cpus: int = 2) -> subprocess.Popen:
        arguments = [text for item in settings(tiny_root, **SMALL) for text in ("--set", item)]
        command = [sys.executable, str(DRIVER), "dump-teacher", "--launcher", "ray", "--workers", "2", *arguments]
        with (tmp_path / "stderr").open("a") as stderr:
            process = subprocess.Popen(
                [*command, "--out", str(tmp_path / "cache")], stdout=subprocess.DEVNULL, stderr=stderr,
                env=os.environ | {"OMP_NUM_THREADS": "1", "SHARD_S": str(shard_s), "NUM_CPUS": str(num_cpus)},
                start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def finished(tmp_path: Path, process: subprocess.Popen, num_shards: int) -> None:
    """Wait until so many shards are done."""
    deadline = time.monotonic() + PATIENCE_S
    while len(list((tmp_path / "cache" / "receipts").glob("0*.json"))) < num_shards:
        assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.05)


def calls(tmp_path: Path) -> list[tuple[int, int]]:
    """(shard, process) of every shard that was begun, in order."""
    names = sorted((path.name.split("-") for path in (tmp_path / "calls").iterdir()), key=lambda name: int(name[2]))
    return [(int(shard), int(pid)) for shard, pid, _ in names]


def require_same_bytes(config: RunConfig, tmp_path: Path) -> None:
    dump_teacher(config, tmp_path / "expected")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")


@pytest.mark.slow
def test_a_killed_actor_costs_its_shard_and_is_replaced(config, tmp_path, driver):
    process = driver()
    finished(tmp_path, process, 1)
    _, victim = calls(tmp_path)[-1]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()
    begun = calls(tmp_path)
    shards = [shard for shard, _ in begun]
    assert sorted(set(shards)) == list(range(8))
    assert len(shards) <= 8 + 1  # one dead worker, at most one shard done again
    assert any(pid != victim for _, pid in begun)
    require_same_bytes(config, tmp_path)


@pytest.mark.slow
def test_an_actor_that_fails_is_told_and_the_others_finish_its_work(config, tmp_path, driver):
    """An error nobody foresaw, three shards in a row: no traceback ends the command."""
    (tmp_path / "broken").touch()
    process = driver()
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()
    said = (tmp_path / "stderr").read_text()
    assert "the other actors finished the work of one that failed: RuntimeError: CUDA error" in said
    assert "failed one after another: this worker stops" in said
    require_same_bytes(config, tmp_path)


@pytest.mark.slow
def test_a_cluster_without_room_is_told_and_waited_for(tmp_path, driver):
    process = driver(num_cpus=0)
    deadline = time.monotonic() + PATIENCE_S
    while "no actor has started yet: each needs 1 CPU" not in (tmp_path / "stderr").read_text():
        assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(25) == 75, "the grace is for shards, and nobody has one"


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_a_stopped_one_ends_with_75(config, tmp_path, driver):
    process = driver(shard_s=4)
    finished(tmp_path, process, 1)
    workers = {pid for _, pid in calls(tmp_path)}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "an actor outlived its driver"
        time.sleep(0.05)
    done = require_sound_files(tmp_path / "cache")
    assert 1 <= done < 6
    process = driver(shard_s=2)
    finished(tmp_path, process, done + 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "stderr").read_text()
    assert "stopped by SIGTERM" in (tmp_path / "stderr").read_text()
    assert require_sound_files(tmp_path / "cache") < 8
    assert driver().wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()
    assert len(calls(tmp_path)) <= 8 + 2  # of the killed driver's two workers
    require_same_bytes(config, tmp_path)


@pytest.mark.slow
def test_local_then_ray_then_a_rank_give_the_same_bytes(config, tmp_path, driver, monkeypatch):
    """Each stops half-way; the next launcher goes on."""

    class Enough(BaseException):
        pass

    def stop_after(num_shards: int):
        def report(shards: int, tokens: int) -> None:
            if len(list((tmp_path / "cache" / "receipts").glob("0*.json"))) >= num_shards:
                raise Enough

        return report

    with pytest.raises(Enough):
        dump_teacher(config, tmp_path / "cache", report=stop_after(2))
    process = driver()
    finished(tmp_path, process, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "stderr").read_text()
    assert 4 <= require_sound_files(tmp_path / "cache") < 8
    for name, value in {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    dump_teacher(config, tmp_path / "cache", launcher="env")
    require_same_bytes(config, tmp_path)


def test_without_ray_the_message_says_how_to_install_it(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = [text for item in settings(tiny_root, **SMALL) for text in ("--set", item)]
    monkeypatch.setattr(
        sys, "argv", ["tide", "dump-teacher", "--launcher", "ray", *arguments, "--out", str(tmp_path / "cache")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 69
    assert "pip install 'tide-distill[ray]'" in capsys.readouterr().err
