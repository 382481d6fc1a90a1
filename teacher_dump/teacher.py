"""The teacher: `prefill` computes what all views of a sample share, `score` answers noised passes.

x_0 -> keys and values once per sample (block-causal), then every pass runs only the blocks that hold a masked token
against them, and the head only where an answer is kept. Equal to the naive [x_t, x_0] run within float32 rounding
(tests/teacher_dump/test_teacher.py). Token-forwards: L + the masked blocks of all passes, instead of 2 L per pass.
A teacher without blocks sees one block, the whole noised sequence, and no x_0: nothing to share, nothing to leave out.
With a logit shift, as in models grown from autoregressive ones, a token's answer is read one position before it in x_t;
where that is the block before, this block runs as well, noised as it is: so the model was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..shared.attention import Labels, attention_mask
from ..shared.models.prefix_cache import PrefixCache
from ..shared.models.specs import TeacherSpec
from ..shared.rows import RowTensors, clean_piece, noised_piece, stack
from ..shared.sliced_head import top_logits
from ..shared.sparse_logits import SparseLogits
from ..shared.tails import TailBuckets

_WHOLE_SEQUENCE = 2**31
"""Block size of a teacher without blocks."""


@dataclass(frozen=True)
class Context:
    """What all passes over the same samples share; read-only."""

    x_0: list[np.ndarray]
    cache: PrefixCache
    labels: Labels  # of the cached tokens


class Pass(NamedTuple):
    """One forward of one sample: what is masked, and where the answer is kept."""

    sample: int  # index into the context's samples
    masked: np.ndarray  # [l] bool
    answered: np.ndarray  # [l] bool, a subset of `masked`: log-probability of the clean token is wanted
    target: np.ndarray  # [l] bool, a subset of `answered`: the top tokens are wanted as well
    audited: np.ndarray | None = None  # [l] bool, a subset of `target`: the whole distribution is; None: nowhere

    @property
    def num_answers(self) -> np.ndarray:
        """[3] int: positions `answered`, `target` and `audited`."""
        kinds = (self.answered, self.target, self.audited)
        return np.array([0 if wanted is None else int(wanted.sum()) for wanted in kinds])


class Answers(NamedTuple):
    """Answers of a list of passes, pass after pass, by position."""

    gold_logp: Tensor  # [n] at `answered`
    gold_is_top: Tensor  # bool [n] at `answered`: the clean token is the likeliest
    targets: SparseLogits  # [m] at `target`; ids are the teacher's
    dense: np.ndarray  # float32 [a, audit columns] at `audited`


class Teacher:
    """A frozen model with the spec that says how to ask it.

    Args:
        model: on its device, or spread over several.
        support: [V] bool, tokens that token-level losses range over; None: all.
        audit_ids: [S] tokens whose log-probabilities an audit stores, in order; None: all.
        buckets: ranges of the student's ids into which tails are cut; None: they are not.
    """

    def __init__(
        self, model: PreTrainedModel, spec: TeacherSpec, *, support: Tensor | None = None,
        audit_ids: Tensor | None = None, buckets: TailBuckets | None = None,
    ) -> None:  # fmt: skip
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no head over the vocabulary")
        self.model, self.spec, self.head_weight = model.eval(), spec, head.weight
        self.block_size = spec.block_size or _WHOLE_SEQUENCE
        self.device, head_device = model.device, self.head_weight.device  # of several, the first and the last
        self.drop: Tensor | None = None
        if spec.drop_ids:
            self.drop = torch.zeros(spec.vocab_size, dtype=torch.bool, device=head_device)
            self.drop[list(spec.drop_ids)] = True
        self.support = None if support is None else support.to(head_device)
        if self.support is not None and self.drop is not None:
            self.support = self.support & ~self.drop
        self.buckets = None if buckets is None else buckets.to(head_device)
        self.audit_ids = torch.arange(len(head.weight)) if audit_ids is None else audit_ids
        self.num_token_forwards = 0
        """Tokens that went through the model so far, padding left out."""

    @torch.inference_mode()
    def prefill(self, x_0: Sequence[np.ndarray], num_blocks: Sequence[int]) -> Context:
        """Keys and values of the leading blocks of each sample.

        Args:
            x_0: clean teacher ids of each sample, [l_i].
            num_blocks: leading blocks of each that some pass can see (`last_block` of its masks); the rest is skipped.
        """
        pieces = [clean_piece(ids, n, self.block_size) for ids, n in zip(x_0, num_blocks, strict=True)]
        rows, cache = stack(pieces).to(self.device), PrefixCache()
        self.model.get_decoder()(
            input_ids=rows.ids, position_ids=rows.position, past_key_values=cache, use_cache=True,
            attention_mask=attention_mask(rows.labels, rows.labels, self.spec.attention),
        )  # fmt: skip
        self.num_token_forwards += sum(len(piece.ids) for piece in pieces)
        return Context(list(x_0), cache.freeze(), rows.labels)

    @torch.inference_mode()
    def score(self, context: Context, passes: Sequence[Pass], *, k: int, temperatures: Sequence[float]) -> Answers:
        """Answer a batch of passes in one forward.

        Args:
            passes: over samples of `context`; each masks at least one token.
            k: top tokens kept at each target position.
            temperatures: > 0, at which log-sum-exps over the support are kept.
        """
        noised = [
            noised_piece(
                context.x_0[p.sample], p.masked[None], mask_id=self.spec.mask_id, block_size=self.block_size,
                shift=self.spec.logit_shift,
            )
            for p in passes
        ]  # fmt: skip
        self.num_token_forwards += sum(len(one.piece.ids) for one in noised)
        rows = stack([one.piece for one in noised]).to(self.device)
        kept = []  # of each pass: index into the flattened rows, clean id, is it a target, is it audited
        for row, (one, asked) in enumerate(zip(noised, passes, strict=True)):
            keep = asked.answered[one.position]
            position = one.position[keep]
            gold = context.x_0[asked.sample][position].astype(np.int64)
            whole = np.zeros(len(position), bool) if asked.audited is None else asked.audited[position]
            kept.append((row * rows.ids.shape[1] + one.read[keep], gold, asked.target[position], whole))
        at, gold_ids, is_target, is_audited = (
            torch.from_numpy(np.concatenate(parts)).to(self.head_weight.device) for parts in zip(*kept, strict=True)
        )
        hidden = self._hidden(context, rows, [p.sample for p in passes]).to(self.head_weight.device)[at]
        audited, dense = is_audited[is_target].cpu(), [np.zeros((0, len(self.audit_ids)), np.float32)]

        def keep_audited(rows: slice, logp: Tensor) -> None:
            """What is audited of one slice of the head; the head never holds more of [n, V] (shared/sliced_head.py)."""
            chosen = torch.nonzero(audited[rows]).to(logp.device)  # [a, 1]
            if len(chosen):
                dense.append(logp[chosen, self.audit_ids.to(logp.device)].float().cpu().numpy())

        targets = top_logits(
            hidden[is_target], self.head_weight, gold_ids[is_target], k=k, temperatures=temperatures,
            support=self.support, drop=self.drop, buckets=self.buckets,
            watch=keep_audited if audited.any() else None,
        )  # fmt: skip
        others = top_logits(hidden[~is_target], self.head_weight, gold_ids[~is_target], k=0, drop=self.drop)
        gold_logp = targets.gold_logp.new_empty(len(gold_ids))
        gold_logp[is_target], gold_logp[~is_target] = targets.gold_logp, others.gold_logp
        assert targets.gold_is_top is not None
        assert others.gold_is_top is not None
        gold_is_top = torch.empty_like(is_target)
        gold_is_top[is_target], gold_is_top[~is_target] = targets.gold_is_top, others.gold_is_top
        return Answers(gold_logp, gold_is_top, targets, np.concatenate(dense))

    def last_block(self, masked: np.ndarray) -> int:
        """The last block that holds a masked token: a pass sees the blocks of x_0 before it."""
        return int(np.flatnonzero(masked)[-1]) // self.block_size

    def num_touched(self, masked: np.ndarray) -> int:
        """Tokens in the blocks that hold a masked token or are read for one."""
        positions = np.flatnonzero(masked)
        read = positions - self.spec.logit_shift
        blocks = np.unique(np.concatenate([positions, read]) // self.block_size)
        return int(np.minimum(self.block_size, len(masked) - blocks * self.block_size).sum())

    def _hidden(self, context: Context, rows: RowTensors, samples: Sequence[int]) -> Tensor:
        """Last hidden states [b * l, d] of noised rows, row i over the prefix of samples[i]."""
        index = torch.tensor(samples, device=self.device)
        prefix = Labels(*(label[index] for label in context.labels))
        keys = Labels(*(torch.cat(pair, dim=1) for pair in zip(prefix, rows.labels, strict=True)))
        outputs = self.model.get_decoder()(
            input_ids=rows.ids, position_ids=rows.position, past_key_values=context.cache.rows(index), use_cache=False,
            attention_mask=attention_mask(rows.labels, keys, self.spec.attention),
        )  # fmt: skip
        return outputs.last_hidden_state.flatten(0, 1)
