"""The folder of fetched shards: what was not used for longest makes room, and never what a running process reads."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tide.shared.cache.files import sha256_bytes
from tide.shared.cache.manifest import FileEntry
from tide.shared.cache.shard_cache import ShardCache, WrongBytes
from tide.shared.config import ShardCacheConfig
from tide.shared.errors import ConfigError

SIZE = 1000


def entry(number: int) -> FileEntry:
    data = content(number)
    return FileEntry(f"data/{number:05d}.parquet", sha256_bytes(data), len(data))


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


class Reader:
    """Brings files by number, and notes which ones had to be fetched."""

    def __init__(self, folder: Path, num_files: float = 3) -> None:
        self.shards = ShardCache(ShardCacheConfig(str(folder), num_files * SIZE / 1e9))
        self.root, self.fetched = folder / "snapshots" / "m", list[int]()

    def bring(self, *numbers: int) -> None:
        for number in numbers:
            self.shards.bring(self.root, entry(number), lambda target, n=number: self._fetch(target, n))
            assert (self.root / entry(number).name).read_bytes() == content(number)
            time.sleep(0.002)  # times of use differ

    def release(self, *numbers: int) -> None:
        for number in numbers:
            self.shards.release(entry(number))

    def _fetch(self, target: Path, number: int) -> None:
        self.fetched.append(number)
        target.write_bytes(content(number))


def kept(folder: Path) -> list[int]:
    """Numbers of the files that are there."""
    return sorted(path.read_bytes()[0] for path in (folder / "blobs").iterdir())


def test_the_file_that_was_not_used_for_longest_makes_room(tmp_path):
    reader = Reader(tmp_path)
    reader.bring(1, 2, 3)
    reader.release(1, 2, 3)
    reader.bring(1)  # used again
    reader.release(1)
    reader.bring(4)
    assert kept(tmp_path) == [1, 3, 4]
    reader.bring(3, 2)
    assert kept(tmp_path) == [2, 3, 4]
    assert reader.fetched == [1, 2, 3, 4, 2]


def test_what_this_process_uses_stays_and_more_than_the_limit_is_said_once(tmp_path):
    reader = Reader(tmp_path)
    with pytest.warns(UserWarning, match=r"more than shard_cache.limit_gb = 3e-06; none of it is removed") as caught:
        reader.bring(1, 2, 3, 4, 5)
    assert len(caught) == 1
    assert kept(tmp_path) == [1, 2, 3, 4, 5]
    reader.release(1, 2, 3, 4)
    reader.bring(6)
    assert kept(tmp_path) == [4, 5, 6]


def test_a_file_brought_twice_is_released_twice(tmp_path):
    reader = Reader(tmp_path, 1)
    reader.bring(1, 1)
    reader.release(1)
    with pytest.warns(UserWarning, match="more than"):
        reader.bring(2)
    assert kept(tmp_path) == [1, 2]


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_shard_cache import Reader
reader = Reader(Path({folder!r}))
reader.bring(1, 2)
print("ready", flush=True)
time.sleep(120)
"""


def test_what_another_process_reads_stays_until_it_is_dead(tmp_path):
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "ready\n"
        reader = Reader(tmp_path)
        reader.bring(3)
        reader.release(3)
        reader.bring(4)
        assert kept(tmp_path) == [1, 2, 4]
        reader.release(4)
        reader.bring(1)  # both use it
        other.send_signal(signal.SIGKILL)
        other.wait(30)
        reader.bring(5)
        reader.bring(6)
        assert kept(tmp_path) == [1, 5, 6]
        assert len(list((tmp_path / "in_use").iterdir())) == 1
    finally:
        other.kill()
        other.wait(30)
        other.stdout.close()


def read_at_once(readers: list[Reader], numbers: Callable[[int], Iterable[int]]) -> None:
    """Every reader in a thread of its own; `numbers`: of a reader to those of the files that it reads in turn."""
    errors = []

    def read(reader: Reader, order: Iterable[int]) -> None:
        try:
            for number in order:
                reader.bring(number)  # reads it, too
                reader.release(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(reader, numbers(n))) for n, reader in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_many_readers_at_once_fetch_each_file_once_and_read_what_they_asked_for(tmp_path):
    readers = [Reader(tmp_path, 4) for _ in range(8)]
    read_at_once(readers, lambda n: [(n + turn) % 4 for turn in range(12)])
    assert sorted(n for reader in readers for n in reader.fetched) == [0, 1, 2, 3]


def test_files_come_and_go_under_readers_that_need_more_than_fits(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # four in use, and room for three
        read_at_once([Reader(tmp_path, 3) for _ in range(4)], lambda n: [(n + 5 * turn) % 7 for turn in range(30)])
    assert len(kept(tmp_path)) <= 4


def test_damaged_files_are_fetched_again_and_wrong_ones_refused(tmp_path):
    reader = Reader(tmp_path)
    reader.bring(1)
    blob = tmp_path / "blobs" / entry(1).sha256
    blob.write_bytes(content(2))
    reader.bring(1)
    assert reader.fetched == [1, 1]
    with pytest.raises(WrongBytes, match="00003.parquet arrived twice with another size or SHA-256"):
        reader.shards.bring(reader.root, entry(3), lambda target: target.write_bytes(content(4)) and None)
    assert kept(tmp_path) == [1]


def test_a_reader_that_is_gone_uses_nothing_and_its_half_file_goes(tmp_path):
    reader = Reader(tmp_path)
    reader.bring(1, 2)
    (tmp_path / "blobs" / f".{entry(9).sha256}.{'0' * 32}").write_bytes(b"half")
    del reader
    other = Reader(tmp_path)
    other.bring(3, 4)
    assert kept(tmp_path) == [2, 3, 4]
    assert len(list((tmp_path / "in_use").iterdir())) == 1


def test_the_folder_follows_the_environment_and_limits_are_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCacheConfig().path == tmp_path / "tide" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ShardCacheConfig().path == Path(os.path.expanduser("~/.cache/tide/shards"))
    assert ShardCacheConfig(str(tmp_path / "x")).path == tmp_path / "x"
    with pytest.raises(ConfigError, match="shard_cache.limit_gb = 0"):
        ShardCacheConfig(limit_gb=0)
