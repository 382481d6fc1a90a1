"""Telling addresses of object stores from paths on this machine; light, because every command starts with it.

A pathlib.Path makes `s3:/bucket` of `s3://bucket`, so what may be either stays text until it is known.
"""

import re
from pathlib import Path

from .errors import ConfigError

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
_COLLAPSED_URL = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]+:/[^/].*")
_LOCAL_PROTOCOLS = ("file", "local")


def is_url(text: str | Path) -> bool:
    """Is this the address of an object store, `s3://...` say, and not a path on this machine?"""
    match = _URL.fullmatch(str(text))
    return match is not None and match[1] not in _LOCAL_PROTOCOLS


def require_folder(path: Path, what: str) -> Path:
    """The path. Raises: ConfigError: it was the address of an object store, and `what` works on folders."""
    if _COLLAPSED_URL.fullmatch(str(path)) and not path.exists():
        raise ConfigError(
            f"{what} works on folders, and {str(path).replace(':/', '://', 1)} is an object store: copy the cache to a "
            "folder first (aws s3 sync, gcloud storage rsync)"
        )
    return path


def local_path(text: str | Path) -> Path:
    """The path on this machine that a text without the address of an object store names; `file://` is left out."""
    match = _URL.fullmatch(str(text))
    return Path(match[2] if match else text)
