"""Which weights a cache was begun with: `receipts/teacher.json`, written once, by the first worker that opens them.
What was doubted about the teacher, and passed over because the user said so: `receipts/doubts.json`.

Two workers with different weights must not fill one cache. Every worker compares its checkpoint with the record before
it answers anything, and the manifest copies the fingerprint from here.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..shared.cache.files import parse_json, readable_json
from ..shared.cache.receipts import RECEIPTS_FOLDER
from ..shared.cache.store import Store, open_store
from ..shared.errors import CacheError, CacheMismatch

RECORD_NAME = f"{RECEIPTS_FOLDER}/teacher.json"
DOUBTS_NAME = f"{RECEIPTS_FOLDER}/doubts.json"
MAX_RECORD_BYTES = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 1024


def weight_fingerprint(folder: Path) -> str:
    """SHA-256 over every weight file's name, size, header and 64 evenly spaced samples of 64 KiB.

    A file of up to 4 MiB is read in full. Hashing 32 GB on every worker is not needed to tell two checkpoints apart.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            header_bytes = min(int.from_bytes(stream.read(8), "little"), size)
            digest.update(stream.read(header_bytes))
            for offset in np.linspace(8 + header_bytes, size, num=_SAMPLES, endpoint=False, dtype=np.int64):
                stream.seek(int(offset))
                digest.update(stream.read(_SAMPLE_BYTES))
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
