"""A shard is written whole and true, or not at all."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tide.shared.cache import ViewRow, files, write_shard, writer
from tide.shared.errors import CacheError, ConfigError, OutputError

ROW = ViewRow(
    "s-1", 2, 0.5, np.arange(8, dtype=np.int32), 2, np.array([True, True, True, False, True, True]),
    chunk_start=np.array([2, 4, 6, 7]), chunk_len=np.array([2, 1, 1, 1]), chunk_logp=np.array([-1.0, 0.0, -3.0, -2.0]),
    target_position=np.array([4, 6]), num_top=np.array([2, 1]),
    top_ids=np.array([5, 9, 5]), top_logp=np.array([-1.0, -1.5, -0.5]),
    log_tail=np.log(np.array([[0.4, 0.8], [0.3, 0.6]])),
)  # fmt: skip


def put(name: str, index: int, value: float) -> dict:
    """A change of one value of ROW."""
    array = getattr(ROW, name).copy()
    array.flat[index] = value
    return {name: array}


BAD = {
    "x_0 beyond the vocabulary": (put("x_0", 3, 300), "x_0"),
    "x_0 negative": (put("x_0", 3, -1), "x_0"),
    "x_0 not a block multiple": ({"x_0": np.arange(7), "masked": ROW.masked[:5]}, "x_0"),
    "x_0 empty": ({"x_0": np.zeros(0, np.int32), "masked": np.zeros(0, bool), "prompt_tokens": 0}, "x_0"),
    "x_0 wider than int32": ({"x_0": ROW.x_0.astype(np.int64) + 2**32}, "x_0"),
    "x_0 of floats": ({"x_0": ROW.x_0.astype(np.float32)}, "x_0"),
    "x_0 of two dimensions": ({"x_0": ROW.x_0[None]}, "x_0"),
    "t zero": ({"t": 0.0}, "t"),
    "t above one": ({"t": 1.01}, "t"),
    "t not a number": ({"t": float("nan")}, "t"),
    "view negative": ({"view": -1}, "view"),
    "view not a count": ({"view": 1.5}, "view"),
    "prompt longer than the text": ({"prompt_tokens": 9, "masked": np.zeros(0, bool)}, "masked"),
    "prompt negative": ({"prompt_tokens": -1, "masked": np.zeros(9, bool)}, "prompt_tokens"),
    "mask longer than the response": ({"masked": np.ones(7, bool)}, "masked"),
    "mask of integers": ({"masked": ROW.masked.astype(np.int32)}, "masked"),
    "sample id empty": ({"sample_id": ""}, "sample_id"),
    "sample id with an escape": ({"sample_id": "\x1b[2J"}, "sample_id"),
    "sample id too long": ({"sample_id": "x" * 257}, "sample_id"),
    "chunk in the prompt": (put("chunk_start", 0, 1), "chunk_start"),
    "chunk beyond the end": (put("chunk_len", 3, 2), "chunk_start"),
    "chunk on a clean token": (put("chunk_len", 1, 2), "chunk_start"),
    "chunks overlap": (put("chunk_len", 0, 3), "chunk_start"),
    "chunk empty": (put("chunk_len", 0, 0), "chunk_len"),
    "chunk counts disagree": ({"chunk_logp": np.array([-1.0, -1.0])}, "chunk_logp"),
    "chunk logp positive": (put("chunk_logp", 1, 0.01), "chunk_logp"),
    "chunk logp infinite": (put("chunk_logp", 1, -np.inf), "chunk_logp"),
    "chunk logp beyond float16": (put("chunk_logp", 1, -1e5), "chunk_logp"),
    "target in the prompt": (put("target_position", 0, 0), "target_position"),
    "target not masked": (put("target_position", 0, 5), "target_position"),
    "target twice": (put("target_position", 1, 4), "target_position"),
    "targets descend": ({"target_position": np.array([6, 4])}, "target_position"),
    "target in a longer chunk": ({"target_position": np.array([2, 6])}, "target_position"),
    "target within a longer chunk": ({"target_position": np.array([3, 6])}, "target_position"),
    "target in no chunk": (
        {"chunk_start": ROW.chunk_start[:3], "chunk_len": ROW.chunk_len[:3], "chunk_logp": ROW.chunk_logp[:3],
         "target_position": np.array([4, 7])}, "target_position"),
    "num_top counts disagree": (put("num_top", 0, 1), "top_ids"),
    "num_top negative": ({"num_top": np.array([4, -1])}, "num_top"),
    "num_top above top_k": (
        {"num_top": np.array([7, 0]), "top_ids": np.arange(7), "top_logp": np.full(7, -3.0)}, "num_top"),
    "top ids twice": (put("top_ids", 1, 5), "top_ids"),
    "top id beyond the vocabulary": (put("top_ids", 1, 300), "top_ids"),
    "top id negative": (put("top_ids", 1, -2), "top_ids"),
    "top logp out of order": (put("top_logp", 1, -0.9), "top_logp"),
    "top logp not a number": (put("top_logp", 1, np.nan), "top_logp"),
    "head mass above one": ({"top_logp": np.array([-0.1, -0.2, -1.0])}, "top_logp"),
    "head and tail above one": (put("log_tail", 0, -0.1), "top_logp"),
    "tail above one": (put("log_tail", 1, 0.01), "log_tail"),
    "nothing kept and no tail": (
        {"num_top": np.array([3, 0]), "top_ids": np.array([5, 9, 6]), "top_logp": np.array([-1.0, -1.5, -3.0])},
        "log_tail"),
    "log_tail not a number": (put("log_tail", 3, np.nan), "log_tail"),
    "log_tail of one temperature only": ({"log_tail": np.full((2, 1), -1.0)}, "log_tail"),
    "log_tail for more targets": ({"log_tail": np.full((3, 2), -1.0)}, "log_tail"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_out_of_range_is_refused_by_name(tmp_path, synthetic, name):
    changes, field = BAD[name]
    good = dataclasses.replace(ROW, sample_id="s-0")
    with pytest.raises(CacheError) as caught:
        write_shard(
            tmp_path / "x.parquet", [good, dataclasses.replace(ROW, **changes)], synthetic.make_layout(),
            plan_hash="p", shard=0,
        )  # fmt: skip
    message = str(caught.value)
    assert "x.parquet, row 1 (sample" in message
    assert f"), {field}: " in message
    assert list(tmp_path.iterdir()) == []


CUT = dataclasses.replace(
    ROW, log_buckets=np.log(np.array([[[0.3, 0.1], [0.5, 0.3]], [[0.1, 0.2], [0.2, 0.4]]]))
)  # fmt: skip
BAD_BUCKETS = {
    "missing": ({"log_buckets": np.zeros((0, 0, 0), np.float32)}, "log_buckets"),
    "one too few": ({"log_buckets": CUT.log_buckets[:, :, :1]}, "log_buckets"),
    "of one temperature": ({"log_buckets": CUT.log_buckets[:, :1]}, "log_buckets"),
    "positive": ({"log_buckets": CUT.log_buckets + 3}, "log_buckets"),
    "not a number": ({"log_buckets": CUT.log_buckets * np.nan}, "log_buckets"),
    "more than everything": ({"log_buckets": np.full((2, 2, 2), -0.1)}, "top_logp"),
}


@pytest.mark.parametrize("name", BAD_BUCKETS)
def test_buckets_that_cannot_be_true_are_refused_by_name(tmp_path, synthetic, name):
    changes, field = BAD_BUCKETS[name]
    layout = synthetic.make_layout(tail_buckets=(7,))
    write_shard(tmp_path / "good.parquet", [CUT], layout, plan_hash="p", shard=0)
    with pytest.raises(CacheError, match=rf", {field}: "):
        write_shard(tmp_path / "x.parquet", [dataclasses.replace(CUT, **changes)], layout, plan_hash="p", shard=0)


@pytest.mark.parametrize("cuts", [(0,), (7, 7), (9, 7), (300,), tuple(range(1, 258))])
def test_cuts_that_are_no_ranges_of_ids_are_refused(synthetic, cuts):
    with pytest.raises(ConfigError, match="tail_buckets .* expected fewer than 256 ascending ids"):
        synthetic.make_layout(tail_buckets=cuts)


def test_the_good_row_is_accepted(tmp_path, synthetic):
    write_shard(tmp_path / "x.parquet", [ROW], synthetic.make_layout(), plan_hash="p", shard=0)


ORDERS = {
    "view twice": ([ROW, ROW], "view"),
    "views descend": ([ROW, dataclasses.replace(ROW, view=1)], "view"),
    "sample returns": ([ROW, dataclasses.replace(ROW, sample_id="s-2"), dataclasses.replace(ROW, view=3)], "sample_id"),
    "text changes": ([ROW, dataclasses.replace(ROW, view=3, **put("x_0", 0, 7))], "x_0"),
    "prompt changes": ([ROW, dataclasses.replace(ROW, view=3, prompt_tokens=1, masked=np.ones(7, bool))], "x_0"),
}


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
@pytest.mark.parametrize("name", ORDERS)
def test_views_of_a_sample_are_adjacent_ascending_and_of_one_text(tmp_path, synthetic, monkeypatch, name, group_bytes):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", group_bytes)
    rows, field = ORDERS[name]
    with pytest.raises(CacheError, match=rf", {field}: "):
        write_shard(tmp_path / "x.parquet", rows, synthetic.make_layout(), plan_hash="p", shard=0)


@pytest.mark.parametrize(("signal", "field"), [("none", "chunk_start"), ("chunk", "target_position")])
def test_signals_without_a_column_are_refused_not_dropped(tmp_path, synthetic, signal, field):
    with pytest.raises(CacheError, match=rf"{field}: given, but a cache of signal '{signal}' has no such column"):
        write_shard(tmp_path / "x.parquet", [ROW], synthetic.make_layout(signal), plan_hash="p", shard=0)


def test_a_failing_source_leaves_the_old_file_alone(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 1)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"old")

    def rows() -> Iterator[ViewRow]:
        yield ROW
        yield dataclasses.replace(ROW, view=3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, rows(), synthetic.make_layout(), plan_hash="p", shard=0)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_source_are_not_taken_for_errors_of_the_disk(tmp_path, synthetic):
    def rows() -> Iterator[ViewRow]:
        yield ROW
        raise FileNotFoundError("weights.safetensors")

    with pytest.raises(FileNotFoundError, match="weights"):
        write_shard(tmp_path / "x.parquet", rows(), synthetic.make_layout(), plan_hash="p", shard=0)


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own, or skip."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_with_what_to_do_and_no_file(tmp_path, synthetic):
    layout = synthetic.make_layout()
    rows = synthetic.make_rows(layout, samples=200)
    with mounted(tmp_path / "small", "-o", "size=32k") as folder:
        write_shard(folder / "a.parquet", rows[:15], layout, plan_hash="p", shard=0)
        with pytest.raises(
            OutputError, match=r"b\.parquet: cannot be written: the disk is full \(.* MB free .*same command"
        ):
            write_shard(folder / "b.parquet", rows, layout, plan_hash="p", shard=1)
        assert [path.name for path in folder.iterdir()] == ["a.parquet"]


def test_a_read_only_file_system_is_named(tmp_path, synthetic):
    with (
        mounted(tmp_path / "fixed", "-o", "ro") as folder,
        pytest.raises(OutputError, match="the file system is read-only"),
    ):
        write_shard(folder / "x.parquet", [ROW], synthetic.make_layout(), plan_hash="p", shard=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_forbidden_folder_is_named(tmp_path, synthetic):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        write_shard(tmp_path / "x.parquet", [ROW], synthetic.make_layout(), plan_hash="p", shard=0)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied"), (errno.EIO, "input/output error")],
)
def test_every_step_reports_the_disk(tmp_path, synthetic, monkeypatch, call, code, reason):
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=reason):
        write_shard(tmp_path / "x.parquet", [ROW], synthetic.make_layout(), plan_hash="p", shard=0)
    assert list(tmp_path.iterdir()) == []


def test_damage_between_writing_and_reading_back_is_noticed(tmp_path, synthetic, monkeypatch):
    layout, rng, fsync = synthetic.make_layout(), np.random.default_rng(0), os.fsync
    rows = synthetic.make_rows(layout)

    def flip(handle: int) -> None:
        fsync(handle)
        (temporary,) = tmp_path.glob(".*.tmp")
        data = bytearray(temporary.read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        temporary.write_bytes(data)

    monkeypatch.setattr(os, "fsync", flip)
    for _ in range(60):
        with pytest.raises(OutputError, match="read back"):
            write_shard(tmp_path / "x.parquet", rows, layout, plan_hash="p", shard=0)
        assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path, synthetic):
    path = tmp_path / "x.parquet"
    dead, alive, other = (files.temporary_name(p) for p in (path, path, tmp_path / "y.parquet"))
    for leftover in (dead, alive, other):
        leftover.write_bytes(b"half")
    with open(alive, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_shard(path, [ROW], synthetic.make_layout(), plan_hash="p", shard=0)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, alive.name, other.name}


def test_a_signal_that_does_not_exist_is_refused(synthetic):
    with pytest.raises(ConfigError, match="expected one of none, chunk, topk"):
        synthetic.make_layout("logits")
