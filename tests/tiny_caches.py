"""Synthetic caches for tests: random rows with every kind of chunk and target, written without any teacher or model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tide.shared.cache import (
    Cache,
    Layout,
    Manifest,
    ViewRow,
    open_cache,
    shard_name,
    write_manifest,
    write_receipt,
    write_shard,
    write_vocabulary,
)
from tide.shared.cache.manifest import DataSource, SignalInfo, StudentInfo, TeacherInfo, file_entry, manifest_parts
from tide.shared.cache.schema import SCHEMA_VERSION
from tide.shared.cache.vocabulary import VOCABULARY_NAME
from tide.shared.config import NoiseConfig
from tide.shared.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from tide.shared.noising import draw_masks, masking_units, timesteps

VOCAB, MASK, BLOCK, TOP_K, TEMPERATURES = 61, 60, 4, 5, (1.0, 2.0)
PLAN_HASH = "ab" * 32


def random_rows(num_samples: int, views: int, *, signal: str = "topk", first: int = 0) -> list[ViewRow]:
    """Views of samples first, first + 1, ..., in order. Sample 1 has no chunk; single-token ones are mostly targets."""
    rows, noise = [], NoiseConfig(views=views, comp_demo=False)
    for number in range(first, first + num_samples):
        rng = np.random.default_rng(number)
        length = BLOCK * int(rng.integers(2, 7))
        prompt = int(rng.integers(0, length - 2))
        x_0 = rng.integers(0, MASK, length).astype(np.int32)
        chunks = _random_chunks(rng, 0 if number == 1 else length, prompt)
        units = masking_units(chunks, length, prompt)
        for view, t in enumerate(timesteps(number, f"sample-{number}", noise)):
            masks = draw_masks(units, t, f"sample-{number}", view, noise)
            values = {
                "sample_id": f"sample-{number}", "view": view, "t": float(t), "x_0": x_0, "prompt_tokens": prompt,
                "masked": masks.student[prompt:],
            }  # fmt: skip
            rows.append(ViewRow(**values, **_random_signal(rng, x_0, chunks[masks.active_chunks], signal)))
    return rows


def _random_chunks(rng: np.random.Generator, length: int, prompt: int) -> np.ndarray:
    """Chunks of one to three tokens with gaps between some; [c, 4]."""
    chunks, start = [], prompt + 1
    while start + 3 <= length:
        size = int(rng.integers(1, 4))
        chunks.append((start, start + size, start, start + size))
        start += size + int(rng.integers(0, 2))
    return np.array(chunks, np.int32).reshape(-1, 4)


def _random_signal(rng: np.random.Generator, x_0: np.ndarray, active: np.ndarray, signal: str) -> dict[str, Any]:
    if signal == "none":
        return {}
    start, length = active[:, 2], active[:, 3] - active[:, 2]
    chunk_logp = -rng.exponential(2.0, len(start)).astype(np.float32)
    values = {"chunk_start": start, "chunk_len": length, "chunk_logp": chunk_logp}
    if signal == "chunk":
        return values
    target = start[(length == 1) & (x_0[start] % 4 > 0)]
    logits = rng.normal(0, 3, (len(target), VOCAB))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logp, axis=1)[:, :TOP_K].astype(np.int32)
    num_top = rng.integers(1, TOP_K + 1, len(target)).astype(np.int32)
    kept = np.arange(TOP_K) < num_top[:, None]
    outside = np.ones(logp.shape, bool)
    np.put_along_axis(outside, order, ~kept, axis=1)
    dense = [np.exp(logp / temperature) for temperature in TEMPERATURES]
    log_tail = np.stack([np.log((p * outside).sum(1) / p.sum(1)) for p in dense], axis=1)
    return values | {
        "target_position": target,
        "num_top": num_top,
        "top_ids": order[kept],
        "top_logp": np.take_along_axis(logp, order, axis=1)[kept].astype(np.float32),
        "log_tail": log_tail.astype(np.float32),
    }


def random_cache(
    folder: Path, samples_per_shard: Sequence[int] = (7, 4), views: int = 3, signal: str = "topk"
) -> Cache:
    """A complete cache below `folder`, opened (and so verified)."""
    layout = Layout(signal, VOCAB, BLOCK, TOP_K, TEMPERATURES, "float32")  # type: ignore[arg-type]
    root = folder / f"{signal}-{views}-{'-'.join(map(str, samples_per_shard))}"
    receipts, first, num_shards = [], 0, len(samples_per_shard)
    for number, num_samples in enumerate(samples_per_shard):
        name = shard_name(number, num_shards)
        rows = random_rows(num_samples, views, signal=signal, first=first)
        statistics = write_shard(root / name, rows, layout, plan_hash=PLAN_HASH, shard=number)
        receipts.append(write_receipt(root, name, shard=number, plan_hash=PLAN_HASH, statistics=statistics))
        first += num_samples
    write_vocabulary(root, [bytes([i]) for i in range(VOCAB)], np.arange(VOCAB))
    teacher = TeacherInfo("org/teacher", "c0ffee", "11", "float32", None, "22", "33", "apache-2.0", {})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, tide_version="0.1.0", plan_hash=PLAN_HASH,
        signal=SignalInfo(
            kind=layout.signal, codec="plain", logp_dtype="float32", logp_step=None, top_k=TOP_K, min_probability=0.0,
            temperatures=TEMPERATURES, support="shared: all", codec_error={},
        ),
        teacher=None if signal == "none" else teacher, student=StudentInfo("1f3a" * 16, "44", VOCAB, MASK, 0),
        block_size=BLOCK, noise={"seed": 0, "views": views}, sources=(DataSource("stdlib", "1", "unknown"),),
        vocabulary=file_entry(root, VOCABULARY_NAME), dropped={}, **manifest_parts(receipts),
    )  # fmt: skip
    write_manifest(root, manifest)
    return open_cache(root)


def sharp_student(*, tied: bool = False) -> A2DQwen3LMHeadModel:
    """Two random layers whose distributions are far from uniform."""
    config = A2DQwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied,
        attn_implementation="sdpa", pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = A2DQwen3LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model
