"""The commit of a cache: all receipts -> vocabulary.parquet, README.md and, last, manifest.json.

A pure function of the plan and the receipts, so whoever finishes last may run it, and running it twice is harmless. The
manifest vouches for every byte, so each shard's SHA-256 is compared with its receipt before it is written. In an object
store its size is: the store compared the bytes when they arrived, and to fetch them all again would take hours.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

from .. import __version__
from ..shared.cache import Manifest, shard_is_done, write_manifest, write_vocabulary
from ..shared.cache.card import CARD_NAME, write_card
from ..shared.cache.codec_error import summary as codec_error_summary
from ..shared.cache.files import leftover_owner
from ..shared.cache.manifest import (
    MANIFEST_NAME,
    AuditInfo,
    DataSource,
    SignalInfo,
    StudentInfo,
    TeacherInfo,
    audit_entries,
    file_entry,
    manifest_parts,
)
from ..shared.cache.manifest_fields import UNKNOWN
from ..shared.cache.receipts import (
    AUDIT_FOLDER,
    RECEIPTS_FOLDER,
    SHARD_FOLDER,
    Receipt,
    listed_receipts,
    listed_sizes,
    receipt_name,
)
from ..shared.cache.schema import SCHEMA_VERSION
from ..shared.cache.statistics import ShardStatistics
from ..shared.cache.store import Store, open_store
from ..shared.cache.trust import keep_note, made_by_others, trust_note
from ..shared.cache.verify import verify_before_commit
from ..shared.cache.vocabulary import VOCABULARY_NAME
from ..shared.errors import CacheError, DataError
from .claims import CLAIMS_NAME, is_alive
from .pairing import Pairing, open_pairing
from .plan import Plan
from .weights_record import recorded_doubts, recorded_fingerprint
from .worker_records import remove_records

MAX_THREADS = 32
"""That read receipts and hash shards: both wait for the file system most of the time."""


def finalize(
    root: Path | Store, plan: Plan, pairing: Pairing | None = None, *, progress: Callable[[], None] = lambda: None
) -> Manifest | None:
    """Check every shard and write everything that follows from them; the manifest last.

    Args: pairing: that of the plan, if it is open already. progress: called after each shard.
    Returns: None: not every shard is whole. The receipts of damaged ones are gone now: do these shards again.
    Raises: CacheError: which weights made the shards is not known. DataError: not one sample is left. OutputError.
    """
    store = open_store(root)
    receipts, damaged = _whole_shards(store, plan, full=store.is_folder, progress=progress)
    if damaged or len(receipts) < plan.num_shards:
        return None
    pairing = pairing or open_pairing(plan.config, teacher_revision=(plan.teacher or {}).get("revision"))
    parts, dropped = manifest_parts(receipts), Counter(plan.dropped)
    for receipt in receipts:
        dropped.update(receipt.left_out)
    if not parts["totals"].rows:
        store.remove(*map(receipt_name, range(plan.num_shards)))
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"{store}: every one of the {len(plan.samples):,} planned samples was left out ({reasons}): a cache of "
            "nothing is not written. Run the same command without --skip-bad to see the first cause, mend it, and run "
            "it again"
        )
    root, share = store.folder, plan.config.signal.audit_share if plan.signal_kind == "topk" else 0.0
    write_vocabulary(root, pairing.student.token_bytes, pairing.teacher_id())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tide_version=__version__,
        plan_hash=plan.hash,
        signal=_signal(plan, pairing.num_support if plan.signal_kind == "topk" else 0, parts["statistics"]),
        teacher=_teacher(store, plan),
        student=StudentInfo(
            tokenizer_fingerprint=plan.student["tokenizer"], chat_template_fingerprint=plan.student["chat_template"],
            vocab_size=plan.student["vocab_size"], mask_id=plan.student["mask_id"], eos_id=plan.student["eos_id"],
        ),
        block_size=plan.config.student.block_size,
        noise=asdict(plan.config.noise),
        sources=tuple(
            DataSource(s.title, s.revision or UNKNOWN, plan.config.data.licence or s.licence or UNKNOWN)
            for s in plan.sources
        ),
        vocabulary=file_entry(root, VOCABULARY_NAME),
        dropped=dict(sorted(dropped.items())),
        audit=AuditInfo(share, pairing.num_support, audit_entries(receipts)) if share else None,
        coverage=dict(plan.coverage),
        **parts,
    )  # fmt: skip
    note = trust_note(root, manifest)  # every shard was hashed above, and read back when it was written
    others = made_by_others(plan.hash, receipts)
    if store.is_folder and (others or note is None):
        _check_the_work_of_others(root, manifest, others)
    write_card(root, manifest)
    store.publish([VOCABULARY_NAME, CARD_NAME])
    write_manifest(root, manifest)
    store.publish([MANIFEST_NAME])
    keep_note(note)
    return manifest


def discard_damaged(root: Path | Store, plan: Plan, *, full: bool) -> list[int]:
    """Forget the receipts of shards that are missing or damaged, so that they are done again; says so in a warning.

    Args: full: compare every byte's hash; otherwise names and sizes.
    Returns: numbers of these shards.
    """
    return _whole_shards(open_store(root), plan, full=full)[1]


def _whole_shards(
    store: Store, plan: Plan, *, full: bool, progress: Callable[[], None] = lambda: None
) -> tuple[list[Receipt], list[int]]:
    """Receipts of the shards that are whole, in order; numbers of those whose receipt was not to be believed, and is
    gone now.
    """
    sizes = None if store.is_folder else listed_sizes(store)

    def looked_at(shard: int) -> Receipt | None:
        receipt = shard_is_done(store, shard, plan.hash, full=full, sizes=sizes)
        progress()
        return receipt

    listed = sorted(shard for shard in listed_receipts(store) if shard < plan.num_shards)
    num_threads = MAX_THREADS if sizes is not None else min(MAX_THREADS, 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads) as threads:
        found = list(threads.map(looked_at, listed))
    damaged = [shard for shard, receipt in zip(listed, found, strict=True) if receipt is None]
    store.remove(*map(receipt_name, damaged))
    if damaged:
        warnings.warn(f"{store}: shards {_names(damaged)} are missing or damaged and are made again", stacklevel=3)
    return [receipt for receipt in found if receipt is not None], damaged


def _check_the_work_of_others(root: Path, manifest: Manifest, others: list[int]) -> None:
    """Somebody else may have left a shard and a receipt that fits it: neither is evidence of what the shard means."""
    whose = f"Shards {_names(others)} were" if others else "A shard was"
    try:
        verify_before_commit(root, manifest)
    except CacheError as error:
        raise CacheError(
            f"{error} (The manifest was not written. {whose} not made by this user's dump, or others may "
            "write this folder: remove what is wrong from data/ and its receipt from receipts/, run the same command "
            "again, and it is made anew)"
        ) from error


def _names(shards: Sequence[int]) -> str:
    return ", ".join(map(str, shards[:8])) + (" ..." if len(shards) > 8 else "")


def tidy(root: Path | Store) -> None:
    """Remove what workers left behind: claims, records, and temporary files of processes that are dead."""
    store = open_store(root)
    store.remove_folder(CLAIMS_NAME)  # nobody needs them any more
    remove_records(store)
    if not store.is_folder:
        return
    for folder in ("", SHARD_FOLDER, AUDIT_FOLDER, RECEIPTS_FOLDER):
        for name in store.names(folder):
            owner = leftover_owner(name)
            if owner is not None and not is_alive(owner):
                store.remove(f"{folder}/{name}".lstrip("/"))


def _signal(plan: Plan, num_support: int, statistics: ShardStatistics) -> SignalInfo:
    signal, layout = plan.config.signal, plan.layout
    error = codec_error_summary(
        statistics.codec_kl, statistics.codec_kl_counts, statistics.targets, layout.temperatures
    )
    of_layout = {f.name: getattr(layout, f.name) for f in fields(SignalInfo) if hasattr(layout, f.name)}
    return SignalInfo(
        kind=layout.signal, min_probability=signal.min_probability, support=f"{signal.support}: {num_support} tokens",
        codec_error=error, alignment=(plan.teacher or {}).get("alignment"), **of_layout,
    )  # fmt: skip


def _teacher(store: Store, plan: Plan) -> TeacherInfo | None:
    if plan.teacher is None:
        return None
    config = plan.config.teacher
    return TeacherInfo(
        id=plan.settings["teacher"]["path"], revision=plan.teacher["revision"] or config.revision or UNKNOWN,
        weight_fingerprint=recorded_fingerprint(store), dtype=config.dtype, quantization=config.quantization,
        tokenizer_fingerprint=plan.teacher["tokenizer"],
        chat_template_fingerprint=plan.teacher["chat_template"], licence=plan.teacher_licence or UNKNOWN,
        spec=plan.teacher["spec"], doubts=recorded_doubts(store),
    )  # fmt: skip
