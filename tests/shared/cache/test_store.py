"""Places for a cache: the same verbs mean the same in a folder, in a bucket, and where a store can do less."""

import threading
from pathlib import Path
from typing import Any

import pytest
from tide.shared.addresses import is_url, require_folder
from tide.shared.cache import object_store
from tide.shared.cache.object_store import ObjectStore
from tide.shared.cache.scratch import make_scratch
from tide.shared.cache.store import FolderStore, Store, open_store
from tide.shared.errors import ConfigError, OutputError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # aiohttp's sockets


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty place of each kind."""
    if request.param == "folder":
        return open_store(tmp_path / "cache")
    url = f"memory://{tmp_path.name}/cache" if request.param == "memory" else request.getfixturevalue("bucket") + "/c"
    return open_store(url, patience_s=5, scratch=str(tmp_path / "scratch"))


def test_files_are_written_listed_read_and_removed(store):
    assert store.names("claims") == set()
    assert store.entries("claims") == {}
    assert store.entry("claims/a.json") is None
    assert not store.exists("manifest.json")
    with pytest.raises(FileNotFoundError):
        store.read("claims/a.json", max_bytes=10)
    store.write("claims/a.json", b"one")
    store.write("claims/b.json", b"three", durable=False)
    store.write("manifest.json", b"{}")
    assert store.exists("manifest.json")
    assert store.names("claims") == {"a.json", "b.json"}
    assert {name: entry.bytes for name, entry in store.entries("claims").items()} == {"a.json": 3, "b.json": 5}
    assert store.num_bytes("claims/b.json") == 5
    assert store.num_bytes("claims/c.json") is None
    assert store.read("claims/b.json", max_bytes=2) == b"thr"
    store.write("claims/a.json", b"2")
    assert store.read("claims/a.json", max_bytes=9) == b"2"
    assert store.sha256("claims/a.json") == "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35"
    store.remove("claims/a.json", "claims/nothing.json")
    assert store.names("claims") == {"b.json"}
    store.remove_folder("claims")
    store.remove_folder("claims")
    assert store.names("claims") == set()
    assert store.exists("manifest.json")


def test_of_many_who_create_a_file_one_is_told_so(store):
    won: list[int] = []

    def create(number: int) -> None:
        if store.create("claims/x.json", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert store.read("claims/x.json", max_bytes=9) == b"%d" % won[0]


def test_a_renewed_file_has_another_version_and_the_same_identity(store):
    store.create("claims/x.json", b"1")
    before = store.entry("claims/x.json")
    threading.Event().wait(0.02)
    store.renew("claims/x.json", b"2")
    after = store.entry("claims/x.json")
    assert before is not None
    assert after is not None
    assert (before.version != after.version, before.identity) == (True, after.identity)
    assert store.entries("claims")["x.json"].version == after.version  # a listing tells the same as a look


def test_what_is_written_once_stays(store):
    store.write_once("receipts/teacher.json", b"first")
    store.write_once("receipts/teacher.json", b"second")
    assert store.read("receipts/teacher.json", max_bytes=99) == b"first"


def test_published_files_are_at_their_place(store):
    for name in ("data/a", "receipts/a"):
        (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (store.folder / name).write_bytes(name.encode())
    store.publish(["data/a", "receipts/a"])
    assert store.read("data/a", max_bytes=99) == b"data/a"
    assert store.names("receipts") == {"a"}
    if isinstance(store, ObjectStore):
        assert not [path for path in store.folder.rglob("*") if path.is_file() and path.name[0] != "."]


def memory(tmp_path: Path, **settings: Any) -> ObjectStore:
    return ObjectStore(f"memory://{tmp_path.name}/m", patience_s=1, scratch=str(tmp_path / "scratch"), **settings)


def test_without_exclusive_creation_whoever_wrote_last_has_it(tmp_path):
    stores = []

    def others_write(seconds: float) -> None:  # while the first one waits for the dust to settle
        stores[1].write("claims/x.json", b"theirs")

    stores += [memory(tmp_path, sleep=others_write), memory(tmp_path, sleep=lambda seconds: None)]
    for one in stores:
        one.creates_exclusively = False
    assert not stores[0].create("claims/x.json", b"mine")
    assert stores[1].create("claims/y.json", b"theirs")
    assert not stores[0].create("claims/y.json", b"mine")


def test_a_creation_whose_answer_was_lost_is_known_as_ones_own(tmp_path, monkeypatch):
    store, failures = memory(tmp_path, sleep=lambda seconds: None), [ConnectionResetError("lost")]
    pipe = store.fs.pipe_file

    def lossy(*arguments: Any, **options: Any) -> None:
        pipe(*arguments, **options)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(store.fs, "pipe_file", lossy)
    assert store.create("claims/x.json", b"mine")


def test_a_store_that_changes_bytes_is_found_out(tmp_path, monkeypatch):
    store = memory(tmp_path)
    (store.folder / "data").mkdir()
    (store.folder / "data" / "a").write_bytes(b"sent")
    monkeypatch.setattr(store.fs, "put_file", lambda path, key, **_: store.fs.pipe_file(key, b"sEnt"))
    with pytest.raises(OutputError, match=r"data/a: the store twice has other bytes than were sent"):
        store.publish(["data/a"])
    assert not store.exists("data/a")


def test_a_large_file_goes_up_in_parts_and_is_compared_without_reading_it_back(bucket, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)  # S3's smallest
    store = ObjectStore(f"{bucket}/c", patience_s=5, scratch=str(tmp_path / "scratch"))
    (store.folder / "data").mkdir()
    data = bytes(range(256)) * (44 << 10)  # 11 MiB
    (store.folder / "data" / "a").write_bytes(data)
    s3.requests.clear()
    store.publish(["data/a"])
    assert [r.split("?")[0].split()[0] for r in s3.requests] == ["POST", "PUT", "PUT", "PUT", "POST", "HEAD"]
    copy = tmp_path / "copy"
    s3.requests.clear()
    store.fetch("data/a", copy)
    assert copy.read_bytes() == data
    assert len(s3.requests) == 1


def test_a_full_scratch_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    store = ObjectStore(f"memory://{tmp_path.name}/m", patience_s=1, scratch=str(tmp_path / "file"))
    with pytest.raises(OutputError, match="workers.scratch"):
        _ = store.folder


def test_scratch_folders_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    ours = make_scratch(str(tmp_path))
    orphan = tmp_path / "tide-scratch-dead"
    orphan.mkdir()
    (orphan / ".lock").touch()
    (orphan / "shard").write_bytes(b"half")
    (tmp_path / "other").mkdir()
    make_scratch(str(tmp_path))
    assert ours.is_dir()
    assert not orphan.exists()
    assert (tmp_path / "other").is_dir()


@pytest.mark.parametrize(
    "text, url",
    [
        ("s3://b/c", True),
        ("hf://buckets/o/n/c", True),
        ("file:///tmp/c", False),
        ("cache", False),
        ("c:/d", False),
    ],
)
def test_addresses_are_told_from_paths(text, url):
    assert is_url(text) == url


def test_wrong_addresses_say_what_is_expected(tmp_path):
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    assert str(open_store(f"file://{tmp_path}")) == str(tmp_path)
    with pytest.raises(ConfigError, match="s4://b/c: no such kind of address; expected a folder, s3://"):
        open_store("s4://b/c")
    with pytest.raises(ConfigError, match="names no bucket"):
        open_store("s3://")
    with pytest.raises(ConfigError, match="push-cache works on folders, and s3://b/c is an object store"):
        require_folder(Path("s3://b/c"), "push-cache")
    with pytest.raises(ConfigError, match="is an object store"):
        open_store(Path("s3://b/c"))
