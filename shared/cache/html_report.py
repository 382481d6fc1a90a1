"""`tide inspect-cache --report`: a cache as one HTML file with plots and decoded text, which opens anywhere.

The file needs no network, no script and no font: plots are inline SVG, hovering is CSS. Whatever a stranger wrote into
a cache is escaped, and a Content-Security-Policy forbids scripts and requests all the same. Equal caches give equal
bytes; no path of this machine is in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..shown_text import bytes_text, html_text, number_text, percent_text
from .audit_report import audit_sections
from .decoded_views import spread_views
from .facts import MAX_SENTENCE_CHARS, Section, means, origin, sizes, value_chars
from .files import atomic_write
from .html_style import style_sheet
from .html_views import views_html
from .plots import Absent, Plot, make_plots
from .reader import open_cache
from .svg import draw_svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
MAX_VALUE_CHARS = 1000


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
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name} - tide cache</title>
<link rel="icon" href="data:,">
<style>
{style_sheet()}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p class="lead">{_lead(d)}</p>{_verdict(d)}
<div class="tiles">{"".join(_tiles(d))}</div>
<section class="card"><dl>{_lines(_glance(d))}</dl></section>
</header>
<main>
<h2>What is in it</h2>
{_plots(make_plots(d))}
<h2>Some views, from little to nearly all masked</h2>
{views_html(views)}
<h2>Where it comes from</h2>
<div class="grid">
{"".join(map(_facts, [*origin(d), sizes(d), *means(d), *_audit(d)]))}</div>
</main>
</body>
</html>
"""


def _audit(d: Mapping[str, Any]) -> list[Section]:
    """What `inspect-cache --audit` found, if it was asked for."""
    return list(audit_sections(d["audit"])) if d.get("audit") else []


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


def _glance(d: Mapping[str, Any]) -> dict[str, str]:
    """Teacher, data, noise, signal and the two hashes that name this cache: a line each."""
    sections = {title.partition(":")[0]: rows for title, rows in origin(d)}
    signal = [f"{name} {value}" for name, value in sections["Signal"].items()]
    return {
        "teacher": sections["Teacher"]["model"],
        "data": "; ".join(text for name, text in sections["Data"].items() if name.startswith("source")),
        "noise": sections["Noise"]["settings"],
        "signal": "; ".join([d["signal"]["kind"], *signal]),
        "manifest": d["manifest_hash"],
        "plan": d["plan_hash"],
    }


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


def _facts(section: tuple[str, Mapping[str, str]]) -> str:
    title, rows = section
    return f'<section class="card"><h3>{html_text(title)}</h3><dl>{_lines(rows)}</dl></section>\n'


def _lines(rows: Mapping[str, str]) -> str:
    """Names and values for a <dl>."""
    shown = {
        html_text(name): html_text(value, max_chars=value_chars(name, MAX_VALUE_CHARS)) for name, value in rows.items()
    }
    return "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in shown.items())
