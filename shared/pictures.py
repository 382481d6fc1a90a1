"""What every picture of tide has in common: one renderer, one style, one colour per arm. Figures -> PNG or inline SVG.

matplotlib draws without a window and without pyplot, with the font it brings along and no settings but these, so the
same data give the same bytes. It is loaded by the first picture and by nothing else. Lengths are points (1/72 inch),
which are pixels of a page.
"""

import atexit
import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .notes import notes_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1f2933", "#e2e7ed"), "muted": ("#5f6b7a", "#9aa6b4"), "grid": ("#e3e7ec", "#343d48"),
    "paper": ("#ffffff", "#1c222a"), "noise": ("#5b7fb4", "#83a5d6"), "teacher": ("#2b8a81", "#4fb3a8"),
    "storage": ("#b98a45", "#d3a967"), "part": ("#9fcdc6", "#2f6d67"), "rest": ("#d9dee5", "#48525e"),
    "shade": ("#34948b", "#1f7a70"),
}  # fmt: skip
"""Colours of a cache's pictures, on light and on dark ground."""
ARM_COLOURS = {
    "ce": "#4d4d4d", "ce-fresh": "#999999", "hard-label": "#e69f00", "kl": "#0072b2", "reverse-kl": "#56b4e9",
    "calm": "#009e73", "reverse-calm": "#999933", "tidal": "#d55e00", "tidal-training": "#882255",
    "tidal-timestep": "#cc79a7", "tide-hybrid": "#332288", "kl-comp-demo": "#117733", "tidal-comp-demo": "#aa4499",
}  # fmt: skip
"""Of the arms that tide ships; taken from the palettes of Okabe and Ito and of Tol, made for the colour-blind."""
MARKERS = "osD^vPX*"
DPI = 144
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "text.color": PALETTE["ink"][0], "text.parse_math": False,
    "axes.labelcolor": PALETTE["muted"][0], "axes.edgecolor": PALETTE["grid"][0], "axes.axisbelow": True,
    "axes.labelsize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.color": PALETTE["muted"][0], "ytick.color": PALETTE["muted"][0], "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "xtick.major.pad": 6,
    "grid.color": PALETTE["grid"][0], "legend.frameon": False, "svg.fonttype": "none",
}  # fmt: skip


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """tide's style, for as long as a figure is made and written; no settings of the user or of a program count."""
    mpl = _matplotlib()
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # a stranger's name in a rare script
        yield


def _matplotlib() -> Any:
    """matplotlib, whose list of fonts lies with tide's other notes, or nowhere for long if that cannot be written.

    On its own it makes folders in the user's home, and warns where there is none.
    """
    if "matplotlib.font_manager" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        try:
            folder = notes_folder("matplotlib")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, RuntimeError):  # a user without a home is a RuntimeError
            folder = Path(tempfile.mkdtemp(prefix="tide-fonts-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = str(folder)
        try:
            import matplotlib.font_manager
        finally:
            del os.environ["MPLCONFIGDIR"]
    import matplotlib as mpl

    return mpl


def make_figure(width: float, height: float, title: str = "", note: str = "") -> "Figure":
    """An empty figure with so much room for axes, below a bold title and a note that explains the marks, if any."""
    from matplotlib.figure import Figure

    lines = textwrap.wrap(note, int((width - 24) / 5.8))
    head = (30 if title else 0) + 15 * len(lines)
    figure = Figure(figsize=(width / 72, (height + head) / 72), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + head)), w_pad=0.1, h_pad=0.06)  # type: ignore[union-attr]
    for row, text in enumerate([title, *lines] if title else []):
        y = 1 - (10 + (row and 22 + 15 * (row - 1))) / (height + head)
        look = {"fontsize": 10, "color": PALETTE["muted"][0]} if row else {"fontsize": 13, "fontweight": "bold"}
        figure.text(10 / width, y, text, verticalalignment="top", **look)
    return figure


def png_bytes(figure: "Figure", alt: str) -> bytes:
    """The figure as PNG; `alt`, what it shows in words, is its Description."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None, "Description": alt})
    return data.getvalue()


def svg_text(figure: "Figure", name: str, alt: str, marks: Sequence[tuple[float | None, str]]) -> str:
    """The figure as one <svg> element for a page: no script, style sheet, font or address in it, text escaped.

    Colours become the page's variables (`palette_css`), fonts are the page's own.

    Args:
        name: of the plot: its id is plot-NAME. alt: what a screen reader says.
        marks: (value, words) of the artists whose gid is `mark-0`, `mark-1`, ...: browsers show the words on hover.
    """
    import matplotlib as mpl

    for artist in (figure, *figure.axes):
        artist.patch.set_visible(False)
    data = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(data, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    names = {light: f"var(--{role})" for role, (light, _) in PALETTE.items()}
    root = ElementTree.fromstring(data.getvalue())
    root.remove(root[0])  # a style sheet, which would be the whole page's
    for element in list(root.iter()):
        element.tag = element.tag.partition("}")[2]
        identity, text = element.attrib.pop("id", ""), (element.text or "").strip()
        element.text, element.tail = text or None, None
        for attribute, given in list(element.items()):
            if attribute == "style":
                look = re.sub(r"font-family: [^;]*(; |$)", "", given)
                element.set(attribute, re.sub(r"#[0-9a-f]{6}\b", lambda colour: names[colour[0]], look))
            elif attribute.endswith("}href"):
                del element.attrib[attribute]
                element.set("href", given)
            elif attribute == "transform" and given.startswith("rotate(-0 "):
                del element.attrib[attribute]
            elif attribute != "clip-path":
                element.set(attribute, re.sub(r"(\.\d)\d+", r"\1", " ".join(given.split())))
        if identity.startswith("mark-"):
            value, words = marks[int(identity.removeprefix("mark-"))]
            element.attrib |= {"class": "mark", "data-value": repr(value)}
            title = ElementTree.Element("title")
            title.text = words
            element.insert(0, title)
        elif element.tag in ("path", "clipPath") and identity:
            element.set("id", identity)  # hashed with the name: unique on a page
    for element in reversed(list(root.iter())):  # groups that say nothing
        element[:] = [inner for part in element for inner in (part if part.tag == "g" and not part.attrib else [part])]
    box = root.get("viewBox", "")
    root.attrib = {"class": "plot", "id": f"plot-{name}", "viewBox": box, "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def palette_css() -> str:
    """The palette as variables of a page that follows its reader's choice of light or dark."""
    light, dark = (" ".join(f"--{role}: {pair[i]};" for role, pair in PALETTE.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def arm_colour(name: str) -> str:
    """Of an arm, by its name alone: the same in every picture, whoever else is in it."""
    colours = list(ARM_COLOURS.values())
    return ARM_COLOURS.get(name) or colours[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(colours)]


def arm_looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm; arms of one colour differ by their markers."""
    looks, taken = {}, dict[str, int]()
    for name in names:
        colour = arm_colour(name)
        taken[colour] = taken.get(colour, -1) + 1
        looks[name] = {"color": colour, "marker": MARKERS[taken[colour] % len(MARKERS)]}
    return looks


def bulk(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value but for outliers: at most a quarter of all, farther off than the rest is wide.

    Where the rest is all but the same, a difference of 2 % is no outlier yet.
    """
    ordered, most = sorted(values), len(values) // 4
    for low, high in sorted(((i, j) for i in range(most + 1) for j in range(most + 1 - i)), key=sum, reverse=True):
        rest = ordered[low : len(ordered) - high]
        wide = max(rest[-1] - rest[0], 0.02 * abs(rest[0]))
        if (not low or rest[0] - ordered[low - 1] > wide) and (not high or ordered[-high] - rest[-1] > wide):
            return rest[0], rest[-1]
    raise AssertionError("nothing left out is always right")


def room(values: Sequence[float], every: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis for some values, with a margin; a wider one where others of `every` stand as arrows."""
    low, high = min(values), max(values)
    wide = (high - low) or abs(high) or 1.0
    return (
        low - wide * (0.05 if min(every) >= low else 0.15),
        high + wide * (0.05 if max(every) <= high else 0.15),
    )


def mark_outliers(axes: "Axes", points: Iterable[tuple[float, float]], colour: str, *, form: str = ".2f") -> None:
    """Points above or below the y axis stand at its edge as an arrow with their value."""
    low, high = axes.get_ylim()
    for x, y in points:
        if not low <= y <= high:
            edge, marker, away = (high, "^", -6) if y > high else (low, "v", 6)
            axes.plot(x, edge, marker, color=colour, markersize=6, clip_on=False, zorder=4)
            axes.annotate(f"{y:{form}}", (x, edge), (0, away), textcoords="offset points", color=colour, fontsize=8.5,
                          ha="center", va="top" if y > high else "bottom")  # fmt: skip


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Where to put labels that belong at `places`: `gap` apart, in the same order, between low and high, hardly moved.

    Least squares: the places less 0, 1, 2, ... gaps must not fall, so neighbours that do are pooled at their mean.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) >= sum(pools[-1]) / len(pools[-1]):
            later = pools.pop()
            pools[-1] += later
    means = [sum(pool) / len(pool) for pool in pools for _ in pool]
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = max(low, min(means[rank], high - (len(places) - 1) * gap)) + rank * gap
    return moved


def label_ends(
    axes: "Axes", ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str], size: float = 9
) -> None:
    """Name lines where they end, at the right edge; each (x, y) is in data, and no label covers another.

    Call it last: the layout of the whole figure is settled here.
    """
    figure: Any = axes.figure
    labels = {name: axes.text(1.05, 0.5, name, color=colours[name], fontsize=size, transform=axes.transAxes,
                              verticalalignment="center") for name in ends}  # fmt: skip
    figure.draw_without_rendering()
    height = axes.get_window_extent().height
    inside = [axes.transAxes.inverted().transform(axes.transData.transform(end)) for end in ends.values()]
    heights = [min(max(float(y), 0), 1) for _, y in inside]
    gap = 1.2 * size / 72 * figure.dpi / height
    for (x, _), y, place, (name, label) in zip(
        inside, heights, spread(heights, gap, 0, 1), labels.items(), strict=True
    ):
        label.set_y(place)
        axes.plot([x, 1.04], [y, place], color=colours[name], linewidth=0.7, alpha=0.6, transform=axes.transAxes,
                  clip_on=False)  # fmt: skip
