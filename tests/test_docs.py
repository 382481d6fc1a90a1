"""Commands in the documentation are real: options exist, recipes exist, settings are accepted."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from tide import cli
from tide.shared.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "docs/operations.md", "docs/reproducing.md"]


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
