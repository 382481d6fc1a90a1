"""Which caches are checked in full when they are opened: all that this user has not checked before."""

import os
import shutil

import pytest
from tide.shared.cache import open_cache, read_manifest
from tide.shared.cache import verify as verify_module
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.trust import is_trusted, keep_note, notes_folder, trust_note
from tide.shared.cache.verify import verify_cache
from tide.shared.errors import CacheError
from tide.student_train.trainer import train_student
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
    monkeypatch.setattr("tide.shared.cache.trust.MAX_NOTES", 2)
    notes.mkdir(parents=True)
    for n in range(3):
        (notes / f"{n:064x}").touch()
        os.utime(notes / f"{n:064x}", (n, n))
    (notes / "diary.txt").touch()  # not ours
    os.utime(notes / "diary.txt", (0, 0))
    verify_cache(root)
    assert is_trusted(root, read_manifest(root))
    left = {path.name for path in notes_folder().iterdir()}
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
