"""Likelihoods: enumeration against the integral it stands for, against sampling, and against a slow obvious twin."""

import itertools
import math

import numpy as np
import pytest
import torch
from tide.shared.config import DecodingConfig
from tide.student_train.likelihood import AnswerScorer, answer_masks
from tide.student_train.sampling import Decoder, Request
from tiny_caches import MASK
from tiny_decoders import prompts, tiny_decoder, training_logits

BLOCK = 8


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """One random student for all tests."""
    return tiny_decoder(block_size=BLOCK)


def scorer(decoder: Decoder, *, draws: int = 128, seed: int = 0) -> AnswerScorer:
    """With the settings that count here."""
    return AnswerScorer(decoder, DecodingConfig(max_new_tokens=1), draws=draws, seed=seed)


def prompt_of(length: int) -> list[int]:
    """Random tokens."""
    return list(prompts(length)[0].prompt_ids)


@torch.no_grad()
def naive_logp(decoder: Decoder, prompt: list[int], answer: list[int], masked: np.ndarray) -> np.ndarray:
    """float64 [n]: log-probability of every masked token, block by block in the layout of training; 0 elsewhere."""
    result = np.zeros(len(answer))
    whole = prompt + answer
    for start in range(0, len(whole), BLOCK):
        stop = min(start + BLOCK, len(whole))
        hidden = [p for p in range(max(start, len(prompt)), stop) if masked[p - len(prompt)]]
        if not hidden:
            continue
        ids = torch.tensor(whole[:stop])
        ids[hidden] = MASK
        logits = training_logits(decoder.model, ids, start, stop, BLOCK)
        logp = logits.double().log_softmax(1)
        for p in hidden:
            result[p - len(prompt)] = float(logp[p - start, whole[p]])
    return result


@pytest.mark.parametrize("prompt_length", [3, 7, 8, 13])
@pytest.mark.parametrize("answer", [[5], [9, 2]])
def test_enumeration_is_the_mean_of_4096_sampled_masks_within_its_error(decoder, prompt_length, answer):
    prompt = prompt_of(prompt_length)
    (found,) = scorer(decoder).score(prompt, [answer], "q")
    block = (prompt_length + np.arange(len(answer))) // BLOCK
    sets = {bits: naive_logp(decoder, prompt, answer, np.array(bits))
            for bits in itertools.product([False, True], repeat=len(answer))}  # fmt: skip
    rng = np.random.default_rng(prompt_length)
    values = []
    for _ in range(4096):
        masked, weight = np.zeros(len(answer), bool), np.zeros(len(answer))
        for number in np.unique(block):
            places = np.flatnonzero(block == number)
            size = rng.integers(1, len(places) + 1)
            chosen = rng.choice(places, size, replace=False)
            masked[chosen], weight[chosen] = True, len(places) / size
        values.append((weight * sets[tuple(masked.tolist())]).sum())
    error = np.std(values, ddof=1) / 64
    assert found.logp == pytest.approx(np.mean(values), abs=4 * error + 1e-5)  # float32 forwards
    assert len(np.unique(block)) == len(answer) or error > 0, "sampling has something to vary"


def test_own_sampling_agrees_with_enumeration_within_its_error(decoder):
    prompt, answer = prompt_of(10), [9, 2]
    (exact,) = scorer(decoder).score(prompt, [answer], "q")
    sets = {bits: naive_logp(decoder, prompt, answer, np.array(bits))
            for bits in itertools.product([False, True], repeat=2)}  # fmt: skip
    values = []
    for number in range(2048):
        masks = answer_masks(10, 2, block_size=BLOCK, draws=2, seed=0, question=str(number))
        rows = zip(masks.masked.tolist(), masks.weight, strict=True)
        values.append(sum(float((weight * sets[tuple(bits)]).sum()) for bits, weight in rows))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert error > 0
    assert exact.logp == pytest.approx(np.mean(values), abs=4 * error)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_the_weight_of_a_set_is_the_integral_of_the_training_loss(m):
    masks = answer_masks(0, m, block_size=BLOCK, draws=128, seed=0, question="q")
    t = (np.arange(200_000) + 0.5) / 200_000
    assert len(masks.masked) == 2**m - 1
    for masked, weight in zip(masks.masked, masks.weight, strict=True):
        size = masked.sum()
        wanted = np.mean(t**size * (1 - t) ** (m - size) / t)  # p(set | t) * w(t), t uniform
        np.testing.assert_allclose(weight[masked], wanted, rtol=1e-4)
        assert not weight[~masked].any()


@pytest.mark.parametrize(("prompt_length", "num_tokens"), [(1, 5), (6, 9), (8, 8), (5, 19), (23, 2)])
def test_long_answers_match_the_slow_twin(decoder, prompt_length, num_tokens):
    prompt = prompt_of(prompt_length)
    answer = np.random.default_rng(num_tokens).integers(0, 50, num_tokens).tolist()
    (found,) = scorer(decoder, draws=20, seed=3).score(prompt, [answer], "q")
    masks = answer_masks(prompt_length, num_tokens, block_size=BLOCK, draws=20, seed=3, question="q")
    naive = sum(
        float((weight * naive_logp(decoder, prompt, answer, masked)).sum())
        for masked, weight in zip(masks.masked, masks.weight, strict=True)
    )
    assert found.logp == pytest.approx(naive, rel=1e-5)


def test_every_token_counts_once_on_average():
    masks = answer_masks(5, 40, block_size=BLOCK, draws=500, seed=1, question="q")
    weight = masks.weight.sum(0)  # p(masked | t) * 1 / t is 1 at every t
    assert weight.mean() == pytest.approx(1.0)
    np.testing.assert_allclose(weight, 1.0, atol=0.25)
    assert masks.masked[0].all(), "the first view masks everything"


def test_options_of_one_token_share_a_forward_and_score_as_if_alone(decoder, monkeypatch):
    prompt, options = prompt_of(11), [[4], [7], [30], [4]]
    asked = scorer(decoder)
    together = asked.score(prompt, options, "q")
    alone = [asked.score(prompt, [option], "q")[0] for option in options]
    assert together == alone
    general = [asked._one(prompt, option, "q") for option in options]
    assert [s.logp for s in together] == pytest.approx([s.logp for s in general], rel=1e-6)
    assert [s.greedy for s in together] == [s.greedy for s in general]
    forwards = []
    monkeypatch.setattr(AnswerScorer, "_hidden", lambda *a, f=AnswerScorer._hidden: forwards.append(1) or f(*a))
    asked.score(prompt, options, "q")
    assert len(forwards) == 1


def test_company_and_order_change_no_bit(decoder):
    prompt, options = prompt_of(9), [[4, 5, 6], [7], list(range(20)), [1, 2], [3]]
    asked = scorer(decoder, draws=40)
    together = asked.score(prompt, options, "q")
    backwards = asked.score(prompt, options[::-1], "q")[::-1]
    assert together == backwards == [asked.score(prompt, [option], "q")[0] for option in options]


def test_options_of_a_question_are_masked_alike_and_other_questions_otherwise():
    def masks(question: str, seed: int = 0) -> np.ndarray:
        return answer_masks(5, 20, block_size=BLOCK, draws=30, seed=seed, question=question).masked

    assert np.array_equal(masks("q"), masks("q"))
    assert not np.array_equal(masks("q"), masks("other"))
    assert not np.array_equal(masks("q"), masks("q", seed=1))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 12])
def test_greedy_is_what_decoding_writes(decoder, num_tokens):
    prompt = prompt_of(6)
    settings = DecodingConfig(max_new_tokens=num_tokens)
    (written,) = decoder.generate([Request(prompt)], settings)
    (same,) = scorer(decoder).score(prompt, [list(written.ids)], "q")
    assert same.greedy
    other = [*written.ids[:-1], (written.ids[-1] + 1) % 50]
    assert not scorer(decoder).score(prompt, [other], "q")[0].greedy
