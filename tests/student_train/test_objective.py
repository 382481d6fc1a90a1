"""The objective: global denominators, weights and names, on a real forward of a tiny student."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.cache import Cache
from tide.shared.config import LossConfig, TidalConfig, TrainConfig
from tide.shared.errors import ConfigError
from tide.student_train.batches import Batch, GlobalCounts, Item, ViewOrder, collate, views_of
from tide.student_train.losses import calm_loss, calm_tidal_loss, clean_token_loss, kl_loss, tidal_loss
from tide.student_train.objective import Objective, chunk_logp
from tide.student_train.student import Student, StudentOutput
from tiny_caches import BLOCK, MASK, TEMPERATURES, TOP_K, random_cache, sharp_student

CE = LossConfig("ce")
TIDAL = TidalConfig(timestep_weight="midrange")
RECIPES = {
    "ce": [CE],
    "kl": [CE, LossConfig("kl", 3.0)],
    "reverse-kl": [CE, LossConfig("kl", temperature=2.0, reverse=True)],
    "tide-shared": [CE, LossConfig("kl", temperature=2.0, tidal=TIDAL)],
    "calm": [CE, LossConfig("calm", temperature=2.0)],
    "tide-cross": [CE, LossConfig("calm", temperature=2.0, reverse=True)],
    "calm-tidal": [CE, LossConfig("calm", temperature=2.0, tidal=TIDAL)],
    "tide-hybrid": [CE, LossConfig("kl", 3.0), LossConfig("calm", chunks="unmatched")],
    "hard-label": [CE, LossConfig("kl", 3.0, target="clean")],
}
ITEMS = [Item(0, (0, 1)), Item(1, (2, 0)), Item(3, (1, 2)), Item(4, (0, 1)), Item(5, (2, 0)), Item(8, (1, 2))]


def make_objective(losses: Sequence[LossConfig]) -> Objective:
    return Objective(losses, signal="topk", temperatures=TEMPERATURES)


def make_batch(cache: Cache, items: Sequence[Item]) -> Batch:
    samples = [
        views_of(item, cache.rows([item.sample * 3 + view for view in item.views or (0,)]), seed=0) for item in items
    ]
    return collate(samples, mask_id=MASK, block_size=BLOCK, top_k=TOP_K, temperatures=TEMPERATURES)


def make_counts(cache: Cache, items: Sequence[Item]) -> GlobalCounts:
    return ViewOrder(cache, TrainConfig(), fresh_ratio=0).counts(items)


def run(student: Student, objective: Objective, batch: Batch, *, fresh: bool = False) -> StudentOutput:
    temperatures = () if fresh else objective.temperatures
    return student(batch.rows, batch.read, batch.gold_ids, batch.target, batch.teacher.top_ids, temperatures)


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation_over_micro_batches_equals_one_batch_in_losses_and_gradient(tmp_path: Path, recipe: str) -> None:
    cache, student, objective = random_cache(tmp_path), Student(sharp_student()), make_objective(RECIPES[recipe])
    counts, results = make_counts(cache, ITEMS), []
    for cuts in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 6]):
        student.zero_grad()
        values = dict.fromkeys(objective.names, 0.0)
        for start, end in pairwise(cuts):
            batch = make_batch(cache, ITEMS[start:end])
            parts = objective(run(student, objective, batch), batch, counts, progress=0.6)
            objective.total(parts).backward()
            for name, value in parts.items():
                values[name] += value.item()
        results.append((values, torch.cat([p.grad.flatten() for p in student.parameters()])))  # type: ignore[union-attr]
    (values, gradient), *others = results
    assert all(value != 0 for value in values.values())
    for other_values, other_gradient in others:
        assert other_values == pytest.approx(values, rel=1e-5)
        # float32 sums of the same terms in another order.
        assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("weighting", ["scheduler", "uniform"])
@pytest.mark.parametrize("normalise", ["token", "sequence", "batch"])
def test_cross_entropy_equals_a_sum_over_views_and_tokens(tmp_path: Path, weighting, normalise) -> None:
    cache, student = random_cache(tmp_path), Student(sharp_student())
    objective = make_objective([LossConfig("ce", timestep_weight=weighting, normalise=normalise)])
    batch = make_batch(cache, ITEMS)
    with torch.no_grad():
        output = run(student, objective, batch)
        value = objective(output, batch, make_counts(cache, ITEMS), progress=0)["ce"].item()
    gold, place, per_view, maskable = output.gold_logp.double().numpy(), 0, [], []
    for item in ITEMS:
        for view in item.views:
            row = cache.rows([item.sample * 3 + view])[0]
            num = int(row.masked.sum())
            per_view.append(-gold[place : place + num].sum() / (np.float32(row.t) if weighting == "scheduler" else 1))
            maskable.append(len(row.x_0) - row.prompt_tokens)
            place += num
    expected = {
        "token": sum(per_view) / sum(maskable),
        "sequence": sum(v / m for v, m in zip(per_view, maskable, strict=True)) / 12,
        "batch": sum(per_view) / 12,
    }
    assert value == pytest.approx(float(expected[normalise]), rel=1e-5)


def plain_value(loss: LossConfig, output: StudentOutput, batch: Batch) -> torch.Tensor:
    """One distillation loss over the whole batch, at progress 1/2: lambda_train = 0.1 + 0.8 / 2 = 0.5."""
    tidal = {"lambda_train": 0.5, "lambda_max": 0.9, "axis": "both", "timestep_weight": "midrange"}
    temperature = loss.temperature
    if loss.target == "clean":
        return clean_token_loss(output.targets.gold_logp_at(temperature), temperature=temperature)
    if loss.name == "kl":
        pair = output.targets.simplex_logp(temperature), batch.teacher.simplex_logp(temperature)
        if loss.tidal:
            return tidal_loss(*pair, batch.target_t, temperature=temperature, **tidal)
        return kl_loss(*pair, temperature=temperature, reverse=loss.reverse)
    keep = batch.chunk_unmatched if loss.chunks == "unmatched" else torch.ones_like(batch.chunk_unmatched)
    pair = chunk_logp(output.gold_logp, batch)[keep], batch.chunk_logp[keep]
    if loss.tidal:
        return calm_tidal_loss(*pair, batch.chunk_t[keep], temperature=temperature, **tidal)
    return calm_loss(*pair, temperature=temperature, reverse=loss.reverse)


def test_each_loss_is_the_plain_loss_on_the_whole_batch(tmp_path: Path) -> None:
    cache, student = random_cache(tmp_path), Student(sharp_student())
    batch, counts = make_batch(cache, ITEMS), make_counts(cache, ITEMS)
    assert 0 < batch.chunk_unmatched.sum() < len(batch.chunk_unmatched)
    names = set()
    for losses in RECIPES.values():
        objective = make_objective(losses)
        with torch.no_grad():
            output = run(student, objective, batch)
            values = objective(output, batch, counts, progress=0.5)
        for loss, (name, value) in zip(objective.losses, values.items(), strict=True):
            names.add(name)
            if loss.name != "ce":
                torch.testing.assert_close(value, plain_value(loss, output, batch))
    assert names == {"ce", "kl", "reverse_kl", "tidal_kl", "clean_kl", "calm", "reverse_calm", "tidal_calm"}


def test_a_chunks_log_probability_is_the_sum_over_its_tokens(tmp_path: Path) -> None:
    batch = make_batch(random_cache(tmp_path), ITEMS)
    gold_logp = -torch.rand(len(batch.read), generator=torch.Generator().manual_seed(0))
    expected = [
        sum(gold_logp[token].item() for token in batch.chunk_token[batch.chunk_of_token == chunk])
        for chunk in range(len(batch.chunk_logp))
    ]
    torch.testing.assert_close(chunk_logp(gold_logp, batch), torch.tensor(expected))
    assert len({len(batch.chunk_token[batch.chunk_of_token == c]) for c in range(len(expected))}) == 3


def test_the_total_is_the_weighted_sum_and_a_weight_of_zero_is_left_out(tmp_path: Path) -> None:
    cache, student = random_cache(tmp_path), Student(sharp_student())
    objective = make_objective([CE, LossConfig("kl", 3.0), LossConfig("calm", 0.0)])
    assert objective.names == ("ce", "kl")
    batch = make_batch(cache, ITEMS)
    with torch.no_grad():
        values = objective(run(student, objective, batch), batch, make_counts(cache, ITEMS), progress=0)
        assert objective.total(values).item() == pytest.approx(values["ce"].item() + 3 * values["kl"].item(), rel=1e-6)


def test_two_losses_of_one_kind_keep_their_own_values(tmp_path: Path) -> None:
    cache, student = random_cache(tmp_path), Student(sharp_student())
    warm = LossConfig("kl", 2.0, temperature=2.0)
    objective = make_objective([LossConfig("kl"), warm, LossConfig("kl", reverse=True)])
    assert objective.names == ("kl", "kl_2", "reverse_kl")
    assert objective.temperatures == (1.0, 2.0)
    batch, counts = make_batch(cache, ITEMS), make_counts(cache, ITEMS)
    with torch.no_grad():
        output = run(student, objective, batch)
        values = objective(output, batch, counts, progress=0)
    for name, temperature in (("kl", 1.0), ("kl_2", 2.0)):
        pair = output.targets.simplex_logp(temperature), batch.teacher.simplex_logp(temperature)
        torch.testing.assert_close(values[name], kl_loss(*pair, temperature=temperature))
    total = values["kl"] + 2 * values["kl_2"] + values["reverse_kl"]
    torch.testing.assert_close(objective.total(values), total)


def test_a_step_on_fresh_noise_is_cross_entropy_alone(tmp_path: Path) -> None:
    cache, student, objective = random_cache(tmp_path), Student(sharp_student()), make_objective(RECIPES["tide-hybrid"])
    items = [Item(0, (), 0.5, 3), Item(4, (), 0.9, 3)]
    batch, counts = make_batch(cache, items), make_counts(cache, items)
    values = objective(run(student, objective, batch, fresh=True), batch, counts, progress=0, fresh=True)
    assert list(values) == ["ce"]
    assert counts.targets == counts.chunks == len(batch.target) == 0
    assert values["ce"].item() > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_without_anything_masked_gives_zero_and_zero_gradients(tmp_path: Path, recipe: str) -> None:
    cache, student, objective = random_cache(tmp_path), Student(sharp_student()), make_objective(RECIPES[recipe])
    items = [Item(0, (), 1e-9, 0)]
    batch = make_batch(cache, items)
    assert len(batch.read) == 0
    for counts in (make_counts(cache, items), GlobalCounts(1, 1, 0, 0, 0, 0)):
        student.zero_grad()
        total = objective.total(objective(run(student, objective, batch), batch, counts, progress=0.5))
        assert total.item() == 0
        total.backward()
        assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_what_the_cache_cannot_serve_is_refused_by_name() -> None:
    def refused(losses: list[LossConfig], signal: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            Objective(losses, signal=signal, temperatures=(1.0,))

    refused([], "topk", "list at least one loss")
    refused([LossConfig("ce", 0.0)], "topk", "list at least one loss")
    refused([LossConfig("calm")], "none", r"losses\.calm needs the teacher's chunks")
    refused([LossConfig("kl")], "chunk", r"losses\.kl needs token-level targets, and this cache holds signal 'chunk'")
    refused([LossConfig("kl", temperature=2.0)], "topk", r"losses\.kl\.temperature = 2\.0: .* 1\.0 only")
    assert Objective([LossConfig("calm", temperature=2.0)], signal="chunk", temperatures=()).temperatures == ()
    assert Objective([CE], signal="none", temperatures=()).is_ce_only
