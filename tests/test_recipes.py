"""Every recipe loads, says what the paper's table says, refuses typos, and trains."""

from dataclasses import replace
from pathlib import Path

import pytest
from tide.shared.config import LossConfig, RunConfig, TidalConfig, load_config, recipe_names
from tide.shared.errors import ConfigError
from tide.student_train.trainer import train_student
from tiny_runs import make_cache, metrics, tiny_config

NAMES = [name for name in recipe_names() if not name.startswith("demo")]
T = 2.0
TABLE = {  # docs/math.md: variants of the paper, by recipe; after the teacher: see, signal, CompDemo
    "tide-cross": ("LLaDA2", "own", "chunk", False, [LossConfig("calm", reverse=True, temperature=T)]),
    "calm": ("LLaDA2", "own", "chunk", False, [LossConfig("calm", temperature=T)]),
    "tide-shared-llada2": ("LLaDA2", "own", "chunk", True, [LossConfig("calm", temperature=T, tidal=TidalConfig())]),
    "tide-shared": (
        "WeDLM", "own", "topk", True,
        [LossConfig("kl", temperature=T, tidal=TidalConfig(timestep_weight="midrange"))],
    ),
    "kl": ("WeDLM", "own", "topk", False, [LossConfig("kl", temperature=T)]),
    "reverse-kl": ("WeDLM", "own", "topk", False, [LossConfig("kl", temperature=T, reverse=True)]),
    "hard-label": ("WeDLM", "own", "topk", False, [LossConfig("kl", temperature=T, target="clean")]),
    "ce": ("", "own", None, None, []),
    "ce-fresh": ("", "own", None, None, []),
    "tide-hybrid": (
        "LLaDA2", "own", "topk", True,
        [LossConfig("kl", temperature=T), LossConfig("calm", temperature=T, chunks="unmatched")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_row_of_the_papers_table(name: str) -> None:
    config = load_config(name)
    teacher, see, signal, comp_demo, losses = TABLE[name]
    assert teacher in config.teacher.path
    assert config.teacher.see == see
    assert config.losses == (LossConfig("ce"), *losses)
    if signal:
        assert (config.signal.kind, config.noise.comp_demo) == (signal, comp_demo)
        assert all(loss.name == "ce" or loss.temperature in config.signal.temperatures for loss in config.losses)
    if teacher:
        assert config.data.teacher_max_length == {"LLaDA2": 1024, "WeDLM": 768}[teacher]
    assert config.train.batch_size == 8 * (10 if teacher == "WeDLM" else 8)
    assert (config.train.epochs, config.train.lr) == (10, 5e-5)
    assert config.noise.views == (1 if name == "ce-fresh" else 10)
    assert config.train.ce_noise == ("fresh" if name == "ce-fresh" else "cached")
    assert config.student.block_size == 32


def test_the_table_and_the_shipped_recipes_are_the_same() -> None:
    assert sorted(TABLE) == NAMES
    load_config("demo")


def test_tidal_defaults_are_the_papers() -> None:
    assert TidalConfig() == TidalConfig("both", "cosine", 0.1, 0.9, "uniform")


def test_the_hard_label_control_differs_from_kl_in_its_target_alone() -> None:
    kl, control = load_config("kl"), load_config("hard-label")
    assert control.losses[1] == replace(kl.losses[1], target="clean")
    assert replace(control, losses=kl.losses) == kl


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_does_not_exist_is_refused_with_the_nearest_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'losses\.0\.wieght'; did you mean 'weight'\?"):
        load_config(name, overrides=["losses.0.wieght=2"])
    with pytest.raises(ConfigError, match=r"unknown setting 'noise\.view'; did you mean 'views'\?"):
        load_config(name, overrides=["noise.view=3"])


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'tide_cros'; did you mean 'tide-cross'\?"):
        load_config("tide_cros")


def two_steps(root: Path, name: str, out: Path, *, shared: bool) -> list[dict]:
    """Train `name` on the cache that it makes for itself; caches that are alike are shared."""
    config: RunConfig = tiny_config(root, name, shared=shared, train__steps=2, train__log_every=1)
    alike = (config.signal.kind, config.noise.comp_demo, config.noise.views, bool(config.teacher.path), shared)
    cache = make_cache(root, "recipe-" + "-".join(map(str, alike)), config)
    train_student(config, str(cache), out)
    return metrics(out)


SHARED = [name for name in NAMES if "WeDLM" in load_config(name).teacher.path]


@pytest.mark.parametrize("name, shared", [*[(n, False) for n in NAMES], *[(n, True) for n in SHARED]])
def test_a_recipe_trains(tiny_root: Path, tmp_path: Path, name: str, shared: bool) -> None:
    lines = two_steps(tiny_root, name, tmp_path / "run", shared=shared)
    assert [line["step"] for line in lines] == [1, 2]
    expected = {
        "tide-cross": {"reverse_calm"}, "calm": {"calm"}, "tide-shared-llada2": {"tidal_calm"},
        "tide-shared": {"tidal_kl"}, "kl": {"kl"}, "reverse-kl": {"reverse_kl"}, "hard-label": {"clean_kl"},
        "ce": set(), "ce-fresh": set(), "tide-hybrid": {"kl", "calm"},
    }[name]  # fmt: skip
    extra = {"step", "epoch", "loss", "grad_norm", "lr", "tokens_per_s"}
    for line in lines:
        assert set(line) - extra == {"ce", *expected}
        assert line["grad_norm"] > 0


def test_kl_and_its_control_read_the_same_positions(tiny_root: Path, tmp_path: Path) -> None:
    """Same cache, same order, same cross-entropy in the first step: only the targets differ."""
    kl = two_steps(tiny_root, "kl", tmp_path / "kl", shared=True)
    control = two_steps(tiny_root, "hard-label", tmp_path / "control", shared=True)
    assert kl[0]["ce"] == control[0]["ce"]
    assert kl[0]["kl"] != control[0]["clean_kl"]
