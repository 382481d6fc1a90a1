"""manifest.json: everything a reader must know about a cache; written last, so its presence means complete.

Strict JSON <-> frozen dataclasses: a missing or unknown field, a wrong type or an unknown schema version is refused.
Codec and noise settings are read from here, never from the training configuration.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import to_tree
from ..errors import CacheError, ConfigError, OutputError
from .files import (
    atomic_write,
    canonical_json,
    file_inside,
    from_json,
    parse_json,
    readable_json,
    sha256_bytes,
    sha256_file,
)
from .manifest_fields import (
    AuditInfo,
    DataSource,
    FileEntry,
    PartInfo,
    ShardEntry,
    SignalInfo,
    StudentInfo,
    TeacherInfo,
    Totals,
)
from .receipts import AuditEntry, Receipt, audit_name, listed_receipts, listed_sizes
from .schema import SCHEMA_VERSION, Layout, shard_name
from .statistics import NUM_BINS, ShardStatistics, merge
from .store import Store, open_store
from .vocabulary import VOCABULARY_NAME

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
STAGING_NAME = ".pull"
"""Folder inside a cache folder where pull-cache gathers files."""
MAX_MANIFEST_BYTES = 8 << 20
"""More would take seconds and hundreds of megabytes to look at."""
MAX_SHARDS = 30_000
"""That this many bytes describe: 15 TB in shards of 512 MB. A plan of more is refused before the work begins."""
SEAL = "sha256"
"""Field of the file that holds the hash of all others: a changed name or licence contradicts nothing else."""
MAX_DESCRIPTION_BYTES = 512 << 10
"""Of a manifest without its list of shards."""
MAX_PLAN_BYTES = 1 << 30
MAX_COUNTED_PLAN_BYTES = 64 << 20
"""Of a plan that is read only to say how many shards are missing."""


@dataclass(frozen=True)
class Manifest:
    """The complete description of a cache (docs/cache_format.md).

    Args:
        plan_hash: SHA-256 of the plan's canonical JSON; every shard carries it too.
        teacher: None for signal kind "none".
        noise: the NoiseConfig of the plan, as plain JSON.
        vocabulary: entry of vocabulary.parquet, or None.
        dropped: samples left out, by reason.
        parts: what a merged cache was put together from; () for a cache that was dumped.
        audit: None: the cache was made without one.
        coverage: what was cut off, and what no chunk covers (coverage.py); {}: nobody counted.
    """

    schema_version: int
    tide_version: str
    plan_hash: str
    signal: SignalInfo
    teacher: TeacherInfo | None
    student: StudentInfo
    block_size: int
    noise: Mapping[str, Any]
    sources: tuple[DataSource, ...]
    vocabulary: FileEntry | None
    shards: tuple[ShardEntry, ...]
    totals: Totals
    statistics: ShardStatistics
    dropped: dict[str, int]
    parts: tuple[PartInfo, ...] = ()
    audit: AuditInfo | None = None
    coverage: dict[str, int] = field(default_factory=dict)

    @property
    def audit_of(self) -> dict[int, AuditEntry]:
        """Audit files by the number of their shard."""
        names = {audit_name(shard, len(self.shards)): shard for shard in range(len(self.shards))}
        return {names[entry.name]: entry for entry in (self.audit.files if self.audit else ())}

    def files(self, *, audit: bool = True) -> list[FileEntry]:
        """Every file that the manifest names; `audit`: those of the audit too."""
        audited = self.audit.files if self.audit and audit else ()
        return [*self.shards, *audited, *([self.vocabulary] if self.vocabulary else [])]

    @property
    def layout(self) -> Layout:
        """Columns and value ranges of the shards."""
        return Layout.of(
            self.signal, signal=self.signal.kind, vocab_size=self.student.vocab_size, block_size=self.block_size
        )

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON: names exactly this cache, every byte of every shard included."""
        return sha256_bytes(canonical_json(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `Manifest.from_json` gives an equal object back."""
        tree = to_tree(self)
        if self.signal.alignment is None:
            del tree["signal"]["alignment"]
        return tree

    @classmethod
    def from_json(cls, tree: Any, where: str = MANIFEST_NAME) -> "Manifest":
        """Strict inverse of `to_json`.

        Raises: CacheError: fields missing, unknown or of the wrong type; another schema version; sums that disagree.
        """
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version != SCHEMA_VERSION or type(version) is not int:
            raise CacheError(
                f"{where}: schema_version is {version!r:.40}, this tide reads {SCHEMA_VERSION}; "
                "use the tide version the manifest names, or dump again"
            )
        size = len(canonical_json({name: value for name, value in tree.items() if name not in ("shards", "audit")}))
        if size > MAX_DESCRIPTION_BYTES:
            raise CacheError(f"{where}: {size:,} bytes besides the list of shards, which no cache needs; refused")
        manifest = from_json(cls, tree, where)
        manifest.check(where)
        return manifest

    def check(self, where: str = MANIFEST_NAME) -> None:
        """Raise CacheError unless the parts agree with each other."""
        try:
            for wrong in self._contradictions():
                raise CacheError(f"{where}: {wrong}")
        except ConfigError as error:  # of the layout
            raise CacheError(f"{where}: {error}") from error
        check_text(self.to_json(), where)

    def _contradictions(self) -> Iterator[str]:
        kind, vocab_size, num_shards = self.layout.signal, self.student.vocab_size, len(self.shards)
        if (self.teacher is None) != (kind == "none"):
            yield f"signal kind {kind!r} with{'out' if self.teacher is None else ''} a teacher"
        if max(self.student.mask_id, self.student.eos_id) >= vocab_size:
            yield f"student.mask_id or eos_id is not below student.vocab_size = {vocab_size}"
        if self.vocabulary is not None and self.vocabulary.name != VOCABULARY_NAME:
            yield f"vocabulary.name is {self.vocabulary.name!r:.80}, expected {VOCABULARY_NAME!r}"
        for number, shard in enumerate(self.shards):
            if shard.name != shard_name(number, num_shards):
                yield f"shards.{number}.name is {shard.name!r:.80}, expected {shard_name(number, num_shards)!r}"
        if self.audit is not None:
            yield from self._contradictions_of(self.audit)
        sums = {
            "totals.shards": (self.totals.shards, num_shards),
            "totals.bytes": (self.totals.bytes, sum(shard.bytes for shard in self.shards)),
            "totals.rows": (self.totals.rows, sum(shard.rows for shard in self.shards)),
            "totals.masked_positions": (self.totals.masked_positions, sum(s.masked_positions for s in self.shards)),
        }
        for name in ("samples", "rows", "tokens", "masked_positions"):
            sums[f"statistics.{name}"] = (getattr(self.statistics, name), getattr(self.totals, name))
        for name, (got, expected) in sums.items():
            if got != expected:
                yield f"{name} is {got}, the rest of the manifest gives {expected}; fetch it again"
        for name in ("t_answered", "t_correct", "t_clean_logp"):
            if len(getattr(self.statistics, name)) not in (0, NUM_BINS):
                yield f"statistics.{name}: expected {NUM_BINS} numbers, or none"
        for name in ("t_histogram", "mask_ratio_histogram", "t_targets", "t_head_mass", "t_entropy"):
            if len(getattr(self.statistics, name)) != NUM_BINS:
                yield f"statistics.{name}: expected {NUM_BINS} numbers"

    def _contradictions_of(self, audit: AuditInfo) -> Iterator[str]:
        vocab_size, targets = self.student.vocab_size, self.statistics.targets
        if self.signal.kind != "topk" or self.vocabulary is None:
            yield "audit needs signal kind 'topk', and a vocabulary that says its tokens"
        if not 0 < audit.share <= 1 or not 0 < audit.support_tokens <= vocab_size:
            yield (
                f"audit.share is {audit.share} and audit.support_tokens {audit.support_tokens:,}; expected a share in "
                f"(0, 1] and at most the {vocab_size:,} tokens of the student"
            )
        expected = (audit_name(shard, len(self.shards)) for shard in range(len(self.shards)))
        for number, entry in enumerate(audit.files):
            if entry.name not in expected:  # an iterator: names that were passed over are gone, so order counts
                yield f"audit.files.{number}.name is {entry.name!r:.80}: no shard's, or out of order"
            if not 0 < entry.rows <= targets:
                yield f"audit.files.{number}.rows is {entry.rows:,} of {targets:,} targets"


def audit_entries(receipts: Sequence[Receipt]) -> tuple[AuditEntry, ...]:
    """The field `audit.files` of a manifest, from the receipts in shard order."""
    return tuple(receipt.audit for receipt in receipts if receipt.audit is not None)


def check_text(tree: Any, where: str) -> None:
    """Refuse control characters: names and ids in here end up in terminals and HTML."""
    if isinstance(tree, str) and not tree.isprintable():
        raise CacheError(f"{where}: {tree!r:.80} holds characters that cannot be printed; refused")
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            check_text(key, where)
            check_text(value, f"{where}.{key}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            check_text(value, f"{where}.{index}")


def manifest_parts(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """The fields `shards`, `totals` and `statistics` of a manifest, from the receipts in shard order."""
    statistics = merge([receipt.statistics for receipt in receipts])
    shards = tuple(ShardEntry(r.name, r.sha256, r.bytes, r.rows, r.statistics.masked_positions) for r in receipts)
    totals = Totals(
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        samples=statistics.samples,
        rows=statistics.rows,
        tokens=statistics.tokens,
        masked_positions=statistics.masked_positions,
    )
    return {"shards": shards, "totals": totals, "statistics": statistics}


def is_whole(path: Path, entry: FileEntry) -> bool:
    """Has the file the size and SHA-256 that the manifest names?"""
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256


def file_entry(root: str | Path, name: str) -> FileEntry:
    """Hash and size of a file of the cache."""
    path = file_inside(Path(root), name)
    return FileEntry(name, sha256_file(path), path.stat().st_size)


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Commit the cache: write manifest.json atomically, as the last file of all.

    Raises: CacheError: its parts disagree; OutputError: it cannot be written.
    """
    path = Path(root) / MANIFEST_NAME
    manifest.check(str(path))
    data = sealed_json(manifest.to_json())
    if len(data) > MAX_MANIFEST_BYTES:
        raise CacheError(f"{path}: {len(data):,} bytes for {len(manifest.shards):,} shards; make larger shards")
    atomic_write(path, data)


def sealed_json(tree: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: the fields and, as one more, the SHA-256 of their canonical JSON."""
    fields = {name: value for name, value in tree.items() if name != SEAL}
    return readable_json({**fields, SEAL: sha256_bytes(canonical_json(fields))})


def read_manifest(root: str | Path | Store) -> Manifest:
    """The manifest of a complete cache.

    Raises: CacheError: the folder holds none (an incomplete cache, or none at all), or a damaged one.
    """
    store = open_store(root)
    try:
        data = store.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES, inside=True)
    except FileNotFoundError as error:
        raise CacheError(_why_missing(store)) from error
    return manifest_from_bytes(data, store.path(MANIFEST_NAME))


def manifest_from_bytes(data: bytes, path: str) -> Manifest:
    """The manifest in the bytes of a manifest.json; `path` is its name in messages. Raises: CacheError: damaged."""
    tree = parse_json(data, path, max_bytes=MAX_MANIFEST_BYTES)
    seal = tree.pop(SEAL, None) if isinstance(tree, dict) else None
    manifest = Manifest.from_json(tree, path)
    if seal != sha256_bytes(canonical_json(tree)):
        raise CacheError(
            f"{path}: {SEAL} is {seal!r:.80}, which is not the hash of the other fields; the file is damaged or was "
            "edited, fetch it again"
        )
    return manifest


def _why_missing(store: Store) -> str:
    names = store.names()
    if STAGING_NAME in names:
        return f"{store} is incomplete: a pull was interrupted; run the same pull-cache command again"
    if PLAN_NAME not in names:
        return (
            f"{store} is not a tide cache: it holds neither {MANIFEST_NAME} nor {PLAN_NAME}; give the folder or "
            "address that dump-teacher wrote to"
        )
    data, planned = store.read(PLAN_NAME, max_bytes=MAX_COUNTED_PLAN_BYTES, inside=True), "an unknown number of"
    if len(data) <= MAX_COUNTED_PLAN_BYTES:
        plan = parse_json(data, store.path(PLAN_NAME), max_bytes=MAX_PLAN_BYTES)
        with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
            planned = -(-len(plan["samples"]) // plan["settings"]["shards"]["samples_per_shard"])
    try:
        there = {name.partition("-of-")[0] for name, size in listed_sizes(store).items() if size}
        done = sum(shard_name(shard, 1).partition("-of-")[0] in there for shard in listed_receipts(store))
    except OutputError as error:  # a folder of the cache is a link
        return str(error)
    return f"{store} is incomplete: {done} of {planned} shards done; run the same dump-teacher command again"
