"""A student trained under DeepSpeed's ZeRO, stage 1 or 2, when the launcher asks for it.

`accelerate launch` with a configuration of type DEEPSPEED says so in the environment. Weights lie whole on every
process, AdamW's moments in shares, and at stage 2 gradients too. tide reads the environment itself, as it does for
FSDP2, and accelerate sees plain processes: what CPU tests run is what CUDA runs. DeepSpeed adds up the gradient, clips
and steps; precision, micro-batches, learning rates and checkpoints stay tide's own, so numbers agree with DDP's to
rounding.

`deepspeed` is an optional package, which nothing here imports before a `ZeroEngine` is made.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..shared.config import TrainConfig
from ..shared.errors import ConfigError, Unavailable
from .optimizers import build_optimizers
from .sharding import Share, says_yes
from .student import Student, StudentOutput

_RECIPE = "take recipes/accelerate/deepspeed.yaml"
_USE = "ACCELERATE_USE_DEEPSPEED"
_BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
"""Elements: 200 MB in float32. DeepSpeed's own 500 million suit 16-bit gradients, and are a buffer of 2 GB here."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PASSED_ON = (*_BUCKETS, "overlap_comm", "reduce_scatter")


@dataclass(frozen=True)
class Zero:
    """What the launcher asks of DeepSpeed: a stage, and how it talks (`zero_optimization` of a DeepSpeed file)."""

    stage: int
    communication: Mapping[str, Any] = field(default_factory=dict)


def zero_asked_for(train: TrainConfig) -> Zero | None:
    """What the launcher's environment says about DeepSpeed.

    Raises: ConfigError: something that tide does not do with it. Unavailable: the package is missing.
    """
    if not says_yes(_USE):
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    section = {} if file.lower() == "none" else _zero_section(Path(file))
    for device in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        asked = os.environ.get(f"ACCELERATE_DEEPSPEED_{device}", "none").lower()
        if asked != "none":
            raise ConfigError(
                f"{device.lower()} = {asked} in the launcher's configuration: tide keeps everything on the devices; "
                f"{_RECIPE}, or FSDP2 (recipes/accelerate/fsdp2.yaml), which divides the weights as well"
            )
    for setting, default, instead in (
        ("GRADIENT_CLIPPING", 0.0, "train.grad_clip"),
        ("GRADIENT_ACCUMULATION_STEPS", 1.0, "train.micro_batch_size"),
    ):
        asked = os.environ.get(f"ACCELERATE_{setting}", "none").lower()
        if asked not in ("none", "auto") and float(asked) != default:
            raise ConfigError(
                f"{setting.lower()} = {asked} in the launcher's configuration: tide does that itself; leave it out "
                f"there, and set {instead}"
            )
    stage = str(section.pop("stage", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in ("1", "2"):
        instead = (
            "ddp.yaml (DDP), which is the same" if stage == "0" else "fsdp2.yaml (FSDP2), which divides weights too"
        )
        raise ConfigError(
            f"zero_stage = {stage} in the launcher's configuration: tide does stages 1 and 2 of DeepSpeed; "
            f"take recipes/accelerate/{instead}"
        )
    if train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer={train.optimizer} under DeepSpeed, whose engine drives one optimiser, and it needs two: "
            "set train.optimizer=adamw, or launch with recipes/accelerate/fsdp2.yaml or ddp.yaml"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable(
            "the launcher asks for DeepSpeed, and the package deepspeed is not installed: "
            "pip install 'tide-distill[deepspeed]'; or launch with recipes/accelerate/fsdp2.yaml, which needs nothing"
        )
    return Zero(int(stage), section)


def _zero_section(file: Path) -> dict[str, Any]:
    """`zero_optimization` of a DeepSpeed configuration. Raises: ConfigError: it says more than tide passes on."""
    try:
        tree = json.loads(file.read_text())
        section = dict(tree.pop("zero_optimization", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"deepspeed_config_file = {file}: no DeepSpeed configuration in JSON ({error})") from error
    for name, value in tree.items():
        if name in ("fp16", "bf16") and isinstance(value, dict) and value.get("enabled", False) in (False, "auto"):
            continue
        if value != "auto":
            instead = "train.precision" if name in ("fp16", "bf16", "amp", "torch_autocast") else "tide's own settings"
            raise ConfigError(
                f"{name} in {file}: of a DeepSpeed configuration tide takes zero_optimization alone; leave it out, "
                f"and use {instead}"
            )
    section = {name: value for name, value in section.items() if value != "auto"}
    for name in section.keys() - {"stage", *_PASSED_ON}:
        raise ConfigError(
            f"zero_optimization.{name} in {file}: tide passes on stage, {', '.join(_PASSED_ON)}; leave it out"
        )
    return section


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Where accelerate sees the launcher's wish, it takes over precision and more, on accelerators only."""
    asked = os.environ.pop(_USE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USE] = asked


class ZeroEngine:
    """`engines.Engine` by DeepSpeed. Collective: all processes make it, and make the same calls."""

    def __init__(self, zero: Zero, student: Student, accelerator: Accelerator, train: TrainConfig) -> None:
        deepspeed = _deepspeed(accelerator.device)
        student.to(accelerator.device)
        (self._adamw,) = build_optimizers(student.model, train).values()
        self._outside = ZeroAdamW(self._adamw)  # before DeepSpeed puts its shares in the place of the parameters
        self.optimizers: dict[str, Optimizer] = {"adamw": self._outside}
        self._device, self._num_processes = accelerator.device, accelerator.num_processes
        self._engine, shares, *_ = deepspeed.initialize(
            model=_Autocast(student, accelerator),
            optimizer=self._adamw,
            mpu=_DataParallel(accelerator),
            config={
                "train_micro_batch_size_per_gpu": 1,  # never asked: gradients are sums here
                "gradient_accumulation_steps": 1,
                "gradient_clipping": train.grad_clip or 0.0,
                "zero_optimization": {**_BUCKETS, **zero.communication, "stage": zero.stage},
            },
        )
        self._outside.begin(shares)

    def forward(self, *arguments: Any) -> StudentOutput:
        """The student's, under tide's precision."""
        output, _ = self._engine(*arguments)
        return output

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the loss."""
        self._engine.backward(loss * self._num_processes)  # it averages, as DDP does

    def step(self) -> Tensor:
        """Clip and step; the gradient's norm before."""
        for inside, outside in zip(self._adamw.param_groups, self._outside.param_groups, strict=True):
            inside.update({name: value for name, value in outside.items() if name != "params"})
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._device)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the student."""
        self._engine.destroy()


class ZeroAdamW(Optimizer):
    """AdamW whose moments DeepSpeed holds in shares, from outside like a plain one on the student's own parameters."""

    def __init__(self, adamw: Optimizer) -> None:
        super().__init__([dict(group) for group in adamw.param_groups], adamw.defaults)
        self._adamw = adamw

    def begin(self, shares: Any) -> None:
        """Moments of zero, for DeepSpeed's optimiser around this one to find.

        It looks for them itself after the first step of the first group of parameters: when others have none yet.
        """
        for flat in self._flat():
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            self._adamw.state[flat] = {"step": torch.tensor(0.0), **moments}
        shares._lazy_init_hp_params_optimizer_state()

    def state_dict(self) -> dict[str, Any]:
        """A plain AdamW's, with a `Share` for every moment."""
        state: dict[int, dict[str, Any]] = {}
        numbers = _numbers(self)
        for group, flat in zip(self.param_groups, self._flat(), strict=True):
            step = self._adamw.state[flat]["step"]
            for parameter in group["params"]:
                moments = {name: _Moment(parameter, name) for name in _MOMENTS}
                state[numbers[parameter]] = {"step": step.clone(), **moments}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take one's own shares of whole tensors, the same on every process."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        state = state_dict["state"]
        if not state:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        (step,) = {float(fields["step"]) for fields in state.values()}
        for flat in self._flat():
            self._adamw.state[flat]["step"].fill_(step)
        parameters = {number: parameter for parameter, number in _numbers(self).items()}
        for number, fields in state.items():
            for name in _MOMENTS:
                safe_set_full_optimizer_state(parameters[number], fields[name], name)

    def _flat(self) -> list[Tensor]:
        """This process's share of each group: one tensor."""
        return [group["params"][0] for group in self._adamw.param_groups]


class _Moment(Share):
    def __init__(self, parameter: Tensor, name: str) -> None:
        self._parameter, self._name = parameter, name

    def full_tensor(self) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        whole = safe_get_full_optimizer_state(self._parameter, self._name)
        assert whole is not None
        return whole


class _Autocast(nn.Module):
    """The student under accelerate's autocast, which DeepSpeed's engine would switch off if it were outside."""

    def __init__(self, student: Student, accelerator: Accelerator) -> None:
        super().__init__()
        self.student = student
        self._autocast = accelerator.autocast

    def forward(self, *arguments: Any) -> tuple[StudentOutput, list[Tensor]]:
        """Also every tensor of the output in a list: DeepSpeed looks for them to notice when backward begins."""
        with self._autocast():
            output = self.student(*arguments)
        return output, [value for value in vars(output.targets).values() if isinstance(value, Tensor)]


class _DataParallel:
    """DeepSpeed's `mpu`: all processes are one group, the one with train.collective_timeout_s; its own have none."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes

    def get_data_parallel_group(self) -> Any:
        """The group that accelerate made."""
        return torch.distributed.group.WORLD

    def get_data_parallel_rank(self) -> int:
        """Of this process."""
        return self._rank

    def get_data_parallel_world_size(self) -> int:
        """All."""
        return self._num_ranks

    def get_model_parallel_group(self) -> None:
        """None: no model is divided this way."""

    def get_model_parallel_rank(self) -> int:
        """Of one."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1


def _numbers(optimizer: Optimizer) -> dict[Tensor, int]:
    """The number of each parameter in a state_dict."""
    return {p: n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


def _deepspeed(device: torch.device) -> Any:
    """The package, on the device that accelerate chose, quiet, and off stdout."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    if device.type == "cpu":  # else it compiles an all-reduce of its own, for minutes, where it finds a compiler
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning)
    return deepspeed
