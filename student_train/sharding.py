"""A student spread over the processes (FSDP2), when the launcher asks for it; and its tensors made whole again.

`accelerate launch` with a configuration of type FSDP says so in the environment. Every layer then lies in shares on all
processes and is gathered while it runs, gradients and optimiser state stay in shares. The training step is the same as
under DDP, float32 weights under autocast included, so numbers agree to rounding; accelerate's own wrapping, which it
does on accelerators only, is left out, so that what CPU tests run is what CUDA runs. The price is that halves of the
weights made by autocast live until the backward pass, unless train.gradient_checkpointing is on.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..shared.errors import ConfigError
from .student import Student


def sharding_asked_for() -> FullyShardedDataParallelPlugin | None:
    """What the launcher's environment says about shares; None: whole copies.

    Raises: ConfigError: it asks for more than this module does.
    """
    if says_yes("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the launcher asks for DeepSpeed, which tide does not drive: FSDP2 divides weights, gradients and "
            "optimiser state among the processes; take recipes/accelerate/fsdp2.yaml"
        )
    if not says_yes("ACCELERATE_USE_FSDP"):
        return None
    for setting, asked, fits in (
        ("fsdp_version", os.environ.get("FSDP_VERSION", "1"), "2"),
        ("fsdp_offload_params", says_yes("FSDP_OFFLOAD_PARAMS"), False),
        ("fsdp_cpu_ram_efficient_loading", says_yes("FSDP_CPU_RAM_EFFICIENT_LOADING"), False),
        ("fsdp_activation_checkpointing", says_yes("FSDP_ACTIVATION_CHECKPOINTING"), False),
    ):
        if asked != fits:
            raise ConfigError(
                f"{setting} = {asked} in the launcher's configuration: tide trains with FSDP2 (fsdp_version: 2) "
                "without offloading or partial loading, and checkpoints activations by "
                "train.gradient_checkpointing=true; take recipes/accelerate/fsdp2.yaml"
            )
    return FullyShardedDataParallelPlugin()


def says_yes(variable: str) -> bool:
    """Is a variable of the launcher set to a yes?"""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def shard(student: Student, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Spread a student over all processes, layer by layer, in place; embedding, head and norm form one more group."""
    student.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = set(student.model._no_split_modules or ())
    for module in student.model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward))
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "answers")


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor with all processes' shares; a collective call if it lies in shares, else free."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def whole_weights(model: PreTrainedModel, *, keep: bool = True) -> dict[str, torch.Tensor] | None:
    """All weights by name on the CPU, tied ones as one tensor; None for a model that lies in no shares.

    Args: keep: False: only help the others to have them, and hold one tensor at a time.
    """
    weights = model.state_dict(keep_vars=True)
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return None
    whole: dict[int, torch.Tensor] = {}
    for weight in weights.values():
        if id(weight) not in whole:
            gathered = whole_tensor(weight)
            whole[id(weight)] = gathered.cpu() if keep else gathered.new_empty(0)
    return {name: whole[id(weight)] for name, weight in weights.items()}


def like_parameter(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, laid out as `parameter`; of another shape (a counter): as it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
