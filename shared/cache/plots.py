"""A cache's description (inspect.py) -> its plots: the data of each, drawn for the page of a report or as a PNG file.

The numbers are those of `describe_cache`. A plot that a cache has no data for becomes an `Absent` that says why.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..pictures import PALETTE, bulk, drawing, make_figure, mark_outliers, png_bytes, room, svg_text
from ..shown_text import bytes_text, number_text, percent_text, terminal_text
from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
"""A manifest that lies may hold any number; what is drawn stays between -1, a cosine's least, and this."""

WIDTH, WIDE, HEIGHT, ROW_HEIGHT = 520, 1080, 216, 22
"""Points, which are the pixels of a page at its full width."""
CELL_PLACES = (0.80, 0.93, 1.0)
"""Right edges of the numbers beside a bar, as shares of the axes."""

Theme = Literal["noise", "teacher", "storage"]


@dataclass(frozen=True)
class Plot:
    """One picture.

    Args:
        name: of its file, without suffix; note: one sentence below the title.
        shape: "columns" stand on the x axis, "line" joins the columns' middles, "rows" are horizontal bars with a name
            each, "parts" share one bar.
        labels, values, shown: one each per mark: what it is about, how much (None: nothing known), how much in words.
        ticks: places on the x axis, in columns from the left edge.
        to_one: the y axis is that of a probability or cosine: it ends at 1, and need not begin at 0.
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
    to_one: bool = False
    cells: tuple[tuple[str, ...], ...] = ()
    others: tuple[tuple[str, tuple[float | None, ...]], ...] = ()

    @property
    def marks(self) -> list[tuple[float | None, str]]:
        """Value and words of each mark that is drawn."""
        known = zip(self.values, self.labels, self.shown, strict=True)
        return [(value, f"{label}: {shown}") for value, label, shown in known
                if value is not None or self.shape != "line"]  # fmt: skip

    @property
    def alt(self) -> str:
        """What the picture shows, for who cannot see it."""
        marks = sorted(self.marks, key=lambda mark: mark[0] or 0)
        ends = [f"Most: {marks[-1][1]}.", f"Least: {marks[0][1]}."] if len(marks) > 1 else [f"{marks[0][1]}."]
        return " ".join([f"{self.title}.", self.note, *ends])


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
    for name, title, counts, symbol in (
        ("t", "Views by diffusion time", d["t"]["views"], "t"),
        ("mask_ratio", "Views by mask ratio", d["t"]["mask_ratio_views"], "ratio"),
    ):
        if total := sum(counts):
            note, shown = (
                f"{total:,} view{'' if total == 1 else 's'}.",
                [f"{n:,} views ({n / total:.1%})" for n in counts],
            )
            x_label = "diffusion time t" if symbol == "t" else "masked share of the response"
            yield over_bins(name, title, note, edges, counts, shown, "views", symbol=symbol, x_label=x_label,
                             theme="noise", shape="columns")  # fmt: skip
        else:
            yield Absent(name, title, "it has no views")
    if said := d["verdict"]:
        by_t, note = said["by_t"], "Mean over the teacher's tokens; dashed: a unigram model of the text."
        loss = [None if value is None else -value for value in by_t["logp"]]
        for name, title, values, unigram, y_label in (
            ("accuracy", "Clean tokens found, by t", by_t["accuracy"], said["unigram_accuracy"], "top-1 accuracy"),
            ("clean_nll", "Negative log-likelihood of clean tokens by t", loss, -said["unigram_logp"], "nats a token"),
        ):
            shown = [f"{number_text(v)} over {n:,} tokens" for v, n in zip(values, by_t["answered"], strict=True)]
            others = (("unigram", _drawn([unigram] * len(values))),)
            yield over_bins(name, title, note, edges, values, shown, y_label, others=others)
    between = "Mean over targets, somewhere between the lines: how the tokens not kept share their mass is unknown."
    for name, title, note, unit in (
        ("entropy", "Entropy of the teacher by t", between, " nats"),
        ("head_mass", "Head mass by t", "Probability of the tokens kept, mean over targets.", ""),
    ):
        if targets and any(value is not None for value in targets["by_t"][name]):
            values, counts = targets["by_t"][name], targets["by_t"]["targets"]
            shown = [f"{number_text(v)}{unit} over {n:,} targets" for v, n in zip(_drawn(values), counts, strict=True)]
            others = (("at most", _drawn(targets["by_t"]["entropy_most"])),) if unit else ()
            yield over_bins(name, title, note, edges, values, shown, unit.strip() or "probability", others=others,
                             to_one=not unit)  # fmt: skip
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


def over_bins(
    name: str, title: str, note: str, edges: Sequence[float], values: Sequence[float | None], shown: Sequence[str],
    y_label: str, *, symbol: str = "t", x_label: str = "diffusion time t", theme: Theme = "teacher",
    shape: Literal["columns", "line"] = "line", **more: Any,
) -> Plot:  # fmt: skip
    """Counts or means by bin of [0, 1], with ticks at its quarters."""
    quarter = max(1, (len(edges) - 1) // 4)
    return Plot(
        name, title, note, theme, shape,
        labels=tuple(f"{low:g} {'<' if low else '≤'} {symbol} ≤ {high:g}" for low, high in pairwise(edges)),
        values=_drawn(values), shown=tuple(shown), x_label=x_label, y_label=y_label,
        ticks=tuple((place, f"{edges[place]:g}") for place in range(0, len(edges), quarter)), **more,
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
        ticks=tuple(_group_ticks(groups)),
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
    for cut in range(first + 1, first + MAX_COLUMNS):
        if sum(counts[:cut]) >= HEAD_OF_DISTRIBUTION * sum(counts):
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
        labels=tuple(_label(name) for name, _ in columns),
        values=_drawn([count for _, count in columns]),
        shown=tuple(f"{count:,} bytes" for _, count in columns),
        cells=(
            ("bytes", "per masked position", "share"),
            *((bytes_text(count), f"{count / per_position:,.2f}", f"{count / total:.1%}") for _, count in columns),
        ),
    )  # fmt: skip


def _label(name: str) -> str:
    """A stranger's name on one line, with characters only that an SVG may hold."""
    return re.sub("[\n\t\ufffe\uffff]", "�", terminal_text(name, max_chars=MAX_NAME_CHARS))


def _drawn(values: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if value is None else min(max(value, -1), MAX_VALUE) for value in values)


def draw_svg(plot: Plot) -> str:
    """One <svg> element for a page, which shows title and note itself; `plot` may hold a stranger's text."""
    with drawing():
        return svg_text(draw(plot, titled=False), plot.name, plot.alt, plot.marks)


def write_pngs(description: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write `folder / NAME.png` for each plot that `describe_cache`'s answer has data for; older ones are replaced.

    Returns: their paths.
    Raises: OutputError: a file cannot be written.
    """
    written = []
    with drawing():
        for plot in make_plots(description):
            if isinstance(plot, Plot):
                written.append(Path(folder) / f"{plot.name}.png")
                atomic_write(written[-1], png_bytes(draw(plot), plot.alt))
    return written


def draw(plot: Plot, *, titled: bool = True) -> "Figure":
    """The plot as a figure, inside `drawing`; the places that a mouse can point at have gids (see `svg_text`)."""
    rows = len(plot.values)
    size = {"rows": (WIDE, 30 + ROW_HEIGHT * rows), "parts": (WIDE, 44 + ROW_HEIGHT * rows)}
    figure = make_figure(*size.get(plot.shape, (WIDTH, HEIGHT)), *((plot.title, plot.note) if titled else ()))
    axes = figure.add_subplot()
    {"columns": _draw_over_x, "line": _draw_over_x, "rows": _draw_rows, "parts": _draw_parts}[plot.shape](axes, plot)
    return figure


def _draw_over_x(axes: "Axes", plot: Plot) -> None:
    """Bars from zero, or points and lines that break where a value is missing and show an outlier at the edge."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    colour, muted, bars = PALETTE[plot.theme][0], PALETTE["muted"][0], plot.shape == "columns"
    places = [place + 0.5 for place in range(len(plot.values))]
    known = [value for _, line in (("", plot.values), *plot.others) for value in line if value is not None]
    lowest, highest = (0.0, max(known)) if bars else bulk(known)
    if plot.to_one:
        low, high = room([min(FLATTEST_AXIS, lowest), max(1.0, *known)], known)[0], max(1.0, *known)
    else:
        low, high = 0.0, max(1e-6, room([0.0, highest], known)[1])
    axes.set_xlim(0, len(places))
    axes.set_ylim(low, high)
    axes.grid(axis="y")
    axes.set_xticks([place for place, _ in plot.ticks], [text for _, text in plot.ticks])
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=bars, steps=[1, 2, 2.5, 5, 10]))
    if high >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(plot.x_label)
    axes.set_title(plot.y_label, loc="left", fontsize=10.5, color=muted)
    if bars:
        axes.bar(places, [value or 0 for value in plot.values], width=0.84, color=colour)
    for name, line in () if bars else (("", plot.values), *plot.others):
        look = {"linestyle": (0, (5, 3)), "linewidth": 1.3} if name else {"marker": "o", "linewidth": 1.8}
        axes.plot(places, [math.nan if v is None else v for v in line], color=colour, markersize=5, **look)
        points = [(x, value) for x, value in zip(places, line, strict=True) if value is not None]
        mark_outliers(axes, points, colour)
        if name and points:
            axes.annotate(name, (points[-1][0], min(points[-1][1], high)), (0, 4), textcoords="offset points",
                          ha="right", fontsize=10, color=muted)  # fmt: skip
    pointed = [x for x, value in zip(places, plot.values, strict=True) if bars or value is not None]
    _pointed_at(axes.bar(pointed, high - low, 1, low, color="none"))


def _draw_rows(axes: "Axes", plot: Plot) -> None:
    """Name, bar and numbers in a line each; the numbers have headings."""
    places = range(len(plot.values))
    values = [value or 0 for value in plot.values]
    largest = max(values) or 1
    axes.barh(places, values, height=0.64, color=PALETTE[plot.theme][0])
    width = largest / 0.72
    for row, cells in enumerate(plot.cells):
        for right, text in zip(CELL_PLACES, cells, strict=True):
            axes.text(right * width, row - 1, text, ha="right", va="center_baseline", fontsize=10.5,
                      color=PALETTE["ink" if row else "muted"][0])  # fmt: skip
    _pointed_at(axes.barh(places, width, 1, color="none"))
    axes.set_xlim(0, width)
    axes.set_ylim(len(values) - 0.5, -1.5)
    axes.set_yticks(places, plot.labels)
    axes.tick_params(axis="y", colors=PALETTE["ink"][0])
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_parts(axes: "Axes", plot: Plot) -> None:
    """One bar in pieces, and a line of its key for each below it."""
    total, left = sum(value or 0 for value in plot.values) or 1, 0.0
    axes.set_xlim(0, 1)
    axes.set_ylim(len(plot.values) + 0.5, -1.1)
    axes.set_axis_off()
    pointed = []
    for row, (role, value, (_, words)) in enumerate(
        zip(("teacher", "part", "rest"), plot.values, plot.marks, strict=False)
    ):
        share, colour = (value or 0) / total, PALETTE[role][0]
        axes.barh(-0.4, share, 1.2, left, color=colour, edgecolor=PALETTE["paper"][0], linewidth=1.5)
        pointed += axes.barh(-0.4, share, 1.2, left, color="none")
        axes.barh(row + 1, 0.011, 0.5, color=colour)
        axes.text(0.018, row + 1, words, va="center_baseline")
        left += share
    _pointed_at(pointed)


def _pointed_at(patches: Iterable[Any]) -> None:
    for number, patch in enumerate(patches):
        patch.set_gid(f"mark-{number}")
