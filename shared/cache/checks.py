"""Meaning: a decoded batch -> nothing, or a CacheError that names file, row and field.

The same checks guard what is written and what a stranger sends: ids inside the vocabulary and distinct per target,
log-probabilities finite and <= 0, head mass <= 1 at every temperature, masks, chunks and targets inside the response,
t in (0, 1], views of a sample adjacent, in order and of one text. All of them run on whole columns.
"""

from dataclasses import dataclass, field

import numpy as np

from .batch import Lists, RowBatch
from .schema import MAX_SAMPLE_ID, Layout, ViewRow
from .table import check_lengths

_DISTINCT_SLICE = 1 << 14


@dataclass
class SampleOrder:
    """What the rows before this batch were: carried from batch to batch of a shard, and from shard to shard."""

    seen: set[str] = field(default_factory=set)
    last: ViewRow | None = None


def check_batch(batch: RowBatch, layout: Layout, order: SampleOrder | None = None) -> None:
    """Raise CacheError at the first value that cannot be true; with `order`, check the sequence of samples as well."""
    check_lengths(batch, layout)
    _check_scalars(batch, layout)
    _check_range(batch, "x_0", 0, layout.vocab_size)
    if "chunk_start" in batch.lists:
        _check_range(batch, "chunk_len", 1, 2**31)
        _check_spans(batch, "chunk_start", batch.lists["chunk_len"].values.astype(np.int64))
        _check_logp(batch, "chunk_logp")
    if "target_position" in batch.lists:
        _check_targets(batch, layout)
    if order is not None:
        _check_order(batch, order)


def _check_scalars(batch: RowBatch, layout: Layout) -> None:
    t, num_tokens, prompt_tokens = batch.t, batch.counts["num_tokens"], batch.prompt_tokens
    named = np.array([0 < len(sample) <= MAX_SAMPLE_ID and sample.isprintable() for sample in batch.sample_id], bool)
    batch.refuse(~named, "sample_id", f"expected 1 to {MAX_SAMPLE_ID} printable characters")
    batch.refuse(batch.view < 0, "view", "negative")
    batch.refuse(~((t > 0) & (t <= 1)), "t", "not in (0, 1]")
    bad_length = (num_tokens <= 0) | (num_tokens % layout.block_size != 0)
    batch.refuse(bad_length, "x_0", f"length is not a positive multiple of the block size {layout.block_size}")
    bad_prompt = (prompt_tokens < 0) | (prompt_tokens > num_tokens)
    batch.refuse(bad_prompt, "prompt_tokens", "not between 0 and the number of tokens")


def _check_range(batch: RowBatch, name: str, low: int, high: int) -> None:
    column = batch.lists[name]
    bad = (column.values < low) | (column.values >= high)
    batch.refuse(bad, name, lambda index: f"{column.values[index]} is not in [{low}, {high})", column)


def _check_logp(batch: RowBatch, name: str) -> None:
    column = batch.lists[name]
    bad = ~(np.isfinite(column.values) & (column.values <= 0))
    batch.refuse(bad, name, lambda index: f"{column.values[index]} is not a finite log-probability <= 0", column)


def _check_spans(batch: RowBatch, name: str, length: np.ndarray | int) -> None:
    """Spans [start, start + length) lie in the response, ascend without overlap and are masked throughout."""
    start, masked = batch.lists[name], batch.lists["masked"]
    rows, begin = start.rows(), start.values.astype(np.int64)
    end = begin + length
    outside = (begin < batch.prompt_tokens[rows]) | (end > batch.counts["num_tokens"][rows])
    batch.refuse(outside, name, lambda index: f"span [{begin[index]}, {end[index]}) is not inside the response", start)
    overlap = np.zeros(len(begin), bool)
    overlap[1:] = (rows[1:] == rows[:-1]) & (begin[1:] < end[:-1])
    batch.refuse(overlap, name, lambda index: f"{begin[index]} does not follow the entry before it", start)
    # Masked positions of all responses before each place, and for every span the place of its row's position 0.
    before = np.concatenate([[0], np.cumsum(masked.values, dtype=np.int64)])
    base = (masked.offsets[:-1] - batch.prompt_tokens)[rows]
    clean = before[base + end] - before[base + begin] != end - begin
    batch.refuse(
        clean, name, lambda index: f"span [{begin[index]}, {end[index]}) holds a position that is not masked", start
    )


def _check_targets(batch: RowBatch, layout: Layout) -> None:
    position, num_top, top_ids, top_logp = (
        batch.lists[name] for name in ("target_position", "num_top", "top_ids", "top_logp")
    )
    _check_spans(batch, "target_position", 1)
    _check_range(batch, "num_top", 0, layout.top_k + 1)
    _check_range(batch, "top_ids", 0, layout.vocab_size)
    _check_logp(batch, "top_logp")
    _check_single(batch, position)
    counts = num_top.values.astype(np.int64)
    target = np.repeat(np.arange(len(counts)), counts)  # [sum num_top]
    rising = np.zeros(len(target), bool)
    rising[1:] = (target[1:] == target[:-1]) & (top_logp.values[1:] > top_logp.values[:-1])
    batch.refuse(rising, "top_logp", "a target's entries are not in order of probability", top_ids)
    _check_distinct(batch, counts, position)
    for masses in (batch.log_tail, batch.log_buckets):
        bad = np.asarray(~(masses <= 0).all(axis=tuple(range(1, masses.ndim))))
        batch.refuse(bad, "log_tail", "not a log-probability <= 0", position)
    empty = (counts == 0)[:, None] & (batch.log_tail < np.log(1 - layout.mass_tolerance))
    batch.refuse(empty.any(axis=1), "log_tail", "a target without kept entries has all its mass outside", position)
    mass = segment_sums(np.exp(top_logp.values), counts)
    if 1.0 in layout.temperatures:  # there, kept entries and tail share the support's mass, which is at most 1
        mass = mass + np.exp(batch.log_tail[:, layout.temperatures.index(1.0)]) * np.minimum(mass, 1)
    batch.refuse(
        mass > 1 + layout.mass_tolerance, "top_logp",
        lambda index: f"a target's kept entries hold {mass[index]:.4f} of the probability", position,
    )  # fmt: skip


def _check_single(batch: RowBatch, position: Lists) -> None:
    """Every target is a chunk of one token: the clean token's log-probability is the chunk's."""
    start, length = batch.lists["chunk_start"], batch.lists["chunk_len"]
    place = batch.chunk_of_target()
    found = place < len(start.values)
    inside = place[found]
    found[found] = (start.rows()[inside] == position.rows()[found]) & (start.values[inside] == position.values[found])
    found[found] = length.values[place[found]] == 1
    batch.refuse(
        ~found, "target_position", lambda index: f"{position.values[index]} is not a chunk of one token", position
    )


def segment_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64 sums of consecutive segments of the given lengths; 0 for an empty one."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.concatenate([[0], np.cumsum(counts)])
    return total[ends[1:]] - total[ends[:-1]]


def _check_distinct(batch: RowBatch, counts: np.ndarray, position: Lists) -> None:
    ids, ends = batch.lists["top_ids"].values, np.concatenate([[0], np.cumsum(counts)])
    for first in range(0, len(counts), _DISTINCT_SLICE):
        some = counts[first : first + _DISTINCT_SLICE]
        width = int(some.max())
        if width < 2:
            continue
        inside = np.arange(width) < some[:, None]
        table = np.broadcast_to(-1 - np.arange(width, dtype=np.int32), inside.shape).copy()  # padding is distinct too
        table[inside] = ids[ends[first] : ends[first + len(some)]]
        table.sort(axis=1)
        twice = np.zeros(len(counts), bool)
        twice[first : first + len(some)] = (table[:, 1:] == table[:, :-1]).any(axis=1)
        batch.refuse(twice, "top_ids", "an id occurs twice in one target", position)


def _check_order(batch: RowBatch, order: SampleOrder) -> None:
    last = order.last
    x_0 = batch.lists["x_0"]
    for row, sample in enumerate(batch.sample_id):
        if last is None or sample != last.sample_id:
            if sample in order.seen:
                raise batch.error(row, "sample_id", "this sample occurred before: views of a sample must be adjacent")
            order.seen.add(sample)
        else:
            if batch.view[row] <= last.view:
                raise batch.error(row, "view", f"does not follow view {last.view} of the same sample")
            if batch.prompt_tokens[row] != last.prompt_tokens or not np.array_equal(x_0[row], last.x_0):
                raise batch.error(row, "x_0", f"differs from view {last.view} of the same sample")
        last = batch[row]
    order.last = last
    if last is not None:  # a copy, so that one row does not keep its whole batch in memory
        order.last = ViewRow(
            last.sample_id, last.view, last.t, last.x_0.copy(), last.prompt_tokens, np.zeros(0, np.bool_)
        )
