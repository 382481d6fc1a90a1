"""Stopping a dump by signals: a message, an exit code, no orphans, and the same command continues."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from dump_checks import file_hashes, fork, join, require_sound_files
from tide import cli
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.launchers import local
from tide.teacher_dump.shard_task import ShardTask
from tiny_runs import settings, tiny_config

SMALL = {"shards.samples_per_shard": 1, "noise.views": 1}


@pytest.fixture
def start(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """start(num_workers) -> process id of the command line in a group of its own, in the middle of its dump.

    The second shard and those after it take `shard_s`, in steps of a micro-batch, or in one piece if they `hang`.
    """
    monkeypatch.setattr(local, "START_METHOD", "fork")
    run = ShardTask.run

    def start(num_workers: int, *, shard_s: float = 0.4, grace_s: float = 30.0, hang: bool = False) -> int:
        def slow(self, root, shard, progress=lambda tokens: None):
            end = time.monotonic() + (shard_s if shard >= num_workers else 0.4)
            (tmp_path / f"began-{shard}").touch()
            while time.monotonic() < end:
                time.sleep(end - time.monotonic() if hang else 0.05)
                progress(1)
            return run(self, root, shard, progress)

        more = {"workers.grace_s": grace_s}
        arguments = [text for item in settings(tiny_root, **SMALL, **more) for text in ("--set", item)]
        out = ["--workers", str(num_workers), "--out", str(tmp_path / "cache")]

        def command() -> None:
            sys.stderr = (tmp_path / "stderr").open("w", buffering=1)
            sys.argv = ["tide", "dump-teacher", *arguments, *out]
            ShardTask.run = slow
            cli.main()

        child = fork(command, group=0)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache" / "receipts").glob("0*.json")):
            assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
        return child

    return start


def require_empty_group(group: int) -> None:
    """No process of the group is left, or only for a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived the command")


def require_continuation(tiny_root: Path, tmp_path: Path) -> None:
    """Something is done, not everything; the same settings continue to the same bytes as an undisturbed dump."""
    config = tiny_config(tiny_root, **SMALL)
    assert require_sound_files(tmp_path / "cache") >= 1
    assert not (tmp_path / "cache" / "manifest.json").exists()
    dump_teacher(config, tmp_path / "cache")
    dump_teacher(config, tmp_path / "expected")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "whole_group", "code", "message"),
    [
        (signal.SIGINT, True, 130, "interrupted"),  # Ctrl-C in a terminal reaches every process
        (signal.SIGTERM, False, 75, "stopped by SIGTERM"),  # kill
        (signal.SIGTERM, True, 75, "stopped by SIGTERM"),  # a batch system that ends the job
    ],
)
def test_a_signal_ends_the_dump_with_a_message(
    tiny_root, tmp_path, start, num_workers, number, whole_group, code, message
):
    child = start(num_workers)
    (os.killpg if whole_group else os.kill)(child, number)
    assert join(child) == [code]
    require_empty_group(child)
    said = (tmp_path / "stderr").read_text()
    assert message in said
    assert "same command continues" in said
    assert "Traceback" not in said
    require_continuation(tiny_root, tmp_path)


def test_workers_end_with_a_command_that_is_killed(tiny_root, tmp_path, start):
    child = start(2)
    os.kill(child, signal.SIGKILL)
    assert join(child) == [-signal.SIGKILL]
    require_empty_group(child)
    require_continuation(tiny_root, tmp_path)


def began(tmp_path: Path, shard: int) -> None:
    """Wait until the shard is being done."""
    deadline = time.monotonic() + 30
    while not (tmp_path / f"began-{shard}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_shard_in_hand_is_finished_within_the_grace(tiny_root, tmp_path, start, num_workers, number):
    child = start(num_workers, shard_s=1.5)
    began(tmp_path, num_workers)
    time.sleep(0.2)
    (os.killpg if num_workers == 2 else os.kill)(child, number)  # also to each worker, as Slurm may do
    assert join(child) == [75]
    require_empty_group(child)
    assert f"stopped by {number.name}" in (tmp_path / "stderr").read_text()
    begun = {int(path.name[6:]) for path in tmp_path.glob("began-*")}
    assert require_sound_files(tmp_path / "cache") == len(begun) < 8
    assert not list((tmp_path / "cache" / "claims").glob("0*"))
    require_continuation(tiny_root, tmp_path)


@pytest.mark.parametrize(("hang", "within_s"), [(False, 3.0), (True, 9.0)])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_shard_that_takes_longer_than_the_grace_is_dropped(tiny_root, tmp_path, start, num_workers, hang, within_s):
    """Between two micro-batches; one that hangs is ended with its process."""
    child = start(num_workers, shard_s=3600, grace_s=0.5, hang=hang)
    began(tmp_path, num_workers)
    asked = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert join(child) == [75]
    assert 0.4 < time.monotonic() - asked < within_s
    require_empty_group(child)
    assert "same command continues" in (tmp_path / "stderr").read_text()
    assert require_sound_files(tmp_path / "cache") >= 1
    require_continuation(tiny_root, tmp_path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_second_signal_ends_everything_at_once(tiny_root, tmp_path, start, num_workers):
    child = start(num_workers, shard_s=3600, hang=True)
    began(tmp_path, num_workers)
    for _ in range(2):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.3)
    asked = time.monotonic()
    assert join(child) == [75]
    assert time.monotonic() - asked < 2
    require_empty_group(child)
    require_continuation(tiny_root, tmp_path)
