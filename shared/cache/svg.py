"""A plot's data (plots.py) -> inline SVG text: sharp at any size, small, and alive under the mouse without a script.

Every mark is a group with a <title>, which browsers show on hover, and its number in `data-value`. Colours and fonts
come from the page's style sheet (html_style.py). All text is escaped here.
"""

from ..shown_text import html_text
from .plots import Plot

WIDTH, WIDE = 520, 1080
"""Units of the viewBox, which are pixels at the page's full width."""
HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 24, 44
ROW_HEIGHT, NAME_WIDTH, CELL_WIDTHS = 22, 190, (80, 140, 70)


def draw_svg(plot: Plot) -> str:
    """One <svg> element, its title first. `plot` may hold a stranger's text."""
    draw = {"columns": _columns, "line": _line, "rows": _rows, "parts": _parts}[plot.shape]
    marks, width, height = draw(plot)
    name = html_text(plot.title)
    return (
        f'<svg class="plot {plot.theme}" id="plot-{plot.name}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{name}">\n<title>{name}</title>\n' + "\n".join(marks) + "\n</svg>"
    )


def _columns(plot: Plot) -> tuple[list[str], int, int]:
    marks, step, height = [*_axes(plot)], _step(plot), HEIGHT - TOP - BOTTOM
    for place, value in enumerate(plot.values):
        x, y = LEFT + place * step, _y(plot, value or 0)
        hit = _rect("hit", x, TOP, step, height)
        bar = _rect("bar", x + 0.08 * step, y, 0.84 * step, TOP + height - y)
        marks.append(_mark(plot, place, hit + bar))
    return marks, WIDTH, HEIGHT


def _line(plot: Plot) -> tuple[list[str], int, int]:
    """Points at the middles of their columns; the line is broken where a value is missing."""
    marks, step, pieces = [*_axes(plot)], _step(plot), [[]]
    points = []
    for place, value in enumerate(plot.values):
        if value is None:
            pieces.append([])
            continue
        x, y = LEFT + (place + 0.5) * step, _y(plot, value)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        hit = _rect("hit", x - step / 2, TOP, step, HEIGHT - TOP - BOTTOM)
        points.append(_mark(plot, place, f'{hit}<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'))
    marks += [f'<polyline class="line" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    for name, values in plot.others:
        places = [(LEFT + (i + 0.5) * step, _y(plot, value)) for i, value in enumerate(values) if value is not None]
        if places:
            dashed = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            marks.append(f'<polyline class="line dashed" points="{dashed}"/>')
            marks.append(_text("tick", places[-1][0], places[-1][1] - 6, name, "end"))
    return marks + points, WIDTH, HEIGHT


def _rows(plot: Plot) -> tuple[list[str], int, int]:
    """Name, bar and numbers per line, as wide as the page; the numbers have headings."""
    largest = max(value or 0 for value in plot.values) or 1
    room, headings = WIDE - NAME_WIDTH - sum(CELL_WIDTHS), plot.cells[0]
    rights = [WIDE - sum(CELL_WIDTHS[place + 1 :]) - 4 for place in range(len(CELL_WIDTHS))]
    marks = [_text("axis", right, 12, text, "end") for right, text in zip(rights, headings, strict=True)]
    for place, (value, label, cells) in enumerate(zip(plot.values, plot.labels, plot.cells[1:], strict=True)):
        y = (place + 1) * ROW_HEIGHT
        inside = _rect("hit", 0, y, WIDE, ROW_HEIGHT) + _text("name", NAME_WIDTH - 10, y + 15, label, "end")
        inside += _rect("bar", NAME_WIDTH, y + 4, room * (value or 0) / largest, ROW_HEIGHT - 8)
        inside += "".join(
            _text("number", right, y + 15, text, "end") for right, text in zip(rights, cells, strict=True)
        )
        marks.append(_mark(plot, place, inside))
    return marks, WIDE, (len(plot.values) + 1) * ROW_HEIGHT


def _parts(plot: Plot) -> tuple[list[str], int, int]:
    """One bar in pieces, and a line for each below it."""
    total, x, marks = sum(value or 0 for value in plot.values) or 1, 0.0, []
    for place, (value, label, shown) in enumerate(zip(plot.values, plot.labels, plot.shown, strict=True)):
        width, y = WIDE * (value or 0) / total, 44 + 22 * place
        bar = _rect(f"part part-{place}", x, 0, max(0.0, width - 2), 26)
        key = _rect(f"part part-{place}", 0, y, 12, 12) + _text("name", 20, y + 11, f"{label}: {shown}", "start")
        marks.append(_mark(plot, place, bar + key))
        x += width
    return marks, WIDE, 44 + 22 * len(plot.values)


def _axes(plot: Plot) -> list[str]:
    """Grid, ticks and the names of the axes."""
    right, bottom, step, marks = WIDTH - RIGHT, HEIGHT - BOTTOM, _step(plot), []
    for value, text in plot.y_ticks:
        y = _y(plot, value)
        marks.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(_text("tick", LEFT - 8, y + 4, text, "end"))
    for place, text in plot.ticks:
        marks.append(_text("tick", LEFT + place * step, bottom + 16, text, "middle"))
    marks.append(_text("axis", (LEFT + right) / 2, HEIGHT - 6, plot.x_label, "middle"))
    marks.append(_text("axis", LEFT - 8, 11, plot.y_label, "start"))
    return marks


def _step(plot: Plot) -> float:
    """Width of a column."""
    return (WIDTH - LEFT - RIGHT) / len(plot.values)


def _y(plot: Plot, value: float) -> float:
    """Height of a value; the ends of the axis are its first and last tick."""
    low, high = plot.y_ticks[0][0], plot.y_ticks[-1][0]
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _mark(plot: Plot, place: int, inside: str) -> str:
    """A group for one value, with the number itself and a text for the mouse."""
    value = plot.values[place]
    return (
        f'<g class="mark" data-value="{value!r}"><title>{html_text(plot.labels[place])}: '
        f"{html_text(plot.shown[place])}</title>{inside}</g>"
    )


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html_text(text)}</text>'
