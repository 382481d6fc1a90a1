"""A cache that was damaged, mixed up or made to deceive does not reach training."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tide.shared.cache import open_cache, read_manifest, verify, verify_cache, verify_shards
from tide.shared.cache.files import sha256_file
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.schema import arrow_schema, parquet_options, shard_metadata
from tide.shared.errors import CacheError, CacheMismatch

SHARD = "data/views-00000-of-00002.parquet"
OTHER = "data/views-00001-of-00002.parquet"


def edit_manifest(root: Path, edit: Callable[[Any], None]) -> None:
    tree = json.loads((root / "manifest.json").read_text())
    edit(tree)
    (root / "manifest.json").write_bytes(sealed_json(tree))


def vouch_for(root: Path, **entry: int) -> None:
    """Let the manifest name the files as they are now: what a hostile author would do."""

    def edit(tree: Any) -> None:
        for shard in tree["shards"]:
            path = root / shard["name"]
            shard |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        tree["shards"][0] |= entry
        for name in ("bytes", "rows"):
            tree["totals"][name] = sum(shard[name] for shard in tree["shards"])
        tree["statistics"]["rows"] = tree["totals"]["rows"]

    edit_manifest(root, edit)


def rewrite(root: Path, edit: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    """Replace shard 0 by an edited copy that has its columns, options and metadata."""
    manifest = read_manifest(root)
    table = edit(pq.read_table(root / SHARD))
    merged = {**parquet_options(manifest.layout), **options}
    with pq.ParquetWriter(root / SHARD, table.schema, **merged) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(shard_metadata(manifest.plan_hash, 0))
    vouch_for(root, rows=table.num_rows)


def with_value(table: pa.Table, name: str, row: int, index: int, value: float) -> pa.Table:
    number = table.schema.get_field_index(name)
    rows = table[name].to_pylist()
    if isinstance(rows[row], list):
        rows[row][index] = value
    else:
        rows[row] = value
    return table.set_column(number, table.schema.field(number), pa.array(rows, table.schema.types[number]))


@pytest.mark.parametrize("kind", ["none", "chunk", "topk"])
def test_a_sound_cache_passes_and_is_counted(make_cache, kind):
    root = make_cache(kind)
    report = verify_cache(root)
    assert (report.mode, report.shards, report.rows) == ("full", 2, 30)
    assert report.bytes == sum(path.stat().st_size for path in (root / "data").iterdir())
    assert report.manifest_hash == read_manifest(root).hash
    assert verify_cache(root, mode="quick").mode == open_cache(root).verify("quick").mode == "quick"


def test_every_flipped_bit_of_a_shard_is_found(make_cache):
    root, rng = make_cache("topk"), np.random.default_rng(0)
    sound = (root / SHARD).read_bytes()
    for _ in range(60):
        data = bytearray(sound)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (root / SHARD).write_bytes(data)
        with pytest.raises(CacheError, match=SHARD):
            verify_cache(root)


def test_without_the_file_hash_a_flipped_bit_is_still_never_read_as_other_rows(make_cache):
    root, rng = make_cache("topk"), np.random.default_rng(1)
    cache = open_cache(root)
    sound = (root / SHARD).read_bytes()
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    groups = [g for g in cache.row_groups if g.shard == 0]
    rows = [str(vars(row)) for group in groups for row in cache.read_row_group(0, group.group)]
    found = 0
    for _ in range(60):
        data = bytearray(sound)
        data[int(rng.integers(4, footer))] ^= 1 << int(rng.integers(8))
        (root / SHARD).write_bytes(data)
        damaged = open_cache(root, verify=False)
        try:
            assert [str(vars(row)) for group in groups for row in damaged.read_row_group(0, group.group)] == rows
        except CacheError:
            found += 1
    assert found > 30  # the others hit page headers and indexes, which hold no values


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_shard_is_refused(make_cache, mode, keep):
    root = make_cache("chunk")
    data = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(data[:keep])
    with pytest.raises(CacheError, match=rf"{SHARD}: .* bytes, the manifest says"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_shard_is_refused_even_if_the_manifest_vouches_for_it(make_cache, mode, keep):
    root = make_cache("chunk")
    data = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(data[:keep])
    vouch_for(root)
    with pytest.raises(CacheError, match=rf"{SHARD}: damaged"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_a_missing_shard_is_refused(make_cache, mode):
    root = make_cache("chunk")
    (root / SHARD).unlink()
    with pytest.raises(CacheError, match=f"{SHARD}: missing"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_swapped_shards_are_refused(make_cache, mode):
    root = make_cache("chunk")
    (root / SHARD).rename(root / "x")
    (root / OTHER).rename(root / SHARD)
    (root / "x").rename(root / OTHER)
    with pytest.raises(CacheError, match=SHARD):
        verify_cache(root, mode=mode)
    vouch_for(root)
    with pytest.raises(CacheError, match=f"{SHARD}: its metadata says tide.shard = '1', expected '0'"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_a_shard_of_another_plan_is_refused(make_cache, mode):
    root = make_cache("chunk")
    edit_manifest(root, lambda tree: tree.update(plan_hash="cd" * 32))
    with pytest.raises(CacheError, match=r"its metadata says tide\.plan_hash"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_an_extra_shard_is_refused_and_a_hidden_leftover_is_not(make_cache, mode):
    root = make_cache("chunk")
    (root / "data" / ".views-00000-of-00002.parquet.host-1-ab.tmp").write_bytes(b"half")
    verify_cache(root, mode=mode)
    shutil.copy(root / SHARD, root / "data" / "extra.parquet")
    with pytest.raises(CacheError, match=r"extra\.parquet: the manifest does not name this file"):
        verify_cache(root, mode=mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_links_out_of_the_folder_are_refused(make_cache, tmp_path, mode):
    root = make_cache("chunk")
    (root / SHARD).rename(tmp_path / "elsewhere.parquet")
    (root / SHARD).symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(CacheError, match="link that leads out of the cache folder"):
        verify_cache(root, mode=mode)


def test_a_damaged_vocabulary_is_found(make_cache):
    root = make_cache("chunk")
    data = bytearray((root / "vocabulary.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (root / "vocabulary.parquet").write_bytes(data)
    with pytest.raises(CacheError, match=r"vocabulary\.parquet: SHA-256 differs"):
        verify_cache(root)


LIES = {
    "id beyond the vocabulary": ("x_0", 0, 300, r"x_0: 300 is not in \[0, 300\)"),
    "t of zero": ("t", None, 0.0, r"t: not in \(0, 1\]"),
    "count": ("num_masked", None, 1, r"num_masked: \d+ values where the other columns say 1"),
    "positive": ("chunk_logp", 0, 0.5, r"chunk_logp: 0\.5 is not a finite log-probability"),
    "not a number": ("chunk_logp", 0, float("nan"), "chunk_logp: nan is not a finite"),
    "not float16": ("chunk_logp", 0, -1.0001, "chunk_logp: .* is not a float16 number"),
    "infinite tail": ("log_tail_2.0", 0, float("inf"), "log_tail: not a log-probability"),
    "tail beside a head": ("log_tail_1.0", 0, 0.0, r"top_logp: a target's kept entries hold 1\.|log_tail"),
    "target in no chunk": ("target_position", 0, 10**6, r"target_position: span \[1000000"),
    "chunk length": ("chunk_len", 0, 2**31 - 1, r"chunk_len: counts \d+ masked tokens, and \d+ are masked"),
    "negative chunk length": ("chunk_len", 0, -1, "chunk_len: negative"),
    "num_top": ("num_top", 0, -1, "num_top: negative"),
    "control characters": ("sample_id", None, "\x1b]0;title", "sample_id: expected 1 to 256 printable"),
}


@pytest.mark.parametrize("name", LIES)
def test_values_that_cannot_be_true_are_refused_though_every_hash_agrees(make_cache, name):
    root = make_cache("topk", samples=3)
    column, index, value, message = LIES[name]
    rows = open_cache(root).read_row_group(0, 0)
    row = next(i for i, r in enumerate(rows) if len(r.target_position) and r.num_top[0] > 0)
    rewrite(root, lambda table: with_value(table, column, row, index or 0, value))
    with pytest.raises(CacheError, match=rf"{SHARD}, row {row} \(sample .*\), {message}"):
        verify_shards.check_shards(root, read_manifest(root), full=True)


def test_the_child_reports_what_it_finds(make_cache):
    root = make_cache("topk")
    rewrite(root, lambda table: with_value(table, "x_0", 2, 0, 300))
    with pytest.raises(CacheError, match=rf"{SHARD}, row 2 \(sample 's0-0', view 2\), x_0: 300 is not in"):
        verify_cache(root)


def test_a_sample_in_two_shards_is_refused(make_cache, synthetic, tmp_path):
    layout = synthetic.make_layout("none")
    rows = synthetic.make_rows(layout)
    receipts = [synthetic.write(tmp_path, rows, layout, shard, 2) for shard in range(2)]
    synthetic.finish(tmp_path, layout, receipts)
    with pytest.raises(CacheError, match="this sample occurred before"):
        verify_shards.check_shards(tmp_path, read_manifest(tmp_path), full=True)


def _renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns(["ids" if name == "x_0" else name for name in table.schema.names])


def _retyped(table: pa.Table) -> pa.Table:
    number = table.schema.get_field_index("view")
    return table.set_column(number, pa.field("view", pa.int64(), nullable=False), table["view"].cast(pa.int64()))


def _with_extra(table: pa.Table) -> pa.Table:
    return table.append_column("extra", table["view"])


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("edit", [_renamed, _retyped, _with_extra, lambda table: table.select(["sample_id", "x_0"])])
def test_other_columns_are_refused(make_cache, edit, mode):
    root = make_cache("none")
    rewrite(root, edit, use_dictionary=False, column_encoding=None)
    with pytest.raises(CacheError, match="columns are not those of the manifest's layout"):
        verify_cache(root, mode=mode)


def test_row_counts_of_footer_and_manifest_must_agree(make_cache):
    root = make_cache("none")
    rewrite(root, lambda table: table.slice(0, 12))
    vouch_for(root, rows=15)
    with pytest.raises(CacheError, match=f"{SHARD}: 12 rows in groups of .* the manifest says 15"):
        verify_cache(root, mode="quick")


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_a_small_file_that_expands_to_much_is_refused_before_it_is_read(make_cache, mode):
    root = make_cache("none", samples=2)
    manifest = read_manifest(root)
    zeros = np.zeros(9_000_000, np.int32)
    columns = {
        "sample_id": pa.array(["a", "b"]), "view": pa.array([0, 0], pa.int32()), "t": pa.array([1, 1], pa.float32()),
        **{name: pa.array([0, 0], pa.int32()) for name in ("num_tokens", "prompt_tokens", "num_masked")},
        "x_0": pa.ListArray.from_arrays(pa.array([0, len(zeros), len(zeros)], pa.int32()), pa.array(zeros)),
        "masked": pa.array([[], []], pa.list_(pa.bool_())),
    }  # fmt: skip
    schema = arrow_schema(manifest.layout)
    bomb = pa.table([columns[f.name].cast(f.type) for f in schema], schema=schema)
    rewrite(root, lambda _: bomb)
    assert (root / SHARD).stat().st_size < 20_000
    with pytest.raises(CacheError, match=r"row group 0: expands to .* refused"):
        verify_cache(root, mode=mode)


def test_wrong_statistics_are_refused(make_cache):
    root = make_cache("topk")

    def edit(tree: Any) -> None:
        tree["statistics"]["t_histogram"][3] += 1

    edit_manifest(root, edit)
    with pytest.raises(CacheError, match=r"statistics\.t_histogram"):
        verify_shards.check_shards(root, read_manifest(root), full=True)


def test_a_child_that_dies_or_runs_out_of_memory_is_a_refusal(make_cache, monkeypatch):
    root = make_cache("none")
    monkeypatch.setattr(verify, "CHILD_BYTES", 1)
    with pytest.raises(CacheError):
        verify_cache(root)
    killed = subprocess.CompletedProcess([], -signal.SIGSEGV, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: killed)
    with pytest.raises(CacheError, match=r"ended early \('Segmentation fault'\)"):
        verify_cache(root)


def test_limits_of_the_surroundings_stay_in_force(make_cache):
    code = "import sys; from tide.shared.cache import verify_cache; verify_cache(sys.argv[1])"
    command = [
        "bash",
        "-c",
        'ulimit -t 8 -v 4000000; exec "$@"',
        "-",
        sys.executable,
        "-c",
        code,
        str(make_cache("none")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_child_does_not_import_from_the_folder_it_checks(make_cache, monkeypatch):
    root = make_cache("none")
    for name in ("json", "numpy", "tide", "yaml"):
        (root / f"{name}.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(root)
    verify_cache(root)


def test_the_cache_needs_no_torch():
    code = (
        "import sys, tide.shared.cache.reader, tide.shared.cache.writer, tide.shared.cache.verify_shards\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_for_another_student_is_refused(make_cache):
    cache = open_cache(make_cache("none"))
    cache.require_student("1f3a" * 16, "44")
    with pytest.raises(CacheMismatch, match="dumped for student tokenizer 1f3a1f3a1f3a…, this student has 9c0e"):
        cache.require_student("9c0e" * 16)
    with pytest.raises(CacheMismatch, match="chat template"):
        cache.require_student("1f3a" * 16, "45")


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_every_damaged_file_is_named_with_the_command_that_repairs(make_cache, tide, mode):
    root = make_cache(num_shards=4)
    names = [entry.name for entry in read_manifest(root).files()]
    hit = [names[0], names[2], names[-1]]
    for number, name in enumerate(hit):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[:-20] if mode == "quick" or number else data[:100] + b"?" + data[101:])
    (root / hit[1]).unlink()
    code, _, said = tide("verify-cache", root, *(["--quick"] if mode == "quick" else []))
    assert code == 65
    assert {name for name in names if name in said} == set(hit)
    assert f"tide repair-cache {root} --from" in said


def test_every_damaged_footer_is_named(make_cache):
    root = make_cache(num_shards=3)
    names = [entry.name for entry in read_manifest(root).shards]
    for name in names[1:]:
        data = bytearray((root / name).read_bytes())
        data[-6] ^= 0x40  # the footer's length
        (root / name).write_bytes(bytes(data))
    with pytest.raises(CacheError) as caught:
        verify_cache(root, mode="quick")
    assert [name in str(caught.value) for name in names] == [False, True, True]
    assert "repair-cache" in str(caught.value)
