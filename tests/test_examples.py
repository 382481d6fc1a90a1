"""The scripts below examples/, in miniature: they run to their end and leave what they promise."""

import importlib.util
import json
from pathlib import Path

import pytest
from tide.shared import config as config_module
from tide.shared.models import load_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_demo_teacher_is_rebuilt_from_installed_packages(tmp_path, monkeypatch):
    """Three steps on fifty functions; the corpus is the whole one."""
    example, load_config = load_example("make_demo_assets"), config_module.load_config
    few = ["train.steps=3", "data.limit=50", "train.log_every=1"]
    monkeypatch.setattr(
        config_module, "load_config", lambda recipe, overrides=(): load_config(recipe, overrides=[*overrides, *few])
    )
    monkeypatch.setattr(example, "ASSETS", tmp_path / "assets")
    example.train_teacher(tmp_path / "run")
    functions = (tmp_path / "run" / "functions.jsonl").read_text().splitlines()
    assert len(functions) > 20_000
    assert {"prompt", "response"} == set(json.loads(functions[0]))
    teacher = load_model(tmp_path / "assets" / "teacher", dtype="bfloat16")
    shipped = load_model(EXAMPLES.parent / "recipes" / "demo_assets" / "teacher", dtype="bfloat16")
    assert {n: p.shape for n, p in teacher.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
