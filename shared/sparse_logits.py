"""SparseLogits: what is kept of a distribution over the vocabulary (docs/math.md: The one thing both sides produce).

    logp_v      = z_v - logsumexp(z)                                nats at temperature 1, over the whole vocabulary
    log_z(T)    = log sum_{v in S} exp(logp_v / T)                  S: the loss support
    p_T(i)      = exp(logp_i / T - log_z(T))                        exact tempered probability on S
    log_tail(T) = log sum_{v in S, v not in top} p_T(v)             the (k+1)-th category

Teacher and student both end here: `sliced_head.py` computes one from hidden states, the cache stores the teacher's,
and losses see nothing else of a vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .config import SMALLEST_HEAD


@dataclass(frozen=True)
class SparseLogits:
    """n distributions over a vocabulary, each reduced to its clean token, its k top tokens and a tail.

    Log-probabilities are float32 nats at temperature 1, normalised over the whole vocabulary.

    Args:
        gold_logp: of the clean token.
        top_ids: student ids in the support, in order of teacher probability; -1 where a row has fewer than k.
        top_logp: of top_ids; -inf where top_ids is -1.
        log_z: log-sum-exp over the support at each temperature.
        log_tail: log mass of the support outside top_ids at each temperature; -inf where nothing is outside.
        temperatures: m of them.
        log_buckets: log_tail by range of ids, where the tail is cut into b of them; their masses add up to the tail's.
        gold_is_top: is the clean token the most likely one of the whole vocabulary; None: nobody asked.
    """

    gold_logp: Float[Tensor, " n"]
    top_ids: Int[Tensor, "n k"]
    top_logp: Float[Tensor, "n k"]
    log_z: Float[Tensor, "n m"]
    log_tail: Float[Tensor, "n m"]
    temperatures: tuple[float, ...]
    log_buckets: Float[Tensor, "n m b"] | None = None
    gold_is_top: Bool[Tensor, " n"] | None = None

    def simplex_logp(self, temperature: float) -> Float[Tensor, "n categories"]:
        """Log-probabilities at `temperature` over the top tokens and, last, the tail: one category or its buckets."""
        column = self._column(temperature)
        tail = self.log_tail[:, column, None] if self.log_buckets is None else self.log_buckets[:, column]
        return torch.cat([self.top_logp_at(temperature), tail], dim=1)

    def gold_logp_at(self, temperature: float) -> Float[Tensor, " n"]:
        """Log-probability of the clean token at `temperature` on the support."""
        return self.gold_logp / temperature - self.log_z[:, self._column(temperature)]

    def narrowed(self, k: int) -> "SparseLogits":
        """With the first k top tokens alone: the mass of the others joins the tail, exactly, at every temperature.

        Raises: ValueError: the tail is cut into buckets.
        """
        if self.log_buckets is not None:
            raise ValueError("a tail in buckets cannot take up further tokens")
        log_tail = self.log_tail.clone()
        for column, temperature in enumerate(self.temperatures):
            dropped = torch.logsumexp(self.top_logp[:, k:] / temperature, dim=1) - self.log_z[:, column]
            log_tail[:, column] = torch.logaddexp(log_tail[:, column], dropped)
        return replace(self, top_ids=self.top_ids[:, :k], top_logp=self.top_logp[:, :k], log_tail=log_tail)

    def top_logp_at(self, temperature: float) -> Float[Tensor, "n k"]:
        """Log-probabilities of the top tokens at `temperature` on the support."""
        return self.top_logp / temperature - self.log_z[:, self._column(temperature), None]

    def _column(self, temperature: float) -> int:
        if temperature not in self.temperatures:
            raise ValueError(f"temperature {temperature} has no log-sum-exp here; available: {self.temperatures}")
        return self.temperatures.index(temperature)

    def __getitem__(self, rows: Tensor | slice) -> "SparseLogits":
        """The chosen rows, by index, bool mask or slice."""
        return self.map(lambda values: values[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "SparseLogits":
        """The same with every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - exp(x)) for x <= 0 without cancellation; -inf at 0 (Maechler 2012)."""
    near_zero = x > -0.6931471805599453
    # `where` sends a zero times inf (NaN) into the branch not taken unless that branch's input is made harmless.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)


def log_z_from_tail(
    top_logp: Float[Tensor, "n k"], log_tail: Float[Tensor, "n m"], temperatures: Sequence[float]
) -> Float[Tensor, "n m"]:
    """log_z of stored distributions, so that the top tokens and the tail add up to one; it needs no gradient.

    log_z(T) = logsumexp(top_logp / T) - log(1 - exp(log_tail(T)))

    Args:
        top_logp: nats at temperature 1; -inf for absent entries. log_tail: of each temperature, nats.
    Returns: 0 where no entry was kept, and the tail is everything.
    """
    log_z = torch.zeros_like(log_tail)
    for column, temperature in enumerate(temperatures):
        head = torch.logsumexp(top_logp.double() / temperature, dim=1)
        tail = log_tail[:, column].double().clamp(max=-SMALLEST_HEAD)
        log_z[:, column] = torch.where(head > -torch.inf, head - log1mexp(tail), 0.0)
    return log_z
