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
from tide.shared.errors import CacheMismatch, ConfigError, DataError, TryAgain
from tide.student_train.heldout import HeldoutQuestions
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
    config = tiny.config(train__steps=40, train__save_every=10, train__log_every=5)
    command = [
        sys.executable, "-m", "tide", "train-student", "--cache", str(tiny.cache), "--out", str(tiny.out),
        "--recipe", "tide-hybrid", *(f"--set={s}" for s in command_settings(tiny)),
        "--set=train.steps=40", "--set=train.save_every=10", "--set=train.log_every=5",
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


def test_a_run_continues_from_the_very_checkpoint_it_is_given(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.train(tiny.config(train__keep_checkpoints=3), tmp_path / "whole")
    early = tmp_path / "whole" / "checkpoints" / "step-00000002"
    tiny.train(tiny.config(), resume=early)  # in a new folder, without the lines of the first two steps
    assert [line["step"] for line in tiny.metrics(tiny.out)] == [4, 6]
    tiny.assert_same_run(tiny.out, tmp_path / "whole")
    before = [path.stat().st_mtime_ns for path in (tmp_path / "whole" / "checkpoints").iterdir()]
    tiny.train(tiny.config(), tmp_path / "whole", resume=early)  # in its own folder, although it is finished
    tiny.assert_same_run(tmp_path / "whole", tiny.out)
    assert before != [path.stat().st_mtime_ns for path in (tmp_path / "whole" / "checkpoints").iterdir()]


def test_a_checkpoint_to_continue_from_that_is_none_damaged_or_anothers_is_refused(tiny: SimpleNamespace) -> None:
    tiny.train(tiny.config(), tiny.out)
    folder = tiny.out / "checkpoints" / "step-00000004"
    with pytest.raises(ConfigError, match="is no checkpoint; give a folder such as run/checkpoints/step-00000500"):
        tiny.train(tiny.config(), resume=tiny.out / "checkpoints")
    with pytest.raises(CacheMismatch, match=r"train.lr: then 0.01, now 0.5"):
        tiny.train(tiny.config(train__lr=0.5), tiny.out.with_name("other"), resume=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="model.safetensors is missing"):
        tiny.train(tiny.config(), resume=folder)


def test_a_passed_over_checkpoint_does_not_count_as_kept(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(TryAgain):
        tiny.train(tiny.config())
    (tiny.out / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step-00000003 is damaged"):
        tiny.train(tiny.config(train__save_every=4))  # the next save, step 4, is after the damaged one
    kept = sorted(path.name for path in (tiny.out / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_evaluations_are_the_same_lines_whether_or_not_a_signal_interrupts_one(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(train__heldout_every=2, train__log_every=1, train__steps=5)
    tiny.train(tiny.config(train__log_every=1, train__steps=5), tmp_path / "unasked")
    tiny.train(config, tmp_path / "whole", heldout=str(tiny.cache))
    lines = tiny.metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "heldout_accuracy" in line] == [0, 2, 4, 5]
    trained, unasked = [line for line in lines if "loss" in line], tiny.metrics(tmp_path / "unasked")
    assert [line["loss"] for line in trained] == [line["loss"] for line in unasked]  # asking changes nothing
    original, calls = HeldoutQuestions._ask, []

    def ask(self: HeldoutQuestions, *arguments: object) -> None:
        calls.append(1)
        original(self, *arguments)
        if len(calls) in (2, 5):
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(HeldoutQuestions, "_ask", ask)
    monkeypatch.setattr("tide.student_train.heldout._MAX_POSITIONS", 1)  # many batches
    for _ in range(2):
        with pytest.raises(TryAgain, match="which is saved"):
            tiny.train(config, heldout=str(tiny.cache))
    tiny.train(config, heldout=str(tiny.cache))
    found = tiny.metrics(tiny.out)
    assert [line["step"] for line in found] == [line["step"] for line in lines]
    for line, other in zip(found, lines, strict=True):
        line.pop("tokens_per_s", None), other.pop("tokens_per_s", None)
        assert line == pytest.approx(other, rel=1e-5)  # batches of other sizes round differently
