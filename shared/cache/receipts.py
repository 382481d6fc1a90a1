"""Receipts: "this shard is done", one small JSON file per shard, written after the shard has its final name.

A shard counts as done when receipt and file agree. Doing it twice is harmless, so a receipt that is missing, damaged or
of another plan simply means: not done.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import to_tree
from ..errors import CacheError
from .files import atomic_write, file_inside, from_json, read_json, readable_json, sha256_file
from .statistics import ShardStatistics

MAX_RECEIPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Receipt:
    """What a finished shard is: `name` relative to the cache folder, SHA-256 and bytes of the file, its statistics.

    Args: left_out: planned samples that are not in it, by reason (`data.skip_bad`).
    """

    plan_hash: str
    shard: int
    name: str
    sha256: str
    bytes: int
    rows: int
    statistics: ShardStatistics
    left_out: dict[str, int] = field(default_factory=dict)


def receipt_path(root: str | Path, shard: int) -> Path:
    """Where the receipt of a shard lies."""
    return Path(root) / "receipts" / f"{shard:05d}.json"


def listed_receipts(root: str | Path) -> set[int]:
    """Numbers of the shards that have a receipt, by one listing; whether it agrees with its file is not looked at."""
    try:
        names = os.listdir(Path(root) / "receipts")
    except OSError:
        return set()
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}


def write_receipt(
    root: str | Path, name: str, *, shard: int, plan_hash: str, statistics: ShardStatistics,
    left_out: Mapping[str, int] | None = None,
) -> Receipt:  # fmt: skip
    """Hash the finished shard `root / name` and write its receipt atomically.

    Raises: CacheError: the shard is not there; OutputError: the receipt cannot be written.
    """
    path = file_inside(Path(root), name)
    receipt = Receipt(
        plan_hash,
        shard,
        name,
        sha256_file(path),
        path.stat().st_size,
        statistics.rows,
        statistics,
        dict(left_out or {}),
    )
    atomic_write(receipt_path(root, shard), readable_json(to_tree(receipt)))
    return receipt


def read_receipt(root: str | Path, shard: int) -> Receipt | None:
    """The receipt of a shard, or None if it is missing or damaged."""
    path = receipt_path(root, shard)
    try:
        file_inside(Path(root), str(path.relative_to(root)))
        return from_json(Receipt, read_json(path, max_bytes=MAX_RECEIPT_BYTES), str(path))
    except (FileNotFoundError, CacheError):
        return None


def shard_is_done(root: str | Path, shard: int, plan_hash: str, *, full: bool = False) -> Receipt | None:
    """The receipt, if it is of this plan and agrees with the file; else None: do the shard (again).

    Args:
        full: compare the SHA-256 as well as the size.
    """
    receipt = read_receipt(root, shard)
    if receipt is None or receipt.plan_hash != plan_hash or receipt.shard != shard:
        return None
    try:
        path = file_inside(Path(root), receipt.name)
        if path.stat().st_size != receipt.bytes or (full and sha256_file(path) != receipt.sha256):
            return None
    except (CacheError, FileNotFoundError):
        return None
    return receipt
