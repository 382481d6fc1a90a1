"""The rows of one pinned source, by number: Arrow data through `datasets`, .jsonl by byte offset, lists in memory.

Nothing is written for local files, and every error names the source and the line or row.
"""

import csv
import json
import mmap
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from .errors import DataError
from .regular_files import require_regular
from .shown_text import some
from .sources import FILE_SUFFIXES, Source, address, loading, source_kind
from .stdlib_source import StdlibPair, stdlib_pairs


class Rows(ABC):
    """The rows of one source, read one at a time."""

    columns: Sequence[str]
    """Of a table; else of the first row, and others may have others."""
    is_table = False

    @property
    def lost_arguments(self) -> Set[str]:
        """Fields in arguments of calls, or in what tools say of them, that were null in rows read so far.

        A table cannot tell that from absent.
        """
        return frozenset()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))

    def place(self, i: int) -> str:
        """Where row i stands, for messages."""
        return f"row {i} (the first is 0)"


class _JsonLines(Rows):
    """Rows of JSON lines, found by byte offset in a memory map or in the unpacked bytes of a file."""

    def __init__(self, data: mmap.mmap | bytes, name: str):
        _require_utf8(data[:4], name)
        self._data, self._name = data, name
        self._starts = array("Q")
        start = 0
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            if data[start:end].strip():
                self._starts.append(start)
            start = end
        self.columns = list(self[0]) if self._starts else []

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        start = self._starts[i]
        end = self._data.find(b"\n", start)
        try:
            line = self._data[start : end if end >= 0 else len(self._data)]
            row = json.loads(line, object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}, {self.place(i)}: {_not_utf8(error)}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self._name}, {self.place(i)}: broken JSON ({str(error)[:200]}); repair or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self._name}, {self.place(i)}: expected a JSON object with named columns, got {row!r:.60}"
            )
        return row

    def place(self, i: int) -> str:
        num_before = self._data[: self._starts[i]].count(b"\n")
        return f"line {num_before + 1}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


class _RowList(Rows):
    """Rows that are in memory already, or in an Arrow table that `datasets` reads."""

    def __init__(self, rows: Any, columns: Sequence[str], *, is_table: bool = True):
        self._rows, self.columns, self.is_table = rows, columns, is_table
        self._lost: set[str] = set()

    @property
    def lost_arguments(self) -> Set[str]:
        return self._lost

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self._without_filling, self._rows) if self.is_table else iter(self._rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._without_filling(self._rows[i]) if self.is_table else self._rows[i]

    def _without_filling(self, value: Any, *, of_call: bool = False) -> Any:
        """A row of a table without the nulls of fields that only other rows have."""
        if isinstance(value, Mapping):
            if of_call:
                self._lost |= {name for name, inner in value.items() if inner is None}
            return {
                name: self._without_filling(inner, of_call=of_call or name in ("arguments", "parameters"))
                for name, inner in value.items() if inner is not None
            }  # fmt: skip
        if isinstance(value, list):
            return [self._without_filling(inner, of_call=of_call) for inner in value]
        return value


class _Chain(Rows):
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows], names: Sequence[str]):
        self._names = names
        self._parts, self._ends = parts, list(accumulate(len(part) for part in parts))
        self.columns = list(dict.fromkeys(name for part in parts for name in part.columns))

    @property
    def lost_arguments(self) -> Set[str]:
        return {name for part in self._parts for name in part.lost_arguments}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return chain.from_iterable(self._parts)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        part, row = self._find(i)
        return part[row]

    def place(self, i: int) -> str:
        part, row = self._find(i)
        return f"{self._names[self._parts.index(part)]}, {part.place(row)}"

    def _find(self, i: int) -> tuple[Rows, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self._ends, i)
        return self._parts[number], i - (self._ends[number - 1] if number else 0)


def open_rows(source: Source, wanted: Collection[str], tell: Callable[[str], object]) -> Rows:
    """The rows of a pinned source.

    Args:
        wanted: columns that somebody may look at; others are not decoded where the file tells columns apart.
        tell: told of files that are not read.
    """
    kind = source_kind(source)
    if kind == "stdlib":
        rows = [pair._asdict() for pair in stdlib_pairs(source.split or "train")]
        return _RowList(rows, list(StdlibPair._fields))
    if kind == "file":
        return _open_file(Path(source.path).expanduser(), wanted)
    import datasets

    files = _local_files(source, tell) if kind == "folder" else []
    if files and all(file.name.endswith(FILE_SUFFIXES) for file in files):
        opened = [(file, _open_file(file, wanted) if file.stat().st_size else None) for file in files]
        full = [(file, rows) for file, rows in opened if rows is not None and len(rows)]
        empty = [file.name for file, rows in opened if rows is None or not len(rows)]
        if not full:
            raise DataError(f"source {source.title}: none of its {len(files)} files holds a row ({some(empty)})")
        if empty:
            share = f"{len(empty)} of its {len(files)} files"
            tell(f"source {source.title}: {share} are empty and passed over: {some(empty)}")
        return full[0][1] if len(full) == 1 else _Chain([rows for _, rows in full], [file.name for file, _ in full])
    with loading(source):
        dataset = datasets.load_dataset(**address(source), name=source.config, split=source.split)
    assert isinstance(dataset, datasets.Dataset)
    present = [name for name in dataset.column_names if name in wanted]
    return _RowList(dataset.select_columns(present), dataset.column_names)


def _local_files(source: Source, tell: Callable[[str], object]) -> list[Path]:
    """The files of a folder that `datasets` finds for this config and split; read one by one, columns may differ."""
    import datasets

    with loading(source):
        builder = datasets.load_dataset_builder(**address(source), name=source.config)
    of_splits = builder.config.data_files or {}
    known = {Path(file).name for files in of_splits.values() for file in files}
    folder = Path(source.path).expanduser()
    others = sorted(f.name for f in folder.iterdir() if f.name.endswith(FILE_SUFFIXES) and f.name not in known)
    if others and source.config in (None, "default"):
        tell(
            f"source {source.title}: {some(others)} beside its other files are not read: one kind of file a "
            "folder is; name them too, joined by +"
        )
    return [Path(file) for file in of_splits.get(source.split or "train", []) if Path(file).is_file()]


def _require_utf8(beginning: bytes, name: str) -> None:
    """Raises: DataError: a text's first four bytes are those of an encoding with several bytes to a letter."""
    encoding = json.detect_encoding(beginning)
    if len(beginning) == 4 and encoding.startswith(("utf-16", "utf-32")):
        kind = encoding[:6].upper()
        raise DataError(
            f"{name}: is {kind} text, and tide reads UTF-8; save it as that, for example: iconv -f {kind} -t UTF-8 "
            "OLD > NEW"
        )


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"


def _open_file(path: Path, wanted: Collection[str]) -> Rows:
    """The rows of a local file, without writing anything."""
    require_regular([path])
    try:
        if path.stat().st_size == 0:
            raise DataError(f"source {path}: the file is empty")
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            names = pyarrow.parquet.read_schema(path).names
            # columns of images or sound may hold anything: only those that are wanted are read
            table = pyarrow.parquet.read_table(path, columns=[name for name in names if name in wanted])
            return _RowList(_ArrowRows(table), names)
        if path.name.endswith((".csv", ".tsv")):
            return _open_csv(path)
        if path.name.endswith(".zst"):
            return _JsonLines(_unpack_zst(path), str(path))
        with path.open("rb") as file:
            _require_utf8(file.read(4), f"source {path}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if path.name.endswith(".json") and data[:4096].lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
            rows = json.loads(data[:], object_pairs_hook=_distinct)
            bad = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
            if bad is not None:
                raise DataError(f"source {path}, row {bad} (the first is 0): expected an object with columns")
            return _RowList(rows, list(rows[0]) if rows else [], is_table=False)
        return _JsonLines(data, str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"source {path}: {_not_utf8(error)}") from error
    except (ValueError, RecursionError, OSError) as error:  # pyarrow's own errors are among these
        raise DataError(f"source {path}: cannot be read ({error}); write or fetch the file again") from error


class _ArrowRows:
    """Rows of an Arrow table as plain Python values."""

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._table.slice(i, 1).to_pylist()[0]


def _open_csv(path: Path) -> Rows:
    """Rows of a table with a header, comma- or tab-separated; an empty cell is an empty text."""
    csv.field_size_limit(1 << 30)
    with path.open("rb") as beginning:
        _require_utf8(beginning.read(4), str(path))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.name.endswith(".tsv") else ",", strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not a table ({error}); quote cells with line breaks"
            ) from error
    names = list(reader.fieldnames or ())
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns of one name in the header ({', '.join(names)}); rename one")
    wide = next((number for number, row in enumerate(rows) if None in row or None in row.values()), None)
    if wide is not None:
        raise DataError(
            f"{path}, row {wide} (the first is 0): another number of cells than the header's "
            f"{len(reader.fieldnames or ())}; quote cells that hold the separator"
        )
    return _RowList(rows, names)


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
