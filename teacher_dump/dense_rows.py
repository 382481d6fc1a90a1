"""Whole distributions of a few targets: picked out of each slice of the teacher's head while it is there.

The head (shared/sliced_head.py) never holds more than a slice of [n, V]; what is picked goes to main memory at once, so
an audit takes no product more and, on the device, no room beyond its rows of one slice.
"""

import numpy as np
import torch
from torch import Tensor


class DenseRows:
    """Rows of log-probabilities, filled slice by slice.

    Args:
        wanted: [n] bool, on the CPU: which of the head's rows are kept.
        columns: [S] tokens that are kept of each, in order.
    """

    def __init__(self, wanted: Tensor, columns: Tensor) -> None:
        self.wanted, self.columns = wanted, columns
        self.num_rows = int(wanted.sum())
        self._parts: list[np.ndarray] = []

    def take(self, rows: slice, logp: Tensor) -> None:
        """Keep what is wanted of one slice, [rows, V]; slices come in order."""
        chosen = torch.nonzero(self.wanted[rows]).to(logp.device)  # [a, 1]
        if len(chosen):
            self._parts.append(logp[chosen, self.columns.to(logp.device)].float().cpu().numpy())

    @property
    def values(self) -> np.ndarray:
        """float32 [wanted rows, S]."""
        return np.concatenate([np.zeros((0, len(self.columns)), np.float32), *self._parts])
