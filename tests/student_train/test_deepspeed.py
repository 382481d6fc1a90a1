"""A student under DeepSpeed's ZeRO equals one without, stopped or not. What is refused: test_sharding.py.

All trainings run in one set of three processes (training_ranks.py), since starting torch and DeepSpeed costs more than
they do.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_training, hybrid, make_cache, metrics, settings, write_pairs
from training_ranks import free_ports, run_ranks

SETTINGS = {
    "train__batch_size": 6, "train__steps": 8, "train__log_every": 1, "train__lr": 1e-3, "train__save_every": 100,
}  # fmt: skip
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_root: Path, hybrid_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, `zero-1`, `zero-2`, `mixed`, `half`, `half-zero`."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    root = tmp_path_factory.mktemp("zero")
    few = hybrid(tiny_root, data__source=write_pairs(root / "few.jsonl", 5))
    unseen = str(make_cache(tiny_root, "few", replace(few, data=replace(few.data, source=str(root / "few.jsonl")))))
    whole = {**SETTINGS, "train__heldout_every": 4}
    one_at_a_time = {**whole, "train__micro_batch_size": 1}
    half = {**one_at_a_time, "train__steps": 3, "train__precision": "bf16"}

    def training(out: str, num_ranks: int, settings: dict[str, Any] = one_at_a_time, **more: Any) -> dict[str, Any]:
        return {
            "root": tiny_root, "cache": str(hybrid_cache), "settings": settings, "out": root / out,
            "num_ranks": num_ranks, "heldout": unseen, **more,
        }  # fmt: skip

    def small_buckets(stage: int) -> dict[str, str]:
        """Smaller than the largest parameters, as DeepSpeed's are for real vocabularies."""
        file = root / f"zero-{stage}.json"
        section = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
        file.write_text(json.dumps({"zero_optimization": section, "bf16": {"enabled": "auto"}}))
        return {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}

    trainings = [
        training("one", 1, whole),
        training("zero-2", 2, environment=ZERO),
        training("zero-1", 2, environment=small_buckets(1)),
        training("mixed", 2, environment=ZERO, stop_after=2),
        training("mixed", 1, stop_after=3),
        training("mixed", 2, environment=FSDP, stop_after=5),
        training("mixed", 3, environment=small_buckets(2)),
        training("half-one", 1, half),
        training("half-zero", 2, half, environment=ZERO),
    ]
    run_ranks(root, trainings, timeout_s=200)
    return root


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "mixed"])
def test_a_student_under_zero_equals_one_without_in_every_step(runs: Path, name: str) -> None:
    assert_same_training(runs / name, runs / "one", 1e-5)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "mixed"])
def test_a_checkpoint_under_zero_is_that_of_a_whole_student(runs: Path, name: str) -> None:
    folders = [max((runs / run / "checkpoints").iterdir()) for run in (name, "one")]
    for file in ("optimizer-adamw.safetensors", "model.safetensors"):
        found, expected = (load_file(folder / file) for folder in folders)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)
    found, expected = (json.loads((folder / "optimizer-adamw.json").read_text()) for folder in folders)
    assert found == expected


def test_moments_lie_in_shares_and_weights_whole(runs: Path) -> None:
    def held(name: str, field: str) -> list[int]:
        logs = sorted(runs.glob(f"{name}-items-*.jsonl"))
        return [json.loads(log.read_text().splitlines()[-1])[field] for log in logs]

    (moments,), (rows,) = held("one", "moments"), held("one", "held")
    for name, num_ranks in (("zero-1", 2), ("zero-2", 2), ("mixed", 3)):
        assert held(name, "moments") == pytest.approx([moments / num_ranks] * num_ranks, abs=64)  # padding, counters
        assert held(name, "held") == [rows] * num_ranks


def test_zero_under_autocast_is_ddp_under_autocast(runs: Path) -> None:
    assert_same_training(runs / "half-zero", runs / "half-one", 1e-4)  # bf16 in the same places, other orders of sums
    assert metrics(runs / "half-one")[1]["loss"] != pytest.approx(metrics(runs / "one")[1]["loss"], rel=1e-6)


def test_accelerate_launch_with_the_shipped_configuration_ends_with_a_student(
    tiny_root: Path, hybrid_cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file={RECIPES / 'deepspeed.yaml'}",
        "--num_processes=2", f"--main_process_port={port}", "-m", "tide", "train-student", "--recipe", "tide-hybrid",
        "--cache", str(hybrid_cache), "--out", str(tmp_path / "run"),
        *(f"--set={setting}" for setting in settings(tiny_root, train__steps=2, train__log_every=1)),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    assert "DeepSpeed" not in done.stdout
