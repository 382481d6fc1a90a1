"""kill -9 of the whole process group at random moments: nothing unreadable under a final name, the same bytes at last.

Children are forked from this process, which has imported everything, so a restart costs no import; writing is slowed
down, so that kills fall between writing and renaming too.
"""

import contextlib
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from dump_checks import file_hashes, fork, join, require_sound_files
from tide.shared.config import RunConfig
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.launchers import local
from tide.teacher_dump.plan import read_plan
from tiny_runs import tiny_config


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync and every rename takes a while, in this process and its children."""

    def slowed(function):
        def slow(*args):
            time.sleep(0.02)
            result = function(*args)
            time.sleep(0.02)
            return result

        return slow

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, slowed(getattr(os, name)))


def kill_and_restart(config: RunConfig, folder: Path, *, num_kills: int, num_workers: int, seed: int) -> None:
    """Dump, kill, check, and so on; a cache that is complete before it is killed is checked and begun anew."""
    start = time.monotonic()
    assert join(fork(partial(dump_teacher, config, folder / "expected", num_workers=num_workers))) == [0]
    whole_s = time.monotonic() - start
    expected, rng = file_hashes(folder / "expected"), random.Random(seed)
    num_shards = read_plan(folder / "expected").num_shards
    root, done, kills, states = folder / "cache", 0, 0, set()
    in_the_middle = False  # a shared machine's speed varies: go on (within bounds) until a kill met a half-done dump
    while kills < num_kills or not (in_the_middle or kills > 5 * num_kills):
        child = fork(partial(dump_teacher, config, root, num_workers=num_workers), group=0)
        time.sleep(rng.uniform(0.05, 0.9) * whole_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        killed = join(child) == [-signal.SIGKILL]
        kills += killed
        now = require_sound_files(root)
        assert now >= done, "a finished shard was lost"
        whole_s *= (1.2 if now == done else 1.0) if killed else 0.7
        done, states = now, states | {now}
        in_the_middle = any(0 < state < num_shards for state in states)
        if (root / "manifest.json").exists():
            dump_teacher(config, root)
            assert file_hashes(root) == expected
            root, done = folder / f"cache-{kills}", 0
    dump_teacher(config, root)
    assert file_hashes(root) == expected
    assert in_the_middle, f"no kill fell into the middle: {states}, {whole_s} s"


@pytest.mark.usefixtures("slow_disk")
def test_a_dump_killed_at_three_random_moments_ends_with_the_same_bytes(tiny_root, tmp_path):
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=2)
    kill_and_restart(config, tmp_path, num_kills=3, num_workers=1, seed=1)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("seed", [2, 3])
def test_a_dump_killed_at_ten_random_moments_ends_with_the_same_bytes(
    tiny_root, tmp_path, monkeypatch, num_workers, seed
):
    monkeypatch.setattr(local, "START_METHOD", "fork")
    config = tiny_config(tiny_root, shards__samples_per_shard=1, noise__views=2)
    kill_and_restart(config, tmp_path, num_kills=10, num_workers=num_workers, seed=seed)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_rename_leaves_a_cache_that_continues(tiny_root, tmp_path, after):
    """Not random: one process after another dies right before, or right after, its first, second, ... rename."""
    config = tiny_config(tiny_root, shards__samples_per_shard=2, noise__views=1)
    dump_teacher(config, tmp_path / "expected")
    expected, root, rename = file_hashes(tmp_path / "expected"), tmp_path / "cache", os.replace

    def dump_and_die(number: int) -> None:
        renames = iter(range(number))

        def replace(source, target):
            last = next(renames, None) is None
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        dump_teacher(config, root)

    deaths = 0
    while join(fork(partial(dump_and_die, deaths))) == [-signal.SIGKILL]:
        require_sound_files(root)
        deaths += 1
    assert deaths >= 4  # each shard is renamed and so is its receipt, but a life that survives n renames makes n
    assert (root / "manifest.json").exists()
    dump_teacher(config, root)
    assert file_hashes(root) == expected
