"""Scores are read from what tide eval, lm-eval and people write, and from nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from tide.shared.errors import DataError
from tide.student_train.evaluation_scores import TaskScore, find_evaluation, read_scores


def read(tmp_path: Path, tree: Any) -> list[TaskScore]:
    (tmp_path / "scores.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return read_scores(tmp_path / "scores.json")


def test_tide_evals_own_report(tmp_path: Path) -> None:
    scores = {"gsm8k": {"score": 41.2, "stderr": 1.5, "documents": 1319}, "mmlu": {"score": 3, "stderr": None}}
    report = {"students": {"student": scores, "compare": {"gsm8k": {"score": 9.0}}}, "average": {}}
    assert read(tmp_path, report) == [
        TaskScore("gsm8k", "score, %", 41.2, 1.5, 1319), TaskScore("mmlu", "score, %", 3.0, None, None)]  # fmt: skip


def test_a_list_or_a_mapping_of_tasks(tmp_path: Path) -> None:
    whole = {"name": "a", "metric": "exact_match", "value": 0.5, "stderr": 0.1, "n": 10}
    assert read(tmp_path, {"tasks": [whole, {"task": "b", "score": 1}, {"value": "high"}, 7]}) == [
        TaskScore("a", "exact_match", 0.5, 0.1, 10), TaskScore("b", "score", 1.0, None, None)]  # fmt: skip
    assert read(tmp_path, {"tasks": {"c": {"value": 2, "samples": 4}}}) == [TaskScore("c", "score", 2.0, None, 4)]


def test_lm_evals_layout(tmp_path: Path) -> None:
    entry = {
        "alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01,
        "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 3,
    }  # fmt: skip
    tree = {"results": {"gsm8k": entry}, "n-samples": {"gsm8k": {"original": 1319, "effective": 100}}}
    assert read(tmp_path, tree) == [
        TaskScore("gsm8k", "exact_match (strict-match)", 0.25, 0.01, 100), TaskScore("gsm8k", "acc", 0.5, None, 100)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"tasks": 3}', '{"results": {"a": 1}}', '{"students": {}}', '{"tasks": [{"value": NaN}]}',
     '{"tasks": [{"value": true}]}', "[" * 100_000, "{", "\udcff"],
)  # fmt: skip
def test_anything_else_is_told_what_is_expected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scores.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"scores\.json: (holds no scores; expected|cannot be read)"):
        read_scores(file)


def test_an_evaluation_is_found_beside_the_student_and_beside_its_run(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    assert find_evaluation(student) is None
    (tmp_path / "run" / "eval").mkdir()
    file = tmp_path / "run" / "eval" / "evaluation.json"
    file.write_text("{}")
    assert find_evaluation(student) == file
    (student / "evaluation.json").write_text("{}")
    assert find_evaluation(student) == student / "evaluation.json"
