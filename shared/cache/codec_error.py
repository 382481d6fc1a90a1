"""What rounding costs, measured while a shard is written: KL(exact || stored) of every target at each temperature.

Both are distributions over the kept tokens and, last, the tail or its buckets, as the losses see them:

    log q_i = logp_i / T - log_z(T),  log_z(T) = logsumexp(logp / T) - log(1 - exp(log_tail(T)))

Sums and a histogram go into the shard's statistics, and so add up to those of the cache; the manifest shows the mean
and a bound on the 99th percentile. Nothing saturates: a value that its column cannot hold is an error, not a bound.
Draws from the tail have no distribution of their own: `logp_step` bounds what rounding does to their weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config import SMALLEST_HEAD
from .batch import RowBatch
from .schema import Layout, ViewRow

KL_BINS = 64
"""Bin i holds divergences below 2^((i - 64) / 2) nats that no bin before it holds; the last holds all larger ones."""


def codec_kl(rows: Sequence[ViewRow], batch: RowBatch, layout: Layout) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Sum of the divergences in nats at each temperature, and their counts by bin, [temperatures * KL_BINS] flat.

    Args: rows: as meant. batch: the same rows as stored.
    """
    if layout.signal != "topk":
        return (), ()
    counts = batch.lists["num_top"].values
    exact_logp = np.concatenate([np.zeros(0), *(row.top_logp for row in rows)])
    shape = (len(layout.temperatures), layout.num_buckets)
    tails = (row.log_buckets if layout.tail_buckets else row.log_tail for row in rows)
    exact_tail = np.minimum(np.concatenate([np.zeros((0, *shape)), *(tail.reshape(-1, *shape) for tail in tails)]), 0)
    stored_tail = batch.log_buckets if layout.tail_buckets else batch.log_tail[:, :, None]
    sums, bins = [], []
    for column, temperature in enumerate(layout.temperatures):
        exact = _simplex(exact_logp, exact_tail[:, column], counts, temperature)
        stored = _simplex(batch.lists["top_logp"].values, stored_tail[:, column], counts, temperature)
        kl = _divergence(exact, stored, counts)
        sums.append(float(kl.sum()))
        with np.errstate(divide="ignore"):
            place = np.floor(2 * np.log2(kl)) + KL_BINS + 1
        bins.append(np.bincount(np.clip(place, 0, KL_BINS - 1).astype(np.int64), minlength=KL_BINS))
    return tuple(sums), tuple(np.concatenate(bins).tolist())


def summary(
    kl: Sequence[float], kl_counts: Sequence[int], num_targets: int, temperatures: Sequence[float]
) -> Mapping[str, Any]:
    """For the manifest, by temperature: `kl_mean` and `kl_p99`, a bound on the 99th percentile, in nats.

    Where the percentile lies in the last bin, which has no upper edge, the sum of all divergences is the bound: one of
    the hundredth part of the targets cannot be more.
    """
    if not num_targets or not kl:
        return {}
    edges = 2.0 ** ((np.arange(KL_BINS) - KL_BINS) / 2)
    told = {}
    for column, temperature in enumerate(temperatures):
        below = np.cumsum(kl_counts[column * KL_BINS : (column + 1) * KL_BINS])
        place = int(np.searchsorted(below, 0.99 * num_targets))
        told[f"{float(temperature)!r}"] = {
            "kl_mean": float(kl[column] / num_targets),
            "kl_p99": float(kl[column] if place == KL_BINS - 1 else edges[place]),
        }
    return told


def log_z(logp: np.ndarray, counts: np.ndarray, log_tail: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [n] log-sum-exp over the loss support of targets as stored; 0 where nothing is kept.

    Args:
        logp: of the kept entries, flat; counts: how many each target has. log_tail: [n] at `temperature`.
    """
    target = np.repeat(np.arange(len(counts)), counts)
    scaled = logp.astype(np.float64) / temperature
    largest = np.full(len(counts), -np.inf)
    np.maximum.at(largest, target, scaled)
    total = np.zeros(len(counts))
    np.add.at(total, target, np.exp(scaled - largest[target]))
    some = counts > 0
    found = np.zeros(len(counts))
    tail = np.minimum(log_tail[some].astype(np.float64), -SMALLEST_HEAD)
    found[some] = largest[some] + np.log(total[some]) - np.log(-np.expm1(tail))
    return found


def _simplex(
    logp: np.ndarray, log_tail: np.ndarray, counts: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tempered log-probabilities of the kept entries, flat, and of the tail's buckets [n, B]; float64."""
    target, logp = np.repeat(np.arange(len(counts)), counts), np.minimum(logp.astype(np.float64), 0)
    tail = log_tail.astype(np.float64)
    total = np.minimum(np.logaddexp.reduce(tail, axis=1), 0.0)
    return logp / temperature - log_z(logp, counts, total, temperature)[target], tail


def _divergence(
    exact: tuple[np.ndarray, np.ndarray], stored: tuple[np.ndarray, np.ndarray], counts: np.ndarray
) -> np.ndarray:
    target = np.repeat(np.arange(len(counts)), counts)
    (p, p_tail), (q, q_tail) = exact, stored
    held = np.isfinite(p_tail)
    difference = np.subtract(p_tail, q_tail, out=np.zeros_like(p_tail), where=held)
    kl = (np.exp(p_tail) * difference).sum(axis=1)
    np.add.at(kl, target, np.exp(p) * (p - q))
    return np.maximum(kl, 0.0)
