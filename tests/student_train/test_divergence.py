"""Wrecked weights are noticed before they are saved, and the message about what is saved is true."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tide.shared.errors import DataError, TideError
from tide.student_train.divergence import largest_weight
from tide.student_train.trainer import Run
from torch import nn


def wreck(monkeypatch, after: int, value: float) -> None:
    """One weight of the middle of the model becomes `value` in step `after`, while the loss looks as ever."""
    original = Run.step

    def step(self: Run, number: int, *more: object) -> None:
        original(self, number, *more)  # type: ignore[arg-type]
        if number + 1 == after:
            weights = list(self.student.model.parameters())
            weights[len(weights) // 2].data.view(-1)[3] = value

    monkeypatch.setattr(Run, "step", step)


def saved(tiny: SimpleNamespace) -> list[str]:
    return sorted(path.name for path in (tiny.out / "checkpoints").glob("*"))


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (-math.inf, "infinity"), (-1e30, "1e"), (2e4, "2e")])
def test_weights_that_a_step_wrecked_are_not_saved_as_a_checkpoint(tiny, monkeypatch, value, told):
    wreck(monkeypatch, 4, value)
    with pytest.raises(TideError, match=rf"after step 4, model\..* holds {told}.*Step 2 is saved, from before that"):
        tiny.train(tiny.config())
    assert saved(tiny) == ["step-00000002"]


@pytest.mark.parametrize("steps", [1, 2])
def test_nor_as_a_finished_student(tiny, monkeypatch, steps):
    wreck(monkeypatch, steps, math.nan)
    with pytest.raises(TideError, match=r"holds NaN\. No checkpoint was saved; lower train.lr"):
        tiny.train(tiny.config(train__steps=steps))
    assert saved(tiny) == []
    assert not (tiny.out / "student").exists()


def test_a_loss_that_is_not_finite_names_what_is_saved(tiny, monkeypatch):
    original = Run.losses

    def losses(self: Run, batch: object, counts: object, step: int) -> dict:
        values = original(self, batch, counts, step)  # type: ignore[arg-type]
        return {name: value * math.nan if step == 1 else value for name, value in values.items()}

    monkeypatch.setattr(Run, "losses", losses)
    with pytest.raises(TideError, match=r"diverged: .*loss.* is not finite .* up to 2. No checkpoint was saved"):
        tiny.train(tiny.config())


@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_a_start_that_holds_nan_is_called_that(tiny, tmp_path, value, told):
    folder = tiny.root / "student"
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in folder.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    if not (mine / "model.safetensors").exists():
        from tiny_runs import write_model

        write_model(mine, "student", seed=0)
    weights = load_file(mine / "model.safetensors")
    name = sorted(name for name in weights if "mlp" in name)[0]
    weights[name].view(-1)[0] = value
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"mine: {name} holds {told}"):
        tiny.train(tiny.config(student__path=str(mine)))
    assert not tiny.out.exists()


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_weight_is_that_of_a_naive_search(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(3, 4) for _ in range(3)))
    values = {
        f"{n}[{i}]": abs(float(v)) for n, p in model.named_parameters() for i, v in enumerate(p.detach().flatten())
    }
    expected = max(values, key=values.__getitem__)
    name, value = largest_weight(model)
    assert (expected.split("[")[0], value) == (name, pytest.approx(values[expected]))
    model[1].weight.data[2, 1], model[2].bias.data[0] = math.nan, math.inf
    name, value = largest_weight(model)
    assert (name, math.isnan(value)) == ("1.weight", True)
