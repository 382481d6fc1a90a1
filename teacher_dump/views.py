"""One view, from the noise draw to the cache row: t and masks, the teacher's answers as they come in, a `ViewRow`.

Answers are indexed by teacher position until `row` turns them into the student's positions and ids.

CompDemo (paper §2.2) decides the teacher's passes over a view: the masked set M is split into A and B; pass 1 shows A
clean and masks B, pass 2 the reverse. The answer at a position comes from the pass in which it was masked. The student
sees all of M masked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..shared.cache import Layout, ViewRow
from ..shared.cache.audit import AuditRow, stored_logp
from ..shared.config import NoiseConfig, SignalConfig
from ..shared.errors import DataError
from ..shared.noising import ViewMasks, audited_positions, draw_masks, masking_units, timesteps
from ..shared.sparse_logits import SparseLogits
from ..shared.tokens import PairedSample
from .teacher import Pass

SKIP = "Or go on without such samples: --skip-bad (data.skip_bad=true) leaves them out and counts them"


class NotNumbers(DataError):
    """The teacher's answer to a sample holds NaN or infinite values."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation of a shard, as both sides read it."""

    sample_id: str
    index: int
    """Position in the plan: decides the strata of its views' t."""
    paired: PairedSample
    is_target: np.ndarray
    """[c] bool: the chunk is one token on each side and the loss support holds that pair."""


def passes(masks: ViewMasks, chunks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """CompDemo: the teacher's passes over one view.

    An empty half costs no pass, and neither does one without a chunk, whose answers nobody would keep.

    Args: chunks: [c, 4] int, the sample's chunks.
    Returns: up to two pairs: bool [l_teacher], the tokens that are masked in this pass; int [?], the active chunks
        among them. Over the passes, each active chunk occurs once.
    """
    both = []
    for masked in (masks.teacher_b, masks.teacher_a):
        answered = masks.active_chunks[masked[chunks[masks.active_chunks, 0]]]
        if len(answered):
            both.append((masked, answered))
    return both


class View:
    """A noise draw of a sample, and what the teacher said about it so far.

    Args:
        signal: what is kept; None: there is no teacher.
        k: top tokens kept at each target; 0: answers on chunks only.
        seed: of the noise; it also decides which targets are stored in full.
    """

    def __init__(
        self, sample: Sample, view: int, t: float, masks: ViewMasks, *, signal: SignalConfig | None, k: int, seed: int
    ) -> None:
        self.sample, self.view, self.t, self.masks, self.signal, self.k = sample, view, t, masks, signal, k
        active = sample.paired.chunks[masks.active_chunks]
        self.chunks = active if signal else active[:0]  # [c, 4]
        self.targets = active[sample.is_target[masks.active_chunks]] if k else active[:0]  # [n, 4]
        length, n = len(sample.paired.teacher.x_0), len(self.targets)
        m = len(signal.temperatures) if signal and k else 0
        self.cuts = signal.tail_buckets if signal and k else ()
        self.gold_logp, self.gold_is_top = _unknown(length), np.zeros(length, bool)
        self.top_ids, self.top_logp = np.full((n, k), -1, np.int32), _unknown(n, k)
        self.log_z, self.log_tail = _unknown(n, m), _unknown(n, m)
        self.log_buckets = _unknown(n, m, len(self.cuts) + 1 if self.cuts else 0)
        share, num_tokens = signal.audit_share if signal else 0.0, len(sample.paired.student.x_0)
        self.audited = audited_positions(
            self.targets[:, 2], num_tokens, sample.sample_id, view, seed=seed, share=share
        )  # [n]
        self.dense: dict[int, np.ndarray] = {}  # of audited targets, by the teacher's position

    def passes(self, place: int) -> Iterator[Pass]:
        """What the teacher has to be asked; `place`: index of the sample in the teacher's context."""
        chunks = self.sample.paired.chunks
        for masked, active in passes(self.masks, chunks):
            answered, target, audited = np.zeros((3, len(masked)), bool)
            for start, end, *_ in chunks[active]:
                answered[start:end] = True
            target[self.targets[:, 0]] = masked[self.targets[:, 0]]
            audited[self.targets[self.audited, 0]] = masked[self.targets[self.audited, 0]]
            yield Pass(place, masked, answered, target, audited)

    def keep(
        self, asked: Pass, gold_logp: Tensor, gold_is_top: Tensor, targets: SparseLogits, dense: np.ndarray,
        layout: Layout,
    ) -> None:  # fmt: skip
        """Take the answers of one pass.

        Args:
            gold_logp, gold_is_top: float32 and bool [n] at `asked.answered`, as in `Answers`.
            targets: [m] at `asked.target`, with student ids, on the CPU.
            dense: [a, S] whole distributions at `asked.audited`, kept as the audit of a cache of `layout` stores them.
        Raises: NotNumbers: an answer is not a finite number.
        """
        if not all(torch.isfinite(values).all() for values in (gold_logp, targets.top_logp, targets.log_z)):
            raise NotNumbers(
                f"sample {self.sample.sample_id}, view {self.view}: the teacher's answer holds NaN or infinite "
                "log-probabilities; its weights are damaged or overflow in teacher.dtype, try teacher.dtype=float32. "
                f"{SKIP}"
            )
        self.gold_logp[asked.answered] = gold_logp
        self.gold_is_top[asked.answered] = gold_is_top
        at = np.searchsorted(self.targets[:, 0], np.flatnonzero(asked.target))
        for name in ("top_ids", "top_logp", "log_z", "log_tail", "log_buckets"):
            values = getattr(targets, name)
            if values is not None:
                getattr(self, name)[at] = values
        audited = [] if asked.audited is None else np.flatnonzero(asked.audited).tolist()
        self.dense |= {position: stored_logp(logp, layout) for position, logp in zip(audited, dense, strict=True)}

    def audit_rows(self) -> Iterator[AuditRow]:
        """Rows of the audit, on the student's positions."""
        prompt_tokens, masked = self.sample.paired.student.prompt_tokens, self.masks.student
        share = float(masked.sum() / max(1, len(masked) - prompt_tokens))
        for teacher_position, _, position, _ in self.targets[self.audited].tolist():
            logp = self.dense[teacher_position]
            yield AuditRow(self.sample.sample_id, self.view, float(self.t), share, position, logp)

    def row(self, *, answered: bool = True) -> ViewRow:
        """The cache row, on student positions and ids; `answered`: with what the teacher said."""
        student = self.sample.paired.student
        common = {
            "sample_id": self.sample.sample_id, "view": self.view, "t": float(self.t), "x_0": student.x_0,
            "prompt_tokens": student.prompt_tokens, "masked": self.masks.student[student.prompt_tokens :],
        }  # fmt: skip
        if self.signal is None or not answered:
            return ViewRow(**common)
        common |= {
            "chunk_start": self.chunks[:, 2], "chunk_len": self.chunks[:, 3] - self.chunks[:, 2],
            "chunk_logp": _segment_sums(self.gold_logp, self.chunks[:, 0], self.chunks[:, 1]),
        }  # fmt: skip
        if not self.k:
            return ViewRow(**common)
        p = self.signal.min_probability
        # A top token below p is left to the tail; exact in float32, in which both sides compare.
        kept = self.top_logp >= np.float32(math.log(p) if p else -math.inf)
        kept[:, :1] = True  # the first in any case
        log_tail, log_buckets = self.log_tail.copy(), self.log_buckets.copy()
        left_out = np.where(kept, -np.inf, self.top_logp)
        target, entry = np.nonzero(~kept & (self.top_ids >= 0))
        bucket = np.searchsorted(self.cuts, self.top_ids[target, entry], side="right")
        for column, temperature in enumerate(self.signal.temperatures):
            dropped = np.logaddexp.reduce(left_out / temperature, axis=1) - self.log_z[:, column]
            log_tail[:, column] = np.logaddexp(log_tail[:, column], dropped)
            if self.cuts:
                dropped = self.top_logp[target, entry] / temperature - self.log_z[target, column]
                np.logaddexp.at(log_buckets[:, column], (target, bucket), dropped)
        return ViewRow(
            **common, target_position=self.targets[:, 2], num_top=kept.sum(axis=1).astype(np.int32),
            top_ids=self.top_ids[kept], top_logp=self.top_logp[kept], log_tail=np.minimum(log_tail, 0.0),
            log_buckets=np.minimum(log_buckets, 0.0),
        )  # fmt: skip


def draw_views(sample: Sample, noise: NoiseConfig, *, signal: SignalConfig | None, k: int) -> list[View]:
    """All views of a sample, with their keyed noise, unanswered; `signal` and `k`: see `View`."""
    student, teacher, name = sample.paired.student, sample.paired.teacher, sample.sample_id
    units = masking_units(
        sample.paired.chunks, len(student.x_0), student.prompt_tokens, len(teacher.x_0), teacher.prompt_tokens
    )
    return [
        View(sample, view, t, draw_masks(units, t, name, view, noise), signal=signal, k=k, seed=noise.seed)
        for view, t in enumerate(timesteps(sample.index, name, noise).tolist())
    ]


def _unknown(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def _segment_sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of values[start:end] over non-empty spans, added in float64 and rounded once to float32; none above 0."""
    if not len(starts):
        return np.zeros(0, np.float32)
    padded = np.append(values.astype(np.float64), 0.0)  # reduceat wants ends below the length
    sums = np.add.reduceat(padded, np.stack([starts, ends], axis=1).ravel())[::2]
    return np.minimum(sums, 0.0).astype(np.float32)
