"""A cache's description (inspect.py) in words: titled sections of names and values, for the terminal and the page.

Values hold what a stranger wrote: whoever shows them makes them inert (shown_text.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..shown_text import bytes_text, number_text, percent_text
from .coverage import coverage_lines, left_out

Section = tuple[str, dict[str, str]]
"""A title, and values by name."""
MAX_SENTENCE_CHARS = 2000
"""Of the verdict, and of what was left out or cut, which must not be cut itself."""


def value_chars(name: str, most: int) -> int:
    """Characters of a value that may be shown: of most names `most`."""
    return MAX_SENTENCE_CHARS if name.lower().startswith(("left out", "note")) else most


def origin(description: Mapping[str, Any]) -> Iterator[Section]:
    """Which cache, teacher, student, data, noise and signal."""
    d = description
    teacher, student, noise = d["teacher"], d["student"], dict(d["noise"])
    yield (
        "Cache",
        {
            "folder": d["cache"],
            "made by": f"tide {d['tide_version']}, schema {d['schema_version']}",
            "manifest": d["manifest_hash"],
            "plan": d["plan_hash"],
        },
    )
    if teacher is None:
        yield "Teacher", {"model": "none: clean samples only"}
    else:
        yield (
            "Teacher",
            {
                "model": f"{teacher['id']}, revision {teacher['revision']}, licence {teacher['licence']}",
                "weights": teacher["weight_fingerprint"],
                "precision": teacher["dtype"],
                **({"4-bit weights": teacher["quantization"]} if teacher["quantization"] else {}),
                "tokenizer": teacher["tokenizer_fingerprint"],
                "chat template": teacher["chat_template_fingerprint"],
                "spec": _settings(teacher["spec"]),
            },
        )
    yield (
        "Student",
        {
            "tokenizer": student["tokenizer_fingerprint"],
            "chat template": student["chat_template_fingerprint"],
            "ids": f"{student['vocab_size']:,}, mask {student['mask_id']}, end of text {student['eos_id']}",
            "block size": str(d["block_size"]),
        },
    )
    notes = coverage_lines(d["coverage"], d["size"]["samples"], has_teacher=teacher is not None)
    sources = [f"{s['source']}, revision {s['revision']}, licence {s['licence']}" for s in d["sources"]]
    yield (
        "Data",
        {
            **{f"source {number}" if len(sources) > 1 else "source": text for number, text in enumerate(sources, 1)},
            "left out": left_out(d["dropped"], d["size"]["samples"]) or "nothing",
            **{f"note {number}" if len(notes) > 1 else "note": text for number, text in enumerate(notes, 1)},
        },
    )
    yield "Noise", {"settings": _settings(noise)}
    yield _signal(d["signal"])


def _signal(signal: Mapping[str, Any]) -> Section:
    error = _settings(signal["codec_error"])
    kept = {"codec": f"{signal['codec']}, {signal['logp_dtype']}" + (f"; measured error {error}" if error else "")}
    if signal["kind"] == "topk":
        kept |= {
            "k": f"at most {signal['top_k']}, probability at least {signal['min_probability']:g}",
            "temperatures": ", ".join(f"{t:g}" for t in signal["temperatures"]),
            "support": signal["support"],
            **({"tail": f"{len(signal['tail_buckets']) + 1} ranges of ids"} if signal["tail_buckets"] else {}),
        }
    if "alignment" in signal:
        kept["chunks found by"] = signal["alignment"]
    return f"Signal: {signal['kind']}", kept


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


def _settings(tree: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in tree.items())
