"""Matrices of experiments: those that ship are whole, a file becomes arms, and every mistake is named."""

from pathlib import Path

import pytest
from tide.shared.config import LossConfig, RunConfig, load_config
from tide.shared.errors import ConfigError
from tide.student_train.matrix import matrix_names, read_matrix


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "matrix.yaml").write_text(text)
    return str(tmp_path / "matrix.yaml")


@pytest.mark.parametrize("name", matrix_names())
def test_every_arm_of_a_shipped_matrix_is_a_valid_training(name: str) -> None:
    matrix = read_matrix(name)
    configs = {arm: spec.config(RunConfig(), 7) for arm, spec in matrix.arms.items()}
    assert all(config.train.seed == 7 for config in configs.values())
    trainings = {(config.losses, config.train, str(matrix.arms[arm].cache)) for arm, config in configs.items()}
    assert len(trainings) == len(matrix.arms)


def test_the_papers_matrix_has_its_ablations_one_variable_apart() -> None:
    arms = {name: arm.config(RunConfig(), 0).losses for name, arm in read_matrix("paper").arms.items()}
    axes = {}
    for name in ("tidal", "tidal-training", "tidal-timestep"):
        (tidal,) = [loss.tidal for loss in arms[name] if loss.tidal]
        axes[name] = tidal.axis
        assert (tidal.lambda_init, tidal.lambda_max, tidal.timestep_weight) == (0.1, 0.9, "midrange")
    assert axes == {"tidal": "both", "tidal-training": "training_only", "tidal-timestep": "timestep_only"}
    assert arms["tidal-comp-demo"] == arms["tidal"] == load_config("tide-shared").losses
    assert arms["kl-comp-demo"] == arms["kl"]
    assert [loss.reverse for loss in arms["reverse-calm"]] == [False, True]
    assert arms["reverse-calm"][1] == LossConfig("calm", temperature=2.0, reverse=True)


def test_a_file_becomes_arms_and_sweeps(tmp_path: Path) -> None:
    matrix = read_matrix(write(tmp_path, """
baseline: ce
arms:
  ce: {losses: [{name: ce}], train: {ce_noise: fresh}}
  kl: {recipe: kl, cache: {noise.comp_demo: true}}
sweeps:
  - {arm: kl, setting: train.max_top_k, values: [1, null]}
  - {arm: kl, setting: losses.1.temperature, values: [1.0]}
claims:
  - {claim: it helps, better: kl-max_top_k-1, than: ce, at: [0.9], metric: accuracy}
"""))  # fmt: skip
    assert list(matrix.arms) == ["ce", "kl", "kl-max_top_k-1", "kl-max_top_k-null", "kl-temperature-1.0"]
    base = load_config(overrides=["train.steps=5"])
    ce, kl = (matrix.arms[name].config(base, 3) for name in ("ce", "kl-max_top_k-1"))
    assert (ce.train.ce_noise, ce.train.steps, ce.train.seed) == ("fresh", 5, 3)
    assert (kl.train.max_top_k, kl.losses) == (1, load_config("kl").losses)
    assert matrix.arms["kl-temperature-1.0"].config(base, 3).losses[1].temperature == 1
    assert all(arm.cache == {"noise.comp_demo": True} for name, arm in matrix.arms.items() if name != "ce")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("baseline: ce\narms: {kl: {recipe: kl}}", "no arm 'ce'"),
        ("baseline: kl\narms: {kl: {recipe: kl, losses: [{name: ce}]}}", "either from `recipe` or from `losses`"),
        ("baseline: kl\narms: {kl: {}}", "either from `recipe` or from `losses`"),
        ("baseline: kl\narms: {kl: {recipe: k}}\nsweeps: [{arm: kl, setting: train.lr, values: [1]}]", "no recipe 'k'"),
        ("baseline: kl\narms: {kl: {recpie: kl}}", "did you mean 'recipe'"),
        ("baseline: ../x\narms: {../x: {recipe: kl}}", "expected letters, digits"),
        ("baseline: kl\narms: {kl: {recipe: kl}}\nsweeps: [{arm: k, setting: train.lr, values: [1]}]", "no arm 'k'"),
        ("baseline: kl\narms: {kl: {recipe: kl}}\nsweeps: [{arm: kl, setting: data.limit, values: [1]}]", "train or"),
        ("baseline: kl\narms: {kl: {recipe: kl}}\nsweeps: [{arm: kl, setting: train.lr, values: [1, 1]}]", "twice"),
        ("baseline: kl\narms: {kl: {recipe: kl}}\nclaims: [{claim: c, better: kl, than: ec}]", "no arm 'ec'"),
        ("- kl", "expected sections"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_matrix(write(tmp_path, text))


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no such file.*did you mean 'paper'"):
        read_matrix("papre")
