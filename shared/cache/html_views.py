"""Decoded views (decoded_views.py) -> HTML: text with its masked chunks shaded, and the teacher's answers on hover.

Everything a stranger wrote is escaped here, and stands between tags only: never in an attribute, a style or a link.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..shown_text import html_text, number_text

SHADE_EDGES = (0.05, 0.2, 0.5, 0.8)
"""Probabilities per student token at which a chunk's shade changes."""
MAX_ANSWERS = 4
"""Targets of one chunk whose candidates are listed; chunks of tide's own caches have at most one."""
MAX_ID_CHARS = 80


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
