"""What is written comes back: through tide, and through readers that know nothing of it."""

import dataclasses
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tide.shared.cache import Layout, ViewRow, open_cache, schema, shard_name, write_shard, writer
from tide.shared.errors import CacheError

FLOATS = ("chunk_logp", "top_logp", "log_tail")


def assert_same(rows: Sequence[ViewRow], expected: Sequence[ViewRow], layout: Layout) -> None:
    assert len(rows) == len(expected)
    for got, row in zip(rows, expected, strict=True):
        for field in dataclasses.fields(ViewRow):
            value, wanted = getattr(got, field.name), getattr(row, field.name)
            if field.name in FLOATS and layout.logp_dtype == "float16":
                wanted = wanted.astype(np.float16).astype(np.float32)
            if field.name == "t":
                wanted = float(np.float32(wanted))
            if field.name == "log_tail" and wanted.size == value.size == 0:
                continue
            np.testing.assert_array_equal(value, wanted, err_msg=f"{row.sample_id} {row.view} {field.name}")
            if isinstance(value, np.ndarray):
                assert value.dtype == (wanted.dtype if wanted.size else value.dtype), field.name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masses_of_a_tail_cut_into_buckets_round_trip(tmp_path, synthetic, dtype):
    layout = synthetic.make_layout(top_k=60, tail_buckets=(1, 40, 200), logp_dtype=dtype)
    rows = synthetic.make_rows(layout, samples=7)
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, rows, layout)])
    cache, count = open_cache(tmp_path, verify="full"), 0
    for got, row in zip(cache, rows, strict=True):
        wanted = row.log_buckets.astype(np.float16).astype(np.float32) if dtype == "float16" else row.log_buckets
        np.testing.assert_array_equal(got.log_buckets, wanted)
        # the tail is what its parts add up to: float16 parts are off by 2^-11 of their logarithm each
        total = np.exp(got.log_buckets.astype(np.float64)).sum(axis=2)
        np.testing.assert_allclose(np.exp(got.log_tail), np.minimum(total, 1), rtol=1e-6)
        np.testing.assert_allclose(
            np.exp(got.log_tail), np.exp(row.log_tail), atol=5e-3 if dtype == "float16" else 1e-6
        )
        count += np.isinf(got.log_buckets).sum()
    assert count > 0  # the range of id 0 alone is empty where 0 is kept
    with pq.ParquetFile(tmp_path / cache.manifest.shards[0].name) as file:
        table = file.read()
    lengths = [len(values) for values in table["log_tail_2.0"].to_pylist()]
    assert lengths == [4 * count for count in table["num_targets"].to_pylist()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_signal_round_trips(tmp_path, make_cache, synthetic, signal, dtype):
    layout = synthetic.make_layout(signal, logp_dtype=dtype)
    root, receipts, expected = tmp_path, [], []
    for shard in range(2):
        rows = synthetic.make_rows(layout, seed=shard, samples=7)
        receipts.append(synthetic.write(root, rows, layout, shard=shard, num_shards=2))
        expected += rows
    synthetic.finish(root, layout, receipts)
    cache = open_cache(root, verify="full")
    assert_same(list(cache), expected, layout)
    assert (len(cache), cache.num_views, cache.num_samples) == (42, 42, 14)
    assert sum(len(row.chunk_start) == 0 for row in expected) > 0  # edges are in the data
    assert sum(not row.masked.any() for row in expected) > 0
    assert sum(len(row.masked) == 0 for row in expected) > 0


def test_a_shard_without_rows_is_a_shard(tmp_path, synthetic):
    layout = synthetic.make_layout()
    receipts = [
        synthetic.write(tmp_path, [], layout, shard=0, num_shards=2),
        synthetic.write(tmp_path, synthetic.make_rows(layout), layout, shard=1, num_shards=2),
    ]
    synthetic.finish(tmp_path, layout, receipts)
    cache = open_cache(tmp_path, verify="full")
    assert len(cache) == len(cache.index()) == 15
    assert cache.row_groups[0].shard == 1


def test_rows_are_fetched_in_any_order_across_row_groups(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 2000)
    layout = synthetic.make_layout()
    rows = synthetic.make_rows(layout, samples=20)
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, rows, layout)])
    cache = open_cache(tmp_path)
    assert len(cache.row_groups) > 4
    cache.cached_bytes = 1  # every group is decoded again
    order = np.random.default_rng(0).integers(0, len(rows), 200)
    assert_same(cache.rows(order), [rows[i] for i in order], layout)
    again = pickle.loads(pickle.dumps(cache))
    assert_same(again.rows(order[:5]), [rows[i] for i in order[:5]], layout)
    assert_same([cache[-1]], rows[-1:], layout)
    with pytest.raises(IndexError):
        cache.rows([len(rows)])
    with pytest.raises(IndexError):
        cache[len(rows)]


def test_the_index_agrees_with_the_rows(make_cache):
    cache = open_cache(make_cache("topk"))
    index, rows = cache.index(), list(cache)
    assert len(index) == len(rows)
    ids = list(dict.fromkeys(row.sample_id for row in rows))
    for i, row in enumerate(rows):
        assert index.sample[i] == ids.index(row.sample_id)
        numbers = (index.view[i], index.num_tokens[i], index.prompt_tokens[i], index.num_masked[i])
        assert numbers == (row.view, len(row.x_0), row.prompt_tokens, row.masked.sum())
        assert (index.num_chunks[i], index.num_targets[i]) == (len(row.chunk_start), len(row.target_position))
        assert index.t[i] == np.float32(row.t)
        batch = cache.read_row_group(int(index.shard[i]), int(index.group[i]))
        assert batch[int(index.row[i])].sample_id == row.sample_id


def test_the_index_of_a_cache_without_signal_counts_zero_targets(make_cache):
    index = open_cache(make_cache("none")).index()
    assert not index.num_chunks.any()
    assert not index.num_targets.any()


def test_decoded_arrays_are_read_only(make_cache):
    row = open_cache(make_cache("topk"))[4]
    for name in ("x_0", "masked", "chunk_logp", "top_ids", "top_logp", "log_tail"):
        assert not getattr(row, name).flags.writeable, name


def test_the_same_rows_give_the_same_bytes(tmp_path, synthetic, signal):
    layout = synthetic.make_layout(signal)
    files = [tmp_path / "a" / "x.parquet", tmp_path / "b" / "x.parquet"]
    for path in files:
        write_shard(path, iter(synthetic.make_rows(layout)), layout, plan_hash="p", shard=3)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_integers_and_floats_of_other_widths_are_converted(tmp_path, synthetic):
    layout = synthetic.make_layout(logp_dtype="float32")
    rows = synthetic.make_rows(layout)
    wide = [
        dataclasses.replace(
            row, x_0=row.x_0.astype(np.int64), top_ids=row.top_ids.astype(np.uint64), view=np.int64(row.view),
            top_logp=row.top_logp.astype(np.float64), chunk_len=row.chunk_len.tolist() or [],
        )
        for row in rows
    ]  # fmt: skip
    for name, some in (("a", rows), ("b", wide)):
        write_shard(tmp_path / name, some, layout, plan_hash="p", shard=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rounding_above_zero_is_stored_as_zero(tmp_path, synthetic):
    layout = synthetic.make_layout("chunk", logp_dtype="float32")
    row = ViewRow(
        "s", 0, 1.0, np.zeros(8, np.int32), 0, np.ones(8, bool), np.array([0]), np.array([8]), np.array([3e-7])
    )
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, [row], layout)])
    assert open_cache(tmp_path)[0].chunk_logp.tolist() == [0.0]


def test_the_file_is_what_the_format_says(tmp_path, synthetic, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 4000)
    layout = synthetic.make_layout()
    path = tmp_path / "x.parquet"
    write_shard(path, synthetic.make_rows(layout, samples=20), layout, plan_hash="feed", shard=7)
    with pq.ParquetFile(path) as file:
        info = file.metadata
        assert info.metadata == {b"tide.schema_version": b"1", b"tide.plan_hash": b"feed", b"tide.shard": b"7"}
        assert file.schema_arrow.names[-2:] == ["log_tail_1.0", "log_tail_2.0"]
        assert not any(f.nullable or getattr(f.type, "value_field", f).nullable for f in file.schema_arrow)
        assert info.num_row_groups > 3
        for group in range(info.num_row_groups):
            assert info.row_group(group).total_byte_size < 2 * 4000 + 4000
            for number in range(info.num_columns):
                leaf = info.row_group(group).column(number)
                assert leaf.compression == "ZSTD"
                assert leaf.has_offset_index
                assert leaf.has_column_index
                if leaf.physical_type == "FLOAT":
                    assert not leaf.has_dictionary_page
                    assert ("BYTE_STREAM_SPLIT" in leaf.encodings) == (leaf.path_in_schema != "t")


def test_plain_pyarrow_reads_numbers_worked_by_hand(tmp_path, synthetic):
    layout = Layout(
        "topk", vocab_size=10, block_size=4, top_k=2, temperatures=(0.5, 2.0), logp_dtype="float16", logp_step=1 / 16
    )
    row = ViewRow(
        "conversation-1", 3, 0.5, np.arange(1, 9), 1, np.array([1, 1, 0, 1, 1, 1, 0], bool),
        chunk_start=np.array([2, 4]), chunk_len=np.array([1, 2]), chunk_logp=np.array([-0.1, -2.0]),
        target_position=np.array([2]), num_top=np.array([2]),
        top_ids=np.array([9, 3]), top_logp=np.array([-0.26, -2.02]), log_tail=np.array([[-np.inf, -1.5]]),
    )  # fmt: skip
    write_shard(tmp_path / "x.parquet", [row], layout, plan_hash="p", shard=0)
    table = pq.read_table(tmp_path / "x.parquet", page_checksum_verification=True)
    assert table.to_pylist() == [
        {
            "sample_id": "conversation-1", "view": 3, "t": 0.5, "num_tokens": 8, "prompt_tokens": 1, "num_masked": 5,
            "num_chunks": 2, "num_targets": 1, "x_0": [1, 2, 3, 4, 5, 6, 7, 8],
            "masked": [True, True, False, True, True, True, False],
            "chunk_len": [0, 1, 2, 0], "chunk_logp": [-0.0999755859375, -2.0], "target_position": [2], "num_top": [2],
            "top_ids": [9, 3], "top_logp": [-0.25, -2.0], "log_tail_0.5": [-float("inf")], "log_tail_2.0": [-1.5],
        }
    ]  # fmt: skip
    assert table.schema.field("top_logp").type == pa.list_(pa.field("element", pa.float32(), nullable=False))


@pytest.mark.filterwarnings("default")  # of datasets' own dependencies
def test_datasets_reads_the_shards(make_cache, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    cache = open_cache(make_cache("topk"))
    dataset = cache.to_datasets()
    assert dataset.num_rows == len(cache)
    for got, row in zip(dataset, cache, strict=True):
        assert got["x_0"] == row.x_0.tolist()
        assert got["masked"] == row.masked.tolist()
        np.testing.assert_array_equal(np.array(got["top_logp"], np.float32), row.top_logp)


@pytest.mark.skipif(importlib.util.find_spec("duckdb") is None, reason="duckdb is not installed")
def test_duckdb_reads_the_shards(make_cache):
    import duckdb

    root = make_cache("topk")
    rows = list(open_cache(root))
    query = f"SELECT x_0, masked, top_ids, top_logp, \"log_tail_2.0\" FROM '{root}/data/*.parquet'"
    for got, row in zip(duckdb.sql(query).fetchall(), rows, strict=True):
        expected = [row.x_0, row.masked, row.top_ids, row.top_logp, row.log_tail[:, 1]]
        for values, wanted in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.array(values, wanted.dtype), wanted)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1), samples=st.integers(1, 4), views=st.integers(1, 3), block_size=st.integers(1, 9),
    kind=st.sampled_from(schema.SIGNALS), group_bytes=st.sampled_from([1, 700, 1 << 20]),
    temperatures=st.sampled_from([(1.0,), (0.7, 1.0, 3.5)]),
)  # fmt: skip
def test_random_caches_round_trip(
    tmp_path_factory, synthetic, monkeypatch, seed, samples, views, block_size, kind, group_bytes, temperatures
):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", group_bytes)
    root: Path = tmp_path_factory.mktemp("cache")
    layout = synthetic.make_layout(kind, block_size=block_size, temperatures=temperatures)
    rows = synthetic.make_rows(layout, seed=seed, samples=samples, views=views)
    synthetic.finish(root, layout, [synthetic.write(root, rows, layout)])
    assert_same(list(open_cache(root)), rows, layout)


def test_a_layout_out_of_range_is_refused(synthetic):
    for changes in (
        {"temperatures": ()},
        {"temperatures": (2.0, 1.0)},
        {"top_k": 0},
        {"vocab_size": 0},
        {"block_size": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            synthetic.make_layout("topk", **changes)


def test_a_folder_has_no_revision(make_cache):
    with pytest.raises(CacheError, match="no revision"):
        open_cache(make_cache("none"), revision="main")


def test_shard_names_sort_in_shard_order():
    assert shard_name(7, 128) == "data/views-00007-of-00128.parquet"
