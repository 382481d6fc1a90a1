"""The order of training and its batches: every sample once per epoch, and tensors that say what the rows say."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.cache import Cache
from tide.shared.config import TrainConfig
from tide.shared.errors import CacheError, ConfigError
from tide.shared.sparse_logits import log_z_from_tail
from tide.student_train import batches
from tide.student_train.batches import Batch, Item, ViewOrder, collate, views_of
from tiny_caches import BLOCK, MASK, TEMPERATURES, TOP_K, random_cache


def make_order(cache: Cache, *, fresh_ratio: float = 0.0, **train: object) -> ViewOrder:
    return ViewOrder(cache, TrainConfig(**{"batch_size": 4, **train}), fresh_ratio=fresh_ratio)  # type: ignore[arg-type]


def stream(order: ViewOrder, num_steps: int, *, fresh: bool = False) -> list[Item]:
    return [item for step in range(num_steps) if order.is_fresh(step) == fresh for item in order.items(step)]


def make_batch(cache: Cache, items: list[Item], seed: int = 0) -> tuple[Batch, list[list]]:
    order = make_order(cache)
    samples = [views_of(item, cache.rows(order.row_numbers(item)), seed) for item in items]
    top_k = TOP_K if cache.manifest.signal.kind == "topk" else 0
    batch = collate(samples, mask_id=MASK, block_size=BLOCK, top_k=top_k, temperatures=TEMPERATURES)
    return batch, samples


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 13, 30])
def test_every_sample_comes_exactly_once_per_epoch_whatever_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    order = make_order(random_cache(tmp_path), batch_size=batch_size)
    assert order.num_samples == 11
    items = stream(order, num_steps=-(-11 * 5 // batch_size))
    assert all(len(order.items(step)) == batch_size for step in range(3))
    for epoch in range(5):
        assert sorted(item.sample for item in items[epoch * 11 : (epoch + 1) * 11]) == list(range(11))


@pytest.mark.parametrize(("width", "expected"), [(1, [(0,), (1,), (2,), (0,)]), (2, [(0, 1), (2, 0), (1, 2), (0, 1)])])
def test_views_of_a_sample_take_turns_over_the_epochs(tmp_path: Path, width: int, expected: list) -> None:
    items = stream(make_order(random_cache(tmp_path), batch_size=11, views_per_row=width), 4)
    for epoch, views in enumerate(expected):
        assert {item.views for item in items[epoch * 11 : (epoch + 1) * 11]} == {views}


def test_more_views_per_row_than_there_are_gives_each_view_once(tmp_path: Path) -> None:
    order = make_order(random_cache(tmp_path), views_per_row=7)
    assert all(sorted(item.views) == [0, 1, 2] for item in stream(order, 3))


@pytest.mark.parametrize(("width", "expected"), [(1, [(0,), (1,), (0,)]), (3, [(0, 1), (1, 0), (0, 1)])])
def test_only_the_first_max_views_of_a_sample_are_shown(tmp_path: Path, width: int, expected: list) -> None:
    order = make_order(random_cache(tmp_path), batch_size=11, views_per_row=width, max_views=2)
    assert [order.items(epoch)[0].views for epoch in range(3)] == expected


def test_max_top_k_equals_a_cache_that_kept_fewer(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    samples = [views_of(Item(s, (0, 1)), cache.rows([3 * s, 3 * s + 1]), 0) for s in range(4)]
    settings = {"mask_id": MASK, "block_size": BLOCK, "top_k": TOP_K, "temperatures": TEMPERATURES}
    whole, two = collate(samples, **settings).teacher, collate(samples, **settings, max_top_k=2).teacher  # type: ignore[arg-type]
    assert two.top_ids.shape[1] == 2
    assert torch.equal(two.top_logp, whole.top_logp[:, :2])
    for temperature in TEMPERATURES:
        full, short = whole.simplex_logp(temperature).exp(), two.simplex_logp(temperature).exp()
        torch.testing.assert_close(short[:, :2], full[:, :2])
        torch.testing.assert_close(short[:, 2], full[:, 2:].sum(1), rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize(("setting", "dump"), [("max_views", "noise.views=4"), ("max_top_k", "signal.top_k=6")])
def test_more_than_the_cache_holds_is_refused_with_what_to_dump(tmp_path: Path, setting: str, dump: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} = {dump[-1]}.*dump again with {dump}"):
        make_order(random_cache(tmp_path), **{setting: int(dump[-1])})


@pytest.mark.parametrize("fresh_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "train",
    [{"steps": 1}, {"steps": 2, "views_per_row": 2}, {"steps": 9}, {"epochs": 1}, {"epochs": 2, "max_views": 2},
     {"epochs": 3}, {"epochs": 3, "batch_size": 5}, {"epochs": 4, "batch_size": 11, "views_per_row": 3}],
)  # fmt: skip
def test_what_a_training_does_not_use_is_what_a_walk_over_its_steps_finds(
    tmp_path: Path, train: dict, fresh_ratio
) -> None:
    order = make_order(random_cache(tmp_path), fresh_ratio=fresh_ratio, **train)
    size = order.train.batch_size
    num_steps = train.get("steps") or max(1, round(train["epochs"] * 11 / size))
    walked = [item for step in range(num_steps) for item in order.items(step)]
    samples = 11 - len({item.sample for item in walked})
    views = {view for item in walked for view in item.views}
    said = " | ".join(order.unused(num_steps))
    assert (f"{samples} of the cache's 11 samples are in no batch" in said) == (samples > 0), said
    missing = 11 * train.get("epochs", 0) - len(walked)
    assert (f"the last {missing} samples of the last epoch are left out" in said) == (missing > 0 and not samples), said
    assert (f"{len(views)} of the cache's 3 views" in said) == (0 < len(views) < 3), said
    assert ("no cached view is used" in said) == (not views), said
    assert ("train.max_views = 2" in said) == ("max_views" in train and len(views) > 0), said


def test_the_order_is_a_function_of_seed_epoch_and_cache_alone(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    first, second = make_order(cache, seed=1, batch_size=5), make_order(cache, seed=1, batch_size=5)
    steps = [9, 2, 30, 0, 9, 17]  # as a resumed run would ask
    assert [first.items(step) for step in range(31)] == [second.items(step) for step in range(31)]
    fresh = make_order(cache, seed=1, batch_size=5)
    assert [fresh.items(step) for step in steps] == [first.items(step) for step in steps]
    # Another batch size cuts the same stream elsewhere.
    assert stream(make_order(cache, seed=1, batch_size=11), 5) == stream(first, 11)
    samples = [item.sample for item in stream(first, 11)]
    epochs = [tuple(samples[i * 11 : (i + 1) * 11]) for i in range(5)]
    assert len(set(epochs)) == 5, "each epoch has its own order"
    assert samples != [item.sample for item in stream(make_order(cache, seed=2, batch_size=5), 11)]


def test_samples_of_a_window_of_row_groups_stay_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(batches, "WINDOW_GROUPS", 1)
    items = stream(make_order(random_cache(tmp_path, (7, 4)), batch_size=11), 6)
    first_shards = []
    for epoch in range(6):
        shards = [0 if item.sample < 7 else 1 for item in items[epoch * 11 : (epoch + 1) * 11]]
        assert np.count_nonzero(np.diff(shards)) == 1, "one window after the other"
        first_shards.append(shards[0])
    assert set(first_shards) == {0, 1}, "windows come in random order"


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0])
def test_fresh_steps_are_spread_evenly_over_training(tmp_path: Path, ratio: float) -> None:
    order = make_order(random_cache(tmp_path), fresh_ratio=ratio)
    fresh = np.array([order.is_fresh(step) for step in range(300)])
    assert np.abs(np.cumsum(fresh) - ratio * np.arange(1, 301)).max() < 1 + 1e-6
    cached = stream(order, 300)
    assert len(cached) == 4 * (300 - fresh.sum())
    for purpose in (cached, stream(order, 300, fresh=True)):
        whole = len(purpose) // 11 * 11
        assert set(Counter(item.sample for item in purpose[:whole]).values()) <= {whole // 11}


def test_fresh_times_are_spread_evenly_in_every_part_of_an_epoch(tmp_path: Path) -> None:
    cache = random_cache(tmp_path, (80, 20), views=1)
    order = make_order(cache, fresh_ratio=1.0, batch_size=20)
    for step in range(10):
        items = order.items(step)
        u = np.sort([(item.fresh_t - 1e-3) / 0.999 for item in items])
        assert all(item.views == () for item in items)
        # 20 points of a Kronecker sequence; across an epoch's end two runs of it.
        assert np.abs(u - (np.arange(20) + 0.5) / 20).max() < 0.15


def test_fresh_masks_are_the_same_in_any_order_and_differ_between_seeds_and_epochs(tmp_path: Path) -> None:
    cache = random_cache(tmp_path)
    order = make_order(cache, fresh_ratio=1.0, batch_size=11)

    def masks(step: int, seed: int = 0) -> list[list[bool]]:
        items = sorted(order.items(step))
        return [views_of(item, cache.rows(order.row_numbers(item)), seed)[0].masked.tolist() for item in items]

    forwards = [masks(step) for step in range(4)]
    assert [masks(step) for step in reversed(range(4))] == forwards[::-1]
    assert len({str(epoch) for epoch in forwards}) == 4
    assert masks(0, seed=1) != forwards[0]


def test_fresh_noise_masks_response_tokens_with_probability_t_and_never_the_prompt(tmp_path: Path) -> None:
    cache = random_cache(tmp_path, (7, 4))
    rows = [cache.rows([sample * 3])[0] for sample in range(11)]
    count = expected = variance = 0.0
    for key in range(100):
        for sample, row in enumerate(rows):
            t = (key + 0.5) / 100
            (view,) = views_of(Item(sample, (), t, key), [row], seed=3)
            assert not view.is_masked[: row.prompt_tokens].any()
            assert len(view.chunk_start) == len(view.target_position) == 0
            response = len(row.x_0) - row.prompt_tokens
            count, expected = count + view.masked.sum(), expected + t * response
            variance += t * (1 - t) * response
    assert abs(count - expected) < 5 * variance**0.5


@pytest.mark.parametrize("fresh", [False, True])
def test_global_counts_equal_a_count_over_the_rows(tmp_path: Path, fresh: bool) -> None:
    cache = random_cache(tmp_path)
    order = make_order(cache, views_per_row=2, batch_size=5, fresh_ratio=float(fresh))
    for step in range(6):
        items = order.items(step)
        counts = order.counts(items)
        rows = [row for item in items for row in cache.rows(order.row_numbers(item))]
        signal = [] if fresh else rows
        assert (counts.rows, counts.views) == (5, len(rows))
        assert counts.maskable == sum(len(row.x_0) - row.prompt_tokens for row in rows)
        assert counts.targets == sum(len(row.target_position) for row in signal)
        assert counts.chunks == sum(len(row.chunk_start) for row in signal)
        unmatched = [s for row in signal for s in row.chunk_start if s not in row.target_position]
        assert counts.unmatched_chunks == len(unmatched)


def test_a_batch_says_what_its_rows_say(tmp_path: Path) -> None:
    items = [Item(0, (1, 2)), Item(3, (0,)), Item(1, (0, 1, 2)), Item(5, (2,)), Item(4, (), 0.5, 7)]
    batch, samples = make_batch(random_cache(tmp_path), items)
    flat = [view for views in samples for view in views]
    ids, position = batch.rows.ids.flatten(), batch.rows.position.flatten()
    n = target = chunk = token = 0
    for view in flat:
        places = np.flatnonzero(view.is_masked)
        read = batch.read[n : n + len(places)]
        assert ids[read].tolist() == [MASK] * len(places)
        assert position[read].tolist() == places.tolist()
        assert batch.gold_ids[n : n + len(places)].tolist() == view.x_0[places].tolist()
        assert batch.t[n : n + len(places)].tolist() == [np.float32(view.t)] * len(places)
        assert set(batch.maskable[n : n + len(places)].tolist()) <= {len(view.x_0) - view.prompt_tokens}
        at, offset = n + np.searchsorted(places, np.arange(len(view.x_0))), 0
        for row_target in range(len(view.target_position)):
            num = int(view.num_top[row_target])
            assert batch.target[target].item() == at[view.target_position[row_target]]
            assert batch.target_t[target].item() == np.float32(view.t)
            expected_ids = [*view.top_ids[offset : offset + num].tolist(), *[-1] * (TOP_K - num)]
            assert batch.teacher.top_ids[target].tolist() == expected_ids
            top_logp = batch.teacher.top_logp[target]
            np.testing.assert_array_equal(top_logp[:num], view.top_logp[offset : offset + num])
            assert (top_logp[num:] == -torch.inf).all()
            np.testing.assert_array_equal(batch.teacher.log_tail[target], view.log_tail[row_target])
            assert batch.teacher.gold_logp[target].item() == view.gold_logp[row_target]
            target, offset = target + 1, offset + num
        for row_chunk in range(len(view.chunk_start)):
            start, length = int(view.chunk_start[row_chunk]), int(view.chunk_len[row_chunk])
            assert batch.chunk_token[token : token + length].tolist() == at[start : start + length].tolist()
            assert batch.chunk_of_token[token : token + length].tolist() == [chunk] * length
            assert batch.chunk_logp[chunk].item() == view.chunk_logp[row_chunk]
            assert batch.chunk_t[chunk].item() == np.float32(view.t)
            assert batch.chunk_unmatched[chunk].item() == (start not in view.target_position)
            token, chunk = token + length, chunk + 1
        n += len(places)
    lengths = [len(batch.read), len(batch.target), len(batch.chunk_logp), len(batch.chunk_token)]
    assert [n, target, chunk, token] == lengths
    assert min(lengths) > 0


def test_the_teachers_simplex_has_mass_one_at_every_temperature(tmp_path: Path) -> None:
    batch, _ = make_batch(random_cache(tmp_path), [Item(sample, (0, 1, 2)) for sample in range(11)])
    for temperature in TEMPERATURES:
        mass = batch.teacher.simplex_logp(temperature).exp().sum(1)
        # float32 log-probabilities near 10 carry 1e-6.
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)


def test_log_z_is_that_of_the_dense_distribution_even_for_a_tail_of_nothing_or_everything() -> None:
    logp = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).mul(4).log_softmax(1).double()
    logp[1] = torch.tensor([0.5, 0.5, *[0.0] * 28]).log()  # all of it in two tokens
    top = logp.topk(6).values.float()
    top[3] = -torch.inf  # nothing kept
    dense = torch.stack([torch.logsumexp(logp / t, 1) for t in TEMPERATURES], 1)
    scaled = torch.stack([torch.logsumexp(top.double() / t, 1) for t in TEMPERATURES], 1)
    tail = torch.log1p(-torch.exp(scaled - dense).clamp(max=1.0)).float()
    assert tail[1].tolist() == [-torch.inf, -torch.inf]
    found = log_z_from_tail(top, tail, TEMPERATURES)
    torch.testing.assert_close(found[:3], dense[:3].float(), rtol=0, atol=1e-5)
    assert found[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("signal", ["none", "chunk"])
def test_caches_with_less_signal_give_batches_without_targets(tmp_path: Path, tiny, signal: str) -> None:
    cache = random_cache(tmp_path, signal=signal)
    batch, _ = make_batch(cache, [Item(0, (1,)), Item(2, (0, 2))])
    assert len(batch.read) > 0
    assert len(batch.target) == 0
    assert batch.teacher.top_ids.shape == (0, 0)
    assert batch.teacher.log_z.shape == (0, 2)
    assert (len(batch.chunk_logp) > 0) == (signal == "chunk")
    assert batch.chunk_unmatched.all()
    counts = make_order(cache).counts([Item(0, (1,)), Item(2, (0, 2))])
    assert counts.chunks == counts.unmatched_chunks == len(batch.chunk_logp)


def test_a_moved_batch_keeps_every_value(tmp_path: Path) -> None:
    batch, _ = make_batch(random_cache(tmp_path), [Item(0, (1,)), Item(2, (0, 2))])
    moved = batch.to("meta")
    for name in ("read", "t", "target", "chunk_token"):
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).device.type == "meta"
    assert moved.teacher.log_tail.device.type == moved.rows.labels.rank.device.type == "meta"
    assert moved.teacher.temperatures == batch.teacher.temperatures


def test_a_cache_that_lacks_a_view_is_refused(tmp_path: Path) -> None:
    cache = random_cache(tmp_path, (4, 3), views=2)
    cache.manifest.noise["views"] = 7  # type: ignore[index]
    with pytest.raises(CacheError, match="every sample's 7 views"):
        make_order(cache)
