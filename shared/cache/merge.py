"""`tide merge-caches`: several caches of one plan family -> one cache, with all their samples or all their views.

1. every part is verified in full, since the result vouches for its rows;
2. what decides the meaning of a row must be equal: student, teacher, signal, block size, noise but for seed and views;
3. parts of the same samples form a group, groups have no sample in common, and every group the same number of views;
4. each shard of a group's first part becomes a shard: its samples with the views of all parts, part after part;
5. receipts, vocabulary, card and manifest, in a hidden folder that gets its name at the very end.

Audits stay with the parts, and a warning says so: views get new numbers, under which no draw chose them.

Views are numbered anew, 0, 1, ... within a sample, because training expects that of every sample; the manifest's
`parts` say which seed and which first number each part has. Parts of the same samples need different seeds: the
noise of view 3 is a function of seed, sample and 3, so equal seeds would give the same masks twice.
"""

import dataclasses
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ... import __version__
from ..addresses import require_apart
from ..config import to_tree
from ..errors import CacheError, CacheMismatch, ConfigError
from .card import write_card
from .codec_error import summary
from .files import atomic_write, canonical_json, fsync_folder, output_errors, sha256_bytes, temporary_name
from .manifest import Manifest, PartInfo, TeacherInfo, manifest_parts, read_manifest, write_manifest
from .manifest_fields import UNKNOWN
from .reader import Cache, open_cache
from .receipts import write_receipt
from .schema import ViewRow, shard_name
from .statistics import WRITER_ONLY
from .statistics import merge as merge_statistics
from .trust import keep_note, trust_note
from .vocabulary import VOCABULARY_NAME
from .writer import write_shard


@dataclass(frozen=True)
class Part:
    """One of the caches that are merged; rows of a sample are `first_row[sample_id]` and the `views` - 1 after it."""

    cache: Cache

    @property
    def manifest(self) -> Manifest:
        """Of the cache."""
        return self.cache.manifest

    @property
    def views(self) -> int:
        """Views of each sample."""
        return self.manifest.totals.rows // max(1, self.manifest.totals.samples)

    @cached_property
    def shards(self) -> list[list[str]]:
        """Sample ids of every shard, in order."""
        ids: list[list[str]] = [[] for _ in self.manifest.shards]
        for group in self.cache.row_groups:
            ids[group.shard] += self.cache.read_row_group(group.shard, group.group).sample_id
        return [list(dict.fromkeys(of_shard)) for of_shard in ids]

    @cached_property
    def first_row(self) -> dict[str, int]:
        """Sample id -> number of its first row."""
        ids = [sample for of_shard in self.shards for sample in of_shard]
        return {sample: number * self.views for number, sample in enumerate(ids)}

    def rows(self, sample: str) -> list[ViewRow]:
        """All views of a sample."""
        first = self.first_row[sample]
        return self.cache.rows(range(first, first + self.views))


def merge_caches(roots: Sequence[str | Path], out: str | Path) -> Manifest:
    """Merge caches into a new folder; one that holds their merge already is verified and stays as it is.

    Raises:
        CacheMismatch: two parts differ in something that decides what a row means, share some of their samples, or
            share all of them under one seed; names parts and fields. CacheError: a part is damaged.
        ConfigError: fewer than two parts, or `out` is something else or lies in a cache. OutputError.
    """
    out = Path(out)
    if len(roots) < 2:
        raise ConfigError(f"merge-caches: {len(roots)} cache given; expected at least two")
    known = is_merged(out)
    if os.path.lexists(out) and not known:
        raise ConfigError(f"--out {out}: exists already; give a new folder")
    require_apart(out, {f"part {number}": root for number, root in enumerate(roots, 1)}, makes_cache=known)
    parts = [Part(open_cache(root, verify=True if known else "full")) for root in roots]
    for part in parts:
        _require_same_family(parts[0], part)
        _require_whole_samples(part)
    groups = _groups(parts)
    if known:
        cache = open_cache(out)
        if cache.manifest.plan_hash != _plan_hash(groups):
            raise ConfigError(f"--out {out}: exists already, and is the merge of other caches; give a new folder")
        return cache.manifest
    audited = [str(part.cache.root) for part in parts if part.manifest.audit is not None]
    if audited:
        warnings.warn(
            f"the audit of {', '.join(audited)} stays where it is; inspect-cache --audit reads it there",
            stacklevel=2,
        )
    temporary = temporary_name(out)
    try:
        manifest = _write(temporary, groups)
        with output_errors(out):
            os.rename(temporary, out)
            fsync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    keep_note(trust_note(out, manifest))
    return manifest


def is_merged(folder: str | Path) -> bool:
    """Is there a cache that `merge_caches` made?"""
    try:
        return bool(read_manifest(Path(folder)).parts)
    except CacheError:
        return False


def _plan_hash(groups: Sequence[Sequence[Part]]) -> str:
    """What identifies a merge: its parts, in order."""
    return sha256_bytes(canonical_json([to_tree(info) for group in groups for info in _provenance(group)]))


def _require_same_family(one: Part, other: Part) -> None:
    """Raises: CacheMismatch: names every field that differs, with both values."""
    ours, theirs = dict(_family(one.manifest)), dict(_family(other.manifest))
    changes = [f"{name}: {ours.get(name)!r:.80} and {theirs.get(name)!r:.80}" for name in sorted({*ours, *theirs})
               if ours.get(name) != theirs.get(name)]  # fmt: skip
    if changes:
        raise CacheMismatch(
            f"{one.cache.root} and {other.cache.root} are of different kinds and cannot be merged "
            f"({'; '.join(changes)})"
        )


def _family(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """What decides the meaning of a row: field -> value."""
    tree = manifest.to_json()
    ignored = {
        "signal": ("codec", "codec_error", "frequent_ids"),
        "teacher": ("id", "revision", "licence", "doubts"),
        "noise": ("seed", "views"),
    }
    for section in ("signal", "teacher", "student", "noise"):
        fields = tree[section] if tree[section] is not None else {"kind": "none"}
        yield from ((f"{section}.{name}", v) for name, v in fields.items() if name not in ignored.get(section, ()))
    yield "schema_version", manifest.schema_version
    yield "block_size", manifest.block_size
    yield "vocabulary.sha256", manifest.vocabulary and manifest.vocabulary.sha256


def _require_whole_samples(part: Part) -> None:
    totals, views = part.manifest.totals, part.manifest.noise.get("views")
    if totals.rows != totals.samples * part.views or views != part.views:
        raise CacheMismatch(
            f"{part.cache.root}: {totals.rows:,} views of {totals.samples:,} samples, and noise.views = {views}; "
            "expected the same number of views for every sample"
        )
    if not part.manifest.parts and type(part.manifest.noise.get("seed")) is not int:
        raise CacheMismatch(f"{part.cache.root}: noise.seed is missing, so nobody knows whether its masks are new ones")


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts of the same samples together, in the order given. Raises: CacheMismatch."""
    groups: list[list[Part]] = []
    for part in parts:
        samples = part.first_row.keys()
        for group in groups:
            first = group[0]
            shared = samples & first.first_row.keys()
            if not shared:
                continue
            names = f"{first.cache.root} and {part.cache.root}"
            if len(shared) < max(len(samples), len(first.first_row)):
                raise CacheMismatch(
                    f"{names} share {len(shared):,} of their {len(first.first_row):,} and {len(samples):,} samples "
                    f"(such as {min(shared)!r:.80}); expected all or none"
                )
            seeds = {seed for other in group for seed in _seeds(other)} & _seeds(part)
            if seeds:
                raise CacheMismatch(
                    f"{names} hold the same samples under the same noise.seed = {min(seeds)}, so the same masks twice; "
                    "dump one of them with another seed"
                )
            group.append(part)
            break
        else:
            groups.append([part])
    views = [sum(part.views for part in group) for group in groups]
    for group, number in zip(groups, views, strict=True):
        if number != views[0]:
            raise CacheMismatch(
                f"{groups[0][0].cache.root} has {views[0]} views of every sample and {group[0].cache.root} {number}, "
                "all parts counted; expected equal numbers, because each epoch takes the next view of every sample"
            )
    return groups


def _seeds(part: Part) -> set[Any]:
    return {info.seed for info in part.manifest.parts} or {part.manifest.noise.get("seed")}


def _write(root: Path, groups: Sequence[Sequence[Part]]) -> Manifest:
    """Everything but the folder's final name."""
    infos = [info for group in groups for info in _provenance(group)]
    plan_hash = _plan_hash(groups)
    pieces = [(group, samples) for group in groups for samples in group[0].shards]
    receipts = []
    for shard, (group, samples) in enumerate(pieces):
        name, layout = shard_name(shard, len(pieces)), groups[0][0].manifest.layout
        statistics = write_shard(root / name, _rows(group, samples), layout, plan_hash=plan_hash, shard=shard)
        receipts.append(write_receipt(root, name, shard=shard, plan_hash=plan_hash, statistics=statistics))
    parts = [part for group in groups for part in group]
    first, manifests = parts[0].manifest, [part.manifest for part in parts]
    if first.vocabulary is not None:
        atomic_write(root / VOCABULARY_NAME, (parts[0].cache.root / VOCABULARY_NAME).read_bytes())
    meant = merge_statistics([manifest.statistics for manifest in manifests])  # what rounding cost, writers alone know
    described = manifest_parts(receipts)
    described["statistics"] = dataclasses.replace(
        described["statistics"], **{name: getattr(meant, name) for name in WRITER_ONLY}
    )
    error = summary(meant.codec_kl, meant.codec_kl_counts, meant.targets, first.signal.temperatures)
    seeds, views = {info.seed for info in infos}, sum(part.views for part in groups[0])
    # Parts that hold further views of the same samples left the same out: the first of them counts.
    counted = list({frozenset(part.first_row): part.manifest for part in reversed(parts)}.values())
    dropped = sum((Counter(manifest.dropped) for manifest in counted), Counter())
    coverage = sum((Counter(manifest.coverage) for manifest in counted), Counter())
    is_known = all(manifest.coverage for manifest in counted)
    manifest = dataclasses.replace(
        first,
        tide_version=__version__,
        plan_hash=plan_hash,
        signal=dataclasses.replace(first.signal, codec_error=error),
        teacher=_teacher([manifest.teacher for manifest in manifests if manifest.teacher]),
        noise={**first.noise, "views": views, "seed": first.noise["seed"] if len(seeds) == 1 else None},
        sources=tuple(dict.fromkeys(source for manifest in manifests for source in manifest.sources)),
        dropped=dict(sorted(dropped.items())),
        coverage={name: coverage[name] for name in first.coverage} if is_known else {},
        parts=tuple(infos),
        audit=None,
        **described,
    )
    write_card(root, manifest)
    write_manifest(root, manifest)
    return manifest


def _provenance(group: Sequence[Part]) -> Iterator[PartInfo]:
    """What each part was; of a part that was merged itself, its own parts."""
    start = 0
    for part in group:
        manifest = part.manifest
        for info in manifest.parts:
            yield dataclasses.replace(info, first_view=info.first_view + start)
        if not manifest.parts:
            samples, seed = manifest.totals.samples, manifest.noise["seed"]
            yield PartInfo(manifest.hash, manifest.plan_hash, samples, part.views, start, seed)
        start += part.views


def _rows(group: Sequence[Part], samples: Sequence[str]) -> Iterator[ViewRow]:
    """Views of these samples, those of a sample adjacent and numbered from 0."""
    for sample in samples:
        views = [(part, row) for part in group for row in part.rows(sample)]
        first = views[0][1]
        for number, (part, row) in enumerate(views):
            if row.prompt_tokens != first.prompt_tokens or row.x_0.tobytes() != first.x_0.tobytes():
                raise CacheMismatch(
                    f"{group[0].cache.root} and {part.cache.root}: sample {sample!r:.80} has another text or prompt in "
                    "each; they were made from different data or templates"
                )
            yield dataclasses.replace(row, view=number)


def _teacher(teachers: Sequence[TeacherInfo]) -> TeacherInfo | None:
    """One teacher under, possibly, several licences: all that were declared."""
    if not teachers:
        return None
    licences = [name for name in dict.fromkeys(teacher.licence for teacher in teachers) if name != UNKNOWN]
    doubts = tuple(dict.fromkeys(doubt for teacher in teachers for doubt in teacher.doubts))
    return dataclasses.replace(teachers[0], licence=", ".join(licences) or UNKNOWN, doubts=doubts)
