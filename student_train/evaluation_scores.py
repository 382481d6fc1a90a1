"""Scores of an evaluation, from whatever wrote them: `tide eval`, lm-eval, or a list of tasks by hand -> `TaskScore`s.

    {"students": {"student": {"gsm8k": {"score": 41.2, "stderr": 1.3, "documents": 1319}}}}     tide eval, in per cent
    {"results": {"gsm8k": {"exact_match,none": 0.412, "exact_match_stderr,none": 0.013}}}       lm-eval
    {"tasks": [{"name": "gsm8k", "metric": "exact_match", "value": 0.412, "stderr": 0.013, "n": 1319}]}

Names are a stranger's: who shows them makes them inert.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.errors import DataError

MAX_FILE_BYTES = 64 << 20
NEAR = ("evaluation.json", "evaluation/evaluation.json", "eval/evaluation.json")
"""Where an evaluation is looked for, below a student's folder and below its run."""
_NAMES, _VALUES, _COUNTS = ("name", "task", "title"), ("value", "score"), ("n", "documents", "num_documents", "samples")


@dataclass(frozen=True)
class TaskScore:
    """One number: its standard error and the number of documents are None where nobody says."""

    name: str
    metric: str
    value: float
    stderr: float | None
    n: int | None


def find_evaluation(student: Path) -> Path | None:
    """The evaluation beside a student's folder, if there is one."""
    files = [folder / name for folder in (student, student.parent) for name in NEAR]
    return next((file for file in files if file.is_file()), None)


def read_scores(file: Path) -> list[TaskScore]:
    """All scores in a file. Raises: DataError: it cannot be read, or holds none."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{file}: larger than {MAX_FILE_BYTES:,} bytes; give the summary, not the samples")
        tree = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"--evaluation {file}: cannot be read as JSON: {error}") from error
    scores = list(_scores(tree)) if isinstance(tree, dict) else []
    if not scores:
        raise DataError(
            f"--evaluation {file}: holds no scores; expected evaluation.json of tide eval, results of lm-eval, or "
            '{"tasks": [{"name": ..., "metric": ..., "value": ..., "stderr": ..., "n": ...}]}'
        )
    return scores


def _scores(tree: Mapping[str, Any]) -> Iterator[TaskScore]:
    students, tasks, results = tree.get("students"), tree.get("tasks"), tree.get("results")
    if isinstance(students, dict) and isinstance(students.get("student"), dict):
        for name, entry in students["student"].items():
            yield from _entry(name, entry, "score, %")
    elif isinstance(tasks, dict):
        for name, entry in tasks.items():
            yield from _entry(name, entry, "score")
    elif isinstance(tasks, list):
        for entry in tasks:
            yield from _entry("", entry, "score")
    elif isinstance(results, dict):
        counts = tree.get("n-samples")
        for name, entry in results.items():
            yield from _of_lm_eval(name, entry, counts.get(name) if isinstance(counts, dict) else None)


def _entry(name: str, entry: Any, metric: str) -> Iterator[TaskScore]:
    if not isinstance(entry, dict):
        return
    value = next((number for key in _VALUES if (number := _number(entry.get(key))) is not None), None)
    if value is None:
        return
    name = next((entry[key] for key in _NAMES if isinstance(entry.get(key), str)), name) or "?"
    count = next((int(number) for key in _COUNTS if (number := _number(entry.get(key))) is not None), None)
    shown = entry["metric"] if isinstance(entry.get("metric"), str) else metric
    yield TaskScore(name, shown, value, _number(entry.get("stderr")), count)


def _of_lm_eval(name: str, entry: Any, counts: Any) -> Iterator[TaskScore]:
    """lm-eval's own layout: `metric,filter` -> value, `metric_stderr,filter` -> its error."""
    for key, value in entry.items() if isinstance(entry, dict) else ():
        metric, comma, kept = key.partition(",")
        number = _number(value)
        if not comma or metric.endswith("_stderr") or number is None:
            continue
        asked = _number(counts.get("effective")) if isinstance(counts, dict) else None
        error = _number(entry.get(f"{metric}_stderr,{kept}"))
        yield TaskScore(
            name,
            metric + (f" ({kept})" if kept != "none" else ""),
            number,
            error,
            None if asked is None else int(asked),
        )


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, such as lm-eval's "N/A"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
