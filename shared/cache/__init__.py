"""The cache: the one thing both stages share at run time. Layout in docs/cache_format.md.

Names are imported on first use, so that the verifying child process pays for pyarrow alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest, read_manifest, write_manifest
    from .reader import Cache, open_cache
    from .receipts import Receipt, shard_is_done, write_receipt
    from .schema import Layout, ViewRow, shard_name
    from .statistics import ShardStatistics
    from .verify import VerifyReport, verify_cache
    from .vocabulary import Vocabulary, read_vocabulary, write_vocabulary
    from .writer import write_shard

__all__ = [
    "Cache",
    "Layout",
    "Manifest",
    "Receipt",
    "ShardStatistics",
    "VerifyReport",
    "ViewRow",
    "Vocabulary",
    "open_cache",
    "read_manifest",
    "read_vocabulary",
    "shard_is_done",
    "shard_name",
    "verify_cache",
    "write_manifest",
    "write_receipt",
    "write_shard",
    "write_vocabulary",
]

_HOMES = {
    "manifest": ("Manifest", "read_manifest", "write_manifest"),
    "reader": ("Cache", "open_cache"),
    "receipts": ("Receipt", "shard_is_done", "write_receipt"),
    "schema": ("Layout", "ViewRow", "shard_name"),
    "statistics": ("ShardStatistics",),
    "verify": ("VerifyReport", "verify_cache"),
    "vocabulary": ("Vocabulary", "read_vocabulary", "write_vocabulary"),
    "writer": ("write_shard",),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
