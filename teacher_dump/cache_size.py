"""How large the shards of a plan will be: some samples are encoded by the real writer and scaled up.

plan -> stretches of samples, spread evenly -> their views under the plan's noise -> answers -> bytes by column

1. Answers of made-up teachers, a sure, a middling and an unsure one (stand_in.py), no weight loaded: a wide range, as
   how sure the teacher is decides the size, and no config.json says it. Columns that no teacher fills come out alike.
2. With `num_probe`, the teacher itself is asked about some samples, and every column of 1. is multiplied by what its
   answers take there against the middling made-up ones: within a few per cent.
3. Shards of the cache that are finished already are scaled up instead.

How bytes are scaled up: size_model.py.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.cache import ViewRow, shard_is_done
from ..shared.cache.batch import row_bytes
from ..shared.cache.receipts import Receipt, listed_receipts
from ..shared.cache.schema import ROW_GROUP_BYTES
from ..shared.cache.store import Store, open_store
from ..shared.cache.writer import EncodedSize
from ..shared.errors import ConfigError
from .plan import Plan, PlannedSample, open_samples
from .shard_task import ShardTask
from .size_model import CERTAINTY, Content, Piece, encoded_piece, fit, sizes_of, standard_error, total_of
from .stand_in import MIDDLING, SURE, UNSURE
from .verdict import examine
from .views import View
from .worker import open_task

FEWEST_ENCODED = 128
"""Samples that are encoded with made-up answers, at least; a plan of so few is encoded whole."""
FEWEST_STRETCHES = 4
"""Parts of the plan that are looked at, at least: sources may follow one another."""
MADE_UP_ERROR = 0.15
"""How far made-up answers may be off even where they are as sure as the teacher's, as a share of the answers' bytes."""
GOOD_PROBE = 64
"""Samples to ask the teacher about: within a few per cent (benchmarks/plan_size.py)."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class SizeEstimate:
    """Predicted bytes of all shards.

    Args:
        bytes: most likely; low, high: the range, see `basis`.
        columns: of `bytes`, by column; `size_model.FOOTERS`: footers and page indexes.
        shard_bytes: of a full shard, on average.
        basis: in words: how it was found, and what the range means.
    """

    bytes: int
    low: int
    high: int
    columns: Mapping[str, int]
    shard_bytes: int
    basis: str
    teacher: Mapping[str, Any] | None = None
    """What a look at the teacher found (`verdict.Examination`), if it was asked."""


def estimate_size(
    plan: Plan, *, num_probe: int = 0, root: str | Path | Store | None = None, say: Say = lambda line: None
) -> SizeEstimate:
    """Predict the bytes of a plan's shards.

    Args:
        plan: one that `make_plan` or `Plan.at` gave, so that its data and tokenizers are found.
        num_probe: samples that the teacher is asked about; 0: none, no weight is loaded.
        root: a cache folder of this plan, whose finished shards are preferred to made-up answers.
        say: called with a line of progress.
    Raises: ConfigError: see `require_probe`. DataError, CacheMismatch: see `open_samples`, `open_task`.
    """
    require_probe(num_probe)
    finished = [] if root is None or num_probe else _finished(root, plan)
    if finished:
        pieces = [_finished_piece(receipt) for receipt in finished]
        estimate, _ = _scaled(plan, pieces, f"{len(finished):,} of {plan.num_shards:,} shards, which are finished")
        return estimate
    task = ShardTask(plan, *open_samples(plan), None)
    if plan.signal_kind == "none":
        pieces = [_piece(task, task.draw(*one)) for one in _to_encode(task)]
        return _scaled(plan, pieces, f"{_samples_of(pieces):,} samples, encoded as they will be")[0]
    made_up = _made_up(task)
    middling, error = made_up[1]
    if num_probe:
        return _probed(task, num_probe, middling, error, say)
    lowest, highest = (one(said.bytes for said, _ in made_up) for one in (min, max))
    (sure, _), (unsure, _) = made_up[0], made_up[-1]
    answers = sum(size for name, size in middling.columns.items() if sure.columns[name] != unsure.columns[name])
    margin = MADE_UP_ERROR * answers + 2 * error * middling.bytes
    return replace(
        middling, low=math.floor(max(0.0, lowest - margin)), high=math.ceil(highest + margin),
        basis="made-up answers; the range goes from a very sure teacher to a very unsure one; "
        f"--probe {GOOD_PROBE} asks yours about {GOOD_PROBE} samples and comes within a few per cent",
    )  # fmt: skip


def require_probe(num_probe: int) -> None:
    """Raises: ConfigError: samples that are too few to tell anything."""
    if num_probe and num_probe < FEWEST_STRETCHES:
        raise ConfigError(
            f"--probe {num_probe}: expected 0 or at least {FEWEST_STRETCHES} samples; {GOOD_PROBE} give a good estimate"
        )


def _made_up(task: ShardTask) -> list[tuple[SizeEstimate, float]]:
    """Estimates and their errors for a sure, a middling and an unsure teacher."""
    stand_ins = (SURE, MIDDLING, UNSURE)
    pieces: list[list[Piece]] = [[] for _ in stand_ins]
    for one in _to_encode(task):
        views = task.draw(*one)
        for stand_in, of_stand_in in zip(stand_ins, pieces, strict=True):
            stand_in.answer(views, _support(task))
            of_stand_in.append(_piece(task, views))
    return [_scaled(task.plan, of_stand_in, "") for of_stand_in in pieces]


def _probed(task: ShardTask, num_probe: int, middling: SizeEstimate, error: float, say: Say) -> SizeEstimate:
    """The middling estimate, corrected column by column by what the teacher's answers take."""
    plan, length = task.plan, _length(task)
    chosen, made_up, real = stretches(plan, num_probe, length), [], []
    total = sum(len(samples) for _, samples in chosen)
    with tempfile.TemporaryDirectory() as folder:
        task = open_task(Path(folder), plan)
        looked_at = examine(task)
        say("probe: the teacher was looked at" if looked_at else "probe: too few samples for a verdict on the teacher")
        for one in chosen:
            views = task.draw(*one)
            MIDDLING.answer(views, _support(task))
            made_up.append(_rows(views))
            task.ask(views)
            real.append(_rows(views))
            say(f"probe: the teacher was asked about {len(real):,} of {len(chosen):,} parts of the plan")
    unit = min(length, plan.config.shards.samples_per_shard)
    expected, found = (_by_column(plan, _joined(rows, unit, plan)) for rows in (made_up, real))
    sizes = {name: size * found[name] / max(1.0, expected[name]) for name, size in middling.columns.items()}
    answers = sum(size for name, size in sizes.items() if found[name] != expected[name]) / sum(sizes.values())
    certainty = CERTAINTY * answers * max(1.0, math.sqrt(GOOD_PROBE / total))
    error = max(certainty, 2 * math.hypot(error, _own_error(plan, _joined(real, 0, plan))))
    estimate = _estimate(
        plan, sizes, error * math.sqrt(1 - total / len(plan.samples)),
        f"the teacher's answers about {total:,} of {len(plan.samples):,} samples",
    )  # fmt: skip
    return replace(estimate, teacher=None if looked_at is None else looked_at.to_json())


def _joined(stretches: Sequence[Sequence[ViewRow]], num_samples: int, plan: Plan) -> list[Piece]:
    """Stretches put together to pieces of about `num_samples`, those of a shard or row group: dictionaries fill up."""
    parts: list[list[ViewRow]] = []
    views, room = plan.config.noise.views, 0
    for rows in stretches:
        if not parts or room < len(rows):
            parts.append([])
            room = num_samples * views
        parts[-1] += rows
        room -= len(rows)
    return [encoded_piece(rows, len(rows) // views, plan.layout) for rows in parts]


def _piece(task: ShardTask, views: Sequence[Sequence[View]]) -> Piece:
    return encoded_piece(_rows(views), len(views), task.plan.layout)


def _rows(views: Sequence[Sequence[View]]) -> list[ViewRow]:
    return [view.row() for of_sample in views for view in of_sample]


def _support(task: ShardTask) -> np.ndarray:
    """Student ids that a made-up answer may name."""
    ids = task.pairing.student_id
    return ids[ids >= 0]


def _to_encode(task: ShardTask) -> list[tuple[int, Sequence[PlannedSample]]]:
    length = _length(task)
    return stretches(task.plan, max(FEWEST_ENCODED, FEWEST_STRETCHES * length), length)


def _length(task: ShardTask) -> int:
    """Samples that fill a row group, about."""
    middle = len(task.plan.samples) // 2
    views = task.draw(middle, task.plan.samples[middle : middle + FEWEST_STRETCHES])
    if task.plan.signal_kind != "none":
        MIDDLING.answer(views, _support(task))
    return math.ceil(ROW_GROUP_BYTES * len(views) / sum(map(row_bytes, _rows(views))))


def stretches(plan: Plan, num_samples: int, length: int) -> list[tuple[int, Sequence[PlannedSample]]]:
    """About `num_samples` samples as stretches of consecutive ones, none across two shards, spread over the plan.

    Args: length: of a stretch at most, if it is shorter than a shard.
    Returns: position in the plan of each stretch's first sample, and its samples.
    """
    total = len(plan.samples)
    per_shard = min(plan.config.shards.samples_per_shard, total)
    longest = per_shard if total <= num_samples else min(length, max(1, num_samples // FEWEST_STRETCHES), per_shard)
    length = math.ceil(per_shard / math.ceil(per_shard / longest))  # parts of a shard are about equal
    spans = [
        (start, min(start + length, first + per_shard, total))
        for first in range(0, total, per_shard)
        for start in range(first, min(first + per_shard, total), length)
    ]
    num = min(len(spans), max(1, round(num_samples / length)))
    chosen = (spans[int((i + 0.5) * len(spans) / num)] for i in range(num))
    return [(start, plan.samples[start:end]) for start, end in chosen]


def planned_content(plan: Plan) -> Content:
    """Of all rows of a plan."""
    totals = plan.totals
    return Content(
        rows=totals["rows"], tokens=totals["tokens"] * plan.config.noise.views,
        expected_masked=totals["expected_masked"],
    )  # fmt: skip


def _scaled(plan: Plan, pieces: Sequence[Piece], basis: str) -> tuple[SizeEstimate, float]:
    """Pieces of a plan, scaled up to all of it, and the standard error as they differ among themselves."""
    num_samples = _samples_of(pieces)
    if num_samples == len(plan.samples) and len(pieces) == plan.num_shards:
        parts = [sizes_of(piece.whole) for piece in pieces]
        return _estimate(plan, {name: total_of(parts, name) for name in parts[0]}, 0.0, basis), 0.0
    left = math.sqrt(1 - num_samples / len(plan.samples))
    error = _own_error(plan, pieces) * left
    return _estimate(plan, _by_column(plan, pieces), max(CERTAINTY * left, 2 * error), basis), error


def _by_column(plan: Plan, pieces: Sequence[Piece]) -> dict[str, float]:
    """Bytes of all of the plan, scaled up from pieces of it."""
    model = fit(pieces, plan.layout.columns)
    return model.by_column(planned_content(plan), plan.num_shards, _num_groups(plan, pieces))


def _own_error(plan: Plan, pieces: Sequence[Piece]) -> float:
    """Standard error of what is scaled up, as the pieces differ among themselves."""
    model = fit(pieces, plan.layout.columns)
    said = [sum(model.by_column(piece.content, 1, piece.whole.groups).values()) for piece in pieces]
    return standard_error([p.whole.bytes - size for p, size in zip(pieces, said, strict=True)], sum(said))


def _estimate(plan: Plan, sizes: Mapping[str, float], error: float, basis: str) -> SizeEstimate:
    columns = {name: round(size) for name, size in sizes.items()}
    total, per_shard = sum(columns.values()), plan.config.shards.samples_per_shard
    return SizeEstimate(
        bytes=total, low=math.floor(total * max(0.0, 1 - error)), high=math.ceil(total * (1 + error)), columns=columns,
        shard_bytes=round(total * min(1.0, per_shard / len(plan.samples))), basis=basis,
    )  # fmt: skip


def _num_groups(plan: Plan, pieces: Sequence[Piece]) -> int:
    """Row groups of all shards of the plan; a group ends before the row that is too much, half a row early."""
    raw_bytes = sum(piece.raw_bytes for piece in pieces) / _samples_of(pieces)
    room = max(1.0, ROW_GROUP_BYTES - raw_bytes / plan.config.noise.views / 2)
    return sum(max(1, math.ceil(len(plan.shard_samples(shard)) * raw_bytes / room)) for shard in range(plan.num_shards))


def _samples_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.num_samples for piece in pieces)


def _finished(root: str | Path | Store, plan: Plan) -> list[Receipt]:
    store = open_store(root)
    listed = sorted(shard for shard in listed_receipts(store) if shard < plan.num_shards)
    receipts = (shard_is_done(store, shard, plan.hash) for shard in listed)
    return [receipt for receipt in receipts if receipt is not None]


def _finished_piece(receipt: Receipt) -> Piece:
    """A shard as its receipt describes it: taken as one group, since it is scaled up to shards like itself."""
    counts = receipt.statistics
    bins = np.array(counts.t_histogram)
    mean_t = float((bins * (np.arange(len(bins)) + 0.5)).sum() / len(bins) / bins.sum())
    size = EncodedSize(1, counts.column_bytes, receipt.bytes)
    content = Content(counts.rows, counts.tokens, counts.response_tokens * mean_t)
    return Piece(counts.samples, content, size, size)
