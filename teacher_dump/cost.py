"""What a plan will cost: samples, bytes, and the teacher's memory, FLOPs and GPU-hours; no weight is loaded."""

import math
import warnings
from typing import Any

from ..shared.models.loading import local_folder, read_config
from ..shared.models.size import model_size
from .cache_size import SizeEstimate
from .plan import Plan

ASSUMED_TFLOPS = 100.0
"""Sustained teraflops a second of one GPU, where the user states none."""
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 64_000_000, 512_000_000
"""Where shards are neither many nor heavy to move."""
AUDIT_BYTES = {"float16": 1.3, "float32": 2.9}
"""Of a value in an audit, measured on a language model's distributions over 49,152 tokens (docs/log.md)."""


def describe_plan(plan: Plan, size: SizeEstimate, *, tflops: float = ASSUMED_TFLOPS) -> dict[str, Any]:
    """A plan in numbers, for people and scripts; bytes, token-forwards and all that follows are estimates.

    Args:
        plan: one that `make_plan` or `Plan.at` gave, so that the teacher's config.json is found.
        size: what `estimate_size` said of it.
        tflops: > 0, sustained teraflops a second of one GPU.
    """
    totals = plan.totals
    return {
        "plan_hash": plan.hash,
        "teacher": plan.settings["teacher"]["path"] or "none",
        "sources": ", ".join(str(source) for source in plan.sources),
        "signal": plan.signal_kind,
        "samples": totals["samples"],
        "dropped": ", ".join(f"{reason}: {count}" for reason, count in plan.dropped.items()) or "none",
        "coverage": dict(plan.coverage),
        "left_out_or_cut": plan.sentences() or "nothing",
        "tokens": totals["tokens"],
        "views": totals["rows"],
        "expected_masked_positions": totals["expected_masked"],
        "expected_token_forwards": plan.expected_forwards,
        "shards": plan.num_shards,
        "estimated_bytes": size.bytes,
        "estimated_bytes_range": [size.low, size.high],
        "estimated_bytes_from": size.basis,
        "estimated_bytes_per_shard": size.shard_bytes,
        "estimated_bytes_by_column": dict(size.columns),
        "estimated_audit_bytes": audit_bytes(plan),
        **({"teacher_verdict": dict(size.teacher)} if size.teacher is not None else {}),
        **(teacher_cost(plan, tflops) if plan.teacher is not None else {}),
    }


def audit_bytes(plan: Plan) -> int:
    """Size of the audit files, at most about: every masked position counted as a target, every token as support."""
    signal = plan.config.signal
    if plan.signal_kind != "topk" or plan.teacher is None:
        return 0
    num_tokens = min(plan.student["vocab_size"], plan.teacher["spec"]["vocab_size"])
    if signal.support != "shared":
        num_tokens = min(num_tokens, signal.support)
    return int(signal.audit_share * plan.totals["expected_masked"] * num_tokens * AUDIT_BYTES[signal.logp_dtype])


def warn_of_shard_sizes(plan: Plan, size: SizeEstimate) -> None:
    """Say it where shards of a large cache come out very small or very large, and which setting would change that.

    A cache that fits into a few shards may be cut as its owner likes.
    """
    if size.bytes < 4 * MAX_SHARD_BYTES or MIN_SHARD_BYTES <= size.shard_bytes <= MAX_SHARD_BYTES:
        return
    per_shard, middle = plan.config.shards.samples_per_shard, math.sqrt(MIN_SHARD_BYTES * MAX_SHARD_BYTES)
    better = float(f"{min(per_shard, len(plan.samples)) * middle / size.shard_bytes:.1g}")
    warnings.warn(
        f"shards.samples_per_shard = {per_shard:,} makes shards of about {size.shard_bytes / 1e6:,.1f} MB; 64 to 512 "
        f"MB are handiest to move and to fetch: {max(1, int(better)):,} samples would give about that",
        stacklevel=2,
    )


def teacher_cost(plan: Plan, tflops: float) -> dict[str, Any]:
    """The teacher's parameters and memory, and the work of a dump.

    FLOPs are those of all passes: matrix products of the layers, attention over the tokens seen, the head at the
    answers. KV memory is that of one micro-batch: the shared prefix, and its copy for each pass. GPU-hours assume
    `tflops`, the reader's own figure; a mixture of experts reaches a smaller share of a GPU's peak than a dense model.
    """
    config = plan.config.teacher
    folder = local_folder(config.path, (plan.teacher or {}).get("revision") or config.revision, weights=False)
    size = model_size(read_config(folder), str(folder), dtype=config.dtype, quantization=config.quantization)
    length = plan.totals["teacher_tokens"] / plan.totals["samples"]
    seen = length if (plan.teacher or {})["spec"]["block_size"] is None else length / 2
    flops = plan.expected_forwards * (size.flops_per_token + seen * size.flops_per_token_pair)
    flops += plan.totals["expected_masked"] * size.flops_per_answer
    return {
        "teacher_parameters": size.parameters,
        "teacher_active_parameters": size.active_parameters,
        "teacher_weight_bytes": size.weight_bytes,
        "teacher_kv_bytes": 2 * config.tokens_per_batch * size.kv_bytes_per_token,
        "estimated_flops": float(f"{flops:.3g}"),
        "estimated_gpu_hours": float(f"{flops / (tflops * 1e12) / 3600:.3g}"),
        "assumed_tflops": tflops,
    }
