"""Attention masks against the definition written out token by token (docs/math.md: Block diffusion)."""

import numpy as np
import pytest
import torch
from tide.shared.attention import PADDING, AttentionPattern, Labels, attention_mask, block_diffusion_mask
from tide.shared.rows import Piece, blocks_read, clean_piece, join, noised_piece, stack
from torch import Tensor

CAUSAL = AttentionPattern(causal=True)


def literal_mask(num_tokens: int, block_size: int) -> Tensor:
    """Of [x_t, x_0], as the paper says it."""
    mask = torch.zeros(2 * num_tokens, 2 * num_tokens, dtype=torch.bool)
    for query in range(2 * num_tokens):
        for key in range(2 * num_tokens):
            query_block, key_block = query % num_tokens // block_size, key % num_tokens // block_size
            for query_noised, key_noised, allowed in (
                (True, True, key_block == query_block),
                (True, False, key_block < query_block),
                (False, False, key_block <= query_block),
                (False, True, False),
            ):
                if (query < num_tokens, key < num_tokens) == (query_noised, key_noised):
                    mask[query, key] = allowed
    return mask


def literal_causal_mask(masked: np.ndarray, block_size: int) -> Tensor:
    """WeDLM's [x_t, x_0]: x_0 strictly causal; in a block of x_t observed tokens come first, masked ones last."""
    length = len(masked)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            same_block = query // block_size == key // block_size
            order_query, order_key = (masked[query], query), (masked[key], key)
            mask[query, key] = bool(same_block and order_key <= order_query)
            mask[query, length + key] = key // block_size < query // block_size
            mask[length + query, length + key] = key <= query
    return mask


def all_of(x_0: np.ndarray, masked: np.ndarray, block_size: int) -> Piece:
    """[x_t1, ..., x_tK, x_0] with every block in it: the unmasked blocks' labels are those of an all-masked copy."""
    noised = noised_piece(x_0, masked, mask_id=0, block_size=block_size)
    assert len(noised.piece.ids) == masked.size, "a mask in every block"
    return join(noised.piece, clean_piece(x_0, len(x_0), block_size))


def labels(*pieces: Piece) -> Labels:
    return stack([join(*pieces)]).labels


@pytest.mark.parametrize(("num_tokens", "block_size"), [(0, 4), (1, 1), (4, 4), (12, 4), (12, 1), (12, 12), (21, 7)])
def test_block_diffusion_mask_equals_the_definition(num_tokens: int, block_size: int) -> None:
    assert torch.equal(block_diffusion_mask(num_tokens, block_size), literal_mask(num_tokens, block_size))


@pytest.mark.parametrize(("num_tokens", "block_size"), [(12, 5), (3, 4), (4, 0), (-4, 4)])
def test_a_length_that_is_no_multiple_of_the_block_size_is_refused(num_tokens: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_tokens = {num_tokens} is not a multiple of block_size = {block_size}"):
        block_diffusion_mask(num_tokens, block_size)


@pytest.mark.parametrize(("length", "block_size"), [(8, 4), (13, 4), (7, 7), (5, 1)])
def test_the_causal_pattern_equals_the_definition(length: int, block_size: int) -> None:
    rng = np.random.default_rng(length)
    masked = rng.random(length) < 0.5
    masked[::block_size] = True
    row = labels(all_of(np.arange(length), masked[None], block_size))
    assert torch.equal(attention_mask(row, row, CAUSAL)[0, 0], literal_causal_mask(masked, block_size))


def test_views_in_one_row_never_see_each_other() -> None:
    length, block_size = 12, 4
    masked = np.ones((3, length), bool)
    row = labels(all_of(np.arange(length), masked, block_size))
    mask = attention_mask(row, row)[0, 0]
    single = literal_mask(length, block_size)
    noised, clean = single[:length, :length], single[:length, length:]
    expected = torch.block_diag(noised, noised, noised, single[length:, length:]).bool()
    expected[: 3 * length, 3 * length :] = clean.repeat(3, 1)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", [AttentionPattern(), CAUSAL])
@pytest.mark.parametrize("length", [13, 16])
def test_pieces_with_blocks_left_out_see_what_they_see_in_the_full_row(length: int, pattern: AttentionPattern) -> None:
    block_size, rng = 4, np.random.default_rng(0)
    x_0 = np.arange(length)
    masked = rng.random((2, length)) < 0.5
    masked[:, ::block_size] = True
    masked[0, :4] = masked[1, 4:12] = False
    noised = noised_piece(x_0, masked, mask_id=0, block_size=block_size)
    partial = join(noised.piece, clean_piece(x_0, blocks_read(noised), block_size))
    touched = masked.copy()
    touched[:, ::block_size] = True
    full = noised_piece(x_0, touched, mask_id=0, block_size=block_size).piece
    full = join(full, clean_piece(x_0, length, block_size))
    place = {key: i for i, key in enumerate(zip(full.stream.tolist(), full.position.tolist(), strict=True))}
    kept = torch.tensor([place[key] for key in zip(partial.stream.tolist(), partial.position.tolist(), strict=True)])
    assert len(kept) < len(full.ids)
    whole = attention_mask(labels(full), labels(full), pattern)[0, 0]
    part = attention_mask(labels(partial), labels(partial), pattern)[0, 0]
    if pattern.causal:  # the forced masks of `touched` reorder blocks that `partial` leaves out, and no other
        assert np.array_equal(touched[:, 12:], masked[:, 12:])
    assert torch.equal(part, whole[kept][:, kept])


@pytest.mark.parametrize("pattern", [AttentionPattern(), CAUSAL])
def test_noised_pieces_over_a_cached_prefix_see_what_they_see_in_one_row(pattern: AttentionPattern) -> None:
    x_0, masked = np.arange(12), np.random.default_rng(1).random((1, 12)) < 0.7
    noised = noised_piece(x_0, masked, mask_id=0, block_size=4).piece
    clean = clean_piece(x_0, 2, 4)
    whole = attention_mask(labels(clean, noised), labels(clean, noised), pattern)[0, 0]
    split = attention_mask(labels(noised), labels(clean, noised), pattern)[0, 0]
    assert torch.equal(split, whole[len(clean.ids) :])


def test_padding_sees_padding_alone_and_is_seen_by_nothing_else() -> None:
    x_0 = np.arange(8)
    rows = stack([clean_piece(x_0, 2, 4), clean_piece(x_0, 1, 4), clean_piece(x_0, 0, 4)])
    mask = attention_mask(rows.labels, rows.labels)[:, 0]
    padding = rows.labels.stream == PADDING
    assert padding.sum(1).tolist() == [0, 4, 8]
    assert torch.equal(mask & padding[:, :, None], padding[:, :, None] & padding[:, None, :])
    assert torch.equal(mask & padding[:, None, :], padding[:, :, None] & padding[:, None, :])
    assert mask.any(dim=2).all(), "no query without a key: softmax over nothing is NaN"
