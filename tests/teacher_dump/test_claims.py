"""Claims: who has a shard, who is dead, who is stuck; by a clock of the test's own, never by another host's."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from dump_checks import fork, join
from tide.shared.config import WorkersConfig
from tide.shared.errors import OutputError
from tide.teacher_dump.board import Board
from tide.teacher_dump.claims import Claims

WORKERS = WorkersConfig(lease_s=120, stuck_s=900)


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def claim_of_another_host(root: Path, name: str = "00000", mtime: float | None = None) -> Path:
    path = root / "claims" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    owner = {"host": "elsewhere", "machine": "other", "pid": os.getpid(), "started": "5", "token": "t"}
    path.write_text(json.dumps(owner))
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def test_a_claim_keeps_others_away_until_its_owner_lets_go_or_is_dead(tmp_path):
    mine, theirs = Claims(tmp_path, WORKERS), Claims(tmp_path, WORKERS)
    held = mine.take("00000")
    assert held
    assert theirs.take("00000") is None
    assert theirs.held() == {"00000"}
    other = theirs.take("00001")
    assert other
    held.release()
    other.release()
    assert not list((tmp_path / "claims").iterdir())

    def die_with_it() -> None:
        Claims(tmp_path, WORKERS).take("00000")
        os.kill(os.getpid(), signal.SIGKILL)

    assert join(fork(die_with_it)) == [-signal.SIGKILL]
    assert (tmp_path / "claims" / "00000.json").exists()
    assert mine.held() == set()
    assert mine.take("00000")


def test_a_process_number_says_nothing_about_another_machine_or_container(tmp_path):
    """This process's own number, and another start time: on this machine it would be dead."""
    claim_of_another_host(tmp_path)
    claims = Claims(tmp_path, WORKERS, clock=Clock())
    assert claims.held() == {"00000"}
    assert claims.take("00000") is None


@pytest.mark.parametrize("skew_s", [-10 * 365 * 86400, -3600, 0, 3600, 10 * 365 * 86400])
def test_a_silent_claim_is_stale_after_its_lease_whatever_the_clocks_say(tmp_path, skew_s):
    """The other host's clock, hence the file's time, is years off: never stale at once, never eternal."""
    path = claim_of_another_host(tmp_path, mtime=path_now(tmp_path) + skew_s)
    clock = Clock(1000.0)
    claims = Claims(tmp_path, WORKERS, clock=clock)
    assert claims.held() == {"00000"}
    clock.now += 119
    assert claims.take("00000") is None
    os.utime(path, (path.stat().st_mtime + 10,) * 2)  # a sign of life, on the other clock
    clock.now += 119
    assert claims.take("00000") is None
    clock.now += 119
    assert claims.take("00000") is None  # seen unchanged for 119 s since the sign was noticed
    clock.now += 2
    assert claims.held() == set()
    assert claims.take("00000")


def path_now(folder: Path) -> float:
    """The file system's own time."""
    probe = folder / "probe"
    probe.touch()
    return probe.stat().st_mtime


def test_a_half_written_claim_is_taken_over_soon(tmp_path):
    path = claim_of_another_host(tmp_path)
    path.write_text("{")
    clock = Clock()
    claims = Claims(tmp_path, WORKERS, clock=clock)
    assert claims.take("00000") is None  # perhaps being written this moment
    clock.now += WORKERS.heartbeat_s + 1
    assert claims.take("00000")


def test_a_worker_without_progress_gives_no_sign_of_life_and_is_taken_over(tmp_path):
    """Its heart beats on; what counts is that the work goes on."""
    clock = Clock()
    stuck, other = Claims(tmp_path, WORKERS, clock=clock), Claims(tmp_path, WORKERS, clock=clock)
    held = stuck.take("00000")
    path = tmp_path / "claims" / "00000.json"
    make_foreign(path)
    taken_after = None
    for clock.now in range(0, 3000, 10):
        if clock.now <= 500:
            held.progress()
        held.renew()
        if other.take("00000"):
            taken_after = clock.now - 500
            break
    assert taken_after is not None
    assert 900 + 100 < taken_after <= 900 + 120 + 30
    held.renew()  # it wakes up: the claim is another's now, and stays
    held.release()
    assert path.exists()
    assert Claims(tmp_path, WORKERS).held() == {"00000"}


def make_foreign(path: Path) -> None:
    """The claim, as if another machine had made it: its process cannot be asked."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "other"}))


def test_of_many_workers_one_gets_a_claim(tmp_path):
    """Threads at one barrier, as often as there are claims: exactly one wins each, stale ones excepted."""
    start, wins = threading.Barrier(8), []

    def run() -> None:
        claims = Claims(tmp_path, WORKERS)
        for number in range(30):
            start.wait()
            if claims.take(f"{number:05d}"):
                wins.append(number)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(30))


def test_workers_that_start_at_once_spread_over_the_shards(tmp_path):
    """Whoever loses the first shard takes any other: a start costs a few attempts each, not one per worker before."""
    boards = [Board(tmp_path, "plan", 200, WORKERS, worker=f"w{i}") for i in range(40)]
    attempts = 0
    taken, contexts = [], []
    for board in boards:
        take = board.claims.take

        def counted(name, take=take):
            nonlocal attempts
            attempts += 1
            return take(name)

        board.claims.take = counted
        context = board.take_one(range(200))  # none of them has seen what the others did since
        taken.append(context.__enter__())
        contexts.append(context)
    assert len(set(taken)) == 40
    assert attempts < 40 * 3
    for context in contexts:
        context.__exit__(None, None, None)


def test_a_folder_that_cannot_hold_claims_is_an_error_that_says_so(tmp_path):
    (tmp_path / "claims").write_text("a file")
    with pytest.raises(OutputError, match="claims.*is a link or a file"):
        Claims(tmp_path, WORKERS).take("00000")
