"""Text that a stranger wrote -> text that cannot act: for terminals, for HTML and for Markdown.

Cached text may hold escape sequences that move the cursor or set the title, characters that reverse the reading
direction, markup of the console library and HTML. None of it survives these functions.
"""

import html
import re
import unicodedata

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-Z\\-_])|\x9b[0-?]*[ -/]*[@-~]")
_KEPT = {"\n", "\t"}


def terminal_text(text: str, *, max_chars: int | None = None) -> str:
    """Without escape sequences, control and direction-changing characters (newline and tab stay), cut to `max_chars`.

    Square brackets are left alone: print the result with `markup=False` or inside `rich.text.Text`.
    """
    text = _ESCAPES.sub("", text)
    text = "".join(c if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "�" for c in text)
    return text if max_chars is None or len(text) <= max_chars else text[: max(max_chars - 1, 0)] + "…"


def html_text(text: str, *, max_chars: int | None = None) -> str:
    """The same, escaped for HTML text and attribute values."""
    return html.escape(terminal_text(text, max_chars=max_chars), quote=True)


_MARKDOWN_SAFE = re.compile(r"[A-Za-z0-9 ,./+()=-]")
_AUTOLINK = re.compile(r"(www)\.", re.IGNORECASE)


def markdown_text(text: str, *, max_chars: int | None = None) -> str:
    """The same on one line, for a paragraph or a table cell: no markup, link, mention or HTML comes of it.

    Every ASCII character that means something to Markdown becomes a numeric entity, which shows as the character and
    never opens anything.
    """
    text = " ".join(terminal_text(text, max_chars=max_chars).replace("\u2028", " ").replace("\u2029", " ").split())
    text = "".join(c if ord(c) > 127 or _MARKDOWN_SAFE.match(c) else f"&#{ord(c)};" for c in text)
    return _AUTOLINK.sub(r"\1&#46;", text)
