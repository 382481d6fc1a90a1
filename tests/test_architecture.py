"""Rules of the house that no tool checks by itself.

The file tree of docs/tree.md is a fenced block whose info string is `tree`. A line is a path, two or more blanks and a
sentence; folders end with a slash, and what is indented below one lies inside it:

    ```tree
    cli.py                 each command parses, calls one function and prints
    shared/                what both stages must agree on
      chunks.py            chunk alignment of two tokenisations
    ```
"""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import importlinter.cli
import pytest

LIBRARY = ("shared", "teacher_dump", "student_train")
VAGUE_NAMES = {"util", "utils", "misc", "helper", "helpers", "manager", "managers"}
# Put together here, so that this file does not hold what it looks for.
MACHINE_PATHS = [b"/" + path for path in (b"work/", b"tmp/tv", b"opt/wheels", b"opt/pypi")]
REGISTRY_HOSTS = [b".".join(parts) for parts in ((b"pypi", b"org"), (b"registry", b"npmjs"), (b"deb", b"debian"))]
MAX_SCANNED_BYTES = 1 << 20


@pytest.fixture(scope="module")
def modules(project_root, project_files) -> dict[Path, ast.Module]:
    """The syntax tree of every Python file."""
    paths = [path for path in project_files if path.suffix == ".py"]
    return {path: ast.parse((project_root / path).read_text(), str(path)) for path in paths}


def _none(what: str, found: list[str]) -> None:
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.fixture
def loggers_stay_on() -> Iterator[None]:
    """import-linter switches off every logger that is there, and with it the warnings that other tests look for."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [one.disabled for one in loggers]
    yield
    for one, was in zip(loggers, before, strict=True):
        one.disabled = was


@pytest.mark.usefixtures("loggers_stay_on")
def test_layers_import_downwards_only(project_root, monkeypatch, capsys):
    monkeypatch.chdir(project_root)
    assert importlinter.cli.lint_imports(no_cache=True) == 0, capsys.readouterr().out


def file_tree(text: str) -> dict[str, str]:
    """Path -> sentence of the tree."""
    block = re.search(r"^```tree\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block, "docs/tree.md has no fenced block ```tree (its format: above)"
    tree: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, block[1].splitlines()):
        name, _, sentence = line.strip().partition("  ")
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        assert path not in tree, f"docs/tree.md names {path} twice"
        tree[path] = sentence.strip()
        if name.endswith("/"):
            folders.append((indent, path))
    return tree


def test_the_trees_format_is_understood():
    lines = ["cli.py   one command each", "shared/  both", "  cache/   shards", "    a.py   is a", "  b.py  is b"]
    text = "\n".join(["intro", "```tree", *lines, "```", ""])
    assert file_tree(text) == {
        "cli.py": "one command each", "shared/": "both", "shared/cache/": "shards", "shared/cache/a.py": "is a",
        "shared/b.py": "is b",
    }  # fmt: skip


def test_the_tree_names_every_module_and_nothing_else(project_root, modules):
    tree = file_tree((project_root / "docs" / "tree.md").read_text())
    wanted = {
        path.as_posix(): (ast.get_docstring(module) or "").partition("\n")[0]
        for path, module in modules.items() if path.name != "__init__.py" and path.parts[0] != "tests"
    }  # fmt: skip
    missing = [f"{path}  {sentence}" for path, sentence in wanted.items() if path not in tree]
    _none("docs/tree.md lacks (with each file's own first line)", missing)
    gone = [path for path in tree if not (project_root / path).exists()]
    _none("docs/tree.md names what does not exist", gone)
    mute = [path for path, sentence in tree.items() if len(sentence.split()) < 2]
    _none("docs/tree.md says nothing about", mute)


def test_every_file_opens_with_its_purpose(modules):
    _none(
        "without a module docstring", [str(path) for path, module in modules.items() if not ast.get_docstring(module)]
    )


def test_no_file_has_a_vague_name(project_files):
    vague = [str(path) for path in project_files if VAGUE_NAMES & set(re.split(r"[^a-z]+", path.stem.lower()))]
    _none("names that say nothing", vague)


def test_only_the_command_line_prints(modules):
    printing = [
        f"{path}:{node.lineno}" for path, module in modules.items()
        if path.parts[0] in (*LIBRARY, "commands") or len(path.parts) == 1
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]  # fmt: skip
    _none("print outside commands/", printing)


def public_definitions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes at the top of a module, and the methods of those classes, without leading underscore."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                yield from (method for method in methods if not method.name.startswith("_"))


def test_public_functions_say_what_they_do(modules):
    silent = [
        f"{path}:{node.lineno} {node.name}" for path, module in modules.items() if path.parts[0] in LIBRARY
        for node in public_definitions(module) if not ast.get_docstring(node)
    ]  # fmt: skip
    _none("public, without a docstring", silent)


def test_the_licence_is_there(project_root):
    assert "Apache License" in (project_root / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (project_root / "pyproject.toml").read_text()


def test_no_file_names_a_machine_or_a_registry(project_root, project_files):
    found = []
    for path in project_files:
        data = (project_root / path).read_bytes()
        if len(data) <= MAX_SCANNED_BYTES or path.suffix in (".json", ".py", ".md"):
            found += [f"{path}: {word.decode()}" for word in MACHINE_PATHS + REGISTRY_HOSTS if word in data]
    _none("machine paths or registry hosts", found)
