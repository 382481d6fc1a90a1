"""A cache's description (inspect.py) -> the data of its plots: values, labels and axes, but no ink.

svg.py draws them into the report, png.py into files; both show the same numbers, which are those of `describe_cache`.
A plot that a cache has no data for becomes an `Absent` that says why.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..shown_text import bytes_text, number_text, percent_text, terminal_text

MAX_COLUMNS = 32
"""Columns of a plot; longer distributions are grouped, or end with an "or more"."""
MAX_ROWS = 24
MAX_TICKS = 12
MAX_NAME_CHARS = 24
HEAD_OF_DISTRIBUTION = 0.995
"""A distribution of which this share lies in few columns shows them one by one, and the rest as one."""
FLATTEST_AXIS = 0.9
"""The axis of a probability begins here or lower: one that is 1 everywhere is a line at the top."""
MAX_VALUE = 1e18
"""A manifest that lies may hold any number; what is drawn stays between 0 and this."""

Theme = Literal["noise", "teacher", "storage"]
COLOURS: dict[Theme, str] = {"noise": "#5b7fb4", "teacher": "#2b8a81", "storage": "#b98a45"}
INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e7ec"
PART_COLOURS = (COLOURS["teacher"], "#9fcdc6", "#d9dee5")


@dataclass(frozen=True)
class Plot:
    """One picture, without its ink.

    Args:
        name: of its file, without suffix; note: one sentence below the title.
        shape: "columns" stand on the x axis, "line" joins the columns' middles, "rows" are horizontal bars with a name
            each, "parts" share one bar.
        labels, values, shown: one each per mark: what it is about, how much (None: nothing known), how much in words.
        ticks: places on the x axis, in columns from the left edge; y_ticks: ascending, its ends are the axis' ends.
        cells: of "rows": a heading, then one tuple each of what stands beside a bar.
        others: of "line": further lines, dashed, each with its name and values.
    """

    name: str
    title: str
    note: str
    theme: Theme
    shape: Literal["columns", "line", "rows", "parts"]
    labels: tuple[str, ...]
    values: tuple[float | None, ...]
    shown: tuple[str, ...]
    x_label: str = ""
    y_label: str = ""
    ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    cells: tuple[tuple[str, ...], ...] = ()
    others: tuple[tuple[str, tuple[float | None, ...]], ...] = ()


@dataclass(frozen=True)
class Absent:
    """A plot that this cache has no data for, and why."""

    name: str
    title: str
    why: str


def make_plots(description: Mapping[str, Any]) -> list[Plot | Absent]:
    """All plots of `describe_cache`'s answer, in the order in which they are shown."""
    return list(_all_plots(description))


def _all_plots(d: Mapping[str, Any]) -> Iterator[Plot | Absent]:
    kind, edges, chunks, targets = d["signal"]["kind"], d["t"]["bin_edges"], d["chunks"], d["targets"]
    no_targets = f"signal {kind} keeps no distributions over tokens" if targets is None else "it has no targets"
    no_chunks = f"signal {kind} keeps no chunks" if chunks is None else "it has no chunks"
    yield _histogram("t", "Views by diffusion time", d["t"]["views"], edges, "diffusion time t", "t")
    yield _histogram(
        "mask_ratio", "Views by mask ratio", d["t"]["mask_ratio_views"], edges, "masked share of the response", "ratio"
    )
    if d["verdict"]:
        yield from _clean_tokens(d["verdict"], edges)
    for name, title, what, unit in (
        (
            "entropy",
            "Entropy of the teacher by t",
            "Mean over targets, somewhere between the lines: how the tokens not kept share their mass is unknown.",
            " nats",
        ),
        ("head_mass", "Head mass by t", "Probability of the tokens kept, mean over targets.", ""),
    ):
        if targets and any(value is not None for value in targets["by_t"][name]):
            yield _by_t(name, title, what, targets["by_t"], edges, unit)
        else:
            yield Absent(name, title, no_targets)
    if chunks and sum(chunks["length_counts"]):
        yield _distribution(
            "chunk_length", "Chunk lengths", f"{number_text(chunks['mean_length'], 2)} student tokens on average.",
            chunks["length_counts"], "student tokens in a chunk", "chunks",
        )  # fmt: skip
    else:
        yield Absent("chunk_length", "Chunk lengths", no_chunks)
    if targets and sum(targets["k_counts"]):
        yield _distribution(
            "k", "Tokens kept per target", f"k = {number_text(targets['mean_k'], 1)} on average.",
            targets["k_counts"], "tokens kept (k)", "targets",
        )  # fmt: skip
    else:
        yield Absent("k", "Tokens kept per target", no_targets)
    if targets and chunks and chunks["count"]:
        yield _one_to_one(chunks, targets)
    else:
        yield Absent("one_to_one", "One-to-one chunks", no_targets if chunks and chunks["count"] else no_chunks)
    if d.get("audit"):
        from .audit_report import audit_plots

        yield from audit_plots(d["audit"])
    yield _column_bytes(d["size"])


def _histogram(
    name: str, title: str, counts: Sequence[int], edges: Sequence[float], x_label: str, symbol: str
) -> Plot | Absent:
    """Counts of views by bin of [0, 1]."""
    if not sum(counts):
        return Absent(name, title, "it has no views")
    total = sum(counts)
    return Plot(
        name, title, f"{total:,} view{'' if total == 1 else 's'}.", "noise", "columns",
        labels=_bin_names(edges, symbol),
        values=_drawn(counts),
        shown=tuple(f"{count:,} views ({count / total:.1%})" for count in counts),
        x_label=x_label, y_label="views", ticks=_edge_ticks(edges), y_ticks=axis_ticks(0, max(counts), whole=True),
    )  # fmt: skip


def _by_t(
    name: str, title: str, note: str, by_t: Mapping[str, Sequence[Any]], edges: Sequence[float], unit: str
) -> Plot:
    """A mean over targets by bin of t; the axis of a probability ends at 1 and need not begin at 0."""
    values = _drawn(by_t[name])
    others = (("at most", _drawn(by_t["entropy_most"])),) if name == "entropy" else ()
    known = [value for value in (*values, *(v for _, more in others for v in more)) if value is not None]
    low, high = (0.0, max(known)) if unit else (min(FLATTEST_AXIS, *known), max(1.0, *known))
    return Plot(
        name, title, note, "teacher", "line",
        labels=_bin_names(edges, "t"),
        values=values,
        shown=tuple(
            f"{number_text(value)}{unit} over {count:,} targets"
            for value, count in zip(values, by_t["targets"], strict=True)
        ),
        x_label="diffusion time t", y_label=unit.strip() or "probability", ticks=_edge_ticks(edges),
        y_ticks=axis_ticks(low, high), others=others,
    )  # fmt: skip


def _clean_tokens(said: Mapping[str, Any], edges: Sequence[float]) -> Iterator[Plot]:
    """How well the teacher knows the clean tokens, by t, beside a unigram model of the text."""
    by_t, counts = said["by_t"], said["by_t"]["answered"]
    loss = [None if value is None else -value for value in by_t["logp"]]
    for name, title, values, unigram, y_label in (
        ("accuracy", "Clean tokens found, by t", by_t["accuracy"], said["unigram_accuracy"], "top-1 accuracy"),
        ("clean_nll", "Negative log-likelihood of clean tokens by t", loss, -said["unigram_logp"], "nats a token"),
    ):
        values, line = _drawn(values), _drawn([unigram] * len(values))
        yield Plot(
            name, title, "Mean over the teacher's tokens; dashed: a unigram model of the text.", "teacher", "line",
            labels=_bin_names(edges, "t"), values=values,
            shown=tuple(f"{number_text(v)} over {n:,} tokens" for v, n in zip(values, counts, strict=True)),
            x_label="diffusion time t", y_label=y_label, ticks=_edge_ticks(edges),
            y_ticks=axis_ticks(0.0, max(0.01, *(v for v in (*values, *line) if v is not None))),
            others=(("unigram", line),),
        )  # fmt: skip


def _distribution(name: str, title: str, note: str, counts: Sequence[int], x_label: str, unit: str) -> Plot:
    """How often 0, 1, 2, ... occur; a leading 0 that never occurs is left out."""
    first = 0 if counts[0] else 1
    groups = _groups(counts, first)
    total, values = sum(counts), [sum(counts[low:high]) for low, high in groups]
    names = [f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}" for low, high in groups]
    if _has_rest(groups):
        names[-1] = f"{groups[-1][0]:,} or more"
    return Plot(
        name, title, note, "teacher", "columns",
        labels=tuple(f"{label} {'token' if label == '1' else 'tokens'}" for label in names),
        values=_drawn(values),
        shown=tuple(f"{value:,} {unit} ({value / total:.1%})" for value in values),
        x_label=x_label, y_label=unit,
        ticks=tuple(_group_ticks(groups)), y_ticks=axis_ticks(0, max(values), whole=True),
    )  # fmt: skip


def _has_rest(groups: Sequence[tuple[int, int]]) -> bool:
    """Does the last column stand for all that is left?"""
    widths = [high - low for low, high in groups]
    return len(widths) > 1 and widths[-1] > widths[-2]


def _group_ticks(groups: Sequence[tuple[int, int]]) -> Iterator[tuple[float, str]]:
    """Round values below their columns, so few that they stay apart; the column of all that is left has its own."""
    stride = next(s for s in (1, 2, 5, 10) if len(groups) <= s * MAX_TICKS)
    last, rest = len(groups) - 1, _has_rest(groups)
    for place, (low, high) in enumerate(groups):
        is_round = not (low if high == low + 1 else place) % stride
        if rest and place == last:
            yield place + 0.5, f"{low}+"
        elif is_round and not (rest and place > last - stride and stride > 1):
            yield place + 0.5, f"{low}"


def _groups(counts: Sequence[int], first: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of values, one per column."""
    last = max(first, *(value for value, count in enumerate(counts) if count)) + 1
    if last - first <= MAX_COLUMNS:
        return [(value, value + 1) for value in range(first, last)]
    head = sum(counts[: first + MAX_COLUMNS - 1])
    if head >= HEAD_OF_DISTRIBUTION * sum(counts):
        cut = first + MAX_COLUMNS - 1
        while cut > first + 1 and sum(counts[: cut - 1]) >= HEAD_OF_DISTRIBUTION * sum(counts):
            cut -= 1
        return [*((value, value + 1) for value in range(first, cut)), (cut, last)]
    width = math.ceil((last - first) / MAX_COLUMNS)
    return [(low, low + width) for low in range(first, last, width)]


def _one_to_one(chunks: Mapping[str, Any], targets: Mapping[str, Any]) -> Plot:
    """Which chunks carry a token-level target: those of one token on each side, inside the loss support."""
    count, matched = chunks["count"], targets["count"]
    lone = [*chunks["length_counts"], 0, 0][1]
    labels = ["one to one: a token-level target"]
    labels += ["one student token, several of the teacher's or none in the support", "several student tokens"]
    values = [matched, lone - matched, count - lone]
    if min(values) < 0:  # chunks of a stranger need not be cut as ours are
        labels, values = [labels[0], "all others"], [min(matched, count), max(0, count - matched)]
    return Plot(
        "one_to_one", "One-to-one chunks",
        f"{percent_text(chunks['one_to_one'])} of {count:,} active chunks carry a token-level target.",
        "teacher", "parts",
        labels=tuple(labels),
        values=_drawn(values),
        shown=tuple(f"{value:,} chunks ({value / count:.1%})" for value in values),
    )  # fmt: skip


def _column_bytes(size: Mapping[str, Any]) -> Plot | Absent:
    """Compressed bytes by column, largest first."""
    columns = sorted(size["column_bytes"].items(), key=lambda item: -item[1])
    title, total = "Bytes by column", sum(count for _, count in columns)
    if not total:
        return Absent("column_bytes", title, "it has no rows")
    if len(columns) > MAX_ROWS:
        rest = columns[MAX_ROWS - 1 :]
        columns = [*columns[: MAX_ROWS - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    per_position = max(1, size["masked_positions"])
    return Plot(
        "column_bytes", title,
        f"{bytes_text(total)} of {bytes_text(size['bytes'])} are compressed columns, the rest describes them.",
        "storage", "rows",
        labels=tuple(terminal_text(name, max_chars=MAX_NAME_CHARS) for name, _ in columns),
        values=_drawn([count for _, count in columns]),
        shown=tuple(f"{count:,} bytes" for _, count in columns),
        cells=(
            ("bytes", "per masked position", "share"),
            *((bytes_text(count), f"{count / per_position:,.2f}", f"{count / total:.1%}") for _, count in columns),
        ),
    )  # fmt: skip


def axis_ticks(low: float, high: float, *, whole: bool = False) -> tuple[tuple[float, str], ...]:
    """Four to seven round numbers that enclose low and high, as (value, text); `whole`: integers only."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (factor * step) <= 5)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
    return tuple((value, _tick_text(value)) for value in values)


def _tick_text(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:,.10g}"


def _edge_ticks(edges: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """The quarters of [0, 1]."""
    quarter = max(1, (len(edges) - 1) // 4)
    return tuple((place, f"{edges[place]:g}") for place in range(0, len(edges), quarter))


def _bin_names(edges: Sequence[float], symbol: str) -> tuple[str, ...]:
    return tuple(f"{low:g} {'<' if low else '≤'} {symbol} ≤ {high:g}" for low, high in pairwise(edges))


def _drawn(values: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if value is None else min(max(value, 0), MAX_VALUE) for value in values)
