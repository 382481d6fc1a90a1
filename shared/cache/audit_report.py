"""What an audit found (student_train/audit.py) -> lines for a terminal, sections and plots for the page of a report.

Columns are bins of the masked share of a response, all of them together first.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from ..shown_text import bytes_text, terminal_text
from .plots import Plot, over_bins

CELL_WIDTH = 15
NOTES = {
    "unigram": "stand-in: says the audited targets' mean distribution everywhere, as a fresh student does",
    "halfway": "stand-in: geometric mean of unigram and the teacher, as a student midway in training",
}


def audit_text(audit: Mapping[str, Any]) -> Text:
    """The audit as a table for a terminal: what is stored, then one block for each student."""
    width = max(len(name) for name, _ in [*_stored(audit), *(row for one in audit["students"] for row in _losses(one))])
    header = Text(f"  {'masked share':{width}}", "dim")
    header.append("".join(f"{name:>{CELL_WIDTH}}" for name in ("all", *_bins(audit))))
    lines = [Text("Audit", "bold"), *(Text(f"  {line}") for line in _words(audit)), Text(), header]
    lines += _rows(_stored(audit), width)
    for student in audit["students"]:
        name = _name(student)
        lines += [Text(), Text(f"Gradients at {name}'s logits against the dense loss: cosine / norm ratio", "bold")]
        lines += [Text(f"  {NOTES[name]}", "dim")] if name in NOTES else []
        lines += _rows(_losses(student), width)
    return Text("\n").join(lines)


def audit_sections(audit: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """The same as titled names and values, all bins together, for the page."""
    yield "Audit", {"stored in full": " ".join(_words(audit)), **{name: cells[0] for name, cells in _stored(audit)}}
    for student in audit["students"]:
        rows = {name: cells[0] for name, cells in _losses(student)}
        yield f"Gradients at {_name(student)}'s logits: cosine / norm ratio", rows


def audit_plots(audit: Mapping[str, Any]) -> Iterator[Plot]:
    """Of the last student, the least like a fresh one: cosine of the gradient of KL, by mask ratio and temperature."""
    student = audit["students"][-1]
    for loss in student["losses"]:
        values = loss["cosine"]["by_bin"]
        if loss["loss"] != "kl" or values.count(None) == len(values):
            continue
        shown = [f"{_number(v, '.4f')} over {n:,} targets" for v, n in zip(values, audit["bin_targets"], strict=True)]
        yield over_bins(
            f"audit_kl_{loss['temperature']:g}", f"Gradient of KL at T = {loss['temperature']:g}: stored against dense",
            f"Cosine at the logits of {_name(student)}, on {audit['compared']:,} audited targets.", audit["bin_edges"],
            values, shown, "cosine", symbol="masked share", x_label="masked share of the response", to_one=True,
        )  # fmt: skip


def _words(audit: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{audit['targets']:,} targets are stored in full, each drawn with probability {audit['share']:g}: "
        f"{audit['support_tokens']:,} tokens each, {bytes_text(audit['bytes'])} together."
    )
    if audit["compared"] < audit["targets"]:
        yield f"Evenly spaced {audit['compared']:,} of them are compared."


def _stored(audit: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """How many targets, and at every temperature tails and divergences."""
    rows = [("targets", [f"{count:,}" for count in (audit["compared"], *audit["bin_targets"])])]
    for one in audit["temperatures"]:
        for key, title, form in (
            ("tail_stored", "tail mass stored", ".4f"), ("tail_exact", "tail mass exact", ".4f"),
            ("tail_error", "largest difference", ".1e"), ("kl_mean", "KL(exact || stored)", ".1e"),
            ("kl_p99", "its 99th percentile", ".1e"),
        ):  # fmt: skip
            rows.append((f"{title}, T = {one['temperature']:g}", [_number(v, form) for v in _values(one[key])]))
    return rows


def _losses(student: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for loss in student["losses"]:
        weight = "" if loss["tidal_lambda"] is None else f", lambda = {loss['tidal_lambda']:g}"
        pairs = zip(_values(loss["cosine"]), _values(loss["norm_ratio"]), strict=True)
        cells = ["-" if None in pair else f"{_number(pair[0], '.4f')} / {_number(pair[1], '.3f')}" for pair in pairs]
        rows.append((f"{loss['loss']}, T = {loss['temperature']:g}{weight}", cells))
    return rows


def _rows(rows: Sequence[tuple[str, Sequence[str]]], width: int) -> Iterator[Text]:
    for name, cells in rows:
        yield Text(f"  {name:{width}}", "dim").append("".join(f"{cell:>{CELL_WIDTH}}" for cell in cells), "default")


def _values(over: Mapping[str, Any]) -> list[float | None]:
    """All bins together, then one by one."""
    return [over["all"], *over["by_bin"]]


def _bins(audit: Mapping[str, Any]) -> list[str]:
    return [f"{low:g} to {high:g}" for low, high in pairwise(audit["bin_edges"])]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _name(student: Mapping[str, Any]) -> str:
    return terminal_text(student["name"], max_chars=80).replace("\n", " ")
