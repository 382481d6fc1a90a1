"""Links in folders that others may write: what they lead to is never listed, emptied, overwritten or removed."""

import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dump_checks import without_links_and_folder_fsync
from tide.shared.cache import own_entries
from tide.shared.cache.files import create_once, fsync_folder
from tide.shared.cache.manifest import FileEntry
from tide.shared.cache.shard_cache import ShardCache
from tide.shared.cache.store import FolderStore
from tide.shared.config import ShardCacheConfig
from tide.shared.errors import OutputError
from tide.student_train.checkpoint import remove_run
from tide.student_train.metrics import MetricsFile
from tide.teacher_dump.finalize import tidy


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user's own, beside `shared`; at the end everything in it is as it was."""
    folder = tmp_path / "mine"
    names = [
        "thesis.tex", "00001.json", f".plan.json.{os.uname().nodename}-999999-0123abcd.tmp", "a" * 64, "b" * 32,
        "sub/step-00000001/model.safetensors", "step-00000001/tide_state.json", "data/x.parquet",
    ]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "shared").mkdir()
    yield folder
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(names)
    assert [name for name, path in found.items() if path.read_text() != name] == []


@pytest.mark.parametrize("folder", ["claims", "workers", "receipts", "data"])
def test_a_link_in_the_place_of_a_folder_of_ours_is_refused_by_every_verb(mine, tmp_path, folder):
    root = tmp_path / "shared"
    (root / folder).symlink_to(mine)
    store = FolderStore(root)
    verbs = [
        lambda: store.names(folder), lambda: store.entries(folder), lambda: store.remove_folder(folder),
        lambda: store.create(f"{folder}/new.json", b"x"), lambda: store.write(f"{folder}/new.json", b"x"),
        lambda: store.write(f"{folder}/new.json", b"x", durable=False),
        lambda: store.write_once(f"{folder}/new.json", b"x"), lambda: store.remove(f"{folder}/thesis.tex"),
        lambda: store.require_own(folder),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(OutputError, match=rf"'{folder}' is a link or a file where tide keeps a folder"):
            verb()
    with pytest.raises(OutputError):
        tidy(root)


def test_a_link_in_the_place_of_a_file_is_removed_or_replaced_itself(mine, tmp_path):
    store = FolderStore(tmp_path / "shared")
    store.create("claims/00002.json", b"x")
    for name in ("00001.json", "00003.json"):
        (tmp_path / "shared" / "claims" / name).symlink_to(mine / "00001.json")
    before = (mine / "00001.json").stat().st_mtime_ns
    store.renew("claims/00001.json", b"y")
    assert store.entry("claims/00001.json") is None
    store.write("claims/00003.json", b"z")
    store.remove_folder("claims")
    assert not (tmp_path / "shared" / "claims").exists()
    assert (mine / "00001.json").stat().st_mtime_ns == before


def test_only_names_that_tide_makes_are_removed(tmp_path):
    store = FolderStore(tmp_path)
    store.create("claims/00002.json", b"x")
    (tmp_path / "claims" / "notes.txt").write_text("of a colleague")
    (tmp_path / "claims" / "folder.json").mkdir()
    store.remove_folder("claims")
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["folder.json", "notes.txt"]


@pytest.mark.parametrize("folder", ["blobs", "snapshots", "in_use", "fetching"])
def test_a_shard_cache_whose_folder_leads_elsewhere_is_refused(mine, tmp_path, folder):
    root = tmp_path / "shared"
    (root / folder).symlink_to(mine)
    with pytest.raises(OutputError, match="is a link or a file"):
        ShardCache(ShardCacheConfig(str(root), 1e-9))


def test_a_lock_of_the_shard_cache_that_leads_elsewhere_is_refused(mine, tmp_path):
    (tmp_path / "shared" / "lock").symlink_to(mine / "thesis.tex")
    with pytest.raises(OutputError, match="cannot be written"):
        ShardCache(ShardCacheConfig(str(tmp_path / "shared"), 1.0))


def test_making_room_leaves_what_is_not_the_shard_caches(mine, tmp_path):
    root = tmp_path / "shared"
    shards = ShardCache(ShardCacheConfig(str(root), 1e-9))
    (root / "blobs" / "photo.jpg").write_bytes(b"x" * 100)
    (root / "snapshots" / "thesis").mkdir()
    (root / "blobs" / ("c" * 64)).symlink_to(mine / "thesis.tex")
    entry = FileEntry("data/0.parquet", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", 1)
    shards.bring(root / "snapshots" / ("d" * 64), entry, lambda target: target.write_bytes(b"x") and None)
    assert (root / "blobs" / "photo.jpg").exists()
    assert (root / "snapshots" / "thesis").exists()


@pytest.mark.parametrize("folder", ["student", "checkpoints"])
def test_a_run_that_begins_anew_removes_nothing_through_a_link(mine, tmp_path, folder):
    out = tmp_path / "shared"
    (mine / "step-00000001" / "tide_state.json").exists()
    (out / folder).symlink_to(mine / "step-00000001" if folder == "student" else mine)
    with pytest.raises(OutputError, match="is a link or a file"):
        remove_run(out)


def test_metrics_are_not_written_through_a_link(mine, tmp_path):
    (tmp_path / "shared" / "metrics.jsonl").symlink_to(mine / "thesis.tex")
    with pytest.raises(OutputError, match="metrics.jsonl"):
        MetricsFile(tmp_path / "shared").append({"step": 1})


def test_a_tree_with_links_inside_is_removed_and_what_they_lead_to_is_not(mine, tmp_path):
    tree = tmp_path / "shared" / "old"
    tree.mkdir()
    (tree / "link").symlink_to(mine)
    own_entries.remove_tree(tmp_path / "shared", "old")
    assert not tree.exists()


def _write_once(path: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        without_links_and_folder_fsync(patch)
        create_once(path, f"{number}".encode() * 1000)


def test_of_several_writers_without_hard_links_one_wins(tmp_path):
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        path = tmp_path / f"plan-{attempt}.json"
        writers = [fork.Process(target=_write_once, args=(path, number)) for number in range(6)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert re.fullmatch(r"(\d)\1{999}", path.read_text())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_name_left_empty_by_a_killed_writer_is_filled(tmp_path, monkeypatch):
    (tmp_path / "plan.json").touch()
    assert not FolderStore(tmp_path).exists("plan.json")
    without_links_and_folder_fsync(monkeypatch)
    monkeypatch.setattr("tide.shared.cache.files._EMPTY_S", 0.05)
    create_once(tmp_path / "plan.json", b"{}")
    assert (tmp_path / "plan.json").read_bytes() == b"{}"
    create_once(tmp_path / "plan.json", b"another")
    assert (tmp_path / "plan.json").read_bytes() == b"{}"
    fsync_folder(tmp_path)
