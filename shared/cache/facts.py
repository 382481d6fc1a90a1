"""A cache's manifest or description (inspect.py) in words: titled sections of names and values, wherever shown.

A value is text, a number, or settings by name: `in_words` makes a line of it. It holds what a stranger wrote: whoever
shows it makes it inert (shown_text.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..shown_text import bytes_text, number_text, percent_text
from .coverage import coverage_lines, left_out

Section = tuple[str, Mapping[str, Any]]
"""A title, and values by name."""
_NAMES = {"kl mean": "mean KL", "kl p99": "99th percentile of KL"}
MAX_SENTENCE_CHARS = 2000
"""Of the verdict, and of what was left out or cut, which must not be cut itself."""


def value_chars(name: str, most: int) -> int:
    """Characters of a value that may be shown: of most names `most`."""
    return MAX_SENTENCE_CHARS if name.lower().startswith(("left out", "note")) else most


def identity(d: Mapping[str, Any]) -> dict[str, str]:
    """The hashes that name a cache, and what made it."""
    made_by = f"tide {d['tide_version']}, schema {d['schema_version']}"
    return {"manifest": d["manifest_hash"], "plan": d["plan_hash"], "made by": made_by}


def origin(d: Mapping[str, Any], samples: int) -> Iterator[Section]:
    """Which teacher, student, data, noise and signal, by the fields of a manifest's JSON."""
    teacher, student, signal = d["teacher"], d["student"], d["signal"]
    if teacher is None:
        yield "Teacher", {"model": "none (clean samples only)"}
    else:
        four_bit = f", {teacher['quantization']} 4-bit weights" if teacher["quantization"] else ""
        yield "Teacher", {
            "model": teacher["id"], "revision": teacher["revision"], "licence": teacher["licence"],
            "weights (fingerprint)": teacher["weight_fingerprint"], "precision": teacher["dtype"] + four_bit,
            "tokenizer": teacher["tokenizer_fingerprint"], "chat template": teacher["chat_template_fingerprint"],
            "spec": teacher["spec"],
        }  # fmt: skip
    yield "Student", {
        "tokenizer": student["tokenizer_fingerprint"], "chat template": student["chat_template_fingerprint"],
        "ids": f"{student['vocab_size']:,}, mask {student['mask_id']}, end of text {student['eos_id']}",
        "block size": str(d["block_size"]),
    }  # fmt: skip
    notes = coverage_lines(d["coverage"], samples, has_teacher=teacher is not None)
    sources = (f"{s['source']} at {s['revision']} (licence: {s['licence']})" for s in d["sources"])
    yield (
        "Data",
        {
            **{f"source {number}": text for number, text in enumerate(sources, 1)},
            "left out": left_out(d["dropped"], samples) or "nothing",
            **{f"note {number}" if len(notes) > 1 else "note": text for number, text in enumerate(notes, 1)},
        },
    )
    yield "Noise", {name.replace("_", " "): value for name, value in sorted(d["noise"].items())}
    step = f", top tokens in steps of {signal['logp_step']:g} nats" if signal["logp_step"] else ""
    kept = {"codec": f"{signal['codec']}, {signal['logp_dtype']}{step}"}
    kept["codec's measured error"] = signal["codec_error"] or "not measured"
    if signal["kind"] == "topk":
        kept["kept tokens"] = f"at most {signal['top_k']}, probability at least {signal['min_probability']:g}"
        if signal["tail_buckets"]:
            kept["tail"] = f"{len(signal['tail_buckets']) + 1} ranges of ids"
        kept["temperatures"] = ", ".join(f"{t:g}" for t in signal["temperatures"])
        kept["loss support"] = signal["support"]
    if "alignment" in signal:
        kept["chunks found by"] = signal["alignment"]
    yield f"Signal: {signal['kind']}", kept


def sizes(description: Mapping[str, Any]) -> Section:
    """How much of everything."""
    size = description["size"]
    return "Size", {
        "samples": f"{size['samples']:,} in {size['rows']:,} views",
        "tokens": f"{size['tokens']:,} over all views, {size['response_tokens']:,} of them may be masked",
        "masked": f"{size['masked_positions']:,} positions",
        "bytes": f"{bytes_text(size['bytes'])} in {size['shards']:,} shards, "
        f"{number_text(size['bytes_per_masked_position'], 1)} per masked position",
    }


def means(description: Mapping[str, Any]) -> Iterator[Section]:
    """Means of the teacher's signal, as far as there is one."""
    chunks, targets = description["chunks"], description["targets"]
    if chunks:
        yield (
            "Chunks",
            {
                "active": f"{chunks['count']:,}, {number_text(chunks['mean_length'])} tokens each on average",
                **(
                    {"one to one": f"{percent_text(chunks['one_to_one'])} carry a token-level target"}
                    if targets
                    else {}
                ),
                "teacher": f"log-probability {number_text(chunks['mean_logp'])} nats on average",
            },
        )
    if targets:
        yield (
            "Token-level targets",
            {
                "positions": f"{targets['count']:,}, {percent_text(targets['share_of_masked'])} of the masked ones",
                "kept": f"{number_text(targets['mean_k'])} tokens each",
                "head mass": f"{percent_text(targets['mean_head_mass'])} of the probability is on them",
                "entropy": f"between {number_text(targets['mean_entropy'])} and "
                f"{number_text(targets['mean_entropy_most'])} nats on average, as tokens not kept share their mass",
                "clean token": f"log-probability {number_text(targets['mean_gold_logp'])} nats on average",
            },
        )


def settings(tree: Mapping[str, Any]) -> dict[str, str]:
    """Each setting in words; what is named by a number is named by a temperature."""
    names = {name: re.sub(r"^(\d+\.\d+)$", r"T = \1", name.replace("_", " ")) for name in tree}
    return {_NAMES.get(names[name], names[name]): in_words(value) for name, value in tree.items()}


def in_words(value: Any) -> str:
    """A value for people: without the brackets, quotes and capital letters of a program."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, text in settings(value).items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(in_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
