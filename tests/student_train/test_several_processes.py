"""One student on several processes equals one on one: whatever their number, stopped or not, whole or in shares.

All trainings run in one set of three processes (training_ranks.py), since starting torch costs more than they do.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tide.shared.cache import open_cache
from tiny_runs import assert_same_training, hybrid, make_cache, metrics, write_pairs
from training_ranks import run_ranks

SETTINGS = {
    "train__batch_size": 6, "train__steps": 8, "train__log_every": 1, "train__lr": 1e-3, "train__muon_lr": 1e-3,
    "train__save_every": 100,
}  # fmt: skip
SAMPLES = 8  # not a multiple of the batch, nor of 3 processes
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STOPS = ((2, 2), (1, 4), (2, 6), (3, None))  # (processes, stopped after step)


@pytest.fixture(scope="module")
def runs(tiny_root: Path, hybrid_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, `two`, `sharded`, `stopped`, `small`, `muon-one`, `muon-sharded`."""
    root = tmp_path_factory.mktemp("ranks")
    few = hybrid(tiny_root, data__source=write_pairs(root / "few.jsonl", 5))
    unseen = str(make_cache(tiny_root, "few", replace(few, data=replace(few.data, source=str(root / "few.jsonl")))))
    common = {"root": tiny_root, "cache": str(hybrid_cache), "settings": SETTINGS}
    one_at_a_time = {**SETTINGS, "train__micro_batch_size": 1, "train__heldout_every": 4}
    muon = {**SETTINGS, "train__steps": 3, "train__optimizer": "muon"}

    def training(out: str, num_ranks: int, **more: Any) -> dict[str, Any]:
        return {**common, "out": root / out, "num_ranks": num_ranks, **more}

    trainings = [
        training("stopped", num_ranks, stop_after=stop_after) for num_ranks, stop_after in STOPS
    ] + [
        training("one", 1, heldout=unseen, settings={**SETTINGS, "train__heldout_every": 4}),
        training("two", 2, heldout=unseen, settings=one_at_a_time),
        training("sharded", 2, environment=FSDP, heldout=unseen, settings=one_at_a_time, stop_after=3),
        training("sharded", 3, environment=FSDP, heldout=unseen, settings=one_at_a_time, stop_after=5),
        training("sharded", 1, heldout=unseen, settings=one_at_a_time, stop_after=6),
        training("sharded", 2, environment=FSDP, heldout=unseen, settings=one_at_a_time),
        training("small", 3, cache=unseen),
        training("small-one", 1, cache=unseen),
        training("muon", 1, settings=muon),
        training("muon-sharded", 2, environment=FSDP, settings=muon),
    ]  # fmt: skip
    said = run_ranks(root, trainings, timeout_s=200)
    assert not [line for stderr in said for line in stderr.splitlines() if "FSDP2-wrapped" in line]
    return root


def test_two_processes_equal_one_in_every_step(runs: Path) -> None:
    assert_same_training(runs / "two", runs / "one", 1e-5)


def test_stops_and_resumes_across_2_1_2_and_3_processes_equal_an_uninterrupted_run(runs: Path) -> None:
    found = metrics(runs / "stopped")
    expected = [line for line in metrics(runs / "one") if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, 9))
    for line, other in zip(found, expected, strict=True):
        for name in ("loss", "ce", "kl", "calm"):
            assert line[name] == pytest.approx(other[name], abs=1e-5)
    for name, tensor in load_file(runs / "stopped" / "student" / "model.safetensors").items():
        expected_tensor = load_file(runs / "one" / "student" / "model.safetensors")[name]
        torch.testing.assert_close(tensor, expected_tensor, rtol=0, atol=1e-5)


def trained_on(runs: Path, name: str) -> list[tuple[int, list[int]]]:
    """(sample, views) in the order of training: steps, and in each the parts of all ranks."""
    lines = [
        (json.loads(line), rank)
        for rank in range(3) if (log := runs / f"{name}-items-{rank}.jsonl").exists()
        for line in log.read_text().splitlines()
    ]  # fmt: skip
    lines.sort(key=lambda entry: (entry[0]["step"], entry[1]))
    return [(sample, views) for line, _ in lines for sample, views in line["items"]]


@pytest.mark.parametrize("name", ["stopped", "two", "sharded"])
def test_every_epoch_shows_every_sample_once_with_the_next_view(runs: Path, name: str) -> None:
    seen = trained_on(runs, name)
    assert len(seen) == 8 * 6
    assert seen == trained_on(runs, "one")
    for epoch in range(len(seen) // SAMPLES):
        part = seen[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert sorted(part) == [(sample, [epoch % 3]) for sample in range(SAMPLES)]


def test_a_cache_smaller_than_a_batch_and_uneven_for_all_processes_trains_to_the_end(runs: Path) -> None:
    assert_same_training(runs / "small", runs / "small-one", 1e-5)
    seen = trained_on(runs, "small")
    assert len(seen) == 8 * 6
    assert all(sorted(sample for sample, _ in seen[5 * e : 5 * e + 5]) == list(range(5)) for e in range(9))


def test_a_student_in_shares_equals_whole_ones_through_stops_and_other_numbers_of_processes(runs: Path) -> None:
    assert_same_training(runs / "sharded", runs / "one", 1e-5)
    folders = [max((runs / name / "checkpoints").iterdir()) for name in ("sharded", "one")]
    for file in ("optimizer-adamw.safetensors", "model.safetensors"):
        found, expected = (load_file(folder / file) for folder in folders)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_shares_are_shares(runs: Path) -> None:
    """Of the embedding, the largest tensor, each process holds its part of the rows."""
    rows = len(load_file(runs / "one" / "student" / "model.safetensors")["model.embed_tokens.weight"])
    held = {json.loads(line)["held"] for line in (runs / "sharded-items-1.jsonl").read_text().splitlines()}
    assert held == {rows // 2, -(-rows // 3)}
    assert {json.loads(line)["held"] for line in (runs / "two-items-1.jsonl").read_text().splitlines()} == {rows}


def test_muon_on_shares_is_muon_up_to_its_half_precision(runs: Path) -> None:
    assert_same_training(runs / "muon-sharded", runs / "muon", 5e-3)  # torch.optim.Muon orthogonalises in bf16


def test_evaluations_stand_before_the_first_step_every_so_many_and_after_the_last(runs: Path) -> None:
    for name in ("one", "two", "sharded"):
        lines = [line for line in metrics(runs / name) if "heldout_bits_per_byte" in line]
        assert [line["step"] for line in lines] == [0, 4, 8]
        assert all(0 <= line["heldout_accuracy"] <= 1 and line["heldout_bits_per_byte"] > 0 for line in lines)
        assert lines[-1]["heldout_bits_per_byte"] < lines[0]["heldout_bits_per_byte"]


def test_the_cache_of_these_tests_is_uneven(hybrid_cache: Path) -> None:
    assert len(open_cache(hybrid_cache)) == SAMPLES * 3
