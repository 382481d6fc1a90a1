"""The processes of one training: how they find each other, decide once for all, and how long they wait.

torchrun, `accelerate launch`, or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT starts
them; one process alone needs none of that. What a process could see differently from another (which checkpoint is the
newest whole one, was a signal received) is decided by the main one and told, or added up.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed import DistNetworkError, DistStoreError

from ..shared.config import TrainConfig
from ..shared.devices import group_size, process_device, rank, require_shareable
from ..shared.errors import ConfigError, TideError, TryAgain
from .metrics import require_trackers
from .sharding import says_yes, sharding_asked_for

T = TypeVar("T")


def join_processes(train: TrainConfig, out: Path) -> Accelerator:
    """Join the other processes of this run, if there are any, each on the device that `train.device` gives it.

    Raises: TryAgain: not all came within `train.collective_timeout_s`. ConfigError: see `sharding_asked_for`,
        `own_device`, `join`. Unavailable: a tracker is missing.
    """
    device = own_device(train.device, "train.device")
    require_trackers(train.report_to)
    sharding_asked_for()  # refuse before accelerate looks for packages that the refusal is about
    limit = timedelta(seconds=train.collective_timeout_s)
    try:
        join(device, timeout=limit)
        return Accelerator(
            cpu=device.type == "cpu", mixed_precision="bf16" if train.precision == "bf16" else "no",
            log_with=list(train.report_to) or None, project_dir=str(out),
        )  # fmt: skip
    except RuntimeError as error:  # gloo's own error has no kind of its own
        if not isinstance(error, DistStoreError | DistNetworkError) and "connect" not in str(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise TryAgain(
            f"rank {rank()}: the {group_size()} processes of this run did not all meet at {place} within "
            f"train.collective_timeout_s = {train.collective_timeout_s:g} s ({error}). "
            "Did each start, with the same MASTER_ADDR and MASTER_PORT, and can it reach that machine?"
        ) from error


def own_device(wanted: str, setting: str) -> torch.device:
    """The device of this process, among those that a launcher started.

    Raises: ConfigError: see `process_device` and `require_shareable`; the launcher was told otherwise; processes that
        have no way to exchange anything.
    """
    require_shareable(wanted, setting, group_size())
    if says_yes("ACCELERATE_USE_CPU"):
        if wanted not in ("auto", "cpu"):
            raise ConfigError(
                f"{setting} = {wanted!r}, and accelerate was told to use the CPU (--cpu, or use_cpu in its "
                "configuration): change one of the two"
            )
        wanted = "cpu"
    device = process_device(wanted, setting)
    if device.type == "mps" and group_size() > 1:
        raise ConfigError(
            f"{setting} = {wanted!r}: {group_size()} processes cannot exchange tensors on mps; start one process, or "
            f"set {setting}=cpu"
        )
    return device


def join(device: torch.device, **group: Any) -> PartialState:
    """accelerate's state of this process, for work on `device`; the first call joins the other processes.

    accelerate keeps the device that it chose for the whole process, and its own choice knows neither numbers nor a CPU
    beside an accelerator.

    Args: group: for torch.distributed.init_process_group, if this call makes a group.
    Raises: ConfigError: the processes have met already, for another device.
    """
    known: Any = PartialState._shared_state
    if not known or known["distributed_type"] == DistributedType.NO or not torch.distributed.is_initialized():
        known.clear()  # of one process alone, the device is all that it holds
        # without cpu=True, it overlooks the other processes of torchrun on a machine without accelerators
        PartialState(cpu=device.type == "cpu", **group)
    state: Any = PartialState()
    if state.distributed_type == DistributedType.NO:
        state.device = device
    elif state.device.type != device.type or (device.index or 0) != (state.device.index or 0):
        raise ConfigError(
            f"this process exchanges tensors on {state.device}, and {device} is asked for: start it anew for another "
            "device; under a launcher name no number, and choose devices with CUDA_VISIBLE_DEVICES"
        )
    return state


def on_main(accelerator: Accelerator | PartialState, decide: Callable[[], T]) -> T:
    """What the main process finds, or the TideError that it meets, on every process. Collective."""
    if accelerator.num_processes == 1:
        return decide()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [decide(), None]
        except TideError as error:
            answer = [None, error]
    result, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return result


def on_every_process(num_processes: int, act: Callable[[], T]) -> T:
    """Do it on each process; the TideError that one of them meets is raised by all: none waits for it. Collective."""
    if num_processes == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except TideError as met:
        error = met
    first = next((met for met in gather_object([error]) if met is not None), None)
    if first is not None:
        raise first
    return cast(T, result)


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Is `flag` set anywhere? Signals do not reach all processes between the same two steps. Collective."""
    if accelerator.num_processes == 1:
        return flag
    count: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(count > 0)


@contextlib.contextmanager
def own_accelerator_state() -> Iterator[None]:
    """accelerate keeps one state per process, and refuses a second training with another precision in it.

    While a run lasts it has a state of its own; afterwards the caller's is back, its device too. Process groups
    (`PartialState`) are shared.
    """
    state: Any = AcceleratorState._shared_state
    devices: Any = PartialState._shared_state
    saved, saved_devices = dict(state), dict(devices)
    state.clear()
    try:
        yield
    finally:
        state.clear()
        state.update(saved)
        if saved_devices and not torch.distributed.is_initialized():
            devices.clear()
            devices.update(saved_devices)
