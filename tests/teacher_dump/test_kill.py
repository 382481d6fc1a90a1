"""kill -9 of the whole process group at random moments: nothing unreadable under a final name, the same bytes at last.

Children are forked from this process, which has imported everything, so a restart costs no import; writing is slowed
down, so that kills fall between writing and renaming too. The caches have an audit, a file between shard and receipt.
"""

import contextlib
import importlib
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from dump_checks import file_hashes, fork, join, require_sound_files, without_links_and_folder_fsync
from tide.shared.config import RunConfig
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.launchers import local
from tide.teacher_dump.plan import read_plan
from tide.teacher_dump.shard_task import ShardTask
from tiny_runs import tiny_config


def audited(root: Path, **more: int) -> RunConfig:
    """A dump whose shards have audits."""
    return tiny_config(root, signal__audit_share=0.3, signal__logp_dtype="float16", **more)


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual file system, and one without hard links and without fsync of folders."""
    if request.param == "no links":
        without_links_and_folder_fsync(monkeypatch)


@pytest.fixture
def slow_disk(file_system: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync and every rename takes a while, in this process and its children."""

    def slowed(function):
        def slow(*args):
            time.sleep(0.01)
            result = function(*args)
            time.sleep(0.01)
            return result

        return slow

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, slowed(getattr(os, name)))


def kill_and_restart(config: RunConfig, folder: Path, *, num_kills: int, num_workers: int, seed: int) -> None:
    """Dump, kill, check, and so on; a cache that is complete before it is killed is checked and begun anew.

    A log of every shard that was begun says how much was done again: at most one shard for each worker that died.
    """
    start = time.monotonic()
    assert join(fork(partial(dump_teacher, config, folder / "expected", num_workers=num_workers))) == [0]
    whole_s = time.monotonic() - start
    expected, rng = file_hashes(folder / "expected"), random.Random(seed)
    num_shards = read_plan(folder / "expected").num_shards
    root, log, done, kills, states = folder / "cache", folder / "calls", 0, 0, set()
    deaths, num_dumps = 0, 1
    run = ShardTask.run

    def logged(self, *arguments):
        with log.open("a") as file:
            file.write(f"{arguments[1]}\n")  # one write: lines of several processes never mix
        return run(self, *arguments)

    def command(root: Path) -> None:
        ShardTask.run = logged
        dump_teacher(config, root, num_workers=num_workers)

    in_the_middle = False  # a shared machine's speed varies: go on (within bounds) until a kill met a half-done dump
    while kills < num_kills or not (in_the_middle or kills > 5 * num_kills):
        child = fork(partial(command, root), group=0)
        time.sleep(rng.uniform(0.05, 0.9) * whole_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        killed = join(child) == [-signal.SIGKILL]
        kills += killed
        now = require_sound_files(root)
        assert now >= done, "a finished shard was lost"
        whole_s *= (1.2 if now == done else 1.0) if killed else 0.7
        done, states = now, states | {now}
        deaths += killed * num_workers
        in_the_middle = any(0 < state < num_shards for state in states)
        if (root / "manifest.json").exists():
            dump_teacher(config, root)
            assert file_hashes(root) == expected
            root, done, num_dumps = folder / f"cache-{kills}", 0, num_dumps + 1
    assert join(fork(partial(command, root))) == [0]
    assert file_hashes(root) == expected
    num_begun = len(log.read_text().splitlines())
    assert num_begun <= num_dumps * num_shards + deaths, "more was done again than one shard for each dead worker"
    assert in_the_middle, f"no kill fell into the middle: {states}, {whole_s} s"


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("file_system", ["no links"], indirect=True)  # the other one: among the slow tests
def test_a_dump_killed_at_three_random_moments_ends_with_the_same_bytes(tiny_root, tmp_path):
    config = audited(tiny_root, shards__samples_per_shard=1, noise__views=2)
    kill_and_restart(config, tmp_path, num_kills=3, num_workers=1, seed=1)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_disk")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(("file_system", "seed"), [("links", 2), ("no links", 3)], indirect=["file_system"])
def test_a_dump_killed_at_a_hundred_random_moments_ends_with_the_same_bytes(
    tiny_root, tmp_path, monkeypatch, num_workers, seed
):
    monkeypatch.setattr(local, "START_METHOD", "fork")
    config = audited(tiny_root, shards__samples_per_shard=1, noise__views=2)
    kill_and_restart(config, tmp_path, num_kills=25, num_workers=num_workers, seed=seed)


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_every_rename_leaves_a_cache_that_continues(tiny_root, tmp_path, after):
    """Not random: one process after another dies right before, or right after, its first, second, ... rename."""
    config = audited(tiny_root, shards__samples_per_shard=2, noise__views=1)
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
    assert (root / "audit").is_dir()
    assert deaths >= 4  # each shard is renamed and so is its receipt, but a life that survives n renames makes n
    assert (root / "manifest.json").exists()
    dump_teacher(config, root)
    assert file_hashes(root) == expected


MOMENTS = {
    "between a shard's rename and its audit": ("tide.teacher_dump.shard_task", "write_audit", False),
    "between an audit's rename and the receipt": ("tide.teacher_dump.shard_task", "write_receipt", False),
    "after a receipt": ("tide.teacher_dump.shard_task", "write_receipt", True),
    "in the middle of finalize": ("tide.teacher_dump.finalize", "write_card", False),
    "before the manifest": ("tide.teacher_dump.finalize", "write_manifest", False),
    "after the manifest, before the tidying": ("tide.teacher_dump.finalize", "write_manifest", True),
    "in the middle of the tidying": ("tide.teacher_dump.finalize", "remove_records", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_a_chosen_moment_costs_at_most_one_shard(tiny_root, tmp_path, moment):
    """The moments that random kills meet too rarely; a call log says what was done again."""
    config = audited(tiny_root, shards__samples_per_shard=2, noise__views=1)
    dump_teacher(config, tmp_path / "expected")
    expected, num_shards = file_hashes(tmp_path / "expected"), read_plan(tmp_path / "expected").num_shards
    root, log, run = tmp_path / "cache", tmp_path / "calls", ShardTask.run
    module_name, name, after = MOMENTS[moment]

    def logged(self, *arguments):
        with log.open("a") as file:
            file.write(f"{arguments[1]}\n")
        return run(self, *arguments)

    def dump_and_die() -> None:
        ShardTask.run = logged
        module = importlib.import_module(module_name)
        real = getattr(module, name)

        def die(*arguments, **options):
            if after:
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, die)
        dump_teacher(config, root)

    def dump() -> None:
        ShardTask.run = logged
        dump_teacher(config, root)

    assert join(fork(dump_and_die)) == [-signal.SIGKILL]
    require_sound_files(root)
    assert join(fork(dump)) == [0]
    assert file_hashes(root) == expected
    begun = [int(line) for line in log.read_text().splitlines()]
    assert sorted(set(begun)) == list(range(num_shards))
    assert len(begun) <= num_shards + moment.startswith("between")
