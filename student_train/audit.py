"""`tide inspect-cache --audit`: how true a cache is, by mask ratio, on the targets that it stores in full.

1. the audited targets and their views, evenly thinned out where they are many (audit_rows.py);
2. the student at whose logits gradients are taken: a checkpoint's own answers on those views, or stand-ins made of the
   audited distributions, since a gradient depends on the student;
3. per target: stored and exact tails, what rounding cost, gradients of every loss (audit_gradients.py);
4. means, cosines and ratios by bin of the masked share, as plain JSON (audit_sums.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..shared.cache import Cache, ViewRow, open_cache
from ..shared.cache.audit import AuditRow
from ..shared.cache.manifest import AuditInfo
from ..shared.cache.verify import audit_is_here
from ..shared.config import DataConfig, DecodingConfig, RunConfig, StudentConfig
from ..shared.devices import process_device
from ..shared.errors import CacheError
from .audit_gradients import Answers, places
from .audit_rows import SLICE_BYTES, AuditedViews, Group
from .audit_sums import AuditSums, bins_of
from .batches import Batch, View, collate
from .open_student import open_encoder, open_model
from .student import Student

MAX_VALUES = 1 << 25
"""Audited targets times tokens of the support that are compared; of more, evenly spaced targets are."""


class AskedStudent(Protocol):
    """A student at whose logits gradients are compared."""

    @property
    def name(self) -> str:
        """For the output."""
        ...

    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Something with a row for each of the batch's chosen targets."""
        ...

    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and the columns [S] of the support, from rows of `prepare` and the teacher's [n, S]."""
        ...


@dataclass(frozen=True)
class StandIn:
    """A student made of the audit itself: `unigram` says the audited targets' mean distribution at every target;
    `halfway` the geometric mean of that and the teacher."""

    name: str
    unigram_logp: Tensor  # [S]
    teacher_share: float

    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Nothing is needed of the batch."""
        return torch.zeros(len(targets), 0)

    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """See `AskedStudent`."""
        mixed = self.teacher_share * dense + (1 - self.teacher_share) * self.unigram_logp
        return torch.log_softmax(mixed, dim=1), torch.arange(dense.shape[1])


@dataclass(frozen=True)
class CheckpointStudent:
    """A real student: its own forward on the audited views."""

    name: str
    student: Student
    support: Tensor  # [S] student ids

    @torch.inference_mode()
    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Hidden states at the targets."""
        device = self.student.model.device
        hidden = self.student.hidden(batch.rows.to(device)).flatten(0, 1)
        return hidden[batch.read[batch.target[targets]].to(device)]

    @torch.inference_mode()
    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """See `AskedStudent`."""
        weight = self.student.head_weight()
        return (prepared.to(weight.dtype) @ weight.T).cpu().double(), self.support


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
    students: list[AskedStudent] = [_open_student(cache, student, support, device)] if student else _stand_ins(chosen)
    sums = AuditSums(cache.manifest.signal.temperatures, [one.name for one in students])
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


def _open_student(cache: Cache, path: str, support: np.ndarray, device: str) -> CheckpointStudent:
    block_size = cache.manifest.block_size
    config = RunConfig(
        student=StudentConfig(path=path, block_size=block_size), data=DataConfig(max_length=block_size)
    )  # fmt: skip
    open_encoder(config, cache)
    here = process_device(device, "decoding.device")
    model = open_model(config, cache, None).eval().to(here)  # type: ignore[arg-type]
    return CheckpointStudent(Path(path).name or path, Student(model), torch.from_numpy(support))


def _stand_ins(chosen: "AuditedViews") -> list[AskedStudent]:
    total, count = 0.0, 0
    for row in chosen.audit_rows():
        total, count = total + torch.softmax(torch.tensor(row.logp, dtype=torch.float64), dim=0), count + 1
    unigram = torch.log(torch.as_tensor(total) / count)
    return [StandIn("unigram", unigram, 0.0), StandIn("halfway", unigram, 0.5)]


def _compare(
    group: Group, students: Sequence[AskedStudent], sums: "AuditSums", support: np.ndarray, cache: Cache
) -> None:  # fmt: skip
    """Add the audited targets of a few views."""
    layout, manifest = cache.layout, cache.manifest
    views = [[View(row, _masked(row), row.t, True)] for row in group.views]
    batch = collate(
        views, mask_id=manifest.student.mask_id, block_size=layout.block_size, top_k=layout.top_k,
        temperatures=layout.temperatures,
    )  # fmt: skip
    rows = [(view, one) for view, audited in zip(group.views, group.audited, strict=True) for one in audited]
    starts = np.cumsum([0, *(len(view.target_position) for view in group.views)])
    of_views = zip(group.views, starts[:-1].tolist(), group.audited, strict=True)
    targets = torch.tensor([start + _target_of(view, one) for view, start, audited in of_views for one in audited])
    prepared = {one.name: one.prepare(batch, targets) for one in students}
    ids, vocab_size = torch.from_numpy(support), layout.vocab_size
    gold = torch.tensor([int(view.x_0[one.position]) for view, one in rows])
    chunk_logp = batch.teacher.gold_logp[targets].double()  # each target is a chunk of its own
    cuts = torch.tensor(layout.tail_buckets)
    bucket = torch.bucketize(ids, cuts, right=True) if len(cuts) else None
    most = max(1, SLICE_BYTES // (8 * max(len(support), vocab_size)))
    for start in range(0, len(rows), most):
        part = slice(start, start + most)
        dense = torch.from_numpy(np.stack([one.logp for _, one in rows[part]])).double()
        teacher = batch.teacher[targets[part]]
        answers = Answers(
            dense, torch.arange(len(ids)), dense, teacher, places(teacher.top_ids, ids, vocab_size),
            places(gold[part], ids, vocab_size), chunk_logp[part], bucket,
        )  # fmt: skip
        bins = bins_of(np.array([one.masked_share for _, one in rows[part]]))
        sums.add_tails(answers, bins)
        for one in students:
            logits, columns = one.logits(prepared[one.name][part], dense)
            logits = logits.clone()  # an inference tensor takes no gradient, its copy does
            sums.add_gradients(one.name, answers._replace(logits=logits, support=columns), bins)


def _masked(row: ViewRow) -> np.ndarray:
    return np.concatenate([np.zeros(row.prompt_tokens, bool), row.masked])


def _target_of(view: ViewRow, audited: AuditRow) -> int:
    place = int(np.searchsorted(view.target_position, audited.position))
    if place == len(view.target_position) or view.target_position[place] != audited.position:
        raise CacheError(
            f"the audit names position {audited.position} of sample {view.sample_id!r:.80}, view {view.view}, which "
            "is no target; run verify-cache"
        )
    return place
