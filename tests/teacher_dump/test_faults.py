"""Things that fail while a dump runs: what stops, what goes on, what the user reads, and that nothing ever hangs."""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dump_checks import file_hashes, fork, join, require_sound_files
from tide.shared.cache import shard_is_done
from tide.shared.config import RunConfig, WorkersConfig
from tide.shared.errors import OutputError, TideError
from tide.shared.stop_signals import Stop
from tide.teacher_dump import shard_task, worker
from tide.teacher_dump.board import MAX_BEAT_ERRORS, Board
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.launchers import local
from tide.teacher_dump.plan import read_plan
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.status import dump_status
from tide.teacher_dump.worker import OutOfDeviceMemory, next_wait_s, work
from tiny_runs import tiny_config

run_shard = ShardTask.run
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def config(tiny_root: Path) -> RunConfig:
    return tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=1)


@pytest.fixture(scope="module")
def expected(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("expected") / "cache"
    dump_teacher(tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=1), root)
    return file_hashes(root)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], None]], list[int]]:
    """runs(before): `before(shard, number of this try)` is called before each run in this process; gives the log."""

    def patch(before: Callable[[int, int], None]) -> list[int]:
        log: list[int] = []

        def run(self, root, shard, progress=lambda tokens: None):
            log.append(shard)
            before(shard, log.count(shard))
            return run_shard(self, root, shard, progress)

        monkeypatch.setattr(ShardTask, "run", run)
        return log

    return patch


# --- memory of the device


def out_of_memory(*args: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


def test_a_shard_that_ran_out_of_memory_once_is_tried_again_with_empty_caches(
    config, tmp_path, expected, runs, monkeypatch
):
    budgets: list[int] = []
    by_tokens = shard_task.by_tokens
    monkeypatch.setattr(shard_task, "by_tokens", lambda lengths, n: (budgets.append(n), by_tokens(lengths, n))[1])
    cleared: list[bool] = []
    monkeypatch.setattr(
        "tide.teacher_dump.worker.clear_device_cache", lambda garbage_collection: cleared.append(garbage_collection)
    )
    log = runs(lambda shard, number: out_of_memory() if shard in (2, 5) and number == 1 else None)
    dump_teacher(config, tmp_path)
    assert log == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    assert cleared == [True, True]
    assert set(budgets) == {config.teacher.tokens_per_batch}  # never smaller
    assert file_hashes(tmp_path) == expected


def test_out_of_memory_twice_leaves_the_shard_to_others_and_says_which_settings_help(
    config, tmp_path, expected, runs, monkeypatch
):
    log = runs(lambda shard, number: out_of_memory() if shard == 2 else None)
    with pytest.raises(OutOfDeviceMemory, match="tokens_per_batch.*devices_per_replica.*quantization") as caught:
        dump_teacher(config, tmp_path)
    assert caught.value.exit_code == 69
    assert log == [0, 1, 2, 2, 3, 4, 5, 6, 7]  # the rest is done first
    assert require_sound_files(tmp_path) == 7
    status = dump_status(tmp_path)
    assert list(status.failed) == ["2"]
    assert "tokens_per_batch" in status.last_error["error"]
    monkeypatch.setattr(ShardTask, "run", run_shard)
    dump_teacher(config, tmp_path)
    assert file_hashes(tmp_path) == expected


def test_three_failed_shards_in_a_row_stop_a_worker(config, tmp_path, runs):
    """Whatever the error: a device that is gone answers no shard."""

    def fail(shard: int, number: int) -> None:
        if shard in (1, 3, 4, 5):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    log = runs(fail)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        dump_teacher(config, tmp_path)
    assert log == [0, 1, 2, 3, 4, 5]
    assert "shards 3, 4, 5 failed one after another" in "".join(caught.value.__notes__)
    assert require_sound_files(tmp_path) == 2


def test_an_error_nobody_foresaw_is_given_back_with_its_notes(config, tmp_path, monkeypatch, capsys):
    """As the parent of a worker, or Ray's driver, gets it: pickled, so without notes and traceback of its own."""

    def fail(*arguments: object, **options: object) -> None:
        error = RuntimeError("CUDA error, token hf_" + "a" * 34)
        error.add_note("shards 3, 4, 5 failed one after another: this worker stops")
        raise error

    monkeypatch.setattr(worker, "work", fail)
    found = worker.work_and_tell(tmp_path, config, report=lambda *progress: None, stop=Stop(1.0))
    assert type(found) is TideError
    assert "RuntimeError: CUDA error" in str(found)
    assert "shards 3, 4, 5 failed one after another" in str(found)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "a" * 34 not in said


def test_shards_that_fail_in_one_worker_are_done_by_another(config, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def run(self, root, shard, progress=lambda tokens: None):
        if os.environ["LOCAL_RANK"] == "0":
            failed.touch()
            out_of_memory()
        deadline = time.monotonic() + 60
        while not failed.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return run_shard(self, root, shard, progress)

    failed = tmp_path.parent / f"{tmp_path.name}-failed"
    monkeypatch.setattr(ShardTask, "run", run)
    with pytest.warns(UserWarning, match="worker 0: shard .* memory.*. The other workers go on"):
        dump_teacher(config, tmp_path, num_workers=2)
    assert file_hashes(tmp_path) == expected


# --- the disk


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "the device reports an input/output error"),
        (errno.EDQUOT, "the disk quota is used up"),
    ],
)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_worker_that_cannot_write_ends_the_command_within_seconds(
    config, tmp_path, expected, monkeypatch, code, reason, name
):
    """The other worker is in the middle of an hour's shard, and is not waited for."""
    monkeypatch.setattr(local, "START_METHOD", "fork")
    real = getattr(os, name)

    def failing(*args):
        if os.environ.get("LOCAL_RANK") == "0" and len(list((tmp_path / "cache" / "receipts").glob("0*.json"))) >= 2:
            raise OSError(code, os.strerror(code))
        return real(*args)

    def run(self, root, shard, progress=lambda tokens: None):
        if os.environ["LOCAL_RANK"] == "1":
            time.sleep(3600)
        return run_shard(self, root, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        patch.setattr(ShardTask, "run", run)
        start = time.monotonic()
        with pytest.raises(OutputError, match=f"{reason}.*same command") as caught:
            dump_teacher(config, tmp_path / "cache", num_workers=2)
    assert time.monotonic() - start < 20
    assert caught.value.exit_code == 74
    assert require_sound_files(tmp_path / "cache") == 2
    dump_teacher(config, tmp_path / "cache")
    assert file_hashes(tmp_path / "cache") == expected


def test_signs_of_life_that_cannot_be_written_end_the_shard_before_its_end(tmp_path, monkeypatch):
    """Permission lost in the middle of an hour's shard: the worker knows after three heartbeats, not after an hour."""
    board = Board(tmp_path, "plan", 1, WorkersConfig(lease_s=0.6))

    def refuse(*args: object, **how: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def work_for_an_hour() -> None:
        with board.present(), board.take_one([0]) as shard:
            assert shard == 0
            monkeypatch.setattr(os, "utime", refuse)
            while time.monotonic() - start < 20:
                board.progress(1)
                time.sleep(0.01)

    start = time.monotonic()
    with pytest.raises(OutputError, match="claims.*permission denied"):
        work_for_an_hour()
    assert MAX_BEAT_ERRORS * 0.1 <= time.monotonic() - start < 10


def test_one_hiccup_of_the_file_system_ends_nothing(tmp_path, monkeypatch):
    board = Board(tmp_path, "plan", 1, WorkersConfig(lease_s=0.6))
    failures, utime = iter([True, True, False] * 100), os.utime
    seen: list[bool] = []

    def sometimes(*args: object, **how: object) -> None:
        seen.append(next(failures))
        if seen[-1]:
            raise OSError(errno.EIO, "Input/output error")
        utime(*args, **how)

    monkeypatch.setattr(os, "utime", sometimes)
    with board.present(), board.take_one([0]):
        while len(seen) < 7:
            board.progress(1)
            time.sleep(0.01)


# --- workers that are stuck, idle or many


def test_the_shard_of_a_stuck_worker_is_taken_over_and_both_may_finish(config, tmp_path, expected, monkeypatch):
    """Worker A's heart beats, its work does not go on; B takes the shard; then A wakes up and finishes as well."""
    quick = replace(config, workers=WorkersConfig(lease_s=0.6, stuck_s=0.3))
    prepare_plan(quick, tmp_path / "cache")
    awake = tmp_path / "awake"

    def stuck_worker() -> None:
        def run(self, root, shard, progress=lambda tokens: None):
            (tmp_path / "stuck").touch()
            while not awake.exists():
                time.sleep(0.02)
            receipt = run_shard(self, root, shard, progress)
            (tmp_path / "late").touch()
            return receipt

        ShardTask.run = run
        work(tmp_path / "cache", quick)

    child = fork(stuck_worker)
    while not (tmp_path / "stuck").exists():
        time.sleep(0.02)
    deadline = threading.Timer(30, awake.touch)
    deadline.start()
    work_all_but_the_manifest(tmp_path / "cache", quick, monkeypatch)
    assert not awake.exists(), "the shard was not taken over"
    deadline.cancel()
    awake.touch()
    assert join(child) == [0]
    assert (tmp_path / "late").exists()
    dump_teacher(config, tmp_path / "cache")
    assert file_hashes(tmp_path / "cache") == expected


def work_all_but_the_manifest(root: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard, as a worker does them; then it stops, so that the other one is still needed."""

    class Enough(BaseException):
        pass

    def enough(*args: object, **kwargs: object) -> None:
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr("tide.teacher_dump.worker.finalize", enough)
        with pytest.raises(Enough):
            work(root, config)
    plan = read_plan(root)
    assert all(shard_is_done(root, shard, plan.hash) for shard in range(plan.num_shards))


def test_hundreds_of_waiting_workers_do_not_besiege_the_file_system():
    """All together they look some ten times a second, whatever their number; two of them look at once."""
    for num_workers, most_s in ((1, 10.0), (2, 10.0), (512, 60.0), (5000, 60.0)):
        wait_s, waits = 0.0, []
        for _ in range(40):
            waits.append(wait_s := next_wait_s(wait_s, num_workers))
        assert waits == sorted(waits)
        assert waits[-1] <= most_s
        assert sum(waits[:5]) >= min(5, num_workers / 100)
        assert waits[0] == 0.1 or num_workers > 8
        assert num_workers / waits[-1] <= max(10.0, num_workers / 60) + 1e-9
    assert num_workers / waits[-1] < 100


def test_workers_without_a_shard_end_with_the_others(tiny_root, tmp_path, monkeypatch):
    """Four workers and one shard: three never load the teacher, and nobody waits for nobody."""
    monkeypatch.setattr(local, "START_METHOD", "fork")
    config = tiny_config(tiny_root, shards__samples_per_shard=100, noise__views=1)

    def run(self, root, shard, progress=lambda tokens: None):
        time.sleep(0.5)
        return run_shard(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", run)
    dump_teacher(config, tmp_path / "cache", num_workers=4)
    dump_teacher(config, tmp_path / "expected")
    assert file_hashes(tmp_path / "cache") == file_hashes(tmp_path / "expected")


def test_a_parent_that_reads_no_progress_does_not_keep_a_worker_from_ending(config, tmp_path, monkeypatch):
    """The pipe of a worker fills up and its reader is gone for good: the worker ends with the command."""
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def command() -> None:
        def chatter(self, root, shard, progress=lambda tokens: None):
            (tmp_path / f"pid-{os.getpid()}").touch()
            while True:
                progress(1)

        ShardTask.run = chatter
        local._listen = lambda workers, report, stop: time.sleep(3600)
        dump_teacher(config, tmp_path / "cache", num_workers=2)

    child = fork(command)
    while len(list(tmp_path.glob("pid-*"))) < 2:
        time.sleep(0.02)
    time.sleep(0.5)  # 64 KiB of messages take less
    os.kill(child, 9)
    assert join(child) == [-9]
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.02)


def test_a_worker_killed_with_a_full_pipe_ends_nothing(config, tmp_path, expected, monkeypatch):
    """The parent is slow, the pipe is full, and its writer is killed in the middle of a message."""
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def run(self, root, shard, progress=lambda tokens: None):
        if os.environ["LOCAL_RANK"] == "0":
            threading.Timer(1.0, os.kill, (os.getpid(), 9)).start()
            while True:
                progress(1)
        return run_shard(self, root, shard, progress)

    def slow(shards: int, tokens: int) -> None:
        time.sleep(0.01 if time.monotonic() < start + 3 else 0)

    monkeypatch.setattr(ShardTask, "run", run)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="worker 0: killed by SIGKILL. The other workers"):
        dump_teacher(config, tmp_path, num_workers=2, report=slow)
    assert file_hashes(tmp_path) == expected


def test_ranks_that_come_together_make_one_plan(config, tmp_path, expected, monkeypatch):
    """No rank is special: rank 0 need not be there; the plan is made once, by whoever is first."""
    made = tmp_path / "made"
    made.mkdir()

    def rank(number: int) -> Callable[[], object]:
        def run() -> None:
            from tide.teacher_dump.launchers import env

            real = env.make_plan

            def make(config, **arguments):
                (made / str(number)).touch()
                time.sleep(0.3)
                return real(config, **arguments)

            env.make_plan = make
            os.environ |= {"RANK": str(number), "WORLD_SIZE": "4"}
            dump_teacher(config, tmp_path / "cache", launcher="env")

        return run

    assert join(*[fork(rank(number)) for number in (1, 2, 3)]) == [0, 0, 0]
    assert len(list(made.iterdir())) == 1
    assert file_hashes(tmp_path / "cache") == expected


def test_a_planner_that_dies_is_replaced_and_one_that_fails_leaves_no_folder(config, tmp_path, expected):
    def die() -> None:
        from tide.teacher_dump.launchers import env

        env.make_plan = lambda *args, **kwargs: os.kill(os.getpid(), 9)
        dump_teacher(config, tmp_path / "cache", launcher="env")

    assert join(fork(die)) == [-9]
    assert not (tmp_path / "cache" / "plan.json").exists()
    assert join(fork(lambda: dump_teacher(config, tmp_path / "cache", launcher="env"))) == [0]
    assert file_hashes(tmp_path / "cache") == expected
    bad = replace(config, data=replace(config.data, source=str(tmp_path / "nowhere.jsonl")))
    assert join(fork(lambda: dump_teacher(bad, tmp_path / "bad", launcher="env"))) == [65]
    assert not (tmp_path / "bad" / "claims").exists()
