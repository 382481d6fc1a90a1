"""Rows: which tokens stand in them, and that leaving the others out changes nothing (docs/math.md: Block diffusion)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tide.shared.attention import CLEAN, PADDING, attention_mask, block_diffusion_mask
from tide.shared.models.loading import load_model
from tide.shared.rows import Piece, blocks_read, clean_piece, join, noised_piece, stack

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "bd3lm_tiny"
MASK, BLOCK = 99, 4


def bits(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in line] for line in text.split()])


def test_only_blocks_with_a_masked_token_stand_in_the_noised_piece() -> None:
    masked = bits("....#..#.. ........## ..........")  # 10 tokens: blocks of 4, 4 and 2; the third view has no mask
    noised = noised_piece(np.arange(10), masked, mask_id=MASK, block_size=BLOCK)
    piece = noised.piece
    assert piece.ids.tolist() == [MASK, 5, 6, MASK, MASK, MASK]
    assert piece.position.tolist() == [4, 5, 6, 7, 8, 9]
    assert piece.stream.tolist() == [1, 1, 1, 1, 2, 2]
    assert piece.block.tolist() == [1, 1, 1, 1, 2, 2]
    assert noised.read.tolist() == [0, 3, 4, 5]
    assert noised.view.tolist() == [0, 0, 1, 1]
    assert noised.position.tolist() == [4, 7, 8, 9]
    assert blocks_read(noised) == 2, "x_0 up to the block before the last noised one"


def test_rank_puts_observed_tokens_of_a_block_before_masked_ones() -> None:
    piece = noised_piece(np.arange(8), bits("#..#.#.."), mask_id=MASK, block_size=BLOCK).piece
    for block in (0, 1):
        inside = np.flatnonzero(piece.block == block)
        order = inside[np.argsort(piece.rank[inside])]
        assert order.tolist() == [[1, 2, 0, 3], [4, 6, 7, 5]][block]


@pytest.mark.parametrize("length", [1, 7, 12, 33])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_noised_piece_equals_a_token_by_token_construction(length: int, views: int) -> None:
    rng = np.random.default_rng(length)
    x_0, masked = rng.integers(0, 90, length), rng.random((views, length)) < 0.2
    expected, read = [], []
    for view in range(views):
        for position in range(length):
            start = position // BLOCK * BLOCK
            if masked[view, start : start + BLOCK].any():
                if masked[view, position]:
                    read.append((len(expected), view, position))
                token = MASK if masked[view, position] else int(x_0[position])
                expected.append((token, position, view + 1, position // BLOCK))
    noised = noised_piece(x_0, masked, mask_id=MASK, block_size=BLOCK)
    assert list(zip(*(f.tolist() for f in noised.piece[:4]), strict=True)) == expected
    assert list(zip(noised.read.tolist(), noised.view.tolist(), noised.position.tolist(), strict=True)) == read
    assert sorted(noised.piece.rank.tolist()) == list(range(len(expected)))


def test_the_clean_piece_is_cut_at_a_block_or_the_end() -> None:
    assert clean_piece(np.arange(10), 2, BLOCK).ids.tolist() == list(range(8))
    assert clean_piece(np.arange(10), 3, BLOCK).block.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert set(clean_piece(np.arange(10), 99, BLOCK).stream.tolist()) == {CLEAN}
    assert len(clean_piece(np.arange(10), 0, BLOCK).ids) == 0


def test_nothing_masked_and_nothing_at_all_give_empty_pieces() -> None:
    for length in (0, 6):
        noised = noised_piece(np.arange(length), np.zeros((2, length), bool), mask_id=MASK, block_size=BLOCK)
        assert (len(noised.piece.ids), len(noised.read), blocks_read(noised)) == (0, 0, 0)
        rows = stack([noised.piece])
        assert rows.ids.shape == (1, 1), "a row that a model accepts"
        assert rows.labels.stream.tolist() == [[PADDING]]


def test_stacking_pads_on_the_right_with_padding_labels() -> None:
    pieces = [clean_piece(np.arange(5), 2, BLOCK), clean_piece(np.arange(2), 1, BLOCK)]
    rows = stack(pieces)
    assert rows.ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert rows.labels.stream.tolist() == [[CLEAN] * 5, [CLEAN] * 2 + [PADDING] * 3]
    joined = join(*pieces)
    assert joined.position.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert isinstance(joined, Piece)


def test_rows_reproduce_the_golden_checkpoint() -> None:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/bd3lm_tiny is not beside the project")
    model = load_model(GOLDEN)
    golden = np.load(GOLDEN / "expected.npz")
    block_size, expected = int(golden["block_size"]), torch.from_numpy(golden["logits"])
    noised = [
        noised_piece(ids, masked[None], mask_id=int(golden["mask_id"]), block_size=block_size)
        for ids, masked in zip(golden["ids"], golden["masked"], strict=True)
    ]
    rows = stack(
        [
            join(one.piece, clean_piece(ids, blocks_read(one), block_size))
            for one, ids in zip(noised, golden["ids"], strict=True)
        ]
    )
    mask = attention_mask(rows.labels, rows.labels)
    with torch.no_grad():
        logits = model(input_ids=rows.ids, position_ids=rows.position, attention_mask=mask, use_cache=False).logits
    for row, one in enumerate(noised):
        # float32 sums in another order, on logits near 1.
        torch.testing.assert_close(
            logits[row, : len(one.piece.ids)], expected[row, one.piece.position], rtol=0, atol=1e-5
        )


def test_the_full_mask_reproduces_the_golden_checkpoint() -> None:
    if not GOLDEN.exists():
        pytest.skip("../shared/golden/bd3lm_tiny is not beside the project")
    model = load_model(GOLDEN)
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "expected.npz").items()}
    x_0, length = golden["ids"], golden["ids"].shape[1]
    x_t = torch.where(golden["masked"], golden["mask_id"], x_0)
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([x_t, x_0], 1),
            position_ids=torch.arange(length).repeat(2)[None].expand(len(x_0), -1),
            attention_mask=block_diffusion_mask(length, int(golden["block_size"]))[None, None],
            use_cache=False,
        ).logits
    torch.testing.assert_close(logits[:, :length], golden["logits"], rtol=0, atol=1e-5)
