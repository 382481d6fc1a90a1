"""The devices of this machine, asked for in one place.

`train.device`, `teacher.device` and `decoding.device` -> the devices that this process gets. PyPI's torch is a CUDA
build on every Linux machine and names `cuda` as its accelerator where there is none: whether one is usable right now is
another question, and the only one that counts. `CUDA_VISIBLE_DEVICES` decides which ones torch sees, and their numbers.
"""

import os

import torch

from .errors import ConfigError

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
CPU = torch.device("cpu")


def accelerators() -> list[torch.device]:
    """Every accelerator that can be used now, in order; [] on a machine that has the CPU alone."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return []
    return [torch.device(kind.type, number) for number in range(torch.accelerator.device_count())]


def rank() -> int:
    """This process's number in its job, whatever started it; 0 where nothing says otherwise."""
    return _number(RANKS)


def group_size() -> int:
    """Processes that torchrun or accelerate started together; 1: this one is alone."""
    return max(1, _number(("WORLD_SIZE",)))


def speaks(*, on_machine: bool = False) -> bool:
    """Does this process speak for those that torchrun or accelerate started with it? Alone, it does.

    Args: on_machine: for those of this machine.
    """
    return _number(("LOCAL_RANK" if on_machine else "RANK",)) == 0


def local_rank() -> int:
    """This process's number on its machine; 0 where nothing says otherwise."""
    return _number(LOCAL_RANKS)


def _number(variables: tuple[str, ...]) -> int:
    """The first of these variables of the environment that holds a number; 0: none does."""
    return int(next((os.environ[name] for name in variables if os.environ.get(name, "").isdigit()), "0"))


def process_devices(wanted: str, setting: str, *, count: int = 1) -> list[torch.device]:
    """The devices that this process computes on.

    Args:
        wanted: `auto`: accelerators by the process's number on its machine, or the CPU; `cpu`; a kind (`cuda`, `mps`):
            the same among these alone; a kind with a number (`cuda:1`): this one.
        setting: its name, for messages.
        count: accelerators that the process needs; the CPU is one.
    Raises: ConfigError: what is asked for is not here, or not so often; it has a number, and other processes of this
        machine would ask for the same.
    """
    there = accelerators()
    if wanted == "cpu" or (wanted == "auto" and not there and count == 1):
        if count > 1:
            raise ConfigError(f"{setting} = 'cpu': {count} devices are asked for, and the CPU is one; ask for 1")
        return [CPU]
    kind, _, number = wanted.partition(":")
    usable = [device for device in there if kind in ("auto", device.type)]
    if number and not any(device.index == int(number) for device in usable):
        usable = []
    if not usable:
        here = ", ".join(["cpu", *map(str, there)])
        raise ConfigError(
            f"{setting} = {wanted!r}: this machine has {here}{_why_not(kind)}. Ask for one of these, or for "
            "auto, which takes an accelerator where there is one"
        )
    if number:
        if count > 1:
            raise ConfigError(f"{setting} = {wanted!r} names one device, and {count} are asked for; ask for {kind!r}")
        require_shareable(wanted, setting, max(local_rank() + 1, _number(LOCAL_SIZES)))
        return [torch.device(kind, int(number))]
    if count > len(usable):
        raise ConfigError(
            f"{setting} = {wanted!r}: {count} devices are asked for, and this machine has {len(usable)} of that kind; "
            "give fewer, or use a machine with more"
        )
    first = local_rank() % (len(usable) // count) * count
    return usable[first : first + count]


def process_device(wanted: str, setting: str) -> torch.device:
    """The one device that this process computes on. Raises: see `process_devices`."""
    return process_devices(wanted, setting)[0]


def require_shareable(wanted: str, setting: str, num_processes: int) -> None:
    """Raises: ConfigError: one device by its number, for several processes."""
    if num_processes > 1 and ":" in wanted:
        raise ConfigError(
            f"{setting} = {wanted!r} names one device, and {num_processes} processes would share it; ask for "
            f"{wanted.partition(':')[0]!r}, and choose devices with CUDA_VISIBLE_DEVICES"
        )


def _why_not(kind: str) -> str:
    """What hides devices of a kind, as far as that is known."""
    if kind == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f" (CUDA_VISIBLE_DEVICES = {os.environ['CUDA_VISIBLE_DEVICES']!r} decides which GPUs torch sees)"
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f" (torch {torch.__version__} is built without CUDA)"
    return ""
