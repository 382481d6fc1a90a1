"""Which accelerators a worker's copy of the teacher gets, and how it is laid out over them.

One copy per device is the default. A teacher that fits no single device is cut between layers over
`teacher.devices_per_replica` neighbouring ones (accelerate's device map), or read in 4 bits
(`teacher.quantization`). Nothing is ever left to host memory or disk without a word: what does not fit is an error
that says by how much.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..shared.config import TeacherConfig
from ..shared.devices import process_devices
from ..shared.errors import ConfigError, Unavailable
from ..shared.models.loading import load_model, read_config
from ..shared.models.quantization import quantize, require_bitsandbytes
from ..shared.models.size import empty_model, model_size

_GIB = 1 << 30


def open_placed(teacher: TeacherConfig, folder: Path) -> PreTrainedModel:
    """Load the teacher onto this worker's devices.

    Raises: ConfigError, Unavailable: see `replica_devices`, `require_bitsandbytes`, `device_map`. DataError: see
        `load_model`.
    """
    require_bitsandbytes(teacher.quantization)
    devices = replica_devices(teacher)
    if devices[0].type == "cpu":
        model = load_model(folder, dtype=teacher.dtype)
        return quantize(model, teacher.quantization, devices[0]) if teacher.quantization else model
    described, where = read_config(folder), str(folder)
    size = model_size(described, where, dtype=teacher.dtype, quantization=teacher.quantization)
    free = free_bytes(devices)
    if free is not None:
        require_room(size.weight_bytes, devices, free, where)
    if teacher.quantization:
        return quantize(load_model(folder, dtype=teacher.dtype), teacher.quantization, devices[0])
    if len(devices) == 1:
        return load_model(folder, dtype=teacher.dtype, device_map={"": devices[0]})
    layout = device_map(empty_model(described, where), devices)
    return load_model(folder, dtype=teacher.dtype, device_map=layout)


def replica_devices(teacher: TeacherConfig) -> list[torch.device]:
    """This worker's accelerators, by its local rank, or the CPU.

    accelerate's PartialState would also start a process group under torchrun, and ranks must not wait for each other.

    Raises: ConfigError: more devices than this machine has, or none such as `teacher.device`.
    """
    count = teacher.devices_per_replica
    setting = "teacher.device" if count == 1 else "teacher.devices_per_replica, teacher.device"
    return process_devices(teacher.device, setting, count=count)


def free_bytes(devices: Sequence[torch.device]) -> list[int] | None:
    """Free memory of each device; None where torch or the device cannot say."""
    try:
        return [torch.accelerator.get_memory_info(device)[0] for device in devices]
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def require_room(weight_bytes: int, devices: Sequence[torch.device], free: Sequence[int], where: str) -> None:
    """Raises: Unavailable: the weights alone are larger than the free memory; says what would help."""
    if weight_bytes <= sum(free):
        return
    per_device = max(1, min(free))
    raise Unavailable(
        f"{where}: the weights need {weight_bytes / _GIB:.1f} GiB, and {', '.join(map(str, devices))} have "
        f"{sum(free) / _GIB:.1f} GiB free. Set teacher.devices_per_replica to {-(-weight_bytes // per_device)} or "
        "more, or teacher.quantization to nf4 (4-bit weights: every answer changes a little)"
    )


def device_map(model: PreTrainedModel, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Module names -> devices: whole layers in their order, of about the same size on each device.

    accelerate's own map reserves room for layers that come and go, and sends what does not fit to the disk; here every
    weight has one place for good.

    Args: model: without storage.
    Raises: ConfigError: more devices than parts.
    """
    pieces = dict(_pieces(model, "", set(model._no_split_modules or ())))
    ends = np.cumsum([_num_parameters(piece) for piece in pieces.values()])
    middles = (ends + np.concatenate([[0], ends[:-1]])) / 2
    places = np.minimum(middles / ends[-1] * len(devices), len(devices) - 1).astype(int)
    if len(set(places.tolist())) < len(devices):
        raise ConfigError(
            f"teacher.devices_per_replica = {len(devices)}: the {model.config.num_hidden_layers} layers of the teacher "
            "cannot be cut into so many parts; give fewer"
        )
    head = model.get_output_embeddings()
    first = [name for name, piece in pieces.items() if not _num_parameters(piece)]  # rotary angles
    if model.config.tie_word_embeddings:
        first += [name for name, piece in pieces.items() if piece is head]
    layout = {name: devices[place] for name, place in zip(pieces, places.tolist(), strict=True)}
    return layout | dict.fromkeys(first, devices[0])


def _pieces(module: nn.Module, name: str, whole: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Layers, and what lies beside them, in the order of their definition."""
    children = list(module.named_children())
    if not children or type(module).__name__ in whole:
        yield name, module
        return
    for child, inner in children:
        yield from _pieces(inner, f"{name}.{child}" if name else child, whole)


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
