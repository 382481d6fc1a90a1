"""What an audit will add to a cache, before any weight is loaded."""

from .plan import Plan

BYTES_PER_VALUE = {"float16": 1.3, "float32": 2.9}
"""Measured on a language model's distributions over 49,152 tokens (docs/log.md)."""


def audit_bytes(plan: Plan) -> int:
    """Size of the audit files, at most about: every masked position counted as a target, every token as support."""
    signal = plan.config.signal
    if plan.signal_kind != "topk" or plan.teacher is None:
        return 0
    num_tokens = min(plan.student["vocab_size"], plan.teacher["spec"]["vocab_size"])
    if signal.support != "shared":
        num_tokens = min(num_tokens, signal.support)
    values = signal.audit_share * plan.totals["expected_masked"] * num_tokens
    return int(values * BYTES_PER_VALUE[signal.logp_dtype])
