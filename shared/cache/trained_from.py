"""What a student remembers of the cache it was trained from: `tide_cache.json` in its folder.

The teacher's and the data's identity and licences, and where the cache lies on the Hub if it came from there: enough
for a card, long after the cache is gone. No path of a machine is in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import to_tree
from .files import from_json, read_json, readable_json
from .hub import HubAddress
from .manifest import DataSource, Manifest, TeacherInfo, check_text
from .reader import Cache

TRAINED_FROM_NAME = "tide_cache.json"
MAX_TRAINED_FROM_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainedFrom:
    """A cache without its shards.

    Args:
        manifest_hash, plan_hash: identify it. address: owner/name on the Hub, commit: there; None: a folder.
        signal: its kind. noise: settings of its views. samples, views: how many of each.
    """

    manifest_hash: str
    plan_hash: str
    address: str | None
    commit: str | None
    signal: str
    teacher: TeacherInfo | None
    sources: tuple[DataSource, ...]
    noise: Mapping[str, Any]
    samples: int
    views: int

    def to_bytes(self) -> bytes:
        """The content of `tide_cache.json`."""
        return readable_json(to_tree(self))

    def at(self, cache: Cache) -> "TrainedFrom":
        """The same, published where `cache` lies."""
        found = trained_from(cache)
        return replace(self, address=found.address, commit=found.commit) if found.address else self


def trained_from(cache: Cache) -> TrainedFrom:
    """What is worth remembering of an open cache."""
    manifest: Manifest = cache.manifest
    on_hub = cache.address if isinstance(cache.address, HubAddress) else None
    return TrainedFrom(
        manifest.hash, manifest.plan_hash, on_hub.repository if on_hub else None,
        on_hub.revision if on_hub else None, manifest.signal.kind, manifest.teacher, manifest.sources,
        dict(manifest.noise), manifest.totals.samples, manifest.totals.rows,
    )  # fmt: skip


def read_trained_from(folder: Path) -> TrainedFrom | None:
    """What a student's folder says; None if it says nothing. Raises: CacheError: it is damaged."""
    file = folder / TRAINED_FROM_NAME
    if not file.exists():
        return None
    tree = read_json(file, max_bytes=MAX_TRAINED_FROM_BYTES)
    check_text(tree, str(file))
    return from_json(TrainedFrom, tree, str(file))
