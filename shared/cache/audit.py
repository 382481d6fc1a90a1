"""The audit: a few targets with the teacher's whole distribution, beside the shard that keeps its most likely tokens.

    audit/audit-00000-of-00128.parquet      one row per audited target of that shard, in the shard's order
    sample_id string, view int32, t float   as in the shard
    masked_share float                      masked positions over the tokens of the response
    position int32                          of the target, in x_0
    logp list<float>                        [S] nats at temperature 1, over the teacher's whole vocabulary

The S tokens are the loss support in ascending order of student ids: those with a teacher_id in vocabulary.parquet.
Values have the precision of `signal.logp_dtype`, float16 stored as FLOAT. Training reads none of this; `tide
inspect-cache --audit` compares with it what the cache keeps (student_train/audit.py). Files are written like shards
(writer.py), before the receipt of their shard, which names them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError
from .batch import POSITIVE_ROUNDING
from .receipts import audit_name
from .schema import MAX_SAMPLE_ID, ROW_GROUP_BYTES, Layout, shard_metadata
from .writer import grouped, read_back, whole_or_absent, write_tables

__all__ = ["AuditBatch", "AuditRow", "audit_name", "read_audit_group", "stored_logp", "write_audit"]

LOWEST_FLOAT16 = -65504.0
"""Log-probabilities below it, which no model of ours has shown, are stored as it."""
NUMBERS = {"view": np.int32, "t": np.float32, "masked_share": np.float32, "position": np.int32}
SCALARS = ("sample_id", *NUMBERS)
LOGP_LEAF = "logp.list.element"
AUDIT_SCHEMA = pa.schema([
    pa.field("sample_id", pa.string(), nullable=False),
    *(pa.field(name, pa.from_numpy_dtype(kind), nullable=False) for name, kind in NUMBERS.items()),
    pa.field("logp", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
])  # fmt: skip
OPTIONS = {
    "version": "2.6", "compression": "zstd", "compression_level": 3, "use_dictionary": ["sample_id"],
    "column_encoding": {**dict.fromkeys(NUMBERS, "PLAIN"), LOGP_LEAF: "BYTE_STREAM_SPLIT"},
    "write_page_checksum": True, "write_page_index": True, "store_schema": False,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AuditRow:
    """One audited target: where it stands, and `logp` float32 [S] over the loss support."""

    sample_id: str
    view: int
    t: float
    masked_share: float
    position: int
    logp: np.ndarray


@dataclass(frozen=True, eq=False)
class AuditBatch(Sequence[AuditRow]):
    """The rows of one row group by column; `logp` is float32 [rows, S]."""

    where: str
    first_row: int
    sample_id: list[str]
    view: np.ndarray
    t: np.ndarray
    masked_share: np.ndarray
    position: np.ndarray
    logp: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_id)

    def __getitem__(self, row: int) -> AuditRow:  # type: ignore[override]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return AuditRow(self.sample_id[row], **{n: getattr(self, n)[row].item() for n in NUMBERS}, logp=self.logp[row])

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Feed every value into `digest`: equal digests mean equal rows."""
        digest.update("\0".join(self.sample_id).encode())
        for name in (*NUMBERS, "logp"):
            digest.update(np.ascontiguousarray(getattr(self, name)).data)


def stored_logp(logp: np.ndarray, layout: Layout) -> np.ndarray:
    """Log-probabilities in the precision that the audit stores; the array is no larger than it has to be."""
    logp = np.where((logp > 0) & (logp <= POSITIVE_ROUNDING), np.float32(0), logp)  # rounding of a certain teacher
    if layout.logp_dtype == "float32":
        return logp.astype(np.float32)
    return np.maximum(logp, LOWEST_FLOAT16).astype(np.float16)


def write_audit(path: str | Path, rows: Iterable[AuditRow], layout: Layout, *, plan_hash: str, shard: int) -> None:
    """Write the audit of one shard, whole or not at all: fsynced, read back and compared, then renamed.

    Args:
        rows: in the shard's order, of `stored_logp`; at least one.
        plan_hash, shard: kept in the file's metadata, as in a shard's.
    Raises: CacheError: a value is out of range; names row, sample and field. OutputError: as `write_shard`.
    """
    path = Path(path)
    with whole_or_absent(path) as sink:
        digest, num_rows = hashlib.sha256(), 0

        def tables() -> Iterator[pa.Table]:
            nonlocal num_rows
            for group in grouped(rows, lambda row: 4 * len(row.logp), ROW_GROUP_BYTES):
                columns = {
                    name: np.array([getattr(row, name) for row in group], kind) for name, kind in NUMBERS.items()
                }
                logp = np.stack([row.logp for row in group]).astype(np.float32) + np.float32(0)  # no -0.0
                batch = AuditBatch(str(path), num_rows, [row.sample_id for row in group], **columns, logp=logp)
                check_audit_values(batch, layout)
                batch.update_digest(digest)
                num_rows += len(batch)
                yield _table(batch)

        def read(file: pq.ParquetFile, group: int, first_row: int) -> AuditBatch:
            return read_audit_group(file, group, where=str(path), first_row=first_row, full=True)

        write_tables(sink, AUDIT_SCHEMA, OPTIONS, tables(), shard_metadata(plan_hash, shard))
        read_back(sink, digest.hexdigest(), read)


def _table(batch: AuditBatch) -> pa.Table:
    num_rows, num_tokens = batch.logp.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_tokens)
    logp = pa.ListArray.from_arrays(offsets, pa.array(batch.logp.reshape(-1)), type=AUDIT_SCHEMA.field("logp").type)
    scalars = [pa.array(getattr(batch, name), AUDIT_SCHEMA.field(name).type) for name in SCALARS]
    return pa.Table.from_arrays([*scalars, logp], schema=AUDIT_SCHEMA)


def read_audit_group(
    file: pq.ParquetFile, group: int, *, where: str, first_row: int, full: bool = False
) -> AuditBatch:  # fmt: skip
    """Decode one row group; `full`: let Arrow validate every value.

    Raises: CacheError: other columns, a null, or rows with different numbers of tokens.
    """
    table = file.read_row_group(group, use_threads=False)
    table.validate(full=full)
    if table.schema.names != AUDIT_SCHEMA.names or table.schema.types != AUDIT_SCHEMA.types:
        raise CacheError(f"{where}: columns are not those of an audit; got {table.schema}"[:1000])
    columns = {name: table.column(name).combine_chunks() for name in table.schema.names}
    for name, column in columns.items():
        if column.null_count:
            raise CacheError(f"{where}, {name}: holds a null; expected none")
    lengths = np.diff(columns["logp"].offsets.to_numpy())
    if len(lengths) and lengths.min() != lengths.max():
        row = first_row + int(np.argmax(lengths != lengths[0]))
        raise CacheError(f"{where}, row {row}, logp: as many values as in the other rows were expected")
    logp = columns["logp"].flatten()
    if logp.null_count:
        raise CacheError(f"{where}, logp: holds a null; expected none")
    arrays = {name: columns[name].to_numpy(zero_copy_only=False) for name in NUMBERS}
    values = logp.to_numpy(zero_copy_only=False).reshape(len(lengths), -1)
    return AuditBatch(where, first_row, columns["sample_id"].to_pylist(), **arrays, logp=values)


def check_audit_values(batch: AuditBatch, layout: Layout) -> None:
    """What can be said of the rows of an audit by themselves. Raises: CacheError: names row, sample and field."""
    for row, sample in enumerate(batch.sample_id):
        if not 0 < len(sample) <= MAX_SAMPLE_ID or not sample.isprintable():
            raise CacheError(
                f"{batch.where}, row {batch.first_row + row}, sample_id: expected 1 to {MAX_SAMPLE_ID} printable "
                "characters"
            )
    t, share = batch.t, batch.masked_share
    _refuse(batch, ~((t > 0) & (t <= 1)), "t", "not in (0, 1]")
    _refuse(batch, ~((share > 0) & (share <= 1)), "masked_share", "not in (0, 1]")
    _refuse(batch, (batch.view < 0) | (batch.position < 0), "position", "view or position is negative")
    good = np.isfinite(batch.logp) & (batch.logp <= 0)
    _refuse(batch, ~good.all(axis=1), "logp", "holds a value that is not a finite log-probability <= 0")
    if layout.logp_dtype == "float16":
        with np.errstate(over="ignore"):
            rounded = batch.logp.astype(np.float16).astype(np.float32)
        _refuse(batch, (rounded != batch.logp).any(axis=1), "logp", "holds a value that is not a float16 number")
    mass = np.exp(batch.logp, dtype=np.float64).sum(axis=1)
    _refuse(batch, mass > 1 + rounding_mass(layout), "logp", "holds more than the whole probability")


def rounding_mass(layout: Layout) -> float:
    """How far rounding may move a probability mass: the entropy x 2^-11 for float16, sums for float32."""
    return 2e-2 if layout.logp_dtype == "float16" else 1e-4


def _refuse(batch: AuditBatch, bad: Any, field: str, message: str) -> None:
    """Refuse the first row for which `bad` [rows] holds."""
    if bad.any():
        raise audit_error(batch, int(np.argmax(bad)), field, message)


def audit_error(batch: AuditBatch, row: int, field: str, message: str) -> CacheError:
    """A CacheError that names file, row, sample and field."""
    sample = f"sample {batch.sample_id[row]!r:.80}, view {int(batch.view[row])}, position {int(batch.position[row])}"
    return CacheError(f"{batch.where}, row {batch.first_row + row} ({sample}), {field}: {message}")
