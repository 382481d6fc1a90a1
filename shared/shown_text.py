"""What people are shown: a stranger's text made harmless, access tokens taken out, many names cut, numbers in words.

Cached text may hold escape sequences that move the cursor or set the title, characters that reverse the reading
direction, markup of the console library and HTML: none of it survives `terminal_text`, `html_text` and `markdown_text`.
Errors may quote requests and servers' answers: `redacted` is for whatever is shown, logged or written.
"""

import html
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Sequence

from .errors import printable

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


MAX_NAMES = 8
"""Of files, columns or weights in a message; how many more there are is said."""
_MAX_NAME_CHARS = 160


def one_line(name: str) -> str:
    """A name that a stranger chose, for a message: cut, with whatever could act or break the line spelled out."""
    short = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}…"
    return printable(short.replace("\n", "\\n").replace("\t", "\\t"))


def some(names: Sequence[str]) -> str:
    """Names for a message: the first, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(one_line, names[:MAX_NAMES])) + more


HIDDEN = "<token>"
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}")
_AWS_KEY = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}")
_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
_MIN_CHARS = 6  # a shorter "token" is a placeholder, and would take harmless words out of messages


def redacted(text: str) -> str:
    """The text with `HIDDEN` for what looks like a token of the Hub or a key of S3, and for those in use here."""
    for token in _tokens_in_use():
        text = text.replace(token, HIDDEN)
    return _AWS_KEY.sub(HIDDEN, _HUB_TOKEN.sub(HIDDEN, text))


def _tokens_in_use() -> set[str]:
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if "huggingface_hub" in sys.modules:  # else nothing has read the stored login either
        from huggingface_hub import get_token

        found.add(get_token() or "")
    return {token for token in found if len(token) >= _MIN_CHARS}


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(redacted(record.getMessage())), None
        return True


class _Printable(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def printable_logs() -> None:
    """From now on no logger of this process, of whatever library, writes control characters: names of weights, files
    and tokens that a stranger chose are quoted there. Calling it again is harmless."""
    logging.setLogRecordFactory(_Printable)


def redact_logs(name: str) -> None:
    """Redact all that the logger `name` and those below it write through its handlers; calling it again is harmless."""
    for handler in logging.getLogger(name).handlers:
        if not any(isinstance(existing, _Redacting) for existing in handler.filters):
            handler.addFilter(_Redacting())


def number_text(value: float | None, digits: int = 3) -> str:
    """1234.5678 -> "1,234.568"; what a stranger made too large for a line as 1e+20."""
    return "-" if value is None else f"{value:,.{digits}f}" if abs(value) < 1e15 else f"{value:.3g}"


def percent_text(value: float | None) -> str:
    """0.1234 -> "12.3%"."""
    return "-" if value is None else f"{value:.1%}" if abs(value) < 1e6 else f"{100 * value:.3g}%"


def bytes_text(count: float) -> str:
    """12345 -> "12.3 kB"; thousands, not 1024s."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
