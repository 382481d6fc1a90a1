"""How many workers, in which order, with which interruptions: always the same bytes, and nothing whole is redone."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from dump_checks import file_hashes, fork, join, require_sound_files
from tide.shared.cache import open_cache, read_manifest, shard_is_done
from tide.shared.config import RunConfig
from tide.shared.errors import DataError, TryAgain
from tide.teacher_dump import dump
from tide.teacher_dump.board import Board
from tide.teacher_dump.claims import is_alive
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.launchers import local
from tide.teacher_dump.plan import read_plan
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.worker import open_task, work
from tiny_runs import tiny_config

run_shard = ShardTask.run


@pytest.fixture
def config(tiny_root: Path) -> RunConfig:
    return tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=2)


@pytest.fixture(scope="module")
def expected(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of every file of a dump by one worker in this process."""
    root = tmp_path_factory.mktemp("expected") / "cache"
    dump_teacher(tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=2), root)
    assert require_sound_files(root) == read_plan(root).num_shards >= 6
    return file_hashes(root)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are done in this process, in order."""
    log: list[int] = []

    def run(self, root, shard, progress=lambda tokens: None):
        log.append(shard)
        return run_shard(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", run)
    return log


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every shard takes longer, so that other processes meet it half done."""

    def run(self, root, shard, progress=lambda tokens: None):
        time.sleep(seconds)
        return run_shard(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", run)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(config, tmp_path, expected, monkeypatch, num_workers):
    monkeypatch.setattr(local, "START_METHOD", "fork")
    slow_down(monkeypatch, 0.1)
    reports: list[tuple[int, int]] = []
    manifest = dump_teacher(config, tmp_path, num_workers=num_workers, report=lambda *r: reports.append(r))
    assert file_hashes(tmp_path) == expected
    assert manifest.hash == read_manifest(tmp_path).hash
    assert sum(shards for shards, _ in reports) == manifest.totals.shards


def test_any_order_of_the_shards_gives_the_same_bytes(config, tmp_path, expected):
    task = open_task(tmp_path, prepare_plan(config, tmp_path))
    shards = list(range(task.plan.num_shards))
    random.Random(1).shuffle(shards)
    for shard in [*shards, shards[0]]:
        task.run(tmp_path, shard)
    dump_teacher(config, tmp_path)
    assert file_hashes(tmp_path) == expected


def test_a_complete_cache_is_left_alone(config, tmp_path, expected, monkeypatch):
    """The same command again opens no data, tokenizer or model, and writes nothing."""
    dump_teacher(config, tmp_path)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = times()

    def refuse(*args, **kwargs):
        raise AssertionError("a complete cache needs nothing")

    for name in ("make_plan", "run_local", "work", "write_plan"):
        monkeypatch.setattr(dump, name, refuse)
    for verify in (False, True):
        assert dump_teacher(config, tmp_path, verify=verify).hash == read_manifest(tmp_path).hash
    assert times() == before
    shutil.rmtree(tmp_path / "receipts")  # as after a download: the manifest alone says what is whole
    before = times()
    dump_teacher(config, tmp_path)
    assert times() == before


def test_an_interrupted_dump_redoes_nothing_that_is_whole(config, tmp_path, expected, monkeypatch, calls):
    """One worker stops in its fourth shard, two others come, one of them is stopped too, one finishes."""

    class Stop(BaseException):
        pass

    run = ShardTask.run

    def stop_at(number):
        def stopping(self, root, shard, progress=lambda tokens: None):
            if shard == number:
                raise Stop
            return run(self, root, shard, progress)

        return stopping

    num_shards = len([name for name in expected if name.startswith("data/")])
    for number in (3, 5):
        monkeypatch.setattr(ShardTask, "run", stop_at(number))
        with pytest.raises(Stop):
            dump_teacher(config, tmp_path)
        assert require_sound_files(tmp_path) == number
        assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(ShardTask, "run", run)
    dump_teacher(config, tmp_path)
    assert calls == list(range(num_shards))
    assert file_hashes(tmp_path) == expected


def test_two_workers_after_an_interruption_give_the_same_bytes(config, tmp_path, expected, monkeypatch):
    open_task(tmp_path, prepare_plan(config, tmp_path)).run(tmp_path, 2)
    monkeypatch.setattr(local, "START_METHOD", "fork")
    dump_teacher(config, tmp_path, num_workers=2)
    assert file_hashes(tmp_path) == expected


def test_two_ranks_of_a_job_at_once_give_the_same_bytes(config, tmp_path, expected, monkeypatch):
    """--launcher env: the environment is all they know of each other; rank 1 comes first and waits for the plan."""
    slow_down(monkeypatch, 0.1)
    names = tmp_path / "names"
    names.mkdir()

    def rank(number: int):
        def run() -> None:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
            if number == 0:
                time.sleep(0.3)
            dump_teacher(config, tmp_path / "cache", launcher="env", report=log)

        def log(shards: int, tokens: int) -> None:
            if shards:
                (names / f"{number}-{time.monotonic_ns()}").touch()

        return run

    assert join(fork(rank(1)), fork(rank(0))) == [0, 0]
    assert file_hashes(tmp_path / "cache") == expected
    assert {path.name[0] for path in names.iterdir()} == {"0", "1"}


def test_two_commands_on_one_folder_share_the_work(config, tmp_path, expected, monkeypatch):
    """As two machines would, each with its own local launcher; the plan was made before, or by both at once."""
    slow_down(monkeypatch, 0.1)
    for name, planned in (("planned", True), ("unplanned", False)):
        root = tmp_path / name
        if planned:
            prepare_plan(config, root)
        assert join(*[fork(lambda root=root: dump_teacher(config, root)) for _ in range(2)]) == [0, 0]
        assert file_hashes(root) == expected


def test_a_killed_worker_costs_its_shard_and_nothing_else(config, tmp_path, expected, monkeypatch):
    """kill -9 of one of two local workers, in the middle of a shard: the other one takes that shard over."""
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def run(self, root, shard, progress=lambda tokens: None):
        if os.environ["LOCAL_RANK"] == "0":
            (tmp_path / "dying").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not (tmp_path / "dying").exists():
            time.sleep(0.01)
        return run_shard(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", run)
    with pytest.warns(UserWarning, match="worker 0: killed by SIGKILL. The other workers go on"):
        dump_teacher(config, tmp_path / "cache", num_workers=2)
    assert file_hashes(tmp_path / "cache") == expected


def test_all_workers_killed_is_an_error_that_asks_to_try_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "START_METHOD", "fork")
    monkeypatch.setattr(ShardTask, "run", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with (
        pytest.warns(UserWarning, match="killed by SIGKILL. The other workers go on"),
        pytest.raises(TryAgain, match="worker 0: killed by SIGKILL; worker 1: killed by SIGKILL.*same comm") as caught,
    ):
        dump_teacher(config, tmp_path, num_workers=2)
    assert caught.value.exit_code == 75
    assert not (tmp_path / "manifest.json").exists()


def test_the_error_of_a_worker_reaches_the_user(config, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def run(self, root, shard, progress=lambda tokens: None):
        raise DataError("the data are bad")

    monkeypatch.setattr(ShardTask, "run", run)
    with (
        pytest.warns(UserWarning, match="worker .: the data are bad. The other workers go on"),  # known before the end
        pytest.raises(DataError, match="the data are bad") as caught,
    ):
        dump_teacher(config, tmp_path, num_workers=2)
    assert caught.value.exit_code == 65


def test_a_killed_process_that_nobody_waited_for_is_dead():
    """What it left behind is tidied up at once, not when its parent happens to look."""
    child = os.fork()
    if child == 0:
        signal.pause()
    assert is_alive(child)
    assert is_alive(os.getpid())
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    assert not is_alive(child)
    os.waitpid(child, 0)
    assert not is_alive(child)


def test_the_workers_of_the_real_launcher_write_a_cache_that_opens(config, tmp_path, expected):
    """Processes from the fork server, as users run them."""
    dump_teacher(config, tmp_path, num_workers=2)
    assert file_hashes(tmp_path) == expected
    assert len(list(open_cache(tmp_path))) == read_manifest(tmp_path).totals.rows


def test_work_waits_for_a_shard_that_another_worker_is_busy_with(config, tmp_path, expected, calls):
    task = open_task(tmp_path, prepare_plan(config, tmp_path))

    def slowly() -> None:
        board = Board(tmp_path, task.plan.hash, task.plan.num_shards, config.workers)
        with board.holding("00001") as mine:
            assert mine
            (tmp_path / "claimed").touch()
            time.sleep(1.5)
            run_shard(task, tmp_path, 1)

    child = fork(slowly)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    work(tmp_path, config)
    assert join(child) == [0]
    (tmp_path / "claimed").unlink()
    assert 1 not in calls
    assert shard_is_done(tmp_path, 1, task.plan.hash)
    assert file_hashes(tmp_path) == expected
