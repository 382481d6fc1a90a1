"""Answers of made-up teachers, from a sure one to an unsure one: what a dump would take before any teacher is asked.

views -> the same views with answers of the right shapes and ranges, drawn at random. Which columns depend on the
teacher at all, and how far, then shows in the bytes that the real writer makes of them. The distributions are Zipf's
with noise, p of rank r ~ r^-s exp(z); `SURE` and `UNSURE` were chosen to enclose the trained teachers of
docs/log.md. Nothing here ever reaches a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..shared.noising import keyed_generator
from ..shared.sparse_logits import SparseLogits
from .views import View


@dataclass(frozen=True)
class StandIn:
    """A made-up teacher.

    Args:
        exponent: s of Zipf's law over the candidates at one position.
        logp: nats, the smallest and the largest size of a clean token's log-probability; its logarithm is uniform.
        spread: how widely candidates are drawn: 1: any token of the support alike; 0: the logarithm of a token's rank
            is uniform; below: common ones even more often.
        local: share of candidates that follow a ranking of their sample's own: texts have topics.
        noise: standard deviation of z.
    """

    exponent: float
    logp: tuple[float, float]
    spread: float
    local: float
    noise: float

    def answer(self, views: Sequence[Sequence[View]], support: np.ndarray) -> None:
        """Fill all views. support: [n] student ids that a candidate may be."""
        for of_sample in views:
            for view in of_sample:
                self._answer(view, support)

    def _answer(self, view: View, support: np.ndarray) -> None:
        rng = keyed_generator(0, view.sample.sample_id, view.view, "stand-in")
        temperatures = view.signal.temperatures if view.signal is not None and view.k else ()
        low, high = np.log(self.logp)
        for asked in view.passes(0):
            gold = -np.exp(rng.uniform(low, high, int(asked.answered.sum()))).astype(np.float32)
            num = int(asked.target.sum())
            ids = self._candidates(rng, view.sample.index, num, view.k, support)
            top_logp, log_z, log_tail = self._distributions(rng, num, view.k, len(support), temperatures)
            buckets = self._buckets(rng, view, log_tail)
            ids, top_logp, log_z, log_tail = map(torch.from_numpy, (ids, top_logp, log_z, log_tail))
            log_buckets = None if buckets is None else torch.from_numpy(buckets)
            targets = SparseLogits(torch.zeros(num), ids, top_logp, log_z, log_tail, temperatures, log_buckets)
            view.keep(asked, torch.from_numpy(gold), torch.zeros(len(gold), dtype=torch.bool), targets)

    def _candidates(self, rng: np.random.Generator, sample: int, num: int, k: int, support: np.ndarray) -> np.ndarray:
        """[num, k] distinct ids at each position: even places of the support by rank, odd ones by the sample's rank."""
        if not num or not k:
            return np.zeros((num, k), np.int32)
        places = len(support) // 2
        if k > places:
            return support[np.argsort(rng.random((num, len(support))), axis=1)[:, :k]].astype(np.int32)
        room, uniform = places - k + 1, rng.random((num, k))
        spread = max(0.0, self.spread)
        rank = spread * uniform * room + (1 - spread) * (room ** (uniform ** (1 + max(0.0, -self.spread))) - 1)
        distinct = np.sort(rank.astype(np.int64), axis=1) + np.arange(k)  # a rising sequence plus 0, 1, 2, ...
        shift = int(keyed_generator(0, sample, "topic").integers(places))
        own = rng.random((num, k)) < self.local
        place = np.where(own, 2 * ((distinct + shift) % places) + 1, 2 * distinct)
        return support[rng.permuted(place, axis=1)].astype(np.int32)

    def _distributions(
        self, rng: np.random.Generator, num: int, k: int, num_support: int, temperatures: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """top_logp [num, k] in order of probability, log_z and log_tail [num, #T]."""
        if not num or not k:
            log_z = np.zeros((num, len(temperatures)), np.float32)
            return np.zeros((num, k), np.float32), log_z, log_z
        scores = -self.exponent * np.log(np.arange(1, k + 1)) + self.noise * rng.standard_normal((num, k))
        scores = -np.sort(-scores, axis=1)
        top = scores - _log_mass(scores, self.exponent, num_support, 1.0)[:, None]
        log_z, log_tail = np.zeros((2, num, len(temperatures)))
        for column, temperature in enumerate(temperatures):
            log_z[:, column] = _log_mass(top, self.exponent, num_support, temperature)
            head = np.logaddexp.reduce(top / temperature, axis=1) - log_z[:, column]
            log_tail[:, column] = np.log(-np.expm1(np.minimum(head, -1e-9)))
        return top.astype(np.float32), log_z.astype(np.float32), log_tail.astype(np.float32)

    def _buckets(self, rng: np.random.Generator, view: View, log_tail: np.ndarray) -> np.ndarray | None:
        """log_tail [num, #T] cut into random shares [num, #T, buckets] where the plan cuts tails."""
        num_buckets = view.log_buckets.shape[2]
        if not num_buckets:
            return None
        shares = rng.exponential(size=(len(log_tail), 1, num_buckets)) + 1e-6
        return (log_tail[:, :, None] + np.log(shares / shares.sum(2, keepdims=True))).astype(np.float32)


SURE = StandIn(exponent=4.0, logp=(1e-3, 1.0), spread=-1.0, local=0.0, noise=0.1)
MIDDLING = StandIn(exponent=1.3, logp=(1e-2, 8.0), spread=0.1, local=0.5, noise=0.3)
UNSURE = StandIn(exponent=1.0, logp=(0.5, 12.0), spread=1.0, local=0.5, noise=0.6)


def _log_mass(scores: np.ndarray, exponent: float, num_support: int, temperature: float) -> np.ndarray:
    """[num] log-sum-exp at a temperature over the kept entries and, by the integral of Zipf's law, all others.

    The others go on where the last entry stands: exp(score_k / T) (r / k)^(-s / T) for r = k + 1, ..., V.
    """
    k = scores.shape[1]
    kept = np.logaddexp.reduce(scores / temperature, axis=1)
    power = 1 - exponent / temperature
    first, last = (k + 0.5) / k, max(num_support + 0.5, k + 0.5) / k
    rest = np.log(last / first) if abs(power) < 1e-9 else (last**power - first**power) / power
    with np.errstate(divide="ignore"):  # nothing is outside a top-k of the whole support
        return np.logaddexp(kept, scores[:, -1] / temperature + np.log(k * rest))
