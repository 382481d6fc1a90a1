"""`tide status`: what it counts, what it tells, and that it changes nothing."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from dump_checks import file_hashes
from rich.console import Console
from tide.shared.cache.coverage import left_out
from tide.shared.cache.manifest import write_manifest
from tide.shared.config import WorkersConfig
from tide.shared.errors import CacheError, TryAgain
from tide.teacher_dump.board import Board
from tide.teacher_dump.claims import this_machine
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.status import DumpStatus, dump_status, duration, status_table, watch
from tide.teacher_dump.worker import open_task
from tide.teacher_dump.worker_records import MAX_FAILED, WorkerRecord, read_records, record_name, write_record
from tiny_runs import tiny_config


@pytest.fixture(scope="module")
def begun(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump with two of its eight shards done; tests add records and take them away."""
    root = tmp_path_factory.mktemp("begun") / "cache"
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=1)
    task = open_task(root, prepare_plan(config, root))
    assert task.plan.num_shards == 8
    task.run(root, 0)
    task.run(root, 3)
    return root


@pytest.fixture
def say(begun: Path):
    """say(record, silent for so many seconds)."""
    written = []

    def write(silent_s: float, **record: object) -> None:
        values = {"host": "h", "pid": 1, "state": "working", **record}
        write_record(begun, WorkerRecord(**values))
        path = begun / record_name(values["worker"])
        os.utime(path, (time.time() - silent_s,) * 2)
        written.append(path)

    yield write
    for path in written:
        path.unlink()


def text_of(status: DumpStatus) -> str:
    file = io.StringIO()
    Console(width=150, file=file).print(status_table(status))
    return file.getvalue()


def test_counts_rates_and_time_left_are_those_of_living_workers(begun, say):
    say(1, worker="a", shard=1, shards=2, tokens=3000, seconds=100.0)
    say(5, worker="b", shard=4, shards=1, tokens=1000, seconds=50.0)
    say(3600, worker="dead", shard=5, shards=50, tokens=10**9, seconds=1.0)
    say(9, worker="new", shard=6)
    status = dump_status(begun)
    assert (status.state, status.shards, status.done, status.running) == ("running", 8, 2, (1, 4, 6))
    assert status.tokens_per_second == pytest.approx(3000 / 100 + 1000 / 50)
    assert status.eta_s == pytest.approx(6 / (2 / 100 + 1 / 50))  # six are left, each worker brings one in 50 s
    assert [(w.worker, w.alive) for w in status.workers] == [("a", True), ("b", True), ("new", True), ("dead", False)]
    assert status.workers[-1].silent_s == pytest.approx(3600, abs=5)
    assert status.last_error is None
    text = text_of(status)
    for part in ("2 of 8 done (25.0%), 3 running, 0 failed", "50 a second", "about 2 min", "gone", "60 min ago"):
        assert part in text, text


def test_failed_shards_count_until_somebody_has_done_them(begun, say):
    say(40, worker="old", state="failed", error="OutputError: the disk is full")
    say(2, worker="a", failed={"3": "RuntimeError: x", "5": "OutOfDeviceMemory: shard 5"})
    status = dump_status(begun)
    assert dict(status.failed) == {"5": "OutOfDeviceMemory: shard 5"}  # 3 is done by now
    assert status.last_error["worker"] == "a"
    say(1, worker="newest", state="failed", error="DataError: \x1b[2Jsample 7")
    status = dump_status(begun)
    assert status.last_error["error"].startswith("DataError")
    text = text_of(status)
    assert "\x1b" not in text
    assert "DataError: sample 7" in text
    assert "OutOfDeviceMemory: shard 5" in text


def test_without_a_living_worker_it_says_stopped_and_what_to_do(begun, say):
    say(3600, worker="dead", shard=5)
    status = dump_status(begun)
    assert (status.state, status.running, status.eta_s) == ("stopped", (), None)
    assert "same dump-teacher command" in text_of(status)


def test_a_worker_of_this_machine_that_was_killed_is_gone_at_once(begun, say):
    """Of another machine's process with the same number only its silence is known."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    say(1, worker="mine", pid=child, machine=this_machine(), shard=4)
    say(1, worker="elsewhere", pid=child, machine="other", shard=5)
    say(1, worker="me", pid=os.getpid(), machine=this_machine(), shard=6)
    status = dump_status(begun)
    assert {w.worker: w.alive for w in status.workers} == {"mine": False, "elsewhere": True, "me": True}
    assert status.running == (5, 6)


def test_a_worker_that_could_not_do_hundreds_of_shards_is_still_told(begun, tmp_path):
    """Its record stays small: the newest failures."""
    board = Board(tmp_path, "", 1000, WorkersConfig())
    for shard in range(200):
        board.failed(shard, RuntimeError("ß" * 2000))
    [(record, _)] = read_records(tmp_path)
    assert list(record.failed) == [str(shard) for shard in range(200 - MAX_FAILED, 200)]


def test_a_damaged_record_is_passed_over(begun):
    path = begun / record_name("damaged")
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"worker": 3}')
    assert dump_status(begun).workers == ()
    path.unlink()


def test_what_is_left_out_is_told_by_the_plan_and_in_the_end_by_the_manifest(tiny_root, tmp_path, begun):
    """Rows that are bad, samples that are cut, and, once it is complete, what the teacher could not answer."""
    assert "left out nothing" in " ".join(text_of(dataclasses.replace(dump_status(begun), left_out=())).split())
    some = dataclasses.replace(dump_status(begun), left_out=("3 of 8 answers are cut off",))
    assert "left out 3 of 8 answers are cut off" in " ".join(text_of(some).split())
    rows = [*tiny_root.joinpath("pairs.jsonl").read_text().splitlines(), '{"prompt": "", "response": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    config = tiny_config(
        tiny_root, data__source=tmp_path / "rows.jsonl", data__skip_bad=True, data__max_length=32, noise__views=1
    )
    plan = prepare_plan(config, tmp_path / "cache")
    status = dump_status(tmp_path / "cache")
    assert status.left_out == tuple(plan.sentences())
    assert len(status.left_out) >= 2
    text = " ".join(text_of(status).split())
    assert "left out 1 of 9 samples are left out (no prompt: 1)" in text or "no prompt: 1" in text
    assert "are cut off at data.max_length" in text
    manifest = dump_teacher(config, tmp_path / "cache")
    done = dump_status(tmp_path / "cache")
    assert done.state == "complete"
    assert done.left_out[0] == left_out(manifest.dropped, manifest.totals.samples)
    counted = dataclasses.replace(manifest, dropped={**manifest.dropped, "numbers that are no numbers": 2})
    write_manifest(tmp_path / "cache", counted)
    assert "numbers that are no numbers: 2" in dump_status(tmp_path / "cache").left_out[0]
    (tmp_path / "cache" / "manifest.json").write_text("{}")  # damaged: what the plan says
    assert dump_status(tmp_path / "cache").left_out == tuple(plan.sentences())


def test_failed_shards_beyond_those_shown_are_counted(begun, say):
    say(2, worker="a", failed={str(4 + 100 * number): "RuntimeError: x" for number in range(45)})
    assert "and 5 more; --json tells all" in text_of(dump_status(begun))


def test_looking_changes_nothing(begun, say):
    say(1, worker="a")
    before = file_hashes(begun)
    dump_status(begun)
    assert file_hashes(begun) == before


def test_a_folder_without_a_dump_is_refused(tmp_path):
    with pytest.raises(CacheError, match="give the folder that dump-teacher writes"):
        dump_status(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CacheError, match="not a plan"):
        dump_status(tmp_path)


def test_planning_ranks_are_seen_before_there_is_a_plan(tmp_path):
    board = Board(tmp_path, "", 0, WorkersConfig())
    with board.present():
        board.say("planning")
        status = dump_status(tmp_path)
        assert (status.state, [w.state for w in status.workers]) == ("planning", ["planning"])


def test_a_worker_leaves_its_error_and_nothing_when_it_was_asked_to_stop(tmp_path):
    class Broken(Exception):
        pass

    for error, left in ((TryAgain("asked"), 0), (Broken("the bus is on fire"), 1)):
        with pytest.raises(type(error)):
            work_until(error, Board(tmp_path, "", 1, WorkersConfig()))
        assert len(read_records(tmp_path)) == left
    record = read_records(tmp_path)[0][0]
    assert (record.state, record.error) == ("failed", "Broken: the bus is on fire")


def work_until(error: Exception, board: Board) -> None:
    with board.present():
        board.say("working", shard=0)
        raise error


def test_signs_of_life_come_by_themselves(tmp_path):
    board = Board(tmp_path, "", 1, WorkersConfig(lease_s=0.6))
    with board.present(), board.take_one([0]):
        path, claim = tmp_path / record_name(board._record.worker), tmp_path / "claims" / "00000.json"
        before = path.stat().st_mtime_ns, claim.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before[0] or claim.stat().st_mtime_ns == before[1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            board.progress(10)


def test_the_command_tells_a_running_dump_and_ends_with_it(tiny_root, tmp_path):
    """--watch --json beside a dump: one object a line, the last one complete; nothing of it stays in the cache."""
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=1)
    prepare_plan(config, tmp_path / "cache")
    command = [sys.executable, "-m", "tide", "status", str(tmp_path / "cache"), "--watch", "--every", "0.2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        dump_teacher(config, tmp_path / "cache")
        lines = [json.loads(line) for line in watching.stdout]
    assert watching.returncode == 0
    assert (first["state"], first["done"], first["shards"]) == ("stopped", 0, 8)
    assert (lines[-1]["state"], lines[-1]["done"], lines[-1]["eta_s"]) == ("complete", 8, 0.0)
    assert {"manifest.json", "plan.json", "README.md", "vocabulary.parquet", "data", "receipts"} == {
        path.name for path in (tmp_path / "cache").iterdir()
    }


def test_status_needs_no_torch(begun):
    program = (
        "import sys; from tide.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(begun)], capture_output=True, text=True, check=True
    )
    assert "2 of 8 done" in done.stdout
    assert not {"torch", "transformers", "datasets", "accelerate"} & set(done.stderr.split())


def test_watching_reads_the_plan_once_and_sleeps_between(begun, monkeypatch):
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (begun / "manifest.json").write_text("{}")

    statuses = list(watch(begun, 3.0, sleep=sleep))
    (begun / "manifest.json").unlink()
    assert [status.state for status in statuses] == ["stopped", "complete"]
    assert slept == [3.0]
    assert json.dumps([asdict(status) for status in statuses])


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (150, "2 min"), (12000, "3.3 h"), (3e5, "3.5 days")])
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text
