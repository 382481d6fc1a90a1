"""The compact codec: the same rows as plain columns, fewer bytes, and nothing hostile gets through."""

import dataclasses
from types import SimpleNamespace

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
from tide.shared.cache import Layout, open_cache, read_manifest, table, write_shard, writer
from tide.shared.cache.compact import decode_top, encode_top, frequent_ids, rank_tables
from tide.shared.cache.merge import merge_caches
from tide.shared.config import load_config
from tide.shared.errors import CacheError, ConfigError
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import metrics, tiny_config

STEP = 1 / 16


@pytest.fixture
def compact(synthetic) -> Layout:
    return synthetic.make_layout(logp_step=STEP, codec="compact", frequent_ids=(7, 3, 250))


def naive_encode(ids, logp, num_top, layout):
    """Token by token, with a list that is searched for every rank."""
    order = [*layout.frequent_ids, *(i for i in range(layout.vocab_size) if i not in layout.frequent_ids)]
    ranks, steps, place = [], [], 0
    for count in num_top:
        above = 0.0
        for index in range(place, place + count):
            ranks.append(order.index(ids[index]))
            steps.append(round((above - float(logp[index])) / layout.logp_step))
            above = float(logp[index])
        place += count
    return ranks, steps


def naive_decode(ranks, steps, num_top, layout):
    order = [*layout.frequent_ids, *(i for i in range(layout.vocab_size) if i not in layout.frequent_ids)]
    ids, logp, place = [order[rank] for rank in ranks], [], 0
    for count in num_top:
        logp += [-sum(steps[place : index + 1]) * layout.logp_step for index in range(place, place + count)]
        place += count
    return ids, logp


def refuse(index, name, message):
    return CacheError(f"{index}, {name}: {message}")


def entries(rng, layout, num_targets=200):
    num_top = rng.integers(0, layout.top_k + 1, num_targets).astype(np.int32)
    num_top[:3] = num_top[-2:] = 0
    ids = [rng.permutation(layout.vocab_size)[:count] for count in num_top]
    logp = [-np.sort(rng.integers(0, 400, count)) * layout.logp_step for count in num_top]
    return np.concatenate(ids).astype(np.int32), (0.0 + np.concatenate(logp)).astype(np.float32), num_top


def test_both_directions_equal_their_naive_twins(compact):
    ids, logp, num_top = entries(np.random.default_rng(0), compact)
    ranks, steps = encode_top(ids, logp, num_top, compact)
    assert (ranks.dtype, steps.dtype) == (np.int32, np.int32)
    assert (ranks.tolist(), steps.tolist()) == naive_encode(ids, logp, num_top, compact)
    again = decode_top(ranks, steps, num_top, compact, refuse)
    assert tuple(values.tolist() for values in again) == naive_decode(ranks, steps, num_top, compact)
    assert np.array_equal(again[0], ids)
    assert np.array_equal(again[1].view(np.int32), logp.view(np.int32))  # the sign of zero, too


def test_nothing_kept_is_nothing_stored(compact):
    none = np.zeros(0, np.int32)
    ranks, steps = encode_top(none, none.astype(np.float32), np.zeros(4, np.int32), compact)
    assert len(ranks) == len(steps) == len(decode_top(ranks, steps, np.zeros(4, np.int32), compact, refuse)[0]) == 0


def test_frequent_ids_by_count_then_by_id():
    assert frequent_ids(np.array([3, 0, 5, 3, 1])) == (2, 0, 3, 4)
    assert frequent_ids(np.zeros(0, np.int64)) == ()
    assert len(frequent_ids(np.ones(5000, np.int64))) == 4096
    rank, id_of_rank = rank_tables((2, 0, 3, 4), 6)
    assert id_of_rank.tolist() == [2, 0, 3, 4, 1, 5]
    assert rank[id_of_rank].tolist() == list(range(6))


def test_rows_are_those_of_plain_columns_bit_by_bit(tmp_path, synthetic, compact):
    plain = dataclasses.replace(compact, codec="plain", frequent_ids=())
    rows = synthetic.make_rows(plain, samples=12)
    for name, layout in (("plain", plain), ("compact", compact)):
        synthetic.finish(tmp_path / name, layout, [synthetic.write(tmp_path / name, rows, layout)])
    ours, theirs = (open_cache(tmp_path / name, verify="full") for name in ("compact", "plain"))
    assert pq.read_schema(next((tmp_path / "compact" / "data").iterdir())).names[-4:-2] == ["top_ranks", "top_steps"]
    for one, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), field.name
    assert ours.manifest.statistics.codec_kl == theirs.manifest.statistics.codec_kl


def test_other_tools_read_the_columns(tmp_path, synthetic, compact):
    rows = synthetic.make_rows(compact)
    synthetic.finish(tmp_path, compact, [synthetic.write(tmp_path, rows, compact)])
    file = str(next((tmp_path / "data").iterdir()))
    expected = pq.read_table(file, columns=["top_ranks", "top_steps"]).to_pylist()
    assert polars.read_parquet(file, columns=["top_ranks", "top_steps"]).to_dicts() == expected
    found = duckdb.sql(f"select top_ranks, top_steps from '{file}'").fetchall()
    assert [{"top_ranks": a, "top_steps": b} for a, b in found] == expected


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("top_ranks", 300, "not a rank"), ("top_ranks", -1, "not a rank"), ("top_steps", -1, "not in order")],
)
def test_hostile_values_are_refused_by_row(tmp_path, synthetic, compact, column, value, message, monkeypatch):
    def hostile(*arguments):
        ranks, steps = encode_top(*arguments)
        {"top_ranks": ranks, "top_steps": steps}[column][len(ranks) // 2] = value
        return ranks, steps

    file = tmp_path / "hostile.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(table, "encode_top", hostile)
        patch.setattr(writer, "read_back", lambda sink, *_: (sink.sync(), pq.read_metadata(sink.temporary))[1])
        write_shard(file, synthetic.make_rows(compact), compact, plan_hash=synthetic.PLAN_HASH, shard=0)
    with pq.ParquetFile(file) as opened, pytest.raises(CacheError, match=rf"row \d+ \(sample .*{column}.*{message}"):
        table.read_group(opened, 0, compact, where=str(file), first_row=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logp_step": None}, "logp_step"), ({"frequent_ids": (1, 1)}, "distinct"),
        ({"codec": "plain"}, "none if plain"),
        ({"frequent_ids": (300,)}, "below 300"), ({"codec": "zip"}, "plain, compact"),
        ({"vocab_size": 2**31 - 1}, "vocabulary of 2,147,483,647"),
        ({"frequent_ids": tuple(range(4097)), "vocab_size": 9999}, "4096"),
    ],
)  # fmt: skip
def test_layouts_that_make_no_sense_are_refused(compact, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(compact, **changes)


def test_a_log_probability_too_low_for_steps_is_an_error(compact):
    fine = dataclasses.replace(compact, logp_step=2.0**-30)
    with pytest.raises(CacheError, match="larger signal.logp_step"):
        encode_top(np.array([1]), np.array([-100.0], np.float32), np.array([1]), fine)


def test_the_setting_needs_steps():
    with pytest.raises(ConfigError, match=r"signal.codec = 'compact'.*signal.logp_step"):
        load_config(overrides=["signal.codec=compact", "signal.logp_step=null"])


@pytest.fixture(scope="module")
def dumped(tiny_root, tmp_path_factory) -> SimpleNamespace:
    """One dump in both codecs."""
    folder, roots = tmp_path_factory.mktemp("codecs"), {}
    for codec in ("plain", "compact"):
        roots[codec] = folder / codec
        dump_teacher(tiny_config(tiny_root, shared=True, signal__codec=codec, signal__logp_step=STEP), roots[codec])
    return SimpleNamespace(**roots)


def test_a_dump_holds_the_same_rows_and_says_so(dumped):
    plain, compact = open_cache(dumped.plain, verify="full"), open_cache(dumped.compact, verify="full")
    for one, other in zip(plain, compact, strict=True):
        assert all(
            np.asarray(getattr(one, f.name)).tobytes() == np.asarray(getattr(other, f.name)).tobytes()
            for f in dataclasses.fields(one)
        )
    signal = compact.manifest.signal
    assert signal.codec == "compact"
    counts = np.bincount(np.concatenate([r.x_0[r.prompt_tokens :] for r in plain if r.view == 0]))
    assert list(signal.frequent_ids) == sorted(np.flatnonzero(counts), key=lambda i: (-counts[i], i))
    assert read_manifest(dumped.plain).signal.frequent_ids == ()


def test_training_sees_no_difference(dumped, tiny_root, tmp_path):
    losses = []
    for root in (dumped.plain, dumped.compact):
        config = tiny_config(tiny_root, "kl", shared=True, train__steps=3, train__log_every=1)
        train_student(config, str(root), tmp_path / root.name)
        losses.append([line["loss"] for line in metrics(tmp_path / root.name)])
    assert losses[0] == losses[1]


def test_caches_of_both_codecs_merge(dumped, tiny_root, tmp_path):
    other = tmp_path / "other-seed"
    dump_teacher(
        tiny_config(tiny_root, shared=True, signal__codec="compact", signal__logp_step=STEP, noise__seed=5), other
    )
    merged = merge_caches([dumped.plain, other], tmp_path / "plain")
    assert merged.signal.codec == "plain"
    again = merge_caches([dumped.compact, other], tmp_path / "compact")
    assert again.signal.codec == "compact"
    rows = [list(open_cache(tmp_path / name, verify="full")) for name in ("plain", "compact")]
    assert all(np.array_equal(a.top_ids, b.top_ids) for a, b in zip(*rows, strict=True))
