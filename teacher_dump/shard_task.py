"""A shard task: a pure function of (plan, shard index) that asks the teacher and writes one shard.

1. samples -> tokens of both sides, chunks, token-level targets
2. every view's t and masks (keyed draws), CompDemo's passes (views.py)
3. micro-batches fixed by the plan's token budget: prefill each group of samples once, then score its passes
4. answers -> `ViewRow`s -> a temporary file, fsynced, read back, renamed; so too the audit of some -> a receipt

Doing a shard twice is harmless: the same bytes come out. A sample that cannot be asked or answered is an error that
names it, or, with `data.skip_bad`, left out and counted: what it is left out of is a function of plan and shard too,
because micro-batches are cut before anything is answered and one sample's rows never touch another's.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..shared.cache import Receipt, shard_name, write_receipt, write_shard
from ..shared.cache.audit import audit_name, write_audit
from ..shared.cache.statistics import NUM_BINS, unit_bin
from ..shared.cache.trust import note_written
from ..shared.conversations import ConversationReader
from ..shared.errors import CacheMismatch, DataError
from ..shared.tokens import PairedSample
from .pairing import Pairing
from .plan import Plan, PlannedSample, digest
from .teacher import Context, Pass, Teacher
from .views import SKIP, NotNumbers, Sample, View, draw_views

Progress = Callable[[int], None]
UNANSWERED, UNUSABLE = "teacher's answer is not a number", "cannot be tokenised"
"""Why a sample is left out, in the manifest's words."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker holds while it works: the plan, the data, the tokenizers and the teacher (None: no teacher)."""

    plan: Plan
    conversations: ConversationReader
    pairing: Pairing
    teacher: Teacher | None

    def run(self, root: Path, shard: int, progress: Progress = lambda tokens: None) -> Receipt:
        """Write shard number `shard` and its receipt below `root`.

        Args: progress: called with the number of teacher token-forwards done since the last call.
        Raises: DataError: the data changed since the plan was made, or the teacher's answers are not numbers.
            OutputError: see `write_shard`.
        """
        first, left_out = shard * self.plan.config.shards.samples_per_shard, dict[str, str]()
        drawn = self.draw(first, self.plan.shard_samples(shard), left_out)
        self.ask(drawn, progress, left_out)
        views = [view for of_sample in drawn for view in of_sample if view.sample.sample_id not in left_out]
        name, plan_hash = shard_name(shard, self.plan.num_shards), self.plan.hash
        rows = (view.row() for view in views)
        statistics = write_shard(root / name, rows, self.plan.layout, plan_hash=plan_hash, shard=shard)
        statistics = replace(statistics, **answered_sums(views, self.plan.unigram))
        audit = audit_name(shard, self.plan.num_shards) if any(view.audited.any() for view in views) else None
        if audit is not None:
            audited = (row for view in views for row in view.audit_rows())
            write_audit(root / audit, audited, self.plan.layout, plan_hash=plan_hash, shard=shard)
        receipt = write_receipt(
            root, name, shard=shard, plan_hash=plan_hash, statistics=statistics, audit=audit,
            left_out=Counter(left_out.values()),
        )  # fmt: skip
        note_written(receipt)
        return receipt

    def draw(
        self, first: int, planned: Sequence[PlannedSample], left_out: dict[str, str] | None = None
    ) -> list[list[View]]:
        """All views of consecutive samples of the plan, unanswered.

        Args:
            first: position of the first one in the plan.
            left_out: reasons by sample id; gains those that `data.skip_bad` lets pass.
        Raises: DataError: the data changed since the plan was made. CacheMismatch: what templates make of them did.
        """
        signal = None if self.plan.signal_kind == "none" else self.plan.config.signal
        drawn = []
        for index, one in enumerate(planned, start=first):
            conversation = self.conversations.read(one.source, one.row, one.sample_id)
            try:
                paired = self.pairing.encode(conversation)
            except Exception as error:  # tokenizers and chat templates are other people's code
                self._leave_out(one.sample_id, UNUSABLE, {} if left_out is None else left_out, DataError(
                    f"sample {one.sample_id} was planned and cannot be used now ({error}): the tokenizers changed "
                    f"since the plan was made; restore them, or dump into another folder. {SKIP}"
                ), error)  # fmt: skip
                continue
            if digest(paired) != one.digest:
                raise CacheMismatch(
                    f"sample {one.sample_id} was planned as other tokens than its chat templates and tokenizers give "
                    "now: does a template write the date, or something else that changes? Pin it with an argument of "
                    "the template, for example student.template.date_string or teacher.template.date_string, and give "
                    "another --out; or restore what changed"
                )
            sample = Sample(one.sample_id, index, paired, self._is_target(paired))
            drawn.append(draw_views(sample, self.plan.config.noise, signal=signal, k=self._top_k))
        return drawn

    @property
    def _top_k(self) -> int:
        return self.plan.config.signal.top_k if self.plan.signal_kind == "topk" else 0

    def _leave_out(
        self, sample_id: str, reason: str, left_out: dict[str, str], error: DataError, cause: Exception | None = None
    ) -> None:
        """Note a sample that this shard will not hold. Raises: `error`, unless `data.skip_bad` permits to go on."""
        if not self.plan.config.data.skip_bad:
            raise error from cause
        if sample_id not in left_out:
            warnings.warn(f"sample {sample_id} is left out: {reason}", stacklevel=2)
        left_out.setdefault(sample_id, reason)

    def _is_target(self, paired: PairedSample) -> np.ndarray:
        """[c] bool: one token on each side, and the loss support holds that pair."""
        chunks = paired.chunks
        if not self._top_k:
            return np.zeros(len(chunks), bool)
        single = (chunks[:, 1] - chunks[:, 0] == 1) & (chunks[:, 3] - chunks[:, 2] == 1)
        student_ids = self.pairing.student_id[paired.teacher.x_0[chunks[:, 0]]]
        return single & (student_ids == paired.student.x_0[chunks[:, 2]])

    def ask(
        self, views: Sequence[Sequence[View]], progress: Progress = lambda tokens: None,
        left_out: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Fill the views with answers, in micro-batches that depend on the shard and the plan's token budget alone.

        Args: left_out: reasons by sample id; gains those that `data.skip_bad` lets pass.
        Raises: NotNumbers: an answer is not a finite number.
        """
        if self.teacher is None:
            return
        left_out = {} if left_out is None else left_out
        teacher, samples = self.teacher, [of_sample[0].sample for of_sample in views]
        budget, reported = self.plan.config.teacher.tokens_per_batch, teacher.num_token_forwards
        for group in by_tokens([len(sample.paired.teacher.x_0) for sample in samples], budget):
            asked = [(view, one) for place, i in enumerate(group) for view in views[i] for one in view.passes(place)]
            if not asked:
                continue
            num_blocks = [0] * len(group)
            for _, one in asked:
                num_blocks[one.sample] = max(num_blocks[one.sample], teacher.last_block(one.masked))
            context = teacher.prefill([samples[i].paired.teacher.x_0 for i in group], num_blocks)
            prefix = context.labels.stream.shape[1]
            for part in by_tokens([prefix + teacher.num_touched(one.masked) for _, one in asked], budget):
                self._score(teacher, context, [asked[i] for i in part], left_out)
                progress(teacher.num_token_forwards - reported)
                reported = teacher.num_token_forwards

    def _score(
        self, teacher: Teacher, context: Context, batch: Sequence[tuple[View, Pass]], left_out: dict[str, str]
    ) -> None:
        """One forward: hand each view its part of the answers."""
        signal = self.plan.config.signal
        answers = teacher.score(
            context, [one for _, one in batch], k=self._top_k, temperatures=signal.temperatures if self._top_k else ()
        )
        gold_logp, gold_is_top = answers.gold_logp.cpu(), answers.gold_is_top.cpu()
        targets = answers.targets.map(Tensor.cpu)
        if self._top_k:
            targets = replace(targets, top_ids=torch.from_numpy(self.pairing.student_id[targets.top_ids.numpy()]))
        end = np.zeros(3, int)
        for view, one in batch:
            start, end = end, end + one.num_answers
            gold, target, dense = map(slice, start, end)
            try:
                view.keep(
                    one, gold_logp[gold], gold_is_top[gold], targets[target], answers.dense[dense], self.plan.layout
                )
            except NotNumbers as error:
                self._leave_out(view.sample.sample_id, UNANSWERED, left_out, error)


def answered_sums(views: Sequence[View], unigram: Mapping[str, float] | None) -> dict[str, Any]:
    """Fields of `ShardStatistics` about what the teacher said of the clean tokens; {} where nothing was asked."""
    if unigram is None:
        return {}
    answered, correct = np.zeros((2, NUM_BINS), np.int64)
    logp = np.zeros(NUM_BINS)
    for view in views:
        known = np.isfinite(view.gold_logp)
        place = unit_bin(np.array([view.t], np.float32))[0]
        answered[place] += int(known.sum())
        correct[place] += int(view.gold_is_top[known].sum())
        logp[place] += float(view.gold_logp[known].sum(dtype=np.float64))
    total = int(answered.sum())
    return {
        "t_answered": tuple(answered.tolist()), "t_correct": tuple(correct.tolist()),
        "t_clean_logp": tuple(logp.tolist()), "unigram_logp": total * unigram["logp"],
        "unigram_correct": total * unigram["accuracy"],
    }  # fmt: skip


def by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, whose padded size stays within `budget` (or of one each)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
