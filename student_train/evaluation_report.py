"""Results of `tide eval` beside the paper's: JSON for programs, Markdown for people, a picture for both.

One column per student with standard errors over documents, the gain of one over the other paired by document, the
paper's columns, and below them everything in which this run is not the paper's protocol. An average is taken over the
whole suite or not at all.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.cache.files import atomic_write, readable_json
from ..shared.pictures import PALETTE, arm_colour, drawing, make_figure, png_bytes
from .comparison import standard_error
from .tide8 import (
    BENCHMARKS,
    PAPER_AVERAGE,
    PAPER_BEST,
    PAPER_CE_ONLY,
    PAPER_COLUMNS,
    PAPER_SOURCE,
    Benchmark,
)

Results = Mapping[str, Mapping[str, Any]]
_TITLES = {"student": "this student", "compare": "CE-only student"}
_FROM_TRAINING = (
    "blocks count from the prompt's first token, as in training; the paper pads prompts so that answers begin a block "
    "(decoding.prompt_alignment=boundary)"
)


def write_report(out: Path, facts: Mapping[str, Any], benchmarks: Sequence[Benchmark], results: Results) -> dict:
    """Write evaluation.json, evaluation.md and evaluation.png.

    Args: facts: of the run. results: by student (`student`, `compare`) and benchmark.
    Returns: the content of evaluation.json.
    """
    report = describe(facts, benchmarks, results)
    atomic_write(out / "evaluation.json", readable_json(report))
    atomic_write(out / "evaluation.md", markdown(report).encode())
    if any(report["students"].values()):
        atomic_write(out / "evaluation.png", picture(report))
    return report


def describe(facts: Mapping[str, Any], benchmarks: Sequence[Benchmark], results: Results) -> dict[str, Any]:
    """The content of evaluation.json: scores in per cent."""
    rows = [b for b in BENCHMARKS if b in benchmarks or b.name in facts["left_out"]]
    students = {
        student: {
            name: {
                "score": 100 * result["score"],
                "stderr": None if result["stderr"] is None else 100 * result["stderr"],
                **{key: result[key] for key in ("documents", "seconds", "truncated_prompts")},
            }
            for name, result in found.items() if result
        }
        for student, found in results.items()
    }  # fmt: skip
    both = [b.name for b in rows if all(results.get(s, {}).get(b.name) for s in _TITLES)]
    return {
        **facts,
        "students": students,
        "average": {student: _average(scores) for student, scores in students.items()},
        "gain": {name: _gain(results["student"][name], results["compare"][name]) for name in both},
        "paper": {
            "source": PAPER_SOURCE,
            "scores": {b.name: dict(zip(PAPER_COLUMNS, b.paper, strict=True)) for b in rows if b.paper},
            "average": dict(zip(PAPER_COLUMNS, PAPER_AVERAGE, strict=True)),
        },
        "titles": {b.name: b.title for b in rows},
        "differences": _differences(facts, rows, results),
    }


def _average(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Of the eight; None unless all are there."""
    rows = [scores.get(b.name) for b in BENCHMARKS if b.in_suite]
    there = [row for row in rows if row is not None]
    if len(there) < len(rows):
        return None
    errors = [row["stderr"] for row in there]
    error = None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(there)
    return {"score": sum(row["score"] for row in there) / len(there), "stderr": error}


def _gain(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Per cent over the other student, paired by document; None if they were not asked the same."""
    ours, theirs = ({(task, number): score for task, number, score in r["scores"]} for r in (result, other))
    if ours.keys() != theirs.keys():
        return None
    paired = 100 * np.array([ours[key] - theirs[key] for key in ours])
    return {"gain": float(paired.mean()), "stderr": standard_error(paired)}


def _differences(facts: Mapping[str, Any], rows: Sequence[Benchmark], results: Results) -> list[str]:
    """What is not as in the paper, in words."""
    lines = [f"{b.title}: {b.remark}" for b in rows if b.remark]
    if facts["limit"] is not None:
        lines.insert(0, f"a limit of {facts['limit']} documents per task, and per subject of tasks that have subjects")
    lines += [f"{b.title}: not run ({facts['left_out'][b.name]})" for b in rows if b.name in facts["left_out"]]
    if facts["code_execution"]:
        lines.append(f"code that a student wrote was shut in by {facts['code_execution']}")
    decoding: dict[str, set[str]] = defaultdict(set)
    there = [(s, row, found[row.name]) for s, found in results.items() for row in rows if found.get(row.name)]
    for student, row, result in there:
        settings = result["settings"]["decoding"]
        for name, wanted in row.decoding.items() if row.in_suite else ():  # a likelihood is not written
            if settings[name] != wanted:
                decoding[f"decoding.{name} = {settings[name]}, not the protocol's"].add(row.title)
        if settings["threshold"] is not None:
            decoding[f"decoding.threshold = {settings['threshold']}: several tokens a step"].add(row.title)
        if settings["prompt_alignment"] == "training":
            decoding[_FROM_TRAINING].add("all")
        if result["documents"] < row.documents:
            lines.append(f"{row.title}: {result['documents']:,} of {row.documents:,} documents")
        if result["truncated_prompts"]:
            lines.append(
                f"{row.title}, {_TITLES[student]}: {result['truncated_prompts']:,} prompts lost their beginning, as "
                "they have more tokens than the student positions (evaluation.long_inputs)"
            )
    lines += [f"{what}: {', '.join(sorted(where))}" for what, where in decoding.items()]
    return list(dict.fromkeys(lines))


def markdown(report: Mapping[str, Any]) -> str:
    """evaluation.md."""
    students = [s for s in _TITLES if s in report["students"]]
    compared = len(students) > 1
    heads = ["benchmark", *(_TITLES[s] for s in students), *(["gain"] if compared else []), *PAPER_COLUMNS]
    lines = [f"# {report['suite']}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, title in report["titles"].items():
        cells = [_cell(report["students"][s].get(name), "score") for s in students]
        cells += [_cell(report["gain"].get(name), "gain")] if compared else []
        paper = report["paper"]["scores"].get(name, {})
        cells += [f"{paper[column]:.2f}" if paper else "" for column in PAPER_COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    cells = [_cell(report["average"][s], "score") for s in students] + ([""] if compared else [])
    cells += [f"{value:.2f}" for value in report["paper"]["average"].values()]
    lines.append(f"| average of the eight | {' | '.join(cells)} |")
    lines += [
        "", "Per cent, ± one standard error over documents (0.00: all scored alike); gains are paired by document. "
        f"Paper: {report['paper']['source']}."
        + (" (n cut): so many prompts lost their beginning." if any(
            row["truncated_prompts"] for scores in report["students"].values() for row in scores.values()) else ""),
    ]  # fmt: skip
    for title, content in (
        ("What differs from the paper's protocol", report["differences"]),
        ("What failed", [f"{name}: {error}" for name, error in report["failed"].items()]),
    ):
        lines += ["", f"## {title}", "", *(f"- {' '.join(line.split())}" for line in content)] if content else []
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None, key: str) -> str:
    if row is None:
        return ""
    sign = "+" if key == "gain" else ""
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.2f}"
    cut = f" ({row['truncated_prompts']:,} cut)" if row.get("truncated_prompts") else ""
    return f"{row[key]:{sign}.2f}{error}{cut}"


def picture(report: Mapping[str, Any]) -> bytes:
    """evaluation.png: a dot per student and benchmark with its standard error, the paper's scores as marks."""
    names = [name for name in report["titles"] if any(name in scores for scores in report["students"].values())]
    students = [s for s in _TITLES if s in report["students"]]
    colours = {"student": PALETTE["teacher"][0], "compare": arm_colour("ce")}
    limit = "" if report["limit"] is None else f", at most {report['limit']} documents per task or subject"
    note = f"Score in per cent{limit}. Bars: plus and minus one standard error over documents. Black: the paper's."
    with drawing():
        figure = make_figure(1000, 300, report["suite"], note)
        axes = figure.add_subplot()
        for number, student in enumerate(students):
            shift = 0.24 * (number - (len(students) - 1) / 2)
            rows = {place + shift: report["students"][student].get(name) for place, name in enumerate(names)}
            there = {x: row for x, row in rows.items() if row}
            scores, errors = ([row[key] or 0.0 for row in there.values()] for key in ("score", "stderr"))
            axes.errorbar(list(there), scores, yerr=errors, fmt="o", markersize=7, elinewidth=2,
                          color=colours[student], label=_TITLES[student])  # fmt: skip
            away, side = (-7, "right") if shift < 0 else (7, "left")
            for point in zip(there, scores, strict=True):
                axes.annotate(f"{point[1]:.1f}", point, (away, 0), textcoords="offset points", ha=side,
                              va="center_baseline", fontsize=9)  # fmt: skip
        for column, mark in ((PAPER_CE_ONLY, "k_"), (PAPER_BEST, "k^")):
            paper = [(place, report["paper"]["scores"][n][column]) for place, n in enumerate(names)
                     if n in report["paper"]["scores"]]  # fmt: skip
            if paper:
                size = 14 if mark == "k_" else 5
                axes.plot(*zip(*paper, strict=True), mark, markersize=size, label=f"paper, {column}", zorder=1)
        axes.set_xticks(range(len(names)), [report["titles"][name] for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(0, None)
        axes.grid(axis="y")
        axes.legend(fontsize=9.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return png_bytes(figure, f"{report['suite']}: {note} evaluation.md has the numbers.")
