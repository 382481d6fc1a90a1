"""`prefill` and `score` equal one naive forward per pass for every architecture, as trained and as the paper asks."""

import numpy as np
import pytest
import torch
from official_models import BLOCK, naive_logits, spec_of, write_official
from tide.shared.config import NoiseConfig
from tide.shared.models import load_model
from tide.shared.noising import draw_masks, masking_units, timesteps
from tide.teacher_dump.teacher import Pass, Teacher
from tide.teacher_dump.views import passes

VOCAB, MASK, PROMPT, TEMPERATURES = 320, 319, 5, (1.0, 2.0)
ATOL = 1e-5  # float32 sums in another order
TEACHERS = [
    ("llada2", "native"), ("llada2", "paper"), ("wedlm-8b", "native"), ("wedlm-8b", "paper"), ("wedlm-7b", "native"),
    ("sdar", "native"), ("dream", "native"), ("fast-dllm", "native"), ("llada", "native"), ("bd3lm", "native"),
    ("bd3lm", "paper"),
]  # fmt: skip


def asked_passes(lengths: list[int], noise: NoiseConfig) -> tuple[list[np.ndarray], list[Pass]]:
    """Random samples whose response tokens are chunks of one or two tokens, and all passes over their views."""
    rng = np.random.default_rng(1)
    x_0 = [rng.integers(0, MASK, length).astype(np.int32) for length in lengths]
    asked = []
    for number, ids in enumerate(x_0):
        ends = np.unique(rng.integers(PROMPT + 1, len(ids) + 1, len(ids)))
        starts = np.concatenate([[PROMPT], ends[:-1]])
        chunks = np.stack([starts, ends, starts, ends], axis=1)
        units = masking_units(chunks, len(ids), PROMPT, len(ids), PROMPT)
        for view, t in enumerate(timesteps(number, f"s{number}", noise)):
            for masked, active in passes(draw_masks(units, float(t), f"s{number}", view, noise), chunks):
                answered = np.zeros(len(ids), bool)
                for start, end, *_ in chunks[active]:
                    answered[start:end] = True
                asked.append(Pass(number, masked, answered, answered & (rng.random(len(ids)) < 0.5)))
    return x_0, asked


@pytest.mark.parametrize(("name", "attention"), TEACHERS)
def test_shared_prefill_equals_a_naive_forward_per_pass(name, attention, tmp_path):
    """Samples of unequal length in one batch (so rows are padded), several views, both CompDemo passes."""
    folder = write_official(tmp_path, name, vocab_size=VOCAB)
    spec, model = spec_of(folder, attention, mask_id=MASK, eos_id=MASK - 1), load_model(folder)
    x_0, asked = asked_passes([40, 16, 64], NoiseConfig(views=4))
    assert {one.sample for one in asked} == {0, 1, 2}
    support = torch.arange(VOCAB) % 3 != 0
    teacher = Teacher(model, spec, support=support)
    num_blocks = [max(teacher.last_block(one.masked) for one in asked if one.sample == i) for i in range(len(x_0))]
    answers = teacher.score(teacher.prefill(x_0, num_blocks), asked, k=5, temperatures=TEMPERATURES)
    assert teacher.num_token_forwards == sum(
        min(blocks * teacher.block_size, len(ids)) for blocks, ids in zip(num_blocks, x_0, strict=True)
    ) + sum(teacher.num_touched(one.masked) for one in asked)
    gold, target = iter(answers.gold_logp.double()), 0
    for one in asked:
        logp = naive_logits(model, spec, x_0[one.sample], one.masked).log_softmax(dim=1)
        for position in np.flatnonzero(one.answered):
            expected = logp[position, int(x_0[one.sample][position])]
            torch.testing.assert_close(next(gold), expected, atol=ATOL, rtol=0)
        for position in np.flatnonzero(one.target):
            inside = logp[position].masked_fill(~support, -torch.inf)
            top = answers.targets.top_logp[target].double()
            torch.testing.assert_close(top, inside.topk(5).values, atol=ATOL, rtol=0)
            log_z = torch.stack([torch.logsumexp(inside / t, 0) for t in TEMPERATURES])
            torch.testing.assert_close(answers.targets.log_z[target].double(), log_z, atol=ATOL, rtol=0)
            target += 1
    assert next(gold, None) is None
    assert target == len(answers.targets.top_ids) > 0


def test_a_shifted_answer_is_read_in_the_block_before(tmp_path):
    """Only the first token of a block is masked: its block and the one before run, the others do not."""
    folder = write_official(tmp_path, "fast-dllm", vocab_size=VOCAB)
    spec, model = spec_of(folder, "native", mask_id=MASK, eos_id=MASK - 1), load_model(folder)
    x_0 = np.random.default_rng(0).integers(0, MASK, 5 * BLOCK).astype(np.int32)
    masked = np.zeros(len(x_0), bool)
    masked[2 * BLOCK] = True
    teacher = Teacher(model, spec)
    assert teacher.num_touched(masked) == 2 * BLOCK
    context = teacher.prefill([x_0], [teacher.last_block(masked)])
    answers = teacher.score(context, [Pass(0, masked, masked, masked)], k=3, temperatures=(1.0,))
    assert teacher.num_token_forwards == 4 * BLOCK  # two blocks of x_0, two of x_t
    expected = naive_logits(model, spec, x_0, masked).log_softmax(dim=1)[2 * BLOCK]
    torch.testing.assert_close(answers.gold_logp[0].double(), expected[int(x_0[2 * BLOCK])], atol=ATOL, rtol=0)


def test_a_shifted_teacher_cannot_be_asked_about_the_first_token(tmp_path):
    folder = write_official(tmp_path, "dream", vocab_size=VOCAB)
    teacher = Teacher(load_model(folder), spec_of(folder, "native", mask_id=MASK, eos_id=MASK - 1))
    x_0 = np.arange(10, dtype=np.int32)
    masked = x_0 == 0
    with pytest.raises(ValueError, match="the first 1 tokens have nothing before them"):
        teacher.score(teacher.prefill([x_0], [0]), [Pass(0, masked, masked, masked)], k=1, temperatures=(1.0,))
