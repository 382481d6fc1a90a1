"""4-bit weights through bitsandbytes, for teachers that do not fit otherwise. Never a default: every answer changes.

transformers' own 4-bit loading replaces linear layers and leaves stacked experts as they are; in LLaDA2 those are 94 %
of the weights. Here both kinds are replaced, one after the other on the device, by bitsandbytes' parametrization: a
weight is unpacked when it is read, so arithmetic, grouped expert products included, stays that of the model's dtype.
"""

import importlib.util
from typing import get_args

import torch
from transformers import PreTrainedModel

from ..config import Quantization
from ..errors import ConfigError, Unavailable
from .size import quantizable


def require_bitsandbytes(kind: str | None) -> None:
    """Find out before any work is done.

    Raises: ConfigError: unknown kind. Unavailable: the package is missing.
    """
    if kind is None:
        return
    if kind not in get_args(Quantization):
        raise ConfigError(f"quantization = {kind!r}: expected one of {', '.join(get_args(Quantization))}, or null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable(
            f"teacher.quantization = {kind!r} needs the package bitsandbytes, which is not installed: "
            "pip install 'tide-distill[4bit]', or set teacher.quantization to null"
        )


def quantize(model: PreTrainedModel, kind: Quantization, device: torch.device) -> PreTrainedModel:
    """Turn the weights of linear layers and stacked experts into 4 bits, each on `device`, and move the rest there.

    The whole model never lies on the device in its own dtype. The head, embeddings, norms and routers stay as they are.

    Raises: ConfigError, Unavailable: see `require_bitsandbytes`.
    """
    require_bitsandbytes(kind)
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module, name in quantizable(model):
        weight = getattr(module, name)
        weight.data = weight.data.to(device)
        replace_parameter_4bit(module, name, quant_type=kind)
    return model.to(device)  # type: ignore[arg-type]
