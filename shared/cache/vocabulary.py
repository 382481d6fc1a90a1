"""vocabulary.parquet: what every student id means, in bytes, so that a stranger can decode a cache without tide.

student_id int32     0, 1, 2, ... in order
teacher_id int32     the teacher's id of the same bytes; null where there is none
token_bytes binary   of the student's token (a special token's name for special tokens)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CacheError
from .files import atomic_write, pinned_parquet

VOCABULARY_NAME = "vocabulary.parquet"
MAX_TOKENS = 1 << 21
MAX_TOKEN_BYTES = 1 << 26
_SCHEMA = pa.schema(
    [
        pa.field("student_id", pa.int32(), nullable=False),
        pa.field("teacher_id", pa.int32()),
        pa.field("token_bytes", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`token_bytes[i]` are the bytes of student id i; `teacher_id` [v] int32 is -1 where no teacher token has them."""

    token_bytes: list[bytes]
    teacher_id: np.ndarray

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of student ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")


def write_vocabulary(root: str | Path, token_bytes: Sequence[bytes], teacher_id: np.ndarray | None = None) -> None:
    """Write `root / vocabulary.parquet` atomically.

    Args:
        token_bytes: by student id; teacher_id: [v], -1 for none; None: there is no teacher.
    Raises: CacheError: lengths differ; OutputError: it cannot be written.
    """
    path = Path(root) / VOCABULARY_NAME
    teacher = np.full(len(token_bytes), -1, np.int32) if teacher_id is None else np.asarray(teacher_id)
    if teacher.shape != (len(token_bytes),) or (teacher.size and not -1 <= teacher.min() <= teacher.max() < 2**31):
        raise CacheError(f"{path}, teacher_id: expected one id >= -1 for each of {len(token_bytes)} student tokens")
    table = pa.Table.from_arrays(
        [
            pa.array(np.arange(len(token_bytes), dtype=np.int32)),
            pa.array(teacher.astype(np.int32), mask=teacher < 0),
            pa.array(list(token_bytes), pa.binary()),
        ],
        schema=_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", compression_level=3, use_dictionary=False, write_page_checksum=True,
        write_statistics=False, store_schema=False,
    )  # fmt: skip
    atomic_write(path, sink.getvalue().to_pybytes())


def read_vocabulary(root: str | Path, sha256: str | None = None) -> Vocabulary:
    """Inverse of `write_vocabulary`.

    Args: sha256: what the file must be; None: it was compared before.
    Raises: CacheError: the file is missing, damaged, of other columns, or its ids are not 0, 1, 2, ...
    """
    path = Path(root) / VOCABULARY_NAME
    with pinned_parquet(path, sha256) as file:
        info = file.metadata
        if file.schema_arrow.remove_metadata() != _SCHEMA:
            raise CacheError(f"{path}: columns are {file.schema_arrow}; expected {_SCHEMA}")
        size = sum(info.row_group(i).total_byte_size for i in range(info.num_row_groups))
        if info.num_rows > MAX_TOKENS or size > MAX_TOKEN_BYTES:
            raise CacheError(f"{path}: {info.num_rows:,} tokens in {size:,} bytes are more than a vocabulary; refused")
        table = file.read(use_threads=False)
        table.validate(full=True)
    ids = table["student_id"].to_numpy()
    if not np.array_equal(ids, np.arange(len(ids))):
        raise CacheError(f"{path}, student_id: expected 0 to {len(ids) - 1} in order")
    teacher = table["teacher_id"].fill_null(-1).to_numpy().astype(np.int32)
    return Vocabulary(table["token_bytes"].to_pylist(), teacher)
