"""Which caches are checked in full when they are opened: all that this user has not checked before."""

import dataclasses
import os
import shutil
import stat

import numpy as np
import pytest
from tide.shared.cache import open_cache, read_manifest, write_receipt, write_shard, writer
from tide.shared.cache import verify as verify_module
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.trust import is_private, is_trusted, keep_note, trust_note
from tide.shared.cache.verify import verify_cache
from tide.shared.errors import CacheError
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import make_cache as dump_tiny
from tiny_runs import tiny_config


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """An empty folder of notes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tide" / "verified"


@pytest.fixture
def root(make_cache):
    """A synthetic cache: nothing notes that it was written here."""
    return make_cache()


@pytest.fixture
def looks(monkeypatch):
    """How often a cache was checked in full."""
    seen = []
    check = verify_module._check_in_child
    monkeypatch.setattr(verify_module, "_check_in_child", lambda *a, **k: (seen.append(a), check(*a, **k)))
    return seen


def flip_a_bit(path):
    """Size and times stay as they were, as with `cp --preserve` of a damaged copy; the time of the change cannot."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_new_folder_is_checked_in_full_once(root, notes, looks):
    for _ in range(3):
        open_cache(root)
    describe_cache(root)
    assert len(looks) == 1
    assert len(list(notes.iterdir())) == 1


def test_a_copy_is_another_folder_and_a_renamed_one_is_not(root, notes, looks, tmp_path):
    open_cache(root)
    copied = shutil.copytree(root, tmp_path / "copied")
    open_cache(copied)
    os.rename(copied, tmp_path / "renamed")
    open_cache(tmp_path / "renamed")
    assert len(looks) == 2


@pytest.mark.parametrize("opened", [open_cache, describe_cache])
def test_a_file_that_changed_since_is_looked_at_again(root, notes, opened):
    opened(root)
    shard = root / read_manifest(root).shards[0].name
    flip_a_bit(shard)
    with pytest.raises(CacheError, match=shard.name):
        opened(root)


def test_what_changes_during_the_checks_is_not_trusted(root, notes):
    manifest = read_manifest(root)
    note = trust_note(root, manifest)
    flip_a_bit(root / manifest.shards[0].name)
    keep_note(note)
    assert not is_trusted(root, manifest)


def test_nothing_in_the_cache_itself_can_vouch_for_it(root, notes, looks, tmp_path):
    open_cache(root)
    shutil.copytree(notes, root / "tide" / "verified")
    open_cache(shutil.copytree(root, tmp_path / "stranger"))
    assert len(looks) == 2


def test_without_a_place_for_notes_checks_are_made_again(root, tmp_path, monkeypatch, looks):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        open_cache(root)
    assert len(looks) == 2


def test_old_notes_are_thrown_away(root, notes, monkeypatch):
    monkeypatch.setattr("tide.shared.notes.MAX_NOTES", 2)
    notes.mkdir(parents=True)
    for n in range(3):
        (notes / f"{n:064x}").touch()
        os.utime(notes / f"{n:064x}", (n, n))
    (notes / "diary.txt").touch()  # not ours
    os.utime(notes / "diary.txt", (0, 0))
    verify_cache(root)
    assert is_trusted(root, read_manifest(root))
    left = {path.name for path in notes.iterdir()}
    assert {"diary.txt", f"{2:064x}"} < left
    assert len(left) == 3


def test_a_cache_that_was_dumped_here_needs_no_second_look(tiny_root, looks):
    open_cache(dump_tiny(tiny_root, "dumped-here", tiny_config(tiny_root)))
    assert looks == []


def test_a_damaged_copy_never_reaches_training(tiny_root, tmp_path):
    config = tiny_config(tiny_root)
    copy = shutil.copytree(dump_tiny(tiny_root, "dumped-here", config), tmp_path / "copy")
    flip_a_bit(copy / read_manifest(copy).shards[0].name)
    with pytest.raises(CacheError, match="SHA-256"):
        train_student(config, str(copy), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_announces_a_long_first_look(root, notes, monkeypatch, tide):
    monkeypatch.setattr("tide.commands.printing._LARGE_BYTES", 1)
    assert "looking at every byte, once" in tide("inspect-cache", root)[2]
    assert tide("inspect-cache", root)[2] == ""


@pytest.mark.parametrize("place", ["", "data", "manifest.json", "shard", ".."])
@pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "all"])
def test_a_folder_that_others_may_write_is_checked_whenever_it_is_opened(root, notes, looks, place, mode):
    path = root / (read_manifest(root).shards[0].name if place == "shard" else place)
    kept = path.resolve().stat().st_mode
    path.chmod(kept | mode)
    for _ in range(2):
        assert len(open_cache(root)) > 0
    assert len(looks) == 2
    path.chmod(kept)
    for _ in range(2):
        open_cache(root)
    assert len(looks) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("place", ["", "data", "shard", ".."])
def test_a_file_or_folder_of_somebody_else_is_checked_whenever_it_is_opened(root, notes, looks, place):
    path = root / (read_manifest(root).shards[0].name if place == "shard" else place)
    os.chown(path, 12345, 12345)
    try:
        for _ in range(2):
            open_cache(root)
    finally:
        os.chown(path.resolve(), 0, 0)
    assert len(looks) == 2


@pytest.mark.parametrize("place", ["note", "verified", "tide", "home"])
def test_notes_that_others_may_write_do_not_count(root, notes, looks, place):
    open_cache(root)
    note = next(notes.iterdir())
    path = {"note": note, "verified": notes, "tide": notes.parent, "home": notes.parent.parent}[place]
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o020)
    open_cache(root)
    assert len(looks) == 2


def test_a_sticky_folder_on_the_way_is_no_danger_and_a_link_in_a_shared_one_is(tmp_path):
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    mine, shared = tmp_path / "sticky" / "mine", tmp_path / "shared"
    mine.mkdir()
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to(mine)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "further").symlink_to("shared/link")
    (tmp_path / "circle").symlink_to("circle")
    assert is_private(mine)
    assert is_private(tmp_path / "link")
    assert is_private(tmp_path / "sticky" / ".." / "link")
    for name in ("shared", "shared/link", "further", "circle", "absent", "sticky"):
        assert not is_private(tmp_path / name), name


def test_what_is_exchanged_between_check_and_read_is_not_read(root, notes, make_cache):
    root.chmod(0o777)
    other = next((make_cache(name="other", num_shards=1) / "data").iterdir()).read_bytes()
    cache = open_cache(root)
    shard = root / cache.manifest.shards[1].name
    shard.with_suffix(".new").write_bytes(other)
    shard.with_suffix(".new").replace(shard)
    with pytest.raises(CacheError, match=f"{shard.name}: SHA-256 differs"):
        cache[len(cache) - 1]
    assert len(cache.read_row_group(0, 0)) > 0


def test_what_is_written_to_while_it_is_open_is_not_read(root, notes):
    root.chmod(0o777)
    cache = open_cache(root)
    shard, _ = root / cache.manifest.shards[0].name, cache.read_row_group(0, 0)
    flip_a_bit(shard)
    with pytest.raises(CacheError, match=f"{shard.name}: (somebody wrote to it|damaged)"):
        cache.read_row_group(0, 0)


def test_a_vocabulary_that_is_exchanged_is_not_read(tiny_root, tmp_path):
    root = shutil.copytree(dump_tiny(tiny_root, "dumped-here", tiny_config(tiny_root)), tmp_path / "copy")
    cache = open_cache(root)
    flip_a_bit(root / "vocabulary.parquet")
    with pytest.raises(CacheError, match=r"vocabulary\.parquet: SHA-256 differs"):
        cache.vocabulary()


@pytest.mark.parametrize("lie", ["ids beyond the vocabulary", "statistics", "nothing"])
def test_a_colleagues_shard_is_checked_before_a_manifest_vouches_for_it(tiny_root, tmp_path, monkeypatch, lie, looks):
    config = tiny_config(tiny_root)
    root = shutil.copytree(dump_tiny(tiny_root, "dumped-here", config), tmp_path / "shared")
    cache = open_cache(root)
    first = [row for g in cache.row_groups if g.shard == 0 for row in cache.read_row_group(0, g.group)]
    manifest, name = cache.manifest, cache.manifest.shards[0].name
    (root / "manifest.json").unlink()
    (root / name).unlink()
    if lie == "ids beyond the vocabulary":
        first = [dataclasses.replace(row, x_0=np.full_like(row.x_0, 10**6)) for row in first]
    with monkeypatch.context() as patch:
        if lie == "ids beyond the vocabulary":
            patch.setattr(writer, "check_batch", lambda *a: None)  # the colleague's own code checks nothing
        made = write_shard(root / name, first, manifest.layout, plan_hash=manifest.plan_hash, shard=0)
    if lie == "statistics":
        made = dataclasses.replace(made, gold_logp=made.gold_logp - 1.0)
    write_receipt(root, name, shard=0, plan_hash=manifest.plan_hash, statistics=made)
    looks.clear()
    if lie == "nothing":
        dump_teacher(config, root)
        assert len(looks) == 1
        return
    with pytest.raises(CacheError, match="The manifest was not written"):
        dump_teacher(config, root)
    assert not (root / "manifest.json").exists()
    (root / name).unlink()
    (root / "receipts" / "00000.json").unlink()
    assert dump_teacher(config, root).hash == manifest.hash
