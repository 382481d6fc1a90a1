"""Telling addresses of object stores from paths on this machine, and outputs from inputs; every command starts here.

A pathlib.Path makes `s3:/bucket` of `s3://bucket`, so what may be either stays text until it is known. What a command
writes may neither replace what it reads, nor lie in it, nor around it: `require_apart` says so for all of them.
"""

import os
import re
from collections.abc import Mapping
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


def require_apart(
    out: str | Path, inputs: Mapping[str, str | Path | None], *, what: str = "--out", may_hold: bool = False,
    makes_cache: bool = False,
) -> None:  # fmt: skip
    """Refuse an output that is one of a command's inputs, lies in one or in any cache, or has one in it.

    To be asked before anything is touched. Links and `..` are resolved; an address of an object store or of the Hub
    lies nowhere here.

    Args:
        inputs: what each is called -> where it lies; None and "": not given. A run's folder stands for its student.
        what: the output's name in messages.
        may_hold: inputs may lie in `out`, where single files are written beside them.
        makes_cache: `out` itself may be a cache, which is gone on with.
    Raises: ConfigError: names both paths and what to do.
    """
    if is_url(out):
        return
    here = _real(out)
    for name, given in inputs.items():
        if not given or is_url(given):
            continue
        there = finished_student(_real(given))
        if not os.path.exists(there):
            continue
        how = ""
        if _same(here, there):
            how = "they are one place"
        elif _lies_in(here, there):
            how = "the first in the second"
        elif _lies_in(there, here) and not may_hold:
            how = "the second in the first"
        if how:
            raise ConfigError(
                f"{what} {out} and {name} {given} lie in each other ({how}): what is written to the one would spoil "
                "the other, which is read. Give a path outside of it, such as a new folder beside it"
            )
    cache = next((folder for folder in [here, *here.parents][makes_cache:] if _is_cache(folder)), None)
    if cache is not None:
        raise ConfigError(
            f"{what} {out} lies in the cache {cache}, whose folder holds nothing but the cache: any check of it would "
            "fail. Give a path outside of it, such as a new folder beside it"
        )


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(local_path(path).expanduser()))


def finished_student(folder: Path) -> Path:
    """What commands read of a run's folder, which is its student; any other folder as it is."""
    is_run = not os.path.isfile(folder / "config.json") and os.path.isfile(folder / "student" / "config.json")
    return folder / "student" if is_run else folder


def _is_cache(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    if not os.path.isfile(manifest) or not any((folder / "data").glob("*.parquet")):
        return False
    try:
        return b'"plan_hash"' in manifest.read_bytes()  # other people's projects have a manifest.json, too
    except OSError:
        return True


def _lies_in(path: Path, folder: Path) -> bool:
    return any(_same(parent, folder) for parent in path.parents)


def _same(one: Path, other: Path) -> bool:
    """Also by two names of one folder: a mount, or other letters where case does not count."""
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
