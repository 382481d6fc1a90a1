"""Training that went wrong: metrics and weights -> an error before anything is saved over what was good."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..shared.errors import DataError, TideError
from .checkpoint import saved_checkpoints

_GROWTH = 10.0
_LEAST_LIMIT = 1e4
"""A weight may always be so large: those of real checkpoints stay below a thousand."""
_CURE = (
    "lower train.lr or train.muon_lr, lengthen train.warmup_ratio, or clip (train.grad_clip), and begin anew with "
    "--resume never or another --out"
)


def require_finite(totals: Mapping[str, tuple[float, int]], step: int, out: Path) -> None:
    """Raises: TideError: some metric is NaN or infinite in the steps up to `step`."""
    bad = [name for name, (total, _) in totals.items() if not math.isfinite(total)]
    if bad:
        what = f"{', '.join(bad)} is not finite in the steps up to {step}"
        raise TideError(f"training diverged: {what}. {_last_good(out)}; {_CURE}")


def largest_weight(model: nn.Module) -> tuple[str, float]:
    """(name, absolute value) of the largest weight that this process holds; NaN is larger than any."""
    names, tops = [], []
    for name, parameter in model.named_parameters():
        part: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if part.numel():
            names.append(name)
            tops.append(part.detach().abs().amax().float())
    if not tops:
        return "", 0.0
    values = torch.stack(tops)
    place = int(values.argmax())  # torch takes NaN for the largest
    return names[place], float(values[place])


def weight_limit(model: nn.Module, where: str) -> float:
    """The largest weight that training from here can mean.

    Raises: DataError: the weights hold NaN or infinity from the start.
    """
    name, value = largest_weight(model)
    if not math.isfinite(value):
        raise DataError(
            f"{where}: {name} holds {_spelt(value)}: the checkpoint is damaged or comes from a training that "
            "diverged; take another one"
        )
    return max(_LEAST_LIMIT, _GROWTH * value)


def wrecked(model: nn.Module, limit: float) -> str | None:
    """What is wrong with the weights that this process holds; None: nothing."""
    name, value = largest_weight(model)
    if value <= limit:
        return None
    return f"{name} holds {_spelt(value)}" + (f", more than {limit:.3g}" if math.isfinite(value) else "")


def weights_error(what: str | None, step: int, out: Path) -> TideError:
    """Args: what: the fault that this process saw; None: another one did."""
    what = what or "weights are wrecked in another process's share"
    return TideError(f"training diverged: after step {step}, {what}. {_last_good(out)}; {_CURE}")


def _last_good(out: Path) -> str:
    saved = saved_checkpoints(out / "checkpoints")
    return f"Step {saved[-1][0]} is saved, from before that" if saved else "No checkpoint was saved"


def _spelt(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if math.isinf(value) else f"{value:.3g}"
