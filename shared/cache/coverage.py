"""What did not get into a cache, or only in part, in sentences.

Counts of samples left out by reason, and `coverage`: answers cut at a length, and what no chunk covers -> what people
are told wherever data are planned, dumped or shown: the same words for a plan (before the dump) and a manifest (after).
"""

from collections.abc import Mapping

COVERAGE = (
    "cut_samples", "cut_tokens", "teacher_cut_samples", "teacher_cut_tokens", "response_tokens", "signal_tokens",
    "samples_without_signal",
)  # fmt: skip
"""Fields of a manifest's `coverage`: samples whose end was cut off at `data.max_length` (the student's side) or at
`data.teacher_max_length`, and tokens that were; response tokens of the student without padding, those inside chunks,
samples with none.
"""
LARGE_SHARE = 0.05
"""Of the samples; more is worth a cure."""


def left_out(dropped: Mapping[str, int], num_samples: int) -> str:
    """How many samples were left out and why, in one line; "" for none."""
    total = sum(dropped.values())
    if not total:
        return ""
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(dropped.items(), key=lambda one: -one[1]))
    return f"{total:,} of {total + num_samples:,} samples are left out ({reasons})"


def coverage_lines(coverage: Mapping[str, int], num_samples: int, *, has_teacher: bool) -> list[str]:
    """What was cut off and what the teacher says nothing about, a sentence each; [] where all is whole."""
    lines = []
    for prefix, setting, what in (
        ("", "data.max_length", "answers"),
        ("teacher_", "data.teacher_max_length", "answers as the teacher reads them"),
    ):  # fmt: skip
        samples, tokens = coverage.get(f"{prefix}cut_samples", 0), coverage.get(f"{prefix}cut_tokens", 0)
        if samples and not (prefix and not has_teacher):
            cure = f": raise {setting}, or leave such samples out with data.too_long=drop"
            lines.append(
                f"{samples:,} of {num_samples:,} {what} are cut off at {setting}, {tokens:,} tokens in all"
                + (cure if samples > LARGE_SHARE * num_samples else "")
            )
    silent, response = coverage.get("samples_without_signal", 0), coverage.get("response_tokens", 0)
    outside = response - coverage.get("signal_tokens", 0)
    if has_teacher and (silent or outside > LARGE_SHARE * response):
        lines.append(
            f"{silent:,} of {num_samples:,} samples, and {outside:,} of {response:,} response tokens "
            f"({outside / max(1, response):.0%}), lie outside all chunks: the teacher says nothing about them, "
            "cross-entropy alone teaches them"
        )
    return lines


def sentences(
    dropped: Mapping[str, int], coverage: Mapping[str, int], num_samples: int, *, has_teacher: bool
) -> list[str]:
    """Both of the above; [] where all is whole."""
    said = left_out(dropped, num_samples)
    return [*([said] if said else []), *coverage_lines(coverage, num_samples, has_teacher=has_teacher)]
