"""Slices of rows x vocabulary, one after the other in the same few buffers; the rest of the head never sees [n, V].

Fresh buffers for each slice would be mapped and zeroed by the kernel each time: a fifth of a KL step on CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_SLICE_BYTES = 64 * 2**20
"""Size of one float32 slice of logits: 110 rows at V = 151,936. There, slices of half the size cost 16 % of a CPU step
(every slice reads the whole weight again), and twice the size saves 9 %."""


class Scratch:
    """Named buffers [rows, V], each made once and used for slice after slice."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._vocab_size = hidden, weight.shape[0]
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, num_rows: int) -> Tensor:
        """The first rows of a buffer, whose content is whatever its last user left."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < num_rows:
            buffer = self._hidden.new_empty(num_rows, self._vocab_size, dtype=full_dtype(self._hidden))
            self._buffers[name] = buffer
        return buffer[:num_rows]


def full_dtype(values: Tensor) -> torch.dtype:
    """What results are in, whatever the product was computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def support_bias(keep: Tensor | None, hidden: Tensor) -> Tensor | None:
    """[V]: 0 where `keep`, -inf elsewhere; adding it is several times faster than masked_fill on CPU."""
    return None if keep is None else torch.where(keep, 0.0, -torch.inf).to(full_dtype(hidden))


def slice_logits(hidden: Tensor, weight: Tensor, scratch: Scratch) -> Tensor:
    """hidden @ weight.T, returned in float32 (float64 stays).

    On CUDA a half-precision product is never rounded back. On CPU it is, to 2^-9 relative, as everywhere in PyTorch;
    a float32 product would take three times as long.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = scratch("logits", len(hidden))
    if hidden.dtype == logits.dtype:
        return torch.mm(hidden, weight.T, out=logits)
    return logits.copy_(hidden @ weight.T)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, [V, d]; without a second [V, d] where the types allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def slices(num_rows: int, vocab_size: int, max_slice_bytes: int) -> Iterator[slice]:
    """Even slices over the rows, each at most `max_slice_bytes` of float32 logits (but at least one row)."""
    largest = max(1, max_slice_bytes // (4 * vocab_size))
    step = -(-num_rows // max(1, -(-num_rows // largest)))
    for start in range(0, num_rows, max(1, step)):
        yield slice(start, min(start + step, num_rows))


def target_slices(
    target: Tensor, hidden: Tensor, weight: Tensor, max_slice_bytes: int
) -> Iterator[tuple[Tensor, slice | None]]:
    """(rows of hidden, their place among the targets), slice by slice: first the targets, then the rest (None)."""
    for place in slices(len(target), weight.shape[0], max_slice_bytes):
        yield target[place], place
    if len(target) < len(hidden):
        is_rest = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        is_rest[target] = False
        rest = torch.nonzero(is_rest)[:, 0]
        for place in slices(len(rest), weight.shape[0], max_slice_bytes):
            yield rest[place], None
