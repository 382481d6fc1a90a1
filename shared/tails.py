"""The tail of a distribution: what lies outside the top tokens, whole or by ranges of ids.

    log_z(T)    = log sum_{v in S} exp(logp_v / T)
    log_tail(T) = log sum_{v in S, v not in top} exp(logp_v / T) - log_z(T)

[rows, V] log-probabilities of one slice of the head come in, sums of [rows] go out (docs/math.md: The one thing both
sides produce).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from .head_slices import Scratch


class TailBuckets:
    """Which range of ids each token of a vocabulary belongs to, when tails are cut into ranges.

    Args: of_token: [V] numbers 0 .. num_buckets - 1.
    """

    def __init__(self, of_token: Int[Tensor, " v"], num_buckets: int) -> None:
        self.of_token, self.num_buckets = of_token, num_buckets
        self.is_in = torch.nn.functional.one_hot(of_token, num_buckets).float()  # [V, num_buckets]

    @classmethod
    def of_ids(cls, ids: Int[Tensor, " v"], cuts: Sequence[int]) -> "TailBuckets":
        """Ranges of `ids` (of the student, one for each row of the head) that end before each of `cuts`."""
        return cls(torch.bucketize(ids, torch.tensor(cuts, device=ids.device), right=True), len(cuts) + 1)

    def to(self, device: torch.device | str) -> "TailBuckets":
        """The same on another device."""
        return TailBuckets(self.of_token.to(device), self.num_buckets)

    def log_sums(self, tail: Tensor, scratch: Scratch) -> Tensor:
        """[rows, num_buckets] log-sum-exps of tail [rows, V]; -inf where a range has nothing in it.

        A product with `is_in` adds in an order of its own, but always in the same: `scatter_add` on CUDA would not.
        """
        largest = tail.new_full((len(tail), self.num_buckets), -torch.inf)
        largest.scatter_reduce_(1, self.of_token.expand(len(tail), -1), tail, reduce="amax")
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        return torch.log(self.exp_of_difference(tail, base, scratch) @ self.is_in.to(tail.dtype)) + base

    def exp_of_difference(self, tail: Tensor, base: Tensor, scratch: Scratch) -> Tensor:
        """exp(tail - base of each token's range) [rows, V], in the buffer "tail p"."""
        out = scratch("tail p", len(tail))
        torch.index_select(base, 1, self.of_token, out=out)
        return torch.sub(tail, out, out=out).exp_()


def outside_top(
    values: Tensor, top_ids: Tensor, temperature: float, bias: Tensor | None, scratch: Scratch,
    keep_first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`values` / temperature [rows, V] with -inf off the support and at `top_ids`; absent ids (-1) block nothing.

    Args: keep_first: [rows] bool, rows whose first top token stays.
    """
    tail = scratch("tail", len(values))
    if bias is None:
        torch.mul(values, 1 / temperature, out=tail)
    else:
        torch.add(bias, values, alpha=1 / temperature, out=tail)
    block = torch.where(top_ids >= 0, -torch.inf, torch.inf).to(values.dtype)
    if keep_first is not None:
        block[:, :1].masked_fill_(keep_first[:, None], torch.inf)
    return tail.scatter_reduce_(1, top_ids.clamp(min=0), block, reduce="amin")


def tempered_sums(
    logp: Tensor, top_ids: Tensor, top_logp: Tensor, temperature: float, bias: Tensor | None, scratch: Scratch,
    buckets: TailBuckets | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log_z [rows] and log_tail [rows, 1 or B] at one temperature; sums of positive terms only, so nothing cancels."""
    tail, head_sum = outside_top(logp, top_ids, temperature, bias, scratch), torch.logsumexp(top_logp / temperature, 1)
    if buckets is not None:
        sums = buckets.log_sums(tail, scratch)
        log_z = torch.logaddexp(torch.logsumexp(sums, 1), head_sum)
        return log_z, sums - log_z[:, None]
    largest = tail.amax(dim=1)
    # log_softmax is max - logsumexp at the largest entry: faster than logsumexp on CPU, 14-fold where terms underflow.
    tail_sum = largest - torch.log_softmax(tail, dim=1, out=scratch("logits", len(tail))).amax(dim=1)
    tail_sum = torch.where(largest == -torch.inf, -torch.inf, tail_sum)
    log_z = torch.logaddexp(tail_sum, head_sum)
    return log_z, (tail_sum - log_z)[:, None]


def whole_and_parts(tails: Tensor, buckets: TailBuckets | None) -> tuple[Tensor, Tensor | None]:
    """log_tail [m, T] and log_buckets [m, T, B] of what the head gives, [m, T, 1 or B]."""
    # A copy: FSDP2 warns users of every view among a module's outputs.
    return (tails[:, :, 0].clone(), None) if buckets is None else (torch.logsumexp(tails, dim=2), tails)
