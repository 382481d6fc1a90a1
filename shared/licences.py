"""Licences as cards declare them: the `license` field of a README.md's front matter, or of a Hub card.

What cannot be found or read is None, never an error: a manifest then says that the licence is unknown.
"""

import re
from pathlib import Path
from typing import Any

from .regular_files import require_regular

_MAX_CARD_BYTES = 2**20

_HUB_NAMES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_HUB_NAMES.split())
"""Identifiers that the Hub accepts in the field `license` of a card; anything else has to be `other`, with a name."""


def folder_licence(folder: Path) -> str | None:
    """The licence that the README.md of a checkpoint or data folder declares."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        require_regular([card])
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


def hub_fields(licences: list[str]) -> dict[str, Any]:
    """Fields `license` and, where the Hub has no identifier for one, `license_name` of a card's front matter.

    Args: licences: as `licence_of_card` gives them: each one name, or several joined by ", ".
    """
    names = list(dict.fromkeys(name.strip() for licence in licences for name in licence.split(",") if name.strip()))
    if not names:
        return {"license": "unknown"}
    if any(name not in HUB_LICENCES for name in names):
        slug = re.sub(r"[^a-z0-9.]+", "-", " ".join(names).lower()).strip("-")[:96]  # all that the Hub takes there
        return {"license": "other", "license_name": slug or "custom"}
    return {"license": names[0] if len(names) == 1 else names}
