"""Configuration: types without guessing, unknown names with a suggestion, ranges, YAML and overrides."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tide.shared.config import LossConfig, RunConfig, TrainConfig, from_tree, load_config, to_tree
from tide.shared.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Sample:
    number: float = 0.0
    count: int = 0
    flag: bool = False
    maybe: float | None = None
    choice: Literal["a", "b"] = "a"
    either: Literal["shared"] | int = "shared"
    inner: Inner | None = None
    pair: tuple[float, float] = (0.0, 0.0)
    many: tuple[Inner, ...] = ()
    words: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    anything: Mapping[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "tree, expected",
    [
        ({"number": 3}, 3.0),
        ({"number": "1e-4"}, 1e-4),
        ({"number": "-2.5E+3"}, -2500.0),
        ({"number": ".5e1"}, 5.0),
        ({"maybe": "1e-4"}, 1e-4),
        ({"maybe": None}, None),
        ({"maybe": 2}, 2.0),
        ({"either": 7}, 7),
        ({"either": "shared"}, "shared"),
        ({"inner": {"size": 4}}, Inner(4)),
        ({"inner": None}, None),
        ({"pair": [1, "2e0"]}, (1.0, 2.0)),
        ({"many": [{"size": 2}, {}]}, (Inner(2), Inner(1))),
        ({"names": {"prompt": "q"}}, {"prompt": "q"}),
        ({"anything": {"a": [1, {"b": None}], "c": "1e-4"}}, {"a": [1, {"b": None}], "c": "1e-4"}),
    ],
)
def test_values_become_what_the_type_hint_says(tree: dict, expected: object) -> None:
    (name,) = tree
    value = getattr(from_tree(Sample, tree), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"number": "3"}, r"number = '3': expected float, got str"),
        ({"number": "nan"}, r"number = 'nan': expected float"),
        ({"number": float("nan")}, r"number = nan: expected a finite number"),
        ({"number": float("inf")}, r"number = inf: expected a finite number"),
        ({"number": True}, r"number = True: expected float, got bool"),
        ({"count": 1.0}, r"count = 1.0: expected int, got float"),
        ({"count": "1"}, r"count = '1': expected int, got str"),
        ({"count": True}, r"count = True: expected int, got bool"),
        ({"flag": 1}, r"flag = 1: expected bool, got int"),
        ({"maybe": "fast"}, r"maybe = 'fast': expected float or null, got str"),
        ({"choice": "aa"}, r"choice = 'aa': expected one of a, b; did you mean 'a'\?"),
        ({"either": "share"}, r"either = 'share': expected shared or int, got str"),
        ({"either": 1.5}, r"either = 1.5: expected shared or int, got float"),
        ({"inner": {"sise": 4}}, r"unknown setting 'inner.sise'; did you mean 'size'\?"),
        ({"inner": {"size": "x"}}, r"inner.size = 'x': expected int, got str"),
        ({"inner": 3}, r"inner = 3: expected Inner or null, got int"),
        ({"pair": [1]}, r"pair = \[1\]: expected 2 values, got 1"),
        ({"pair": 1}, r"pair = 1: expected a list, got int"),
        ({"many": [{}, {"size": None}]}, r"many.1.size = None: expected int, got NoneType"),
        ({"words": "abc"}, r"words = 'abc': expected a list, got str"),
        ({"names": {"prompt": 3}}, r"names.prompt = 3: expected str, got int"),
        ({"names": [1]}, r"names = \[1\]: expected settings by name, got list"),
        ({"anything": {1: 2}}, r"anything = 1: expected str, got int"),
        ({"xyz": 1}, r"unknown setting 'xyz'; known: number, count"),
    ],
)
def test_other_values_are_refused_by_name(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree(Sample, tree)


def test_a_mapping_does_not_share_its_values_with_the_tree() -> None:
    tree = {"names": {"prompt": "q"}}
    value = from_tree(Sample, tree)
    tree["names"]["prompt"] = "changed"
    assert value.names == {"prompt": "q"}


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans())
def test_tree_and_dataclass_are_inverse(number: float, count: int, flag: bool) -> None:
    sample = Sample(number, count, flag, maybe=number, inner=Inner(count), pair=(number, 0.0), many=(Inner(3),))
    assert from_tree(Sample, json.loads(json.dumps(to_tree(sample)))) == sample


def test_a_whole_run_survives_json() -> None:
    config = load_config("tide-shared")
    assert from_tree(RunConfig, json.loads(json.dumps(to_tree(config)))) == config


@pytest.mark.parametrize(
    "override, section, name, expected",
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.grad_clip=null", "train", "grad_clip", None),
        ("train.betas=[0.9, 9e-1]", "train", "betas", (0.9, 0.9)),
        ("train.precision=fp32", "train", "precision", "fp32"),
        ("train.report_to=[tensorboard]", "train", "report_to", ("tensorboard",)),
        ("noise.comp_demo=false", "noise", "comp_demo", False),
        ("data.source=a/b[lang:python]+c.jsonl", "data", "source", "a/b[lang:python]+c.jsonl"),
        ('data.source="1e-4"', "data", "source", "1e-4"),
        ("data.columns={prompt: q, response: a}", "data", "columns", {"prompt": "q", "response": "a"}),
        ("signal.support=151646", "signal", "support", 151646),
        ("student.mask_token=<|mask|>", "student", "mask_token", "<|mask|>"),
        ("student.template.enable_thinking=true", "student", "template", {"enable_thinking": True}),
    ],
)
def test_an_override_is_read_as_yaml_with_numbers_in_scientific_notation(
    override: str, section: str, name: str, expected: object
) -> None:
    assert getattr(getattr(load_config(overrides=[override]), section), name) == expected


def test_overrides_reach_into_lists_of_a_recipe() -> None:
    overrides = ["losses.1.weight=3e0", "losses.1.tidal.axis=both", "losses.1.weight=2"]
    config = load_config("tide-hybrid", overrides=overrides)
    assert config.losses[1].weight == 2
    assert config.losses[1].tidal is not None
    assert config.losses[2] == LossConfig("calm", temperature=2.0, chunks="unmatched")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lr", r"expected section.setting=value"),
        ("=3", r"expected section.setting=value"),
        ("losses.7.weight=1", r"'7' is not an index of a list of 3"),
        ("losses.first.weight=1", r"'first' is not an index"),
        ("train.lr.x=1", r"train.lr = \{'x': 1\}|holds a single value"),
        ("train.lr=[", r"--set train.lr=\[: not valid YAML"),
        ("train.learning_rate=1", r"unknown setting 'train.learning_rate'"),
        ("trian.lr=1", r"unknown setting 'trian'; did you mean 'train'\?"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("tide-hybrid", overrides=[override])


def test_recipe_file_and_override_are_merged_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  lr: 5e-5\n  batch_size: 32\nlosses:\n  - name: ce\nnoise:\n")
    config = load_config("kl", file, ["train.batch_size=64"])
    assert (config.train.lr, config.train.batch_size, config.train.epochs) == (5e-5, 64, 10)
    assert config.losses == (LossConfig("ce"),)  # a list replaces the list
    assert config.noise == load_config("kl").noise  # an empty section changes nothing
    assert config.teacher == load_config("kl").teacher


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", "expected sections such as `train:`, got list"),
        ("train: {lr: 1, lr: 2}\n", "'lr' occurs twice"),
        ("train:\n  lr: 1\ndata:\n  limit: 2\ntrain:\n  epochs: 3\n", "'train' occurs twice"),
        ("train: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("train: 3\n", "train: expected settings by name, got 3"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(path=file)
    assert refused.value.exit_code == 2


def test_yaml_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("losses:\n  - &kl\n    name: kl\n    temperature: 2\n  - <<: *kl\n    weight: 3\n")
    assert load_config(path=file).losses[1] == LossConfig("kl", weight=3.0, temperature=2.0)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file"):
        load_config(path=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.max_length=100", "a multiple of student.block_size = 32"),
        ("data.max_length=0", "a positive number of tokens"),
        ("data.limit=0", "a positive number or null"),
        ("student.block_size=0", "student.block_size"),
        ("noise.t_min=0", "noise.t_min"),
        ("noise.demo_ratio=2", "noise.demo_ratio"),
        ("signal.top_k=0", "signal.top_k"),
        ("signal.support=0", "signal.support"),
        ("signal.temperatures=[0.0, 1.0]", "signal.temperatures"),
        ("signal.temperatures=[2.0, 1.0]", "ascending"),
        ("losses.1.temperature=0", "losses.kl.temperature = 0.0: expected a temperature > 0"),
        ("losses.1.temperature=-1", "a temperature > 0"),
        ("losses.1.weight=-1", "a weight >= 0"),
        ("losses.1.name=kll", r"losses.1.name = 'kll': expected one of ce, kl, calm; did you mean 'kl'\?"),
        ("losses.1.chunks=unmatched", "losses.kl.chunks has no effect: only the loss calm reads it"),
        ("losses.1.normalise=batch", "only the loss ce reads it"),
        ("signal.tail_buckets=[9, 3]", r"signal.tail_buckets = \(9, 3\): expected fewer than 256 distinct ids > 0"),
        ("signal.tail_buckets=[0]", "distinct ids > 0 in ascending order"),
        ("losses.0.temperature=2", "losses.ce.temperature"),
        ("losses.0.reverse=true", "its target is the clean token"),
        ("train.optimizer=adam", r"expected one of adamw, muon; did you mean 'adamw'\?"),
        ("train.schedule=cosin", r"did you mean 'cosine'\?"),
        ("train.schedule=greedy", "expected one of cosine, linear, constant"),
        ("train.precision=fp16", r"did you mean 'bf16'\?"),
        ("train.precision=no", r"train.precision = False: expected one of fp32, bf16"),
        ("train.report_to=[tensorbord]", r"train.report_to.0 = 'tensorbord'.*did you mean 'tensorboard'\?"),
        ("train.micro_batch_size=0", "at least 1, or null for no limit"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.lr=0", r"a learning rate in \(0, 1\]"),
        ("train.lr=1e30", r"a learning rate in \(0, 1\]"),
        ("train.muon_lr=.nan", "expected a finite number"),
        ("train.muon_lr=.inf", "expected a finite number"),
        ("train.muon_lr=2", r"a learning rate in \(0, 1\]"),
        ("train.weight_decay=1000", "less than 125: 1 / lr"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("train.grad_clip=0", "a norm > 0, or null for no clipping"),
        ("train.warmup_ratio=1.5", "a share in \\[0, 1\\]"),
        ("train.steps=0", "train.steps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("kl", overrides=[override])


def test_tidal_with_a_reverse_loss_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="reverse and tidal exclude each other.*gradient"):
        load_config("tide-shared", overrides=["losses.1.reverse=true"])


def test_fresh_noise_without_cross_entropy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.ce_noise = 'fresh'.*give ce a weight > 0"):
        RunConfig(losses=(LossConfig("kl"),), train=TrainConfig(ce_noise="fresh"))
    with pytest.raises(ConfigError, match="give ce a weight > 0"):
        RunConfig(losses=(LossConfig("ce", weight=0.0), LossConfig("kl")), train=TrainConfig(ce_noise="fresh"))


@pytest.mark.parametrize("setting", ["signal.tail_buckets=[9]", "signal.audit_share=0.1"])
def test_tails_and_audits_are_of_token_level_targets_alone(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"of token-level targets, and signal.kind = 'chunk' has none"):
        load_config(overrides=[setting, "signal.kind=chunk"])
