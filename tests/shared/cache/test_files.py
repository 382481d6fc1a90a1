"""Small files: atomic, bounded, inert; the vocabulary."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tide.shared.cache import files, open_cache, read_vocabulary, write_vocabulary
from tide.shared.errors import CacheError, OutputError
from tide.shared.shown_text import html_text, terminal_text


def test_an_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.atomic_write(path, b"1")
    files.atomic_write(path, b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=r"a\.json: cannot be written: the disk is full \([\d,.]+ MB free in"):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_canonical_json_is_one_byte_string_per_value():
    assert files.canonical_json({"b": 1.5, "a": ["ü", None]}) == b'{"a":["\\u00fc",null],"b":1.5}'
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json({"a": float("nan")})


def test_the_vocabulary_round_trips_and_decodes(tmp_path):
    tokens = [b"he", b"llo", b"", "ü".encode()[:1], "ü".encode()[1:], b"<|mask|>"]
    write_vocabulary(tmp_path, tokens, np.array([4, -1, 0, 1, 2, -1]))
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.token_bytes == tokens
    assert vocabulary.teacher_id.tolist() == [4, -1, 0, 1, 2, -1]
    assert vocabulary.decode(np.array([0, 1, 3, 4, 3])) == "helloü�"
    table = pq.read_table(tmp_path / "vocabulary.parquet")
    assert table.to_pylist()[1] == {"student_id": 1, "teacher_id": None, "token_bytes": b"llo"}
    assert str(table.schema.field("token_bytes").type) == "binary"


def test_a_vocabulary_without_teacher_and_one_of_wrong_length(tmp_path):
    write_vocabulary(tmp_path, [b"a", b"b"])
    assert read_vocabulary(tmp_path).teacher_id.tolist() == [-1, -1]
    with pytest.raises(CacheError, match="one id >= -1 for each of 2 student tokens"):
        write_vocabulary(tmp_path, [b"a", b"b"], np.array([1]))


def test_a_vocabulary_of_other_columns_or_order_is_refused(tmp_path):
    write_vocabulary(tmp_path, [b"a", b"b"])
    path = tmp_path / "vocabulary.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0]), path)
    with pytest.raises(CacheError, match="expected 0 to 1 in order"):
        read_vocabulary(tmp_path)
    pq.write_table(pa.table({"student_id": [0]}), path)
    with pytest.raises(CacheError, match="columns are"):
        read_vocabulary(tmp_path)
    path.write_bytes(b"PAR1PAR1")
    with pytest.raises(CacheError, match=r"vocabulary\.parquet: damaged"):
        read_vocabulary(tmp_path)
    path.unlink()
    with pytest.raises(CacheError, match=r"vocabulary\.parquet: missing"):
        read_vocabulary(tmp_path)


def test_a_cache_knows_its_vocabulary(make_cache, synthetic):
    vocabulary = open_cache(make_cache("none")).vocabulary()
    assert len(vocabulary.token_bytes) == synthetic.VOCAB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[2J\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;new title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x9b31mb", "ab"),
        ("bell\x07 back\x08", "bell� back�"),
        ("evil\u202etxt.exe", "evil�txt.exe"),
        ("zero\u200bwidth", "zero�width"),
        ("\ud800", "�"),
        ("[bold]kept[/bold]", "[bold]kept[/bold]"),
    ],
)
def test_text_for_terminals_cannot_act(text, expected):
    assert terminal_text(text) == expected


def test_text_for_html_is_escaped_and_cut():
    assert html_text("<script>'\"&\x1b[1m") == "&lt;script&gt;&#x27;&quot;&amp;"
    assert terminal_text("abcdef", max_chars=4) == "abc…"
    assert html_text("<<<<", max_chars=2) == "&lt;…"
