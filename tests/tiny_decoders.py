"""A tiny random student that writes, and its slow obvious twin: no cache, everything computed again in every step."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from tide.shared.attention import block_diffusion_mask
from tide.shared.config import DecodingConfig
from tide.shared.noising import keyed_generator
from tide.student_train.answer_text import AnswerReader
from tide.student_train.sampling import Decoder, Request
from tiny_caches import MASK, VOCAB, sharp_student
from torch import Tensor
from transformers import PreTrainedModel

NO_EOS = VOCAB - 2
"""An id without bytes: never written, so no answer ends early."""


def tiny_decoder(*, eos_id: int = NO_EOS, block_size: int = 8, spelling: dict[int, bytes] | None = None) -> Decoder:
    """The sharp random student; its token i spells one letter, three tokens at the end nothing."""
    token_bytes = [bytes([ord("0") + i]) for i in range(VOCAB - 3)] + [b"", b"", b"<mask>"]
    for i, spelt in (spelling or {}).items():
        token_bytes[i] = spelt
    model = sharp_student().eval()
    model.config.max_position_embeddings = 512
    return Decoder(model, AnswerReader(token_bytes, frozenset(), eos_id=eos_id, mask_id=MASK), block_size)


def prompts(*lengths: int) -> list[Request]:
    """Random prompts of these lengths, each with a seed of its own."""
    return [
        Request(np.random.default_rng(n).integers(0, VOCAB - 3, length).tolist(), seed=100 + n)
        for n, length in enumerate(lengths)
    ]


def training_logits(model: PreTrainedModel, ids: Tensor, start: int, stop: int, block_size: int) -> Tensor:
    """Logits at start to stop - 1 in the layout of training: [x_t, x_0] of whole blocks under its full mask."""
    padded = torch.cat([ids[:stop], torch.full((-stop % block_size,), MASK)])
    length = len(padded)
    hidden_answer = torch.where(torch.arange(length) < start, padded, MASK)  # x_0 from this block on is never read
    logits = model(
        input_ids=torch.cat([padded, hidden_answer])[None], position_ids=torch.arange(length).repeat(2)[None],
        attention_mask=block_diffusion_mask(length, block_size)[None, None], use_cache=False,
    ).logits  # fmt: skip
    return logits[0, start:stop]


def padded_logits(model: PreTrainedModel, ids: Tensor, start: int, stop: int, block_size: int, num_pads: int) -> Tensor:
    """The same with the prompt padded on the left, as the paper's code calls its model."""
    row = torch.cat([torch.zeros(num_pads, dtype=torch.int64), ids[:stop]])
    place = torch.arange(len(row))
    block = place // block_size
    sees = (block[None] <= block[:, None]) & (place >= num_pads)[None]
    sees |= torch.eye(len(row), dtype=torch.bool)
    logits = model(
        input_ids=row[None], position_ids=(place - num_pads).clamp(min=0)[None], attention_mask=sees[None, None],
        use_cache=False,
    ).logits  # fmt: skip
    return logits[0, num_pads + start : num_pads + stop]


class NaiveAnswer(NamedTuple):
    """Tokens before the first EOS, and how many blocks were written."""

    ids: tuple[int, ...]
    num_blocks: int


@torch.no_grad()
def naive_answer(decoder: Decoder, request: Request, settings: DecodingConfig) -> NaiveAnswer:
    """One request, one block after the other, the whole sequence in every step."""
    bs = settings.block_size or decoder.block_size
    prompt = len(request.prompt_ids)
    at_boundary = settings.prompt_alignment == "boundary"
    num_pads = -prompt % bs if at_boundary else 0
    end = prompt + settings.max_new_tokens
    ids = torch.full((end + bs,), MASK)
    ids[:prompt] = torch.tensor(request.prompt_ids)
    fixed = torch.arange(len(ids)) < prompt
    num_blocks = 0
    for start in range(-num_pads, end, bs):
        stop, answer_stop = start + bs, min(start + bs, end)
        if answer_stop <= prompt:
            continue
        if at_boundary:
            stop = answer_stop
        num_blocks += 1
        size = answer_stop - max(start, prompt)
        per_block = -(-(settings.steps or 0) // -(-settings.max_new_tokens // bs)) or bs
        if not at_boundary:
            per_block = -(-per_block * size // min(bs, settings.max_new_tokens))
        step = 0
        while not fixed[max(start, 0) : answer_stop].all():
            logits = _logits(decoder.model, ids, max(start, 0), stop, bs, num_pads, at_boundary)
            if settings.guidance:
                blind = torch.where(torch.arange(len(ids)) < prompt, MASK, ids)
                base = _logits(decoder.model, blind, max(start, 0), stop, bs, num_pads, at_boundary)
                logits = base + (settings.guidance + 1) * (logits - base)
            num_steps = min(per_block, size)
            quota = size // num_steps + (step < size % num_steps)
            if at_boundary:
                quota = _papers_quota(size, num_steps, step)
            uniform = keyed_generator(request.seed, "decode", start, step).random(stop - start)
            _fix_surest(decoder, logits, ids, fixed, max(start, 0), answer_stop, quota, uniform, settings)
            step += 1
        answer = ids[prompt:answer_stop].tolist()
        if decoder.reader.eos_id in answer:
            return NaiveAnswer(tuple(answer[: answer.index(decoder.reader.eos_id)]), num_blocks)
    return NaiveAnswer(tuple(ids[prompt:end].tolist()), num_blocks)


def _papers_quota(size: int, num_steps: int, step: int) -> int:
    """Of what is left, an equal share for each step to come, rounded, ties to the even number."""
    left = size
    for before in range(step):
        left -= round(Fraction(left, num_steps - before))
    return round(Fraction(left, num_steps - step))


def _logits(
    model: PreTrainedModel, ids: Tensor, start: int, stop: int, bs: int, num_pads: int, at_boundary: bool
) -> Tensor:
    if at_boundary:
        return padded_logits(model, ids, start, stop, bs, num_pads)
    return training_logits(model, ids, start, stop, bs)


def _fix_surest(
    decoder: Decoder, logits: Tensor, ids: Tensor, fixed: Tensor, start: int, stop: int, quota: int,
    uniform: Sequence[float], settings: DecodingConfig,
) -> None:  # fmt: skip
    """One position after the other: a candidate and its confidence, then the surest become final."""
    found: list[tuple[float, int, int]] = []
    for position in range(start, stop):
        if fixed[position]:
            continue
        row = logits[position - start].double().numpy().copy()
        for i in range(len(row)):
            if i == MASK or not decoder.reader.token_bytes[i]:
                row[i] = -np.inf
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        token = int(row.argmax())
        if settings.temperature:
            tempered = np.exp((row - row.max()) / settings.temperature)
            tempered /= tempered.sum()
            kept, order = 0.0, np.argsort(-tempered)
            for rank, i in enumerate(order):
                if kept >= settings.top_p and settings.top_p < 1:
                    tempered[order[rank:]] = 0
                    break
                kept += tempered[i]
            token = int(np.searchsorted(np.cumsum(tempered), uniform[position - start] * tempered.sum(), "right"))
        found.append((-probability[token], position, token))
    for rank, (negative, position, token) in enumerate(sorted(found)):
        if rank < quota or (settings.threshold is not None and -negative >= settings.threshold):
            ids[position], fixed[position] = token, True
