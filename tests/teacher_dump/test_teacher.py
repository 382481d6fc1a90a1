"""`prefill` and `score` equal the naive full [x_t, x_0] run, pass by pass, and cost fewer token-forwards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.attention import block_diffusion_mask
from tide.shared.config import NoiseConfig
from tide.shared.models import TeacherSpec, load_model
from tide.shared.models.specs import BIDIRECTIONAL
from tide.shared.noising import draw_masks, masking_units, timesteps
from tide.teacher_dump.teacher import Pass, Teacher
from tide.teacher_dump.views import passes
from tiny_runs import write_model

BLOCK, MASK, VOCAB, TEMPERATURES = 8, 1023, 1024, (1.0, 2.0)
ATOL = 1e-5  # float32 sums in another order; measured 1-2e-6 on logits of size 10


def make_spec(block_size: int | None = BLOCK, drop_ids: tuple[int, ...] = ()) -> TeacherSpec:
    return TeacherSpec("a2d-qwen3", VOCAB, MASK, 1022, block_size, BIDIRECTIONAL, drop_ids=drop_ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_model(write_model(tmp_path_factory.mktemp("model") / "teacher", "teacher", seed=3))


def naive_logits(model, x_0: np.ndarray, masked: np.ndarray, *, mask_id: int = MASK, block_size: int = BLOCK):
    """float64 logits [l, V] at x_t of one forward over [x_t, x_0] with the whole 2L mask."""
    clean = torch.from_numpy(x_0.astype(np.int64))
    ids = torch.cat([torch.where(torch.from_numpy(masked), mask_id, clean), clean])
    position = torch.arange(len(x_0)).repeat(2)
    mask = block_diffusion_mask(len(x_0), block_size)[None, None]
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=position[None], attention_mask=mask, use_cache=False).logits
    return logits[0, : len(x_0)].double()


def make_passes(lengths: list[int], noise: NoiseConfig, seed: int = 0) -> tuple[list[np.ndarray], list[Pass]]:
    """Samples of random tokens with a chunk per two response tokens, and the passes of all their views."""
    rng = np.random.default_rng(seed)
    x_0 = [rng.integers(0, MASK, length).astype(np.int32) for length in lengths]
    asked = []
    for number, ids in enumerate(x_0):
        starts = np.arange(3 + number, len(ids) - 1, 2)
        chunks = np.stack([starts, starts + 2, starts, starts + 2], axis=1)
        units = masking_units(chunks, len(ids), 3 + number, len(ids), 3 + number)
        for view, t in enumerate(timesteps(number, f"s{number}", noise)):
            masks = draw_masks(units, float(t), f"s{number}", view, noise)
            for masked, active in passes(masks, chunks):
                answered = np.zeros(len(ids), bool)
                for chunk in chunks[active]:
                    answered[chunk[0] : chunk[1]] = True
                target = answered & (rng.random(len(ids)) < 0.5)
                asked.append(Pass(number, masked, answered, target))
    return x_0, asked


def check_against_naive(teacher: Teacher, x_0, asked, answers, *, k: int) -> None:
    """Compare every kept number with the dense logits of a naive forward per pass."""
    support = torch.ones(VOCAB, dtype=torch.bool) if teacher.support is None else teacher.support
    gold, target = iter(answers.gold_logp.double()), 0
    for one in asked:
        logits = naive_logits(teacher.model, x_0[one.sample], one.masked)
        if teacher.drop is not None:
            logits[:, teacher.drop] = -torch.inf
        logp = logits.log_softmax(dim=1)
        for position in np.flatnonzero(one.answered):
            expected = logp[position, int(x_0[one.sample][position])]
            torch.testing.assert_close(next(gold), expected, atol=ATOL, rtol=0)
        for position in np.flatnonzero(one.target):
            inside = logp[position].masked_fill(~support, -torch.inf)
            got = answers.targets
            torch.testing.assert_close(got.top_logp[target].double(), inside.topk(k).values, atol=ATOL, rtol=0)
            torch.testing.assert_close(inside[got.top_ids[target]], inside.topk(k).values, atol=ATOL, rtol=0)
            expected = torch.stack([torch.logsumexp(inside / t, 0) for t in TEMPERATURES])
            torch.testing.assert_close(got.log_z[target].double(), expected, atol=ATOL, rtol=0)
            target += 1
    assert next(gold, None) is None
    assert target == len(answers.targets.top_ids) > 0


def blocks_seen(teacher: Teacher, x_0, asked) -> list[int]:
    return [max([teacher.last_block(p.masked) for p in asked if p.sample == i], default=0) for i in range(len(x_0))]


@pytest.mark.parametrize("comp_demo", [True, False])
@pytest.mark.parametrize("views", [1, 4])
def test_shared_prefill_equals_a_naive_forward_per_pass(model, comp_demo, views):
    """Samples of unequal length, one of them without a masked token, several views, one batch."""
    x_0, asked = make_passes([40, 16, 64, 24], NoiseConfig(views=views, comp_demo=comp_demo))
    asked = [one for one in asked if one.sample != 1]
    support = torch.arange(VOCAB) % 3 != 0
    teacher = Teacher(model, make_spec(), support=support)
    context = teacher.prefill(x_0, blocks_seen(teacher, x_0, asked))
    check_against_naive(teacher, x_0, asked, teacher.score(context, asked, k=5, temperatures=TEMPERATURES), k=5)


def test_how_passes_are_batched_changes_nothing(model):
    """One pass at a time, each over a prefill of its own, gives what the batch gives."""
    x_0, asked = make_passes([32, 48], NoiseConfig(views=3))
    teacher = Teacher(model, make_spec())
    context = teacher.prefill(x_0, [4, 6])
    together = teacher.score(context, asked, k=4, temperatures=TEMPERATURES)
    alone = [
        teacher.score(teacher.prefill(x_0, blocks_seen(teacher, x_0, [one])), [one], k=4, temperatures=TEMPERATURES)
        for one in asked
    ]
    torch.testing.assert_close(together.gold_logp, torch.cat([a.gold_logp for a in alone]), atol=ATOL, rtol=0)
    top_logp = torch.cat([a.targets.top_logp for a in alone])
    torch.testing.assert_close(together.targets.top_logp, top_logp, atol=ATOL, rtol=0)


def test_ids_to_drop_are_gone_before_normalising(model):
    x_0, asked = make_passes([24], NoiseConfig(views=2))
    drop = tuple(i for i in range(0, VOCAB, 5) if i not in set(x_0[0].tolist()))
    teacher = Teacher(model, make_spec(drop_ids=drop), support=torch.ones(VOCAB, dtype=torch.bool))
    context = teacher.prefill(x_0, [3])
    answers = teacher.score(context, asked, k=5, temperatures=TEMPERATURES)
    check_against_naive(teacher, x_0, asked, answers, k=5)
    assert not np.isin(answers.targets.top_ids.numpy(), drop).any()


def test_a_teacher_without_blocks_reads_the_noised_sequence_alone(model):
    x_0, asked = make_passes([21, 13], NoiseConfig(views=2))
    teacher = Teacher(model, make_spec(block_size=None))
    context = teacher.prefill(x_0, blocks_seen(teacher, x_0, asked))
    assert teacher.num_token_forwards == 0
    answers = teacher.score(context, asked, k=3, temperatures=TEMPERATURES)
    gold = iter(answers.gold_logp.double())
    for one in asked:
        ids = torch.from_numpy(np.where(one.masked, MASK, x_0[one.sample]).astype(np.int64))
        everywhere = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
        with torch.no_grad():
            logp = model(input_ids=ids[None], attention_mask=everywhere, use_cache=False).logits[0].double()
        logp = logp.log_softmax(dim=1)
        for position in np.flatnonzero(one.answered):
            expected = logp[position, int(x_0[one.sample][position])]
            torch.testing.assert_close(next(gold), expected, atol=ATOL, rtol=0)


def test_a_pass_never_changes_the_prefix(model):
    x_0, asked = make_passes([40, 32], NoiseConfig(views=3))
    teacher = Teacher(model, make_spec())
    context = teacher.prefill(x_0, [5, 4])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in context.cache.layers]
    first = teacher.score(context, asked, k=4, temperatures=TEMPERATURES)
    second = teacher.score(context, asked, k=4, temperatures=TEMPERATURES)
    for layer, (keys, values) in zip(context.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert torch.equal(first.gold_logp, second.gold_logp)
    assert torch.equal(first.targets.top_logp, second.targets.top_logp)


def test_token_forwards_are_counted_and_far_below_the_naive_ones(model):
    """Naive: 2 L per pass, so 4 L per CompDemo view. Here: the blocks of x_0 that are seen, once, and masked blocks."""
    lengths = [64, 96]
    x_0, asked = make_passes(lengths, NoiseConfig(views=10))
    teacher = Teacher(model, make_spec())
    seen = blocks_seen(teacher, x_0, asked)
    teacher.score(teacher.prefill(x_0, seen), asked, k=2, temperatures=TEMPERATURES)
    touched = sum(len(np.unique(np.flatnonzero(one.masked) // BLOCK)) * BLOCK for one in asked)
    assert touched == sum(teacher.num_touched(one.masked) for one in asked)
    assert teacher.num_token_forwards == sum(seen) * BLOCK + touched
    naive = sum(2 * lengths[one.sample] for one in asked)
    assert 35 <= len(asked) <= 40
    assert teacher.num_token_forwards < 0.5 * naive


def test_the_golden_checkpoint_gives_the_logits_of_the_official_class(golden):
    """bd3lm_tiny: written and run by the paper's own class; naive 2L and prefill + score both agree with it."""
    model, expected = load_model(golden / "bd3lm_tiny"), np.load(golden / "bd3lm_tiny" / "expected.npz")
    block_size, mask_id = int(expected["block_size"]), int(expected["mask_id"])
    vocab = model.config.vocab_size
    spec = TeacherSpec("a2d-qwen3", vocab, mask_id, 317, block_size, BIDIRECTIONAL)
    teacher = Teacher(model, spec)
    x_0 = [row.astype(np.int32) for row in expected["ids"]]
    asked = [Pass(i, masked, masked, masked) for i, masked in enumerate(expected["masked"])]
    context = teacher.prefill(x_0, [teacher.last_block(one.masked) for one in asked])
    answers = teacher.score(context, asked, k=vocab, temperatures=(1.0,))
    dense = torch.empty(len(answers.gold_logp), vocab).scatter_(1, answers.targets.top_ids, answers.targets.top_logp)
    official = torch.from_numpy(expected["logits"])[torch.from_numpy(expected["masked"])].log_softmax(dim=1)
    torch.testing.assert_close(dense, official, atol=ATOL, rtol=0)
    for i, one in enumerate(asked):
        naive = naive_logits(model, x_0[i], one.masked, mask_id=mask_id, block_size=block_size)
        official = torch.from_numpy(expected["logits"][i])[one.masked].double()
        torch.testing.assert_close(naive[one.masked], official, atol=ATOL, rtol=0)


def test_comp_demo_asks_each_active_chunk_once_and_masks_all_of_m(tmp_path: Path):
    rng = np.random.default_rng(0)
    starts = np.arange(2, 60, 3)
    chunks = np.stack([starts, starts + 2, starts, starts + 2], axis=1)  # every third token is in no chunk
    units = masking_units(chunks, 64, 2, 64, 2)
    for view in range(50):
        noise = NoiseConfig(seed=view, demo_ratio=float(rng.choice([0.0, 0.3, 0.5, 1.0])))
        masks = draw_masks(units, float(rng.random()), "s", view, noise)
        asked = passes(masks, chunks)
        answered = np.concatenate([active for _, active in asked] or [np.zeros(0, int)])
        assert sorted(answered.tolist()) == masks.active_chunks.tolist()
        assert len(asked) <= 2
        both = [masks.teacher_a, masks.teacher_b]
        assert not (both[0] & both[1]).any()
        for masked, active in asked:
            assert any(masked is half for half in both)
            assert all(masked[start:end].all() for start, end, *_ in chunks[active])
