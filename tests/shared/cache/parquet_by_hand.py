"""Parquet structures put together by hand, for files that no writer would make: Thrift's compact protocol in 30 lines.

A struct is a dict of field id -> value; a value is an int (i32), `Long`, bool, bytes, a dict (struct) or a list of one
of them. https://parquet.apache.org/docs/file-format/ has the field ids.
"""

import struct
from pathlib import Path

import pyarrow.parquet as pq
import zstandard

PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3


class Long(int):
    """An i64."""


def varint(number: int) -> bytes:
    """Seven bits a byte, least significant first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _zigzag(number: int) -> bytes:
    return varint(number << 1 ^ number >> 63)


def _code(value: object) -> int:
    kinds = {bool: 1, int: 5, Long: 6, bytes: 8, list: 9, dict: 12}
    return 2 if value is False else kinds[type(value)]


def thrift(value: object) -> bytes:
    """The compact encoding of a value."""
    if isinstance(value, bool):
        return b""
    if isinstance(value, int):
        return _zigzag(value)
    if isinstance(value, bytes):
        return varint(len(value)) + value
    if isinstance(value, list):
        kind = _code(value[0]) if value else 12
        head = bytes([len(value) << 4 | kind]) if len(value) < 15 else bytes([0xF0 | kind]) + varint(len(value))
        return head + b"".join(map(thrift, value))
    assert isinstance(value, dict)
    out, last = b"", 0
    for number, item in sorted(value.items()):
        out += bytes([(number - last) << 4 | _code(item)]) if number - last < 16 else (
            bytes([_code(item)]) + _zigzag(number)
        )  # fmt: skip
        out, last = out + thrift(item), number
    return out + b"\0"


def run(count: int, value: int) -> bytes:
    """An RLE run of levels or indices of up to eight bits."""
    return varint(count << 1) + bytes([value])


def levels(*runs: bytes) -> bytes:
    """Repetition or definition levels of a version 1 page."""
    body = b"".join(runs)
    return struct.pack("<I", len(body)) + body


def page(kind: int, header: dict[int, object], body: bytes, *, size: int | None = None, level: int = 3) -> bytes:
    """A page with its header, without a checksum.

    Args: header: of the page's own kind; body: before zstd; size: what the header says of it uncompressed.
    """
    packed = zstandard.ZstdCompressor(level=level, write_content_size=False).compress(body)
    field = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}[kind]
    return thrift({1: kind, 2: len(body) if size is None else size, 3: len(packed), field: header}) + packed


def dictionary_page(count: int, values: bytes, **more: int) -> bytes:
    """A dictionary page of `count` values."""
    return page(DICTIONARY_PAGE, {1: count, 2: PLAIN}, values, **more)


def data_page(count: int, body: bytes, encoding: int = RLE_DICTIONARY, **more: int) -> bytes:
    """A version 1 data page."""
    return page(DATA_PAGE, {1: count, 2: encoding, 3: RLE, 4: RLE}, body, **more)


def chunk(file: Path, leaf: str) -> pq.ColumnChunkMetaData:
    """What the footer says of a column of row group 0."""
    info = pq.ParquetFile(file).metadata.row_group(0)
    return next(info.column(i) for i in range(info.num_columns) if info.column(i).path_in_schema == leaf)


def replace_chunk(file: Path, leaf: str, pages: bytes) -> None:
    """Overwrite the pages of a column of row group 0, and leave the footer as it is."""
    column = chunk(file, leaf)
    start = column.dictionary_page_offset or column.data_page_offset
    assert len(pages) <= column.total_compressed_size, (len(pages), column.total_compressed_size)
    data = bytearray(file.read_bytes())
    data[start : start + column.total_compressed_size] = pages.ljust(column.total_compressed_size, b"\0")
    file.write_bytes(data)
