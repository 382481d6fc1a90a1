"""A cache on disk -> views: `open_cache`, then iterate, read row groups, or fetch rows in any order.

A row group is decoded column by column into flat numpy arrays and sliced per row. Page checksums and the lengths of
all lists are checked on every read; hashes and meaning by `Cache.verify`.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.compute as pc

from ..addresses import is_url, local_path
from ..config import ShardCacheConfig
from ..errors import CacheError, CacheMismatch, ConfigError
from .batch import RowBatch
from .files import Pinned, file_inside, reading
from .manifest import MANIFEST_NAME, Manifest, read_manifest
from .schema import ViewRow
from .table import read_group
from .trust import is_private
from .verify import VerifyReport, verify_cache
from .vocabulary import VOCABULARY_NAME, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import datasets

    from .hub import HubAddress

OPEN_SHARDS = 32


@dataclass(frozen=True)
class RowGroup:
    """A row group: shard number, group number in the shard, rows."""

    shard: int
    group: int
    num_rows: int


@dataclass(frozen=True, eq=False)
class CacheIndex:
    """One entry per row of the cache, in file order, without reading any list: int64 [rows] unless noted.

    `row` counts within its row group; `sample` numbers the samples 0, 1, ... in file order; `t` is float32.
    `num_chunks` and `num_targets` are 0 where the cache's signal has none.
    """

    shard: np.ndarray
    group: np.ndarray
    row: np.ndarray
    sample: np.ndarray
    view: np.ndarray
    t: np.ndarray
    num_tokens: np.ndarray
    prompt_tokens: np.ndarray
    num_masked: np.ndarray
    num_chunks: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


def open_cache(
    path_or_hub_id: str | Path, *, revision: str | None = None, verify: bool | Literal["quick", "full"] = True,
    shard_cache: ShardCacheConfig | None = None,
) -> "Cache":  # fmt: skip
    """Open a cache: a folder, a data set of the Hub, or a URL of an object store.

    Args:
        path_or_hub_id: a folder, owner/name, owner/name@revision, hf://datasets/owner/name@revision, or a URL that
            fsspec understands (s3://bucket/cache). Remote shards are fetched when they are read (remote.py).
        revision: branch, tag or commit on the Hub.
        verify: "full": all checks of docs/cache_format.md; "quick": manifest, sizes and footers only; True: quick for a
            folder that was made or checked here before and has not changed (trust.py), full for any other, and for
            what is remote every shard in full before it is read; False: the manifest alone (and, for what is remote,
            size and SHA-256 of what is read).
        shard_cache: where remote shards are kept on this machine, and how many bytes of them.
    Raises:
        CacheError: incomplete, damaged or not a cache. Unavailable: no login, no permission, not there. TryAgain: the
            Hub or the store stays busy or out of reach.
    """
    name = str(path_or_hub_id)
    root = local_path(name)
    if is_url(name) or not root.is_dir():
        from .remote import open_remote_cache

        return open_remote_cache(name, revision, verify, shard_cache or ShardCacheConfig())
    if revision is not None:
        raise CacheError(f"{root} is a folder and has no revision {revision!r}; leave revision out")
    cache = Cache(root, read_manifest(root))
    if verify:
        verify_cache(root, mode=verify if isinstance(verify, str) else "auto", manifest=cache.manifest)
    return cache


def verify_anywhere(path: str | Path, *, mode: Literal["quick", "full"] = "full") -> VerifyReport:
    """`verify_cache` of a folder; what lies elsewhere is fetched first. Raises: CacheError: the first failed check."""
    if not is_url(path):
        return verify_cache(local_path(path), mode=mode)
    return open_cache(path, verify=False).verify(mode)


class Cache(Sequence[ViewRow]):
    """A complete cache: a sequence of `ViewRow`s in file order, plus the manifest that describes them.

    May be used from several threads and pickled to worker processes (decoded rows stay behind).
    """

    cached_bytes = 512 << 20
    """Decoded row groups kept in memory by `rows`."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = Path(root)
        self.manifest = manifest
        self.layout = manifest.layout
        self._lock = threading.RLock()
        self._files: OrderedDict[int, Pinned] = OrderedDict()
        self._seen: dict[int, tuple[int, ...] | None] = {}
        self._batches: OrderedDict[tuple[int, int], RowBatch] = OrderedDict()
        self._shard_starts = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.shards])]).astype(int)
        self._group_starts: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.manifest)

    def __repr__(self) -> str:
        return f"Cache({str(self.root)!r}, signal={self.layout.signal!r}, samples={self.num_samples}, rows={len(self)})"

    @property
    def address(self) -> "HubAddress | str | None":
        """Where it lies: on the Hub with its commit, or a URL; None: in the folder `root`."""
        return None

    @property
    def num_samples(self) -> int:
        """Conversations."""
        return self.manifest.totals.samples

    @property
    def num_views(self) -> int:
        """Views of all samples together: the number of rows."""
        return self.manifest.totals.rows

    def __len__(self) -> int:
        return self.num_views

    def __getitem__(self, row: int) -> ViewRow:  # type: ignore[override]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.rows([row % len(self)])[0]

    def __iter__(self) -> Iterator[ViewRow]:
        for shard in range(len(self.manifest.shards)):
            for group in range(len(self._starts_of_groups(shard)) - 1):
                yield from self.read_row_group(shard, group)

    def verify(self, mode: Literal["quick", "full"] = "full") -> VerifyReport:
        """Run the checks of docs/cache_format.md in order. Raises: CacheError: the first that fails."""
        return verify_cache(self.root, mode=mode)

    def require_student(self, tokenizer_fingerprint: str, chat_template_fingerprint: str | None = None) -> None:
        """Raises: CacheMismatch: the cache was made for another tokenizer or chat template."""
        student, path = self.manifest.student, self.root / MANIFEST_NAME
        pairs = [("tokenizer", student.tokenizer_fingerprint, tokenizer_fingerprint)]
        if chat_template_fingerprint is not None:
            pairs.append(("chat template", student.chat_template_fingerprint, chat_template_fingerprint))
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise CacheMismatch(
                    f"{path} was dumped for student {what} {ours:.12}…, this student has {theirs:.12}…. "
                    "Dump again for it, or train the student the cache names."
                )

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """All row groups, in file order."""
        return [
            RowGroup(shard, group, num_rows)
            for shard in range(len(self.manifest.shards))
            for group, num_rows in enumerate(np.diff(self._starts_of_groups(shard)).tolist())
        ]

    def _starts_of_groups(self, shard: int) -> np.ndarray:
        """Numbers of the rows at which the row groups of a shard begin, and behind its last row: int64 [groups + 1]."""
        if shard not in self._group_starts:
            info, begin = self._open(shard).file.metadata, self._shard_starts[shard]
            sizes = [info.row_group(group).num_rows for group in range(info.num_row_groups)]
            entry = self.manifest.shards[shard]
            if sum(sizes) != entry.rows:
                raise CacheError(
                    f"{self.root / entry.name}: holds {sum(sizes)} rows, the manifest says {entry.rows}; fetch it again"
                )
            self._group_starts[shard] = begin + np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        return self._group_starts[shard]

    def _open(self, shard: int) -> Pinned:
        with self._lock:
            opened = self._files.get(shard)
            if opened is None:
                entry = self.manifest.shards[shard]
                path = file_inside(self.root, entry.name)
                with reading(path):  # where others may write, what was checked may have been exchanged since
                    opened = Pinned(path, None if is_private(path) else entry.sha256, self._seen.get(shard))
                self._files[shard], self._seen[shard] = opened, opened.seen
                if len(self._files) > OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return opened

    def read_row_group(self, shard: int, group: int) -> RowBatch:
        """Decode one row group; a sequence of `ViewRow`s. Raises: CacheError: a checksum or a length is wrong."""
        first_row = int(self._starts_of_groups(shard)[group] - self._shard_starts[shard])
        opened = self._open(shard)
        with reading(opened.path):
            batch = read_group(opened.file, group, self.layout, where=str(opened.path), first_row=first_row)
            opened.require_same()
            return batch

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[ViewRow]:
        """Rows by number (0 .. len - 1, file order), in the given order; each row group is decoded once per call.

        Row groups stay decoded up to `cached_bytes`: an order that stays within a few of them is fast.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a cache of {len(self)}")
        out: list[Any] = [None] * len(wanted)
        shards = np.searchsorted(self._shard_starts, wanted, side="right") - 1
        for shard in np.unique(shards).tolist():
            starts, slots = self._starts_of_groups(shard), np.flatnonzero(shards == shard)
            groups = np.searchsorted(starts, wanted[slots], side="right") - 1
            for group in np.unique(groups).tolist():
                batch = self._batch(shard, group)
                for slot in slots[groups == group]:
                    out[slot] = batch[int(wanted[slot] - starts[group])]
        return out

    def _batch(self, shard: int, group: int) -> RowBatch:
        key = (shard, group)
        with self._lock:
            if key not in self._batches:
                self._batches[key] = self.read_row_group(shard, group)
                total = sum(batch.nbytes for batch in self._batches.values())
                while total > self.cached_bytes and len(self._batches) > 1:
                    total -= self._batches.popitem(last=False)[1].nbytes
            self._batches.move_to_end(key)
            return self._batches[key]

    def index(self) -> CacheIndex:
        """What normalisation and ordering need of every row, from the scalar columns alone."""
        names = ["view", "t", "num_tokens", "prompt_tokens", "num_masked", "num_chunks", "num_targets"]
        present = [name for name in names if name in {c.name for c in self.layout.columns}]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "begins")}
        for shard, entry in enumerate(self.manifest.shards):
            opened = self._open(shard)
            with reading(self.root / entry.name):
                table = opened.file.read(["sample_id", *present], use_threads=False)
                opened.require_same()
            ids = table["sample_id"].combine_chunks()
            begins = np.ones(len(ids), np.int64)  # samples never continue in the next shard
            begins[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
            parts["begins"].append(begins)
            for name in names:
                column = table[name].to_numpy() if name in present else np.zeros(len(ids), np.int64)
                parts[name].append(column)
        values = {name: np.concatenate(arrays or [np.zeros(0, np.int64)]) for name, arrays in parts.items()}
        groups = self.row_groups
        sizes = np.array([g.num_rows for g in groups], np.int64)
        return CacheIndex(
            shard=np.repeat(np.array([g.shard for g in groups], np.int64), sizes),
            group=np.repeat(np.array([g.group for g in groups], np.int64), sizes),
            row=np.arange(len(self)) - np.repeat(np.cumsum(sizes) - sizes, sizes),
            sample=np.cumsum(values.pop("begins")) - 1,
            t=values.pop("t").astype(np.float32),
            **{name: column.astype(np.int64) for name, column in values.items()},
        )

    def vocabulary(self) -> Vocabulary:
        """Bytes and teacher ids of the student's tokens. Raises: CacheError: the cache holds no vocabulary."""
        if self.manifest.vocabulary is None:
            raise CacheError(f"{self.root}: made without {VOCABULARY_NAME}; dump again to get one")
        return read_vocabulary(self.root, self.manifest.vocabulary.sha256)

    def to_datasets(self, *, decoded: bool = False, temperature: float | None = None) -> "datasets.Dataset":
        """The shards as a `datasets.Dataset`, one row per view.

        Args:
            decoded: probabilities and texts (decoded.py has the columns); otherwise columns as on disk.
            temperature: of decoded probabilities, one of the cache's; None: its first.
        Raises: ConfigError: another temperature, or one without `decoded`.
        """
        import datasets

        from .decoded import decoded_dataset

        if decoded:
            return decoded_dataset(self, temperature=temperature)
        if temperature is not None:
            raise ConfigError(
                "to_datasets: a temperature was given for columns as on disk; expected decoded=True with it"
            )

        files = [str(file_inside(self.root, shard.name)) for shard in self.manifest.shards]
        dataset = datasets.load_dataset("parquet", data_files=files, split="train")
        assert isinstance(dataset, datasets.Dataset)
        return dataset
