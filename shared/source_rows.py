"""The rows of one pinned source, by number: Arrow data through `datasets`, .jsonl by byte offset, lists in memory.

Nothing is written for local files, and every error names the source and the line or row.
"""

import json
import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import DataError
from .sources import Source, address, loading, source_kind
from .stdlib_source import StdlibPair, stdlib_pairs


class Rows(Protocol):
    """The rows of one source, read one at a time."""

    columns: Sequence[str]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...
    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...
    def place(self, i: int, /) -> str:
        """Where row i stands, for messages."""
        ...


class _JsonLines:
    """Rows of JSON lines, found by byte offset in a memory map or in the unpacked bytes of a file."""

    def __init__(self, data: mmap.mmap | bytes, name: str):
        self._data, self._name = data, name
        self._starts = array("Q")
        start = 0
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            if data[start:end].strip():
                self._starts.append(start)
            start = end
        self.columns: Sequence[str] = list(self[0]) if self._starts else []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        start = self._starts[i]
        end = self._data.find(b"\n", start)
        try:
            row = json.loads(self._data[start : end if end >= 0 else len(self._data)])
        except ValueError as error:
            raise DataError(
                f"{self._name}, {self.place(i)}: broken JSON ({error}); repair or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self._name}, {self.place(i)}: expected a JSON object with named columns, got {row!r:.60}"
            )
        return row

    def place(self, i: int) -> str:
        num_before = self._data[: self._starts[i]].count(b"\n")
        return f"line {num_before + 1}"


class _RowList:
    """Rows that are in memory already, or in an Arrow table that `datasets` reads."""

    def __init__(self, rows: Any, columns: Sequence[str]):
        self._rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._rows[i]

    def place(self, i: int) -> str:
        return f"row {i} (the first is 0)"


def open_rows(source: Source) -> Rows:
    """The rows of a pinned source."""
    kind = source_kind(source)
    if kind == "stdlib":
        rows = [pair._asdict() for pair in stdlib_pairs(source.split or "train")]
        return _RowList(rows, list(StdlibPair._fields))
    if kind == "file":
        return _open_file(Path(source.path).expanduser(), source)
    import datasets

    with loading(source):
        dataset = datasets.load_dataset(**address(source), name=source.config, split=source.split)
    assert isinstance(dataset, datasets.Dataset)
    return _RowList(dataset, dataset.column_names)


def _open_file(path: Path, source: Source) -> Rows:
    """The rows of a local file, without writing anything."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"source {source.path}: the file is empty")
        if path.name.endswith(".parquet"):
            return _open_parquet(path)
        if path.name.endswith(".zst"):
            return _JsonLines(_unpack_zst(path), str(path))
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if path.name.endswith(".json") and data[:4096].lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
            rows = json.loads(data[:])
            bad = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
            if bad is not None:
                raise DataError(f"source {source.path}, row {bad} (the first is 0): expected an object with columns")
            return _RowList(rows, list(rows[0]) if rows else [])
        return _JsonLines(data, str(path))
    except (ValueError, OSError) as error:  # pyarrow's own errors are among these
        raise DataError(f"source {source.path}: cannot be read ({error}); write or fetch the file again") from error


def _open_parquet(path: Path) -> Rows:
    import datasets
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    dataset = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    return _RowList(dataset, dataset.column_names)


def _unpack_zst(path: Path) -> bytes:
    """The content of a .zst file of any number of frames; a cut-off frame is an error."""
    import zstandard

    unpacked = bytearray()
    frame = None
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    unpacked += frame.decompress(piece)
                except zstandard.ZstdError as error:
                    raise DataError(f"source {path}: not sound zstd data ({error}); fetch the file again") from error
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise DataError(f"source {path}: the zstd data is cut off; fetch the file again")
    return bytes(unpacked)
