"""A `RowBatch` <-> its Arrow table: the columns on disk, whatever the codec.

chunk_len goes along the masked positions there, ids and log-probabilities may be ranks and steps (compact.py), and
tails may be cut into buckets. Lengths are checked before anything is sliced; meaning is checked by checks.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError
from .batch import NO_BUCKETS, Lists, RowBatch, counts_of, sum_of_buckets
from .compact import decode_top, encode_top
from .schema import Layout, arrow_schema


def batch_to_table(batch: RowBatch, layout: Layout, schema: pa.Schema) -> pa.Table:
    """The Arrow table of a batch, in the layout's column order."""
    scalars = {name: getattr(batch, name) for name in ("sample_id", "view", "t", "prompt_tokens")} | batch.counts
    masses = batch.log_buckets if layout.tail_buckets else batch.log_tail[:, :, None]
    log_tail = dict(zip(layout.log_tail_names, np.ascontiguousarray(np.moveaxis(masses, 1, 0)), strict=True))
    lists = dict(batch.lists)
    if layout.is_compact:
        ids, logp, num_top = (lists[name] for name in ("top_ids", "top_logp", "num_top"))
        ranks, steps = encode_top(ids.values, logp.values, num_top.values, layout)
        lists |= {"top_ranks": Lists(ranks, ids.offsets), "top_steps": Lists(steps, ids.offsets)}
    arrays = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name in scalars:
            arrays.append(pa.array(scalars[name], kind))
            continue
        if name in log_tail:
            column = Lists(log_tail[name].ravel(), lists["target_position"].offsets * layout.num_buckets)
        else:
            column = _along_masked(batch) if name == "chunk_len" else lists[name]
        offsets = pa.array(column.offsets.astype(np.int32))
        arrays.append(pa.ListArray.from_arrays(offsets, pa.array(column.values, kind.value_type), type=kind))
    return pa.Table.from_arrays(arrays, schema=schema)


def _masked_positions(batch: RowBatch) -> Lists:
    """Absolute positions of the masked tokens."""
    masked = batch.lists["masked"]
    index = np.flatnonzero(masked.values)
    offsets = np.searchsorted(index, masked.offsets)
    shift = np.repeat(batch.prompt_tokens - masked.offsets[:-1], np.diff(offsets))
    return Lists((index + shift).astype(np.int32), offsets)


def _along_masked(batch: RowBatch) -> Lists:
    """chunk_len as on disk: along the masked positions a chunk's length, or 0 for a token that is in none.

    Expects chunks that `checks.check_batch` let pass: ascending, disjoint and masked throughout.
    """
    position, start, length = _masked_positions(batch), batch.lists["chunk_start"], batch.lists["chunk_len"]
    first = np.searchsorted(position.keys(), start.keys())
    inside = np.zeros(len(position.values) + 1, np.int64)
    inside[first] += 1
    np.subtract.at(inside, first + length.values, 1)
    values = np.zeros(len(position.values), np.int32)
    values[first] = length.values
    kept = (np.cumsum(inside[:-1]) == 0) | (values > 0)  # of a chunk, its first token
    return Lists(values[kept], np.concatenate([[0], np.cumsum(kept)])[position.offsets])


def _chunks(batch: RowBatch) -> tuple[Lists, Lists]:
    """chunk_start and chunk_len of every chunk: the inverse of `_along_masked`.

    Raises: CacheError: lengths that are negative or do not add up to the masked positions.
    """
    position, units = _masked_positions(batch), batch.lists["chunk_len"]
    batch.refuse(units.values < 0, "chunk_len", "negative", units)
    tokens = np.concatenate([[0], np.cumsum(np.maximum(units.values, 1), dtype=np.int64)])
    said, found = np.diff(tokens[units.offsets]), position.lengths
    batch.refuse(
        said != found, "chunk_len", lambda row: f"counts {said[row]} masked tokens, and {found[row]} are masked"
    )
    is_chunk = units.values > 0
    offsets = np.concatenate([[0], np.cumsum(is_chunk)])[units.offsets]
    start = _frozen(position.values[tokens[:-1][is_chunk]])
    return Lists(start, offsets), Lists(_frozen(units.values[is_chunk]), offsets)


def read_group(
    file: pq.ParquetFile, group: int, layout: Layout, *, where: str, first_row: int, full: bool = False
) -> RowBatch:
    """Decode one row group, the inverse of `batch_to_table`: zero-copy, read-only arrays (booleans are unpacked).

    Args: full: let Arrow validate every value (UTF-8, offsets), not only the buffers.
    Raises: CacheError: other columns or types than the layout's, a null, lists whose lengths contradict each other.
    """
    table, expected = file.read_row_group(group, use_threads=False), arrow_schema(layout)
    table.validate(full=full)
    if table.schema.names != expected.names or table.schema.types != expected.types:
        raise CacheError(f"{where}: columns are {_describe(table.schema)}; expected {_describe(expected)}")
    columns = {name: _single(table.column(name), where, name) for name in table.schema.names}
    lists = {name: _lists(array) for name, array in columns.items() if pa.types.is_list(array.type)}
    scalars = {
        name: _frozen(array.to_numpy(zero_copy_only=False))
        for name, array in columns.items() if name not in lists and name != "sample_id"
    }  # fmt: skip
    tails = [lists.pop(name) for name in layout.log_tail_names]
    if layout.is_compact:
        lists |= {"top_ids": lists.pop("top_ranks"), "top_logp": lists.pop("top_steps")}  # decoded below
    batch = RowBatch(
        where, first_row, columns["sample_id"].to_pylist(), view=scalars.pop("view"), t=scalars.pop("t"),
        prompt_tokens=scalars.pop("prompt_tokens"), counts=scalars, lists=lists,
        log_tail=np.zeros((0, 0), np.float32), log_buckets=NO_BUCKETS,
    )  # fmt: skip
    if "chunk_len" in lists:
        start, length = _chunks(batch)
        signal = {name: lists.pop(name) for name in tuple(lists) if name not in ("x_0", "masked")}
        lists |= {"chunk_start": start, **signal, "chunk_len": length}  # in the order of `batch_from_rows`
    check_lengths(batch, layout, tails)
    if layout.is_compact:
        ranks, steps = lists["top_ids"], lists["top_logp"]
        top_ids, top_logp = decode_top(
            ranks.values, steps.values, lists["num_top"].values, layout,
            lambda index, name, message: batch.error(ranks.row_of(index), name, message),
        )  # fmt: skip
        lists |= {
            "top_ids": Lists(_frozen(top_ids), ranks.offsets),
            "top_logp": Lists(_frozen(top_logp), ranks.offsets),
        }
    if not tails:
        return batch
    masses = _frozen(np.stack([column.values.reshape(-1, layout.num_buckets) for column in tails], axis=1))
    if not layout.tail_buckets:
        return dataclasses.replace(batch, log_tail=masses[:, :, 0])
    return dataclasses.replace(batch, log_tail=_frozen(sum_of_buckets(masses)), log_buckets=masses)


def check_lengths(batch: RowBatch, layout: Layout, log_tail: Sequence[Lists] = ()) -> None:
    """Lists that belong together have equal lengths, and the `num_*` columns say the same: slicing is then safe."""
    lists, same = batch.lists, []
    if "chunk_start" in lists:
        same += [("chunk_start", "chunk_len"), ("chunk_start", "chunk_logp")]
    if "target_position" in lists:
        same += [("target_position", "num_top"), ("top_ids", "top_logp")]
    pairs = [(name, lists[other].lengths, lists[name].lengths) for other, name in same]
    pairs += [
        ("log_tail", lists["target_position"].lengths * layout.num_buckets, column.lengths) for column in log_tail
    ]
    pairs += [("masked", batch.counts["num_tokens"] - batch.prompt_tokens, lists["masked"].lengths)]
    pairs += [(name, batch.counts[name], count) for name, count in counts_of(lists).items()]
    if "num_top" in lists:
        column = lists["num_top"]
        batch.refuse(column.values < 0, "num_top", "negative", column)
        total = np.concatenate([[0], np.cumsum(column.values, dtype=np.int64)])
        pairs.append(("top_ids", np.diff(total[column.offsets]), lists["top_ids"].lengths))
    for name, wanted, got in pairs:
        if not np.array_equal(wanted, got):
            row = int(np.argmax(wanted != got))
            raise batch.error(row, name, f"{got[row]} values where the other columns say {wanted[row]}")


def _single(column: pa.ChunkedArray, where: str, name: str) -> pa.Array:
    if column.null_count:
        raise CacheError(f"{where}, {name}: holds a null; expected none")
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _lists(array: pa.Array) -> Lists:
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.flatten()
    return Lists(_frozen(values.to_numpy(zero_copy_only=False)), offsets - offsets[0])


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}" for f in schema)
