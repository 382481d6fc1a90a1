"""`tide demo`: the whole of tide in a few minutes on two CPU cores, on real text.

1. dump: the shipped teacher is asked once about some functions of the standard library (signature, docstring -> body)
2. train: from this one cache and one initialisation per seed, a student per arm: cross-entropy alone, the hard-label
   control, and distilled ones
3. compare: bits per byte and top-1 accuracy on modules that neither teacher nor students have seen, by diffusion time,
   with the spread over seeds and a z value paired by document; a table, `demo.json` and `demo.png`
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .shared.cache.files import atomic_write, readable_json
from .shared.config import RunConfig, load_config
from .student_train.ablation_report import draw as draw_comparison
from .student_train.ablation_report import z_text
from .student_train.arms import Job, Say, run_jobs
from .student_train.comparison import summarise
from .student_train.matrix import read_matrix

_MATRIX = read_matrix("demo")
ARMS = {name: arm.losses for name, arm in _MATRIX.arms.items()}
"""Losses of every arm (recipes/matrices/demo.yaml, which `tide ablate --matrix demo` takes to a cache of your own)."""
DEFAULT_ARMS = ("ce", "hard-label", "kl", "tide-hybrid")
BASELINE = _MATRIX.baseline
CONTROLS = ("ce", "ce-fresh", "hard-label")
"""What distillation has to beat; gains are stated against each of them."""


@dataclass(frozen=True)
class DemoSize:
    """How much of the demo is run."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None = None  # None: the recipe's
    documents: int | None = None  # held-out documents; None: all


SIZES = {
    "default": DemoSize(DEFAULT_ARMS, (31, 32), documents=160),
    "full": DemoSize(tuple(ARMS), (31, 32, 33)),
    "ci": DemoSize(("ce", "kl"), (31,), steps=20, documents=24),
}


def run_demo(out: Path, *, size: DemoSize, workers: int, say: Say) -> dict[str, Any]:
    """Dump, train, compare.

    Args:
        out: folder; gets `cache/`, `heldout/`, `runs/`, `demo.json` and `demo.png`. Finished parts are not redone.
        workers: processes; each uses one thread.
        say: called with a line of progress.
    Returns: the content of demo.json.
    """
    from .shared.cache import open_cache
    from .teacher_dump.dump import dump_teacher

    start = time.perf_counter()
    with resources.as_file(resources.files("tide.recipes").joinpath("demo_assets")) as assets:
        config = demo_config(assets, size)
        say(f"1/3 dump: asking the teacher about {config.data.limit} functions x {config.noise.views} views")
        with _one_thread_each():
            dump_teacher(config, out / "cache", num_workers=workers)
            dump_teacher(heldout_config(config, size), out / "heldout", num_workers=1)
        cache = open_cache(out / "cache")
        chunks = chunk_kinds(config)
        say(f"    {cache.manifest.totals.rows:,} views, {cache.manifest.totals.bytes:,} bytes; chunks: {chunks}")
        dumped = time.perf_counter()
        say(f"2/3 train: {len(size.arms)} arms x {len(size.seeds)} seeds, {config.train.steps} steps each")
        with _one_thread_each():
            outcome = run_jobs(demo_jobs(config, out, size), out, workers=workers, say=lambda line: say(f"    {line}"))
    for error in outcome.failed.values():
        raise error
    result = summarise(outcome.scores, size.arms, against=[arm for arm in CONTROLS if arm in size.arms])
    result |= {
        "chunks": chunks, "cache_bytes": cache.manifest.totals.bytes,
        "dump_s": round(dumped - start, 1), "total_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    say("3/3 compare: held-out modules of the standard library")
    atomic_write(out / "demo.json", readable_json(result))
    draw(result, out / "demo.png")
    return result


def demo_config(assets: Path, size: DemoSize) -> RunConfig:
    """The recipe `demo` with the shipped teacher and student."""
    config = load_config("demo")
    train = config.train if size.steps is None else replace(config.train, steps=size.steps)
    return replace(
        config,
        train=train,
        teacher=replace(config.teacher, path=str(assets / "teacher")),
        student=replace(config.student, path=str(assets / "student")),
    )


def heldout_config(config: RunConfig, size: DemoSize) -> RunConfig:
    """The held-out documents as a cache without a teacher, one view each."""
    data = replace(config.data, source="stdlib[heldout]", limit=size.documents, sample_seed=2)
    return replace(config, data=data, teacher=replace(config.teacher, path=""), noise=replace(config.noise, views=1))


def chunk_kinds(config: RunConfig) -> dict[str, int]:
    """How often the two tokenisations agree, split and merge, over the demo's functions: all three must occur."""
    from .shared.conversations import open_conversations, parse_sources, pin_sources
    from .shared.tokens import Dropped
    from .teacher_dump.pairing import open_pairing
    from .teacher_dump.plan import chosen_rows

    conversations = open_conversations(pin_sources(parse_sources(config.data.source)))
    pairing = open_pairing(config)
    kinds = {f"{teacher}_to_{student}": 0 for teacher in ("one", "many") for student in ("one", "many")}
    for row in chosen_rows(len(conversations), config.data):
        with contextlib.suppress(Dropped):
            spans = pairing.encode(conversations[row]).chunks
            for teacher, student in np.where(spans[:, 1::2] - spans[:, ::2] == 1, "one", "many"):
                kinds[f"{teacher}_to_{student}"] += 1
    assert min(kinds["one_to_many"], kinds["many_to_one"]) > 0, "the demo's tokenizers do not differ"
    return kinds


def demo_jobs(config: RunConfig, out: Path, size: DemoSize) -> list[Job]:
    """A training for every arm and seed; the first seed of all arms comes first."""
    return [
        Job(arm, _MATRIX.arms[arm].config(config, seed), str(out / "cache"), str(out / "heldout"))
        for seed in size.seeds for arm in size.arms
    ]  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    grid = " | ".join(f"t = {t:g}" for t in result["t"])
    lines = [
        f"| arm | bits per byte | seeds | gain | z | {grid} | top-1 |",
        "|---|" + "---|" * (5 + len(result["t"])),
    ]
    for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["bits_per_byte"]):
        by_t = " | ".join(f"{value:.3f}" for value in arm["bits_per_byte_by_t"])
        seeds = " ".join(f"{value:.3f}" for value in arm["seeds"])
        over = arm["against"].get(BASELINE)
        shown = f"{over['gain']:+.3f} | {z_text(over['z'])}" if over else "| "
        top_1 = f"{100 * arm['accuracy']:.1f} %"
        lines.append(f"| {name} | {arm['bits_per_byte']:.3f} | {seeds} | {shown} | {by_t} | {top_1} |")
    return "\n".join(lines)


def verdict(result: Mapping[str, Any], arm: str = "kl") -> str:
    """A line per control: does the distilled student beat it, in every seed, and how surely?"""
    lines = []
    for control, over in result["arms"][arm]["against"].items():
        wins = sum(value > 0 for value in over["gain_by_seed"])
        lines.append(
            f"{arm} against {control}: {over['gain']:+.3f} bits per byte, z = {z_text(over['z'])} over "
            f"{result['documents']} documents, better in {wins} of {len(over['gain_by_seed'])} seeds"
        )
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The picture: bits per byte and top-1 accuracy by diffusion time, a line per arm."""
    draw_comparison(result, path, title="Students of one cache, same start, same steps")


@contextlib.contextmanager
def _one_thread_each():
    """Child processes started inside use one thread each: two one-thread processes beat one two-thread process."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
