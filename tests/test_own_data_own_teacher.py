"""A stranger's run: ten lines of JSONL in every form, a teacher of another family with a mask of its own, a recipe made
for another teacher, and no setting but where things lie. Through plan, dump, verdict, inspect, training and writing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tide import cli
from tide.shared.cache import open_cache
from tide.shared.config import load_config
from tide.shared.conversations import Message
from tide.shared.stdlib_source import stdlib_pairs
from tide.teacher_dump.plan import make_plan
from tiny_runs import ASSETS

MASK = "<|MASK|>"
SYSTEM = "Python."


def conversations() -> list[tuple[str, str]]:
    """Ten functions of the standard library: the demo's teacher knows Python, and has not seen them."""
    pairs = [(one.prompt, one.response) for one in stdlib_pairs("train")]
    return [pair for pair in pairs if 80 < len(pair[1]) < 200][:40:4]


def turns(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [
        Message("system", SYSTEM).to_json(),
        Message("user", prompt).to_json(),
        Message("assistant", answer).to_json(),
    ]


FORMS = {
    "messages": lambda p, a: {"messages": turns(p, a)},
    "ShareGPT": lambda p, a: {
        "system": SYSTEM, "conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}],
    },
    "Alpaca": lambda p, a: {"system": SYSTEM, "instruction": p, "input": "", "output": a, "history": []},
    "pairs": lambda p, a: {"system_prompt": SYSTEM, "question": p, "answer": a, "id": 7},
    "TRL": lambda p, a: {"prompt": turns(p, a)[:-1], "completion": turns(p, a)[-1:]},
    "parts": lambda p, a: {
        "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns(p, a)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The data in each form; the demo's trained teacher as an SDAR with blocks of 16 and a mask called otherwise."""
    root = tmp_path_factory.mktemp("stranger")
    for form, row in FORMS.items():
        (root / f"{form}.jsonl").write_text("".join(json.dumps(row(*pair)) + "\n" for pair in conversations()))
    teacher = root / "my-teacher"
    shutil.copytree(ASSETS / "teacher", teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).write_text((teacher / name).read_text().replace('"<|mask|>"', f'"{MASK}"'))
    described = json.loads((teacher / "config.json").read_text())
    described |= {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 16, "mask_token_id": 1023}
    (teacher / "config.json").write_text(json.dumps(described))
    shutil.copytree(ASSETS / "student", root / "my-student")
    return root


@pytest.fixture
def tide(monkeypatch, capsys):
    """tide("plan", ...) -> stdout, stderr; it must end well."""

    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out, err

    return run


def run_words(place: Path, recipe: str, form: str) -> list[object]:
    return [
        "--recipe", recipe, "--data", place / f"{form}.jsonl", "--teacher", place / "my-teacher",
        "--student", place / "my-student",
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_data_is_planned_alike(place, form):
    said: list[str] = []
    words = [f"data.source={place / f'{form}.jsonl'}", f"teacher.path={place / 'my-teacher'}"]
    plan, pairing = make_plan(
        load_config("tide-hybrid", overrides=[*words, f"student.path={place / 'my-student'}"], tell=said.append)
    )
    expected, _ = make_plan(
        load_config(
            "tide-hybrid",
            overrides=[
                f"data.source={place / 'messages.jsonl'}",
                *words[1:],
                f"student.path={place / 'my-student'}",
            ],
            tell=said.append,
        )
    )
    assert [one.sample_id for one in plan.samples] == [one.sample_id for one in expected.samples]
    assert [one.digest for one in plan.samples] == [one.digest for one in expected.samples]
    assert len(plan.samples) == 10
    assert pairing.spec is not None
    assert (pairing.spec.architecture, pairing.spec.mask_id, pairing.spec.block_size) == ("sdar", 1023, 16)
    assert any("is made for the teacher inclusionAI/LLaDA2.0-mini" in line for line in said)


@pytest.mark.parametrize(("recipe", "form"), [("tide-hybrid", "Alpaca"), ("tide-cross", "TRL")])
def test_a_strangers_five_commands(tide, place, tmp_path, recipe, form):
    words, cache = run_words(place, recipe, form), tmp_path / "cache"
    out, err = tide("plan", *words, "--json")
    assert json.loads(out)["samples"] == 10
    assert "settings of that one are not used" in err
    assert f"{form}.jsonl[split=train]: reads the columns " in err
    out, err = tide("dump-teacher", *words, "--out", cache, "--set", "teacher.dtype=float32", "--json")
    assert json.loads(out)["verdict"].startswith("The teacher knows this text")
    assert f"{form}.jsonl[split=train]: reads the columns " in err
    out, _ = tide("inspect-cache", cache)
    assert out.startswith("The teacher knows this text")
    run = tmp_path / "run"
    steps = [
        word for item in ("train.steps=3", "train.batch_size=4", "train.precision=fp32") for word in ("--set", item)
    ]
    words = ["--recipe", recipe, "--cache", cache, "--student", place / "my-student", "--out", run]
    _, err = tide("train-student", *words, *steps)
    assert "2 of the cache's 10 views of a sample are used: an epoch takes 1, and 3 steps of 4 are 1.2 epochs" in err
    out, _ = tide("generate", "--student", run / "student", "--max-new-tokens", 8, "--json", "def area(w, h):")
    assert json.loads(out)["tokens"] <= 8


def test_the_cache_is_that_of_the_settings_spelled_out(tide, place, tmp_path):
    words = [*run_words(place, "tide-hybrid", "messages"), "--set", "teacher.dtype=float32", "--set", "noise.views=2"]
    spelled = {
        "teacher.mask_token": MASK, "teacher.eos_token": "<|im_end|>", "teacher.attention": "native",
        "signal.support": "shared", "data.teacher_max_length": 512, "student.mask_token": "<|mask|>",
        "student.eos_token": "<|im_end|>",
    }  # fmt: skip
    more = [word for name, value in spelled.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    tide("dump-teacher", *words, "--out", tmp_path / "default")
    tide("dump-teacher", *words, *more, "--out", tmp_path / "spelled")
    rows = [list(open_cache(tmp_path / name)) for name in ("default", "spelled")]
    assert len(rows[0]) == 20
    assert [repr(row) for row in rows[0]] == [repr(row) for row in rows[1]]
