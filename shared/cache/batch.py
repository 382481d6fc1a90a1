"""Rows by column: `ViewRow`s <-> `RowBatch`, without touching single elements.

A batch is one row group; its lists are flat value arrays with offsets, and `batch[i]` slices them into a `ViewRow`.
table.py knows what a batch looks like on disk.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CacheError
from .schema import Layout, ViewRow

_INT32 = np.iinfo(np.int32)
_LOGP = ("chunk_logp", "top_logp")
_CHUNK_FIELDS = ("chunk_start", "chunk_len", "chunk_logp")
_TARGET_FIELDS = ("target_position", "num_top", "top_ids", "top_logp")
NO_BUCKETS = np.zeros((0, 0, 0), np.float32)
NO_BUCKETS.flags.writeable = False
POSITIVE_ROUNDING = 1e-4
"""Log-probabilities up to this above 0 are float rounding and stored as 0."""


@dataclass(frozen=True, eq=False)
class Lists:
    """One list column: row i holds values[offsets[i]:offsets[i + 1]]; offsets are int64 [rows + 1] from 0."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]."""
        return np.diff(self.offsets)

    def rows(self) -> np.ndarray:
        """Row number of every value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def keys(self) -> np.ndarray:
        """Row and value as one number each: ascending where the values of every row are."""
        return self.rows() * (1 << 32) + self.values

    def row_of(self, index: int) -> int:
        """The row that holds values[index]."""
        return int(np.searchsorted(self.offsets, index, side="right")) - 1


@dataclass(frozen=True, eq=False)
class RowBatch(Sequence[ViewRow]):
    """The rows of one row group by column; indexing gives `ViewRow`s that share its memory.

    Args:
        where: file that errors name; first_row: number of row 0 within that file.
        counts: the `num_*` columns as stored, int32 [rows] each; `checks.py` compares them with the lists.
        lists: x_0, masked and, as the layout says, chunk_* and target columns.
        log_tail: float32 [all targets, temperatures]; where the tail is cut into buckets, the sum of their masses.
        log_buckets: float32 [all targets, temperatures, buckets] where the tail is cut, else of size 0.
    """

    where: str
    first_row: int
    sample_id: list[str]
    view: np.ndarray
    t: np.ndarray
    prompt_tokens: np.ndarray
    counts: dict[str, np.ndarray]
    lists: dict[str, Lists]
    log_tail: np.ndarray
    log_buckets: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_id)

    def __getitem__(self, row: int) -> ViewRow:  # type: ignore[override]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        values = {name: column[row] for name, column in self.lists.items()}
        of_targets = self.lists.get("target_position", Lists(np.zeros(0), np.zeros(len(self) + 1, int))).offsets
        tails = slice(of_targets[row], of_targets[row + 1])
        return ViewRow(
            sample_id=self.sample_id[row],
            view=int(self.view[row]),
            t=float(self.t[row]),
            prompt_tokens=int(self.prompt_tokens[row]),
            log_tail=self.log_tail[tails],
            log_buckets=self.log_buckets[tails] if self.log_buckets.shape[-1] else NO_BUCKETS,
            **values,
        )

    def __iter__(self) -> Iterator[ViewRow]:
        return (self[row] for row in range(len(self)))

    def chunk_of_target(self) -> np.ndarray:
        """Index into the values of `chunk_start` where each target's position is, or would be if it is none's start."""
        start, position = self.lists["chunk_start"], self.lists["target_position"]
        return np.searchsorted(start.keys(), position.keys())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return (
            self.log_tail.nbytes
            + self.log_buckets.nbytes
            + sum(c.values.nbytes + c.offsets.nbytes for c in self.lists.values())
        )

    def error(self, row: int, field: str, message: str) -> CacheError:
        """A CacheError that names file, row, sample and field."""
        sample = f"sample {self.sample_id[row]!r:.80}, view {int(self.view[row])}"
        return CacheError(f"{self.where}, row {self.first_row + row} ({sample}), {field}: {message}")

    def refuse(
        self, bad: np.ndarray, field: str, message: str | Callable[[int], str], of: Lists | None = None
    ) -> None:  # fmt: skip
        """Raise `error` for the first row, or value of the list column `of`, whose flag in `bad` is set.

        Args: message: what is wrong, or a function of the flag's index that says so.
        """
        if bad.any():
            index = int(np.argmax(bad))
            raise self.error(
                of.row_of(index) if of else index, field, message if isinstance(message, str) else message(index)
            )

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Feed every value and every boundary into `digest`: equal digests mean equal rows."""
        digest.update("\0".join(self.sample_id).encode())
        for array in (self.view, self.t, self.prompt_tokens, *self.counts.values(), self.log_tail, self.log_buckets):
            digest.update(np.ascontiguousarray(array).data)
        for column in self.lists.values():
            digest.update(np.ascontiguousarray(column.offsets).data)
            digest.update(np.ascontiguousarray(column.values).data)


def row_bytes(row: ViewRow) -> int:
    """Uncompressed size of a row on disk, about."""
    return 64 + 4 * (
        len(row.x_0)
        + 2 * len(row.chunk_start)
        + 2 * len(row.target_position)
        + 2 * len(row.top_ids)
        + max(row.log_tail.size, row.log_buckets.size)
    )


def batch_from_rows(rows: Sequence[ViewRow], layout: Layout, *, where: str, first_row: int) -> RowBatch:
    """Join rows to a batch, converting to the types on disk and rounding log-probabilities to `layout.logp_dtype`.

    Raises: CacheError: wrong dtype, shape or count, values that do not fit their column, signals the layout has no
    column for. Meaning is checked by `checks.check_batch`.
    """
    ids = [str(row.sample_id) for row in rows]
    views = np.array([row.view for row in rows])
    # A batch without lists: errors below name rows by it.
    none = np.zeros(len(rows))
    bare = RowBatch(where, first_row, ids, views, none, none, counts={}, lists={}, log_tail=none, log_buckets=none)
    lists = {
        "x_0": _join(bare, [row.x_0 for row in rows], "x_0", "i"),
        "masked": _join(bare, [row.masked for row in rows], "masked", "b"),
    }
    kind = f"signal {layout.signal!r}"
    for names, present, what in (
        (_CHUNK_FIELDS, layout.signal != "none", kind),
        (_TARGET_FIELDS, layout.signal == "topk", kind),
    ):
        for name in names:
            column = _join(bare, [getattr(row, name) for row in rows], name, "f" if name in _LOGP else "i")
            if present:
                lists[name] = _rounded(bare, column, name, layout) if name in _LOGP else column
            elif len(column.values):
                raise bare.error(column.row_of(0), name, f"given, but a cache of {what} has no such column")
    for row, view in enumerate(rows):
        for name in ("view", "prompt_tokens"):
            value = getattr(view, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value <= _INT32.max:
                raise bare.error(row, name, f"expected a number from 0 to {_INT32.max}, got {value!r}")
    shape = (len(layout.log_tail_names),)
    log_tail, log_buckets = _join_masses(bare, rows, "log_tail", shape, layout), NO_BUCKETS
    if layout.tail_buckets:
        log_buckets = _join_masses(bare, rows, "log_buckets", (*shape, layout.num_buckets), layout)
        log_tail = sum_of_buckets(log_buckets)
    return RowBatch(
        where, first_row, ids,
        view=np.array([row.view for row in rows], np.int32), t=np.array([row.t for row in rows], np.float32),
        prompt_tokens=np.array([row.prompt_tokens for row in rows], np.int32),
        counts=counts_of(lists), lists=lists, log_tail=log_tail, log_buckets=log_buckets,
    )  # fmt: skip


def counts_of(lists: dict[str, Lists]) -> dict[str, np.ndarray]:
    """The `num_*` columns, int32 [rows] each, as the lists say."""
    masked = lists["masked"]
    total = np.concatenate([[0], np.cumsum(masked.values, dtype=np.int64)])
    counts = {"num_tokens": lists["x_0"].lengths, "num_masked": np.diff(total[masked.offsets])}
    if "chunk_start" in lists:
        counts["num_chunks"] = lists["chunk_start"].lengths
    if "target_position" in lists:
        counts["num_targets"] = lists["target_position"].lengths
    return {name: count.astype(np.int32) for name, count in counts.items()}


def _join(bare: RowBatch, arrays: list[np.ndarray], name: str, kind: str) -> Lists:
    """Concatenate one field of all rows and convert it: kind i -> int32, f -> float32, b -> bool; never by wrapping."""
    dtype, expected = {
        "i": (np.int32, "integers"), "f": (np.float32, "floats"), "b": (np.bool_, "booleans"),
    }[kind]  # fmt: skip
    converted = [np.zeros(0, dtype)]
    for row, array in enumerate(map(np.asarray, arrays)):
        wrong_kind = array.dtype.kind not in ("iu" if kind == "i" else kind)
        if array.ndim != 1 or (wrong_kind and array.size):
            raise bare.error(
                row, name, f"expected {expected} of shape [n], got {array.dtype} of shape {list(array.shape)}"
            )
        if kind == "i" and array.size and array.dtype != np.int32:
            low, high = int(array.min()), int(array.max())
            if low < _INT32.min or high > _INT32.max:
                raise bare.error(row, name, f"value {high if high > _INT32.max else low} does not fit int32")
        converted.append(array.astype(dtype, copy=False))
    return Lists(np.concatenate(converted), np.cumsum([len(array) for array in converted]))


def rounded(values: np.ndarray, layout: Layout, name: str) -> np.ndarray:
    """Values of one column in the precision that the layout gives it, as float32."""
    if name == "top_logp" and layout.logp_step is not None:
        return (np.round(values / layout.logp_step) * layout.logp_step).astype(np.float32)  # exact: a power of two
    if layout.logp_dtype == "float16":
        with np.errstate(over="ignore"):  # an overflow becomes inf, which the caller refuses
            values = values.astype(np.float16)
    return values.astype(np.float32, copy=False)


def _rounded(bare: RowBatch, column: Lists, name: str, layout: Layout) -> Lists:
    """Round to the precision on disk and take rounding above 0 back to 0; refuse what is not a log-probability."""
    values = rounded(column.values, layout, name)
    bare.refuse(
        ~np.isfinite(values) | (column.values > POSITIVE_ROUNDING), name,
        lambda index: f"{column.values[index]} is not a finite log-probability <= 0 in {layout.logp_dtype}", column,
    )  # fmt: skip
    return Lists(np.minimum(values, np.float32(0)) + np.float32(0), column.offsets)  # and -0.0 becomes 0.0


def _join_masses(
    bare: RowBatch, rows: Sequence[ViewRow], name: str, shape: tuple[int, ...], layout: Layout
) -> np.ndarray:
    """[all targets, *shape] log masses of all rows, rounded."""
    blocks = [np.zeros((0, *shape), np.float32)]
    for row, view in enumerate(rows):
        values, expected = np.asarray(getattr(view, name)), (len(view.target_position), *shape)
        if values.size == 0 and 0 in expected:
            continue
        if values.size == 0 and name == "log_buckets":
            raise bare.error(row, name, "missing, and the cache cuts tails into buckets")
        if values.shape != expected or values.dtype.kind != "f":
            raise bare.error(
                row, name, f"expected floats of shape {list(expected)}, got {values.dtype} of {list(values.shape)}"
            )
        if np.isnan(values).any() or (values > POSITIVE_ROUNDING).any():
            raise bare.error(row, name, "holds a value that is not a log-probability <= 0")
        blocks.append(np.minimum(rounded(values, layout, name), np.float32(0)) + np.float32(0))  # no -0.0
    return np.concatenate(blocks)


def sum_of_buckets(log_buckets: np.ndarray) -> np.ndarray:
    """log_tail [n, temperatures] of log_buckets [n, temperatures, buckets]; at most 0, which rounding may exceed."""
    total = np.logaddexp.reduce(log_buckets.astype(np.float64), axis=2)
    return np.minimum(total, 0.0).astype(np.float32)
