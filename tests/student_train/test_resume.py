"""Exact resume: a stopped and resumed run equals an uninterrupted one bit for bit, whatever stopped it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tide.shared.errors import CacheMismatch, ConfigError, TryAgain
from tide.student_train.trainer import Run
from tiny_runs import settings


def stop_after(monkeypatch: pytest.MonkeyPatch, *steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when each of `steps` is done for the first time."""
    original, left = Run.step, set(steps)

    def step(self: Run, step: int, *arguments: object) -> None:
        original(self, step, *arguments)
        if step + 1 in left:
            left.remove(step + 1)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "step", step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    tiny: SimpleNamespace, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(train__optimizer=optimizer, train__micro_batch_size=2, train__ce_noise="fresh")
    tiny.train(config, tiny.root / f"whole-{optimizer}")
    stop_after(monkeypatch, 1, 3, 4)
    for step in (1, 3, 4):
        with pytest.raises(TryAgain, match=f"after step {step}, which is saved"):
            tiny.train(config)
    tiny.train(config)
    tiny.assert_same_run(tiny.out, tiny.root / f"whole-{optimizer}")


def test_dropout_is_resumed_exactly_and_leaves_the_callers_generator_alone(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "dropout"
    student.mkdir()
    for file in (tiny.root / "student").iterdir():
        text = file.read_bytes()
        (student / file.name).write_bytes(text.replace(b'"attention_dropout": 0.0', b'"attention_dropout": 0.5'))
    config = tiny.config(student__path=student)
    before = torch.get_rng_state()
    tiny.train(config, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before)
    tiny.train(tiny.config(), tmp_path / "without")
    assert tiny.metrics(tmp_path / "whole")[0]["loss"] != tiny.metrics(tmp_path / "without")[0]["loss"]
    stop_after(monkeypatch, 3)
    with pytest.raises(TryAgain):
        tiny.train(config)
    torch.rand(7)
    tiny.train(config)
    tiny.assert_same_run(tiny.out, tmp_path / "whole")


def test_signals_end_a_process_with_exit_code_75_and_kill_9_costs_what_followed_the_checkpoint(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    config = tiny.config(train__steps=80, train__save_every=10, train__log_every=5)
    command = [
        sys.executable, "-m", "tide", "train-student", "--cache", str(tiny.cache), "--out", str(tiny.out),
        "--recipe", "tide-hybrid", *(f"--set={s}" for s in command_settings(tiny)),
        "--set=train.steps=80", "--set=train.save_every=10", "--set=train.log_every=5",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start_and_wait_for(pattern: str) -> subprocess.Popen:
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(command, env=environment, stderr=stderr)
        until = time.monotonic() + 90
        while not list(tiny.out.glob(pattern)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return process

    killed = start_and_wait_for("checkpoints/step-00000010")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tiny.out / "student").exists()

    stopped = start_and_wait_for("checkpoints/step-00000020")
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 75, (tmp_path / "stderr").read_text()
    assert "run the same command again" in (tmp_path / "stderr").read_text()

    tiny.train(config)
    tiny.train(config, tmp_path / "whole")
    tiny.assert_same_run(tiny.out, tmp_path / "whole")


def command_settings(tiny: SimpleNamespace) -> list[str]:
    """The settings of `tiny.config()` for a command line."""
    return settings(tiny.root, train__lr=1e-2, train__muon_lr=1e-2)


def test_ctrl_c_saves_and_then_interrupts(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3, number=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tiny.config())
    assert sorted(path.name for path in (tiny.out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_second_signal_ends_the_process_at_once(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Run, step: int, *arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(SystemExit):
        tiny.train(tiny.config())
    assert not (tiny.out / "checkpoints").exists()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.train(tiny.config(), tmp_path / "whole")
    stop_after(monkeypatch, 5)
    with pytest.raises(TryAgain):
        tiny.train(tiny.config())
    weights = tiny.out / "checkpoints" / "step-00000005" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.warns(UserWarning, match="step-00000005 is damaged.*using the checkpoint before it"):
        tiny.train(tiny.config(train__keep_checkpoints=3))
    tiny.assert_same_run(tiny.out, tmp_path / "whole")


@pytest.mark.parametrize(
    "changed, name",
    [
        ({"train__lr": 0.5}, "train.lr: then 0.01, now 0.5"),
        ({"train__seed": 1}, "train.seed"),
        ({"student__template": {"x": 1}}, "student.template"),
        ({"losses": [{"name": "ce"}, {"name": "kl", "temperature": 1.0}]}, "losses.1.temperature: then 2.0, now 1.0"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny: SimpleNamespace, changed: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1)
    with pytest.raises(TryAgain):
        tiny.train(tiny.config())
    with pytest.raises(CacheMismatch, match=name) as refused:
        tiny.train(tiny.config(**changed))
    assert "--resume never" in str(refused.value)
    tiny.train(tiny.config())  # nothing is lost
    with pytest.raises(CacheMismatch, match=name):  # the finished student is not overwritten either
        tiny.train(tiny.config(**changed))


def test_a_run_may_continue_with_other_logging_saving_and_memory_settings(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(TryAgain):
        tiny.train(tiny.config())
    tiny.train(tiny.config(train__save_every=5, train__log_every=1, train__micro_batch_size=1))
    assert [line["step"] for line in tiny.metrics(tiny.out)] == [4, 5, 6]


def test_repeating_a_finished_run_does_no_work(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.train(tiny.config())
    before = {path: path.stat().st_mtime_ns for path in tiny.out.rglob("*")}
    monkeypatch.setattr("tide.student_train.trainer.Run", None)
    assert tiny.train(tiny.config()) == folder
    assert {path: path.stat().st_mtime_ns for path in tiny.out.rglob("*")} == before


def test_no_resume_starts_anew(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train(tiny.config(train__seed=1, train__save_every=1))
    tiny.train(tiny.config(), tmp_path / "whole")
    stop_after(monkeypatch, 1)
    with pytest.raises(TryAgain):
        tiny.train(tiny.config(), resume=False)
    assert [path.name for path in (tiny.out / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tiny.out / "student").exists()
    tiny.train(tiny.config())
    tiny.assert_same_run(tiny.out, tmp_path / "whole")


def test_a_refused_command_with_no_resume_removes_nothing(tiny: SimpleNamespace) -> None:
    tiny.train(tiny.config())
    before = sorted(tiny.out.rglob("*"))
    with pytest.raises(ConfigError):
        tiny.train(tiny.config(losses=[{"name": "kl", "temperature": 3.0}]), resume=False)
    assert sorted(tiny.out.rglob("*")) == before
