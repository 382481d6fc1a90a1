"""Opening a cache that a stranger made: six checks in order, and nothing reaches training if one fails.

1. manifest: size cap, strict schema, known version, plain names, no link out of the folder;
2. size and SHA-256 of every file, and no shard or audit file that the manifest does not name;
3. footers: exact columns and types, row counts, bounds on what a file may expand to;
4. pages: checksums, then Arrow's full validation;
5. meaning: `checks.py`, counts that agree with the manifest, an audit that agrees with its shards (verify_audit.py);
6. text shown to people is printable.

Checks 3 to 5 touch Parquet and run in a child process with a memory limit (`verify_shards.py`): a file made to exhaust
memory or to crash the decoder ends the child, not this process.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CacheError, OutputError
from .files import file_inside, sha256_file
from .manifest import FileEntry, Manifest, read_manifest, sealed_json
from .receipts import AUDIT_FOLDER
from .trust import is_kept, keep_note, trust_note
from .verify_shards import check_shards, noted, raise_all

CHILD_BYTES = 2 << 30
"""Memory of the child, at most: several decoded row groups and the ids of a few million samples. What it really gets
follows from the footers (verify_shards.py): a small cache cannot ask for much."""


AuditState = Literal["none", "checked", "left out"]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked: "quick" stops after the footers and hashes nothing."""

    root: str
    mode: Literal["quick", "full"]
    manifest_hash: str
    shards: int
    rows: int
    bytes: int
    audit: AuditState


def verify_cache(
    root: str | Path, *, mode: Literal["auto", "quick", "full"] = "full", audit: bool = True,
    manifest: Manifest | None = None,
) -> VerifyReport:  # fmt: skip
    """Check a cache.

    Args:
        mode: "full": all six checks; "quick": manifest, sizes and footers; "auto": quick for a folder that was made or
            checked in full by this user on this machine and has not changed (trust.py), full for any other.
        audit: False: leave the audit files alone, whether they are there or not.
        manifest: of the folder, if it was read already: the files are compared with this one.
    Returns: its `audit` is "left out" also where all files of the audit are missing, as after `pull-cache --no-audit`.
    Raises: CacheError: the first check that fails, of all files where sizes and hashes differ; names file, row and
        field. Some files of an audit without the others are a damaged cache.
    """
    root = Path(root)
    manifest = manifest or read_manifest(root)
    note = None if mode == "quick" else trust_note(root, manifest)
    audit_here = audit_is_here(root, manifest)
    audit = audit and audit_here
    if mode == "auto":
        mode = "quick" if is_kept(note) else "full"
    damaged: list[CacheError] = []
    for entry in manifest.files(audit=audit):
        with noted(damaged):
            check_file(root, entry, full=mode == "full")
    raise_all(damaged, root)
    for name in unnamed_files(root, manifest):
        raise CacheError(f"{root / name}: the manifest does not name this file; remove it, readers would mix it in")
    if mode == "full":
        _check_in_child(root, manifest, audit=audit)
    else:
        check_shards(root, manifest, full=False, audit=audit)
    if mode == "full" and audit == audit_here:
        keep_note(note)
    totals = manifest.totals
    state = "none" if manifest.audit is None else "checked" if audit else "left out"
    return VerifyReport(str(root), mode, manifest.hash, totals.shards, totals.rows, totals.bytes, state)


def verify_before_commit(root: Path, manifest: Manifest) -> None:
    """All checks of a cache whose manifest is not written yet. Raises: CacheError: the first check that fails."""
    for entry in manifest.files():
        check_file(root, entry, full=True)
    _check_in_child(root, manifest, audit=manifest.audit is not None)


def audit_is_here(root: Path, manifest: Manifest) -> bool:
    """Is at least one file of the audit in the folder (or none named)? Otherwise it was left out as a whole."""
    files = manifest.audit.files if manifest.audit else ()
    return not files or any(os.path.lexists(root / entry.name) for entry in files)


def verify_shard(root: str | Path, shard: int) -> None:
    """Checks 3 to 6 of one shard, for a cache whose other shards are not here yet; its hash is the caller's business.

    Its audit is left alone.

    What only all shards together show (a sample in two of them, the statistics) waits for `verify_cache`.
    Raises: CacheError: the first check that fails; names file, row and field.
    """
    _check_in_child(Path(root), read_manifest(root), shard)


def check_file(root: Path, entry: FileEntry, *, full: bool) -> None:
    """Raise CacheError unless a file is there, inside the folder and of the manifest's size and, if `full`, SHA-256."""
    path = file_inside(root, entry.name)
    size = path.stat().st_size
    if size != entry.bytes:
        raise CacheError(f"{path}: {size:,} bytes, the manifest says {entry.bytes:,}; fetch it again, or dump it again")
    if full and sha256_file(path) != entry.sha256:
        raise CacheError(
            f"{path}: SHA-256 differs from the manifest's; the file is damaged or was exchanged, fetch it again"
        )


def unnamed_files(root: Path, manifest: Manifest) -> list[str]:
    """Files of `data/` and `audit/`, hidden ones excepted, that the manifest does not name."""
    named = {entry.name for entry in manifest.files()}
    folders = [name for name in ("data", AUDIT_FOLDER) if (root / name).is_dir()]
    files = [f"{name}/{path.name}" for name in folders for path in sorted((root / name).iterdir())]
    return [name for name in files if name not in named and "/." not in name]


def _check_in_child(root: Path, manifest: Manifest, shard: int | None = None, *, audit: bool = False) -> None:
    """Checks 3 to 6 in a process of their own, with `CHILD_BYTES` of memory."""
    # -P keeps the current folder, which a stranger may have filled, off the import path.
    command = [sys.executable, "-P", "-m", f"{__package__}.verify_shards", str(root.absolute()), str(CHILD_BYTES)]
    command += ["01"[audit], *([] if shard is None else [str(shard)])]
    search_path = os.pathsep.join(folder for folder in sys.path if folder)
    # One malloc arena: each further one reserves 64 MB of the address space that the child has to live in.
    malloc = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": search_path, **malloc}
    given = sealed_json(manifest.to_json())
    done = subprocess.run(command, env=environment, input=given, capture_output=True, check=False)
    try:
        answer = json.loads(done.stdout.decode().splitlines()[-1])
    except (ValueError, IndexError):
        why = signal.strsignal(-done.returncode) if done.returncode < 0 else done.stderr.decode(errors="replace")[-500:]
        raise CacheError(
            f"{root}: the process that checks the shards ended early ({why!r}); the cache may be made to exhaust "
            "memory or time, or to crash the reader. Do not use it; fetch it again from its source"
        ) from None
    if answer["error"] is not None:
        raise (OutputError if answer["kind"] == "OutputError" else CacheError)(answer["error"])
