"""The parts of a manifest: what it says of signal, teacher, student, data, files and totals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .receipts import AuditEntry, FileEntry
from .schema import Codec, LogpDtype, Signal

UNKNOWN = "unknown"
"""A licence or revision nobody declared."""


@dataclass(frozen=True)
class SignalInfo:
    """What was kept of the teacher's answer, and how it is encoded.

    Args:
        codec: "plain": values as columns, no further transformation; "compact": compact.py.
        frequent_ids: the ids of the first ranks, in order; empty unless the codec is compact.
        support: the loss support in words, for example "shared: 148,903 tokens of equal bytes" or "ids < 151646".
        logp_step: nats; log-probabilities of top tokens are multiples of it; None: numbers of `logp_dtype`.
        codec_error: what rounding costs, measured while writing: see `codec_error.summary`; {}: not measured.
        tail_buckets: ids at which the tail is cut into ranges, whose masses are stored one by one.
        alignment: which tokenkit found the chunks; None, and not written: tide did.
    """

    kind: Signal
    codec: Codec
    logp_dtype: LogpDtype
    logp_step: float | None
    top_k: int
    min_probability: float
    temperatures: tuple[float, ...]
    support: str
    codec_error: Mapping[str, Any]
    frequent_ids: tuple[int, ...] = ()
    tail_buckets: tuple[int, ...] = ()
    alignment: str | None = None


@dataclass(frozen=True)
class TeacherInfo:
    """The model that was asked; `spec` holds its TeacherSpec as plain JSON.

    Args:
        dtype: of weights and arithmetic.
        quantization: "nf4" or "fp4": 4-bit weights; None: as stored.
        doubts: what a look at the teacher found before the dump, which went on because its owner said so.
    """

    id: str
    revision: str
    weight_fingerprint: str
    dtype: str
    quantization: str | None
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    licence: str
    spec: Mapping[str, Any]
    doubts: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """dtype and quantization in words."""
        return self.dtype + (f", {self.quantization} 4-bit weights" if self.quantization else "")


@dataclass(frozen=True)
class StudentInfo:
    """The tokenizer the cache is made for; `vocab_size` bounds every id in it, the mask token's included."""

    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    vocab_size: int
    mask_id: int
    eos_id: int


@dataclass(frozen=True)
class DataSource:
    """One data set, pinned."""

    source: str
    revision: str
    licence: str


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """One shard; its number is its place in the list."""

    rows: int
    masked_positions: int


@dataclass(frozen=True)
class AuditInfo:
    """Targets that are stored in full beside the shards (audit.py).

    Args:
        share: of the targets, drawn one by one.
        support_tokens: S, tokens of the loss support: the length of every audited distribution.
        files: those of the shards that have audited targets, in the shards' order.
    """

    share: float
    support_tokens: int
    files: tuple[AuditEntry, ...]


@dataclass(frozen=True)
class Totals:
    """Sums over all shards."""

    shards: int
    bytes: int
    samples: int
    rows: int
    tokens: int
    masked_positions: int


@dataclass(frozen=True)
class PartInfo:
    """A dump that a merged cache was put together from.

    Args:
        manifest_hash, plan_hash: of that dump; samples: that it held.
        views, first_view: in the merged cache, its views of each sample are first_view, ..., first_view + views - 1.
        seed: of its noise.
    """

    manifest_hash: str
    plan_hash: str
    samples: int
    views: int
    first_view: int
    seed: int
