"""Trainings on a tiny cross-tokenizer cache: tide-hybrid, so that every kind of loss takes part."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tide.shared.config import RunConfig
from tide.student_train.trainer import train_student
from tiny_runs import hybrid, make_cache, metrics


@pytest.fixture(scope="session")
def hybrid_cache(tiny_root: Path) -> Path:
    return make_cache(tiny_root, "hybrid", hybrid(tiny_root))


def result(out: Path) -> dict[str, Any]:
    """What two runs must agree in: weights, optimiser state, metrics except timing."""
    newest = sorted((out / "checkpoints").iterdir())[-1]
    tensors = {"student": load_file(out / "student" / "model.safetensors")}
    tensors |= {file.name: load_file(file) for file in newest.glob("*.safetensors")}
    settings = {file.name: json.loads(file.read_text()) for file in newest.glob("optimizer-*.json")}
    lines = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in metrics(out)]
    return {"tensors": tensors, "settings": settings, "metrics": lines, "newest": newest.name}


def assert_same_run(out: Path, expected: Path) -> None:
    """Bit for bit."""
    a, b = result(out), result(expected)
    assert a["newest"] == b["newest"]
    assert a["metrics"] == b["metrics"]
    assert a["settings"] == b["settings"]
    assert a["tensors"].keys() == b["tensors"].keys()
    for file, tensors in a["tensors"].items():
        assert tensors.keys() == b["tensors"][file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b["tensors"][file][name]), f"{file}: {name}"


@pytest.fixture
def tiny(tiny_root: Path, hybrid_cache: Path, tmp_path: Path) -> SimpleNamespace:
    """config(**settings), cache, out, train(config, ...), metrics(out), assert_same_run(out, expected)."""

    def train(config: RunConfig, out: Path = tmp_path / "run", **more: Any) -> Path:
        return train_student(config, str(more.pop("cache", hybrid_cache)), out, **more)

    return SimpleNamespace(
        root=tiny_root, cache=hybrid_cache, out=tmp_path / "run", config=lambda **more: hybrid(tiny_root, **more),
        train=train, metrics=metrics, assert_same_run=assert_same_run,
    )  # fmt: skip
