"""Keys and values of sequences that are written block by block: allocated once, written in place, never copied.

    keys of a layer    [slots, heads, capacity, d]   a slot is one sequence, an index along `capacity` its position

A forward reads tokens of several sequences one after the other in a single row, [1, n]: linear layers see no padding
whatever the lengths, and a sequence that has ended costs nothing. Attention takes the row apart again: neighbouring
slots with equally many queries and keys become one call on a view of the cache, under masks of shared/attention.py.
A position holds one stream at a time (a finished block clean, the current one noised, overwritten in each step), so
the cache needs no second copy of anything.

How many keys a call reads follows from the sequence alone (`_KEY_STEP`), so its attention has the same bits alone or in
any company wherever a batched call computes its members alike. The linear layers have no such promise: see sampling.py.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from ..shared.attention import CLEAN, PADDING, Labels, attention_mask

_KEY_STEP = 128
"""Keys are read in multiples of this: lengths that differ little share a call, and shapes change seldom."""
_NAME = "tide_blocks"


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in one forward: positions start to stop - 1; from `noised` on they belong to x_t."""

    slot: int
    start: int
    noised: int
    stop: int

    @property
    def num_keys(self) -> int:
        """Positions whose keys are read, beyond the last one included."""
        return -(-self.stop // _KEY_STEP) * _KEY_STEP


class BlockCache:
    """The keys and values of all layers.

    Args:
        num_slots: sequences at a time.
        num_positions: of the longest sequence.
    """

    def __init__(self, num_slots: int, num_positions: int) -> None:
        self.num_slots, self.capacity = num_slots, -(-num_positions // _KEY_STEP) * _KEY_STEP
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; made on its first use, in the precision that attention computes in."""
        if index not in self.layers:
            dtype = value.dtype
            if torch.is_autocast_enabled(value.device.type):
                dtype = torch.get_autocast_dtype(value.device.type)
            _, heads, _, dim = key.shape
            # zeros: what is not written yet is masked, but 0 times NaN would still be NaN
            shape = (self.num_slots, heads, self.capacity)
            self.layers[index] = (
                torch.zeros(*shape, dim, dtype=dtype, device=key.device),
                torch.zeros(*shape, value.shape[-1], dtype=dtype, device=value.device),
            )
        return self.layers[index]


@dataclass(frozen=True)
class _Call:
    """One attention call: slots first to last - 1, each with the same number of queries and of keys."""

    first: int
    last: int
    tokens: slice
    num_keys: int
    mask: Bool[Tensor, "slots 1 queries keys"]


class PackedForward:
    """What attention must know of one forward: where its tokens stand in the cache, and who sees whom."""

    def __init__(
        self, cache: BlockCache, spans: Sequence[Span], block_of: Sequence[np.ndarray], num_groups: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Args:
        spans: in ascending order of slots.
        block_of: of each span's sequence, the block of every position up to the cache's capacity.
        num_groups: query heads that share a key head.
        """
        self.cache, self.num_groups = cache, num_groups
        slot = np.concatenate([np.full(span.stop - span.start, span.slot) for span in spans])
        position = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        self.slot, self.position = (torch.from_numpy(values).to(device) for values in (slot, position))
        self.calls: list[_Call] = []
        first = tokens = 0
        for last in range(1, len(spans) + 1):
            if last == len(spans) or (
                spans[last].slot != spans[last - 1].slot + 1
                or spans[last].stop - spans[last].start != spans[last - 1].stop - spans[last - 1].start
                or spans[last].num_keys != spans[last - 1].num_keys
            ):
                together = spans[first:last]
                end = tokens + sum(span.stop - span.start for span in together)
                mask = _mask(together, block_of[first:last]).to(device)
                slots = (together[0].slot, together[-1].slot + 1)
                mask = mask.repeat(1, 1, num_groups, 1)
                self.calls.append(_Call(*slots, slice(tokens, end), together[0].num_keys, mask))
                first, tokens = last, end

    def attend(
        self, layer: int, query: Float[Tensor, "1 heads n d"], key: Float[Tensor, "1 kv n d"],
        value: Float[Tensor, "1 kv n e"], scaling: float | None,
    ) -> Float[Tensor, "1 n heads e"]:  # fmt: skip
        """Write the row's keys and values to their places, then let every sequence attend to its own."""
        keys, values = self.cache.layer(layer, key, value)
        keys[self.slot, :, self.position] = key[0].transpose(0, 1).to(keys.dtype)
        values[self.slot, :, self.position] = value[0].transpose(0, 1).to(values.dtype)
        heads, dim = query.shape[1], query.shape[3]
        kv, groups = keys.shape[1], self.num_groups
        output = value.new_empty(query.shape[2], heads, values.shape[3], dtype=values.dtype)
        for call in self.calls:
            slots = call.last - call.first
            # Heads of one group become further queries of their key head: no key is repeated in memory.
            queries = query[0, :, call.tokens].to(keys.dtype).reshape(kv, groups, slots, -1, dim).permute(2, 0, 1, 3, 4)
            answer = scaled_dot_product_attention(
                queries.reshape(slots, kv, -1, dim), keys[call.first : call.last, :, : call.num_keys],
                values[call.first : call.last, :, : call.num_keys], attn_mask=call.mask, scale=scaling,
            )  # fmt: skip
            answer = answer.reshape(slots, kv, groups, -1, answer.shape[-1]).permute(0, 3, 1, 2, 4)
            output[call.tokens] = answer.reshape(-1, heads, answer.shape[-1])
        return output[None]


def _mask(spans: Sequence[Span], block_of: Sequence[np.ndarray]) -> Bool[Tensor, "slots 1 queries keys"]:
    """The factory's mask of some sequences: clean blocks before `noised`, one noised block, nothing behind it."""
    position = np.arange(spans[0].num_keys)
    stream = np.stack(
        [np.where(position < s.noised, CLEAN, np.where(position < s.stop, CLEAN + 1, PADDING)) for s in spans]
    )
    block = np.stack([blocks[: len(position)] for blocks in block_of])
    key = Labels(*(torch.from_numpy(label) for label in (stream, block, np.tile(position, (len(spans), 1)))))
    rows = torch.stack([torch.arange(span.start, span.stop) for span in spans])
    query = Labels(*(label.gather(1, rows) for label in key))
    return attention_mask(query, key)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, packed: PackedForward, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function transformers calls in every layer; `packed` comes through the forward's keyword arguments."""
    index = module.layer_idx
    assert isinstance(index, int)
    return packed.attend(index, query, key, value, scaling), None


AttentionInterface.register(_NAME, _attention)


@contextlib.contextmanager
def block_attention(model: PreTrainedModel) -> Iterator[None]:
    """While active, the model's forward takes `packed=`; afterwards its attention is what it was."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_hidden(model: PreTrainedModel, ids: Int[Tensor, " n"], packed: PackedForward) -> Float[Tensor, "n d"]:
    """Last hidden states of the tokens of several sequences, inside `block_attention`."""
    outputs = model.get_decoder()(
        input_ids=ids[None], position_ids=packed.position[None], use_cache=False, packed=packed,
    )  # fmt: skip
    return outputs.last_hidden_state[0]
