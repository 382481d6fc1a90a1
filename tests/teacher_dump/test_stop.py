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
    """start(num_workers) -> process id of the command line in a group of its own, in the middle of its dump."""
    monkeypatch.setattr(local, "START_METHOD", "fork")
    run = ShardTask.run

    def slow(self, root, shard, progress=lambda tokens: None):
        time.sleep(0.4)
        return run(self, root, shard, progress)

    def start(num_workers: int) -> int:
        arguments = [text for item in settings(tiny_root, **SMALL) for text in ("--set", item)]
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
