"""`tide inspect-cache --audit`: how true a cache is, by mask ratio, on the targets that it stores in full.

audit rows x their views -> plain JSON: tail masses stored and exact, the KL divergence that rounding cost, and for every
loss how its gradient at the student's logits differs from that of the dense loss (audit_gradients.py). Gradients depend
on the student: a checkpoint's answers on those very views, or stand-ins made from the audited distributions. A large
audit is thinned out evenly, so that it takes a minute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..shared.cache import Cache, ViewRow, open_cache
from ..shared.cache.audit import AuditRow, read_audit_group
from ..shared.cache.files import file_inside, open_parquet, reading
from ..shared.cache.manifest import AuditInfo
from ..shared.cache.verify import audit_is_here
from ..shared.config import DataConfig, RunConfig, StudentConfig
from ..shared.errors import CacheError
from .audit_gradients import Answers, LossName, gradient_products, places, stored_tails
from .batches import Batch, View, collate
from .open_student import open_encoder, open_model
from .student import Student

BIN_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the masked share of a response; bin i covers (edge i, edge i + 1]."""
MAX_VALUES = 1 << 25
"""Audited targets times tokens of the support that are compared; of more, evenly spaced targets are."""
SLICE_BYTES = 64 << 20
MAX_VIEWS = 64
"""Views of one forward of the student."""


class AskedStudent(Protocol):
    """A student at whose logits gradients are compared."""

    name: str

    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Something with a row for each of the batch's chosen targets."""
        ...

    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and the columns [S] of the support, from rows of `prepare` and the teacher's [n, S]."""
        ...


@dataclass(frozen=True)
class StandIn:
    """A student made of the audit itself: `unigram` says the audited targets' mean distribution at every target;
    `halfway` the geometric mean of that and the teacher."""

    name: str
    unigram_logp: Tensor  # [S]
    teacher_share: float

    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Nothing is needed of the batch."""
        return torch.zeros(len(targets), 0)

    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """See `AskedStudent`."""
        mixed = self.teacher_share * dense + (1 - self.teacher_share) * self.unigram_logp
        return torch.log_softmax(mixed, dim=1), torch.arange(dense.shape[1])


@dataclass(frozen=True)
class CheckpointStudent:
    """A real student: its own forward on the audited views."""

    name: str
    student: Student
    support: Tensor  # [S] student ids

    @torch.inference_mode()
    def prepare(self, batch: Batch, targets: Tensor) -> Tensor:
        """Hidden states at the targets."""
        device = self.student.model.device
        hidden = self.student.hidden(batch.rows.to(device)).flatten(0, 1)
        return hidden[batch.read[batch.target[targets]].to(device)]

    @torch.inference_mode()
    def logits(self, prepared: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """See `AskedStudent`."""
        weight = self.student.head_weight()
        return (prepared.to(weight.dtype) @ weight.T).cpu().double(), self.support


def describe_audit(root: str | Path, *, student: str | None = None) -> dict[str, Any]:
    """Compare what a cache keeps with what it stores in full.

    Args: student: checkpoint folder or hub id; None: the stand-ins `unigram` and `halfway`.
    Returns: plain JSON: `share`, `targets`, `compared`, `support_tokens`, `bytes`, `bin_edges`, `bin_targets`, and per
        temperature `tail` and `kl`, per student `losses`; a list over bins has None where a bin is empty.
    Raises: CacheError: no audit (with how to get one), or damaged. CacheMismatch, ConfigError: see `open_student`.
    """
    cache = open_cache(root)
    info = _require_audit(cache)
    support = np.flatnonzero(cache.vocabulary().teacher_id >= 0)
    total = sum(entry.rows for entry in info.files)
    step = max(1, -(-total * info.support_tokens // MAX_VALUES))
    chosen = _Chosen(cache, info, support, step)
    students = [_open_student(cache, student, support)] if student else _stand_ins(chosen)
    sums = _Sums(cache.manifest.signal.temperatures, [one.name for one in students])
    for group in chosen.groups():
        _compare(group, students, sums, support, cache)
    return {
        "cache": str(root), "manifest_hash": cache.manifest.hash, "share": info.share, "targets": total,
        "support_tokens": info.support_tokens, "bytes": sum(entry.bytes for entry in info.files), **sums.summary(),
    }  # fmt: skip


def _require_audit(cache: Cache) -> AuditInfo:
    """Raises: CacheError: there is no audit, or nothing in it; says how to get one."""
    info, root = cache.manifest.audit, cache.root
    if info is None:
        how = "dump again with --set signal.audit_share=0.001 (into another --out) to store some targets in full"
        if cache.manifest.signal.kind != "topk":
            how = f"signal {cache.manifest.signal.kind} keeps no distributions over tokens that one could compare"
        elif cache.manifest.parts:
            how = "it was merged, and the audits stayed with its parts; inspect those"
        raise CacheError(f"{root}: this cache has no audit: {how}")
    if not info.files:
        raise CacheError(
            f"{root}: no target was drawn for the audit at signal.audit_share = {info.share}; dump again with a larger "
            "share (into another --out)"
        )
    if not audit_is_here(root, cache.manifest):
        raise CacheError(
            f"{root}: the audit was left out when this cache was pulled; run pull-cache again with --audit"
        )
    return info


def _open_student(cache: Cache, path: str, support: np.ndarray) -> CheckpointStudent:
    block_size = cache.manifest.block_size
    config = RunConfig(
        student=StudentConfig(path=path, block_size=block_size), data=DataConfig(max_length=block_size)
    )  # fmt: skip
    open_encoder(config, cache)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = open_model(config, cache, None).eval().to(device)  # type: ignore[arg-type]
    return CheckpointStudent(Path(path).name or path, Student(model), torch.from_numpy(support))


def _stand_ins(chosen: "_Chosen") -> list[AskedStudent]:
    total, count = 0.0, 0
    for row in chosen.audit_rows():
        total, count = total + torch.softmax(torch.tensor(row.logp, dtype=torch.float64), dim=0), count + 1
    unigram = torch.log(torch.as_tensor(total) / count)
    return [StandIn("unigram", unigram, 0.0), StandIn("halfway", unigram, 0.5)]


class _Group(NamedTuple):
    """Some views and their audited targets, in order."""

    views: list[ViewRow]
    audited: list[list[AuditRow]]


@dataclass(frozen=True)
class _Chosen:
    """Every `step`-th audited target of a cache."""

    cache: Cache
    info: AuditInfo
    support: np.ndarray
    step: int

    def audit_rows(self) -> Iterator[AuditRow]:
        """The rows of all audit files, thinned out. Raises: CacheError: damaged."""
        for _, rows in self._by_shard():
            yield from rows

    def groups(self) -> Iterator[_Group]:
        """The same with their views, a forward's worth at a time. Raises: CacheError: damaged."""
        for shard, rows in self._by_shard():
            place = self._rows_of(shard)
            group, held = _Group([], []), None
            most = max(1, SLICE_BYTES // (8 * len(self.support)))
            for row in rows:
                key = (row.sample_id, row.view)
                if key not in place:
                    raise CacheError(
                        f"{self.cache.root}: the audit names sample {row.sample_id!r:.80}, view {row.view}, which the "
                        "shard does not have; run verify-cache"
                    )
                if key == held:
                    group.audited[-1].append(row)
                    continue
                if len(group.views) == MAX_VIEWS or sum(map(len, group.audited)) >= most:
                    yield group
                    group = _Group([], [])
                held = key
                group.views.append(self.cache.rows([place[key]])[0])
                group.audited.append([row])
            if group.views:
                yield group

    def _by_shard(self) -> Iterator[tuple[int, Iterator[AuditRow]]]:
        first = 0
        for shard, entry in self.cache.manifest.audit_of.items():
            yield shard, self._read(entry.name, first)
            first += entry.rows

    def _read(self, name: str, first: int) -> Iterator[AuditRow]:
        path, done = file_inside(self.cache.root, name), 0
        with reading(path), open_parquet(path) as file:
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                wanted = [i for i in range(num_rows) if (first + done + i) % self.step == 0]
                if wanted:
                    batch = read_audit_group(file, group, where=str(path), first_row=done)
                    if batch.logp.shape[1] != len(self.support):
                        raise CacheError(
                            f"{path}: {batch.logp.shape[1]:,} tokens each, the vocabulary gives {len(self.support):,}; "
                            "run verify-cache"
                        )
                    yield from (batch[i] for i in wanted)
                done += num_rows

    def _rows_of(self, shard: int) -> dict[tuple[str, int], int]:
        """Row number in the cache of every view of a shard."""
        shards = self.cache.manifest.shards
        start = sum(entry.rows for entry in shards[:shard])
        path = file_inside(self.cache.root, shards[shard].name)
        with reading(path), open_parquet(path) as file:
            table = file.read(["sample_id", "view"], use_threads=False)
        keys = zip(table["sample_id"].to_pylist(), table["view"].to_pylist(), strict=True)
        return {key: start + number for number, key in enumerate(keys)}


def _compare(
    group: _Group, students: Sequence[AskedStudent], sums: "_Sums", support: np.ndarray, cache: Cache
) -> None:  # fmt: skip
    """Add the audited targets of a few views."""
    layout, manifest = cache.layout, cache.manifest
    views = [[View(row, _masked(row), row.t, True)] for row in group.views]
    batch = collate(
        views, mask_id=manifest.student.mask_id, block_size=layout.block_size, top_k=layout.top_k,
        temperatures=layout.temperatures,
    )  # fmt: skip
    rows = [(view, one) for view, audited in zip(group.views, group.audited, strict=True) for one in audited]
    starts = np.cumsum([0, *(len(view.target_position) for view in group.views)])
    targets = torch.tensor([
        int(start) + _target_of(view, one) for view, start, audited in zip(group.views, starts, group.audited, strict=False)
        for one in audited
    ])  # fmt: skip
    prepared = {one.name: one.prepare(batch, targets) for one in students}
    vocab_size = layout.vocab_size
    gold = torch.tensor([int(view.x_0[one.position]) for view, one in rows])
    chunk_logp = torch.tensor([_chunk_logp(view, one) for view, one in rows], dtype=torch.float64)
    most = max(1, SLICE_BYTES // (8 * max(len(support), vocab_size)))
    for start in range(0, len(rows), most):
        part = slice(start, start + most)
        dense = torch.from_numpy(np.stack([one.logp for _, one in rows[part]])).double()
        teacher = batch.teacher[targets[part]]
        answers = Answers(
            dense, torch.arange(len(support)), dense, teacher, places(teacher.top_ids, torch.from_numpy(support), vocab_size),
            places(gold[part], torch.from_numpy(support), vocab_size), chunk_logp[part],
        )  # fmt: skip
        bins = _bins(np.array([one.masked_share for _, one in rows[part]]))
        sums.add_tails(answers, bins)
        for one in students:
            logits, columns = one.logits(prepared[one.name][part], dense)
            sums.add_gradients(one.name, replace_logits(answers, logits, columns), bins)


def replace_logits(answers: Answers, logits: Tensor, support: Tensor) -> Answers:
    """The same targets, and another student."""
    return answers._replace(logits=logits.clone(), support=support)  # inference tensors take no gradient, copies do


def _masked(row: ViewRow) -> np.ndarray:
    return np.concatenate([np.zeros(row.prompt_tokens, bool), row.masked])


def _target_of(view: ViewRow, audited: AuditRow) -> int:
    place = int(np.searchsorted(view.target_position, audited.position))
    if place == len(view.target_position) or view.target_position[place] != audited.position:
        raise CacheError(
            f"the audit names position {audited.position} of sample {view.sample_id!r:.80}, view {view.view}, which is no "
            "target; run verify-cache"
        )
    return place


def _chunk_logp(view: ViewRow, audited: AuditRow) -> float:
    """Of the chunk that begins at a target: it has one token on either side."""
    return float(view.chunk_logp[int(np.searchsorted(view.chunk_start, audited.position))])


def _bins(masked_share: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(BIN_EDGES, masked_share, side="left") - 1, 0, len(BIN_EDGES) - 2)


@dataclass
class _Sums:
    """What the description is made of, by bin."""

    temperatures: tuple[float, ...]
    names: list[str]
    bins: list[np.ndarray] = field(default_factory=list)
    tails: dict[float, list[np.ndarray]] = field(default_factory=dict)
    products: dict[str, dict[LossName, np.ndarray]] = field(default_factory=dict)

    def add_tails(self, answers: Answers, bins: np.ndarray) -> None:
        """Tail masses and divergences of a slice, target by target."""
        self.bins.append(bins)
        for temperature, *columns in stored_tails(answers):
            self.tails.setdefault(temperature, []).append(np.stack([column.numpy() for column in columns]))

    def add_gradients(self, name: str, answers: Answers, bins: np.ndarray) -> None:
        """Products of a slice, summed by bin."""
        of_student = self.products.setdefault(name, {})
        for loss, products in gradient_products(answers):
            sums = [np.bincount(bins, column.numpy(), len(BIN_EDGES) - 1) for column in products]
            of_student[loss] = of_student.get(loss, 0.0) + np.stack(sums)

    def summary(self) -> dict[str, Any]:
        """Means, percentiles, cosines and ratios; over all bins first, then bin by bin."""
        bins = np.concatenate(self.bins)
        chosen = [np.ones(len(bins), bool), *(bins == number for number in range(len(BIN_EDGES) - 1))]
        return {
            "compared": len(bins), "bin_edges": list(BIN_EDGES), "bin_targets": [int(some.sum()) for some in chosen[1:]],
            "temperatures": [
                _by_temperature(temperature, np.concatenate(self.tails[temperature], axis=1), chosen)
                for temperature in self.temperatures
            ],
            "students": [
                {"name": name, "losses": [_loss(loss, sums) for loss, sums in self.products[name].items()]}
                for name in self.names
            ],
        }  # fmt: skip


def _by_temperature(temperature: float, values: np.ndarray, chosen: Sequence[np.ndarray]) -> dict[str, Any]:
    """`values`: stored tail, exact tail, divergence [3, n]."""

    def over(column: np.ndarray, how: Any) -> dict[str, Any]:
        found = [_number(how(column[some])) if some.any() else None for some in chosen]
        return {"all": found[0], "by_bin": found[1:]}

    stored, exact, kl = values
    return {
        "temperature": temperature,
        "tail_stored": over(stored, np.mean), "tail_exact": over(exact, np.mean),
        "tail_error": over(np.abs(stored - exact), np.max),
        "kl_mean": over(kl, np.mean), "kl_p99": over(kl, lambda some: np.quantile(some, 0.99)),
    }  # fmt: skip


def _loss(loss: LossName, sums: np.ndarray) -> dict[str, Any]:
    """`sums`: inner product and both squared lengths by bin, [3, bins]."""
    columns = np.concatenate([sums.sum(axis=1, keepdims=True), sums], axis=1)
    dot, stored, dense = columns
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine, ratio = dot / np.sqrt(stored * dense), np.sqrt(stored / dense)
    values = {"cosine": cosine, "norm_ratio": ratio}
    return {
        "loss": loss.name, "temperature": loss.temperature, "tidal_lambda": loss.tidal_lambda,
        **{name: {"all": _number(v[0]), "by_bin": [_number(x) for x in v[1:]]} for name, v in values.items()},
    }  # fmt: skip


def _number(value: Any) -> float | None:
    """None for what is no number: an empty bin, a gradient of zero."""
    return float(value) if np.isfinite(value) else None
