"""The style sheet of the report: calm, dark on light, one colour per subject, no font or picture from elsewhere.

A masked chunk's answer stands beside its line, in the margin that its view leaves free: nothing is covered, and nothing
has to be moved by a script.
"""

from .plots import COLOURS, GRID, INK, MUTED, PART_COLOURS

PAGE_WIDTH, MARGIN_WIDTH = 1120, 300
"""CSS pixels of the page, and of the margin beside a decoded view."""
SHADES = ("#e6f2f0", "#c9e5e1", "#a5d3cd", "#80c1b9", "#5aada4")
"""Behind a chunk, from improbable to probable; dark text is legible on each."""


def style_sheet() -> str:
    """CSS of the whole page."""
    themes = "".join(f".{name} {{ --ink: {colour}; }}\n" for name, colour in COLOURS.items())
    parts = "".join(f".part-{number} {{ fill: {colour}; }}\n" for number, colour in enumerate(PART_COLOURS))
    shades = "".join(f".shade-{number} {{ background: {colour}; }}\n" for number, colour in enumerate(SHADES))
    return f"""\
:root {{ color-scheme: light; --text: {INK}; --muted: {MUTED}; --grid: {GRID}; --ink: {COLOURS["noise"]}; }}
{_PAGE}{_PLOTS}{_VIEWS}{themes}{parts}{shades}\
main, header {{ max-width: {PAGE_WIDTH}px; margin: 0 auto; padding: 0 20px; }}
.view {{ grid-template-columns: minmax(0, 1fr) {MARGIN_WIDTH}px; }}
.answer {{ width: {MARGIN_WIDTH - 24}px; }}
"""


_PAGE = """\
* { box-sizing: border-box; }
body { margin: 0; padding: 36px 0 64px; background: #f5f6f8; color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.quiet { color: var(--muted); font-size: 13px; }
.lead { color: var(--muted); overflow-wrap: anywhere; }
.card { background: #fff; border: 1px solid var(--grid); border-radius: 8px; padding: 16px 18px; margin: 0; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.wide { grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 22px 0 12px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 8px 0 0; }
.card > dl:first-child, aside dl { margin-top: 0; }
dt, dd { font-size: 13px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
@media (max-width: 760px) { .grid { grid-template-columns: minmax(0, 1fr); } .wide { overflow-x: auto; } }
"""

_PLOTS = """\
figure { min-width: 0; }
figcaption { margin-bottom: 10px; }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 760px) { .wide svg { min-width: 720px; } }
svg text { font-size: 12px; fill: var(--text); unicode-bidi: isolate; }
svg .tick, svg .axis { fill: var(--muted); font-size: 11.5px; }
svg .number { font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--grid); stroke-width: 1; }
.hit { fill: transparent; }
.bar, .dot { fill: var(--ink); }
.line { fill: none; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-width: 1.4; stroke-dasharray: 5 4; }
.mark:hover .hit { fill: #eef1f5; }
.mark:hover .bar, .mark:hover .dot, .mark:hover .part { filter: brightness(0.8); }
"""

_VIEWS = """\
.view { position: relative; display: grid; padding: 0; margin-bottom: 16px; }
.key-line { margin-bottom: 12px; }
.words { padding: 16px 18px; margin: 0; overflow: hidden; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
.view aside { padding: 16px 18px; border-left: 1px solid var(--grid); overflow-wrap: anywhere; }
.words span { unicode-bidi: isolate; }
.prompt { color: var(--muted); }
.chunk, .masked { border-radius: 3px; padding: 2px 0; margin: 0 1px; cursor: default; }
.chunk { border-bottom: 2px solid #2b8a81; }
.masked { background: #e9ecf1; border-bottom: 2px dashed #8a94a3; }
.chunk:hover, .chunk:focus, .masked:hover, .masked:focus { outline: 2px solid var(--text); outline-offset: 1px; }
.sign { font-style: normal; color: var(--muted); }
.answer { display: none; position: absolute; right: 12px; z-index: 1; margin-top: -6px; padding: 10px 12px;
  background: #fff; border: 1px solid #b9c2cd; border-radius: 8px; box-shadow: 0 4px 16px rgb(31 41 51 / 18%);
  font: 13px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; color: var(--text);
  white-space: normal; user-select: none; }
.chunk:hover > .answer, .chunk:focus > .answer, .masked:hover > .answer, .masked:focus > .answer { display: block; }
.answer > span { display: block; }
.choice { display: grid; grid-template-columns: minmax(0, 1fr) 80px 46px; gap: 8px; align-items: center; }
.choice code { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.choice.clean code { font-weight: 700; }
.choice i { text-align: right; font-style: normal; font-variant-numeric: tabular-nums; }
.track { display: block; height: 8px; border-radius: 4px; background: var(--grid); }
.track span { display: block; height: 8px; border-radius: 4px; background: #9aa5b1; }
.clean .track span { background: #2b8a81; }
.key { color: var(--text); display: inline-block; padding: 0 8px; margin-right: 6px; }
@media (max-width: 760px) {
  .view { display: block; }
  .view aside { border-left: 0; border-top: 1px solid var(--grid); }
  .answer { position: fixed; left: 12px; right: 12px; bottom: 12px; width: auto; }
}
"""
