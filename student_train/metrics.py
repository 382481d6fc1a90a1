"""Metrics of a run: values of single steps -> one line of metrics.jsonl per window of steps, and trackers.

A line holds the means over the steps since the line before it:

    {"step": 20, "epoch": 0.31, "ce": 5.1, "kl": 2.2, "loss": 7.3, "grad_norm": 0.8, "lr": 1e-4, "tokens_per_s": 9e3}

`step` counts finished optimiser steps; losses are unweighted, by name, and `loss` is their weighted sum, all in nats;
`grad_norm` is the norm before clipping; `lr` is AdamW's at the last of these steps. Sums over an unfinished window are
part of a checkpoint: a resumed run writes the lines that an uninterrupted one would have written. Lines of evaluations
stand between them: {"step": 500, "epoch": 7.8, "heldout_bits_per_byte": 3.9, "heldout_accuracy": 0.1}.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shared.cache.files import output_errors, temporary_name
from ..shared.cache.own_entries import no_link
from ..shared.errors import Unavailable

METRICS_NAME = "metrics.jsonl"
ADVICE = "Free space or fix the permission and run the same command again: it resumes from the last checkpoint."


class MetricsWindow:
    """Running sums of step values; they stay on the device until a line is written."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values of one step, float32 scalars; a value need not occur in every step."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def totals(self, reduce: Callable[[str, Tensor], Tensor]) -> dict[str, tuple[float, int]]:
        """(sum, number of steps) by name; `reduce` adds up what is spread over processes. Collective."""
        return {name: (float(reduce(name, self._sums[name])), self._counts[name]) for name in sorted(self._sums)}

    def clear(self) -> None:
        """Begin the next window."""
        self._sums, self._counts = {}, {}

    def restore(self, totals: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Continue a window from its totals."""
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in totals.items()}
        self._counts = {name: int(count) for name, (_, count) in totals.items()}


class MetricsFile:
    """metrics.jsonl of a run folder, one JSON object per line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_NAME

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line through to the disk. Raises: OutputError."""
        with output_errors(self.path, ADVICE):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", opener=no_link) as file:
                file.write(json.dumps(dict(line), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def keep_until(self, steps_done: int) -> None:
        """Drop what a stopped run wrote after its last checkpoint, and a line it was cut off in.

        An evaluation belongs to the step that follows it: the one at `steps_done` will be done again.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _order(line) <= (steps_done, False)]
        temporary = temporary_name(self.path)
        with output_errors(self.path, ADVICE):
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)


def _order(line: str) -> tuple[float, bool]:
    """Where a line stands: its step, and is it an evaluation? A line cut off stands at the end."""
    try:
        values = json.loads(line)
        return values["step"], "heldout_bits_per_byte" in values
    except (ValueError, KeyError, TypeError):
        return math.inf, False


_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def require_trackers(names: Sequence[str]) -> None:
    """Raises: Unavailable: a tracker's package is missing (accelerate would leave the tracker out in silence)."""
    for name in names:
        packages = _TRACKERS[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise Unavailable(
                f"train.report_to names {name}, and the package {packages[0]} is not installed: "
                f"pip install {packages[0]}, or remove it from train.report_to (metrics.jsonl is always written)"
            )


def flat_settings(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, lists by index; empty lists and mappings keep their place."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        items = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(items, Mapping) and items:
            flat |= flat_settings({str(k): v for k, v in items.items()}, f"{where}{name}.")
        else:
            flat[f"{where}{name}"] = value
    return flat
