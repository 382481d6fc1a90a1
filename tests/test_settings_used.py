"""Every setting has a user: a recipe, matrix, benchmark or example sets it, or docs/commands.md says who does."""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tide.shared.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
HINTS = typing.get_type_hints(RunConfig)
SECTIONS = {kind.__name__: name for name, kind in HINTS.items() if name != "losses"} | {"LossConfig": "losses"}
HEADING = "## Settings beyond the recipes"


def settings_of(kind: type, where: str) -> Iterator[str]:
    """Dotted names below a section; those of a loss as `losses.NAME`, of its TIDAL part as `losses.tidal.NAME`."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if isinstance(inner, type):
            yield from settings_of(inner, f"{where}{name}.")
        else:
            yield f"{where}{name}"


SETTINGS = set(settings_of(RunConfig, ""))


def names_in(tree: Any, where: str = "") -> Iterator[str]:
    """Dotted names that a tree of settings sets; items of a list have their list's name."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from names_in(value, f"{where}{name}.")
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for item in tree:
            yield from names_in(item, where)
    elif where:
        yield where.removesuffix(".")


def set_by_yaml(file: Path) -> set[str]:
    tree = yaml.safe_load(file.read_text())
    found = set(names_in(tree))
    for arm in (tree.get("arms") or {}).values():
        found |= {*names_in({"losses": arm.get("losses"), "train": arm.get("train")}), *arm.get("cache", {})}
    found |= {re.sub(r"^losses\.\d+", "losses", sweep["setting"]) for sweep in tree.get("sweeps") or ()}
    return found


def set_by_code(text: str) -> set[str]:
    """Settings that a script names in a text (`data.limit`), in a section it makes, or in one that it changes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = re.match(r"[a-z_]+\.[a-z_0-9.]+", node.value)
            found |= {re.sub(r"^losses\.\d+", "losses", name[0])} if name else set()
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            section = SECTIONS.get(called)
            if called == "replace" and node.args:
                section = getattr(node.args[0], "attr", None)
            found |= {f"{section}.{keyword.arg}" for keyword in node.keywords if section}
    return found & SETTINGS


def test_the_scan_finds_what_is_set_and_nothing_else(tmp_path):
    (tmp_path / "matrix.yaml").write_text(
        "arms: {a: {losses: [{name: ce}, {name: kl, tidal: {axis: both}}], train: {lr: 1}, cache: {noise.views: 2}}}\n"
        "sweeps: [{arm: a, setting: losses.1.temperature, values: [1]}]\n"
    )
    arms = {"losses.name", "losses.tidal.axis", "train.lr", "noise.views", "losses.temperature"}
    assert set_by_yaml(tmp_path / "matrix.yaml") & SETTINGS == arms
    script = 'load(["data.limit=3", "no.setting"]); NoiseConfig(seed=1); replace(run.train, steps=2); other(top_k=4)'
    assert set_by_code(script) == {"data.limit", "noise.seed", "train.steps"}
    assert len(SETTINGS) > 100
    assert {"teacher.see", "losses.tidal.lambda_max", "shard_cache.folder"} <= SETTINGS


@pytest.fixture(scope="module")
def set_somewhere() -> set[str]:
    found: set[str] = set()
    for file in (*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/matrices/*.yaml")):
        found |= set_by_yaml(file)
    for file in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"), ROOT / "demo.py"):
        found |= set_by_code(file.read_text())
    return found & SETTINGS


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[str, str]]:
    """Setting -> who sets it, and when or why."""
    text = (ROOT / "docs" / "commands.md").read_text().partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    rows: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            rows |= dict.fromkeys(re.findall(r"`([a-z_.]+)`", cells[0]), (cells[1], cells[2]))
    return rows


def test_every_setting_is_set_by_somebody(set_somewhere, table):
    nobodys = sorted(SETTINGS - set_somewhere - table.keys())
    assert not nobodys, f"set by nobody, and not in the table of docs/commands.md: {', '.join(nobodys)}"


def test_the_table_names_settings_that_are_there_with_who_and_when(table):
    assert table.keys() <= SETTINGS, sorted(table.keys() - SETTINGS)
    assert all(who and when for who, when in table.values())
