"""Text that a stranger wrote -> text that cannot act: for terminals, and for HTML.

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
