"""`data.alignment=tokenkit`: chunks found by tokenkit, the alignment library that the paper's code uses.

Bytes of both sides' tokens of one text -> chunks, or the reason why the installed package cannot be asked. tide never
needs it: `align_chunks` finds the same from the bytes alone. github.com/bminixhofer/tokenkit (arXiv 2503.20083) is not
on PyPI, the `tokenkit` there is an unrelated package. The real one keeps its version number from commit to commit, so a
plan pins the bytes of its `align.py`.
"""

import hashlib
import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .chunks import align_chunks
from .errors import Unavailable
from .token_bytes import byte_level_alphabet
from .tokens import Dropped

REPOSITORY = "https://github.com/bminixhofer/tokenkit"
INSTALL = f"pip install --no-deps git+{REPOSITORY}"

_NO_TEMPLATE = SimpleNamespace(model_kind_cls=SimpleNamespace(replacements={}))
"""To tokenkit, a tokenizer without special tokens that it could take for another's: answers are aligned, no templates.
Its model kinds would also treat the words "user" and "assistant" of an answer as such tokens."""
_LETTERS = {byte: chr(point) for point, byte in byte_level_alphabet().items()}
_TRIAL = ([b"The", b" answer", b" is", b" 4", b"2"], [b"The", b" ans", b"wer is", b" ", b"42"])


def align_chunks_with_tokenkit(
    teacher: Sequence[bytes], student: Sequence[bytes], teacher_tokenizer: Any = _NO_TEMPLATE,
    student_tokenizer: Any = _NO_TEMPLATE,
) -> np.ndarray:  # fmt: skip
    """Chunks as `align_chunks` returns them, found by tokenkit.

    tokenkit compares lengths and knows no token without bytes: such tokens are not shown to it, and join the chunk
    before. What it answers is checked against the bytes.

    Args:
        teacher, student: bytes of the tokens of one text; either side may end early.
        teacher_tokenizer, student_tokenizer: from `tokenkit.byteify.load_byteify_tokenizer("PATH:source=Qwen3")`, whose
            model kinds say which special tokens correspond to each other; by default none do.
    Returns: int32 [c, 4]: teacher start, end, student start, end.
    Raises: Unavailable: tokenkit is not installed, or another package of that name is. Dropped: it fails on these
        tokens, or pairs what are not the same bytes.
    """
    align, sides = _load_align(), (teacher, student)
    shown = [[i for i, token in enumerate(side) if token] for side in sides]
    if not all(shown):
        return np.zeros((0, 4), np.int32)
    spelt = [["".join(_LETTERS[byte] for byte in side[i]) for i in of] for side, of in zip(sides, shown, strict=True)]
    try:
        found = align.get_alignment_indices(*spelt, teacher_tokenizer, student_tokenizer)[0]
        chunks = np.array(found, dtype=np.int32).reshape(-1, 4)
    except Exception as error:  # somebody else's code, whose own check of the bytes is an assertion
        raise Dropped("tokenkit cannot align the answer") from error
    places = []
    for side, of, spans in zip(sides, shown, (chunks[:, :2], chunks[:, 2:]), strict=True):
        ascending = (np.diff(spans.ravel()) >= 0).all() and (spans[:, 0] < spans[:, 1]).all()
        if not ascending or spans.min(initial=0) < 0 or spans.max(initial=0) > len(of):
            raise Dropped("tokenkit pairs tokens out of order")
        spans[:] = np.array([0, *of[1:], len(side)])[spans]
        places.append(np.cumsum([0, *map(len, side)])[spans])
    texts = [b"".join(side)[: of[-1, 1] if len(of) else 0] for side, of in zip(sides, places, strict=True)]
    if (places[0] != places[1]).any() or texts[0] != texts[1]:
        raise Dropped("tokenkit pairs different bytes")
    return chunks


def tokenkit_version() -> str:
    """What a plan pins of the installed tokenkit: its version and the first digits of its align.py's SHA-256.

    Raises: Unavailable: it is missing, is PyPI's package of that name, or does not answer as tide was written for.
    """
    align = _load_align()
    version = _installed_version() or "without a version"
    digest = hashlib.sha256(Path(align.__file__).read_bytes()).hexdigest()[:16]
    try:
        answer = align_chunks_with_tokenkit(*_TRIAL).tolist()
    except Dropped as error:
        answer = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
    expected = align_chunks(*_TRIAL).tolist()
    if answer != expected:
        raise Unavailable(
            f"tokenkit {version} ({align.__file__}) answers otherwise than tide was written for: for {_TRIAL} expected "
            f"the chunks {expected}, got {answer}. Install another commit ({INSTALL}@COMMIT), or leave out "
            "data.alignment=tokenkit"
        )
    return f"tokenkit {version}, align.py {digest}"


def _load_align() -> Any:
    try:
        align = importlib.import_module("tokenkit.align")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            raise Unavailable(f"tokenkit cannot be imported ({error}); mend it, or leave out data.alignment") from error
        if error.name not in ("tokenkit", "tokenkit.align"):
            raise Unavailable(
                f"tokenkit needs the package {error.name!r}, which is not installed: install it, or leave out "
                "data.alignment=tokenkit"
            ) from error
        align = None
    if not hasattr(align, "get_alignment_indices"):
        other = _installed_version()
        found = f"the installed package tokenkit {other} is not it" if other else "it is not installed"
        cure = f"{'pip uninstall tokenkit; ' if other else ''}{INSTALL}"
        raise Unavailable(
            f"tokenkit's alignment was asked for, and {found}: PyPI's tokenkit counts tokens and only shares the name. "
            f"To have the real one: {cure}. But tide needs no tokenkit: without data.alignment=tokenkit, "
            "tide.shared.chunks.align_chunks finds the same chunks"
        )
    return align


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("tokenkit")
    except importlib.metadata.PackageNotFoundError:
        return None
