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
    x_0 = batch.lists["x_0"]
    _check_range(batch, "x_0", x_0, 0, layout.vocab_size)
    if "chunk_start" in batch.lists:
        _check_chunks(batch)
    if "target_position" in batch.lists:
        _check_targets(batch, layout)
    if order is not None:
        _check_order(batch, order)


def _first(batch: RowBatch, bad: np.ndarray, field: str, message: str) -> None:
    """Refuse the first row for which `bad` (one flag per row) holds."""
    if bad.any():
        raise batch.error(int(np.argmax(bad)), field, message)


def _check_scalars(batch: RowBatch, layout: Layout) -> None:
    num_tokens = batch.counts["num_tokens"]
    for row, sample in enumerate(batch.sample_id):
        if not 0 < len(sample) <= MAX_SAMPLE_ID or not sample.isprintable():
            raise batch.error(row, "sample_id", f"expected 1 to {MAX_SAMPLE_ID} printable characters")
    _first(batch, batch.view < 0, "view", "negative")
    t = batch.t
    _first(batch, ~((t > 0) & (t <= 1)), "t", "not in (0, 1]")
    bad_length = (num_tokens <= 0) | (num_tokens % layout.block_size != 0)
    _first(batch, bad_length, "x_0", f"length is not a positive multiple of the block size {layout.block_size}")
    bad_prompt = (batch.prompt_tokens < 0) | (batch.prompt_tokens > num_tokens)
    _first(batch, bad_prompt, "prompt_tokens", "not between 0 and the number of tokens")


def _check_range(batch: RowBatch, name: str, column: Lists, low: int, high: int) -> None:
    values = column.values
    if len(values) and (values.min() < low or values.max() >= high):
        index = int(np.argmax((values < low) | (values >= high)))
        raise batch.error(column.row_of(index), name, f"{values[index]} is not in [{low}, {high})")


def _check_logp(batch: RowBatch, name: str) -> None:
    column = batch.lists[name]
    good = np.isfinite(column.values) & (column.values <= 0)
    if not good.all():
        index = int(np.argmin(good))
        raise batch.error(column.row_of(index), name, f"{column.values[index]} is not a finite log-probability <= 0")


def _masked_before(batch: RowBatch) -> tuple[np.ndarray, np.ndarray]:
    """Running count of masked positions over all responses, and for every row the index there of its position 0."""
    masked = batch.lists["masked"]
    before = np.concatenate([[0], np.cumsum(masked.values, dtype=np.int64)])
    return before, masked.offsets[:-1] - batch.prompt_tokens


def _check_spans(batch: RowBatch, name: str, start: Lists, length: np.ndarray | int) -> None:
    """Spans [start, start + length) lie in the response, ascend without overlap and are masked throughout."""
    rows = start.rows()
    begin = start.values.astype(np.int64)
    end = begin + length
    outside = (begin < batch.prompt_tokens[rows]) | (end > batch.counts["num_tokens"][rows])
    if outside.any():
        index = int(np.argmax(outside))
        raise batch.error(int(rows[index]), name, f"span [{begin[index]}, {end[index]}) is not inside the response")
    overlap = (rows[1:] == rows[:-1]) & (begin[1:] < end[:-1])
    if overlap.any():
        index = int(np.argmax(overlap)) + 1
        raise batch.error(int(rows[index]), name, f"{begin[index]} does not follow the entry before it")
    before, base = _masked_before(batch)
    base = base[rows]
    clean = before[base + end] - before[base + begin] != end - begin
    if clean.any():
        index = int(np.argmax(clean))
        raise batch.error(
            int(rows[index]), name, f"span [{begin[index]}, {end[index]}) holds a position that is not masked"
        )


def _check_chunks(batch: RowBatch) -> None:
    start, length = batch.lists["chunk_start"], batch.lists["chunk_len"]
    _check_range(batch, "chunk_len", length, 1, 2**31)
    _check_spans(batch, "chunk_start", start, length.values.astype(np.int64))
    _check_logp(batch, "chunk_logp")


def _check_targets(batch: RowBatch, layout: Layout) -> None:
    lists = batch.lists
    position, num_top, top_ids, top_logp = (lists[n] for n in ("target_position", "num_top", "top_ids", "top_logp"))
    _check_spans(batch, "target_position", position, 1)
    _check_range(batch, "num_top", num_top, 0, layout.top_k + 1)
    _check_range(batch, "top_ids", top_ids, 0, layout.vocab_size)
    _check_logp(batch, "top_logp")
    _check_single(batch, position)
    counts = num_top.values.astype(np.int64)
    target = np.repeat(np.arange(len(counts)), counts)  # [sum num_top]
    rising = (target[1:] == target[:-1]) & (top_logp.values[1:] > top_logp.values[:-1])
    if rising.any():
        raise batch.error(
            top_ids.row_of(int(np.argmax(rising)) + 1), "top_logp", "a target's entries are not in order of probability"
        )
    _check_distinct(batch, counts, position)
    bad = ~(batch.log_tail <= 0).all(axis=1)
    if bad.any():
        raise batch.error(position.row_of(int(np.argmax(bad))), "log_tail", "not a log-probability <= 0")
    if batch.log_buckets.size and not (batch.log_buckets <= 0).all():
        bad = ~(batch.log_buckets <= 0).all(axis=(1, 2))
        raise batch.error(position.row_of(int(np.argmax(bad))), "log_tail", "not a log-probability <= 0")
    empty = (counts == 0)[:, None] & (batch.log_tail < np.log(1 - layout.mass_tolerance))
    if empty.any():
        index = int(np.argmax(empty.any(axis=1)))
        raise batch.error(position.row_of(index), "log_tail", "a target without kept entries has all its mass outside")
    mass = segment_sums(np.exp(top_logp.values), counts)
    if 1.0 in layout.temperatures:  # there, kept entries and tail share the support's mass, which is at most 1
        mass = mass + np.exp(batch.log_tail[:, layout.temperatures.index(1.0)]) * np.minimum(mass, 1)
    if (mass > 1 + layout.mass_tolerance).any():
        index = int(np.argmax(mass))
        raise batch.error(
            position.row_of(index), "top_logp", f"a target's kept entries hold {mass[index]:.4f} of the probability"
        )


def _check_single(batch: RowBatch, position: Lists) -> None:
    """Every target is a chunk of one token: the clean token's log-probability is the chunk's."""
    start, length = batch.lists["chunk_start"], batch.lists["chunk_len"]
    place = batch.chunk_of_target()
    found = place < len(start.values)
    inside = place[found]
    found[found] = (start.rows()[inside] == position.rows()[found]) & (start.values[inside] == position.values[found])
    found[found] = length.values[place[found]] == 1
    if not found.all():
        index = int(np.argmin(found))
        raise batch.error(
            position.row_of(index), "target_position", f"{position.values[index]} is not a chunk of one token"
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
        twice = (table[:, 1:] == table[:, :-1]).any(axis=1)
        if twice.any():
            raise batch.error(
                position.row_of(first + int(np.argmax(twice))), "top_ids", "an id occurs twice in one target"
            )


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
