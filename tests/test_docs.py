"""Commands and messages in the documentation are real: options, recipes, settings, exit codes, quoted errors."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from tide import cli
from tide.shared.config import load_config
from tide.shared.errors import EXIT_INTERRUPTED, TideError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "docs/commands.md", "docs/operations.md", "docs/reproducing.md"]


def commands(text: str) -> list[list[str]]:
    """Arguments of every `tide` command in the code blocks."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "tide" in words and words[0] != "git":
                found.append(words[words.index("tide") + 1 :])
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_is_accepted(document):
    found = commands((ROOT / document).read_text())
    assert len(found) >= 5
    group = typer.main.get_command(cli.app)
    for name, *arguments in found:
        command = group.commands[name]
        given = command.make_context(name, list(arguments)).params
        if "recipe" in given:
            load_config(given["recipe"], given["config"], given["settings"])


def test_settings_that_the_hyperparameter_table_names_exist():
    text = (ROOT / "docs/reproducing.md").read_text()
    names = set(re.findall(r"`((?:data|student|teacher|noise|signal|train|decoding|losses\.\d)\.[a-z_.*0-9]+)", text))
    assert len(names) > 20
    config = load_config("tide-shared")
    for name in names:
        place = config
        for part in name.removesuffix(".*").split("."):
            place = place[int(part)] if part.isdigit() else getattr(place, part)


OUTPUTS = {"ablation.md", "evaluation.md"}
"""Files that commands write, named without a folder."""


def test_every_document_that_code_or_a_document_names_exists(project_files):
    missing = []
    for file in project_files:
        if file.suffix not in (".py", ".md", ".yaml", ".toml") or file.parts[0] == "tests" or file.name == "log.md":
            continue
        text = (ROOT / file).read_text()
        for name in set(re.findall(r"(?<![\w./<>{}*-])((?:[\w-]+/)*[\w-]+\.md)(?![\w.])", text)):
            beside = [ROOT / name, ROOT / file.parent / name]
            if Path(name).name not in OUTPUTS and not any(place.exists() for place in beside):
                missing.append(f"{file}: {name}")
    assert not missing, "\n".join(missing)


def strings_of_the_code() -> list[tuple[str, int | None]]:
    """Every text in the package, f-strings with a gap where a value goes, and the exit code of the error it is of."""
    found: list[tuple[str, int | None]] = []
    codes = {kind.__name__: kind.exit_code for kind in tide_errors()}

    def visit(node: ast.AST, code: int | None) -> None:
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            code = codes.get(called, code)
        if isinstance(node, ast.JoinedStr):
            found.append(("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values), code))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.value, code))
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):  # a docstring
                visit(child, code)

    for folder in ("shared", "teacher_dump", "student_train", "commands"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            visit(ast.parse(file.read_text()), None)
    return found


def tide_errors() -> list[type[TideError]]:
    """TideError and every kind of it."""
    from tide.teacher_dump import worker  # has one of its own

    assert worker.OutOfDeviceMemory
    kinds = [TideError]
    for kind in kinds:
        kinds += [more for more in kind.__subclasses__() if more not in kinds]
    return kinds


def rows(document: str, head: str) -> list[list[str]]:
    """Cells of the rows of every table whose first column has this head."""
    found, inside = [], False
    for line in (ROOT / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == head)
        if inside and cells[0] != head and set(line) - set("|-"):
            found.append(cells)
    return found


def test_the_table_of_exit_codes_is_that_of_the_code():
    known = {kind.exit_code for kind in tide_errors()} | {0, EXIT_INTERRUPTED}
    listed = [int(cells[0]) for cells in rows("docs/operations.md", "exit code")]
    assert listed == sorted(known)


def test_messages_that_operators_are_told_of_exist_and_end_with_the_codes_that_are_said():
    told, texts = rows("docs/operations.md", "message"), strings_of_the_code()
    assert len(told) > 25
    for cells in told:
        message = cells[0].split("`")[1]
        codes = {code for text, code in texts if message in text}
        assert codes, f"no message of the code contains {message!r}"
        said = cells[1] if len(cells) == 3 else ""
        if said.isdigit() and codes != {None}:
            assert int(said) in codes, f"{message!r} ends with {codes}, not {said}"
