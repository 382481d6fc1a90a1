"""Receipts: "this shard is done", one small JSON file per shard, written after the shard has its final name.

A shard counts as done when receipt and file agree. Doing it twice is harmless, so a receipt that is missing, damaged or
of another plan simply means: not done.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import to_tree
from ..errors import CacheError
from .files import atomic_write, file_inside, from_json, parse_json, pinned_parquet, readable_json, sha256_file
from .statistics import ShardStatistics
from .store import Store, open_store

MAX_RECEIPT_BYTES = 1 << 20
AUDIT_FOLDER = "audit"
RECEIPTS_FOLDER = "receipts"
SHARD_FOLDER = "data"


def audit_name(shard: int, num_shards: int) -> str:
    """Path of a shard's audit below the cache folder."""
    return f"{AUDIT_FOLDER}/audit-{shard:05d}-of-{num_shards:05d}.parquet"


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class AuditEntry(FileEntry):
    """The audit of one shard; `rows` is its number of audited targets."""

    rows: int


@dataclass(frozen=True)
class Receipt:
    """What a finished shard is: `name` relative to the cache folder, SHA-256 and bytes of the file, its statistics.

    Args:
        audit: of its audited targets; None: it has none.
        left_out: planned samples that are not in it, by reason (`data.skip_bad`).
    """

    plan_hash: str
    shard: int
    name: str
    sha256: str
    bytes: int
    rows: int
    statistics: ShardStatistics
    audit: AuditEntry | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def receipt_name(shard: int) -> str:
    """Path of a shard's receipt below the cache folder."""
    return f"{RECEIPTS_FOLDER}/{shard:05d}.json"


def receipt_path(root: str | Path, shard: int) -> Path:
    """Where the receipt of a shard lies."""
    return Path(root) / receipt_name(shard)


def listed_receipts(root: str | Path | Store) -> set[int]:
    """Numbers of the shards that have a receipt, by one listing; whether it agrees with its file is not looked at."""
    names = open_store(root).names(RECEIPTS_FOLDER)
    return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}


def write_receipt(
    root: str | Path, name: str, *, shard: int, plan_hash: str, statistics: ShardStatistics, audit: str | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Receipt:  # fmt: skip
    """Hash the finished shard `root / name` and write its receipt atomically.

    Args: audit: name of its audit, if it has one.
    Raises: CacheError: the shard is not there; OutputError: the receipt cannot be written.
    """
    path = file_inside(Path(root), name)
    receipt = Receipt(
        plan_hash, shard, name, sha256_file(path), path.stat().st_size, statistics.rows, statistics,
        None if audit is None else _audit_entry(Path(root), audit), dict(left_out or {}),
    )  # fmt: skip
    atomic_write(receipt_path(root, shard), readable_json(to_tree(receipt)))
    return receipt


def _audit_entry(root: Path, name: str) -> AuditEntry:
    path = file_inside(root, name)
    with pinned_parquet(path, None) as file:
        return AuditEntry(name, sha256_file(path), path.stat().st_size, file.metadata.num_rows)


def read_receipt(root: str | Path | Store, shard: int) -> Receipt | None:
    """The receipt of a shard, or None if it is missing or damaged."""
    store, name = open_store(root), receipt_name(shard)
    try:
        data = store.read(name, max_bytes=MAX_RECEIPT_BYTES, inside=True)
        return from_json(Receipt, parse_json(data, store.path(name), max_bytes=MAX_RECEIPT_BYTES), store.path(name))
    except (FileNotFoundError, CacheError):
        return None


def shard_is_done(
    root: str | Path | Store, shard: int, plan_hash: str, *, full: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Receipt | None:  # fmt: skip
    """The receipt, if it is of this plan and agrees with the shard and its audit; else None: do the shard (again).

    Args:
        full: compare the SHA-256 as well as the size.
        sizes: of all shards and audits, if they were listed already (`listed_sizes`).
    """
    store = open_store(root)
    receipt = read_receipt(store, shard)
    if receipt is None or receipt.plan_hash != plan_hash or receipt.shard != shard:
        return None
    try:
        for entry in (receipt, *([receipt.audit] if receipt.audit else [])):
            size = store.num_bytes(entry.name) if sizes is None else sizes.get(entry.name)
            if size != entry.bytes or (full and store.sha256(entry.name) != entry.sha256):
                return None
    except CacheError:
        return None
    return receipt


def listed_sizes(store: Store) -> dict[str, int]:
    """Bytes of every shard and audit that is there, by two listings."""
    return {
        f"{folder}/{name}": entry.bytes
        for folder in (SHARD_FOLDER, AUDIT_FOLDER) for name, entry in store.entries(folder).items()
    }  # fmt: skip
