"""`tide eval` from end to end: the real lm-eval on real data, its eight benchmarks, and what can go wrong."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from local_benchmarks import TESTS, environment, lay_out, tide_eval
from tide.cli import app
from tide.shared.bubblewrap import trouble
from tide.shared.errors import ConfigError, Unavailable
from tide.student_train import evaluate, lm_eval_command, lm_eval_tasks
from tide.student_train.evaluate import _read_result
from tide.student_train.lm_eval_model import open_student
from tide.student_train.tide8 import BENCHMARKS, PAPER_AVERAGE, PAPER_COLUMNS, chosen_benchmarks
from tiny_runs import tiny_config, write_model
from training_ranks import VARIABLES, free_ports, rank_environment
from typer.testing import CliRunner

needs_bubblewrap = pytest.mark.skipif(trouble() is not None, reason=f"code runs in bubblewrap: {trouble()}")

EIGHT = [b.name for b in BENCHMARKS if b.in_suite]


class Place(NamedTuple):
    """Data, a student, and an environment."""

    data: Path
    student: Path
    env: Mapping[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """Made once."""
    root = tmp_path_factory.mktemp("benchmarks")
    return Place(lay_out(root / "data"), write_model(root / "student", "student"), environment(root / "cache"))


def result(out: Path, name: str, folder: str = "student") -> dict:
    """One result file."""
    (file,) = (out / folder).glob(f"{name}-????????.json")
    return json.loads(file.read_text())


@needs_bubblewrap
def test_all_eight_run_offline_on_real_data(place, tmp_path):
    given = ["--student", place.student, "--out", tmp_path, "--data", place.data, "--limit", 1]
    given += ["--allow-code-execution", "--set", "decoding.max_new_tokens=8"]
    first = tide_eval(given, place.env)
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert sorted(report["students"]["student"]) == sorted(EIGHT)
    assert report["average"]["student"]["score"] == pytest.approx(
        sum(row["score"] for row in report["students"]["student"].values()) / 8
    )
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "evaluation.md").read_text()
    assert text.strip() in first.stdout, "the table is printed"
    assert "34.20" in text, "beside the paper's"
    assert "decoding.max_new_tokens = 8, not the protocol's" in text
    assert "a limit of 1 documents" in text
    assert "code that a student wrote was shut in by bubblewrap" in text
    assert result(tmp_path, "mmlu")["documents"] == 57
    assert result(tmp_path, "bbh")["settings"]["shots"] == 3


@needs_bubblewrap
@pytest.mark.slow
def test_right_answers_score_a_hundred_on_all_eight(place, tmp_path):
    given = ["eval", "--student", place.student, "--out", tmp_path, "--data", place.data, "--limit", 1]
    done = tide_eval(
        [*given, "--allow-code-execution", "--json"], place.env, program=(str(TESTS / "oracle_evaluation.py"),)
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["students"]["student"]
    assert {name: row["score"] for name, row in scores.items()} == dict.fromkeys(EIGHT, 100.0)


@needs_bubblewrap
def test_a_student_that_writes_hostile_code_harms_nothing_and_scores_nothing(place, tmp_path):
    planted = tmp_path / "planted"
    planted.write_text("still here")
    given = ["eval", "--student", place.student, "--out", tmp_path / "out", "--data", place.data, "--limit", 5]
    given += ["--tasks", "humaneval_instruct", "--allow-code-execution", "--json"]
    given += ["--set", "evaluation.code_time_s=4", "--set", "evaluation.code_memory_mb=512"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        env = {**place.env, "HOSTILE_FILE": str(planted), "HOSTILE_PORT": str(server.getsockname()[1])}
        done = tide_eval(given, env, program=(str(TESTS / "oracle_evaluation.py"),))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    scores = result(tmp_path / "out", "humaneval_instruct")["scores"]
    assert [score for _, _, score in scores] == [0.0] * 5
    assert planted.read_text() == "still here"


@pytest.mark.slow
def test_two_processes_score_and_write_the_same_as_one(place, tmp_path):
    partial = tmp_path / "partial"  # the second process lacks a data set: neither waits, and the others are made
    partial.mkdir()
    for name in ("openai", "Rowan"):
        (partial / name).symlink_to(place.data / name)
    student = shutil.copytree(place.student, tmp_path / "short")
    described = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 256}))  # prompts are cut
    given = ["--student", student, "--limit", 5, "--set", "decoding.max_new_tokens=24"]
    given += ["--set", "decoding.temperature=0.7", "--set", "evaluation.draws=8"]
    command = [sys.executable, "-m", "tide", "eval", *map(str, given)]
    tasks = "gsm8k_cot,hellaswag_likelihood"
    (port,) = free_ports(1)
    alone = {name: value for name, value in place.env.items() if name not in VARIABLES}
    options = ["--out", tmp_path / "one", "--tasks", tasks, "--data", place.data, "--batch-size", 1]
    jobs = [([*command, *map(str, options)], alone)]
    for rank, data in enumerate([place.data, partial]):
        options = ["--out", tmp_path / "two", "--tasks", f"bbh,{tasks}", "--data", data]
        jobs.append(([*command, *map(str, options)], alone | rank_environment(rank, 2, port)))
    running = [
        subprocess.Popen(job, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for job, env in jobs
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, *[Unavailable.exit_code] * 2], said
    report = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert "bbh: its data set was not found" in report["failed"]["student/bbh"]
    assert sorted(report["students"]["student"]) == ["gsm8k_cot", "hellaswag_likelihood"]
    for name in ("gsm8k_cot", "hellaswag_likelihood"):
        one, two = result(tmp_path / "one", name), result(tmp_path / "two", name)
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["scores"] == two["scores"]
        assert one["truncated_prompts"] == two["truncated_prompts"] >= (name == "gsm8k_cot"), "of all processes"
        found = [*tmp_path.glob(f"one/student/{name}-*.samples.jsonl"), *tmp_path.glob(f"two/student/{name}-*.jsonl")]
        files = [file.read_text() for file in found]
        assert files[0] == files[1]
        assert len(set(files[0].splitlines())) == 5


def test_what_is_missing_is_named_and_what_is_there_is_kept(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place.data / "openai", data / "openai")
    given = ["--student", place.student, "--out", tmp_path / "out", "--limit", 1, "--tasks", "hellaswag,gsm8k_cot"]
    given += ["--set", "decoding.max_new_tokens=4"]
    done = tide_eval([*given, "--data", data], place.env)
    assert done.returncode == Unavailable.exit_code, done.stderr
    assert "student/hellaswag because: hellaswag: its data set was not found below --data" in done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(report["students"]["student"]) == ["gsm8k_cot"]
    assert list(report["failed"]) == ["student/hellaswag"]
    assert report["average"]["student"] is None, "of some benchmarks there is no average"
    assert "What failed" in (tmp_path / "out" / "evaluation.md").read_text()
    before = result(tmp_path / "out", "gsm8k_cot")
    again = tide_eval([*given, "--data", data], place.env)
    assert "student gsm8k_cot: " in again.stderr
    assert ", from gsm8k_cot-" in again.stderr
    assert result(tmp_path / "out", "gsm8k_cot") == before


def test_results_of_other_settings_and_damaged_ones_are_made_again(tmp_path):
    file = tmp_path / "gsm8k_cot.json"
    assert _read_result(file, "a" * 64) is None
    file.write_text(json.dumps({"settings_hash": "a" * 64, "score": 0.5}))
    assert _read_result(file, "a" * 64) == {"settings_hash": "a" * 64, "score": 0.5}
    assert _read_result(file, "b" * 64) is None
    file.write_text(file.read_text()[:-5])
    assert _read_result(file, "a" * 64) is None


def test_a_checkpoint_without_mask_token_is_refused(place, tmp_path):
    student = shutil.copytree(place.student, tmp_path / "student")
    file = student / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("mask_token", None)
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="mask"):
        open_student(tiny_config(tmp_path))


@pytest.mark.slow
def test_lm_evals_own_command_takes_the_model(place, tmp_path):
    arguments = ["run", "--model", "tide", "--model_args", f"pretrained={place.student},draws=4,max_new_tokens=8"]
    arguments += ["--tasks", "hellaswag,gsm8k_cot", "--limit", "1", "--output_path", tmp_path / "results.json"]
    command = [sys.executable, "-m", "tide.student_train.lm_eval_command", *map(str, arguments)]
    done = subprocess.run(command, env=dict(place.env), cwd=place.data, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    told = json.loads(file.read_text())
    assert 0 <= told["results"]["hellaswag"]["acc_norm,none"] <= 1
    assert told["config"]["tide_decoding"]["max_new_tokens"] == 8
    assert told["config"]["tide_evaluation"]["draws"] == 4


def test_unknown_names_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="gsm8k_cot"):
        chosen_benchmarks("tide8", ["gsm8k"], allow_code=False)
    with pytest.raises(ConfigError, match="one suite, tide8"):
        chosen_benchmarks("tide9", [], allow_code=False)


def test_code_runs_with_leave_alone():
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        chosen_benchmarks("tide8", ["humaneval_instruct"], allow_code=False)
    chosen, left_out = chosen_benchmarks("tide8", [], allow_code=False)
    assert [b.name for b in chosen] == EIGHT[:-2]
    assert list(left_out) == EIGHT[-2:]
    assert [b.name for b in chosen_benchmarks("tide8", [], allow_code=True)[0]] == EIGHT


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ([], (False, False)),
        (["--allow-code-execution"], (True, False)),
        (["--allow-code-execution", "--json"], (True, False)),
        (["--allow-code-execution=bubblewrap"], (True, False)),
        (["--allow-code-execution=unsafe-inside-container"], (True, True)),
        (["--allow-code-execution", "unsafe-inside-container"], (True, True)),
    ],
)
def test_leave_to_run_code_is_given_bare_or_with_a_value(given, chosen, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_students", lambda run, out, say: asked.append(run))
    done = CliRunner().invoke(app, ["eval", "--student", "x", "--out", str(tmp_path), *given])
    assert done.exit_code == 0, done.output
    assert [(run.allow_code, run.unsafe_code) for run in asked] == [chosen]


def test_another_way_to_run_code_is_refused(tmp_path):
    for given in (["--allow-code-execution=yes"], ["--allow-code-execution", "yes"]):
        done = CliRunner().invoke(app, ["eval", "--student", "x", "--out", str(tmp_path), *given])
        assert done.exit_code == 2
        assert "unsafe-inside-container" in done.output


@pytest.mark.parametrize(
    ("leave", "expected"),
    [(None, (False, False)), ("0", (False, False)), ("1", (True, False)), ("unsafe-inside-container", (True, True))],
)
def test_lm_evals_own_command_takes_leave_from_the_environment(leave, expected, monkeypatch):
    if leave is None:
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    else:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", leave)
    given = []
    monkeypatch.setattr(
        lm_eval_command, "own_code_eval", lambda metric: given.append(metric) or contextlib.nullcontext()
    )
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    lm_eval_command.main()
    assert [(metric.allowed, metric.unsafe) for metric in given] == [expected]


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'tide-distill\[eval\]'"):
        lm_eval_tasks.require_lm_eval()


def test_the_papers_averages_follow_from_its_scores():
    for column, average in enumerate(PAPER_AVERAGE):
        scores = [b.paper[column] for b in BENCHMARKS if b.in_suite]
        assert sum(scores) / 8 == pytest.approx(average, abs=0.0051), PAPER_COLUMNS[column]
