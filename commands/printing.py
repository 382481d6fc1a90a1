"""What commands print: results for people or scripts on stdout, progress on stderr."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..shared.errors import printable
from ..shared.shown_text import redacted, terminal_text

if TYPE_CHECKING:
    from rich.text import Text

_LARGE_BYTES = 1 << 30


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """A result on stdout, for people or for scripts."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        typer.echo(printable(f"{name.replace('_', ' '):{width}}  {_shown(value)}"))


def _shown(value: Any) -> str:
    """A number with separators, a list or names with their values as words, anything else as it prints."""
    if isinstance(value, dict):
        value = [f"{name} {_shown(item)}" for name, item in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) else str(value)


def say(line: str) -> None:
    """A line of progress, on stderr."""
    typer.echo(terminal_text(redacted(line)), err=True)


def say_first_look(cache: str | Path) -> None:
    """Announce the full check of a large folder: it takes minutes, once, or always where others may write."""
    from ..shared.cache.manifest import read_manifest
    from ..shared.cache.trust import is_private, is_trusted

    root = Path(cache)
    if not root.is_dir():
        return
    manifest = read_manifest(root)
    if manifest.totals.bytes >= _LARGE_BYTES and not is_trusted(root, manifest):
        size = f"{root}: {manifest.totals.bytes / 1e9:,.1f} GB"
        if is_private(root / "manifest.json", root / "data"):
            say(f"{size} that were never checked here; looking at every byte, once")
        else:
            say(
                f"{size} that others may write, in this folder or one above it; looking at every byte, at every start. "
                "chmod -R go-w on what is yours alone ends that (docs/cache_format.md)"
            )


def print_text(text: "Text") -> None:
    """Styled lines on a terminal, plain ones into a pipe or a file."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text, soft_wrap=True)
