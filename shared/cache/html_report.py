"""`tide inspect-cache --report`: a cache as one HTML file with plots and decoded text, which opens anywhere.

The file needs no network, no script and no font: plots are inline SVG, hovering is CSS, light or dark is its reader's
choice. Whatever a stranger wrote into a cache is escaped and stands between tags only, never in an attribute, a style
or a link (but for a plot's words); a Content-Security-Policy forbids scripts and requests all the same. Equal caches
give equal bytes; no path of this machine is in them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import palette_css
from ..shown_text import bytes_text, html_text, number_text, percent_text
from .audit_report import audit_sections
from .decoded_views import spread_views
from .facts import MAX_SENTENCE_CHARS, Section, identity, in_words, means, origin, settings, sizes, value_chars
from .files import atomic_write
from .plots import Absent, Plot, draw_svg, make_plots
from .reader import open_cache

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
MAX_VALUE_CHARS = 1000
SHORT_HASH_CHARS = 12
_HASH = re.compile(r"\b[0-9a-f]{32,64}\b")
SHADE_EDGES = (0.05, 0.2, 0.5, 0.8)
"""Probabilities per student token at which a chunk's shade changes."""
MAX_ANSWERS = 4
"""Targets of one chunk whose candidates are listed; chunks of tide's own caches have at most one."""
MAX_ID_CHARS = 80


def write_report(description: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of a cache.

    Args:
        description: `describe_cache`'s answer; its cache is read once more, for the decoded views.
        path: of the HTML file; an older one is replaced.
    Returns: the path.
    Raises: CacheError: a damaged row group. OutputError: the file cannot be written.
    """
    views = spread_views(open_cache(description["cache"], verify=False))
    atomic_write(Path(path), report_html(description, views).encode())
    return Path(path)


def report_html(description: Mapping[str, Any], views: Sequence[Mapping[str, Any]]) -> str:
    """The page of a description and of `spread_views`' answer."""
    d = {**description, "cache": Path(description["cache"]).resolve().name}
    name = html_text(d["cache"])
    sections = list(origin(d, d["size"]["samples"]))
    glance = {title.partition(":")[0].lower(): _glance(title, rows) for title, rows in sections}
    audit = audit_sections(d["audit"]) if d.get("audit") else ()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{name} - tide cache</title>
<link rel="icon" href="data:,">
<style>
{palette_css()}{_STYLE}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p class="lead">{_lead(d)}</p>{_verdict(d)}
<div class="tiles">{"".join(_tiles(d))}</div>
<section class="card"><dl>{_lines(glance | identity(d))}</dl></section>
</header>
<main>
<h2>What is in it</h2>
<p class="quiet">Point at a bar or a dot for its numbers.</p>
{_plots(make_plots(d))}
<h2>Some views, from little to nearly all masked</h2>
{views_html(views)}
<h2>Where it comes from</h2>
<div class="grid">
{"".join(map(_facts, [*sections, sizes(d), *means(d), *audit]))}</div>
</main>
</body>
</html>
"""


def _lead(d: Mapping[str, Any]) -> str:
    """One sentence: who said what about which data, and under which licences."""
    teacher = d["teacher"]
    says = "Clean samples, no teacher, of"
    if teacher:
        says = f"What {teacher['id']} (licence {teacher['licence']}) says about"
    sources = " + ".join(f"{source['source']} (licence {source['licence']})" for source in d["sources"]) or "no data"
    return html_text(f"{says} {sources}; signal {d['signal']['kind']}", max_chars=MAX_VALUE_CHARS)


def _verdict(d: Mapping[str, Any]) -> str:
    """What the teacher's answers are worth, in one sentence; "" where nobody counted."""
    said = d["verdict"]
    if not said:
        return ""
    text = html_text(said["sentence"], max_chars=MAX_SENTENCE_CHARS)
    return f'\n<p class="lead">{text if said["sound"] else f"<b>{text}</b>"}</p>'


def _tiles(d: Mapping[str, Any]) -> Iterator[str]:
    """The numbers that one looks for first."""
    size, chunks, targets = d["size"], d["chunks"], d["targets"]
    values = {
        "samples": f"{size['samples']:,}",
        "views": f"{size['rows']:,}",
        "masked positions": f"{size['masked_positions']:,}",
        f"in {size['shards']:,} shard{'' if size['shards'] == 1 else 's'}": bytes_text(size["bytes"]),
        "bytes per masked position": number_text(size["bytes_per_masked_position"], 1),
    }
    if chunks:
        values["tokens per chunk"] = number_text(chunks["mean_length"], 2)
    if targets:
        values["head mass"] = percent_text(targets["mean_head_mass"])
    for name, value in values.items():
        yield f'<div class="card tile"><b>{html_text(value)}</b><span class="quiet">{name}</span></div>'


def _glance(title: str, rows: Mapping[str, Any]) -> str:
    """A section on one line, without its hashes, sentences and settings of settings."""
    long = ("weights", "tokenizer", "chat template", "left out", "note", "codec's measured")
    shown = {k: v for k, v in rows.items() if not isinstance(v, Mapping) and not k.startswith(long)}
    return "; ".join([*filter(None, [title.partition(": ")[2]]), *(f"{k} {v}" for k, v in settings(shown).items())])


def _plots(plots: Sequence[Plot | Absent]) -> str:
    """A figure per plot: narrow ones in two columns, then what is left out and why, then the wide ones."""
    drawn = [plot for plot in plots if isinstance(plot, Plot)]
    narrow = [plot for plot in drawn if plot.shape in ("columns", "line")]
    left_out = _left_out([plot for plot in plots if isinstance(plot, Absent)], wide=len(narrow) % 2 == 0)
    figures = [*(_figure(plot, "card") for plot in narrow), left_out]
    figures += [_figure(plot, "card wide") for plot in drawn if plot not in narrow]
    return '<div class="grid">\n' + "\n".join(filter(None, figures)) + "\n</div>"


def _figure(plot: Plot, classes: str) -> str:
    return (
        f'<figure class="{classes}"><figcaption><h3>{html_text(plot.title)}</h3>'
        f'<p class="quiet">{html_text(plot.note)}</p></figcaption>\n{draw_svg(plot)}</figure>'
    )


def _left_out(absent: Sequence[Absent], *, wide: bool) -> str:
    """Plots without data, by reason; beside the last plot if that stands alone in its row."""
    if not absent:
        return ""
    by_reason = groupby(sorted(absent, key=lambda plot: plot.why), key=lambda plot: plot.why)
    lines = [f"{', '.join(plot.title for plot in group)}: {why}." for why, group in by_reason]
    text = "".join(f'<p class="quiet">{html_text(line)}</p>' for line in lines)
    return f'<section class="card{" wide" if wide else ""}"><h3>Left out</h3>{text}</section>'


def _facts(section: Section) -> str:
    title, rows = section
    return f'<section class="card"><h3>{html_text(title)}</h3><dl>{_lines(rows)}</dl></section>\n'


def _lines(rows: Mapping[str, Any]) -> str:
    """Names and values for a <dl>; of a long hash the beginning, and the rest on demand."""
    lines = []
    for name, value in rows.items():
        text = html_text(in_words(value), max_chars=value_chars(name, MAX_VALUE_CHARS))
        shown = f"<dl>{_lines(settings(value))}</dl>" if isinstance(value, Mapping) else _HASH.sub(_short, text)
        lines.append(f"<dt>{html_text(name)}</dt><dd>{shown}</dd>")
    return "".join(lines)


def _short(found: re.Match[str]) -> str:
    short = found[0][:SHORT_HASH_CHARS]
    return f'<details><summary title="{found[0]}">{short}…</summary><code>{found[0]}</code></details>'


def views_html(views: Sequence[Mapping[str, Any]]) -> str:
    """A card per view, and the key to its shades."""
    if not views:
        return '<p class="quiet">This cache has no views.</p>'
    return "\n".join([_key(views), *map(_view, views)])


def _key(views: Sequence[Mapping[str, Any]]) -> str:
    kinds = {segment["kind"] for view in views for segment in view["segments"]}
    parts = []
    if "chunk" in kinds:
        names = [f"up to {SHADE_EDGES[0]:g}", *(f"to {edge:g}" for edge in SHADE_EDGES[1:]), "to 1"]
        keys = "".join(f'<span class="key chunk shade-{n}">{name}</span>' for n, name in enumerate(names))
        parts.append(f"The teacher's probability of a masked chunk, per token: {keys} Point at one for more.")
    if "masked" in kinds:
        parts.append('<span class="key masked">masked</span> without an answer of a teacher.')
    return f'<p class="quiet key-line">{" ".join(parts)}</p>' if parts else ""


def _view(view: Mapping[str, Any]) -> str:
    response = view["tokens"] - view["prompt_tokens"]
    facts = {
        "sample": html_text(view["sample_id"], max_chars=MAX_ID_CHARS),
        "view": f"{view['view']:,}, t = {view['t']:.3f}",
        "masked": f"{view['masked_positions']:,} of {response:,} tokens",
        "prompt": f"{view['prompt_tokens']:,} tokens",
    }
    if view["tokens_not_shown"]:
        facts["not shown"] = f"{view['tokens_not_shown']:,} more tokens"
    padding = view["padding"]
    if padding["tokens"]:
        facts["padding"] = f"{padding['tokens']:,} end-of-text, {padding['masked']:,} masked"
    names = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    words = "".join(map(_segment, view["segments"]))
    return f'<article class="card view"><div class="words">{words}</div><aside><dl>{names}</dl></aside></article>'


def _segment(segment: Mapping[str, Any]) -> str:
    """A piece of text; a masked one can be pointed at, or reached with the tab key."""
    kind, text = segment["kind"], segment["text"]
    if kind not in ("chunk", "masked"):
        return f'<span class="{kind}">{html_text(text)}</span>'
    words = html_text(text).replace("\n", '<i class="sign">↵</i>\n') or '<i class="sign">∅</i>'
    shade = ""
    if kind == "chunk":
        per_token = float(np.exp(segment["logp"] / segment["tokens"]))
        shade = f" shade-{int(np.searchsorted(SHADE_EDGES, per_token))}"
    return f'<span class="{kind}{shade}" tabindex="0">{words}{_answer(segment)}</span>'


def _answer(segment: Mapping[str, Any]) -> str:
    """What the teacher said about a masked piece."""
    tokens = f"{segment['tokens']:,} token{'s' if segment['tokens'] > 1 else ''}"
    if "logp" in segment:
        probability = float(np.exp(segment["logp"]))
        lines = [f"<b>Chunk of {tokens}</b>"]
        lines.append(f"probability {_probability(probability)} ({number_text(segment['logp'], 2)} nats)")
    else:
        lines = [f"<b>{tokens} masked</b>"]
        if not segment["teacher"]:
            lines.append("no answer of a teacher")
    for says in segment["teacher"][:MAX_ANSWERS]:
        lines += _candidates(says)
    if len(segment["teacher"]) > MAX_ANSWERS:
        lines.append(f"and {len(segment['teacher']) - MAX_ANSWERS:,} more targets")
    return f'<span class="answer">{"".join(f"<span>{line}</span> " for line in lines)}</span>'


def _candidates(says: Mapping[str, Any]) -> list[str]:
    """The clean token of a target, then the teacher's most likely ones with their probabilities."""
    lines = [f"Clean token {_quoted(says['token'])}: {_probability(says['probability'])}"]
    for top in says["top"]:
        kind = "choice clean" if top["token"] == says["token"] else "choice"
        width = min(max(100 * top["probability"], 0), 100)
        lines.append(
            f'<span class="{kind}">{_quoted(top["token"])}<span class="track">'
            f'<span style="width:{width:.1f}%"></span></span><i>{_probability(top["probability"])}</i></span>'
        )
    return lines


def _quoted(token: str) -> str:
    """A token whose spaces and line breaks are seen."""
    return f"<code>&#x27;{html_text(token.replace(chr(10), '↵').replace(chr(9), '⇥'))}&#x27;</code>"


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 5e-4 else f"{value:.1e}" if value > 0 else "0"


_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; padding: 36px 0 64px; background: color-mix(in srgb, var(--grid) 40%, var(--paper));
  color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main, header { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h2 + .quiet { margin: -8px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.quiet { color: var(--muted); font-size: 13px; }
.lead { color: var(--muted); overflow-wrap: anywhere; }
.card { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; padding: 16px 18px; margin: 0; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.wide { grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 22px 0 12px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 8px 0 0; }
.card > dl:first-child, aside dl, dd > dl { margin-top: 0; }
dt, dd { font-size: 13px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
details { display: inline-block; }
summary { cursor: pointer; list-style: none; text-decoration: underline dotted; text-underline-offset: 3px; }
summary, details code { font: 12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }

figure { min-width: 0; }
figcaption { margin-bottom: 10px; }
svg { display: block; width: 100%; height: auto; }
svg text { unicode-bidi: isolate; font-variant-numeric: tabular-nums; }
.mark path { pointer-events: all; }
.mark:hover path { fill: var(--ink) !important; fill-opacity: 0.1; }

.view { position: relative; display: grid; padding: 0; margin-bottom: 16px;
  grid-template-columns: minmax(0, 1fr) 300px; }
.key-line { margin-bottom: 12px; }
.words { padding: 16px 18px; margin: 0; overflow: hidden; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
.view aside { padding: 16px 18px; border-left: 1px solid var(--grid); overflow-wrap: anywhere; }
.words span { unicode-bidi: isolate; }
.prompt { color: var(--muted); }
.chunk, .masked { border-radius: 3px; padding: 2px 0; margin: 0 1px; cursor: default; }
.chunk { border-bottom: 2px solid var(--teacher);
  background: color-mix(in srgb, var(--shade) var(--share), var(--paper)); }
.shade-0 { --share: 12%; } .shade-1 { --share: 27%; } .shade-2 { --share: 43%; }
.shade-3 { --share: 60%; } .shade-4 { --share: 78%; }
.masked { background: var(--grid); border-bottom: 2px dashed var(--muted); }
.chunk:hover, .chunk:focus, .masked:hover, .masked:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
.sign { font-style: normal; color: var(--muted); }
.answer { display: none; position: absolute; right: 12px; z-index: 1; margin-top: -6px; padding: 10px 12px;
  width: 276px; background: var(--paper); border: 1px solid var(--muted); border-radius: 8px;
  box-shadow: 0 4px 16px rgb(0 0 0 / 20%);
  font: 13px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; color: var(--ink);
  white-space: normal; user-select: none; }
.chunk:hover > .answer, .chunk:focus > .answer, .masked:hover > .answer, .masked:focus > .answer { display: block; }
.answer > span { display: block; }
.choice { display: grid; grid-template-columns: minmax(0, 1fr) 80px 46px; gap: 8px; align-items: center; }
.choice code { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.choice.clean code { font-weight: 700; }
.choice i { text-align: right; font-style: normal; font-variant-numeric: tabular-nums; }
.track { display: block; height: 8px; border-radius: 4px; background: var(--grid); }
.track span { display: block; height: 8px; border-radius: 4px; background: var(--muted); }
.clean .track span { background: var(--teacher); }
.key { color: var(--ink); display: inline-block; padding: 0 8px; margin-right: 6px; }
@media (max-width: 760px) {
  .grid { grid-template-columns: minmax(0, 1fr); }
  .wide { overflow-x: auto; }
  .wide svg { min-width: 720px; }
  .view { display: block; }
  .view aside { border-left: 0; border-top: 1px solid var(--grid); }
  .answer { position: fixed; left: 12px; right: 12px; bottom: 12px; width: auto; }
}
"""
