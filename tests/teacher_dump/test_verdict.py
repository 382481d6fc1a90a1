"""A look at the teacher before a dump, and what its answers were worth: the demo's, asked rightly and wrongly."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from official_models import naive_logits
from tide.shared.attention import AttentionPattern
from tide.shared.cache import open_cache, read_manifest
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.report import report
from tide.shared.cache.statistics import unit_bin
from tide.shared.cache.verdict import verdict
from tide.shared.config import load_config
from tide.shared.models import load_model
from tide.teacher_dump import verdict as teacher_verdict
from tide.teacher_dump.cache_size import estimate_size
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import make_plan, open_samples, read_plan
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.teacher import Teacher
from tide.teacher_dump.unigram import Unigram
from tide.teacher_dump.verdict import UnsoundTeacher, examine
from tiny_runs import ASSETS

WRONG_TEMPLATES = {
    "none": "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}\n{% endif %}{% endfor %}",
    "another": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}",
    "no-prompt": "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}",
}


def settings(teacher: Path = ASSETS / "teacher", **more: object) -> list[str]:
    """The demo, one view a sample."""
    values = {
        "teacher.path": str(teacher), "student.path": str(ASSETS / "student"), "noise.views": 1,
        "shards.samples_per_shard": 100, **{name.replace("__", "."): value for name, value in more.items()},
    }  # fmt: skip
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def task(tmp_path: Path, **changes: object) -> ShardTask:
    """A task of the demo's plan; `changes`: of the teacher's spec, or `random`, `template`, settings with `__`."""
    folder = tmp_path / "teacher"
    shutil.copytree(ASSETS / "teacher", folder)
    if "template" in changes:
        (folder / "chat_template.jinja").write_text(str(changes.pop("template")))
    random = changes.pop("random", False)
    spec = {name: changes.pop(name) for name in ("mask_id", "attention") if name in changes}
    plan, pairing = make_plan(load_config("demo", overrides=settings(folder, **changes)))
    if random:
        for file in folder.glob("*.safetensors"):
            file.unlink()
    model = load_model(folder, random_seed=3 if random else None)
    assert pairing.spec is not None
    pairing = dataclasses.replace(pairing, spec=dataclasses.replace(pairing.spec, **spec))
    assert pairing.spec is not None
    return ShardTask(plan, open_samples(plan)[0], pairing, Teacher(model, pairing.spec))


@pytest.mark.parametrize("t", [(0.001, 1.0), (0.001, 0.1), (0.3, 0.8), (0.9, 1.0)])
def test_the_right_teacher_is_not_doubted_at_any_range_of_t(tmp_path, t):
    more = {"noise__t_min": t[0], "noise__t_max": t[1], "signal__kind": "chunk", "data__limit": 40}
    said = verdict(dump_teacher(load_config("demo", overrides=settings(**more)), tmp_path / "cache"))
    assert said is not None
    assert (said["sound"], said["doubts"]) == (True, [])
    assert said["logp"] > said["unigram_logp"] + 0.5
    assert said["accuracy"] > 1.5 * said["unigram_accuracy"]


@pytest.mark.parametrize(
    "more",
    [pytest.param({}, marks=pytest.mark.slow), {"data__sample_seed": 2, "data__limit": 40}, {"data__limit": 26}],
)
def test_the_right_teacher_is_not_doubted_on_many_or_few_samples(tmp_path, more):
    found = examine(task(tmp_path, **more))
    assert found is not None
    assert (found.doubts, found.is_refused) == ((), False)
    assert found.logp > found.unigram_logp + 1


@pytest.mark.parametrize(
    ("change", "doubts"),
    [
        ({"mask_id": 1021}, ["no better than a unigram", r"With '<\|mask\|>' \(id 1023\) .* in place of id 1021"]),
        pytest.param(
            {"mask_id": 300}, [r"With '<\|mask\|>' \(id 1023\) as its mask in place of id 300"], marks=pytest.mark.slow
        ),
        ({"random": True}, ["no better than a unigram model"]),
        ({"attention": AttentionPattern(causal=True)}, ["With bidirectional attention inside blocks"]),
        ({"template": WRONG_TEMPLATES["no-prompt"]}, ["chat template"]),
        ({"template": WRONG_TEMPLATES["another"]}, ["chat template"]),
    ],
)  # fmt: skip
def test_a_teacher_that_is_asked_wrongly_is_refused(tmp_path, change, doubts):
    few = {} if "mask_id" in change else {"data__limit": 80}  # of another mask, fewer samples are no proof
    found = examine(task(tmp_path, **few, **change))
    assert found is not None
    assert found.is_refused
    for doubt in doubts:
        assert any(re.search(doubt, said, re.IGNORECASE) for said in found.doubts), found.doubts


@pytest.mark.slow
def test_a_template_that_costs_little_is_told_and_not_refused(tmp_path):
    """Text may be unlike the answers that a template was trained with: a small gain is no proof."""
    found = examine(task(tmp_path, template=WRONG_TEMPLATES["none"], data__teacher_max_length=96))
    assert found is not None
    assert not found.is_refused
    assert [said for said in found.doubts if "template" in said]


def test_what_was_chosen_against_the_trained_way_is_told_and_not_refused(tmp_path):
    found = examine(task(tmp_path, teacher__attention="paper", data__limit=80))
    assert found is not None
    assert not found.is_refused
    assert any("teacher.attention=native" in said for said in found.doubts)


def test_few_samples_decide_nothing(tmp_path):
    assert examine(task(tmp_path, data__limit=15, random=True)) is None


@pytest.fixture
def random_teacher(tmp_path) -> Path:
    folder = tmp_path / "random"
    shutil.copytree(ASSETS / "teacher", folder)
    (folder / "model.safetensors").unlink()
    load_model(folder, random_seed=3).save_pretrained(folder)
    return folder


def test_a_dump_is_refused_before_its_first_shard_and_goes_on_when_told_so(random_teacher, tmp_path, caplog):
    config = load_config("demo", overrides=settings(random_teacher, data__limit=40))
    with pytest.raises(UnsoundTeacher, match=r"no better than a unigram model .*--set teacher.check=warn"):
        dump_teacher(config, tmp_path / "cache")
    assert not (tmp_path / "cache" / "data").exists()
    told = load_config("demo", overrides=settings(random_teacher, data__limit=40, teacher__check="warn"))
    with caplog.at_level(logging.WARNING):
        manifest = dump_teacher(told, tmp_path / "cache")  # the same plan: permission is no part of it
    assert "no better than a unigram model" in caplog.text
    assert manifest.teacher is not None
    assert "no better" in manifest.teacher.doubts[0]
    said = verdict(manifest)
    assert said is not None
    assert not said["sound"]
    assert said["sentence"].startswith("The teacher says no more about this text than counts of its tokens would")
    assert report(describe_cache(tmp_path / "cache")).plain.startswith("The teacher says no more")
    assert "The teacher says no more" in (tmp_path / "cache" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["topk", "chunk"])
def test_statistics_equal_those_of_naive_forwards(tmp_path, kind):
    """The slow twin: every answered token's rank in one whole [x_t, x_0] pass."""
    config = load_config("demo", overrides=settings(data__limit=6, signal__kind=kind, noise__views=2))
    manifest = dump_teacher(config, tmp_path / "cache")
    statistics, plan = manifest.statistics, read_plan(tmp_path / "cache").at(config, tmp_path / "cache")
    conversations, pairing = open_samples(plan)
    model = load_model(config.teacher.path)
    drawn = ShardTask(plan, conversations, pairing, None).draw(0, plan.samples)
    answered, correct, logp = np.zeros((3, len(statistics.t_answered)))
    for view in (view for of_sample in drawn for view in of_sample):
        for one in view.passes(0):
            x_0 = view.sample.paired.teacher.x_0
            said = naive_logits(model, pairing.spec, x_0, one.masked).log_softmax(dim=1).numpy()[one.answered]
            gold = x_0[one.answered]
            place = unit_bin(np.array([view.t], np.float32))[0]
            answered[place] += len(gold)
            correct[place] += (said.argmax(axis=1) == gold).sum()
            logp[place] += said[np.arange(len(gold)), gold].sum()
    assert answered.sum() > 100
    assert statistics.t_answered == tuple(answered)
    assert statistics.t_correct == tuple(correct)
    np.testing.assert_allclose(statistics.t_clean_logp, logp, rtol=1e-4, atol=1e-3)
    assert plan.unigram is not None
    assert statistics.unigram_logp == pytest.approx(answered.sum() * plan.unigram["logp"])
    assert open_cache(tmp_path / "cache").manifest == manifest


def test_the_unigram_model_leaves_each_answer_out():
    """By hand: answers [0, 0] and [0, 1] over 4 tokens."""
    model = Unigram(2, 4)
    model.add(np.array([0, 0]))
    model.add(np.array([0, 1]))
    # the first under counts {0: 1, 1: 1}, K = 2, N = 2; the second under {0: 2}, K = 1, N = 2
    first, second = np.log([(1 + 2 / 4) / 4] * 2), np.log([(2 + 1 / 4) / 3, (0 + 1 / 4) / 3])
    expected = np.concatenate([first, second])
    assert model.score() == {"logp": round(expected.mean(), 4), "accuracy": 0.75}


def test_a_cache_from_before_verdicts_opens_and_has_none(tmp_path):
    dump_teacher(load_config("demo", overrides=settings(data__limit=4)), tmp_path / "cache")
    manifest = read_manifest(tmp_path / "cache")
    old = dataclasses.replace(
        manifest,
        statistics=dataclasses.replace(
            manifest.statistics, t_answered=(), t_correct=(), t_clean_logp=(), unigram_logp=0.0, unigram_correct=0.0
        ),
    )
    assert verdict(old) is None
    tree = json.loads(json.dumps(old.to_json()))
    for name in ("t_answered", "t_correct", "t_clean_logp", "unigram_logp", "unigram_correct"):
        del tree["statistics"][name]
    del tree["teacher"]["doubts"]
    assert type(manifest).from_json(tree) == old


def test_a_probe_tells_the_verdict_before_the_dump(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_verdict, "NUM_SAMPLES", 24)
    plan, _ = make_plan(load_config("demo", overrides=settings(data__limit=40)))
    found = estimate_size(plan, num_probe=4).teacher
    assert found is not None
    assert found["doubts"] == []
    assert found["logp"] > found["unigram_logp"]


def test_the_entropy_lies_between_two_lines_and_the_upper_one_does_not_fall(tmp_path):
    """What was not kept used to count as one token, so the entropy of a flat teacher seemed to fall with t."""
    config = load_config("demo", overrides=settings(data__limit=40, noise__views=4, signal__top_k=4))
    dump_teacher(config, tmp_path / "cache")
    by_t = describe_cache(tmp_path / "cache")["targets"]["by_t"]
    pairs = [
        (least, most) for least, most in zip(by_t["entropy"], by_t["entropy_most"], strict=True) if least is not None
    ]
    assert all(least <= most for least, most in pairs)
    quarter = len(pairs) // 4
    upper = [most for _, most in pairs]
    assert np.mean(upper[-quarter:]) > np.mean(upper[:quarter])
