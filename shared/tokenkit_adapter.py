"""Optional: chunks by tokenkit, the alignment library the paper's code uses, to compare with tide's own.

github.com/bminixhofer/tokenkit (arXiv 2503.20083) is not on PyPI; the `tokenkit` there is an unrelated package. tide
needs neither: `align_chunks` finds the chunks from the bytes alone.
"""

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import Unavailable
from .token_bytes import byte_level_alphabet

REPOSITORY = "https://github.com/bminixhofer/tokenkit"


def align_chunks_with_tokenkit(
    teacher: Sequence[bytes], student: Sequence[bytes], teacher_tokenizer: Any, student_tokenizer: Any
) -> np.ndarray:
    """Chunks as `align_chunks` returns them, found by tokenkit.

    Args:
        teacher, student: bytes of the tokens of one text.
        teacher_tokenizer, student_tokenizer: from `tokenkit.byteify.load_byteify_tokenizer("PATH:source=Qwen3")`; their
            model kinds say which special tokens correspond to each other.
    Returns: int32 [c, 4]: teacher start, end, student start, end.
    Raises: Unavailable: tokenkit is not installed, or another package of that name is.
    """
    align = _load_align()
    letters = {byte: chr(point) for point, byte in byte_level_alphabet().items()}
    spelt = [["".join(letters[byte] for byte in token) for token in side] for side in (teacher, student)]
    chunks = align.get_alignment_indices(*spelt, teacher_tokenizer, student_tokenizer)[0]
    return np.array(chunks, dtype=np.int32).reshape(-1, 4)


def _load_align() -> Any:
    try:
        return importlib.import_module("tokenkit.align")
    except ModuleNotFoundError as error:
        if error.name not in ("tokenkit", "tokenkit.align"):
            raise Unavailable(f"tokenkit needs the package {error.name!r}, which is not installed") from error
        other = _installed_namesake()
        found = f"the installed package tokenkit {other} is not it" if other else "it is not installed"
        raise Unavailable(
            f"tokenkit's alignment was asked for, and {found}: PyPI's tokenkit counts tokens and only shares the name. "
            f"tide needs no tokenkit, tide.shared.chunks.align_chunks does the same; to compare, install {REPOSITORY}"
        ) from error


def _installed_namesake() -> str | None:
    try:
        return importlib.metadata.version("tokenkit")
    except importlib.metadata.PackageNotFoundError:
        return None
