"""Pipes, devices and sockets in the place of a file end in a message at once, whatever kind of file it should be."""

import os
import socket
from pathlib import Path

import pytest
from tide.shared.cache.files import read_bounded, sha256_file
from tide.shared.cache.manifest import read_manifest
from tide.shared.errors import DataError
from tide.shared.licences import folder_licence
from tide.shared.regular_files import open_regular, read_regular, require_regular
from tide.shared.sources import content_hash, parse_sources, source_kind


def test_a_file_a_link_to_one_and_an_empty_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "empty").touch()
    assert [read_regular(tmp_path / n, max_bytes=9) for n in ("file", "link", "empty")] == [b"abc", b"abc", b""]
    assert read_regular(tmp_path / "file", max_bytes=1) == b"ab"  # a byte more tells that there is more
    require_regular([*tmp_path.iterdir(), tmp_path, tmp_path / "absent"])


def test_what_is_absent_or_a_folder_is_the_errors_of_open(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
def test_every_reader_refuses_what_is_no_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = Path("data.jsonl")
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    (source,) = parse_sources(str(path.absolute()))
    for read in (
        lambda: open_regular(path), lambda: require_regular([path]), lambda: sha256_file(path),
        lambda: read_bounded(path, max_bytes=9), lambda: source_kind(source), lambda: content_hash(source),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"data.jsonl: is {kind}; expected a regular file"):
            read()


def test_a_pipe_in_a_data_folder_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "train.jsonl")
    from tide.shared.sources import pin_sources

    with pytest.raises(DataError, match=r"train\.jsonl: is a named pipe"):
        pin_sources(parse_sources(str(tmp_path / "data")))


def test_a_pipe_in_place_of_a_manifest_or_card_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DataError):
        read_manifest(tmp_path)
    os.mkfifo(tmp_path / "README.md")
    assert folder_licence(tmp_path) is None
