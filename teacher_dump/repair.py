"""`tide repair-cache` with the settings of the dump: damaged shards are set aside, and just those are made again.

A shard is the same bytes whoever makes it, so the manifest that is written at the end is the one that was withdrawn.
Killed in between, the same command (or dump-teacher) continues. With another copy at hand: shared/cache/repair.py.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from ..shared.cache import Manifest, read_manifest, shard_is_done, shard_name
from ..shared.cache.manifest import MANIFEST_NAME
from ..shared.cache.receipts import audit_name, receipt_path
from ..shared.cache.repair import QUARANTINE, Damage, Quarantine, RepairReport, find_damage, require_sound
from ..shared.cache.vocabulary import VOCABULARY_NAME
from ..shared.config import RunConfig
from ..shared.errors import CacheError, CacheMismatch
from .dump import dump_teacher
from .plan import Plan, read_plan
from .worker import Report


@dataclass(frozen=True)
class SetAside:
    """A cache whose damaged parts lie in quarantine now.

    Args:
        replace: names of the files to be made again; before: the manifest that was withdrawn, if it could be read.
    """

    plan: Plan
    quarantine: Quarantine
    replace: tuple[str, ...]
    before: Manifest | None


def set_aside(config: RunConfig, root: Path) -> SetAside:
    """Move damaged shards, their receipts and, if anything has to be made again, the manifest to quarantine.

    Raises: CacheMismatch: the settings, or the manifest, are not of the plan. CacheError: no plan. OutputError.
    """
    plan, quarantine = read_plan(root).at(config, root), Quarantine(root)
    try:
        manifest = read_manifest(root)
    except CacheError:
        manifest = None
    if manifest is not None and manifest.plan_hash != plan.hash:
        raise CacheMismatch(
            f"{root / MANIFEST_NAME} was not made from the plan beside it; restore either, or dump anew"
        )
    damage = find_damage(root, manifest) if manifest else _damage_by_receipts(root, plan)
    names = [shard_name(shard, plan.num_shards) for shard in damage.shards]
    names += [audit_name(shard, plan.num_shards) for shard in damage.audits]
    names += [VOCABULARY_NAME] if damage.vocabulary else []
    if names or manifest is None:
        quarantine.take(MANIFEST_NAME)  # first: what follows is no complete cache until it is whole again
    for shard in sorted({*damage.shards, *damage.audits}):
        quarantine.take(str(receipt_path(root, shard).relative_to(root)))
    for name in (*names, *damage.unnamed):
        quarantine.take(name)
    return SetAside(plan, quarantine, tuple(names), manifest or _withdrawn(root, plan))


def make_again(
    config: RunConfig, root: Path, aside: SetAside, *, num_workers: int = 1,
    report: Report = lambda shards, tokens: None,
) -> RepairReport:  # fmt: skip
    """Ask the teacher about what was set aside, write the manifest and verify everything.

    Raises: CacheError: the result does not verify; everything `dump_teacher` raises.
    """
    manifest = dump_teacher(config, root, num_workers=num_workers, report=report)
    require_sound(root)
    same = None if aside.before is None else manifest.hash == aside.before.hash
    if same is False:
        warnings.warn(
            f"{root}: the repaired shards are sound but not the bytes they were (another machine, or another version "
            "of tide, torch or pyarrow): copies made before are another cache now",
            stacklevel=2,
        )
    quarantine = aside.quarantine
    return RepairReport(str(root), aside.replace, tuple(quarantine.moved), quarantine.path, manifest.hash, same)


def _damage_by_receipts(root: Path, plan: Plan) -> Damage:
    """Without a manifest: shards and audits whose file is there and does not agree with a receipt, byte by byte."""
    undone = [shard for shard in range(plan.num_shards) if shard_is_done(root, shard, plan.hash, full=True) is None]
    shards, audits = (
        [shard for shard in undone if (root / name(shard, plan.num_shards)).exists()]
        for name in (shard_name, audit_name)
    )
    names = [shard_name(shard, plan.num_shards) for shard in shards]
    names += [audit_name(shard, plan.num_shards) for shard in audits]
    reasons = tuple(f"{root / name}: no receipt agrees" for name in names)
    return Damage(tuple(shards), tuple(audits), False, (), reasons)


def _withdrawn(root: Path, plan: Plan) -> Manifest | None:
    """The newest manifest in quarantine that was made from this plan: of a repair that was interrupted."""
    for folder in sorted((root / QUARANTINE).glob("[0-9]*"), reverse=True):
        try:
            manifest = read_manifest(folder)
        except CacheError:
            continue
        if manifest.plan_hash == plan.hash:
            return manifest
    return None
