"""The predicted size of a cache against the bytes of the real dump, on real text and a trained teacher."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tide import cli
from tide.shared.cache import Manifest, write_shard, writer
from tide.shared.cache.receipts import receipt_path
from tide.shared.cache.statistics import leaf_bytes
from tide.shared.cache.writer import encoded_size
from tide.shared.config import RunConfig, load_config
from tide.shared.errors import ConfigError, DataError
from tide.teacher_dump import cache_size
from tide.teacher_dump.cache_size import FOOTERS, estimate_size
from tide.teacher_dump.cost import warn_of_shard_sizes
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import make_plan, open_samples
from tide.teacher_dump.shard_task import UNANSWERED, ShardTask
from tide.teacher_dump.worker import open_task
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
    assert lines[-1] == "probe: the teacher was asked about 40 of 40 samples"
    assert real.plan_hash == before == plan.hash
    priced = estimate_size(plan)
    assert priced.low < real.totals.bytes < priced.high
    assert priced.low < priced.bytes < priced.high
    assert set(priced.columns) == set(said.columns)


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
    for module in (cache_size, writer):  # plans of tests fill no row group otherwise
        monkeypatch.setattr(module, "ROW_GROUP_BYTES", 40_000)
    said = estimate_size(plan)
    assert said.basis == "128 samples, as planned"
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


def test_columns_that_no_teacher_fills_are_those_of_the_dump_whatever_the_teacher_says(tiny_root, tmp_path):
    config = tiny_config(tiny_root, signal__top_k=4, shards__samples_per_shard=4)
    plan, _ = make_plan(config)
    real = dumped(config, tmp_path / "cache").statistics.column_bytes
    said = estimate_size(plan).columns
    exact = {"x_0", "masked", "t", "view", "num_masked", "num_tokens", "prompt_tokens", "sample_id"}
    assert {name: said[name] for name in exact} == {name: real[name] for name in exact}


@pytest.mark.parametrize(
    "more",
    [
        {"signal__top_k": 16, "signal__logp_step": None, "signal__logp_dtype": "float32"},
        {"signal__top_k": 50, "signal__min_probability": 5e-3},
        {"signal__top_k": 16, "signal__codec": "compact", "signal__tail_buckets": [50, 200]},
    ],
    ids=["float32", "p > 5e-3", "compact, tails in ranges"],
)
def test_a_trained_teachers_answers_take_about_what_was_measured_column_by_column(more, tmp_path):
    """Columns of a few bytes a view are left out: pages have headers, and these weigh in so small a shard."""
    config = real_text(shards__samples_per_shard=1000, **more)
    said = estimate_size(make_plan(config)[0])
    real = dumped(config, tmp_path / "cache")
    large = {name: size for name, size in real.statistics.column_bytes.items() if size > 10 * real.totals.rows}
    assert len(large) >= 6
    for name, size in large.items():
        assert 0.6 * size < said.columns[name] < 1.6 * size, name
    assert said.low < real.totals.bytes < said.high


def test_a_size_in_memory_is_that_of_the_file(tiny_root, tmp_path):
    plan, _ = make_plan(tiny_config(tiny_root))
    threads = torch.get_num_threads()
    task, layout = open_task(tmp_path, plan), plan.layout
    task.ask(views := task.draw(0, plan.samples))
    torch.set_num_threads(threads)
    rows = [view.row() for of_sample in views for view in of_sample]
    size = encoded_size(rows, layout)
    written = write_shard(tmp_path / "shard.parquet", rows, layout, plan_hash="f" * 64, shard=7)
    assert size.bytes == (tmp_path / "shard.parquet").stat().st_size
    assert size.column_bytes == written.column_bytes == leaf_bytes(pq.read_metadata(tmp_path / "shard.parquet"), layout)
    assert size.groups == 1 < encoded_size(rows, layout, group_bytes=2000).groups


@pytest.mark.parametrize("num", [1, 3, 8, 100])
def test_samples_are_spread_over_the_plan(tiny_root, num):
    plan, _ = make_plan(tiny_config(tiny_root))
    drawn = cache_size._drawn(ShardTask(plan, *open_samples(plan), None), num)
    places = [of_sample[0].sample.index for of_sample in drawn]
    assert places == {1: [4], 3: [1, 4, 6]}.get(num, list(range(8)))
    assert [of_sample[0].sample.sample_id for of_sample in drawn] == [plan.samples[i].sample_id for i in places]


def test_what_the_plan_expects_is_what_is_drawn(tiny_root):
    plan, _ = make_plan(tiny_config(tiny_root, noise__views=40, noise__t_min=0.3))
    task = ShardTask(plan, *open_samples(plan), None)
    rows = [view.row(answered=False) for of_sample in task.draw(0, plan.samples) for view in of_sample]
    tokens, masked = sum(len(row.x_0) for row in rows), sum(int(row.masked.sum()) for row in rows)
    grown = cache_size._growth(plan, plan.num_shards, len(rows), tokens, masked)
    assert (grown["t"], grown["x_0"], grown[FOOTERS]) == (1, 1, 1)
    assert grown["masked"] == grown["top_ids"] == pytest.approx(1, rel=0.02)  # t has 40 strata


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

    assert "the range covers those that were measured; --probe 64 asks yours" in said()
    probed = said("--probe", "4")
    assert "the teacher's answers about 4 of 8 samples" in probed
    assert "x_0 " in probed
    assert json.loads(said("--probe", "4", "--json"))["estimated_bytes_by_column"]["top_ids"] > 0


def test_a_probe_of_too_few_samples_is_refused(tiny_root):
    plan, _ = make_plan(tiny_config(tiny_root))
    for num in (-1, 1, 3):
        with pytest.raises(ConfigError, match=rf"--probe {num}: expected 0 or at least 4 samples; 64 give"):
            estimate_size(plan, num_probe=num)


def test_a_probe_that_the_teacher_cannot_answer_is_an_error(tiny_root, monkeypatch):
    plan, _ = make_plan(tiny_config(tiny_root, data__skip_bad=True))

    def unanswered(self: ShardTask, views: list, left_out: dict[str, str]) -> None:
        left_out.update({of_sample[0].sample.sample_id: UNANSWERED for of_sample in views})

    monkeypatch.setattr(ShardTask, "ask", unanswered)
    threads = torch.get_num_threads()
    with pytest.raises(DataError, match=r"--probe: the teacher could answer none of 4 samples"):
        estimate_size(plan, num_probe=4)
    torch.set_num_threads(threads)


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
