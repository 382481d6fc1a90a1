"""A cache's plots (plots.py) as PNG files, for slides and papers: the report's numbers through matplotlib."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import atomic_write
from .plots import COLOURS, GRID, INK, MUTED, PART_COLOURS, Plot, make_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 160
SIZE, WIDE = (5.6, 3.2), 9.0
"""Inches of a plot, and the width of one whose bars have names."""
_STYLE: dict[Any, Any] = {
    "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.axisbelow": True, "grid.color": GRID, "text.parse_math": False,  # a stranger's "$" is a dollar
}  # fmt: skip


def write_pngs(description: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write `folder / NAME.png` for each plot that `describe_cache`'s answer has data for; older ones are replaced.

    Returns: their paths.
    Raises: OutputError: a file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    written = []
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # a stranger's name in a rare script
        for plot in make_plots(description):
            if isinstance(plot, Plot):
                written.append(Path(folder) / f"{plot.name}.png")
                atomic_write(written[-1], _png(plot))
    return written


def _png(plot: Plot) -> bytes:
    import matplotlib.pyplot as plt

    size = {"rows": (WIDE, 0.9 + 0.24 * len(plot.values)), "parts": (WIDE, 1.3 + 0.22 * len(plot.values))}
    figure, axes = plt.subplots(figsize=size.get(plot.shape, SIZE), layout="constrained")
    {"columns": _columns, "line": _line, "rows": _rows, "parts": _parts}[plot.shape](axes, plot)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold", pad=10)
    axes.tick_params(length=0)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr]
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return data.getvalue()


def _columns(axes: "Axes", plot: Plot) -> None:
    places = [place + 0.5 for place in range(len(plot.values))]
    axes.bar(places, [value or 0 for value in plot.values], width=0.84, color=COLOURS[plot.theme])
    _name_axes(axes, plot)


def _line(axes: "Axes", plot: Plot) -> None:
    places = [place + 0.5 for place in range(len(plot.values))]
    values = [float("nan") if value is None else value for value in plot.values]
    axes.plot(places, values, "o-", color=COLOURS[plot.theme], markersize=4, linewidth=1.6, clip_on=False, zorder=3)
    for name, more in plot.others:
        dashed = [float("nan") if value is None else value for value in more]
        axes.plot(places, dashed, "--", color=COLOURS[plot.theme], linewidth=1.2, clip_on=False, label=name)
    if plot.others:
        axes.legend(frameon=False, fontsize=9)
    _name_axes(axes, plot)


def _name_axes(axes: "Axes", plot: Plot) -> None:
    """The same ticks as in the report."""
    axes.grid(axis="y")
    axes.set_xlim(0, len(plot.values))
    axes.set_ylim(plot.y_ticks[0][0], plot.y_ticks[-1][0])
    axes.set_xticks(*_split(plot.ticks))
    axes.set_yticks(*_split(plot.y_ticks))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)


def _split(ticks: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [place for place, _ in ticks], [text for _, text in ticks]


def _rows(axes: "Axes", plot: Plot) -> None:
    values = [value or 0 for value in plot.values]
    axes.barh(range(len(values)), values, height=0.64, color=COLOURS[plot.theme])
    for place, (value, cells) in enumerate(zip(values, plot.cells[1:], strict=True)):
        size, per_position, share = cells
        axes.text(value, place, f"  {size}, {per_position} {plot.cells[0][1]}, {share}", va="center", fontsize=8)
    axes.set_xlim(0, 1.45 * (max(values) or 1))  # room for the numbers beside the longest bar
    axes.set_yticks(range(len(values)), plot.labels)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()


def _parts(axes: "Axes", plot: Plot) -> None:
    left = 0.0
    for colour, value, label, shown in zip(PART_COLOURS, plot.values, plot.labels, plot.shown, strict=False):
        axes.barh(0, value or 0, left=left, height=0.6, color=colour, edgecolor="white", label=f"{label}: {shown}")
        left += value or 0
    axes.set_xlim(0, left or 1)
    axes.set_axis_off()
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize=9, borderaxespad=0)
