"""`tide inspect-cache --audit`: how true a cache is, by mask ratio, on the targets that it stores in full.

1. the audited targets and their views, evenly thinned out where they are many; of a shard only the row groups with an
   audited view are decoded, of an audit file only those with a chosen row;
2. the student at whose logits gradients are taken: a checkpoint's own answers on those views, or stand-ins made of the
   audited distributions, since a gradient depends on the student;
3. per target: stored and exact tails, what rounding cost, gradients of every loss; by bin of the masked share their
   means, cosines and ratios, as plain JSON (audit_gradients.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..shared.cache import Cache, ViewRow, open_cache
from ..shared.cache.audit import AuditRow, read_audit_group
from ..shared.cache.files import file_inside, pinned_parquet
from ..shared.cache.manifest import AuditInfo, FileEntry
from ..shared.cache.trust import is_private
from ..shared.cache.verify import audit_is_here
from ..shared.config import DataConfig, DecodingConfig, RunConfig, StudentConfig
from ..shared.devices import process_device
from ..shared.errors import CacheError
from .audit_gradients import AuditedTargets, AuditSums
from .batches import Batch, collate
from .open_student import open_encoder, open_model
from .student import Student

MAX_VALUES = 1 << 25
"""Audited targets times tokens of the support that are compared; of more, evenly spaced targets are."""
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

    def _read(self, entry: FileEntry, first: int) -> Iterator[AuditRow]:
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


Ask = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Some of a group's targets, the teacher's [n, S] there -> a student's logits [n, V] and the support's columns [S]."""
AskedStudent = Callable[[Batch, Tensor], Ask]
"""A student at whose logits gradients are compared: a batch of views and its chosen targets -> how to ask it there."""


def stand_in(unigram_logp: Tensor, teacher_share: float) -> AskedStudent:
    """A student made of the audit itself: the audited targets' mean distribution [S] at every target, or (`halfway`)
    the geometric mean of that and the teacher."""

    def ask(part: slice, dense: Tensor) -> tuple[Tensor, Tensor]:
        mixed = teacher_share * dense + (1 - teacher_share) * unigram_logp
        return torch.log_softmax(mixed, dim=1), torch.arange(dense.shape[1])

    return lambda batch, targets: ask


def real_student(student: Student, support: Tensor) -> AskedStudent:
    """A checkpoint: its own forward on the audited views. Args: support: [S] student ids."""

    @torch.inference_mode()
    def prepare(batch: Batch, targets: Tensor) -> Ask:
        device = student.model.device
        states = student.hidden(batch.rows.to(device)).flatten(0, 1)
        at_targets, weight = states[batch.read[batch.target[targets]].to(device)], student.head_weight()

        @torch.inference_mode()
        def ask(part: slice, dense: Tensor) -> tuple[Tensor, Tensor]:
            return (at_targets[part].to(weight.dtype) @ weight.T).cpu().double(), support

        return ask

    return prepare


def describe_audit(
    root: str | Path, *, student: str | None = None, device: str = DecodingConfig.device
) -> dict[str, Any]:
    """Compare what a cache keeps with what it stores in full.

    Args: student: checkpoint folder or hub id; None: the stand-ins `unigram` and `halfway`.
        device: where that student runs, as `decoding.device`.
    Returns: plain JSON: `share`, `targets`, `compared`, `support_tokens`, `bytes`, `bin_edges`, `bin_targets`, and per
        temperature `tail` and `kl`, per student `losses`; a list over bins has None where a bin is empty.
    Raises: CacheError: no audit (with how to get one), or damaged. CacheMismatch, ConfigError: see `open_student`.
    """
    cache = open_cache(root)
    info = _require_audit(cache)
    support = np.flatnonzero(cache.vocabulary().teacher_id >= 0)
    total = sum(entry.rows for entry in info.files)
    step = max(1, -(-total * info.support_tokens // MAX_VALUES))
    chosen = AuditedViews(cache, support, step)
    if student:
        block_size = cache.manifest.block_size
        config = RunConfig(
            student=StudentConfig(path=student, block_size=block_size), data=DataConfig(max_length=block_size)
        )  # fmt: skip
        open_encoder(config, cache)
        here = process_device(device, "decoding.device")
        model = open_model(config, cache, None).eval().to(here)  # type: ignore[arg-type]
        students = {Path(student).name or student: real_student(Student(model), torch.from_numpy(support))}
    else:
        sum_p, count = torch.zeros(len(support), dtype=torch.float64), 0
        for row in chosen.audit_rows():
            sum_p, count = sum_p + torch.softmax(torch.tensor(row.logp, dtype=torch.float64), dim=0), count + 1
        unigram = torch.log(sum_p / count)
        students = {"unigram": stand_in(unigram, 0.0), "halfway": stand_in(unigram, 0.5)}
    sums = AuditSums(cache.manifest.signal.temperatures)
    for group in chosen.groups():
        _compare(group, students, sums, support, cache)
    return {
        "cache": str(root), "manifest_hash": cache.manifest.hash, "share": info.share, "targets": total,
        "support_tokens": info.support_tokens, "bytes": sum(entry.bytes for entry in info.files), **sums.summary(),
    }  # fmt: skip


def _require_audit(cache: Cache) -> AuditInfo:
    """Raises: CacheError: there is no audit, or nothing in it; says how to get one."""
    info, root = cache.manifest.audit, cache.root
    if info is None:
        how = "dump again with --set signal.audit_share=0.001 (into another --out) to store some targets in full"
        if cache.manifest.signal.kind != "topk":
            how = f"signal {cache.manifest.signal.kind} keeps no distributions over tokens that one could compare"
        elif cache.manifest.parts:
            how = "it was merged, and the audits stayed with its parts; inspect those"
        raise CacheError(f"{root}: this cache has no audit: {how}")
    if not info.files:
        raise CacheError(
            f"{root}: no target was drawn for the audit at signal.audit_share = {info.share}; dump again with a larger "
            "share (into another --out)"
        )
    if not audit_is_here(root, cache.manifest):
        raise CacheError(
            f"{root}: the audit was left out when this cache was pulled; run pull-cache again with --audit"
        )
    return info


def _compare(
    group: Group, students: Mapping[str, AskedStudent], sums: AuditSums, support: np.ndarray, cache: Cache
) -> None:  # fmt: skip
    """Add the audited targets of a few views."""
    layout, manifest = cache.layout, cache.manifest
    batch = collate(
        [[view] for view in group.views], mask_id=manifest.student.mask_id, block_size=layout.block_size,
        top_k=layout.top_k, temperatures=layout.temperatures,
    )  # fmt: skip
    rows, targets, start = [], [], 0
    for view, audited in zip(group.views, group.audited, strict=True):
        place_of = {int(position): start + place for place, position in enumerate(view.target_position)}
        start += len(place_of)
        for one in audited:
            if one.position not in place_of:
                raise CacheError(
                    f"the audit names position {one.position} of sample {view.sample_id!r:.80}, view {view.view}, "
                    "which is no target; run verify-cache"
                )
            rows.append((view, one))
            targets.append(place_of[one.position])
    chosen = torch.tensor(targets)
    asked = {name: prepare(batch, chosen) for name, prepare in students.items()}
    ids, cuts = torch.from_numpy(support), torch.tensor(layout.tail_buckets)
    place = torch.full((layout.vocab_size + 1,), -1, dtype=torch.int64)  # in the support; the last is for absent ids
    place[ids] = torch.arange(len(ids))
    gold = torch.tensor([int(view.x_0[one.position]) for view, one in rows])
    chunk_logp = batch.teacher.gold_logp[chosen].double()  # each target is a chunk of its own
    bucket = torch.bucketize(ids, cuts, right=True) if len(cuts) else None
    most = max(1, SLICE_BYTES // (8 * max(len(support), layout.vocab_size)))
    for start in range(0, len(rows), most):
        part = slice(start, start + most)
        dense = torch.from_numpy(np.stack([one.logp for _, one in rows[part]])).double()
        teacher = batch.teacher[chosen[part]]
        compared = AuditedTargets(
            dense, torch.arange(len(ids)), dense, teacher, place[teacher.top_ids], place[gold[part]],
            chunk_logp[part], bucket,
        )  # fmt: skip
        sums.add_tails(compared, [one.masked_share for _, one in rows[part]])
        for name, ask in asked.items():
            logits, columns = ask(part, dense)
            # an inference tensor takes no gradient, its copy does
            sums.add_gradients(name, compared._replace(logits=logits.clone(), support=columns))
