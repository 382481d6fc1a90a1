"""How large the shards of a plan will be: the bytes of some samples, scaled up to all.

plan -> samples spread over it -> their views under the plan's noise -> bytes by column -> those of all shards

1. What no teacher fills is encoded as it will be; no weight is loaded.
2. The answers are counted, and taken at prices that were measured (`_prices`): a wide range, as how sure the teacher is
   decides. With `num_probe`, the teacher itself answers so many samples, and these are encoded: within a few per cent.
3. Shards of the cache that are finished already are scaled up instead.

Content is what a plan knows exactly: rows, tokens, the expected number of masked positions; every column grows with one
of them. A row group costs something by itself (dictionaries begin anew, page headers); the same rows in shorter groups
show how much, so that a few samples tell of long shards. How close it comes: docs/log.md, benchmarks/plan_size.py.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.cache import Layout, ViewRow, shard_is_done
from ..shared.cache.batch import row_bytes
from ..shared.cache.receipts import listed_receipts
from ..shared.cache.schema import ROW_GROUP_BYTES
from ..shared.cache.store import Store, open_store
from ..shared.cache.writer import EncodedSize, encoded_size
from ..shared.errors import ConfigError, DataError
from .plan import Plan, open_samples
from .shard_task import ShardTask
from .verdict import examine
from .views import View
from .worker import open_task

FOOTERS = "footers"
"""Name of what is no column: footers and page indexes."""
NUM_ENCODED = 128
"""Samples that are encoded where no teacher is asked; a plan of so few is encoded whole."""
FEWEST_PROBED, GOOD_PROBE = 4, 64
"""Samples to ask the teacher about: fewer tell nothing; so many come within a few per cent."""
CERTAINTY = 0.06
"""How far what `GOOD_PROBE` samples tell may be off, as a share, by measurement; of fewer ones more, by chance."""
PAGE_BYTES, DICTIONARY_BYTES = 250, 3
"""What a column takes in any shard, and an id of its dictionary: small shards, which measured prices are not of."""
ASKED_AT_ONCE = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class SizeEstimate:
    """Predicted bytes of all shards.

    Args:
        bytes: most likely; low, high: the range, see `basis`.
        columns: of `bytes`, by column; `FOOTERS`: footers and page indexes.
        shard_bytes: of a full shard, on average.
        basis: in words: how it was found, and what the range means.
        teacher: what a look at the teacher found (`verdict.Examination`), if it was asked.
    """

    bytes: int
    low: int
    high: int
    columns: Mapping[str, int]
    shard_bytes: int
    basis: str
    teacher: Mapping[str, Any] | None = None


def estimate_size(
    plan: Plan, *, num_probe: int = 0, root: str | Path | Store | None = None, say: Say = lambda line: None
) -> SizeEstimate:
    """Predict the bytes of a plan's shards.

    Args:
        plan: one that `make_plan` or `Plan.at` gave, so that its data and tokenizers are found.
        num_probe: samples that the teacher is asked about; 0: none, no weight is loaded.
        root: a cache folder of this plan, whose finished shards are preferred to measured prices.
        say: called with a line of progress.
    Raises: ConfigError: see `require_probe`. DataError, CacheMismatch: see `open_samples`, `open_task`.
    """
    require_probe(num_probe)
    finished = None if root is None or num_probe else _of_finished_shards(plan, open_store(root))
    if finished is not None:
        return finished
    views = _drawn(ShardTask(plan, *open_samples(plan), None), NUM_ENCODED)
    no_answers = replace(plan.layout, signal="none", codec="plain", frequent_ids=(), tail_buckets=())
    sizes = _scaled(plan, [view.row(answered=False) for of_sample in views for view in of_sample], no_answers)
    if plan.signal_kind == "none":
        return _estimate(plan, sizes, len(views), f"{len(views):,} samples, as planned")
    if num_probe:
        return _of_probe(plan, sizes, num_probe, say)
    return _at_prices(plan, sizes, [view for of_sample in views for view in of_sample])


def require_probe(num_probe: int) -> None:
    """Raises: ConfigError: samples that are too few to tell anything."""
    if num_probe and num_probe < FEWEST_PROBED:
        raise ConfigError(
            f"--probe {num_probe}: expected 0 or at least {FEWEST_PROBED} samples; {GOOD_PROBE} give a good estimate"
        )


def _drawn(task: ShardTask, num: int) -> list[list[View]]:
    """Views of about `num` samples, spread evenly over the plan: sources may follow one another."""
    total = len(task.plan.samples)
    places = [int((i + 0.5) * total / min(num, total)) for i in range(min(num, total))]
    return [of_sample for i in places for of_sample in task.draw(i, task.plan.samples[i : i + 1])]


def _of_probe(plan: Plan, unanswered: Mapping[str, float], num_probe: int, say: Say) -> SizeEstimate:
    """What the teacher fills, as it answers some samples; the other columns as many more samples told."""
    with tempfile.TemporaryDirectory() as folder:
        task = open_task(Path(folder), plan)
        looked_at = examine(task)
        say("probe: the teacher was looked at" if looked_at else "probe: too few samples for a verdict on the teacher")
        views, left_out = _drawn(task, num_probe), dict[str, str]()
        for start in range(0, len(views), ASKED_AT_ONCE):
            asked = views[start : start + ASKED_AT_ONCE]
            task.ask(asked, left_out=left_out)
            say(f"probe: the teacher was asked about {start + len(asked):,} of {len(views):,} samples")
    basis = f"the teacher's answers about {len(views):,} of {len(plan.samples):,} samples"
    rows = [view.row() for of_sample in views for view in of_sample if view.sample.sample_id not in left_out]
    if not rows:
        reasons = ", ".join(sorted(set(left_out.values())))
        raise DataError(f"--probe: the teacher could answer none of {len(views):,} samples ({reasons})")
    sizes = _scaled(plan, rows, plan.layout)
    if len(views) < len(plan.samples):
        sizes |= {**unanswered, FOOTERS: sizes[FOOTERS]}
    found = _estimate(plan, sizes, len(views), basis)
    return replace(found, teacher=None if looked_at is None else looked_at.to_json())


def _of_finished_shards(plan: Plan, store: Store) -> SizeEstimate | None:
    listed = sorted(shard for shard in listed_receipts(store) if shard < plan.num_shards)
    done = [one for one in (shard_is_done(store, shard, plan.hash) for shard in listed) if one is not None]
    if not done:
        return None
    counts = [one.statistics for one in done]
    sizes = _sum([EncodedSize(1, one.statistics.column_bytes, one.bytes) for one in done])
    grown = _growth(
        plan, len(done), *(sum(getattr(c, n) for c in counts) for n in ("rows", "tokens", "masked_positions"))
    )
    num_samples = sum(c.samples for c in counts)
    if len(done) == plan.num_shards:
        grown, num_samples = dict.fromkeys(sizes, 1.0), len(plan.samples)
    basis = f"{len(done):,} of {plan.num_shards:,} shards, which are finished"
    return _estimate(plan, {name: size * grown[name] for name, size in sizes.items()}, num_samples, basis)


def _growth(plan: Plan, num_files: int, num_rows: int, num_tokens: int, num_masked: int) -> dict[str, float]:
    """By column, how many times so much content in so many files the plan has."""
    totals = plan.totals
    rows, tokens = totals["rows"] / num_rows, totals["tokens"] * plan.config.noise.views / num_tokens
    masked = totals["expected_masked"] / max(1, num_masked)
    grown = {c.name: rows if c.encoding == "scalar" else masked for c in plan.layout.columns}
    return {**grown, "x_0": tokens, FOOTERS: plan.num_shards / num_files}


def _scaled(plan: Plan, rows: Sequence[ViewRow], layout: Layout) -> dict[str, float]:
    """Bytes by column of all shards, from all rows of some samples, encoded as if they were the plan."""
    views = plan.config.noise.views
    length = views * plan.config.shards.samples_per_shard
    files = [rows[start : start + length] for start in range(0, len(rows), length)]
    whole = [encoded_size(of_file, layout) for of_file in files]
    if len(rows) == plan.totals["rows"]:
        return dict(_sum(whole))
    raw = [sum(map(row_bytes, of_file)) for of_file in files]
    split = [
        encoded_size(of_file, layout, group_bytes=math.ceil(min(size, ROW_GROUP_BYTES) / 2))
        for of_file, size in zip(files, raw, strict=True)
    ]
    groups, more = (sum(size.groups for size in sizes) for sizes in (whole, split))
    mean = sum(raw) / len(rows)
    room = max(1.0, ROW_GROUP_BYTES - mean / 2)  # a group ends before the row that is too much, half a row early
    all_groups = sum(math.ceil(views * len(plan.shard_samples(n)) * mean / room) for n in range(plan.num_shards))
    grown = _growth(
        plan, len(files), len(rows), sum(len(row.x_0) for row in rows), sum(int(row.masked.sum()) for row in rows)
    )
    sizes, of_split = _sum(whole), _sum(split)
    prices = {name: max(0.0, (of_split[name] - sizes[name]) / max(1, more - groups)) for name in sizes}
    return {n: prices[n] * all_groups + max(0.0, sizes[n] - prices[n] * groups) * grown[n] for n in sizes}


def _sum(sizes: Sequence[EncodedSize]) -> Counter[str]:
    """Bytes by column, and of the footers."""
    found: Counter[str] = Counter()
    for size in sizes:
        found.update({**size.column_bytes, FOOTERS: size.bytes - sum(size.column_bytes.values())})
    return found


def _at_prices(plan: Plan, unanswered: Mapping[str, float], views: Sequence[View]) -> SizeEstimate:
    """What the teacher will fill, counted in some views, at measured prices; the other columns as given."""
    grown = plan.totals["expected_masked"] / max(1, sum(int(view.masks.student.sum()) for view in views))
    counts = {
        "row": plan.totals["rows"], "chunk": grown * sum(len(view.chunks) for view in views),
        "target": grown * sum(len(view.targets) for view in views),
    }  # fmt: skip
    dictionary = {"top_ids": DICTIONARY_BYTES * min(plan.layout.vocab_size, 4096)}
    answers = {
        name: counts[of] * bytes_of + plan.num_shards * (PAGE_BYTES + dictionary.get(name, 0))
        for name, (of, bytes_of) in _prices(plan).items()
    }
    times = len(plan.layout.columns) / (len(unanswered) - 1)
    sizes = {**unanswered, FOOTERS: unanswered[FOOTERS] * times}  # a footer has a line a column
    low, _, high = sum(sizes.values()) + np.sum(list(answers.values()), axis=0)
    found = _estimate(plan, {**sizes, **{name: likely for name, (_, likely, _) in answers.items()}}, 1, "")
    return replace(
        found, low=math.floor(low * (1 - CERTAINTY)), high=math.ceil(high * (1 + CERTAINTY)),
        basis="prices of other teachers' answers; the range covers those that were measured; "
        f"--probe {GOOD_PROBE} asks yours about {GOOD_PROBE} samples and comes within a few per cent",
    )  # fmt: skip


def _prices(plan: Plan) -> dict[str, tuple[str, np.ndarray]]:
    """Bytes that the columns with answers take a row, chunk or target: least, likely, most; measured (docs/log.md)."""
    layout, p = plan.layout, plan.config.signal.min_probability
    value = np.array([1.3, 1.9, 2.3]) if layout.logp_dtype == "float16" else np.array([2.4, 3.4, 3.8])
    a_row = "row", np.array([1.0, 1.4, 4.0])
    found = {"num_chunks": a_row, "chunk_len": ("chunk", np.array([0.05, 0.25, 0.5])), "chunk_logp": ("chunk", value)}
    if layout.signal == "chunk":
        return found
    k = likely = layout.top_k
    if p:  # measured: 10.4 entries at p = 1e-2, 17.7 at 5e-3, 32.0 at 2e-3
        likely = min(k, max(1.0, 0.42 * p**-0.7))
    kept = np.array([1 if p else k, likely, min(k, 2 * likely)])
    ids = math.log2(layout.vocab_size) * np.array([0.065, 0.1, 0.125])  # an index without compression is the most
    logp = value if layout.logp_step is None else np.array([0.5, 0.7, 0.9])
    top = {"top_ids": ids, "top_logp": logp}
    if layout.is_compact:
        top = {"top_ranks": 0.9 * ids, "top_steps": np.array([0.4, 0.6, 0.8])}
    found |= {name: ("target", kept * bytes_of) for name, bytes_of in top.items()}
    found |= dict.fromkeys(layout.log_tail_names, ("target", value * layout.num_buckets))
    num_top = np.array([0.3, 0.8, 1.0] if p else [0.02, 0.1, 0.2])
    return {
        **found, "num_targets": a_row, "num_top": ("target", num_top),
        "target_position": ("target", np.array([0.5, 0.7, 1.0])),
    }  # fmt: skip


def _estimate(plan: Plan, sizes: Mapping[str, float], num_samples: int, basis: str) -> SizeEstimate:
    """What was found from so many samples, in whole bytes, with the range that `CERTAINTY` gives."""
    columns = {name: round(size) for name, size in sizes.items()}
    total, per_shard = sum(columns.values()), plan.config.shards.samples_per_shard
    is_whole = num_samples == len(plan.samples)
    error = 0.0 if is_whole else CERTAINTY * math.sqrt(max(1.0, GOOD_PROBE / num_samples))
    return SizeEstimate(
        bytes=total, low=math.floor(total * max(0.0, 1 - error)), high=math.ceil(total * (1 + error)), columns=columns,
        shard_bytes=round(total * min(1.0, per_shard / len(plan.samples))), basis=basis,
    )  # fmt: skip
