"""Which token, and how sure: numbers by hand, frequencies of draws, slices, ties."""

import numpy as np
import pytest
import torch
from tide.shared.config import DecodingConfig
from tide.student_train.token_choice import choose_tokens, sampled_tokens, tokens_to_fix

EVERY = torch.ones(4, dtype=torch.bool)


def logits_of(probabilities: list[float], num: int = 1) -> torch.Tensor:
    return torch.tensor(probabilities).log().expand(num, -1)


def test_a_draw_falls_where_the_cumulative_distribution_passes_it():
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001, 0.99])
    drawn = sampled_tokens(logits_of([0.1, 0.5, 0.0, 0.4], 6), uniform, temperature=1.0, top_p=1.0)
    assert drawn.tolist() == [0, 0, 1, 1, 3, 3]


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    uniform = (torch.arange(1000) + 0.5) / 1000
    counts = {}
    for top_p in (0.4, 0.5001, 0.9001, 1.0):
        drawn = sampled_tokens(logits_of([0.1, 0.5, 0.0, 0.4], 1000), uniform, temperature=1.0, top_p=top_p)
        counts[top_p] = torch.bincount(drawn, minlength=4).tolist()
    # 5/9 and 4/9 where token 0 is left out
    assert counts == {
        0.4: [0, 1000, 0, 0],
        0.5001: [0, 556, 0, 444],
        0.9001: [100, 500, 0, 400],
        1.0: [100, 500, 0, 400],
    }


def test_temperature_sharpens_and_confidence_stays_that_of_temperature_1():
    logits = logits_of([0.2, 0.8], 1)
    drawn = sampled_tokens(logits.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000, temperature=0.5, top_p=1.0)
    assert int((drawn == 1).sum()) == 941  # .64 / (.64 + .04)
    ids, confidence = choose_tokens(
        torch.tensor([[1.0]]), None, logits.T, torch.ones(2, dtype=torch.bool), torch.tensor([0.01]),
        DecodingConfig(temperature=0.5),
    )  # fmt: skip
    assert ids.tolist() == [0]
    assert confidence.item() == pytest.approx(0.2)


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_the_largest_number_below_1_still_draws_a_possible_token(top_p):
    logits = torch.full((5, 70_001), -torch.inf)
    logits[:, :70_000] = torch.randn(5, 70_000, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((5,), 1 - 2**-24)
    assert (sampled_tokens(logits, uniform, temperature=1.0, top_p=top_p) < 70_000).all()
    assert (sampled_tokens(logits, torch.ones(5), temperature=1.0, top_p=top_p) < 70_000).all()


def test_slices_of_the_vocabulary_change_nothing_and_barred_ids_are_out_of_reach():
    generator = torch.Generator().manual_seed(1)
    hidden, unguided, weight = (torch.randn(n, 8, generator=generator) for n in (23, 23, 50))
    allowed = torch.arange(50) % 7 != 3
    uniform = torch.rand(23, generator=generator)
    for settings in (DecodingConfig(guidance=0.5), DecodingConfig(temperature=1.5, guidance=2.0)):
        whole = choose_tokens(hidden, unguided, weight, allowed, uniform, settings)
        for size in (1, 4 * 50 * 5):
            ids, confidence = choose_tokens(hidden, unguided, weight, allowed, uniform, settings, max_slice_bytes=size)
            assert torch.equal(ids, whole[0])
            # products of one row and of many may round differently
            torch.testing.assert_close(confidence, whole[1], rtol=1e-5, atol=1e-7)
        assert allowed[whole[0]].all()
        logits = ((1 + settings.guidance) * hidden - settings.guidance * unguided) @ weight.T
        probability = logits.masked_fill(~allowed, -torch.inf).softmax(1)
        torch.testing.assert_close(whole[1], probability.gather(1, whole[0][:, None])[:, 0], rtol=1e-4, atol=1e-7)
        if not settings.temperature:
            assert torch.equal(whole[0], probability.argmax(1))


def test_the_surest_positions_are_fixed_and_of_equals_the_earlier():
    sure = [0.2, 0.9, 0.5, 0.9, 0.5, 0.1]
    assert tokens_to_fix(sure, 1, None).tolist() == [1]
    assert tokens_to_fix(sure, 3, None).tolist() == [1, 2, 3]
    assert tokens_to_fix(sure, 1, 0.5).tolist() == [1, 2, 3, 4]
    assert tokens_to_fix(sure, 1, 0.95).tolist() == [1]
    assert tokens_to_fix(sure, 6, 0.95).tolist() == list(range(6))
    assert tokens_to_fix(np.zeros(0), 1, None).tolist() == []
