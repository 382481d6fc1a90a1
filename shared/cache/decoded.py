"""A cache -> plain rows with probabilities in them, for trainers that know nothing of tide.

One row per view, decoded a row group at a time; l tokens, c chunks, n targets, k_j kept entries of target j:

    sample_id, text             string        text is the decoded x_0; absent without a vocabulary
    view, prompt_tokens         int32
    t, temperature              float         temperature: of every probability in this row; absent without targets
    x_0, x_t                    list [l]      clean ids, and the same with the mask's id at masked positions
    masked                      list [l]      is the position masked? prompt included
    chunk_start, chunk_len, chunk_logp        list [c], nats at temperature 1                         chunk, topk
    target_position, gold_probability, tail_mass                 list [n]                             topk
    top_ids, top_probabilities, top_text      list [n] of lists [k_j], most probable first            topk
    tail_bucket_masses                        list [n] of lists [B], by range of ids    topk, with tail buckets

Probabilities are over the loss support at `temperature`: those of a target and its tail_mass add up to 1.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..addresses import require_apart
from ..errors import ConfigError
from .codec_error import log_z
from .files import atomic_write, fsync_folder, output_errors, temporary_name
from .schema import ViewRow

if TYPE_CHECKING:
    import datasets

    from .reader import Cache


def write_decoded(cache: "Cache", out: str | Path, *, temperature: float | None = None) -> list[Path]:
    """Write decoded rows as Parquet, one file for each shard, with a README.md; memory stays flat.

    Args: temperature: one of the cache's; None: its first.
    Returns: the files, `out/data/train-00000-of-00002.parquet` and so on.
    Raises:
        ConfigError: `out` exists or lies in a cache, or the cache does not hold this temperature. CacheError.
        OutputError.
    """
    out, rows = Path(out), _Decoder(cache, temperature)
    if out.exists():
        raise ConfigError(f"{out}: exists already; give a new folder")
    require_apart(out, {"the cache": cache.root})
    temporary, num_shards = temporary_name(out), len(cache.manifest.shards)
    names = [f"data/train-{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]
    try:
        atomic_write(temporary / "README.md", _readme(cache, rows.temperature).encode())
        for shard, name in enumerate(names):
            with output_errors(out / name):
                (temporary / name).parent.mkdir(exist_ok=True)
                writer = pq.ParquetWriter(temporary / name, rows.schema, compression="zstd")
            with writer:
                for group in cache.row_groups:
                    if group.shard == shard:
                        table = rows.table(list(cache.read_row_group(group.shard, group.group)))
                        with output_errors(out / name):
                            writer.write_table(table)
        with output_errors(out):
            temporary.rename(out)
            fsync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / name for name in names]


def decoded_dataset(cache: "Cache", *, temperature: float | None = None) -> "datasets.Dataset":
    """Decoded rows as a `datasets.Dataset`, kept in the cache folder of `datasets` under this manifest's hash.

    Raises: ConfigError: the cache does not hold this temperature.
    """
    import datasets

    rows = _Decoder(cache, temperature)
    made = datasets.Dataset.from_generator(
        _rows, features=datasets.Features.from_arrow_schema(rows.schema),
        gen_kwargs={"cache": cache, "temperature": temperature, "manifest_hash": cache.manifest.hash},
    )  # fmt: skip
    assert isinstance(made, datasets.Dataset)
    return made


def _rows(cache: "Cache", temperature: float | None, manifest_hash: str) -> Iterator[dict[str, Any]]:
    """Rows one by one; `manifest_hash` only tells `datasets` that another cache in the same folder is another."""
    decoder = _Decoder(cache, temperature)
    for group in cache.row_groups:
        yield from decoder.table(list(cache.read_row_group(group.shard, group.group))).to_pylist()


class _Decoder:
    """`ViewRow`s of one cache -> Arrow tables."""

    def __init__(self, cache: "Cache", temperature: float | None) -> None:
        manifest, layout = cache.manifest, cache.layout
        self.signal, self.mask_id = layout.signal, manifest.student.mask_id
        self.num_buckets = layout.num_buckets if layout.tail_buckets else 0
        self.temperature: float | None = None
        if self.signal == "topk":
            self.temperature = layout.temperatures[0] if temperature is None else temperature
            if self.temperature not in layout.temperatures:
                known = ", ".join(f"{known:g}" for known in layout.temperatures)
                raise ConfigError(
                    f"temperature {self.temperature:g}: {cache.root} holds normalisers for {known} alone; "
                    "choose one of them, or dump again with signal.temperatures"
                )
            self.column = layout.temperatures.index(self.temperature)
        elif temperature is not None:
            raise ConfigError(
                f"temperature {temperature:g}: {cache.root} holds no distributions (signal "
                f"{self.signal!r}); leave it out"
            )
        known = cache.vocabulary().token_bytes if manifest.vocabulary else None
        self.has_text = known is not None
        self.token_bytes = (
            [] if known is None else [*known, *[b"<%d>" % i for i in range(len(known), layout.vocab_size)]]
        )
        self.words = pa.array([token.decode("utf-8", "replace") for token in self.token_bytes], pa.string())
        self.schema = self.table([]).schema

    def table(self, rows: Sequence[ViewRow]) -> pa.Table:
        """One row for each view."""
        masked = [np.concatenate([np.zeros(row.prompt_tokens, np.bool_), row.masked]) for row in rows]
        x_t = [np.where(hidden, np.int32(self.mask_id), row.x_0) for row, hidden in zip(rows, masked, strict=True)]
        columns = {
            "sample_id": pa.array([row.sample_id for row in rows], pa.string()),
            "view": pa.array([row.view for row in rows], pa.int32()),
            "prompt_tokens": pa.array([row.prompt_tokens for row in rows], pa.int32()),
            "t": pa.array([row.t for row in rows], pa.float32()),
            "x_0": _lists([row.x_0 for row in rows], np.int32), "x_t": _lists(x_t, np.int32),
            "masked": _lists(masked, np.bool_),
        }  # fmt: skip
        if self.has_text:
            texts = [b"".join(self.token_bytes[i] for i in row.x_0).decode("utf-8", "replace") for row in rows]
            columns["text"] = pa.array(texts, pa.string())
        if self.signal != "none":
            columns["chunk_start"] = _lists([row.chunk_start for row in rows], np.int32)
            columns["chunk_len"] = _lists([row.chunk_len for row in rows], np.int32)
            columns["chunk_logp"] = _lists([row.chunk_logp for row in rows], np.float32)
        if self.signal == "topk":
            columns |= self._targets(rows)
        return pa.table(columns)

    def _targets(self, rows: Sequence[ViewRow]) -> dict[str, pa.Array]:
        assert self.temperature is not None
        position = _lists([row.target_position for row in rows], np.int32)
        num_top = _flat([row.num_top for row in rows], np.int64)
        log_tail = _flat([row.log_tail[:, self.column] for row in rows], np.float64)
        logp = _flat([row.top_logp for row in rows], np.float64)
        gold = _flat([row.gold_logp for row in rows], np.float64)
        normaliser = log_z(logp, num_top, log_tail, self.temperature)
        kept = np.exp(logp / self.temperature - np.repeat(normaliser, num_top))
        ends = np.concatenate([[0], np.cumsum(num_top)])
        ids = pa.array(_flat([row.top_ids for row in rows], np.int32))

        def by_row(values: np.ndarray) -> pa.Array:
            return pa.ListArray.from_arrays(position.offsets, pa.array(values.astype(np.float32)))

        def by_target(values: pa.Array, ends: np.ndarray = ends) -> pa.Array:
            inner = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
            return pa.ListArray.from_arrays(position.offsets, inner)

        columns = {
            "temperature": pa.array([self.temperature] * len(rows), pa.float64()),
            "target_position": position,
            "gold_probability": by_row(np.exp(gold / self.temperature - normaliser)),
            "tail_mass": by_row(np.exp(log_tail)),
        }
        if self.num_buckets:
            masses = np.exp(_flat([row.log_buckets[:, self.column].ravel() for row in rows], np.float32))
            cuts = np.arange(0, masses.size + 1, self.num_buckets)
            columns["tail_bucket_masses"] = by_target(pa.array(masses), cuts)
        columns |= {"top_ids": by_target(ids), "top_probabilities": by_target(pa.array(kept.astype(np.float32)))}
        return columns | ({"top_text": by_target(self.words.take(ids))} if self.has_text else {})


def _flat(values: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *values]).astype(dtype)


def _lists(values: Sequence[np.ndarray], dtype: type) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_flat(values, dtype)))


def _readme(cache: "Cache", temperature: float | None) -> str:
    at = "" if temperature is None else f" Probabilities are over the loss support at temperature {temperature:g}."
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n\n# A teacher's answers, decoded\n\n"
        f"One row per view of the tide cache with manifest hash `{cache.manifest.hash}`.{at}\n"
        f"Masked positions of `x_t` hold id {cache.manifest.student.mask_id}; ids are below "
        f"{cache.manifest.student.vocab_size}. The columns are described in docs/cache_format.md of tide-distill.\n"
    )
