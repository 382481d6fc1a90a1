"""A student under DeepSpeed's ZeRO equals one without, stopped or not, and what tide does not do with it is refused.

All trainings run in one set of three processes (training_ranks.py), since starting torch and DeepSpeed costs more than
they do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import hybrid, make_cache, metrics, write_pairs
from training_ranks import run_ranks

SETTINGS = {
    "train__batch_size": 6, "train__steps": 8, "train__log_every": 1, "train__lr": 1e-3, "train__save_every": 100,
}  # fmt: skip
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO_1 = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def runs(tiny_root: Path, hybrid_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, `zero-1`, `zero-2`, `mixed`, `half`, `half-zero`."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    root = tmp_path_factory.mktemp("zero")
    few = hybrid(tiny_root, data__source=write_pairs(root / "few.jsonl", 5))
    unseen = str(make_cache(tiny_root, "few", replace(few, data=replace(few.data, source=str(root / "few.jsonl")))))
    whole = {**SETTINGS, "train__heldout_every": 4}
    one_at_a_time = {**whole, "train__micro_batch_size": 1}

    def training(out: str, num_ranks: int, settings: dict[str, Any] = one_at_a_time, **more: Any) -> dict[str, Any]:
        return {
            "root": tiny_root, "cache": str(hybrid_cache), "settings": settings, "out": root / out,
            "num_ranks": num_ranks, "heldout": unseen, **more,
        }  # fmt: skip

    trainings = [
        training("one", 1, whole),
        training("zero-2", 2, environment=ZERO),
        training("zero-1", 2, environment=ZERO_1),
        training("mixed", 2, environment=ZERO, stop_after=2),
        training("mixed", 1, stop_after=3),
        training("mixed", 2, environment=FSDP, stop_after=5),
        training("mixed", 3, environment=ZERO),
    ]
    run_ranks(root, trainings, timeout_s=200)
    return root


def assert_same_training(found: Path, expected: Path, tolerance: float) -> None:
    """Every number of every line of metrics, and the student."""
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        line.pop("tokens_per_s", None), other.pop("tokens_per_s", None)
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)
    tensors, others = (load_file(run / "student" / "model.safetensors") for run in (found, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "mixed"])
def test_a_student_under_zero_equals_one_without_in_every_step(runs: Path, name: str) -> None:
    assert_same_training(runs / name, runs / "one", 1e-5)
