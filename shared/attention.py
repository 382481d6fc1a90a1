"""The one factory for block-diffusion attention masks (BD3LM, arXiv 2503.09573; docs/math.md: Block diffusion).

A row is a list of labelled tokens: which stream they belong to (x_0, or one of the noised x_t), which block, and
where they stand in it. Who may attend to whom follows from the labels alone, so the same rule serves the student's
rows with several views, the teacher's cached prefill, and decoding. Labels -> bool mask, True = may attend.

    x_t -> x_t   the same stream and the same block (in `causal` order: only ranks up to its own)
    x_t -> x_0   strictly earlier blocks
    x_0 -> x_0   its own and earlier blocks (in `causal` order: only positions up to its own)
    x_0 -> x_t   never
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

CLEAN = 0
"""Stream of x_0; noised streams count from 1."""
PADDING = -1
"""Stream of tokens that stand for nothing: they see only themselves, so no backend meets an empty row."""


class Labels(NamedTuple):
    """Per token of a batch of rows."""

    stream: Int[Tensor, "b l"]
    block: Int[Tensor, "b l"]
    rank: Int[Tensor, "b l"]
    """Order inside a block for `causal` attention: the position for x_0; for x_t observed tokens first, masked last."""


@dataclass(frozen=True)
class AttentionPattern:
    """How a model was trained to look at a block.

    `causal=False`: bidirectional inside blocks (BD3LM, LLaDA2, SDAR). `causal=True`: WeDLM, where x_0 is strictly
    causal and a block of x_t is causal in the order of `rank`.
    """

    causal: bool = False


def attention_mask(
    query: Labels, key: Labels, pattern: AttentionPattern = AttentionPattern()
) -> Bool[Tensor, "b 1 q k"]:
    """May query token i of a row attend to key token j of the same row?

    Args:
        query: labels [b, q]. key: labels [b, k]; padding on either side has stream PADDING.
    Returns: True = may attend; ready for transformers' `attention_mask` with the sdpa backend.
    """
    q_stream, q_block, q_rank = (label[:, :, None] for label in query)
    k_stream, k_block, k_rank = (label[:, None, :] for label in key)
    within = q_block == k_block
    clean_to_clean = k_block <= q_block
    if pattern.causal:
        within = within & (k_rank <= q_rank)
        clean_to_clean = (k_block < q_block) | within
    noised = q_stream > CLEAN
    to_clean = (k_stream == CLEAN) & torch.where(noised, k_block < q_block, clean_to_clean)
    to_noised = noised & (k_stream == q_stream) & within
    of_padding = (q_stream == PADDING) & (k_stream == PADDING)
    return (((q_stream >= CLEAN) & (to_clean | to_noised)) | of_padding)[:, None]


def block_diffusion_mask(num_tokens: int, block_size: int) -> Bool[Tensor, "two_l two_l"]:
    """The full training mask of [x_t, x_0].

    Args:
        num_tokens: L, a multiple of block_size.
        block_size: tokens per block.
    Returns: [2L, 2L] in the order [x_t, x_0], True = may attend.
    Raises: ValueError: num_tokens is not a multiple of block_size.
    """
    if block_size < 1 or num_tokens < 0 or num_tokens % block_size:
        raise ValueError(f"num_tokens = {num_tokens} is not a multiple of block_size = {block_size}")
    position = torch.arange(num_tokens).repeat(2)[None]
    stream = torch.arange(2).repeat_interleave(num_tokens).flip(0)[None]
    labels = Labels(stream=stream, block=position // block_size, rank=position)
    return attention_mask(labels, labels)[0, 0]
