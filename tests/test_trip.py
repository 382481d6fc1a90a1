"""docs/trip.md walked with a real sample: every station is met, in order, and gives what the page says."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tide.shared.cache import open_cache, write_shard
from tide.shared.conversations import Conversation, Message
from tide.shared.tokens import Rendering
from tide.student_train.trainer import Run
from tide.teacher_dump.plan import read_plan
from tide.teacher_dump.worker import open_task
from tiny_runs import hybrid, make_cache


def stations(text: str) -> list[list[tuple[str, str, str]]]:
    """(file, function, type it gives) of each table."""
    tables = re.split(r"^## ", text, flags=re.MULTILINE)[1:3]
    return [re.findall(r"^\|[^|]+\| (\S+\.py) \| `([^`]+)` \| `(.+)` \|$", table, re.MULTILINE) for table in tables]


def gives(file: Path, name: str) -> str:
    """The annotation of what a function returns."""
    body: Any = ast.parse(file.read_text()).body
    for part in name.split("."):
        node = next(n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        body = node.body
    return ast.unparse(node.returns).strip("'\"").replace("'", '"')


def forms_of(value: object) -> Iterator[type]:
    """The project's own classes that hold arrays or text of a sample: of a value, or of the first of a list."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        for item in value[:1]:
            yield from forms_of(item)
        return
    kind, fields = type(value), getattr(value, "_asdict", lambda: getattr(value, "__dict__", {}))()
    if kind.__module__.startswith("tide.") and not kind.__name__.startswith("_"):
        held = [item for field in fields.values() for item in (field if isinstance(field, list | tuple) else [field])]
        if any(isinstance(item, np.ndarray | torch.Tensor) for item in held) or kind in (
            Conversation,
            Message,
            Rendering,
        ):
            yield kind


def walk(root: Path, action: Callable[[], object]) -> tuple[list[tuple[str, str]], set[tuple[str, str]]]:
    """(file, function) of the project's own calls, in order; (name, file) of the forms that they return."""
    met: list[tuple[str, str]] = []
    forms: set[type] = set()

    def note(frame: Any, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if file.startswith(f"{root}/") and "/.venv/" not in file and "/tests/" not in file:
            if event == "call":
                met.append((str(Path(file).relative_to(root)), frame.f_code.co_qualname))
            elif event == "return":
                forms.update(forms_of(argument))

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return met, {(form.__name__, f"{form.__module__.removeprefix('tide.').replace('.', '/')}.py") for form in forms}


@pytest.mark.usefixtures("as_users_run")
def test_the_trip_is_as_the_page_says(project_root, tiny_root, tmp_path):
    config = hybrid(tiny_root, noise__views=2)
    root = make_cache(tiny_root, "trip", config)
    plan = read_plan(root).at(config, root)
    task, cache = open_task(root, plan), open_cache(root)
    run = Run(config, cache, tmp_path)

    def dump() -> None:
        drawn = task.draw(0, plan.samples[:3])
        task.ask(drawn)
        rows = [view.row() for of_sample in drawn for view in of_sample]
        write_shard(tmp_path / "x.parquet", rows, plan.layout, plan_hash=plan.hash, shard=0)

    def train() -> None:
        batches, counts = run.build(0)
        run.losses(batches[0], counts, 0)
        run.objective.total(run.losses(batches[0], counts, 0))

    text = (project_root / "docs" / "trip.md").read_text()
    files, forms = set(), set()
    for table, action in zip(stations(text), (dump, train), strict=True):
        assert len(table) > 10
        assert len({file for file, *_ in table}) <= 12
        met, taken = walk(project_root, action)
        forms |= taken
        files |= {file for file, _ in met}
        first = {name: met.index(name) for name in dict.fromkeys(met)}
        places = []
        for file, function, given in table:
            assert gives(project_root / file, function) == given, f"{file}: {function}"
            assert (file, function) in first, f"{file}: {function} is not called"
            places.append(first[file, function])
        assert places == sorted(places), "called in another order"
    assert sorted(forms) == sorted(re.findall(r"^\| `(\w+)` \| (\S+\.py) \|", text, re.MULTILINE))
    said = re.search(r"at most (\d+)\.\s*$", text)
    assert said is not None
    assert len(files) <= int(said[1]) <= 40, sorted(files)
