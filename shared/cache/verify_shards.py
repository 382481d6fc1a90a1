"""Checks 3 to 6 of a cache: footers, pages, meaning. Also a program.

`python -m tide.shared.cache.verify_shards ROOT BYTES AUDIT [SHARD]` limits its own memory to what the footers call for,
at most BYTES above what it starts with, its time to what that many bytes may take, checks all shards or the one of that
number, with their audit if AUDIT is 1, and prints one line of JSON:
{"kind": name of the error or null, "error": its message or null}. The manifest comes on standard input: what is checked
is what whoever asks has read. It imports numpy and pyarrow, and no torch.
"""

import contextlib
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..bounded import address_space, limit
from ..errors import CacheError, TideError
from .batch import RowBatch, rounded
from .checks import SampleOrder, check_batch
from .files import file_inside, pinned_parquet
from .footers import check_parquet_footer, written_schema
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, manifest_from_bytes
from .schema import Layout, arrow_schema, parquet_options, shard_metadata
from .statistics import WRITER_ONLY, ShardStatistics, batch_statistics, leaf_bytes, merge
from .table import read_group
from .verify_audit import AuditCheck, check_audit_footer
from .vocabulary import read_vocabulary

FOOTER_MEMORY = 96 << 20
"""Bytes the child may take for footers, and for pages besides the two below."""
MEMORY_PER_GROUP_BYTE = 8
"""Measured: an empty cache takes 55 MB of address space, each uncompressed byte of a row group up to 6 more."""
MEMORY_PER_SAMPLE = 400
CPU_S, CPU_S_PER_MB = 10, 2
"""Seconds the child may compute, and per megabyte of shards; it does 10 MB a second here."""


def check_shards(root: Path, manifest: Manifest, *, full: bool, audit: bool = True) -> None:
    """Check every shard's footer and, if `full`, its pages and their meaning.

    Args: audit: check the audit files as well.
    Raises: CacheError: the first check that fails; names shard, row and field.
    """
    check_footers(root, manifest, audit=audit, full=full)
    if full:
        check_contents(root, manifest, audit=audit)


def check_footers(root: Path, manifest: Manifest, *, audit: bool = True, full: bool = True) -> int:
    """Check 3, for every file, and if `full` that its bytes are still those that the manifest names.

    Returns: uncompressed bytes of the largest row group. Raises: CacheError.
    """
    largest, damaged = 0, list[CacheError]()
    for shard in range(len(manifest.shards)):
        with noted(damaged):
            largest = max(largest, check_footer(root, manifest, shard, full=full))
    for shard in manifest.audit_of if audit else ():
        with noted(damaged):
            largest = max(largest, check_audit_footer(root, manifest, shard, full=full))
    raise_all(damaged, root)
    return largest


@contextlib.contextmanager
def noted(damaged: list[CacheError]) -> Iterator[None]:
    """What is wrong with one file is kept for `raise_all`, so that the others are looked at as well."""
    try:
        yield
    except CacheError as error:
        damaged.append(error)


def raise_all(damaged: list[CacheError], root: Path) -> None:
    """Raises: CacheError: there are any; says all of them, and the command that repairs."""
    if damaged:
        raise CacheError(
            f"{'; '.join(map(str, damaged))}. To repair: tide repair-cache {root} --from COPY (a folder or a data set "
            f"of the Hub that holds the same cache), or tide repair-cache {root} with the options of its dump-teacher "
            "command"
        )


def check_contents(root: Path, manifest: Manifest, *, audit: bool = True) -> None:
    """Checks 4 and 5, for every file. Raises: CacheError."""
    order, statistics = SampleOrder(), []
    support = None
    if manifest.vocabulary is not None:
        vocabulary, limit = read_vocabulary(root, manifest.vocabulary.sha256), manifest.student.vocab_size
        num_tokens = len(vocabulary.token_bytes)
        if num_tokens > limit:
            raise CacheError(f"{root / manifest.vocabulary.name}: {num_tokens:,} tokens, the manifest says {limit:,}")
        support = np.flatnonzero(vocabulary.teacher_id >= 0)
        del vocabulary
    for shard in range(len(manifest.shards)):
        watch = None
        if audit and support is not None and manifest.audit is not None:
            watch = AuditCheck(root, manifest, shard, support)
        statistics.append(check_pages(root, manifest, shard, order, watch))
        order.last = None  # a sample never continues in the next shard
    _check_statistics(root, manifest.statistics, merge(statistics))


def check_footer(root: Path, manifest: Manifest, shard: int, *, full: bool = True) -> int:
    """Check 3 of one shard, as in `check_footers`; uncompressed bytes of its largest row group."""
    entry, layout = manifest.shards[shard], manifest.layout
    path = file_inside(root, entry.name)
    with pinned_parquet(path, entry.sha256 if full else None) as file:
        return check_parquet_footer(
            file, path, expected=written_schema(arrow_schema(layout), parquet_options(layout)), entry=entry,
            metadata=shard_metadata(manifest.plan_hash, shard),
            values_per_row={column.leaf: 1 for column in layout.columns if column.encoding == "scalar"},
        )  # fmt: skip


def check_pages(
    root: Path, manifest: Manifest, shard: int, order: SampleOrder, audit: AuditCheck | None = None
) -> ShardStatistics:
    """Checks 4 and 5 of one shard and, with `audit`, of its audit; its statistics as they should be in the manifest."""
    entry, layout = manifest.shards[shard], manifest.layout
    path = file_inside(root, entry.name)
    found, first_row = ShardStatistics.empty(), 0
    with pinned_parquet(path, entry.sha256) as file:
        for group in range(file.num_row_groups):
            batch = read_group(file, group, layout, where=str(path), first_row=first_row, full=True)
            num_samples = len(order.seen)
            check_batch(batch, layout, order)
            _check_precision(batch, layout)
            if audit is not None:
                audit.compare(batch)
            found = found + batch_statistics(batch, len(order.seen) - num_samples)
            first_row += len(batch)
        column_bytes = leaf_bytes(file.metadata, layout)
    if audit is not None:
        audit.finish()
    if found.masked_positions != entry.masked_positions:
        raise CacheError(
            f"{path}: {found.masked_positions:,} masked positions, the manifest says {entry.masked_positions:,}"
        )
    return dataclasses.replace(found, column_bytes=column_bytes)


def _check_precision(batch: RowBatch, layout: Layout) -> None:
    """Values of a float16 cache are float16 numbers, and so on: what the manifest says about precision is true."""
    for name in ("chunk_logp", "top_logp"):
        column = batch.lists.get(name)
        if column is None:
            continue
        step = layout.logp_step if name == "top_logp" else None
        kind = f"{layout.logp_dtype} number" if step is None else f"multiple of {step}"
        said = f"is not a {kind} as the manifest says"
        batch.refuse(
            column.values != rounded(column.values, layout, name), name,
            lambda index, values=column.values, said=said: f"{values[index]} {said}", column,
        )  # fmt: skip


def _check_statistics(root: Path, claimed: ShardStatistics, found: ShardStatistics) -> None:
    for field in dataclasses.fields(ShardStatistics):
        if field.name in WRITER_ONLY:
            continue
        ours, theirs = getattr(found, field.name), getattr(claimed, field.name)
        same = ours == theirs
        if not same and field.type in (float, tuple[float, ...]):  # exp differs in the last bits between machines
            pairs = zip_longest(np.ravel(ours), np.ravel(theirs), fillvalue=math.nan)
            same = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in pairs)
        if not same:
            raise CacheError(
                f"{root}/manifest.json: statistics.{field.name} is {theirs!r:.80}, the shards give {ours!r:.80}"
            )


def main(root: str, more_bytes: str, with_audit: str = "1", shard: str | None = None) -> None:
    """Run the full checks under limits of memory and time, and print the answer."""
    answer: dict[str, str | None] = {"kind": None, "error": None}
    base, most, audit = address_space(), int(more_bytes), with_audit == "1"

    def limit_memory(num_bytes: int) -> None:
        if base:
            limit(resource.RLIMIT_AS, base + min(most, num_bytes))

    try:
        data = sys.stdin.buffer.read(MAX_MANIFEST_BYTES + 1)
        manifest = manifest_from_bytes(data, str(Path(root) / MANIFEST_NAME))
        num_bytes = sum(entry.bytes for entry in manifest.files(audit=audit))
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_CPU, int(time.process_time() + CPU_S + CPU_S_PER_MB * num_bytes / 1e6) + 1)
        limit_memory(FOOTER_MEMORY)
        if shard is None:
            largest = check_footers(Path(root), manifest, audit=audit)
        else:
            largest = check_footer(Path(root), manifest, int(shard))
        samples = min(manifest.totals.samples, manifest.totals.bytes)  # distinct ids take a byte each, at least
        limit_memory(FOOTER_MEMORY + MEMORY_PER_GROUP_BYTE * largest + MEMORY_PER_SAMPLE * samples)
        if shard is None:
            check_contents(Path(root), manifest, audit=audit)
        else:
            check_pages(Path(root), manifest, int(shard), SampleOrder())
    except (MemoryError, pa.ArrowMemoryError):
        answer = {"kind": "CacheError", "error": f"{root}: needs more memory than its size explains; refused"}
    except TideError as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
