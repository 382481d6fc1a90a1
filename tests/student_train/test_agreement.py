"""A recipe and a cache that contradict each other, a loss with nothing to act on, folders that lie in each other."""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from tide import cli
from tide.shared.cache import open_cache
from tide.shared.config import LossConfig, RunConfig, from_tree
from tide.shared.errors import ConfigError
from tide.student_train.agreement import require_agreement
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import make_cache, settings, tiny_config, write_model


def test_comp_demo_that_the_cache_has_not_is_refused_and_meant_when_said(tiny_root, tmp_path):
    config = tiny_config(tiny_root, "tide-hybrid", noise__comp_demo=False, train__steps=1)
    cache = make_cache(tiny_root, "without-comp-demo", config)
    recipe = tiny_config(tiny_root, "tide-hybrid", train__steps=1)
    with pytest.raises(ConfigError, match=r"without CompDemo.*--set noise.comp_demo=false"):
        train_student(recipe, str(cache), tmp_path / "run")
    assert train_student(config, str(cache), tmp_path / "run").is_dir()


def test_other_contradictions_are_told_and_the_cache_holds(tiny_root, tmp_path, caplog):
    cache = make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))
    other = tiny_config(
        tiny_root, "kl", noise__comp_demo=False, noise__unit="token", noise__t_max=0.5, teacher__attention="paper",
        train__steps=1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train_student(other, str(cache), tmp_path / "run")
    for said in (
        "noise.comp_demo = false, the cache true", "noise.unit = token, the cache chunk", "noise.t_max = 0.5, the ca",
        "teacher.attention = paper, the cache's teacher was asked as native",
    ):  # fmt: skip
        assert said in caplog.text


def test_cross_entropy_alone_asks_nothing_of_the_teachers_noise(tiny_root):
    manifest = open_cache(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))).manifest
    assert require_agreement(tiny_config(tiny_root, "ce", noise__unit="token"), manifest) == []


@pytest.fixture
def lowered(tmp_path) -> Path:
    """A teacher that lowers all letters and ends a turn in its own way: answers of capitals have no chunk."""
    write_model(tmp_path / "teacher", "teacher", seed=1)
    tree = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(tree))
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "(end)"))
    rows = [{"prompt": f"q{i}", "response": "ABCDEFGHIJKL"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("recipe", ["tide-hybrid", "tide-cross", "kl", "hard-label"])
def test_losses_without_one_target_or_chunk_are_refused(tiny_root, lowered, recipe):
    more = {"data__source": lowered / "data.jsonl", "teacher__path": lowered / "teacher"}
    config = tiny_config(tiny_root, recipe, train__steps=2, **more)
    cache = make_cache(lowered, "cache", config)
    with pytest.raises(ConfigError, match=r"losses\.(kl|calm): this cache has not one .* train on nothing"):
        train_student(config, str(cache), lowered / "run")
    assert not (lowered / "run" / "student").exists()
    ce = dataclasses.replace(config, losses=(LossConfig("ce"),))
    assert train_student(ce, str(cache), lowered / "ce").is_dir()


def test_unmatched_chunks_that_are_none_are_refused_alone_and_told_beside_another_loss(tiny_root):
    manifest = open_cache(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))).manifest
    matched = dataclasses.replace(
        manifest, statistics=dataclasses.replace(manifest.statistics, chunks=manifest.statistics.targets)
    )
    unmatched = LossConfig("calm", chunks="unmatched")
    alone = from_tree(RunConfig, {"losses": [{"name": "calm", "chunks": "unmatched"}]})
    with pytest.raises(ConfigError, match="every chunk of this cache is one token on each side, so it would train on"):
        require_agreement(alone, matched)
    beside = dataclasses.replace(alone, losses=(LossConfig("kl"), unmatched))
    assert any("this loss stays 0" in said for said in require_agreement(beside, matched))


def test_a_cache_without_a_masked_position_is_told(tiny_root):
    manifest = open_cache(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))).manifest
    bare = dataclasses.replace(manifest, statistics=dataclasses.replace(manifest.statistics, masked_positions=0))
    assert "not one masked position" in require_agreement(tiny_config(tiny_root, "ce"), bare)[0]


@pytest.mark.parametrize("place", ["cache", "cache/run", "."])
def test_a_run_inside_its_cache_or_around_it_is_refused(tiny_root, tmp_path, place):
    config = tiny_config(tiny_root, "tide-hybrid", train__steps=1)
    shutil.copytree(make_cache(tiny_root, "hybrid", config), tmp_path / "cache")
    with pytest.raises(ConfigError, match="lie in each other"):
        train_student(config, str(tmp_path / "cache"), tmp_path / place)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    with pytest.raises(ConfigError, match="lie in each other"):
        train_student(config, str(tmp_path / "cache"), tmp_path / "link" / "run")
    assert dump_teacher(config, tmp_path / "cache").totals.rows > 0


def test_an_output_in_another_runs_student_is_refused(tiny_root, tmp_path):
    config = tiny_config(tiny_root, "tide-hybrid", train__steps=1)
    cache = str(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid")))
    student = train_student(config, cache, tmp_path / "run")
    for out in (student, student / "more" / "run"):
        with pytest.raises(ConfigError, match=r"--out .* lies in .*student, a student or checkpoint of another run"):
            train_student(config, cache, out)
    assert (student / "model.safetensors").stat().st_mode & 0o777 == (student / "config.json").stat().st_mode & 0o777


def test_no_weights_and_no_recipe_are_said(tiny_root, tmp_path, monkeypatch, capsys):
    cache = make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))
    student = write_model(tmp_path / "student", "student", seed=None)
    more = {"train__steps": 1, "student__path": str(student)}
    sets = [item for setting in settings(tiny_root, **more) for item in ("--set", setting)]
    arguments = ["tide", "train-student", *sets, "--cache", str(cache), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert not ended.value.code
    assert "student holds no weights: the student begins with random ones (train.seed)" in said
    assert "no --recipe: the losses are ce, which are the defaults" in said
