"""Which weights a cache was begun with: `receipts/teacher.json`, written once, by the first worker that opens them.
What was doubted about the teacher, and passed over because the user said so: `receipts/doubts.json`.

Two workers with different weights must not fill one cache. Every worker compares its checkpoint with the record before
it answers anything, and the manifest copies the fingerprint from here.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..shared.cache.files import parse_json, readable_json
from ..shared.cache.receipts import RECEIPTS_FOLDER
from ..shared.cache.store import Store, open_store
from ..shared.errors import CacheError, CacheMismatch, DataError
from ..shared.file_hashes import file_sha256

RECORD_NAME = f"{RECEIPTS_FOLDER}/teacher.json"
DOUBTS_NAME = f"{RECEIPTS_FOLDER}/doubts.json"
MAX_RECORD_BYTES = 1 << 16


def weight_fingerprint(folder: Path) -> str:
    """SHA-256 over name and SHA-256 of every file that the weights are loaded from, so over every byte of them.

    Each file is hashed once on a machine and remembered (file_hashes.py).

    Raises: DataError: as `weight_files`, and a file that cannot be read.
    """
    from ..shared.models.weight_files import weight_files  # torch comes along, and `tide status` needs none

    digest = hashlib.sha256()
    for file in weight_files(folder):
        try:
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error}); check its permissions, or fetch it again") from error
    return digest.hexdigest()


def require_same_weights(root: Path | Store, folder: Path) -> None:
    """Compare a checkpoint with the record; the first worker writes it.

    Raises: CacheMismatch: these are not the weights that earlier shards were made with. CacheError: the record is
        damaged.
    """
    fingerprint = weight_fingerprint(folder)
    store = open_store(root)
    store.write_once(RECORD_NAME, readable_json({"weight_fingerprint": fingerprint}))
    recorded = recorded_fingerprint(store)
    if recorded != fingerprint:
        raise CacheMismatch(
            f"{folder}: its weights ({fingerprint[:12]}) are not those this cache was begun with ({recorded[:12]}, "
            f"{store.path(RECORD_NAME)}). Use the same checkpoint, or another --out."
        )


def record_doubts(root: Path | Store, doubts: Sequence[str]) -> None:
    """Keep doubts that did not end the dump, for the manifest; the first worker's words count."""
    if doubts:
        open_store(root).write_once(DOUBTS_NAME, readable_json(list(doubts)))


def recorded_doubts(root: Path | Store) -> tuple[str, ...]:
    """What `record_doubts` kept; () where nothing was doubted."""
    store = open_store(root)
    try:
        data = store.read(DOUBTS_NAME, max_bytes=MAX_RECORD_BYTES)
    except FileNotFoundError:
        return ()
    found = parse_json(data, store.path(DOUBTS_NAME), max_bytes=MAX_RECORD_BYTES)
    return tuple(str(doubt) for doubt in found) if isinstance(found, list) else ()


def recorded_fingerprint(root: Path | Store) -> str:
    """The fingerprint that this cache was begun with.

    Raises: CacheError: the record is missing or damaged.
    """
    store = open_store(root)
    path = store.path(RECORD_NAME)
    try:
        data = store.read(RECORD_NAME, max_bytes=MAX_RECORD_BYTES)
        return str(parse_json(data, path, max_bytes=MAX_RECORD_BYTES)["weight_fingerprint"])
    except (FileNotFoundError, KeyError, TypeError, CacheError) as error:
        raise CacheError(
            f"{path}: missing or damaged, so which weights made the finished shards is not known. Restore it, or "
            f"remove the folder {store.path(RECEIPTS_FOLDER)} to ask the teacher again about every shard."
        ) from error
