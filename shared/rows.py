"""Rows: views of one sample laid out beside its clean tokens, [x_t1, ..., x_tK, x_0] (docs/math.md: Block diffusion).

x_0 and K masks -> labelled pieces, without the blocks that cannot change a result: x_t blocks that hold no mask, and
x_0 blocks that no noised block looks at. What is left out is exact; tests/shared/test_rows.py compares with the full
2L layout. The teacher runs the clean and the noised piece one after the other, the student in one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from .attention import CLEAN, PADDING, Labels


class Piece(NamedTuple):
    """Labelled tokens."""

    ids: Int64[np.ndarray, " l"]
    position: Int64[np.ndarray, " l"]
    stream: Int64[np.ndarray, " l"]
    block: Int64[np.ndarray, " l"]
    rank: Int64[np.ndarray, " l"]


class Noised(NamedTuple):
    """The noised piece of a row, and where its masked tokens stand."""

    piece: Piece
    read: Int64[np.ndarray, " n"]  # index into the piece where each masked token's answer is: by view and position
    view: Int64[np.ndarray, " n"]  # which of the K views
    position: Int64[np.ndarray, " n"]  # position in x_0


def noised_piece(
    x_0: Int[np.ndarray, " l"], masked: Bool[np.ndarray, "views l"], *, mask_id: int, block_size: int, shift: int = 0
) -> Noised:
    """The blocks of K noised copies of x_0 that hold a masked token.

    Args:
        x_0: clean ids. masked: of each view. mask_id, block_size: of the model that reads the row.
        shift: how many positions before a masked token its answer is read; blocks that are read stay in the piece too.
            Then position 0 must not be masked.
    Raises: ValueError: a masked token has no position `shift` before it.
    """
    num_views, length = masked.shape
    if masked[:, :shift].any():
        raise ValueError(f"the first {shift} tokens have nothing before them, and one of them is masked")
    block = np.arange(length) // block_size
    touched = np.zeros((num_views, block[-1] + 1 if length else 0), bool)
    view_of_mask, position_of_mask = np.nonzero(masked)
    touched[view_of_mask, block[position_of_mask]] = True
    touched[view_of_mask, block[position_of_mask - shift]] = True
    view, position = np.nonzero(touched[:, block])
    is_masked = masked[view, position]
    order = np.lexsort((position, is_masked, block[position], view))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    piece = Piece(
        ids=np.where(is_masked, mask_id, x_0[position]).astype(np.int64),
        position=position.astype(np.int64),
        stream=(view + CLEAN + 1).astype(np.int64),
        block=block[position].astype(np.int64),
        rank=rank,
    )
    # the block read is in the piece, so the position before a masked one is the element before it
    return Noised(piece, np.flatnonzero(is_masked) - shift, view[is_masked], position[is_masked])


def clean_piece(x_0: Int[np.ndarray, " l"], num_blocks: int, block_size: int) -> Piece:
    """The first `num_blocks` blocks of x_0."""
    position = np.arange(min(len(x_0), num_blocks * block_size), dtype=np.int64)
    return Piece(
        ids=x_0[position].astype(np.int64), position=position, stream=np.full(len(position), CLEAN, np.int64),
        block=position // block_size, rank=position,
    )  # fmt: skip


def blocks_read(noised: Noised) -> int:
    """How many leading blocks of x_0 the noised piece can see: all before its last block."""
    return int(noised.piece.block.max()) if len(noised.piece.block) else 0


def join(*pieces: Piece) -> Piece:
    """Pieces one after the other."""
    return Piece(*(np.concatenate(fields) for fields in zip(*pieces, strict=True)))


@dataclass(frozen=True)
class RowTensors:
    """A batch of rows, right-padded."""

    ids: Int64[Tensor, "b l"]
    position: Int64[Tensor, "b l"]
    labels: Labels

    def to(self, device: torch.device | str) -> "RowTensors":
        """The same rows on another device."""
        labels = Labels(*(label.to(device, non_blocking=True) for label in self.labels))
        return RowTensors(self.ids.to(device, non_blocking=True), self.position.to(device, non_blocking=True), labels)


def stack(pieces: Sequence[Piece]) -> RowTensors:
    """Pad pieces to the longest and stack them; padding carries stream PADDING and sees only padding."""
    length = max([1, *(len(piece.ids) for piece in pieces)])  # no model accepts a row of nothing
    fields = []
    for name in Piece._fields:
        padded = np.full((len(pieces), length), PADDING if name == "stream" else 0, np.int64)
        for row, piece in enumerate(pieces):
            values = getattr(piece, name)
            padded[row, : len(values)] = values
        fields.append(torch.from_numpy(padded))
    ids, position, stream, block, rank = fields
    return RowTensors(ids, position, Labels(stream, block, rank))
