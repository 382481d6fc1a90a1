"""Small synthetic caches, without torch: rows with every edge the format knows, and the manifest around them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tide.shared.cache import (
    Layout,
    Manifest,
    Receipt,
    ViewRow,
    read_manifest,
    shard_name,
    write_manifest,
    write_receipt,
    write_shard,
)
from tide.shared.cache.manifest import DataSource, SignalInfo, StudentInfo, TeacherInfo, file_entry, manifest_parts
from tide.shared.cache.schema import SCHEMA_VERSION
from tide.shared.cache.vocabulary import VOCABULARY_NAME, write_vocabulary

VOCAB = 300
BLOCK = 8
PLAN_HASH = "ab" * 32


def make_layout(signal: str = "topk", **changes: Any) -> Layout:
    values = {"vocab_size": VOCAB, "block_size": BLOCK, "top_k": 6, "temperatures": (1.0, 2.0), "logp_dtype": "float16"}
    return Layout(signal=signal, **{**values, **changes})  # type: ignore[arg-type]


def tail_mass(logp: np.ndarray, order: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
    """[n] log mass outside the kept entries, from the dense distribution."""
    p = np.exp(logp / temperature)
    outside = np.ones(p.shape, bool)
    np.put_along_axis(outside, order, ~kept, axis=1)
    return np.log((p * outside).sum(1) / p.sum(1))


def bucket_masses(
    logp: np.ndarray, order: np.ndarray, kept: np.ndarray, temperature: float, layout: Layout
) -> np.ndarray:
    """[n, buckets] the same by ranges of ids."""
    p = np.exp(logp / temperature)
    outside = np.ones(p.shape, bool)
    np.put_along_axis(outside, order, ~kept, axis=1)
    parts = np.split(p * outside, layout.tail_buckets, axis=1)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([part.sum(1) for part in parts], axis=1) / p.sum(1, keepdims=True))


def random_chunks(rng: np.random.Generator, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of chunks over masked positions: mostly of one token, some longer; some tokens are in none."""
    spans, place = [], 0
    while place < len(positions):
        longest = int(rng.choice([0, 1, 1, 1, 2, 3]))
        run = positions[place : place + max(1, longest)]
        length = int(np.argmin(np.append(run == run[0] + np.arange(len(run)), False)))
        spans += [(int(run[0]), length)] if longest else []
        place += length
    starts, lengths = np.array(spans, np.int32).reshape(-1, 2).T
    return starts, lengths


def make_row(rng: np.random.Generator, sample: str, view: int, x_0: np.ndarray, prompt: int, layout: Layout) -> ViewRow:
    """One view with a dense random teacher, reduced to what the layout keeps; t = 0.001 masks nothing, mostly."""
    t = float(rng.choice([1e-3, rng.uniform(1e-3, 1), 1.0]))
    masked = rng.random(len(x_0) - prompt) < t
    positions = (np.flatnonzero(masked) + prompt).astype(np.int32)
    if layout.signal == "none":
        return ViewRow(sample, view, t, x_0, prompt, masked)
    starts, lengths = random_chunks(rng, positions)
    chunk_logp = -rng.exponential(2.0, len(starts)).astype(np.float32)
    if layout.signal == "chunk":
        return ViewRow(sample, view, t, x_0, prompt, masked, starts, lengths, chunk_logp)
    single = lengths == 1
    positions, k = starts[single], layout.top_k
    n = len(positions)
    logits = rng.normal(0, 3, (n, layout.vocab_size))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logp, axis=1)[:, :k].astype(np.int32)
    num_top = rng.integers(0, k + 1, n).astype(np.int32)
    kept = np.arange(k) < num_top[:, None]
    chunk_logp[single] = logp[np.arange(n), x_0[positions]]
    log_tail = [tail_mass(logp, order, kept, temperature) for temperature in layout.temperatures]
    log_buckets = np.zeros((0, 0, 0), np.float32)
    if layout.tail_buckets:
        masses = [bucket_masses(logp, order, kept, temperature, layout) for temperature in layout.temperatures]
        log_buckets = np.stack(masses, axis=1).astype(np.float32)
    return ViewRow(
        sample, view, t, x_0, prompt, masked, starts, lengths, chunk_logp,
        target_position=positions,
        num_top=num_top,
        top_ids=order[kept],
        top_logp=np.take_along_axis(logp, order, axis=1)[kept].astype(np.float32),
        log_tail=np.stack(log_tail, axis=1).astype(np.float32),
        log_buckets=log_buckets,
    )  # fmt: skip


def make_rows(layout: Layout, *, samples: int = 5, views: int = 3, seed: int = 0, blocks: int = 5) -> list[ViewRow]:
    """Views of samples in order; sample 0 is all prompt, sample 1 has none."""
    rng = np.random.default_rng(seed)
    rows = []
    for sample in range(samples):
        length = layout.block_size * int(rng.integers(1, blocks))
        x_0 = rng.integers(0, layout.vocab_size, length).astype(np.int32)
        prompt = {0: length, 1: 0}.get(sample, int(rng.integers(0, length)))
        rows += [make_row(rng, f"s{seed}-{sample}", view, x_0, prompt, layout) for view in range(views)]
    return rows


def make_manifest(root: Path, layout: Layout, receipts: list[Receipt]) -> Manifest:
    teacher = TeacherInfo("org/teacher", "c0ffee", "11", "float32", None, "22", "33", "apache-2.0", {"logit_shift": 0})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tide_version="0.1.0",
        plan_hash=PLAN_HASH,
        signal=SignalInfo(
            kind=layout.signal, codec=layout.codec, logp_dtype=layout.logp_dtype, logp_step=layout.logp_step,
            top_k=layout.top_k, min_probability=0.0,
            temperatures=layout.temperatures, support="shared: all", codec_error={}, frequent_ids=layout.frequent_ids,
            tail_buckets=layout.tail_buckets,
        ),
        teacher=None if layout.signal == "none" else teacher,
        student=StudentInfo("1f3a" * 16, "44", layout.vocab_size, 299, 0),
        block_size=layout.block_size,
        noise={"seed": 0, "views": 3},
        sources=(DataSource("stdlib", "1", "unknown"),),
        vocabulary=file_entry(root, VOCABULARY_NAME),
        dropped={"too long": 2},
        **manifest_parts(receipts),
    )  # fmt: skip


def write(
    root: Path,
    rows: list[ViewRow],
    layout: Layout,
    shard: int = 0,
    num_shards: int = 1,
    *,
    plan_hash: str | None = None,
) -> Receipt:
    """Write a shard and its receipt."""
    name, plan_hash = shard_name(shard, num_shards), plan_hash or PLAN_HASH
    statistics = write_shard(root / name, rows, layout, plan_hash=plan_hash, shard=shard)
    return write_receipt(root, name, shard=shard, plan_hash=plan_hash, statistics=statistics)


def finish(root: Path, layout: Layout, receipts: list[Receipt]) -> Manifest:
    """Write vocabulary and manifest."""
    write_vocabulary(root, [bytes([i % 256]) * (1 + i // 256) for i in range(VOCAB)], np.arange(VOCAB) - 1)
    manifest = make_manifest(root, layout, receipts)
    write_manifest(root, manifest)
    return manifest


def finish_manifest(root: Path, *, vocabulary: str | None) -> None:
    """Let the manifest name vocabulary.parquet as it is now, or (None) no vocabulary."""
    manifest = read_manifest(root)
    entry = None if vocabulary is None else file_entry(root, VOCABULARY_NAME)
    write_manifest(root, dataclasses.replace(manifest, vocabulary=entry))
