"""One answer while it is written: which positions are fixed, what comes next, and whether it is over.

Everything here is bookkeeping of a single sequence on the CPU; forwards and batches are sampling.py's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..shared.noising import keyed_generator
from .answer_text import AnswerEnd, AnswerReader
from .block_cache import Span
from .block_schedule import Block
from .token_choice import tokens_to_fix


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
