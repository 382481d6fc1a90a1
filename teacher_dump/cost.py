"""What a plan will cost, before any weight is loaded: samples, bytes, and the teacher's memory, FLOPs and GPU-hours."""

from typing import Any

from ..shared.models.loading import local_folder, read_config
from ..shared.models.size import ModelSize, model_size
from .audit_cost import audit_bytes
from .plan import Plan

ASSUMED_TFLOPS = 100.0
"""Sustained teraflops a second of one GPU, where the user states none."""


def describe_plan(plan: Plan, *, tflops: float = ASSUMED_TFLOPS) -> dict[str, Any]:
    """A plan in numbers, for people and scripts; bytes, token-forwards and all that follows are estimates.

    Args:
        plan: one that `make_plan` or `Plan.at` gave, so that the teacher's config.json is found.
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
        "tokens": totals["tokens"],
        "views": totals["rows"],
        "expected_masked_positions": totals["expected_masked"],
        "expected_token_forwards": plan.expected_forwards,
        "shards": plan.num_shards,
        "estimated_bytes": plan.estimated_bytes(),
        "estimated_audit_bytes": audit_bytes(plan),
        **(teacher_cost(plan, tflops) if plan.teacher is not None else {}),
    }


def teacher_cost(plan: Plan, tflops: float) -> dict[str, Any]:
    """The teacher's parameters and memory, and the work of a dump.

    KV memory is that of one micro-batch: the shared prefix, and its copy for each pass. GPU-hours assume `tflops`, the
    reader's own figure; a mixture of experts reaches a smaller share of a GPU's peak than a dense model.
    """
    config = plan.config.teacher
    folder = local_folder(config.path, (plan.teacher or {}).get("revision") or config.revision, weights=False)
    size = model_size(read_config(folder), str(folder), dtype=config.dtype, quantization=config.quantization)
    flops = expected_flops(plan, size)
    return {
        "teacher_parameters": size.parameters,
        "teacher_active_parameters": size.active_parameters,
        "teacher_weight_bytes": size.weight_bytes,
        "teacher_kv_bytes": 2 * config.tokens_per_batch * size.kv_bytes_per_token,
        "estimated_flops": float(f"{flops:.3g}"),
        "estimated_gpu_hours": float(f"{flops / (tflops * 1e12) / 3600:.3g}"),
        "assumed_tflops": tflops,
    }


def expected_flops(plan: Plan, size: ModelSize) -> int:
    """Of all passes: matrix products of the layers, attention over the tokens seen, the head at the answers."""
    forwards, samples = plan.expected_forwards, plan.totals["samples"]
    length = plan.totals["teacher_tokens"] / samples
    seen = length if (plan.teacher or {})["spec"]["block_size"] is None else length / 2
    answers = plan.totals["expected_masked"]
    return int(forwards * (size.flops_per_token + seen * size.flops_per_token_pair) + answers * size.flops_per_answer)
