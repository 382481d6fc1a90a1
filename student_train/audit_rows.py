"""The audited targets of a cache and the views they belong to: evenly thinned out, a forward's worth at a time.

audit files (shared/cache/audit.py) x shards -> groups of views, each with its audited distributions. Of a shard only
the row groups with an audited view are decoded, of an audit file only those with a chosen row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..shared.cache import Cache, ViewRow
from ..shared.cache.audit import AuditRow, read_audit_group
from ..shared.cache.files import file_inside, pinned_parquet
from ..shared.cache.manifest import NamedFile
from ..shared.cache.trust import is_private
from ..shared.errors import CacheError

SLICE_BYTES = 64 << 20
"""Of float64 distributions that are worked on together."""
MAX_VIEWS = 64
"""Views of one forward of the student."""


class Group(NamedTuple):
    """Some views and their audited targets, in order."""

    views: list[ViewRow]
    audited: list[list[AuditRow]]


@dataclass(frozen=True)
class AuditedViews:
    """Every `step`-th audited target of a cache."""

    cache: Cache
    support: np.ndarray
    step: int

    def audit_rows(self) -> Iterator[AuditRow]:
        """The rows of all audit files, thinned out. Raises: CacheError: damaged."""
        for _, rows in self._by_shard():
            yield from rows

    def groups(self) -> Iterator[Group]:
        """The same with their views, a forward's worth at a time. Raises: CacheError: damaged."""
        for shard, rows in self._by_shard():
            place = self._rows_of(shard)
            group, held = Group([], []), None
            most = max(1, SLICE_BYTES // (8 * len(self.support)))
            for row in rows:
                key = (row.sample_id, row.view)
                if key not in place:
                    raise CacheError(
                        f"{self.cache.root}: the audit names sample {row.sample_id!r:.80}, view {row.view}, which the "
                        "shard does not have; run verify-cache"
                    )
                if key == held:
                    group.audited[-1].append(row)
                    continue
                if len(group.views) == MAX_VIEWS or sum(map(len, group.audited)) >= most:
                    yield group
                    group = Group([], [])
                held = key
                group.views.append(self.cache.rows([place[key]])[0])
                group.audited.append([row])
            if group.views:
                yield group

    def _by_shard(self) -> Iterator[tuple[int, Iterator[AuditRow]]]:
        first = 0
        for shard, entry in self.cache.manifest.audit_of.items():
            yield shard, self._read(entry, first)
            first += entry.rows

    def _read(self, entry: NamedFile, first: int) -> Iterator[AuditRow]:
        path, done = file_inside(self.cache.root, entry.name), 0
        with pinned_parquet(path, None if is_private(path) else entry.sha256) as file:
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                wanted = [i for i in range(num_rows) if (first + done + i) % self.step == 0]
                if wanted:
                    batch = read_audit_group(file, group, where=str(path), first_row=done)
                    if batch.logp.shape[1] != len(self.support):
                        raise CacheError(
                            f"{path}: {batch.logp.shape[1]:,} tokens each, the vocabulary gives {len(self.support):,}; "
                            "run verify-cache"
                        )
                    yield from (batch[i] for i in wanted)
                done += num_rows

    def _rows_of(self, shard: int) -> dict[tuple[str, int], int]:
        """Row number in the cache of every view of a shard."""
        shards = self.cache.manifest.shards
        start = sum(entry.rows for entry in shards[:shard])
        path = file_inside(self.cache.root, shards[shard].name)
        with pinned_parquet(path, None if is_private(path) else shards[shard].sha256) as file:
            table = file.read(["sample_id", "view"], use_threads=False)
        keys = zip(table["sample_id"].to_pylist(), table["view"].to_pylist(), strict=True)
        return {key: start + number for number, key in enumerate(keys)}
