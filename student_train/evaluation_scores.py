"""Scores of an evaluation, from whatever wrote them: `tide eval`, lm-eval, or a list of tasks by hand -> `TaskScore`s.

    {"students": {"student": {"gsm8k": {"score": 41.2, "stderr": 1.3, "documents": 1319}}}}     tide eval, in per cent
    {"results": {"gsm8k": {"exact_match,none": 0.412, "exact_match_stderr,none": 0.013}}}       lm-eval
    {"tasks": [{"name": "gsm8k", "metric": "exact_match", "value": 0.412, "stderr": 0.013, "n": 1319}]}

Names are a stranger's: who shows them makes them inert.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
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
    entries, unit = list[tuple[str, Any]](), "score"
    if isinstance(students, dict) and isinstance(students.get("student"), dict):
        entries, unit = list(students["student"].items()), "score, %"
    elif isinstance(tasks, dict | list):
        entries = list(tasks.items()) if isinstance(tasks, dict) else [("", one) for one in tasks]
    elif isinstance(results, dict):
        yield from _of_lm_eval(results, tree.get("n-samples"))
        return
    for name, entry in entries:
        value = _first(entry, _VALUES) if isinstance(entry, dict) else None
        if value is not None:
            name = next((entry[key] for key in _NAMES if isinstance(entry.get(key), str)), name) or "?"
            metric, count = entry.get("metric"), _first(entry, _COUNTS)
            yield TaskScore(
                name, metric if isinstance(metric, str) else unit, value, _first(entry, ("stderr",)),
                None if count is None else int(count),
            )  # fmt: skip


def _of_lm_eval(results: Mapping[str, Any], counts: Any) -> Iterator[TaskScore]:
    """lm-eval's own layout: `metric,filter` -> value, `metric_stderr,filter` -> its error."""
    for name, entry in results.items():
        count = counts.get(name) if isinstance(counts, dict) else None
        asked = _first(count, ("effective",)) if isinstance(count, dict) else None
        for key in entry if isinstance(entry, dict) else ():
            metric, comma, kept = key.partition(",")
            value = _first(entry, (key,))
            if comma and not metric.endswith("_stderr") and value is not None:
                shown = metric + (f" ({kept})" if kept != "none" else "")
                error = _first(entry, (f"{metric}_stderr,{kept}",))
                yield TaskScore(name, shown, value, error, None if asked is None else int(asked))


def _first(entry: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """The first of these that is a finite number; None: none is, such as lm-eval's "N/A"."""
    for value in map(entry.get, keys):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None
