"""Licences as cards declare them: the `license` field of a README.md's front matter, or of a Hub card.

What cannot be found or read is None, never an error: a manifest then says that the licence is unknown.
"""

from pathlib import Path
from typing import Any

_MAX_CARD_BYTES = 2**20


def folder_licence(folder: Path) -> str | None:
    """The licence that the README.md of a checkpoint or data folder declares."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        if card.stat().st_size > _MAX_CARD_BYTES:
            return None
        metadata = metadata_load(card)
    except Exception:  # whatever a stranger wrote there: huggingface_hub passes on what the YAML library raises
        return None
    return licence_of_card(metadata.get("license")) if isinstance(metadata, dict) else None


def licence_of_card(declared: Any) -> str | None:
    """The field `license` of a card, which holds a name or a list of names, as one line of printable text."""
    names = declared if isinstance(declared, list) else [declared]
    known = [name.strip() for name in names if isinstance(name, str) and name.strip().isprintable() and name.strip()]
    return ", ".join(known) or None
