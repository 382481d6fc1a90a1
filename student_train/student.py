"""The student's one forward: rows [x_t1, ..., x_tK, x_0] -> hidden states at masked positions -> SparseLogits.

Whatever the loss, this is all the model does in a training step. The head runs at masked positions only; tempered
log-sum-exps are computed only where a token-level loss asks for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..shared.attention import attention_mask
from ..shared.rows import RowTensors
from ..shared.sliced_head import gather_at_targets, top_logits
from ..shared.sparse_logits import SparseLogits
from ..shared.tails import TailBuckets


class StudentOutput(NamedTuple):
    """What the losses see of the student."""

    gold_logp: Float[Tensor, " n"]  # log-probability of the clean token at every masked position
    targets: SparseLogits  # [m] at the positions with a token-level target


class Student(nn.Module):
    """A wrapper whose `forward` is the whole step, so that DDP and FSDP hook what is really called."""

    support: Tensor | None

    def __init__(
        self, model: PreTrainedModel, support: Bool[Tensor, " v"] | None = None, tail_buckets: Sequence[int] = ()
    ) -> None:
        """What the losses of a cache need to know of the student's head.

        Args:
            support: tokens that token-level losses range over, ids beyond v are not; None: all.
            tail_buckets: ids at which the cache cuts tails into ranges; (): it does not.
        """
        super().__init__()
        self.model = model
        if support is not None:
            num_rows = len(self.head_weight())
            support = nn.functional.pad(support, (0, max(0, num_rows - len(support))))[:num_rows]
        self.register_buffer("support", support, persistent=False)
        self.buckets: TailBuckets | None = None
        if tail_buckets:
            self.buckets = TailBuckets.of_ids(torch.arange(len(self.head_weight())), tail_buckets)

    def forward(
        self, rows: RowTensors, read: Int[Tensor, " n"], gold_ids: Int[Tensor, " n"], target: Int[Tensor, " m"],
        top_ids: Int[Tensor, "m k"], temperatures: tuple[float, ...],
    ) -> StudentOutput:  # fmt: skip
        """Log-probabilities of the student at masked positions.

        Args:
            rows: b rows of l labelled tokens.
            read: masked tokens as indices into the flattened [b * l].
            gold_ids: their clean tokens.
            target: which of the n positions have a token-level target.
            top_ids: the teacher's top tokens there, -1 for absent.
            temperatures: of the token-level losses; empty if there is none.
        """
        hidden = self.hidden(rows).flatten(0, 1)[read]
        if self.buckets is not None and self.buckets.of_token.device != hidden.device:
            self.buckets = self.buckets.to(hidden.device)
        if not temperatures:
            target, top_ids = target[:0], top_ids[:0]
        found = gather_at_targets(
            hidden, self.head_weight(), gold_ids, target, top_ids, temperatures=temperatures, support=self.support,
            buckets=self.buckets,
        )  # fmt: skip
        return StudentOutput(*found)

    def answers(
        self, rows: RowTensors, read: Int[Tensor, " n"], gold_ids: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """What an evaluation asks, without gradient: nats of the clean token, >= 0, and is it the most likely one?"""
        hidden = self.hidden(rows).flatten(0, 1)[read]
        best = top_logits(hidden, self.head_weight(), gold_ids, k=1)
        return -best.gold_logp, best.top_ids[:, 0] == gold_ids

    def hidden(self, rows: RowTensors) -> Float[Tensor, "b l d"]:
        """Last hidden states of the rows under the block-diffusion mask."""
        mask = attention_mask(rows.labels, rows.labels)
        decode = self.model.get_decoder()
        outputs = decode(input_ids=rows.ids, position_ids=rows.position, attention_mask=mask, use_cache=False)
        return outputs.last_hidden_state

    def head_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the head; rows beyond the tokenizer's vocabulary included."""
        head = self.model.get_output_embeddings()
        assert head is not None
        return head.weight
