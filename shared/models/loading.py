"""`load_model`: a checkpoint folder or hub id -> a native transformers model, or a clear error.

config.json is read as data: `auto_map` is ignored and nothing in the checkpoint is executed. Every weight must be
found and every stored weight must be used; anything else is an error that lists names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, DataError, Unavailable
from ..sources import is_local
from .specs import family_of, resolve

_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md"]
_WEIGHT_FILES = ["*.safetensors"]
_MAX_CONFIG_BYTES = 2**20
_NOT_OURS = ("auto_map", "architectures", "model_type", "transformers_version")
"""Fields of a config.json that name code or another class."""


def local_folder(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """A checkpoint's folder: `path` itself if it exists, otherwise the hub's snapshot at `revision`.

    Args: weights: False: config and tokenizer are enough, and nothing else is downloaded.
    Raises: DataError: neither a folder nor a hub id. Unavailable: the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return student_of_run(folder)
    if is_local(str(path)):
        raise DataError(
            f"{path}: no such folder (seen from {Path.cwd()}); correct the path, or give a hub id (owner/name)"
        )
    patterns = [*_DESCRIPTION_FILES, *(_WEIGHT_FILES if weights else [])]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise DataError(f"{path}: no such folder, and not a hub id (owner/name); correct the path") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unavailable(f"{path}: no such folder, and the hub did not give it: {error}") from error


def student_of_run(folder: Path) -> Path:
    """The finished student of a run's folder; any other folder as it is.

    Raises: DataError: a run that is not finished; names its newest checkpoint.
    """
    if (folder / "config.json").exists():
        return folder
    if (folder / "student" / "config.json").is_file():
        return folder / "student"
    checkpoints = sorted((folder / "checkpoints").glob("step-*/config.json"))
    if checkpoints:
        raise DataError(
            f"{folder}: a run that is not finished: it has no student yet. Continue it with the same train-student "
            f"command, or give its newest checkpoint, {checkpoints[-1].parent}"
        )
    return folder


def snapshot_revision(folder: Path) -> str | None:
    """The commit of a hub snapshot, which is the name of its folder; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, as data.

    Raises: DataError: missing, too large or not a JSON object.
    """
    file = folder / "config.json"
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise DataError(f"{file}: larger than {_MAX_CONFIG_BYTES} bytes, not a model configuration")
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no config.json; give a checkpoint folder or a hub id") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(config).__name__}; fetch the checkpoint again")
    return config


def load_model(
    path: str | Path, *, dtype: "str | torch.dtype" = "float32", attn_implementation: str = "sdpa",
    revision: str | None = None, random_seed: int | None = None, device_map: Mapping[str, torch.device] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Open a checkpoint with tide's own class for its architecture, in evaluation mode.

    Args:
        path: folder or hub id.
        dtype: `float32`, `bfloat16` or `float16`, by name or as torch's.
        attn_implementation: `sdpa`, or `flex_attention` on CUDA. `eager` is refused: it adds a bool mask as 0 and 1.
        random_seed: weights for a folder that holds a config.json only; None: such a folder is an error.
        device_map: module name -> device that its weights are loaded to, "" for the whole model; None: the CPU.
    Raises: DataError: unknown architecture, missing or unexpected weights, damaged files. Unavailable: hub, or
        too little memory. ConfigError: another dtype or attention implementation.
    """
    dtype = str(dtype).removeprefix("torch.")
    for name, value, known in (
        ("dtype", dtype, ("float32", "bfloat16", "float16")),
        ("attn_implementation", attn_implementation, ("sdpa", "flex_attention")),
    ):
        if value not in known:
            raise ConfigError(f"{name} = {value!r}: expected one of {', '.join(known)}")
    logging.disable_progress_bar()  # "Loading weights" here, "Writing model shards" when the model is saved
    folder = local_folder(path, revision)
    raw = read_config(folder)
    config, model_class = native_class(raw, str(folder))
    if not list(folder.glob("*.safetensors")):
        if random_seed is None:
            raise DataError(f"{folder}: no *.safetensors weights (pickled weights are not read); fetch them")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            config._attn_implementation = attn_implementation
            return model_class(config).to(getattr(torch, dtype)).eval()
    try:
        model, info = model_class.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation,
            use_safetensors=True, output_loading_info=True, trust_remote_code=False, local_files_only=True,
            ignore_mismatched_sizes=True, device_map=None if device_map is None else dict(device_map),
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"{folder}: the weights do not fit into the device's memory: {error}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder}: the weights cannot be loaded ({error}); fetch the checkpoint again") from error
    _require_all_weights(info, folder)
    return model


def native_class(raw: Mapping[str, Any], where: str) -> tuple[PretrainedConfig, Any]:
    """The content of a config.json -> configuration and class of tide's own.

    Raises: DataError: unknown architecture, or a field that the class refuses.
    """
    family = family_of(raw, where)
    config_class, model_class = resolve(family.config_class), resolve(family.model_class)
    try:
        config = config_class.from_dict({name: value for name, value in raw.items() if name not in _NOT_OURS})
    except Exception as error:  # transformers raises whatever a field's type check raises
        raise DataError(f"{where}/config.json is not a valid configuration: {error}") from error
    return config, model_class


def _require_all_weights(info: dict[str, Any], folder: Path) -> None:
    """Raises: DataError: lists weights that are missing, unexpected or of another shape; transformers goes on."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(_weight_name(key) for key in info.get(f"{kind}_keys") or ())
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problems.append(f"{kind} weights: {shown}")
    if problems:
        raise DataError(
            f"{folder}: the checkpoint does not fit its config.json ({'; '.join(problems)}); fetch it again, or "
            "correct config.json"
        )


def _weight_name(key: Any) -> str:
    """A mismatched key comes as (name, shape in the file, shape in the model)."""
    if isinstance(key, str):
        return key
    name, *shapes = key
    return f"{name} ({' in the file, '.join(str(list(shape)) for shape in shapes)} by config.json)"
