"""How likely a student finds an answer: prompt and answer -> nats, exactly where the answer is short.

The measure is the block-diffusion bound on log p(answer | prompt) (docs/math.md: Block diffusion, Noise). For a
block that holds m tokens of the answer, with every block before it clean:

    sum over non-empty sets S of them   1 / (l C(m, l)) * sum over i in S of log p(x_i | the block without S),   l = |S|

which is the integral over t of the training loss with its weight 1/t; blocks add up. Where all sets of a block are no
more than the draws that are asked for, they are enumerated: one token needs one forward, two need three masks. Longer
ones are sampled: l evenly spread over 1 to m (stratified), then l of the m tokens, weight m / l. The random numbers
are those of the question, not of the answer, so its options are compared under the same masks. What lies beyond the
answer in its last block is masked throughout, as it is while a student writes.

Every answer is computed alone, in forwards whose shape follows from it and its prompt: neither its company nor the
batch size can change a bit of its score. Options of one token share the one forward they need.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from ..shared.config import DecodingConfig
from ..shared.noising import keyed_generator
from ..shared.rows import blocks_read, clean_piece, join, noised_piece, stack
from ..shared.sliced_head import top_logits
from .open_student import vocabulary_weights
from .sampling import Decoder, Request
from .student import Student
from .token_choice import choose_tokens, tokens_to_fix

_NOISED_POSITIONS = 1024
"""Of one forward; masks of one answer share its clean half."""


class Likelihood(NamedTuple):
    """Of one answer: nats, <= 0; and would greedy decoding, one token a step, write just this?"""

    logp: float
    greedy: bool


class AnswerMasks(NamedTuple):
    """The masks of an answer, and what each masked token's log-probability counts."""

    masked: Bool[np.ndarray, "views n"]
    weight: Float64[np.ndarray, "views n"]


def answer_masks(
    prompt_tokens: int, answer_tokens: int, *, block_size: int, draws: int, seed: int, question: str
) -> AnswerMasks:
    """Which tokens of an answer each view masks. View 0 masks all of them, unless `draws` is less than a block's.

    Args:
        draws: views at most; blocks whose sets are no more are enumerated.
        question: with the seed, the key of the random numbers.
    """
    block = (prompt_tokens + np.arange(answer_tokens)) // block_size
    parts = []
    for number, first in enumerate(np.unique(block, return_index=True)[1]):
        m = int((block == block[first]).sum())
        if m < 63 and 2**m - 1 <= draws:
            masked = (np.arange(2**m - 1, 0, -1)[:, None] >> np.arange(m)) & 1 == 1
            num = masked.sum(1)
            each = 1 / (num * np.array([math.comb(m, int(n)) for n in num]))
        else:
            generator = keyed_generator(seed, "likelihood", question, number)
            strata = (np.arange(draws)[::-1] + generator.random(draws)) / draws
            num = 1 + np.minimum((strata * m).astype(np.int64), m - 1)
            order = generator.random((draws, block_size))[:, :m].argsort(axis=1).argsort(axis=1)
            masked, each = order < num[:, None], m / (num * draws)
        parts.append((first, masked, masked * each[:, None]))
    views = max((len(masked) for _, masked, _ in parts), default=0)
    result = AnswerMasks(np.zeros((views, answer_tokens), bool), np.zeros((views, answer_tokens)))
    for first, masked, weight in parts:
        place = slice(0, len(masked)), slice(first, first + masked.shape[1])
        result.masked[place], result.weight[place] = masked, weight
    return result


@dataclass(frozen=True)
class AnswerScorer:
    """Scores answers of one student.

    Args:
        decoder: the student. settings: of decoding; precision and guidance count here too.
        draws, seed: as in `answer_masks`.
    """

    decoder: Decoder
    settings: DecodingConfig
    draws: int
    seed: int

    @torch.inference_mode()
    def score(self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], question: str) -> list[Likelihood]:
        """The options of one question.

        Args:
            prompt_ids: at least one token, and with any answer no more than the student has positions.
            question: the key of the random numbers.
        Raises: DataError: logits that are not numbers, where an answer has to be written to tell whether it is greedy.
        """
        single = [answer[0] for answer in answers if len(answer) == 1]
        scores: dict[int, Likelihood] = {}
        with self.decoder.precision(self.settings):
            if single:  # from one forward
                hidden, _, _ = self._hidden(prompt_ids, single[:1], np.ones((1, 1), bool))
                wanted = torch.tensor(single, device=hidden.device)
                found: list[float] = []
                top_logits(
                    hidden, self._head(), wanted[:1], k=0, watch=lambda _, logp: found.extend(logp[0, wanted].tolist())
                )
                best = int(self._surest(hidden)[0][0])
                scores = {i: Likelihood(logp, i == best) for i, logp in zip(single, found, strict=True)}
            return [
                scores[answer[0]] if len(answer) == 1
                else self._one(prompt_ids, answer, question) if answer else Likelihood(0.0, True)
                for answer in answers
            ]  # fmt: skip

    def _one(self, prompt_ids: Sequence[int], answer: Sequence[int], question: str) -> Likelihood:
        block_size = self.decoder.block_size
        masks = answer_masks(
            len(prompt_ids), len(answer), block_size=block_size, draws=self.draws, seed=self.seed, question=question
        )
        width = len(answer) + block_size
        step = max(1, _NOISED_POSITIONS // width)
        gold = np.asarray(answer, np.int64)
        total, may_be_greedy = 0.0, True
        for start in range(0, len(masks.masked), step):
            views = slice(start, start + step)
            hidden, view, place = self._hidden(prompt_ids, answer, masks.masked[views])
            wanted = torch.from_numpy(gold[place]).to(hidden.device)
            logp = top_logits(hidden, self._head(), wanted, k=0).gold_logp.cpu().double().numpy()
            total += float((masks.weight[views][view, place] * logp).sum())
            if start == 0:
                first = block_size - len(prompt_ids) % block_size
                may_be_greedy = self._begins_like(hidden, view, place, gold, masks.masked[0], first)
        if not may_be_greedy:
            return Likelihood(total, False)
        settings = replace(
            self.settings, max_new_tokens=len(answer), steps=None, temperature=0.0, threshold=None, stop=(),
            block_size=block_size, prompt_alignment="training",
        )  # fmt: skip
        (written,) = self.decoder.generate([Request(prompt_ids)], settings, batch_size=1)
        return Likelihood(total, written.ids == tuple(answer))

    def _hidden(
        self, prompt_ids: Sequence[int], answer: Sequence[int], masked: Bool[np.ndarray, "views n"]
    ) -> tuple[Tensor, Int[np.ndarray, " r"], Int[np.ndarray, " r"]]:
        """One forward: hidden states at the answer's masked tokens, their view and their place in the answer."""
        prompt, length = len(prompt_ids), len(prompt_ids) + len(answer)
        block_size = self.decoder.block_size
        end = min(-(-length // block_size) * block_size, max(length, self.decoder.max_positions))
        x_0 = np.full(end, self.decoder.reader.mask_id, np.int64)
        x_0[:prompt], x_0[prompt:length] = prompt_ids, answer
        hidden_in = np.zeros((len(masked), end), bool)
        hidden_in[:, prompt:length] = masked
        last = max(prompt, (length - 1) // block_size * block_size)
        hidden_in[:, length:] = hidden_in[:, last:length].any(1, keepdims=True)
        noised = noised_piece(x_0, hidden_in, mask_id=self.decoder.reader.mask_id, block_size=block_size)
        row = stack([join(noised.piece, clean_piece(x_0, blocks_read(noised), block_size))])
        kept = noised.position < length
        device = self.decoder.model.device
        states = Student(self.decoder.model).hidden(row.to(device))[0]
        read = torch.from_numpy(noised.read[kept]).to(device)
        return states[read], noised.view[kept], noised.position[kept] - prompt

    def _head(self) -> Tensor:
        return vocabulary_weights(self.decoder.model)[1]

    def _surest(self, hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The token greedy decoding would take at each position, and how sure it would be."""
        zero = torch.zeros(len(hidden), device=hidden.device)
        settings = replace(self.settings, temperature=0.0, guidance=0.0)
        ids, confidence = choose_tokens(hidden, None, self._head(), self.decoder.allowed, zero, settings)
        return ids.cpu().numpy(), confidence.cpu().numpy()

    def _begins_like(
        self, hidden: Tensor, view: np.ndarray, place: np.ndarray, gold: np.ndarray, masked: np.ndarray, first: int
    ) -> bool:
        """Might greedy decoding write this answer, to judge by its first step? Spares most answers being written."""
        if self.settings.guidance or not masked[:first].all():
            return True
        here = (view == 0) & (place < first)
        ids, confidence = self._surest(hidden[torch.from_numpy(here).to(hidden.device)])
        fixed = tokens_to_fix(confidence, 1, None)
        return bool((ids[fixed] == gold[place[here]][fixed]).all())
