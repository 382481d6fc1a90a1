"""Access tokens taken out of whatever is shown, logged or written: errors may quote requests and servers' answers."""

import logging
import os
import re
import sys

from .errors import printable

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
