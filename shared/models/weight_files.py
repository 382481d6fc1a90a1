"""Which files are a checkpoint's weights, and what their headers say, before a single number is read.

Folder -> the safetensors files that count: `model.safetensors`, or those that its weight map names; all of them below
the folder, each tensor once. Adapters, pickles and files elsewhere are no weights.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import DataError
from ..regular_files import open_regular, read_regular, require_regular
from ..shown_text import one_line, some

WEIGHTS_NAME, MAP_NAME = "model.safetensors", "model.safetensors.index.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MAX_MAP_BYTES = 64 << 20
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredWeights:
    """Tensors that lie open in their files; a value is read when it is indexed."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Any]
    """Name -> slice of safetensors."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_values(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def require_plain_checkpoint(folder: Path) -> None:
    """Refuse what would change a model beside its weights, and what is no file.

    Raises: DataError: an adapter (LoRA and the like), or a pipe, device or socket in a file's place.
    """
    require_regular(folder.iterdir())
    require_regular((folder / "additional_chat_templates").glob("*"))
    adapter = next((name for name in _ADAPTERS if (folder / name).exists()), None)
    if adapter is not None:
        raise DataError(
            f"{folder}: holds an adapter ({adapter}), which would change the model where the package peft is "
            "installed and do nothing where it is not; tide reads whole weights alone. Merge it first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), and the "
            "tokenizer's files beside it), or move the adapter's files out to use the weights without it"
        )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a checkpoint's weights, sorted by name; () where there are none.

    Raises: DataError: a weight map that cannot be meant, a link that leads out of the folder, two sets of weights.
    """
    single, index = folder / WEIGHTS_NAME, folder / MAP_NAME
    named = _read_map(index) if index.exists() or index.is_symlink() else {}
    if single.exists() or single.is_symlink():
        others = sorted({name for name in named.values() if name != WEIGHTS_NAME and (folder / name).exists()})
        if others:
            raise DataError(
                f"{folder}: holds two sets of weights, {WEIGHTS_NAME} and those of {MAP_NAME} ({some(others)}); "
                "remove the ones that are not meant"
            )
        return (_inside(folder, WEIGHTS_NAME),)
    if named:
        return tuple(_inside(folder, name) for name in sorted(set(named.values())))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise DataError(
            f"{folder}: {some(found)} is neither {WEIGHTS_NAME} nor named by a {MAP_NAME}, so tide does not read it; "
            f"name the file {WEIGHTS_NAME}, or fetch the weight map"
        )
    return ()


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[StoredWeights]:
    """The weights of a checkpoint with their headers read, opened once; closed afterwards.

    Raises: DataError: no weights, a damaged header, files and weight map that contradict each other, numbers that are
        not floating-point (a quantized checkpoint). And as `weight_files`.
    """
    files = weight_files(folder)
    if not files:
        raise DataError(f"{folder}: no *.safetensors weights (pickled weights are not read); fetch them")
    named = _read_map(folder / MAP_NAME) if files[0].name != WEIGHTS_NAME or len(files) > 1 else {}
    tensors: dict[str, Any] = {}
    where: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for path in files:
            with _damaged(folder), open_regular(path):
                opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name in tensors:
                        raise DataError(
                            f"{folder}: {one_line(name)} is stored twice, in {where[name]} and {path.name}; fetch the "
                            "checkpoint again"
                        )
                    tensors[name], where[name] = opened.get_slice(name), path.name
        wrong = sorted(name for name in named.keys() | where.keys() if named and named.get(name) != where.get(name))
        if wrong:
            raise DataError(
                f"{folder}/{MAP_NAME}: says of {some(wrong)} another file than the one that holds it (or one of the "
                "two lacks it); fetch the checkpoint again"
            )
        odd = sorted({str(tensor.get_dtype()) for tensor in tensors.values()} - set(_DTYPES))
        if odd:
            raise DataError(
                f"{folder}: weights stored as {some(odd)}: expected floating-point numbers ({', '.join(_DTYPES)}). A "
                "quantized checkpoint is not read; use the one it was made from"
            )
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
        yield StoredWeights(files, tensors, shapes)


@contextlib.contextmanager
def _damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder}: the weights cannot be loaded ({error}); fetch the checkpoint again") from error


def _read_map(path: Path) -> dict[str, str]:
    """Tensor -> file name. Raises: DataError: not a weight map."""
    tree = read_object(path, max_bytes=_MAX_MAP_BYTES, what="a weight map")
    named = tree.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise DataError(f"{path}: weight_map: expected names of tensors with their file's; fetch the checkpoint again")
    for name in sorted(set(named.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise DataError(
                f"{path}: weight_map names the file {one_line(name)}: expected the plain name of a *.safetensors "
                "file in the same folder; refused"
            )
    return named


def read_object(file: Path, *, max_bytes: int, what: str) -> dict[str, Any]:
    """A JSON object of a checkpoint; `what` names it in messages. Raises: DataError: too large, or none."""
    try:
        data = read_regular(file, max_bytes=max_bytes)
        if len(data) > max_bytes:
            raise DataError(f"{file}: larger than {max_bytes:,} bytes, not {what}; fetch the checkpoint again")
        tree = json.loads(data, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(tree, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(tree).__name__}; fetch the checkpoint again")
    return tree


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _inside(folder: Path, name: str) -> Path:
    """A weight file below its folder; a snapshot of the Hub may link into the `blobs` beside its `snapshots`."""
    path, base = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; fetch the checkpoint again") from error
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a name no file can have
        raise DataError(f"{one_line(str(path))}: cannot be followed ({error}); fetch the checkpoint again") from error
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise DataError(
            f"{path}: is a link that leads out of the folder, to weights that may change behind it; copy the file "
            "here, or give the folder that it lies in"
        )
    require_regular([path])
    if not real.is_file():
        raise DataError(f"{path}: is no file; fetch the checkpoint again")
    return path
