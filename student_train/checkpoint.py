"""Checkpoints: written to a temporary folder, fsynced, renamed; nothing is pickled.

At every instant, also in the middle of a save, the newest finished checkpoint is whole on the disk.

    <out>/checkpoints/step-00000500/   model.safetensors, config.json ...   a plain transformers folder
                                       optimizer-<name>.safetensors, .json  tensors, and everything else
                                       tide_state.json                      written last: step, settings, hashes
    <out>/student/                     the finished student: transformers folder, tokenizer, card, tide_state.json

With the configuration and the cache this is the whole state of a run, and it knows nothing of processes: tensors are
whole, whoever held which share of them (sharding.py). The newest few are kept, and a damaged newest one falls back to
the one before it with a warning. A folder whose settings are not those asked for is refused by name.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.cache import own_entries
from ..shared.cache.files import fsync_folder, output_errors, read_json, readable_json, sha256_file
from ..shared.cache.trained_from import TRAINED_FROM_NAME
from ..shared.errors import CacheMismatch, ConfigError, DataError, OutputError
from ..shared.tokenizer_setup import save_tokenizer
from .metrics import ADVICE
from .sharding import like_parameter, whole_tensor, whole_weights

STATE_NAME = "tide_state.json"
_MAX_STATE_BYTES = 64 << 20
_ASIDE = ".tide-replaced"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run continues: after `step` steps, with the metrics totals of an unfinished window."""

    folder: Path
    step: int
    identity: Mapping[str, Any]
    window: Mapping[str, Sequence[float]]

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raises: CacheMismatch: another run wrote this; every setting that differs is named."""
        asked = json.loads(json.dumps(dict(identity)))
        names = sorted(self.identity.keys() | asked.keys())
        different = [n for n in names if self.identity.get(n) != asked.get(n)]
        if different:
            shown = "; ".join(f"{n}: then {self.identity.get(n)!r}, now {asked.get(n)!r}" for n in different)
            raise CacheMismatch(
                f"{self.folder} belongs to a run with other settings ({shown}). Use them to continue it, give another "
                "--out, or begin anew there with --resume never"
            )


def save_checkpoint(
    root: Path, step: int, model: PreTrainedModel, optimizers: Mapping[str, Optimizer], *,
    identity: Mapping[str, Any], window: Mapping[str, Sequence[float]], keep: int,
    doubtful: Collection[Path] = (), is_main: bool = True,
) -> Path:  # fmt: skip
    """Write `root/step-XXXXXXXX`; delete all but the newest `keep`, and later ones, which this run has overtaken.

    Every process of a run calls this, because the main one, which writes, may hold only a share of each tensor.

    Args:
        optimizers: by name; state and hyperparameters are stored.
        identity: settings that must be equal for a run to continue from here.
        window: totals of metrics that are not written yet.
        doubtful: folders that must not count as one of the kept: damaged ones that the run did not begin from.
    Raises: OutputError: disk full, permission denied; older checkpoints stay as they are.
    """
    folder = root / f"step-{step:08d}"
    if not is_main:
        _take_part(model, optimizers)
        return folder
    with replacing(folder) as temporary:
        model.save_pretrained(temporary, state_dict=whole_weights(model))
        for name, optimizer in optimizers.items():
            tensors, settings = _flatten(optimizer)
            save_file(tensors, temporary / f"optimizer-{name}.safetensors")
            (temporary / f"optimizer-{name}.json").write_bytes(readable_json(settings))
        _write_state(temporary, step, identity, window)
    numbered = saved_checkpoints(root)
    gone = [path for number, path in numbered if number > step or (number < step and path in doubtful)]
    for old in [*gone, *[path for number, path in numbered if number <= step and path not in gone][:-keep]]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _take_part(model: PreTrainedModel, optimizers: Mapping[str, Optimizer]) -> None:
    """Give the main process what it lacks, in the order in which it writes."""
    whole_weights(model, keep=False)
    for optimizer in optimizers.values():
        _flatten(optimizer, keep=False)


def find_checkpoint(root: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint below `root`, or None.

    Raises: CacheMismatch: it belongs to a run with other settings. OutputError: it cannot be read.
    """
    _restore_replaced(root)
    for _, folder in reversed(saved_checkpoints(root)):
        try:
            checkpoint = _read_state(folder, "using the checkpoint before it")
        except DataError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        checkpoint.require(identity)
        return checkpoint
    return None


def open_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """One particular checkpoint.

    Raises: ConfigError: `folder` is none. DataError: it is damaged. CacheMismatch: it belongs to a run with other
        settings.
    """
    if not (folder / STATE_NAME).is_file():
        raise ConfigError(f"{folder} is no checkpoint; give a folder such as run/checkpoints/step-00000500")
    checkpoint = _read_state(folder, "resume from another checkpoint")
    checkpoint.require(identity)
    return checkpoint


def saved_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints below `root`, oldest first."""
    named = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in root.glob("step-*") if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in named if match)


def load_optimizers(folder: Path, optimizers: Mapping[str, Optimizer]) -> None:
    """Restore what `save_checkpoint` stored, each process its own share."""
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = load_file(folder / f"optimizer-{name}.safetensors")
        settings = json.loads((folder / f"optimizer-{name}.json").read_text())
        state: dict[int, dict[str, Any]] = {int(key): dict(values) for key, values in settings["scalars"].items()}
        for key, tensor in tensors.items():
            parameter, _, field = key.partition(".")
            state.setdefault(int(parameter), {})[field] = like_parameter(tensor, parameters[int(parameter)])
        groups = [
            {**group, **{k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}}
            for group, saved in zip(optimizer.state_dict()["param_groups"], settings["groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_student(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str, *,
    step: int, identity: Mapping[str, Any], origin: bytes = b"", is_main: bool = True,
) -> None:  # fmt: skip
    """Write the finished student: a plain transformers folder with its tokenizer and card; replaced as a whole.

    Args: origin: content of `tide_cache.json`, which tells what it was trained from.

    Every process of a run calls this, and the main one writes.
    Raises: OutputError: disk full, permission denied; what was there before stays.
    """
    if not is_main:
        _take_part(model, {})
        return
    with replacing(folder) as temporary:
        model.save_pretrained(temporary, state_dict=whole_weights(model))
        save_tokenizer(tokenizer, temporary)
        (temporary / "README.md").write_text(card)
        if origin:
            (temporary / TRAINED_FROM_NAME).write_bytes(origin)
        _write_state(temporary, step, identity, {})


def find_student(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The finished student of this very run, or None.

    Raises: CacheMismatch: another run's. OutputError: the folder was not written by a training run: it is not touched.
    """
    _restore_replaced(folder.parent)
    if not folder.exists():
        return None
    if not (folder / STATE_NAME).exists():
        raise OutputError(
            f"{folder} exists and was not written by tide train-student; it would be replaced. Give another --out"
        )
    try:
        finished = _read_state(folder, "it will be written again")
    except DataError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    finished.require(identity)
    return finished


def read_student(folder: Path) -> Checkpoint:
    """A finished student, whoever asks. Raises: DataError: `folder` holds none, or a damaged one."""
    if not (folder / STATE_NAME).is_file():
        raise DataError(f"{folder}: no student that tide train-student finished; give its folder, RUN/student")
    return _read_state(folder, "train it again, or fetch it again")


def remove_run(out: Path) -> None:
    """Delete what an earlier run left below `out`, and nothing else. Raises: OutputError."""
    with output_errors(out, ADVICE):
        own_entries.require_own_folders(out, "student", "checkpoints")
        if (out / "student" / STATE_NAME).exists():
            own_entries.remove_tree(out, "student")
    remove_checkpoints(out)


def remove_checkpoints(out: Path) -> None:
    """Delete the checkpoints of the run in `out`. Raises: OutputError."""
    with output_errors(out, ADVICE):
        for _, folder in saved_checkpoints(out / "checkpoints"):
            own_entries.remove_tree(out, f"checkpoints/{folder.name}")
        with contextlib.suppress(OSError):  # it is not there, or holds something else
            (out / "checkpoints").rmdir()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` once the block has filled it; after an error it is gone.

    A folder that has the name already steps aside under another one first, and is deleted last: a process that is
    killed in between leaves it whole, for `_restore_replaced`.
    """
    with output_errors(folder, ADVICE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _restore_replaced(folder.parent)
        temporary, aside = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}{_ASIDE}")
        for left_over in {temporary, *folder.parent.glob(".step-*.tmp")}:  # of a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                if path.suffix == ".safetensors":  # written for their owner alone: the rights that the umask gives
                    path.chmod(mode)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            fsync_folder(temporary)
            if folder.exists():
                os.replace(folder, aside)
            os.replace(temporary, folder)
        except SafetensorError as error:  # its own kind for a full disk: turned into the OSError it is
            code = re.search(r"os error (\d+)|code: (\d+)", str(error))
            number = int(code.group(1) or code.group(2)) if code else errno.EIO
            raise OSError(number, os.strerror(number) if code else str(error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _restore_replaced(folder.parent)
        fsync_folder(folder.parent)


def _restore_replaced(root: Path) -> None:
    """Folders that stepped aside for a new one: back if it never came, else deleted."""
    for aside in root.glob(f".*{_ASIDE}"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, folder)


def _write_state(folder: Path, step: int, identity: Mapping[str, Any], window: Mapping[str, Sequence[float]]) -> None:
    """tide_state.json, with size and hash of every other file."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")
    }  # fmt: skip
    state = {"step": step, "identity": dict(identity), "window": dict(window), "files": files}
    (folder / STATE_NAME).write_bytes(readable_json(state))


def _read_state(folder: Path, cure: str) -> Checkpoint:
    """Raises: DataError: something is missing or its hash is wrong; `cure`. OutputError: it cannot be read."""
    try:
        state = read_json(folder / STATE_NAME, max_bytes=_MAX_STATE_BYTES)
        for name, entry in state["files"].items():
            if not (folder / name).is_file():
                raise DataError(f"{name} is missing")
            if sha256_file(folder / name) != entry["sha256"]:
                raise DataError(f"{name} is not the file that was written")
        return Checkpoint(folder, int(state["step"]), dict(state["identity"]), dict(state["window"]))
    except (DataError, FileNotFoundError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, DataError) else f"{STATE_NAME}: {type(error).__name__}: {error}"
        raise DataError(f"{folder} is damaged ({what}); {cure}") from error


def _flatten(optimizer: Optimizer, *, keep: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole tensors by `parameter.field`, and everything else as JSON; `keep=False`: only help others to have them."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for parameter, fields in state["state"].items():
        for field, value in fields.items():
            if isinstance(value, torch.Tensor):
                whole = whole_tensor(value)
                if keep:
                    tensors[f"{parameter}.{field}"] = whole.cpu().contiguous()
            else:
                scalars.setdefault(str(parameter), {})[field] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}
