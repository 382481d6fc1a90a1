"""`load_model`: a checkpoint folder or hub id -> a native transformers model, or a clear error.

config.json is read as data: `auto_map` is ignored and nothing in the checkpoint is executed. Every weight must be
found and every stored weight must be used; anything else is an error that lists names. Files are chosen and opened by
tide (weight_files.py), sizes compared with their headers before a model is built, and whatever transformers raises
while it reads what a stranger wrote becomes one message.
"""

import contextlib
import logging as log
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..addresses import finished_student
from ..devices import accelerators
from ..errors import ConfigError, DataError, TideError, Unavailable
from ..shown_text import one_line, some
from ..sources import is_local
from .config_fields import keep_notes, known_fields, require_computed
from .specs import family_of, resolve
from .weight_files import StoredWeights, open_weights, read_object, require_plain_checkpoint, weight_files

_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md"]
_WEIGHT_FILES = ["*.safetensors"]
_MAX_CONFIG_BYTES = 2**20
_SPARE_WEIGHTS = 2**20
"""Numbers that a config.json may ask for beyond twice what is stored: then the names of what is missing are told."""


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
    found = finished_student(folder)
    checkpoints = sorted((found / "checkpoints").glob("step-*/config.json"))
    if checkpoints and not (found / "config.json").exists():
        raise DataError(
            f"{folder}: a run that is not finished: it has no student yet. Continue it with the same train-student "
            f"command, or give its newest checkpoint, {checkpoints[-1].parent}"
        )
    return found


def snapshot_revision(folder: Path) -> str | None:
    """The commit of a hub snapshot, which is the name of its folder; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, as data.

    Raises: DataError: missing, too large or not a JSON object; the folder holds an adapter, or a pipe or device in a
        file's place.
    """
    if folder.is_dir():
        require_plain_checkpoint(folder)
    file = folder / "config.json"
    if not file.exists():
        raise DataError(f"{folder}: no config.json; give a checkpoint folder or a hub id")
    return read_object(file, max_bytes=_MAX_CONFIG_BYTES, what="a model configuration")


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
    if not accelerators():  # where deepspeed is installed, saving a model imports it, and it reports to stdout
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = local_folder(path, revision)
    raw = read_config(folder)
    config, model_class = native_class(raw, str(folder))
    if random_seed is not None and not weight_files(folder):
        _require_memory(config, model_class, folder)
        with _reading(folder), torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            config._attn_implementation = attn_implementation
            model = model_class(config).to(getattr(torch, dtype)).eval()
        keep_notes(raw, model.config)
        return model
    with open_weights(folder) as stored:
        _require_sizes(config, model_class, stored, folder)
        with _reading(folder):  # without a path: transformers looks for no file of its own, adapters included
            model, info = model_class.from_pretrained(
                None, config=config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation,
                state_dict=dict(stored.tensors), output_loading_info=True, trust_remote_code=False,
                local_files_only=True, ignore_mismatched_sizes=True,
                device_map=None if device_map is None else dict(device_map),
            )  # fmt: skip
    _require_all_weights(info, folder)
    _require_one_head(model, folder)
    model.config.name_or_path = str(folder)
    keep_notes(raw, model.config)
    _read_generation_config(model, folder)
    return model


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Whatever transformers raises over a stranger's files is one error that names them; it says nothing itself, for
    what it would report (weights that are missing or too many) tide refuses."""
    of_transformers = log.getLogger("transformers")
    before = of_transformers.level
    of_transformers.setLevel(log.ERROR)
    try:
        yield
    except TideError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Unavailable(f"{folder}: the weights do not fit into the device's memory: {error}") from error
    except Exception as error:
        raise DataError(
            f"{folder}: the weights cannot be loaded ({type(error).__name__}: {str(error)[:500]}); fetch the "
            "checkpoint again"
        ) from error
    finally:
        of_transformers.setLevel(before)


def _num_described(config: PretrainedConfig, model_class: Any, folder: Path) -> int:
    """Weights of the model that config.json describes, counted without storage."""
    with _reading(folder), torch.device("meta"):
        return sum(weight.numel() for weight in model_class(config).parameters())


def _require_sizes(config: PretrainedConfig, model_class: Any, stored: StoredWeights, folder: Path) -> None:
    """Compare config.json with the headers of the weights: nothing is built that is not there to be read.

    Raises: DataError: names the sizes that differ.
    """
    if config.num_hidden_layers > len(stored.shapes):
        raise DataError(
            f"{folder}/config.json: num_hidden_layers = {config.num_hidden_layers}, and the weights are "
            f"{len(stored.shapes)} tensors in all; correct config.json, or fetch the checkpoint again"
        )
    expected = (config.vocab_size, config.hidden_size)
    for name, shape in stored.shapes.items():
        if name.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight")) and shape != expected:
            raise DataError(
                f"{folder}/config.json: vocab_size = {config.vocab_size} and hidden_size = {config.hidden_size}, and "
                f"{one_line(name)} has the shape {list(shape)}; the checkpoint does not fit its "
                "config.json: correct it, or fetch the checkpoint again"
            )
    described = _num_described(config, model_class, folder)
    if described > 2 * stored.num_values + _SPARE_WEIGHTS:
        raise DataError(
            f"{folder}/config.json describes a model of {described:,} weights, and the files hold "
            f"{stored.num_values:,}; correct its sizes (intermediate_size, heads, experts), or fetch it again"
        )


def _require_memory(config: PretrainedConfig, model_class: Any, folder: Path) -> None:
    """Raises: DataError: a model without weights that is larger than this machine's memory."""
    described = _num_described(config, model_class, folder)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * described > memory:
        raise DataError(
            f"{folder}/config.json describes a model of {described:,} weights and there are none to read; random ones "
            f"would take {4 * described / 1e9:,.0f} GB of {memory / 1e9:,.0f}. Fetch the weights, or correct the file"
        )


def _require_one_head(model: PreTrainedModel, folder: Path) -> None:
    """Raises: DataError: config.json says that head and embedding are one, and the weights hold two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        raise DataError(
            f"{folder}/config.json: tie_word_embeddings = true, and the weights hold a head that differs from the "
            "embedding; set it to false if the head is meant, or remove the head from the weights"
        )


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Raises: DataError: generation_config.json is none."""
    file = folder / "generation_config.json"
    if not file.exists():
        return
    raw = read_object(file, max_bytes=_MAX_CONFIG_BYTES, what="a model configuration")
    try:
        model.generation_config = GenerationConfig.from_dict(raw)
    except Exception as error:  # transformers raises whatever a field's class raises
        raise DataError(
            f"{file}: is not valid ({type(error).__name__}: {str(error)[:300]}); remove the file, which tide does not "
            "need, or fetch it again"
        ) from error


def native_class(raw: Mapping[str, Any], where: str) -> tuple[PretrainedConfig, Any]:
    """The content of a config.json -> configuration and class of tide's own.

    Raises: DataError: unknown architecture, or a field that the class refuses.
    """
    family = family_of(raw, where)
    config_class, model_class = resolve(family.config_class), resolve(family.model_class)
    fields = known_fields(raw, config_class, where)
    with _reading(Path(where)):
        try:
            config = config_class.from_dict(fields)
        except Exception as error:  # transformers raises whatever a field's type check raises
            raise DataError(f"{where}/config.json is not a valid configuration: {str(error)[:500]}") from error
    require_computed(config, where)
    return config, model_class


def _require_all_weights(info: dict[str, Any], folder: Path) -> None:
    """Raises: DataError: lists weights that are missing, unexpected or of another shape; transformers goes on."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        # a mismatched key comes as (name, shape in the file, shape in the model)
        names = sorted(
            key if isinstance(key, str) else f"{key[0]} ({list(key[1])} in the file, {list(key[2])} by config.json)"
            for key in info.get(f"{kind}_keys") or ()
        )
        if names:
            problems.append(f"{kind} weights: {some(names)}")
    if problems:
        raise DataError(
            f"{folder}: the checkpoint does not fit its config.json ({'; '.join(problems)}); fetch it again, or "
            "correct config.json"
        )
