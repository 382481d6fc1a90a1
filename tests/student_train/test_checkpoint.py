"""Checkpoints: whole or absent, never pickled, checked before they are trusted."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tide.shared.config import TrainConfig
from tide.shared.errors import CacheMismatch, OutputError
from tide.shared.models.loading import load_model
from tide.student_train.checkpoint import find_checkpoint, find_student, load_optimizers, remove_run, save_checkpoint
from tide.student_train.engines import build_optimizers
from tiny_runs import tiny_config

IDENTITY = {"cache": "ab", "train.lr": 0.1, "train.betas.0": 0.9}


@pytest.fixture
def student(tiny_root: Path):
    tiny_config(tiny_root)
    return load_model(tiny_root / "student")


def trained_optimizers(model, name: str = "muon") -> dict:
    """Optimisers with a state, after one step on random gradients."""
    optimizers = build_optimizers(model, TrainConfig(optimizer=name))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers.values():
        optimizer.step()
    return optimizers


def save(root: Path, step: int, student, optimizers: dict, keep: int = 2) -> Path:
    return save_checkpoint(root, step, student, optimizers, identity=IDENTITY, window={"loss": (1.5, 2)}, keep=keep)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_optimisers_and_window_come_back_exactly(tmp_path: Path, student, name: str) -> None:
    optimizers = trained_optimizers(student, name)
    folder = save(tmp_path, 7, student, optimizers)
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None
    assert (found.folder, found.step, found.window) == (folder, 7, {"loss": [1.5, 2]})
    model = load_model(found.folder)
    for ours, theirs in zip(student.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = build_optimizers(model, TrainConfig(optimizer=name))  # type: ignore[arg-type]
    load_optimizers(found.folder, again)
    for key, optimizer in optimizers.items():
        before, after = optimizer.state_dict(), again[key].state_dict()
        assert before["param_groups"] == after["param_groups"]
        assert before["state"].keys() == after["state"].keys()
        for parameter, fields in before["state"].items():
            for field, value in fields.items():
                other = after["state"][parameter][field]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_nothing_is_pickled(tmp_path: Path, student) -> None:
    folder = save(tmp_path, 7, student, trained_optimizers(student))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_the_newest_are_kept_and_later_ones_that_the_run_has_overtaken_go(tmp_path: Path, student) -> None:
    optimizers = trained_optimizers(student)
    for step in (1, 2, 9):
        save(tmp_path, step, student, optimizers, keep=3)
    save(tmp_path, 3, student, optimizers, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "optimizer-muon.safetensors", "tide_state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, student, damage: Callable[[Path], None], file: str
) -> None:
    optimizers = trained_optimizers(student)
    save(tmp_path, 1, student, optimizers)
    damaged = save(tmp_path, 2, student, optimizers)
    if (damage, file) == (flip, "tide_state.json"):
        (damaged / file).write_text('{"step": 2}')
    else:
        damage(damaged / file)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged \(.*using the checkpoint before it"):
        found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None
    assert found.step == 1


def test_an_empty_folder_or_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", IDENTITY) is None
    (tmp_path / "step-x").mkdir()
    assert find_checkpoint(tmp_path, IDENTITY) is None


def test_every_setting_that_differs_is_named(tmp_path: Path, student) -> None:
    save(tmp_path, 1, student, trained_optimizers(student))
    other = {"cache": "ab", "train.lr": 0.2, "train.seed": 5}
    with pytest.raises(CacheMismatch) as refused:
        find_checkpoint(tmp_path, other)
    message = str(refused.value)
    for part in ("train.lr: then 0.1, now 0.2", "train.seed: then None, now 5", "train.betas.0: then 0.9, now None"):
        assert part in message
    assert "cache:" not in message


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    "error, message", [(FULL, "disk is full"), (FULL_IN_RUST, "disk is full"), (READ_ONLY, "read-only")]
)
@pytest.mark.parametrize("where", ["save_file", "os.replace", "sha256_file"])
def test_a_failed_checkpoint_leaves_the_older_one_as_it_is(
    tmp_path: Path, student, where: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers = trained_optimizers(student)
    save(tmp_path, 1, student, optimizers, keep=1)
    before = contents(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"tide.student_train.checkpoint.{where}", fail)
        with pytest.raises(OutputError, match=message) as refused:
            save(tmp_path, 2, student, optimizers, keep=1)
    assert "step-00000002" in str(refused.value)
    assert "resumes from the last checkpoint" in str(refused.value)
    assert contents(tmp_path) == before
    assert refused.value.exit_code == 74
    save(tmp_path, 2, student, optimizers, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_real_limit_on_file_sizes_is_an_output_error_as_well(tmp_path: Path, student) -> None:
    optimizers = trained_optimizers(student)
    save(tmp_path, 1, student, optimizers)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save(tmp_path, 2, student, optimizers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path, student) -> None:
    (tmp_path / ".step-00000001.tmp").mkdir()
    (tmp_path / ".step-00000001.tmp" / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path, IDENTITY) is None
    save(tmp_path, 2, student, trained_optimizers(student))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("where", ["before", "between"])
def test_a_folder_that_stepped_aside_for_a_new_one_is_never_lost(
    tmp_path: Path, student, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: nothing after the first or the second of two renames happens."""
    optimizers = trained_optimizers(student)
    save(tmp_path, 1, student, optimizers, keep=1)
    before, original, renames = contents(tmp_path / "step-00000001"), os.replace, []

    def replace(old: Path, new: Path) -> None:
        renames.append(new)
        original(old, new)
        if len(renames) == (1 if where == "between" else 2):
            monkeypatch.setattr("tide.student_train.checkpoint.shutil.rmtree", lambda *a, **k: None)
            monkeypatch.setattr("tide.student_train.checkpoint._restore_replaced", lambda root: None)
            raise KeyboardInterrupt

    monkeypatch.setattr("tide.student_train.checkpoint.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, student, optimizers, keep=1)
    monkeypatch.undo()
    assert (tmp_path / ".step-00000001.tide-replaced").exists()
    found = find_checkpoint(tmp_path, IDENTITY)
    assert found is not None
    assert contents(found.folder) == before
    assert not (tmp_path / ".step-00000001.tide-replaced").exists()


def test_only_folders_of_a_run_are_removed(tmp_path: Path, student) -> None:
    save(tmp_path / "checkpoints", 2, student, trained_optimizers(student))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("")
    (tmp_path / "notes.txt").write_text("")
    remove_run(tmp_path)
    assert sorted(contents(tmp_path)) == ["notes.txt", "student/mine.txt"]
    with pytest.raises(OutputError, match="was not written by tide"):
        find_student(tmp_path / "student", IDENTITY)
