"""Nothing is left out or cut without a word: counted in plan and manifest, said wherever a cache is made or shown."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tide import cli
from tide.shared.cache import read_manifest
from tide.shared.cache.card import card_text
from tide.shared.cache.coverage import coverage_lines, left_out
from tide.shared.cache.html_report import report_html
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.merge import merge_caches
from tide.shared.cache.report import report
from tide.shared.conversations import Conversation, Message
from tide.shared.errors import DataError
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import make_plan
from tiny_runs import PAIRS, settings, tiny_config

LONG = " ".join(["return self.queue.append(item_value)"] * 20)


@pytest.fixture
def tide(monkeypatch, capsys):
    """tide("plan", ...) -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def data(tmp_path: Path, long: int = 3) -> Path:
    """Eight short pairs, and some that are longer than both limits."""
    rows = [{"prompt": p, "response": r} for p, r in PAIRS]
    rows += [{"prompt": f"Say it {i} times.", "response": f"{i} {LONG}"} for i in range(long)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(tiny_root: Path, tmp_path: Path, recipe: str = "tide-hybrid", **more: object):
    return tiny_config(tiny_root, recipe, **{"data__source": data(tmp_path), **more})


def test_cut_answers_are_counted_and_said_everywhere(tiny_root, tmp_path):
    made = config(tiny_root, tmp_path)
    plan, pairing = make_plan(made)
    longest = [{"role": "user", "content": "Say it 0 times."}, {"role": "assistant", "content": f"0 {LONG}"}]
    whole = pairing.student.encode(longest)
    assert whole.cut_tokens > 0
    assert plan.coverage["cut_samples"] == plan.coverage["teacher_cut_samples"] == 3
    assert plan.coverage["cut_tokens"] > 3 * (whole.cut_tokens - 5)
    said = "3 of 11 answers are cut off at data.max_length"
    assert any(said in line and "data.too_long=drop" in line for line in plan.sentences())
    manifest = dump_teacher(made, tmp_path / "cache")
    assert manifest.coverage == dict(plan.coverage)
    described = describe_cache(tmp_path / "cache")
    for shown in (report(described).plain, report_html(described, []), card_text(manifest)):
        assert said in shown.replace("\\", "").replace("&#95;", "_")


def test_what_is_too_long_may_be_left_out_or_end_the_plan(tiny_root, tmp_path):
    plan, _ = make_plan(config(tiny_root, tmp_path, data__too_long="drop"))
    assert plan.dropped == {"longer than max length": 3}
    assert (len(plan.samples), plan.coverage["cut_samples"]) == (8, 0)
    assert plan.sentences()[0] == "3 of 11 samples are left out (longer than max length: 3)"
    with pytest.raises(DataError, match=r"sample [0-9a-f]{16}: \d+ student tokens, and data.max_length permits 64"):
        make_plan(config(tiny_root, tmp_path, data__too_long="error"))


def test_the_teachers_limit_counts_by_itself(tiny_root, tmp_path):
    more = {"data__max_length": 512, "data__teacher_max_length": 64}
    plan, _ = make_plan(config(tiny_root, tmp_path, **more))
    assert (plan.coverage["cut_samples"], plan.coverage["teacher_cut_samples"]) == (0, 3)
    assert any(
        "answers as the teacher reads them are cut off at data.teacher_max_length" in s for s in plan.sentences()
    )
    dropped, _ = make_plan(config(tiny_root, tmp_path, data__too_long="drop", **more))
    assert dropped.dropped == {"longer than max length": 3}


def test_tokens_and_samples_without_signal_are_counted(tiny_root, tmp_path):
    plan, pairing = make_plan(config(tiny_root, tmp_path))
    expected = {"response_tokens": 0, "signal_tokens": 0}
    for prompt, response in [*PAIRS, *((f"Say it {i} times.", f"{i} {LONG}") for i in range(3))]:
        one = pairing.encode(Conversation.of([Message("user", prompt), Message("assistant", response)]))
        expected["response_tokens"] += len(one.student.x_0) - one.student.prompt_tokens - one.student.padding
        expected["signal_tokens"] += sum(end - start for _, _, start, end in one.chunks.tolist())
    assert {name: plan.coverage[name] for name in expected} == expected
    assert plan.coverage["samples_without_signal"] == 0
    lines = coverage_lines(
        {"samples_without_signal": 2, "response_tokens": 100, "signal_tokens": 60}, 8, has_teacher=True
    )
    assert lines[0].startswith("2 of 8 samples, and 40 of 100 response tokens (40%), lie outside all chunks")
    assert coverage_lines({"samples_without_signal": 8}, 8, has_teacher=False) == []


@pytest.mark.parametrize("command", ["plan", "dump-teacher"])
def test_commands_say_what_they_leave_out(tide, tiny_root, tmp_path, command):
    rows = [{"prompt": p, "response": r} for p, r in PAIRS[:2]] + [{"prompt": "Hi", "response": "   "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [word for item in settings(tiny_root, data__source=tmp_path / "rows.jsonl") for word in ("--set", item)]
    out = ["--out", tmp_path / "cache"] if command == "dump-teacher" else []
    code, _, err = tide(command, "--recipe", "ce", *sets, "--skip-bad", *out)
    assert code == 0, err
    assert "1 of 3 samples are left out (no answer: 1)" in err


def test_a_merged_cache_counts_each_sample_once(tiny_root, tmp_path):
    one = dump_teacher(config(tiny_root, tmp_path), tmp_path / "one")
    dump_teacher(config(tiny_root, tmp_path, noise__seed=5), tmp_path / "two")
    merged = merge_caches([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert merged.coverage == one.coverage
    assert read_manifest(tmp_path / "both").dropped == one.dropped


def test_words_for_nothing():
    assert left_out({}, 8) == ""
    assert coverage_lines({}, 8, has_teacher=True) == []
