"""Large files are hashed once, and again wherever a note could be anyone else's or the file is not what it was."""

import hashlib
import os
from pathlib import Path

import pytest
from tide.shared import file_hashes
from tide.shared.errors import DataError
from tide.shared.file_hashes import file_sha256
from tide.shared.notes import notes_folder


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_SETTLED_S", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 1000)
    return path


def hashed(monkeypatch) -> list[int]:
    """Counts files that are really read."""
    read: list[int] = []
    original = hashlib.file_digest
    monkeypatch.setattr(file_hashes.hashlib, "file_digest", lambda *a: read.append(1) or original(*a))
    return read


def plain(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_hashed_once(file, monkeypatch):
    read = hashed(monkeypatch)
    assert [file_sha256(file) for _ in range(3)] == [plain(file)] * 3
    assert len(read) == 1


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_hashed_again(file, keep_times):
    file_sha256(file)
    status = file.stat()
    file.write_bytes(b"Weights" * 1000)
    if keep_times:  # the time of the last change of the inode cannot be set
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(file) == plain(file)


def test_another_file_of_the_same_name_is_hashed(file, tmp_path):
    file_sha256(file)
    other = tmp_path / "other"
    other.write_bytes(b"weightS" * 1000)
    os.replace(other, file)
    assert file_sha256(file) == plain(file)


def test_a_file_that_was_just_written_is_not_remembered(file, monkeypatch):
    monkeypatch.setattr(file_hashes, "_SETTLED_S", 60.0)
    assert file_sha256(file) == plain(file)
    assert not notes_folder("hashes").exists()


@pytest.mark.parametrize("spoil", ["folder", "parent", "note", "link", "text"])
def test_notes_that_others_may_write_do_not_count(file, monkeypatch, spoil, tmp_path):
    file_sha256(file)
    (note,) = notes_folder("hashes").iterdir()
    note.write_text("0" * 64)
    assert file_sha256(file) == "0" * 64  # so a note is believed, where it may be
    if spoil in ("folder", "parent"):
        (notes_folder("hashes") if spoil == "folder" else notes_folder("hashes").parent).chmod(0o777)
    elif spoil == "note":
        note.chmod(0o666)
    elif spoil == "link":
        os.replace(note, tmp_path / "elsewhere")
        note.symlink_to(tmp_path / "elsewhere")
    else:
        note.write_text("not a hash")
    assert file_sha256(file) == plain(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_notes_of_another_user_do_not_count(file):
    file_sha256(file)
    (note,) = notes_folder("hashes").iterdir()
    note.write_text("0" * 64)
    os.chown(note, 12345, 12345)
    assert file_sha256(file) == plain(file)


def test_without_a_place_for_notes_files_are_hashed(file, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert [file_sha256(file) for _ in range(2)] == [plain(file)] * 2


def test_a_pipe_has_no_hash(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a named pipe; expected a regular file"):
        file_sha256(tmp_path / "pipe")
