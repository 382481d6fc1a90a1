"""Which positions an answer's blocks cover, and how many steps each of them takes.

prompt length and settings -> blocks. Blocks count from the prompt's first token (`training`), so that the first one
holds the end of the prompt, clean, beside masks; or they are shifted so that the answer begins one (`boundary`): the
shift replaces the padding of the paper's code, whose pads nobody attends to and whose positions do not count.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..shared.config import DecodingConfig


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
