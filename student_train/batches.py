"""Which views a step trains on, and their tensors: cache -> order -> `Batch`.

1. `ViewOrder`: (seed, epoch, cache) -> one global order of samples; the stream of epochs is cut into global batches.
2. `GlobalCounts`: what the losses divide by, counted over the global batch from the cache's index alone.
3. `collate`: `ViewRow`s -> `Batch`, the tensors of one forward.

The only state is the step number, so a run resumes exactly, on any number of processes. An epoch shows every sample
once, with the views that are next in turn; a batch may span two epochs, so no batch is ever smaller than the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from ..shared.cache import Cache, Manifest, ViewRow
from ..shared.config import EPS_T, TrainConfig
from ..shared.errors import CacheError, ConfigError
from ..shared.noising import GOLDEN_RATIO, keyed_generator
from ..shared.rows import RowTensors, blocks_read, clean_piece, join, noised_piece, stack
from ..shared.sparse_logits import SparseLogits, log_z_from_tail

WINDOW_GROUPS = 32
"""Row groups that are shuffled together, and held decoded: 32 of about 4 MiB."""


class Item(NamedTuple):
    """One row of a batch: a sample with some of its cached views, or with fresh noise."""

    sample: int
    views: tuple[int, ...]  # empty: fresh noise at `fresh_t`
    fresh_t: float = 0.0
    fresh_key: int = 0  # the epoch of the fresh stream, keys the masks


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of one global batch, over all processes and accumulation steps."""

    rows: int
    views: int
    maskable: int
    targets: int
    chunks: int
    unmatched_chunks: int


class ViewOrder:
    """The global order of training: step -> items, the same on every process.

    Args:
        cache: its index says where samples lie; the views of one sample are adjacent rows, in order.
        train: seed, batch_size, views_per_row and max_views are read.
        fresh_ratio: share of steps that are CE-only on fresh noise, in [0, 1].
    Raises: CacheError: the cache is empty, or a sample lacks a view. ConfigError: see `require_in_cache`.
    """

    def __init__(self, cache: Cache, train: TrainConfig, *, fresh_ratio: float) -> None:
        self.index = cache.index()
        self.num_views = cache.manifest.noise["views"]
        self.num_samples = len(self.index) // self.num_views
        rows = np.arange(len(self.index))
        sample, view = np.divmod(rows, self.num_views)
        in_order = np.array_equal(self.index.sample, sample) and np.array_equal(self.index.view, view)
        if not len(rows) or len(rows) % self.num_views or not in_order:
            raise CacheError(
                f"{cache.root}: expected every sample's {self.num_views} views as adjacent rows in order, and found "
                f"{len(rows)} rows that are not; dump again"
            )
        require_in_cache(train, cache.manifest)
        self.used_views = train.max_views or self.num_views
        self.train, self.fresh_ratio = train, fresh_ratio
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        first_rows = np.arange(self.num_samples) * self.num_views
        places = np.stack([self.index.shard[first_rows], self.index.group[first_rows]], axis=1)
        _, self._group_of_sample = np.unique(places, axis=0, return_inverse=True)

    def is_fresh(self, step: int) -> bool:
        """Is `step` one of the CE-only steps on fresh noise? They are spread evenly over training."""
        return self._fresh_before(step + 1) > self._fresh_before(step)

    def items(self, step: int) -> list[Item]:
        """The global batch of `step`, in order; a process takes its sub-slice."""
        fresh = self.is_fresh(step)
        turn = self._fresh_before(step) if fresh else step - self._fresh_before(step)
        first = turn * self.train.batch_size
        return [self._item(place, fresh) for place in range(first, first + self.train.batch_size)]

    def counts(self, items: Sequence[Item]) -> GlobalCounts:
        """Denominators of a global batch."""
        index = self.index
        rows = np.array([i.sample * self.num_views + v for i in items for v in i.views], np.int64)
        fresh = np.array([i.sample * self.num_views for i in items if not i.views], np.int64)
        every = np.concatenate([rows, fresh])
        targets, chunks = int(index.num_targets[rows].sum()), int(index.num_chunks[rows].sum())
        return GlobalCounts(
            rows=len(items), views=len(every),
            maskable=int((index.num_tokens[every] - index.prompt_tokens[every]).sum()),
            targets=targets, chunks=chunks, unmatched_chunks=chunks - targets,
        )  # fmt: skip

    def unused(self, num_steps: int) -> list[str]:
        """What of the cache a training of so many steps does not use, a sentence each; [] where it uses all."""
        size, num_fresh = self.train.batch_size, self._fresh_before(num_steps)
        places = {"cached": (num_steps - num_fresh) * size, "fresh": num_fresh * size}
        seen = np.zeros(self.num_samples, bool)
        for purpose, num in places.items():
            if num:
                seen[self._order(purpose, 0)[:num]] = True
        epochs, lines = sum(places.values()) / self.num_samples, []
        length = f"{num_steps:,} steps of {size:,} are {epochs:.3g} epochs"
        left = self.num_samples - int(seen.sum())
        if left:
            lines.append(f"{left:,} of the cache's {self.num_samples:,} samples are in no batch: {length}")
        missing = 0.0 if self.train.steps else self.train.epochs * self.num_samples - num_steps * size
        if missing > 0 and not left:
            lines.append(
                f"the last {missing:,.0f} samples of the last epoch are left out: {length}, as steps are whole batches"
            )
        if not places["cached"]:
            lines.append("no cached view is used: every step draws new masks (train.ce_noise)")
            return lines
        width = min(self.train.views_per_row, self.used_views)
        turns = range(-(-places["cached"] // self.num_samples))
        used = {(turn * self.train.views_per_row + j) % self.used_views for turn in turns for j in range(width)}
        if len(used) < self.num_views:
            limit = f", and train.max_views = {self.used_views}" if self.used_views < self.num_views else ""
            lines.append(
                f"{len(used):,} of the cache's {self.num_views:,} views of a sample are used: an epoch takes {width}, "
                f"and {length}{limit}"
            )
        return lines

    def row_numbers(self, item: Item) -> list[int]:
        """Cache rows of an item; for fresh noise the first view, whose x_0 is the sample's."""
        return [item.sample * self.num_views + view for view in item.views or (0,)]

    def length(self, item: Item) -> int:
        """Tokens of an item's sample; rows of similar length are put into one micro-batch."""
        return int(self.index.num_tokens[item.sample * self.num_views])

    def _fresh_before(self, step: int) -> int:
        return math.floor(step * self.fresh_ratio + 1e-9)

    def _item(self, place: int, fresh: bool) -> Item:
        epoch, inside = divmod(place, self.num_samples)
        sample = int(self._order("fresh" if fresh else "cached", epoch)[inside])
        if fresh:
            start = keyed_generator(self.train.seed, "fresh t", epoch).random()
            u = (start + inside * GOLDEN_RATIO) % 1.0  # any run of the sequence is spread evenly over [0, 1)
            return Item(sample, (), EPS_T + (1 - EPS_T) * u, epoch)
        width = self.train.views_per_row
        views = tuple((epoch * width + j) % self.used_views for j in range(min(width, self.used_views)))
        return Item(sample, views)

    def _order(self, purpose: str, epoch: int) -> np.ndarray:
        """The samples of one epoch: row groups in random order, cut into windows, each window shuffled."""
        key = (purpose, epoch)
        if key not in self._orders:
            draw = keyed_generator(self.train.seed, "order", purpose, epoch)
            num_groups = int(self._group_of_sample.max()) + 1
            window = draw.permutation(num_groups) // WINDOW_GROUPS
            order = np.lexsort((draw.random(self.num_samples), window[self._group_of_sample]))
            while len(self._orders) > 3:  # a batch spans two epochs of one purpose at most
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = order
        return self._orders[key]


def require_in_cache(train: TrainConfig, manifest: Manifest) -> None:
    """Raises: ConfigError: more views or top tokens are asked for than the cache holds, or fewer than it can give."""
    if train.max_top_k is not None and manifest.signal.tail_buckets:
        raise ConfigError(
            f"train.max_top_k = {train.max_top_k}: this cache's tails are cut (signal.tail_buckets), and what k leaves "
            "out would belong to several parts; leave max_top_k out, or dump again without tail_buckets"
        )
    for setting, asked, held, dump in (
        ("max_views", train.max_views, manifest.noise["views"], "noise.views"),
        ("max_top_k", train.max_top_k, manifest.signal.top_k, "signal.top_k"),
    ):
        if asked is not None and asked > held:
            raise ConfigError(
                f"train.{setting} = {asked}: the cache was dumped with {dump} = {held}; ask for less, or dump again "
                f"with {dump}={asked}"
            )


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward: b rows, n masked positions, m of them with a token-level target, c active chunks."""

    rows: RowTensors
    read: Int64[Tensor, " n"]  # index of each masked position in the flattened rows
    gold_ids: Int64[Tensor, " n"]
    t: Float32[Tensor, " n"]  # diffusion time of the position's view
    maskable: Float32[Tensor, " n"]  # maskable tokens of the position's view
    target: Int64[Tensor, " m"]  # index into the n positions
    teacher: SparseLogits  # [m], student ids
    target_t: Float32[Tensor, " m"]
    chunk_token: Int64[Tensor, " all_chunks"]  # index into the n positions of each token of each chunk
    chunk_of_token: Int64[Tensor, " all_chunks"]  # number of the chunk
    chunk_logp: Float32[Tensor, " c"]  # of the teacher
    chunk_t: Float32[Tensor, " c"]
    chunk_unmatched: Bool[Tensor, " c"]  # no token-level target covers it

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        teacher = self.teacher.map(lambda values: values.to(device, non_blocking=True))
        return Batch(**{**moved, "rows": self.rows.to(device), "teacher": teacher})


def views_of(item: Item, rows: Sequence[ViewRow], seed: int) -> list[ViewRow]:
    """The views of one item from its cache rows; fresh noise masks every response token with probability t.

    Of what is drawn anew the teacher said nothing: such a row has no chunks and no targets.
    """
    if item.views:
        return list(rows)
    (row,) = rows
    masked = keyed_generator(seed, row.sample_id, "fresh mask", item.fresh_key).random(len(row.x_0)) < item.fresh_t
    return [ViewRow(row.sample_id, row.view, item.fresh_t, row.x_0, row.prompt_tokens, masked[row.prompt_tokens :])]


def collate(
    samples: Sequence[Sequence[ViewRow]], *, mask_id: int, block_size: int, top_k: int,
    temperatures: tuple[float, ...], max_top_k: int | None = None,
) -> Batch:  # fmt: skip
    """Views -> tensors.

    Args:
        samples: the rows of the batch, each the views of one sample that share its x_0.
        mask_id, block_size: of the student.
        top_k: width of the padded top-k; 0 if the cache has no token-level signal.
        temperatures: of the cache's log_tail columns.
        max_top_k: leave out all but so many top tokens of each target; None: keep all.
    """
    pieces, layouts = [], []
    for views in samples:
        masked = np.stack([view.is_masked for view in views])
        noised = noised_piece(views[0].x_0, masked, mask_id=mask_id, block_size=block_size)
        pieces.append(join(noised.piece, clean_piece(views[0].x_0, blocks_read(noised), block_size)))
        layouts.append(noised)
    rows = stack(pieces)
    length = rows.ids.shape[1]
    flat = [view for views in samples for view in views]
    num_masked = np.array([view.masked.sum() for view in flat])
    starts = np.cumsum(num_masked) - num_masked
    # of each view, the index among the n masked positions that each of its tokens has
    places = [np.cumsum(view.is_masked) - 1 + start for view, start in zip(flat, starts, strict=True)]
    placed, sized = list(zip(flat, places, strict=True)), list(zip(flat, num_masked, strict=True))
    chunk_len = _joined([view.chunk_len for view in flat], np.int64)
    teacher = _teacher_logits(flat, top_k, temperatures)
    return Batch(
        rows=rows,
        read=_joined([row * length + noised.read for row, noised in enumerate(layouts)], np.int64),
        gold_ids=_joined([view.x_0[view.is_masked] for view in flat], np.int64),
        t=_joined([np.full(n, view.t) for view, n in sized], np.float32),
        maskable=_joined([np.full(n, len(view.x_0) - view.prompt_tokens) for view, n in sized], np.float32),
        target=_joined([place[view.target_position] for view, place in placed], np.int64),
        teacher=teacher if max_top_k is None else teacher.narrowed(max_top_k),
        target_t=_joined([np.full(len(view.target_position), view.t) for view in flat], np.float32),
        chunk_token=_joined([place[_runs(view.chunk_start, view.chunk_len)] for view, place in placed], np.int64),
        chunk_of_token=torch.arange(len(chunk_len)).repeat_interleave(chunk_len),
        chunk_logp=_joined([view.chunk_logp for view in flat], np.float32),
        chunk_t=_joined([np.full(len(view.chunk_logp), view.t) for view in flat], np.float32),
        chunk_unmatched=_joined([~np.isin(view.chunk_start, view.target_position) for view in flat], np.bool_),
    )


def _teacher_logits(rows: Sequence[ViewRow], top_k: int, temperatures: tuple[float, ...]) -> SparseLogits:
    """The views' flat top tokens, padded to [m, top_k] with -1 and -inf."""
    num_top = _joined([row.num_top for row in rows], np.int64)
    place = torch.arange(len(num_top)).repeat_interleave(num_top), torch.from_numpy(_runs(0, num_top.numpy()))
    top_ids, top_logp = torch.full((len(num_top), top_k), -1), torch.full((len(num_top), top_k), -torch.inf)
    top_ids[place] = _joined([row.top_ids for row in rows], np.int64)
    top_logp[place] = _joined([row.top_logp for row in rows], np.float32)
    log_tail = _joined([row.log_tail.ravel() for row in rows], np.float32).reshape(len(num_top), len(temperatures))
    buckets = [row.log_buckets for row in rows if row.log_buckets.shape[2]]  # where the cache cuts tails into buckets
    return SparseLogits(
        _joined([row.gold_logp for row in rows], np.float32), top_ids, top_logp,
        log_z_from_tail(top_logp, log_tail, temperatures), log_tail, temperatures,
        torch.from_numpy(np.concatenate(buckets)) if buckets else None,
    )  # fmt: skip


def _runs(start: np.ndarray | int, length: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every run, one run after the other."""
    length = length.astype(np.int64)
    return np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="unsafe"))
