"""The errors users meet, and the exit code each one ends a command with.

Every message says what is wrong, where (file, shard, row, field), what was expected and what to do.
Codes follow sysexits(3): 2 usage, 65 bad data, 69 unavailable, 74 input/output, 75 try again, 130 interrupted.
"""

import re

EXIT_INTERRUPTED = 130

_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with characters that act on a terminal spelled out (`\\x1b`); newline and tab stay.

    Names and texts of a checkpoint or a data set end up in messages, and a terminal obeys what it is sent.
    """
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class TideError(Exception):
    """Base of all errors that `tide` reports as one message instead of a traceback; the message is `printable`."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(TideError, ValueError):
    """A setting is unknown, missing or out of range."""

    exit_code = 2


class DataError(TideError):
    """The conversations, or a model's or tokenizer's files, are not what they should be."""

    exit_code = 65


class CacheError(DataError):
    """A cache is incomplete, damaged or not a cache."""


class CacheMismatch(CacheError):
    """A sound cache that does not belong to this plan or this student."""


class Unavailable(TideError):
    """Something outside the project is missing: an optional package, a hub, a device."""

    exit_code = 69


class OutputError(TideError):
    """Reading or writing failed: disk full, permission denied, device error."""

    exit_code = 74


class TryAgain(TideError):
    """Stopped before the end with nothing lost: run the same command again."""

    exit_code = 75
