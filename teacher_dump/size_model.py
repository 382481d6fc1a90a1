"""Some rows encoded as shards -> a model of how many bytes any number of rows takes, by column.

A column takes about  price x row groups + rate x content;  content is what a plan knows exactly: rows, tokens, or the
expected number of masked positions. The price is that of a dictionary begun anew and of page headers: rows encoded in
twice as many groups show it, so that pieces may be shorter than the shards they stand for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..shared.cache import Layout, ViewRow
from ..shared.cache.batch import row_bytes
from ..shared.cache.schema import ROW_GROUP_BYTES, Column
from ..shared.cache.writer import EncodedSize, encoded_size

FOOTERS = "footers"
"""Name of what is no column: footers and page indexes."""
CERTAINTY = 0.03
"""An estimate's range is at least so wide to either side, as a share: scaling up has an error of its own."""


@dataclass(frozen=True)
class Content:
    """What the size of a column follows, over all rows."""

    rows: float
    tokens: float
    expected_masked: float
    """Of every row, t times the positions that may be masked: the plan knows its sum before any draw."""

    def of(self, column: Column) -> float:
        """The measure that a column grows with."""
        if column.encoding == "scalar":
            return self.rows
        return self.tokens if column.name == "x_0" else self.expected_masked


@dataclass(frozen=True)
class Piece:
    """A file of consecutive samples.

    Args:
        whole: as a shard would be written; split: the same rows in shorter row groups.
        raw_bytes: uncompressed, as row groups count them.
    """

    num_samples: int
    content: Content
    whole: EncodedSize
    split: EncodedSize
    raw_bytes: int = 0


@dataclass(frozen=True)
class Model:
    """Bytes of a file: (price x groups + rate x content) summed over the columns, and the footer's own two terms."""

    columns: tuple[Column, ...]
    prices: Mapping[str, float]
    rates: Mapping[str, float]
    group_footer: float
    file_footer: float

    def by_column(self, content: Content, files: float, groups: float) -> dict[str, float]:
        """Bytes of so much content in so many files and row groups."""
        sizes = {c.name: self.prices[c.name] * groups + self.rates[c.name] * content.of(c) for c in self.columns}
        return {**sizes, FOOTERS: self.file_footer * files + self.group_footer * groups}


def encoded_piece(rows: Sequence[ViewRow], num_samples: int, layout: Layout) -> Piece:
    """Rows of consecutive samples, all their views, as one file."""
    raw_bytes = sum(map(row_bytes, rows))
    split = encoded_size(rows, layout, group_bytes=math.ceil(min(raw_bytes, ROW_GROUP_BYTES) / 2))
    content = Content(
        rows=len(rows), tokens=sum(len(row.x_0) for row in rows), expected_masked=sum(r.t * len(r.masked) for r in rows)
    )
    return Piece(num_samples, content, encoded_size(rows, layout), split, raw_bytes)


def fit(pieces: Sequence[Piece], columns: tuple[Column, ...]) -> Model:
    """The model that gives the pieces' bytes, column by column, in sum."""
    groups, more = (sum(size.groups for size in sizes) for sizes in _both(pieces))

    def price(whole: int, split: int) -> float:
        return max(0.0, (split - whole) / (more - groups)) if more > groups else 0.0

    prices, rates = {}, {}
    for column in columns:
        whole, split = (sum(s.column_bytes[column.name] for s in sizes) for sizes in _both(pieces))
        prices[column.name] = price(whole, split)
        content = sum(piece.content.of(column) for piece in pieces)
        rates[column.name] = max(0.0, whole - prices[column.name] * groups) / max(content, 1e-9)
    footers = [sum(size.bytes - sum(size.column_bytes.values()) for size in sizes) for sizes in _both(pieces)]
    group_footer = price(*footers)
    return Model(columns, prices, rates, group_footer, (footers[0] - group_footer * groups) / len(pieces))


def _both(pieces: Sequence[Piece]) -> Iterator[list[EncodedSize]]:
    yield [piece.whole for piece in pieces]
    yield [piece.split for piece in pieces]


def standard_error(off: Sequence[float], total: float) -> float:
    """Of the sum of all pieces' bytes, as a share of it; a single piece tells nothing of its own error.

    Args: off: bytes of every piece that the estimate does not explain.
    """
    if len(off) < 2:
        return CERTAINTY
    return math.sqrt(len(off) / (len(off) - 1) * sum(one**2 for one in off)) / total


def sizes_of(size: EncodedSize) -> dict[str, int]:
    """Bytes by column, and of the footer: all of the file."""
    return {**size.column_bytes, FOOTERS: size.bytes - sum(size.column_bytes.values())}


def total_of(sizes: Sequence[Mapping[str, int]], name: str) -> int:
    """Of one column over several files."""
    return sum(of_piece[name] for of_piece in sizes)
