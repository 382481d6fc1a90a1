"""What rounding costs: the writer's measurement against a naive twin, target by target."""

import math

import numpy as np
import pytest
from tide.shared.cache import open_cache, write_shard
from tide.shared.cache.codec_error import KL_BINS, summary
from tide.shared.config import load_config
from tide.shared.errors import ConfigError
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import tiny_config


def simplex(top_logp: np.ndarray, log_tail: float, temperature: float) -> np.ndarray:
    """float64 probabilities of the kept tokens and the tail, as docs/cache_format.md words it."""
    if not len(top_logp):
        return np.ones(1)
    kept = np.exp(top_logp.astype(np.float64) / temperature)
    return np.append(kept / kept.sum() * -np.expm1(log_tail), np.exp(log_tail))


def naive_kl(rows, stored, temperatures) -> np.ndarray:
    """[targets, temperatures] nats."""
    found = []
    for meant, got in zip(rows, stored, strict=True):
        ends = np.cumsum(meant.num_top)
        for j, (end, num) in enumerate(zip(ends, meant.num_top, strict=True)):
            of = slice(end - num, end)
            line = []
            for column, temperature in enumerate(temperatures):
                p = simplex(meant.top_logp[of], meant.log_tail[j, column].astype(np.float64), temperature)
                q = simplex(got.top_logp[of], got.log_tail[j, column].astype(np.float64), temperature)
                line.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
            found.append(line)
    return np.array(found)


def test_the_cost_of_rounding_buckets_is_that_of_a_naive_twin(synthetic, tmp_path):
    layout = synthetic.make_layout("topk", logp_step=1 / 16, tail_buckets=(1, 50, 100))
    rows = synthetic.make_rows(layout, samples=6, blocks=6)
    statistics = write_shard(tmp_path / "x.parquet", rows, layout, plan_hash="p", shard=0)
    expected = np.zeros(2)
    for meant, got in zip(rows, read(tmp_path / "x.parquet", layout), strict=True):
        ends = np.cumsum(meant.num_top)
        for j, (end, num) in enumerate(zip(ends, meant.num_top, strict=True)):
            for column, temperature in enumerate(layout.temperatures):
                p, q = (
                    with_buckets(row.top_logp[end - num : end], row.log_buckets[j, column], temperature)
                    for row in (meant, got)
                )
                expected[column] += max(0.0, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    np.testing.assert_allclose(statistics.codec_kl, expected, rtol=1e-5, atol=1e-9)


def with_buckets(top_logp: np.ndarray, log_buckets: np.ndarray, temperature: float) -> np.ndarray:
    masses = np.exp(log_buckets.astype(np.float64))
    kept = np.exp(top_logp.astype(np.float64) / temperature)
    return np.append(kept / max(kept.sum(), 1e-300) * max(0.0, 1 - masses.sum()), masses)


def test_a_percentile_in_the_last_bin_is_bounded_by_the_sum():
    counts = [0] * KL_BINS
    counts[-1] = 3
    assert summary([7.5], counts, 3, [1.0])["1.0"] == {"kl_mean": 2.5, "kl_p99": 7.5}


@pytest.mark.parametrize("step", [1 / 16, 1 / 4, None])
def test_the_cost_of_rounding_is_that_of_a_naive_twin(synthetic, tmp_path, step):
    layout = synthetic.make_layout("topk", logp_step=step)
    rows = synthetic.make_rows(layout, samples=6, blocks=6)
    statistics = write_shard(tmp_path / "x.parquet", rows, layout, plan_hash="p", shard=0)
    stored = list(read(tmp_path / "x.parquet", layout))
    expected = naive_kl(rows, stored, layout.temperatures)
    np.testing.assert_allclose(statistics.codec_kl, expected.sum(0), rtol=1e-6, atol=1e-12)
    counts = np.array(statistics.codec_kl_counts).reshape(2, KL_BINS)
    assert counts.sum(1).tolist() == [statistics.targets] * 2
    told = summary(statistics.codec_kl, statistics.codec_kl_counts, statistics.targets, layout.temperatures)
    for column, temperature in enumerate(("1.0", "2.0")):
        assert told[temperature]["kl_mean"] == pytest.approx(expected[:, column].mean(), rel=1e-6, abs=1e-12)
        exact = np.quantile(expected[:, column], 0.99, method="inverted_cdf")
        assert exact <= told[temperature]["kl_p99"] <= max(exact * 2**0.5, 2**-31.5) * (1 + 1e-9)
    if step is None:
        assert told["1.0"]["kl_mean"] < 1e-6  # float16 numbers
    else:
        assert told["1.0"]["kl_mean"] < step**2 / 24 * 1.3  # half the variance of rounding, for all mass in the head


def read(path, layout):
    import pyarrow.parquet as pq
    from tide.shared.cache.table import read_group

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from read_group(file, group, layout, where=str(path), first_row=0)


def test_without_rounding_nothing_is_lost(synthetic, tmp_path):
    layout = synthetic.make_layout("topk", logp_dtype="float32")
    statistics = write_shard(tmp_path / "x.parquet", synthetic.make_rows(layout), layout, plan_hash="p", shard=0)
    assert statistics.codec_kl == pytest.approx((0.0, 0.0), abs=1e-12)


def test_a_dump_tells_what_its_rounding_cost(tiny_root, tmp_path):
    config = tiny_config(tiny_root, signal__logp_dtype="float16", signal__logp_step=1 / 16)
    manifest = dump_teacher(config, tmp_path / "cache")
    assert manifest.signal.logp_step == 1 / 16
    error = manifest.signal.codec_error
    assert set(error) == {"1.0", "2.0"}
    assert 0 < error["1.0"]["kl_mean"] < 1.5e-4
    assert error["1.0"]["kl_p99"] < 5e-4
    rows = list(open_cache(tmp_path / "cache"))
    values = np.concatenate([row.top_logp for row in rows])
    assert (values * 16 == np.round(values * 16)).all()
    assert summary((), (), 0, ()) == {}


@pytest.mark.parametrize("step", ["0.1", "2", "0", "-0.0625"])
def test_a_step_that_float32_cannot_count_in_is_refused(step):
    with pytest.raises(ConfigError, match=r"signal.logp_step.*a power of two up to 1"):
        load_config(overrides=[f"signal.logp_step={step}"])
