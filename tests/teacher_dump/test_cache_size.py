"""The predicted size of a cache against the bytes of the real dump, on real text and a trained teacher."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tide import cli
from tide.shared.cache import Manifest, write_shard, writer
from tide.shared.cache.receipts import receipt_path
from tide.shared.cache.statistics import leaf_bytes
from tide.shared.cache.writer import encoded_size
from tide.shared.config import RunConfig, load_config
from tide.shared.errors import ConfigError
from tide.teacher_dump import cache_size, size_model
from tide.teacher_dump.cache_size import estimate_size, planned_content, stretches
from tide.teacher_dump.cost import warn_of_shard_sizes
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import make_plan, open_samples
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.size_model import FOOTERS
from tide.teacher_dump.stand_in import MIDDLING, SURE, UNSURE
from tiny_runs import ASSETS, settings, tiny_config


def real_text(**more: object) -> RunConfig:
    """The demo's trained teacher on functions of the standard library, two views each."""
    values = {
        "teacher.path": str(ASSETS / "teacher"), "student.path": str(ASSETS / "student"), "data.limit": 80,
        "noise.views": 2, **{name.replace("__", "."): value for name, value in more.items()},
    }  # fmt: skip
    return load_config("demo", overrides=[f"{name}={json.dumps(value)}" for name, value in values.items()])


def dumped(config: RunConfig, folder: Path) -> Manifest:
    threads = torch.get_num_threads()
    try:
        return dump_teacher(config, folder)
    finally:
        torch.set_num_threads(threads)


def few_encoded(monkeypatch: pytest.MonkeyPatch, *, group_bytes: int) -> None:
    """Plans of tests are too small to be sampled: encode less of them, in short row groups."""
    monkeypatch.setattr(cache_size, "FEWEST_ENCODED", 48)
    for module in (cache_size, size_model, writer):
        monkeypatch.setattr(module, "ROW_GROUP_BYTES", group_bytes)


@pytest.mark.parametrize(
    "more",
    [
        {"signal__kind": "chunk", "shards__samples_per_shard": 50},
        {"signal__top_k": 16, "shards__samples_per_shard": 16, "noise__comp_demo": True},
        {"signal__top_k": 50, "signal__min_probability": 5e-3, "shards__samples_per_shard": 1000},
    ],
    ids=["chunk", "k = 16, small shards", "p > 5e-3, one shard"],
)
def test_a_probe_predicts_the_bytes_of_the_dump_within_5_percent(more, tmp_path):
    config = real_text(**more)
    plan, _ = make_plan(config)
    before, lines = plan.hash, []
    threads = torch.get_num_threads()
    said = estimate_size(plan, num_probe=40, say=lines.append)
    torch.set_num_threads(threads)
    real = dumped(config, tmp_path / "cache")
    assert said.bytes == pytest.approx(real.totals.bytes, rel=0.05)
    assert said.low < said.bytes < said.high
    assert said.bytes == sum(said.columns.values())
    assert set(said.columns) == {*real.statistics.column_bytes, FOOTERS}
    assert len(lines) >= cache_size.FEWEST_STRETCHES - 1
    assert real.plan_hash == before == plan.hash
    made_up = estimate_size(plan)
    assert made_up.low < real.totals.bytes < made_up.high
    assert made_up.low < made_up.bytes < made_up.high


@pytest.mark.parametrize(
    "more",
    [
        {"shards__samples_per_shard": 20, "noise__views": 3},
        {"shards__samples_per_shard": 400, "noise__timesteps": "uniform"},
    ],
    ids=["small shards", "one shard"],
)
def test_without_a_teacher_a_part_of_the_samples_tells_the_bytes_of_all_within_5_percent(more, tmp_path, monkeypatch):
    config = real_text(teacher__path="", data__limit=400, **more)
    plan, _ = make_plan(config)
    few_encoded(monkeypatch, group_bytes=40_000)
    chosen = stretches(plan, 48, 1000)
    assert 40 <= sum(len(samples) for _, samples in chosen) <= 60
    said = estimate_size(plan)
    assert said.bytes == pytest.approx(dumped(config, tmp_path / "cache").totals.bytes, rel=0.05)
    assert said.low < said.bytes < said.high


def test_a_small_plan_without_a_teacher_is_predicted_to_the_byte(tiny_root, tmp_path):
    config = tiny_config(tiny_root, teacher__path="", shards__samples_per_shard=3)
    said, real = estimate_size(make_plan(config)[0]), dumped(config, tmp_path / "cache")
    assert said.columns[FOOTERS] == real.totals.bytes - sum(real.statistics.column_bytes.values())
    # a footer holds the plan's hash and the shard's number, of fixed length here, and so do those of the estimate
    assert said.low == said.bytes == said.high == real.totals.bytes


def test_finished_shards_tell_the_size_of_all(tmp_path):
    config = real_text(signal__top_k=8, shards__samples_per_shard=12, data__limit=50)
    plan, _ = make_plan(config)
    root = tmp_path / "cache"
    real = dumped(config, root).totals.bytes
    done = estimate_size(plan, root=root)
    assert done.low == done.bytes == done.high == real
    for shard in range(2, plan.num_shards):
        receipt_path(root, shard).unlink()
    half = estimate_size(plan, root=root)
    assert half.basis == f"2 of {plan.num_shards} shards, which are finished"
    assert half.bytes == pytest.approx(real, rel=0.05)
    assert half.low < half.bytes < half.high


def test_columns_that_no_teacher_fills_have_one_size_whatever_the_teacher_says(tiny_root, tmp_path):
    config = tiny_config(tiny_root, signal__top_k=4, shards__samples_per_shard=4)
    plan, _ = make_plan(config)
    real = dumped(config, tmp_path / "cache").statistics.column_bytes
    said = estimate_size(plan).columns
    exact = {"x_0", "masked", "chunk_len", "target_position", "t", "view", "num_masked", "num_chunks"}
    assert {name: said[name] for name in exact} == {name: real[name] for name in exact}
    assert said["top_ids"] != real["top_ids"]


@pytest.mark.parametrize("stand_in", [SURE, MIDDLING, UNSURE])
def test_made_up_answers_are_what_the_writer_accepts(stand_in, tiny_root):
    """Head mass, order, distinct ids and tails are checked by the writer itself; with k = V nothing is outside."""
    more = {"signal__min_probability": 0.01, "signal__tail_buckets": [9, 99]} if stand_in is UNSURE else {}
    config = tiny_config(tiny_root, signal__top_k=32, signal__temperatures=[0.5, 1.0, 2.0], **more)
    task = ShardTask(plan := make_plan(config)[0], *open_samples(plan), None)
    views = task.draw(0, plan.samples)
    support = np.arange(300)
    stand_in.answer(views, support)
    rows = [view.row() for of_sample in views for view in of_sample]
    assert encoded_size(rows, plan.layout).bytes > 0
    assert set(np.concatenate([row.top_ids for row in rows])) <= set(support)
    again = task.draw(0, plan.samples)
    stand_in.answer(again, support)
    assert all(
        np.array_equal(one.row().top_ids, other.row().top_ids)
        for a, b in zip(views, again, strict=True)
        for one, other in zip(a, b, strict=True)
    )


def test_a_size_in_memory_is_that_of_the_file(tiny_root, tmp_path):
    plan, _ = make_plan(tiny_config(tiny_root))
    task, layout = ShardTask(plan, *open_samples(plan), None), plan.layout
    views = task.draw(0, plan.samples)
    MIDDLING.answer(views, np.arange(300))
    rows = [view.row() for of_sample in views for view in of_sample]
    size = encoded_size(rows, layout)
    written = write_shard(tmp_path / "shard.parquet", rows, layout, plan_hash="f" * 64, shard=7)
    assert size.bytes == (tmp_path / "shard.parquet").stat().st_size
    assert size.column_bytes == written.column_bytes == leaf_bytes(pq.read_metadata(tmp_path / "shard.parquet"), layout)
    assert size.groups == 1 < encoded_size(rows, layout, group_bytes=2000).groups


@pytest.mark.parametrize("per_shard", [1, 3, 8, 30, 100])
@pytest.mark.parametrize("num_samples", [4, 16, 64])
def test_stretches_lie_within_shards_and_are_spread_over_the_plan(tiny_root, per_shard, num_samples):
    made, _ = make_plan(tiny_config(tiny_root, shards__samples_per_shard=per_shard))
    plan = replace(made, samples=made.samples * 25)
    chosen = stretches(plan, num_samples, 40)
    for first, samples in chosen:
        assert 0 < len(samples) <= min(per_shard, 40)
        assert tuple(samples) == plan.samples[first : first + len(samples)]
        assert first // per_shard == (first + len(samples) - 1) // per_shard
    firsts = [first for first, _ in chosen]
    assert firsts == sorted(set(firsts))
    assert 0.5 * num_samples <= sum(len(samples) for _, samples in chosen) <= 1.5 * num_samples
    assert len(chosen) >= 4
    assert firsts[0] < 200 / 3
    assert firsts[-1] >= 200 / 2


def test_what_the_plan_expects_is_what_is_drawn(tiny_root):
    """Content is taken from t before any mask is drawn, so that sums over all views equal the plan's."""
    plan, _ = make_plan(tiny_config(tiny_root, noise__views=40, noise__t_min=0.3))
    task = ShardTask(plan, *open_samples(plan), None)
    MIDDLING.answer(views := task.draw(0, plan.samples), np.arange(300))
    drawn, planned = cache_size._piece(task, views).content, planned_content(plan)
    assert (drawn.rows, drawn.tokens) == (planned.rows, planned.tokens)
    assert drawn.expected_masked == pytest.approx(planned.expected_masked, rel=0.02)  # t has 40 strata


def test_tide_plan_probes_and_says_how(tiny_root, capsys, monkeypatch):
    def said(*more: str) -> str:
        arguments = [text for item in settings(tiny_root) for text in ("--set", item)]
        monkeypatch.setattr(sys, "argv", ["tide", "plan", *arguments, *more])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        torch.set_num_threads(threads)
        assert not ended.value.code
        return capsys.readouterr().out

    assert "a very sure teacher to a very unsure one; --probe 64 asks yours" in said()
    probed = said("--probe", "4")
    assert "the teacher's answers about 4 of 8 samples" in probed
    assert "x_0 " in probed
    assert json.loads(said("--probe", "4", "--json"))["estimated_bytes_by_column"]["top_ids"] > 0


def test_a_probe_of_too_few_samples_is_refused(tiny_root):
    plan, _ = make_plan(tiny_config(tiny_root))
    for num in (-1, 1, 3):
        with pytest.raises(ConfigError, match=rf"--probe {num}: expected 0 or at least 4 samples; 64 give"):
            estimate_size(plan, num_probe=num)


def test_shards_of_a_large_cache_that_are_too_small_or_too_large_are_pointed_out(tiny_root):
    plan, _ = make_plan(tiny_config(tiny_root, shards__samples_per_shard=2))
    said = estimate_size(plan)

    def sized(total: int, shard: int) -> cache_size.SizeEstimate:
        return cache_size.SizeEstimate(total, total, total, said.columns, shard, said.basis)

    warn_of_shard_sizes(plan, said)
    warn_of_shard_sizes(plan, sized(10**12, 200_000_000))
    with pytest.warns(UserWarning, match=r"samples_per_shard = 2 makes shards of about 1\.0 MB; .*: 400 samples would"):
        warn_of_shard_sizes(plan, sized(10**12, 1_000_000))
    with pytest.warns(UserWarning, match=r"makes shards of about 2,000\.0 MB"):
        warn_of_shard_sizes(plan, sized(10**12, 2_000_000_000))
