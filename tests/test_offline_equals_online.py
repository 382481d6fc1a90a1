"""Offline equals online: training from the cache is training with the teacher in the loop (docs/math.md).

The online twin below is slow and obvious: the teacher runs on the full [x_t, x_0] for every view (twice with CompDemo),
both models give logits over their whole vocabulary, and the losses are written from docs/math.md on dense
distributions, in float64. The offline side is the product: the dump's cache with k = V and no tail, and the trainer's
own step.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.cache import open_cache
from tide.shared.config import LossConfig, RunConfig, load_config
from tide.shared.models.loading import load_model
from tide.shared.noising import draw_masks, masking_units
from tide.student_train.trainer import Run
from tide.teacher_dump.pairing import Pairing
from tide.teacher_dump.plan import open_samples, read_plan
from tiny_runs import BLOCK, make_cache, tiny_config
from torch import Tensor

STEPS, STEP = 8, 3
CROSS = ["tide-cross", "calm", "tide-shared-llada2", "tide-hybrid", "kl", "hard-label", "ce"]
SHARED = ["tide-shared", "kl", "reverse-kl", "hard-label", "ce", "tide-cross"]


@dataclass
class OnlineView:
    """One view of the batch, with the teacher's dense answer and what the student must explain."""

    t: float
    x_0: Tensor
    masked: Tensor  # [l] bool, student
    maskable: int
    chunks: np.ndarray  # [c, 4] active
    teacher_logp: Tensor  # [l_teacher, V_teacher] float64; NaN where the teacher was not asked
    teacher_x_0: Tensor


def naive_logits(model, x_0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Logits [l, V] at x_t of one naive [x_t, x_0] forward."""
    length = len(x_0)
    ids = torch.cat([torch.where(masked, mask_id, x_0), x_0])
    position = torch.arange(length).repeat(2)
    noised = torch.arange(2 * length) < length
    block = position // BLOCK
    q_noised, k_noised, q_block, k_block = noised[:, None], noised[None], block[:, None], block[None]
    may = (q_noised & k_noised & (q_block == k_block)) | (q_noised & ~k_noised & (k_block < q_block)) | (
        ~q_noised & ~k_noised & (k_block <= q_block)
    )  # fmt: skip
    logits = model(input_ids=ids[None], position_ids=position[None], attention_mask=may[None, None]).logits
    return logits[0, :length]


def online_views(config: RunConfig, cache_path: Path, rows: list) -> tuple[list[OnlineView], Pairing]:
    """Ask the teacher, loaded from its checkpoint, about the given cache rows' views."""
    plan = read_plan(cache_path).at(config, cache_path)
    conversations, pairing = open_samples(plan)
    samples = {planned.sample_id: pairing.encode(conversations.read(*planned[:3])) for planned in plan.samples}
    teacher = load_model(config.teacher.path).eval()
    views = []
    for row in rows:
        sample = samples[row.sample_id]
        x_0, teacher_x_0 = (torch.tensor(side.x_0.astype(np.int64)) for side in (sample.student, sample.teacher))
        prompts = sample.student.prompt_tokens, sample.teacher.prompt_tokens
        units = masking_units(sample.chunks, len(x_0), prompts[0], len(teacher_x_0), prompts[1])
        masks = draw_masks(units, np.float32(row.t), row.sample_id, row.view, config.noise)
        np.testing.assert_array_equal(masks.student[prompts[0] :], row.masked)
        teacher_logp = torch.full((len(teacher_x_0), pairing.spec.vocab_size), math.nan, dtype=torch.float64)
        for half in (masks.teacher_a, masks.teacher_b):
            half = torch.tensor(half)
            with torch.no_grad():
                logits = naive_logits(teacher, teacher_x_0, half, pairing.spec.mask_id)
            teacher_logp[half] = torch.log_softmax(logits[half].double(), 1)
        chunks = sample.chunks[masks.active_chunks]
        maskable = len(x_0) - prompts[0]
        views.append(OnlineView(row.t, x_0, torch.tensor(masks.student), maskable, chunks, teacher_logp, teacher_x_0))
    return views, pairing


def online_loss(
    config: RunConfig, views: list[OnlineView], pairing: Pairing, student, mask_id: int, k: int | None = None
) -> Tensor:
    """The weighted sum of the recipe's losses over the batch, from docs/math.md; k: on the k+1 simplex, None: dense."""
    known = np.flatnonzero(pairing.student_id >= 0)
    teacher_support, student_support = torch.tensor(known), torch.tensor(pairing.student_id[known]).long()
    student_of = dict(zip(teacher_support.tolist(), student_support.tolist(), strict=True))
    ce, at_targets, at_chunks = [], [], []
    for view in views:
        logp = torch.log_softmax(naive_logits(student, view.x_0, view.masked, mask_id).double(), 1)
        gold = logp.gather(1, view.x_0[:, None])[:, 0]
        ce.append(-(gold[view.masked]).sum() / view.t)
        teacher_gold = view.teacher_logp.gather(1, view.teacher_x_0[:, None])[:, 0]
        for a, b, c, d in view.chunks:
            pair = (b - a, d - c) == (1, 1) and student_of.get(int(view.teacher_x_0[a])) == int(view.x_0[c])
            at_chunks.append((gold[c:d].sum(), teacher_gold[a:b].sum(), view.t, pair))
            if pair:
                place = int((student_support == view.x_0[c]).nonzero())
                at_targets.append((logp[c, student_support], view.teacher_logp[a, teacher_support], view.t, place))
    total = torch.zeros((), dtype=torch.float64)
    for loss in config.losses:
        if loss.name == "ce":
            value = sum(ce) / sum(view.maskable for view in views)
        elif loss.name == "kl":
            value = sum(token_loss(loss, *target, k) for target in at_targets) / len(at_targets)
        else:
            chosen = [c for c in at_chunks if loss.chunks == "all" or not c[3]]
            value = sum(chunk_loss(loss, *chunk[:3]) for chunk in chosen) / len(chosen)
        total = total + loss.weight * value
    return total


def lambda_and_weight(loss: LossConfig, t: float) -> tuple[float, float]:
    tidal = loss.tidal
    growth = (1 - math.cos(math.pi * STEP / STEPS)) / 2
    lambda_train = tidal.lambda_init + (tidal.lambda_max - tidal.lambda_init) * growth
    weight = math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)) if tidal.timestep_weight == "midrange" else 1.0
    return lambda_train * (1 - t), weight


def token_loss(
    loss: LossConfig, student_logp: Tensor, teacher_logp: Tensor, t: float, gold: int, k: int | None = None
) -> Tensor:
    """One position; log-probabilities over the whole support at temperature 1."""
    log_s = torch.log_softmax(student_logp / loss.temperature, 0)
    log_q = torch.log_softmax(teacher_logp / loss.temperature, 0)
    if k is not None and loss.target == "teacher":
        order = log_q.argsort(descending=True)
        log_s, log_q = (torch.cat([p[order[:k]], p[order[k:]].logsumexp(0)[None]]) for p in (log_s, log_q))
    scale = loss.temperature**2
    if loss.target == "clean":
        return -scale * log_s[gold]
    if loss.tidal:
        lambda_t, weight = lambda_and_weight(loss, t)
        log_r = torch.log_softmax((1 - lambda_t) * log_s.detach() + lambda_t * log_q, 0)
        return scale * weight * (log_r.exp() * (log_r - log_s)).sum()
    if loss.reverse:
        return scale * (log_s.exp() * (log_s - log_q)).sum()
    return scale * (log_q.exp() * (log_q - log_s)).sum()


def chunk_loss(loss: LossConfig, student_logp: Tensor, teacher_logp: Tensor, t: float) -> Tensor:
    """One chunk; sums of log-probabilities of its clean tokens."""
    s = (student_logp / loss.temperature).exp()
    q = (teacher_logp / loss.temperature).exp().clamp(1e-7, 1 - 1e-7)
    if loss.reverse:
        return -(s * q.log() + (1 - s) * (1 - q).log())
    if not loss.tidal:
        return -(q * s.log() + (1 - q) * (1 - s).log())
    lambda_t, weight = lambda_and_weight(loss, t)
    mixed = (1 - lambda_t) * s.detach() + lambda_t * q
    return -weight * (mixed * s.log() + (1 - mixed) * (1 - s).log())


def whole_vocabulary(root: Path, shared: bool, name: str) -> RunConfig:
    """A configuration whose k is the size of the loss support: nothing is left for the tail."""
    from tide.teacher_dump.pairing import open_pairing

    more = {"train__steps": STEPS, "signal__kind": "topk", "signal__temperatures": [1.0, 2.0]}
    recipe = load_config(name)
    if not recipe.teacher.path:
        more["noise__comp_demo"] = True
    support = open_pairing(tiny_config(root, name, shared=shared, signal__top_k=1, **more)).num_support
    return tiny_config(root, name, shared=shared, signal__top_k=support, **more)


@pytest.mark.parametrize("name, shared", [*[(n, False) for n in CROSS], *[(n, True) for n in SHARED]])
def test_cached_loss_and_gradient_equal_those_with_the_teacher_in_the_loop(
    tiny_root: Path, name: str, shared: bool
) -> None:
    config = whole_vocabulary(tiny_root, shared, name)
    kind = f"{'shared' if shared else 'cross'}-{'demo' if config.noise.comp_demo else 'plain'}"
    cache_path = make_cache(tiny_root, f"whole-{kind}", config)
    # the recipe as a whole, and every term alone, so that the cross-entropy cannot hide the others
    objectives = {name: config.losses} | {f"{name}.{loss.name}": (loss,) for loss in config.losses}
    for what, losses in objectives.items():
        errors = relative_errors(replace(config, losses=losses), cache_path, tiny_root)
        print(f"{kind} {what}: relative error of loss {errors[0]:.1e}, of gradient {errors[1]:.1e}")
        # a single KL close to 0 is a small difference of float32 sums; its gradient is not
        assert errors[0] < (1e-6 if what == name else 1e-5)
        assert errors[1] < 1e-6


@pytest.mark.parametrize("name, shared", [("tide-hybrid", False), ("tide-shared", True), ("reverse-kl", True)])
def test_with_k_of_16_the_cached_loss_is_the_dense_one_with_all_other_tokens_as_one(
    tiny_root: Path, name: str, shared: bool
) -> None:
    config = tiny_config(tiny_root, name, shared=shared, train__steps=STEPS, signal__top_k=16)
    assert config.signal.top_k == 16
    config = replace(config, losses=tuple(loss for loss in config.losses if loss.name == "kl"))
    cache_path = make_cache(tiny_root, f"{name}-16", config)
    loss, gradient = relative_errors(config, cache_path, tiny_root, k=16)
    print(f"{name} with k = 16: relative error of loss {loss:.1e}, of gradient {gradient:.1e}")
    # the teacher's tail is 1 - (stored top mass): float32 rounding of 16 numbers instead of one logsumexp
    assert gradient < 1e-5
    assert loss < 3e-5


def relative_errors(config: RunConfig, cache_path: Path, root: Path, k: int | None = None) -> tuple[float, float]:
    """How far loss and gradient of one step are from the online twin's: (loss, norm of the gradient's difference)."""
    cache = open_cache(cache_path)
    run = Run(config, cache, root / "unused")
    values = run.gradient(STEP, *run.build(STEP))
    offline = {n: p.grad.double() for n, p in run.student.model.named_parameters()}

    items = run.order.items(STEP)
    rows = cache.rows([number for item in items for number in run.order.row_numbers(item)])
    views, pairing = online_views(config, cache_path, rows)
    student = load_model(config.student.path).train()
    loss = online_loss(config, views, pairing, student, run.encoder.mask_id, k)
    loss.backward()
    online = {n: p.grad.double() for n, p in student.named_parameters()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in online.values()))
    error = math.sqrt(sum(float((offline[n] - g).square().sum()) for n, g in online.items()))
    assert norm > 0
    return abs(float(values["loss"]) / loss.item() - 1), error / norm
