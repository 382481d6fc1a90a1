"""Block-wise decoding: requests -> answers, the one function behind `tide generate`, `tide chat` and evaluation.

Block by block, every step one forward over [the block before, clean, if it was just finished | this block]:

    step 1 of a block   finished positions without keys yet (the prompt, or the last block) and the block's tokens
    other steps         the block's tokens alone, against the cached keys of everything before
    after each step     the surest positions keep their token, the rest is masked again (low-confidence remasking)

so a finished position is computed once, and never in a forward of its own. What a student sees is what it saw in
training (docs/math.md): x_0 before the block, the block bidirectional, and in the answer's first block the
end of the prompt, clean, beside masks. An answer is over as soon as everything before an EOS or a stop text is final,
which no later step could change; its slot goes to the next request at once.

Alone or in company: slots never see each other, random numbers are keyed by (seed, block, step), and attention computes
the same bits in any batch. What remains is the rounding of the linear layers, whose order of summation may depend on
how many tokens a forward holds: batch and alone agree token for token unless two candidates are closer than that. On
the CPU this turned no decision of the tests and of docs/log.md, in float32 or bf16; accelerators choose their kernels
by shape, and in bf16 a near-tie may fall the other way. What must not depend on the batch there is decoded with
batch_size=1, where an answer depends on nothing but its request.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from ..shared.config import DecodingConfig, from_tree, to_tree
from ..shared.errors import ConfigError, DataError
from .answer_text import AnswerReader, Finish
from .block_cache import BlockCache, PackedForward, Span, block_attention, packed_hidden
from .open_answer import Block, OpenAnswer, Request, block_numbers, plan_blocks
from .open_student import vocabulary_weights
from .token_choice import choose_tokens

__all__ = ["Decoder", "DecodingCounts", "Generation", "Request", "Snapshot", "Watch", "answer_settings"]

_TOKENS_PER_FORWARD = 8192
"""New requests wait while a forward holds so many tokens: long prompts do not meet in one."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Args:
        ids: its tokens before EOS or the stop text (a token that holds the beginning of one is left out).
        text: what they spell, up to that point; special tokens are left out.
        finish: why it ends.
        num_forwards: forwards that its tokens took part in.
        num_token_forwards: tokens computed for it, prompt and guidance included.
    """

    ids: tuple[int, ...]
    text: str
    finish: Finish
    num_forwards: int
    num_token_forwards: int


@dataclass(frozen=True)
class Snapshot:
    """An answer after one step.

    Args:
        number: of the request.
        ids: up to the end of the current block; None: masked.
        fresh: indices into `ids` that this step has fixed.
        block_done: nothing is masked any more.
        generation: the finished answer, with its last step.
    """

    number: int
    ids: tuple[int | None, ...]
    fresh: tuple[int, ...]
    block_done: bool
    generation: Generation | None


Watch = Callable[[Snapshot], None]


@dataclass
class DecodingCounts:
    """Work of a decoder since it was made."""

    forwards: int = 0
    token_forwards: int = 0


def answer_settings(settings: DecodingConfig) -> dict[str, object]:
    """The settings that change an answer, as JSON gives them back: for cache keys and result files."""
    tree = to_tree(from_tree(DecodingConfig, to_tree(settings)))  # temperature 1 and 1.0 are one setting
    return {name: value for name, value in json.loads(json.dumps(tree, sort_keys=True)).items() if name != "device"}


@dataclass
class Decoder:
    """A student that writes.

    Args:
        model: a BD3LM student in evaluation mode, on its device.
        reader: its vocabulary.
        block_size: of its training, for settings that name none.
    """

    model: PreTrainedModel
    reader: AnswerReader
    block_size: int
    counts: DecodingCounts = field(default_factory=DecodingCounts)

    def __post_init__(self) -> None:
        weight = vocabulary_weights(self.model)[1]
        if self.reader.mask_id >= len(weight):
            raise ConfigError(
                f"the mask has id {self.reader.mask_id} and the model {len(weight)} embeddings: this is no diffusion "
                "student; make one with tide convert and tide train-student"
            )
        self.allowed = torch.tensor(self.reader.allowed(len(weight)), device=weight.device)

    @property
    def max_positions(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.model.config.max_position_embeddings)

    def precision(self, settings: DecodingConfig) -> torch.autocast:
        """The context in which this student computes."""
        device = self.model.device.type
        bf16 = settings.precision == "bf16" or (settings.precision is None and device != "cpu")
        return torch.autocast(device, torch.bfloat16, enabled=bf16)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], settings: DecodingConfig, *, batch_size: int = 16, watch: Watch | None = None
    ) -> list[Generation]:
        """Answer requests.

        Args:
            batch_size: sequences at a time; decides speed and memory alone (see the module's docstring).
            watch: called after every step of every sequence; what it raises ends the decoding.
        Returns: answers in the order of the requests.
        Raises: ConfigError: an empty prompt. DataError: a prompt that is too long or of another vocabulary; logits that
            are not numbers.
        """
        for number, request in enumerate(requests, 1):
            length, limit = len(request.prompt_ids), self.max_positions
            if not length:
                raise ConfigError(f"prompt {number} is empty; a student needs at least one token to answer to")
            if length + settings.max_new_tokens > limit:
                raise DataError(
                    f"prompt {number} has {length} tokens and decoding.max_new_tokens is {settings.max_new_tokens}: "
                    f"together more than the {limit} positions of this student. Shorten one of the two"
                )
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < len(self.allowed):
                raise DataError(f"prompt {number} holds ids outside the student's {len(self.allowed)} embeddings")
        if not requests:
            return []
        with ExitStack() as stack:
            stack.enter_context(self.precision(settings))
            stack.enter_context(block_attention(self.model))
            return _Decoding(self, requests, settings, min(batch_size, len(requests))).run(watch)


class _Decoding:
    """One call of `Decoder.generate`."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], settings: DecodingConfig, num_slots: int) -> None:
        self.decoder, self.settings, self.num_slots = decoder, settings, num_slots
        block_size = settings.block_size or decoder.block_size
        plans = [plan_blocks(len(r.prompt_ids), settings, block_size, decoder.max_positions) for r in requests]
        self.streams = 2 if settings.guidance else 1  # behind the slots of all prompts lie those of masked ones
        self.cache = BlockCache(self.streams * num_slots, max(plan[-1].stop for plan in plans))
        self.waiting = map(self._begin, range(len(requests)), requests, plans)
        self.block_size = block_size
        self.active: dict[int, OpenAnswer] = {}
        self.results: list[Generation | None] = [None] * len(requests)
        self.spans: list[Span] = []
        self.packed: PackedForward | None = None
        self.next: OpenAnswer | None = next(self.waiting)

    def _begin(self, number: int, request: Request, blocks: list[Block]) -> OpenAnswer:
        length, prompt = blocks[-1].stop, np.asarray(request.prompt_ids, np.int64)
        ids = np.full(length, self.decoder.reader.mask_id, np.int64)
        ids[: len(prompt)] = prompt
        block_of = block_numbers(len(prompt), self.settings, self.block_size, self.cache.capacity)
        return OpenAnswer(number, request, 0, blocks, block_of, ids, np.arange(length) < len(prompt))

    def run(self, watch: Watch | None) -> list[Generation]:
        while self._admit():
            ids, confidence = self._step()
            taken = 0
            for sequence in list(self.active.values()):
                num_open = len(sequence.open_positions())
                own = slice(taken, taken + num_open)
                taken += num_open
                self._finish_step(sequence, ids[own], confidence[own], watch)
        return [result for result in self.results if result is not None]

    def _admit(self) -> bool:
        """Give free slots to waiting requests; returns whether anything is left to do."""
        load = sum(s.span().stop - s.span().start for s in self.active.values())
        for slot in range(self.num_slots):
            if self.next is None:
                break
            if slot in self.active:
                continue
            size = self.next.span().stop
            if self.active and self.streams * (load + size) > _TOKENS_PER_FORWARD:
                break
            self.next.slot = slot
            self.active[slot], load = self.next, load + size
            self.next = next(self.waiting, None)
        self.active = dict(sorted(self.active.items()))
        return bool(self.active)

    def _step(self) -> tuple[np.ndarray, np.ndarray]:
        """One forward: for every open position of all sequences, in order, a token and its confidence."""
        sequences, device = list(self.active.values()), self.decoder.model.device
        spans = [sequence.span() for sequence in sequences]
        if spans != self.spans or self.packed is None:
            shadows = [Span(self.num_slots + s.slot, s.start, s.noised, s.stop) for s in spans]
            every = [*spans, *shadows][: self.streams * len(spans)]
            block_of = [sequence.block_of for sequence in sequences] * self.streams
            config = self.decoder.model.config
            groups = config.num_attention_heads // config.num_key_value_heads
            self.packed, self.spans = PackedForward(self.cache, every, block_of, groups, device), spans
        ids, read, offset = [], [], 0
        for sequence, span in zip(sequences, spans, strict=True):
            ids.append(sequence.ids[span.start : span.stop])
            read.append(sequence.open_positions() - span.start + offset)
            offset += span.stop - span.start
            sequence.num_forwards += 1
            sequence.num_token_forwards += self.streams * (span.stop - span.start)
        if self.streams == 2:
            for sequence, span, own in zip(sequences, spans, ids[:], strict=True):
                in_prompt = np.arange(span.start, span.stop) < sequence.prompt_tokens
                ids.append(np.where(in_prompt, self.decoder.reader.mask_id, own))
        self.decoder.counts.forwards += 1
        self.decoder.counts.token_forwards += self.streams * offset
        index = torch.from_numpy(np.concatenate(read)).to(device)
        hidden = packed_hidden(self.decoder.model, torch.from_numpy(np.concatenate(ids)).to(device), self.packed)
        uniform = torch.zeros(len(index), device=hidden.device)
        if self.settings.temperature:
            draws = np.concatenate([sequence.uniform() for sequence in sequences])
            uniform = torch.from_numpy(draws.astype(np.float32)).to(hidden.device)
        chosen, confidence = choose_tokens(
            hidden[index], hidden[index + offset] if self.streams == 2 else None,
            vocabulary_weights(self.decoder.model)[1], self.decoder.allowed, uniform, self.settings,
        )  # fmt: skip
        values = confidence.cpu().numpy()
        if not np.isfinite(values).all():
            raise DataError("the student's logits are not numbers (NaN): its weights are damaged; train it again")
        return chosen.cpu().numpy(), values

    def _finish_step(self, sequence: OpenAnswer, ids: np.ndarray, confidence: np.ndarray, watch: Watch | None) -> None:
        fresh = sequence.write(ids, confidence, self.settings.threshold)
        last = sequence.blocks[sequence.block].last
        end = sequence.find_end(self.decoder.reader, self.settings.stop)
        done = sequence.advance()
        generation = None
        if end is not None:
            kept = tuple(sequence.answer(sequence.prompt_tokens + end.num_tokens).tolist())
            generation = Generation(kept, end.text, end.finish, sequence.num_forwards, sequence.num_token_forwards)
            self.results[sequence.number] = generation
            del self.active[sequence.slot]
        if watch is not None:
            fixed = sequence.fixed[sequence.prompt_tokens : last]
            shown = tuple(i if f else None for i, f in zip(sequence.answer(last).tolist(), fixed, strict=True))
            watch(Snapshot(sequence.number, shown, tuple((fresh - sequence.prompt_tokens).tolist()), done, generation))
