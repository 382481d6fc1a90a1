"""One answer while it is written: its blocks and their steps, which positions are fixed, and whether it is over.

prompt length and settings -> blocks. Blocks count from the prompt's first token (`training`), so that the first one
holds the end of the prompt, clean, beside masks; or they are shifted so that the answer begins one (`boundary`): the
shift replaces the padding of the paper's code, whose pads nobody attends to and whose positions do not count.

Everything here is bookkeeping of a single sequence on the CPU; forwards and batches are sampling.py's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..shared.config import DecodingConfig
from ..shared.noising import keyed_generator
from .answer_text import AnswerEnd, AnswerReader
from .block_cache import Span
from .token_choice import tokens_to_fix


@dataclass(frozen=True)
class Block:
    """Positions start to stop - 1; of these, `first` to `last` - 1 are to be written, in `steps` steps.

    Args: rounded: how many a step fixes is the paper's code's rounding of its share, not the remainder first.
    """

    start: int
    first: int
    last: int
    stop: int
    steps: int
    rounded: bool = False

    def quota(self, step: int) -> int:
        """Tokens that step number `step` fixes: equally many each, the remainder in the first ones.

        `rounded`: of what is left, the share 1 - s / t of a step from time t to s, ties to the even number, as the
        paper's code computes it (linear schedule): 8 tokens in 3 steps are 3, 2 and 3.
        """
        if self.rounded:
            return rounded_quotas(self.last - self.first, self.steps)[step]
        size, more = divmod(self.last - self.first, self.steps)
        return size + (step < more)


@cache
def rounded_quotas(num_tokens: int, num_steps: int) -> tuple[int, ...]:
    """Tokens that each of the paper's steps fixes; they add up to `num_tokens`."""
    left, quotas = num_tokens, []
    for t in range(num_steps, 0, -1):
        quotas.append(round(left * (1 - ((t - 1) / num_steps) / (t / num_steps))))
        left -= quotas[-1]
    return tuple(quotas)


def plan_blocks(
    prompt_tokens: int, settings: DecodingConfig, block_size: int, max_positions: int | None = None
) -> list[Block]:
    """The blocks of one answer.

    Steps: each of ceil(max_new_tokens / block_size) blocks has ceil(steps / blocks), as in the paper's code. With
    `training` alignment the first and the last block are written in part, and take that part of the steps. Without
    `steps`, every step fixes one token.
    The last block is as wide as in training, what is beyond the answer staying masked; with `boundary` it ends with the
    answer, as in the paper's code.

    Args: max_positions: the model's limit; no block reaches beyond. None: no limit.
    """
    shift = block_shift(prompt_tokens, settings, block_size)
    at_boundary = settings.prompt_alignment == "boundary"
    num_tokens = settings.max_new_tokens
    end = prompt_tokens + num_tokens
    block_steps = -(-settings.steps // -(-num_tokens // block_size)) if settings.steps else block_size
    blocks = []
    first = prompt_tokens
    while first < end:
        stop = (first + shift) // block_size * block_size + block_size - shift
        last = min(stop, end)
        limit = end if at_boundary else max(end, max_positions or stop)
        share = -(-block_steps * (last - first) // min(block_size, num_tokens))
        steps = block_steps if at_boundary else share
        place = stop - block_size, first, last, min(stop, limit)
        blocks.append(Block(*place, min(steps, last - first), rounded=at_boundary))
        first = last
    return blocks


def block_shift(prompt_tokens: int, settings: DecodingConfig, block_size: int) -> int:
    """Positions that the first block lacks at its beginning."""
    return -prompt_tokens % block_size if settings.prompt_alignment == "boundary" else 0


def block_numbers(prompt_tokens: int, settings: DecodingConfig, block_size: int, num_positions: int) -> np.ndarray:
    """int64 [num_positions]: the block of every position."""
    return (np.arange(num_positions) + block_shift(prompt_tokens, settings, block_size)) // block_size


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids; `seed` alone decides its random numbers."""

    prompt_ids: Sequence[int]
    seed: int = 0


@dataclass
class OpenAnswer:
    """A request that is being answered in a slot."""

    number: int
    request: Request
    slot: int
    blocks: list[Block]
    block_of: np.ndarray
    ids: np.ndarray
    """int64: prompt and answer; the mask where nothing is fixed."""
    fixed: np.ndarray
    """bool, likewise."""
    num_cached: int = 0
    """Leading positions whose clean keys are in the cache."""
    block: int = 0
    step: int = 0
    num_final: int = 0
    """Leading tokens of the answer that are fixed without a gap."""
    num_forwards: int = 0
    num_token_forwards: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    def span(self) -> Span:
        """What this sequence computes next."""
        block = self.blocks[self.block]
        return Span(self.slot, self.num_cached, block.start, block.stop)

    def open_positions(self) -> np.ndarray:
        """Positions of the block that are still to be written."""
        block = self.blocks[self.block]
        return block.first + np.flatnonzero(~self.fixed[block.first : block.last])

    def uniform(self) -> np.ndarray:
        """One number in [0, 1) for each of these."""
        block = self.blocks[self.block]
        draws = keyed_generator(self.request.seed, "decode", block.start, self.step).random(block.stop - block.start)
        return draws[self.open_positions() - block.start]

    def write(self, ids: np.ndarray, confidence: np.ndarray, threshold: float | None) -> np.ndarray:
        """Fix the surest of the open positions; returns which."""
        chosen = tokens_to_fix(confidence, self.blocks[self.block].quota(self.step), threshold)
        position = self.open_positions()[chosen]
        self.ids[position], self.fixed[position] = ids[chosen], True
        return position

    def answer(self, stop: int) -> np.ndarray:
        """Tokens of the answer before position `stop`."""
        return self.ids[self.prompt_tokens : stop]

    def find_end(self, reader: AnswerReader, stop: Sequence[str]) -> AnswerEnd | None:
        """Is the answer over? Looks at tokens that nothing masked stands before."""
        last = self.blocks[-1].last
        gaps = np.flatnonzero(~self.fixed[self.prompt_tokens : last])
        num_final = int(gaps[0]) if len(gaps) else last - self.prompt_tokens
        if num_final == self.num_final:
            return None
        self.num_final = num_final
        final = self.answer(self.prompt_tokens + num_final).tolist()
        end = reader.find_end(final, stop)
        return end or (AnswerEnd("length", len(final), reader.text(final)) if not len(gaps) else None)

    def advance(self) -> bool:
        """To the next step, or the next block; returns whether the block was finished."""
        self.num_cached, self.step = self.blocks[self.block].start, self.step + 1
        done = not len(self.open_positions())
        if done:
            self.block, self.step = self.block + 1, 0
        return done
