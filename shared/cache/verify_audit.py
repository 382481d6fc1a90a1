"""Checks 3 to 5 of an audit: its footer, its pages, and that it agrees with the shard it stands beside.

An audited distribution must be of a target of that very view, say the same of the kept tokens and of the tail as the
shard does, within what rounding explains, and be of the targets that the keyed draw chose: an audit of hand-picked
positions would prove nothing. Merged caches carry none.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import CacheError
from ..noising import audited_positions
from .audit import (
    AUDIT_SCHEMA,
    LOGP_LEAF,
    OPTIONS,
    SCALARS,
    AuditBatch,
    audit_error,
    check_audit_values,
    read_audit_group,
    rounding_mass,
)
from .batch import RowBatch
from .files import file_inside, pinned_parquet
from .footers import check_parquet_footer, written_schema
from .manifest import FileEntry, Manifest
from .schema import Layout, ViewRow, shard_metadata


def check_audit_footer(root: Path, manifest: Manifest, shard: int, *, full: bool = True) -> int:
    """Check 3 of one shard's audit, and if `full` its SHA-256; uncompressed bytes of its largest row group.

    Raises: CacheError.
    """
    assert manifest.audit is not None
    entry = manifest.audit_of[shard]
    path = file_inside(root, entry.name)
    with pinned_parquet(path, entry.sha256 if full else None) as file:
        return check_parquet_footer(
            file, path, expected=written_schema(AUDIT_SCHEMA, OPTIONS), entry=entry,
            metadata=shard_metadata(manifest.plan_hash, shard),
            values_per_row={**dict.fromkeys(SCALARS, 1), LOGP_LEAF: manifest.audit.support_tokens},
        )  # fmt: skip


class AuditCheck:
    """Walks through the audit of one shard while the shard's batches go by.

    Args: support: student ids of the loss support, ascending.
    Raises: CacheError: the support is not of the size that the manifest says.
    """

    def __init__(self, root: Path, manifest: Manifest, shard: int, support: np.ndarray) -> None:
        assert manifest.audit is not None
        self.audit, self.layout = manifest.audit, manifest.layout
        if len(support) != self.audit.support_tokens:
            raise CacheError(
                f"{root / 'manifest.json'}: audit.support_tokens is {self.audit.support_tokens:,}, the vocabulary "
                f"gives {len(support):,}"
            )
        self.place = np.full(manifest.student.vocab_size, -1, np.int64)
        self.place[support] = np.arange(len(support))
        self.seed = manifest.noise.get("seed")
        entry = manifest.audit_of.get(shard)
        self.where = root / ("manifest.json (audit.files)" if entry is None else entry.name)
        self._rows = iter(()) if entry is None else self._walk(root, entry)
        self._next = next(self._rows, None)

    def _walk(self, root: Path, entry: FileEntry) -> Iterator[tuple[AuditBatch, int]]:
        """Every row of the file, checked by itself; a row group at a time."""
        path, first_row, expected = file_inside(root, entry.name), 0, self.audit.support_tokens
        with pinned_parquet(path, entry.sha256) as file:
            for group in range(file.num_row_groups):
                batch = read_audit_group(file, group, where=str(path), first_row=first_row, full=True)
                if batch.logp.shape[1] != expected:
                    raise CacheError(
                        f"{path}, logp: {batch.logp.shape[1]:,} values each, expected one for each support token"
                    )
                check_audit_values(batch, self.layout)
                first_row += len(batch)
                yield from ((batch, row) for row in range(len(batch)))

    def compare(self, batch: RowBatch) -> None:
        """Check the audited targets of these rows of the shard. Raises: CacheError."""
        for row in batch:
            found = []
            while self._next is not None:
                audited, place = self._next
                if (audited.sample_id[place], int(audited.view[place])) != (row.sample_id, row.view):
                    break
                self._check_row(audited, place, row)
                found.append(int(audited.position[place]))
                self._next = next(self._rows, None)
            if not len(row.target_position) or type(self.seed) is not int:
                continue
            drawn = audited_positions(
                row.target_position, len(row.x_0), row.sample_id, row.view, seed=self.seed, share=self.audit.share
            )
            expected = row.target_position[drawn].tolist()
            if found != expected:
                raise CacheError(
                    f"{self.where}: sample {row.sample_id!r:.80}, view {row.view}: audited positions are "
                    f"{found!r:.80}, the draw of noise.seed and audit.share gives {expected!r:.80}"
                )

    def finish(self) -> None:
        """After the last row of the shard: nothing of the audit may be left. Raises: CacheError."""
        if self._next is not None:
            batch, row = self._next
            raise audit_error(batch, row, "sample_id", "the shard has no such view, or the rows are not in its order")

    def _check_row(self, batch: AuditBatch, place: int, row: ViewRow) -> None:
        position = int(batch.position[place])
        target = int(np.searchsorted(row.target_position, position))
        if target == len(row.target_position) or row.target_position[target] != position:
            raise audit_error(batch, place, "position", "is not a target of this view")
        share = np.float32(row.masked.sum() / max(1, len(row.masked)))
        if batch.t[place] != np.float32(row.t) or abs(batch.masked_share[place] - share) > 1e-6:
            raise audit_error(batch, place, "t", "t or masked_share is not the shard's")
        start, count = int(row.num_top[:target].sum()), int(row.num_top[target])
        ids, kept = row.top_ids[start : start + count], row.top_logp[start : start + count]
        where = self.place[ids]
        if (where < 0).any():
            raise audit_error(batch, place, "logp", f"the shard keeps token {ids[where < 0][0]}, outside the support")
        exact = batch.logp[place].astype(np.float64)
        apart = np.abs(exact[where] - kept) - _rounding(kept, self.layout)
        if (apart > 0).any():
            worst = int(np.argmax(apart))
            said = f"{exact[where[worst]]:.4f} for token {ids[worst]}, the shard has {kept[worst]:.4f}"
            raise audit_error(batch, place, "logp", said)
        outside = np.ones(len(exact), bool)
        outside[where] = False
        for temperature, stored in zip(self.layout.temperatures, row.log_tail[target], strict=True):
            scaled = np.exp((exact - exact.max()) / temperature)
            tail = scaled[outside].sum() / scaled.sum()
            if abs(tail - np.exp(stored)) > rounding_mass(self.layout):
                raise audit_error(
                    batch, place, "logp",
                    f"a share of {tail:.4f} is outside the kept tokens at temperature {temperature:g}, the shard has "
                    f"{np.exp(stored):.4f}",
                )  # fmt: skip


def _rounding(kept: np.ndarray, layout: Layout) -> np.ndarray:
    """How far two stored values of one log-probability may lie apart, each rounded for itself."""
    half = np.full(kept.shape, 1e-4) + (np.abs(kept) * 2.0**-11 if layout.logp_dtype == "float16" else 0.0)
    return half + (layout.logp_step / 2 if layout.logp_step else half)
