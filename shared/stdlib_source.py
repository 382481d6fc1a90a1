"""Instruction pairs from the Python standard library on this machine: real code, no network, nothing to download.

Every function or method that has a docstring and a short body of its own becomes one pair:
    prompt   = decorators, signature and the docstring's first paragraph, dedented; no other words, so that a tiny
               model spends no tokens on ceremony
    response = the body after the docstring, dedented, comments as they stand in the source
Indenting the response like the prompt's last line and putting it below the prompt gives valid Python (`join_pair`).

Pairs are ordered by (module, line), no prompt and no response occurs twice, and whole modules go to `train` or
`heldout` by a hash of the module's name: a module keeps its side in every Python version. The text itself is that of
the running Python, so `stdlib_version` belongs into every plan.

Traded away: functions whose source cannot be dedented line by line (text left of the body's margin, several
statements on the docstring's line). The alternative, `ast.unparse`, would lose comments and layout.
"""

import ast
import functools
import hashlib
import inspect
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import DataError, Unavailable

STDLIB_SPLITS = ("train", "heldout")
STDLIB_LICENCE = "PSF-2.0"
MIN_BODY_BYTES = 16
MAX_BODY_BYTES = 600
HELDOUT_SHARE = 0.06

_SPLIT_KEY = b"tide stdlib split 35"
"""Of forty numbered keys, the one whose held-out side is least ruled by a single module (tkinter alone is 9 % of the
pairs) while it holds about `HELDOUT_SHARE` of the pairs too. Changing it makes every earlier comparison void."""
_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "lib-dynload",
    "test", "tests", "idle_test",  # code about code; much of it is repeated
    "lib2to3", "encodings", "pydoc_data",  # tables and generated text
}  # fmt: skip


class StdlibPair(NamedTuple):
    """One function: where it stands, what is asked, what is answered."""

    module: str
    line: int
    prompt: str
    response: str


def stdlib_version() -> str:
    """What the pairs are made of, for example `python-3.11.7`."""
    return f"python-{platform.python_version()}"


def stdlib_pairs(split: str = "train") -> list[StdlibPair]:
    """The pairs of one split, ordered by module and line; the same list in every call.

    Args:
        split: `train` or `heldout` (about 6 % of the modules).
    Raises:
        ValueError: another split.
        Unavailable: this Python has no standard library in source form.
        DataError: a module of the standard library cannot be read or parsed.
    """
    if split not in STDLIB_SPLITS:
        raise ValueError(f"split = {split!r}: expected one of {', '.join(STDLIB_SPLITS)}")
    return [pair for pair in _all_pairs() if module_split(pair.module) == split]


def module_split(module: str) -> str:
    """The side of a module, from its dotted name alone."""
    digest = hashlib.blake2b(module.encode(), key=_SPLIT_KEY, digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def join_pair(prompt: str, response: str) -> str:
    """The whole function again: the response, indented like the prompt's last line, below the prompt."""
    last_line = prompt[prompt.rfind("\n") + 1 :]
    indent = last_line[: len(last_line) - len(last_line.lstrip())]
    body = "\n".join(indent + line if line.strip() else line for line in response.split("\n"))
    return f"{prompt}\n{body}\n"


@functools.cache
def _all_pairs() -> tuple[StdlibPair, ...]:
    """Both splits in order. Duplicates are removed over both together, so that nothing held out is seen in training."""
    prompts: set[str] = set()
    responses: set[str] = set()
    pairs = []
    for module, path in _modules():
        for pair in module_pairs(module, path):
            if pair.prompt in prompts or pair.response in responses:
                continue
            prompts.add(pair.prompt)
            responses.add(pair.response)
            pairs.append(pair)
    if not pairs:
        raise Unavailable(
            f"source stdlib: no Python source below {sysconfig.get_path('stdlib')}; run tide with a Python "
            "that ships its standard library as .py files, or name another data.source"
        )
    return tuple(pairs)


def _modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every standard module in source form, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        top_is_standard = parts[0] in sys.stdlib_module_names and not parts[0].startswith("_sysconfigdata")
        if top_is_standard and _SKIPPED_FOLDERS.isdisjoint(parts):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def module_pairs(module: str, path: Path) -> list[StdlibPair]:
    """All pairs of one Python file in the order of their lines, duplicates included; `module` is only a label.

    Raises: DataError: the file cannot be read or parsed.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library are not the user's concern
            tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read as Python ({error}); repair this file") from error
    lines = source.split("\n")  # like the parser; str.splitlines would also split at form feeds
    functions = sorted(_functions(tree), key=lambda node: node.lineno)
    made = ((node.lineno, _pair_texts(node, lines)) for node in functions)
    return [StdlibPair(module, line, *texts) for line, texts in made if texts is not None]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function with a docstring and something after it; statements only, as `ast.walk` would be slower."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1 and _doc_node(node):
            yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            children = getattr(node, name, None)
            if isinstance(children, list):
                todo.extend(children)


def _doc_node(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.Constant | None:
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def _pair_texts(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """Prompt and response of one function, or None where it is too short, too long, a stub or not cut by lines."""
    doc = _doc_node(node)
    assert doc is not None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    doc_end = doc.end_lineno or doc.lineno
    end = node.body[-1].end_lineno or 0
    starts_line = not lines[doc.lineno - 1].encode()[: doc.col_offset].strip()
    own_lines = doc.lineno > node.lineno and starts_line and node.body[1].lineno > doc_end
    if not own_lines or _is_stub(node.body[1:]):
        return None
    margin = lines[start - 1][: len(lines[start - 1]) - len(lines[start - 1].lstrip())]
    indent = lines[doc.lineno - 1][: doc.col_offset]
    signature = _dedent(lines[start - 1 : doc.lineno - 1], margin)
    body = _dedent(lines[doc_end:end], indent)
    paragraph = inspect.cleandoc(str(doc.value)).split("\n\n")[0].strip()
    if signature is None or body is None or not paragraph or '"""' in paragraph or "\0" in paragraph:
        return None
    response = "\n".join(body).strip("\n").rstrip()
    if not MIN_BODY_BYTES <= len(response.encode()) <= MAX_BODY_BYTES:
        return None
    # raw where it holds backslashes, closed on its own line where it must be
    opening = ('r"""' if "\\" in paragraph else '"""') + paragraph
    one_line = "\n" not in paragraph and not paragraph.endswith(('"', "\\"))
    docstring = (opening + ('"""' if one_line else '\n"""')).split("\n")
    inner = indent.removeprefix(margin)
    return "\n".join([*signature, *(inner + line if line.strip() else "" for line in docstring)]), response


def _is_stub(statements: list[ast.stmt]) -> bool:
    """A body that only says that it has none."""
    if len(statements) != 1:
        return False
    only = statements[0]
    if isinstance(only, ast.Raise) and only.exc is not None:
        raised = only.exc.func if isinstance(only.exc, ast.Call) else only.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(only, ast.Pass) or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant))


def _dedent(lines: list[str], margin: str) -> list[str] | None:
    """The lines without `margin`; None when a line with text does not begin with it."""
    if any(line.strip() and not line.startswith(margin) for line in lines):
        return None
    return [line.removeprefix(margin) if line.strip() else "" for line in lines]
