"""What one row of a cache holds: `ViewRow` in memory, `Layout` -> Arrow schema and encodings on disk.

One row per view (sample x noise draw); every list is a flat list of a primitive type, so that `datasets`, DuckDB,
polars and pyarrow read a shard without tide:

    sample_id string, view int32, t float32                       always
    num_tokens, prompt_tokens, num_masked int32                   always
    x_0 list<int32>  [l]; masked list<bool>  [l - prompt_tokens]  always; Parquet packs booleans to a bitmap
    num_chunks int32; chunk_len list<int32> [u]; chunk_logp list<float> [c]                 chunk, topk
    num_targets int32; target_position, num_top list<int32> [n]; log_tail_<T> list<float> [n * buckets]  topk
    top_ids list<int32>, top_logp list<float>                     [sum num_top], flat             topk
    top_ranks, top_steps list<int32>                              in place of these two           topk, codec compact

The `num_*` columns repeat the lengths of the lists: an index of a million rows is then read from kilobytes. On disk
`chunk_len` goes along the masked positions, one value for every chunk and a 0 for every masked token outside chunks:
where chunks start follows from it and `masked`, and the clean token's log-probability at a target is its chunk's.

Encodings, by measurement (docs/cache_format.md): ids and small counts by dictionary (as good as a rank remap by first
appearance), positions by delta, floats by BYTE_STREAM_SPLIT, all under zstd-3. `logp_dtype: float16` rounds values to
float16 and stores them as FLOAT: 8 % more bytes per position than a HALF column, which DuckDB 2.0 cannot read when
split into byte streams. `logp_step` rounds the top tokens' log-probabilities further, to multiples of a power of two:
half the bytes of float16, and still plain numbers to every reader. What is outside the top is stored as its own mass at
each temperature, so that the rounded top and the tail add up to one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..config import MAX_TAIL_BUCKETS
from ..errors import ConfigError

SCHEMA_VERSION = 1
SIGNALS = ("none", "chunk", "topk")
CODECS = ("plain", "compact")
MAX_FREQUENT_IDS = 4096
"""Ids with a rank of their own (compact.py): a few kilobytes of the manifest, and nearly all of what ranks save."""
MAX_RANKED_VOCABULARY = 1 << 22
"""Ids of a vocabulary whose ranks are stored: readers hold a table of all of them, whatever a stranger claims."""

ROW_GROUP_BYTES = 4 << 20
"""Uncompressed bytes at which a row group ends: random access decodes whole groups, so they are kept well below
the 32 MiB that the Hub's viewer likes; measured price: 1.5 % of the bytes."""
MAX_ROW_GROUP_BYTES = 32 << 20
"""Uncompressed bytes a group may have in a cache that is read, unless it is a single row."""
MAX_ROW_BYTES = 1 << 30
MAX_SAMPLE_ID = 256
"""Characters of a sample id."""

Signal = Literal["none", "chunk", "topk"]
LogpDtype = Literal["float32", "float16"]
Codec = Literal["plain", "compact"]
Encoding = Literal["scalar", "id", "count", "position", "flag", "float", "small"]


def _no_ints() -> np.ndarray:
    return np.zeros(0, np.int32)


def _no_floats() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class ViewRow:
    """One view: a sample under one noise draw, and what the teacher said about it. l tokens, c chunks, n targets.

    Rows that come from a cache hold read-only slices of a decoded row group: copy them (`torch.tensor(row.x_0)`)
    before changing anything. Log-probabilities are nats <= 0 at temperature 1.

    Args:
        sample_id: stable id of the conversation; view: index of the noise draw; t: diffusion time in (0, 1].
        x_0: int32 [l], clean student ids, EOS padding included; prompt_tokens: leading positions never masked.
        masked: bool [l - prompt_tokens], the response's masked positions.
        chunk_start, chunk_len: int32 [c], active chunks as absolute student positions, ascending, disjoint.
        chunk_logp: float32 [c], the teacher's log-probability of each chunk.
        target_position: int32 [n], absolute masked positions with a token-level target, ascending; each of them is a
            chunk of one token.
        num_top: int32 [n]; top_ids: int32, top_logp: float32 [sum num_top], flat, each target's most probable first.
        log_tail: float32 [n, m], log mass of the loss support outside the kept entries, one column per temperature, as
            a share of the support's mass at that temperature; -inf where nothing is outside.
        log_buckets: float32 [n, m, buckets], the same for each range of ids that the tail is cut into, where it is.
    """

    sample_id: str
    view: int
    t: float
    x_0: np.ndarray
    prompt_tokens: int
    masked: np.ndarray
    chunk_start: np.ndarray = field(default_factory=_no_ints)
    chunk_len: np.ndarray = field(default_factory=_no_ints)
    chunk_logp: np.ndarray = field(default_factory=_no_floats)
    target_position: np.ndarray = field(default_factory=_no_ints)
    num_top: np.ndarray = field(default_factory=_no_ints)
    top_ids: np.ndarray = field(default_factory=_no_ints)
    top_logp: np.ndarray = field(default_factory=_no_floats)
    log_tail: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    log_buckets: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))

    @property
    def is_masked(self) -> np.ndarray:
        """bool [l], `masked` with the prompt's tokens in front of it."""
        return np.concatenate([np.zeros(self.prompt_tokens, bool), self.masked])

    @property
    def gold_logp(self) -> np.ndarray:
        """float32 [n], the teacher's log-probability of the clean token at each target: that of its chunk."""
        return self.chunk_logp[np.searchsorted(self.chunk_start, self.target_position)]


@dataclass(frozen=True)
class Column:
    """A column on disk. `scalar` columns hold one value per row, all others a flat list."""

    name: str
    type: pa.DataType
    encoding: Encoding

    @property
    def leaf(self) -> str:
        """Dotted path of the Parquet leaf."""
        return self.name if self.encoding == "scalar" else f"{self.name}.list.element"


@dataclass(frozen=True)
class Layout:
    """What decides the columns of a cache and the range of their values.

    Args:
        signal: "none" (clean samples only), "chunk" or "topk".
        vocab_size: student ids are below this; block_size: lengths are multiples of it.
        top_k: upper bound of num_top; temperatures: one log_tail column each (both unused unless signal is "topk").
        logp_dtype: precision that log-probabilities are rounded to before they are stored as float32.
        logp_step: nats; top_logp is rounded to multiples of it instead; None: to `logp_dtype`.
        codec: "plain": ids and log-probabilities as they are; "compact": as ranks and steps (compact.py).
        frequent_ids: those that have the first ranks, most frequent first; empty unless `codec` is "compact".
        tail_buckets: ids at which the tail is cut into ranges, whose masses are stored; (): it is one mass.
    """

    signal: Signal
    vocab_size: int
    block_size: int
    top_k: int
    temperatures: tuple[float, ...]
    logp_dtype: LogpDtype
    logp_step: float | None = None
    codec: Codec = "plain"
    frequent_ids: tuple[int, ...] = ()
    tail_buckets: tuple[int, ...] = ()

    @classmethod
    def of(cls, options: object, **others: Any) -> "Layout":
        """The layout of a cache: what `options` (a SignalConfig, a SignalInfo) say of it, and the other fields."""
        named = {f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)}
        return cls(**{**named, **others})

    def __post_init__(self) -> None:
        for wrong in self._contradictions():
            raise ConfigError(wrong)

    def _contradictions(self) -> Iterator[str]:
        vocab_size, cuts, ids, temperatures = self.vocab_size, self.tail_buckets, self.frequent_ids, self.temperatures
        if self.signal not in SIGNALS:
            yield f"signal kind {self.signal!r}: expected one of {', '.join(SIGNALS)}"
        if self.logp_dtype not in ("float32", "float16"):
            yield f"logp_dtype {self.logp_dtype!r}: expected float32 or float16"
        if not 0 < vocab_size < 2**31 or self.block_size < 1:
            yield f"vocab_size {vocab_size}, block_size {self.block_size}: expected positive numbers"
        if self.logp_step is not None and not (0 < self.logp_step <= 1 and math.frexp(self.logp_step)[0] == 0.5):
            yield f"logp_step {self.logp_step!r}: expected a power of two up to 1, or none"
        if self.codec not in CODECS:
            yield f"codec {self.codec!r:.40}: expected one of {', '.join(CODECS)}"
        if self.is_compact and self.logp_step is None:
            yield "codec compact counts log-probabilities in steps: set logp_step, to 1/16 for example"
        if self.is_compact and vocab_size > MAX_RANKED_VOCABULARY:
            yield f"codec compact with a vocabulary of {vocab_size:,}: expected at most {MAX_RANKED_VOCABULARY:,} ids"
        if ids and (self.codec == "plain" or len(ids) > MAX_FREQUENT_IDS or len(set(ids)) < len(ids)):
            yield f"{len(ids)} frequent_ids: expected at most {MAX_FREQUENT_IDS} distinct ones, none if plain"
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            yield f"frequent_ids: {min(ids)} to {max(ids)}, expected ids below {vocab_size}"
        if cuts and (
            self.signal != "topk" or sorted(set(cuts)) != list(cuts) or len(cuts) >= MAX_TAIL_BUCKETS
            or not 0 < cuts[0] <= cuts[-1] < vocab_size
        ):  # fmt: skip
            yield (
                f"tail_buckets {cuts!s:.80}: expected fewer than {MAX_TAIL_BUCKETS} ascending ids between 0 and "
                f"{vocab_size}, and none without signal topk"
            )
        ascending = sorted(set(temperatures)) == list(temperatures)
        if self.signal == "topk" and (
            self.top_k < 1 or not temperatures or not ascending or not 0 < temperatures[0] < float("inf")
        ):
            yield (
                f"signal topk with top_k = {self.top_k}, temperatures = {temperatures}: expected top_k >= 1 and at "
                "least one temperature > 0, distinct and ascending"
            )

    @property
    def is_compact(self) -> bool:
        """Are `top_ids` and `top_logp` stored as `top_ranks` and `top_steps`?"""
        return self.codec == "compact" and self.signal == "topk"

    @property
    def log_tail_names(self) -> tuple[str, ...]:
        """Names of the log_tail columns, in the order of `temperatures`."""
        return tuple(f"log_tail_{float(t)!r}" for t in self.temperatures) if self.signal == "topk" else ()

    @property
    def num_buckets(self) -> int:
        """Values of each log_tail column for a target."""
        return len(self.tail_buckets) + 1

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns on disk, in order."""
        return tuple(_columns(self))

    @property
    def mass_tolerance(self) -> float:
        """How far above 1 the head mass may be: half a step, or the entropy x 2^-11 for float16, sums for float32."""
        rounding = 2e-2 if self.logp_dtype == "float16" else 1e-4
        return rounding if self.logp_step is None else max(rounding, 0.55 * self.logp_step)


def _columns(layout: Layout) -> Iterator[Column]:
    int32, float32 = pa.int32(), pa.float32()
    yield Column("sample_id", pa.string(), "scalar")
    yield Column("view", int32, "scalar")
    yield Column("t", float32, "scalar")
    counts = ["num_tokens", "prompt_tokens", "num_masked"]
    if layout.signal != "none":
        counts.append("num_chunks")
    if layout.signal == "topk":
        counts.append("num_targets")
    for name in counts:
        yield Column(name, int32, "scalar")
    yield Column("x_0", int32, "id")
    yield Column("masked", pa.bool_(), "flag")
    if layout.signal != "none":
        yield Column("chunk_len", int32, "count")
        yield Column("chunk_logp", float32, "float")
    if layout.signal == "topk":
        yield Column("target_position", int32, "position")
        yield Column("num_top", int32, "count")
        if layout.is_compact:
            yield Column("top_ranks", int32, "small")
            yield Column("top_steps", int32, "small")
        else:
            yield Column("top_ids", int32, "id")
            yield Column("top_logp", float32, "float")
        for name in layout.log_tail_names:
            yield Column(name, float32, "float")


def arrow_schema(layout: Layout) -> pa.Schema:
    """The Arrow schema of a shard; no column and no element is nullable."""
    fields = []
    for column in layout.columns:
        kind = column.type
        if column.encoding != "scalar":
            kind = pa.list_(pa.field("element", kind, nullable=False))
        fields.append(pa.field(column.name, kind, nullable=False))
    return pa.schema(fields)


def shard_metadata(plan_hash: str, shard: int) -> dict[str, str]:
    """Key-value metadata of a shard's footer."""
    return {"tide.schema_version": str(SCHEMA_VERSION), "tide.plan_hash": plan_hash, "tide.shard": str(shard)}


def parquet_options(layout: Layout) -> dict[str, object]:
    """Arguments of pq.ParquetWriter: encodings, compression, checksums, page index."""
    dictionary, encodings = [], {}
    for column in layout.columns:
        if column.encoding in ("id", "count") or column.type == pa.string():
            dictionary.append(column.leaf)
        elif column.encoding in ("float", "small"):
            encodings[column.leaf] = "BYTE_STREAM_SPLIT"
        elif column.encoding == "position":
            encodings[column.leaf] = "DELTA_BINARY_PACKED"
        else:
            encodings[column.leaf] = "PLAIN"
    return {
        "version": "2.6",
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": dictionary,
        "column_encoding": encodings,
        "write_page_checksum": True,
        "write_page_index": True,
        "store_schema": False,
    }


def shard_name(shard: int, num_shards: int) -> str:
    """Path of a shard below the cache folder."""
    return f"data/views-{shard:05d}-of-{num_shards:05d}.parquet"
