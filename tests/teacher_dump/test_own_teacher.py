"""A teacher of one's own under a recipe that was made for another one: what its checkpoint publishes holds."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as templates
from tide.shared.cache import open_cache
from tide.shared.config import load_config
from tide.shared.errors import CacheMismatch, ConfigError, DataError
from tide.shared.models import load_model
from tide.shared.models.specs import FAMILIES, families
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.pairing import open_pairing
from tide.teacher_dump.worker import open_task
from tiny_runs import ASSETS, settings, write_model

OWN_MASK = "<|MASK|>"


def with_own_mask(folder: Path, **config: object) -> Path:
    """The demo's teacher's tokenizer with its mask under another name, on a tiny random model."""
    write_model(folder, "teacher", seed=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace('"<|mask|>"', f'"{OWN_MASK}"'))
    described = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(described))
    load_model(folder, random_seed=5).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, a student, and a teacher of SDAR's kind with a mask of its own."""
    root = tmp_path_factory.mktemp("own")
    settings(root)
    with_own_mask(root / "sdar", model_type="sdar", architectures=["SDARForCausalLM"], block_size=8, mask_token_id=1023)
    return root


def arguments(place: Path, teacher: Path, *more: str) -> list[str]:
    """What a user gives: models, data, and sizes; nothing of tokens, templates or supports."""
    return [
        f"data.source={place / 'pairs.jsonl'}", f"teacher.path={teacher}", f"student.path={place / 'student'}",
        "teacher.dtype=float32", "data.max_length=64", "student.block_size=8", "noise.views=2",
        "train.precision=fp32", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", ["tide-cross", "tide-hybrid", "tide-shared", "kl"])
def test_a_recipe_made_for_another_teacher_gives_the_same_cache_as_the_settings_spelled_out(place, tmp_path, recipe):
    said: list[str] = []
    default = load_config(recipe, overrides=arguments(place, place / "sdar"), tell=said.append)
    own = {
        "teacher.mask_token": OWN_MASK, "teacher.eos_token": "<|im_end|>", "teacher.template": "{}",
        "teacher.attention": "native", "signal.support": "shared", "data.teacher_max_length": "64",
        "student.mask_token": "<|mask|>", "student.eos_token": "<|im_end|>",
    }  # fmt: skip
    spelled = load_config(
        recipe, overrides=arguments(place, place / "sdar", *[f"{name}={value}" for name, value in own.items()])
    )
    pairing = open_pairing(default)
    assert (pairing.spec.mask_id, pairing.spec.block_size, pairing.student.mask_id) == (1023, 8, 511)
    rows = [list(open_cache(_dumped(config, tmp_path / f"{i}"))) for i, config in enumerate((default, spelled))]
    assert [repr(row) for row in rows[0]] == [repr(row) for row in rows[1]]
    assert len(rows[0]) == 16
    assert len(said) == 2  # the teacher's, the student's
    assert "teacher.mask_token = " in said[0]
    assert "is made for the teacher" in said[0]
    assert "data.teacher_max_length" in said[0]


def _dumped(config, root: Path) -> Path:
    dump_teacher(config, root)
    return root


def test_what_the_user_gives_holds_for_any_teacher(place):
    given = arguments(place, place / "sdar", f"teacher.mask_token={OWN_MASK}", "data.teacher_max_length=72")
    said: list[str] = []
    config = load_config("tide-cross", overrides=given, tell=said.append)
    assert (config.teacher.mask_token, config.data.teacher_max_length) == (OWN_MASK, 72)
    assert "mask_token = <|mask|>" not in said[0]
    assert "teacher.eos_token = <|endoftext|>" in said[0]


def test_a_configuration_file_counts_as_the_users_word(place, tmp_path):
    (tmp_path / "my.yaml").write_text("teacher: {template: {thinking: true}, path: ./mine}\nsignal: {support: 300}\n")
    config = load_config("kl", tmp_path / "my.yaml", tell=lambda said: None)
    assert config.teacher.template == {"thinking": True}
    assert config.signal.support == 300
    assert config.teacher.mask_token is None


@pytest.mark.parametrize(
    "path",
    [
        "inclusionAI/LLaDA2.0-mini", "/models/LLaDA2.0-mini", "LLaDA2.0-mini",
        "/cache/models--inclusionAI--LLaDA2.0-mini/snapshots/0123456789",
    ],
)  # fmt: skip
def test_the_recipes_own_teacher_keeps_its_settings_wherever_it_lies(path):
    said: list[str] = []
    config = load_config("tide-cross", overrides=[f"teacher.path={path}"], tell=said.append)
    assert config.teacher.mask_token == "<|mask|>"
    assert config.data.teacher_max_length == 1024
    assert said == []


@pytest.mark.parametrize("value", ["none", "null", '""'])
def test_none_is_no_teacher(value):
    assert load_config("tide-cross", overrides=[f"teacher.path={value}"]).teacher.path == ""
    assert load_config("tide-cross", overrides=["teacher.path=./none"], tell=lambda said: None).teacher.path == "./none"


def test_a_mask_that_the_tokenizer_lacks_is_refused_and_never_added(place):
    config = load_config("ce", overrides=arguments(place, place / "sdar", "teacher.mask_token=<|new mask|>"))
    with pytest.raises(ConfigError, match=r"has no such token, .* never trained; the checkpoint publishes id 1023"):
        open_pairing(config)


def test_a_mask_that_differs_from_the_checkpoints_config_is_refused(place):
    config = load_config("ce", overrides=arguments(place, place / "sdar", "teacher.mask_token=<|endoftext|>"))
    with pytest.raises(ConfigError, match=r"has id \d+ in .*publishes id 1023 .*leave teacher.mask_token out"):
        open_pairing(config)


def test_a_config_and_a_tokenizer_that_disagree_are_refused(place, tmp_path):
    teacher = with_own_mask(tmp_path / "odd", mask_token_id=7)
    with pytest.raises(ConfigError, match=r"config.json says mask_token_id = 7, and the tokenizer's mask token"):
        open_pairing(load_config("ce", overrides=arguments(place, teacher)))
    agreed = load_config("ce", overrides=arguments(place, teacher, f"teacher.mask_token={OWN_MASK}"))
    with pytest.raises(ConfigError, match="publishes id 7"):
        open_pairing(agreed)


@pytest.mark.parametrize("value", ['"x"', -1, 1.5, True])
def test_a_mask_id_that_is_none_is_refused(place, tmp_path, value):
    teacher = with_own_mask(tmp_path / "odd", mask_token_id=json.loads(value) if isinstance(value, str) else value)
    with pytest.raises(ConfigError, match="mask_token_id = .*: expected a token id"):
        open_pairing(load_config("ce", overrides=arguments(place, teacher)))


@pytest.fixture
def autoregressive(tmp_path) -> Path:
    """A plain Qwen3: no mask in config.json or tokenizer."""
    folder = with_own_mask(tmp_path / "plain", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    described = json.loads((folder / "tokenizer_config.json").read_text())
    del described["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def test_a_plain_autoregressive_checkpoint_is_refused_as_teacher(place, autoregressive):
    with pytest.raises(DataError, match=r"plain autoregressive checkpoint \(qwen3, .*tide models.*teacher.diffusion"):
        open_pairing(load_config("ce", overrides=arguments(place, autoregressive)))
    told = arguments(place, autoregressive, "teacher.diffusion=true", f"teacher.mask_token={OWN_MASK}")
    assert open_pairing(load_config("ce", overrides=told)).spec.mask_id == 1023


@pytest.mark.parametrize(
    "declared",
    [{"mask_token_id": 1023}, {"architectures": ["A2DQwen3LMHeadModel"], "mask_token_id": 1023}],
)
def test_a_converted_checkpoint_that_kept_its_model_type_is_accepted(place, autoregressive, declared):
    described = json.loads((autoregressive / "config.json").read_text())
    (autoregressive / "config.json").write_text(json.dumps(described | declared))
    assert open_pairing(load_config("ce", overrides=arguments(place, autoregressive))).spec.mask_id == 1023


def test_a_student_without_a_mask_gets_a_new_one_and_it_is_said(place, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(place / "student", student)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (student / name).write_text((student / name).read_text().replace("<|mask|>", "<|other|>"))
    described = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps(described | {"mask_token": None}))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"vocab_size": 640}))
    run = load_config("ce", overrides=[*arguments(place, place / "sdar"), f"student.path={student}"])
    with pytest.warns(UserWarning, match=r"publishes no mask token: <\|mask\|> is added as id 512"):
        assert open_pairing(run).student.mask_id == 512
    (student / "config.json").write_text(json.dumps(config | {"mask_token_id": 511, "vocab_size": 640}))
    assert open_pairing(run).student.mask_id == 511  # what its config.json publishes


def test_a_template_that_writes_the_date_is_refused_on_another_day(place, tmp_path, monkeypatch):
    student = tmp_path / "student"
    shutil.copytree(place / "student", student)
    template = (student / "chat_template.jinja").read_text()
    dated = "{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}: "
    (student / "chat_template.jinja").write_text(dated + template)

    class Clock(datetime):
        today = 26

        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 11, cls.today)

    monkeypatch.setattr(templates, "datetime", Clock)
    given = [*arguments(place, place / "sdar"), f"student.path={student}", "shards.samples_per_shard=4"]
    config = load_config("ce", overrides=given)
    plan = prepare_plan(config, tmp_path / "cache")
    open_task(tmp_path / "cache", plan).run(tmp_path / "cache", 0)  # the same day
    Clock.today = 27
    with pytest.raises(CacheMismatch, match=r"sample [0-9a-f]{16} was planned as other tokens .*date_string"):
        dump_teacher(config, tmp_path / "cache")
    pinned = load_config("ce", overrides=[*given, "student.template.date_string=26 Nov 2026"])
    prepare_plan(pinned, tmp_path / "pinned")
    Clock.today = 28
    assert dump_teacher(pinned, tmp_path / "pinned").totals.samples == 8


def test_the_table_of_models_is_what_the_document_shows(project_root):
    rows = families()
    header, rule, *lines = [
        line for line in (project_root / "docs" / "teachers.md").read_text().splitlines() if line.startswith("|")
    ]
    assert header == "| " + " | ".join(rows[0]) + " |"
    assert set(rule) == set("|-")
    assert lines == ["| " + " | ".join(row.values()) + " |" for row in rows]
    assert {row["model_type"].split()[0] for row in rows} == set(FAMILIES)


def test_tide_models_prints_the_table(capsys):
    from tide.commands.machine import models

    models(as_json=True)
    assert json.loads(capsys.readouterr().out) == families()
    models(as_json=False)
    assert "tencent/WeDLM-8B-Instruct" in capsys.readouterr().out
    assert ASSETS.exists()
