"""The errors users meet, and the exit code each one ends a command with.

Every message says what is wrong, where (file, shard, row, field), what was expected and what to do.
Codes follow sysexits(3): 2 usage, 65 bad data, 69 unavailable, 74 input/output, 75 try again, 130 interrupted.
"""

EXIT_INTERRUPTED = 130


class TideError(Exception):
    """Base of all errors that `tide` reports as one message instead of a traceback."""

    exit_code = 1


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
