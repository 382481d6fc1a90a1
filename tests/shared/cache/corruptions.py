"""Random damage to caches, in a process of its own: `python corruptions.py ROOT WHERE FIRST COUNT HASHES`: JSON lines.

Number n of FIRST, FIRST + 1, ... decides the damage alone (numpy generator of seed n): flipped bits in the pages or
the footer of a shard, in the manifest, the vocabulary; truncations; shards swapped, missing, duplicated, extra; rows
moved between shards; a shard of another plan. WHERE is data or audit: which files are damaged. The folder ROOT holds
`cache`, `other` (the same rows under another plan) and `moved` (one sample moved from shard 0 to shard 1); for an
audit, `cache` alone. HASHES = 1: as `verify_cache` does it, checks 3 to 6 in this process; 0: file sizes and SHA-256
are believed, so that the deeper checks have to find it, and what passes is compared with the sound rows. A line holds
number, damage, message and result: "refused", "harmless", "unnoticed" or "unnamed".
"""

import hashlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tide.shared.cache import open_cache, read_manifest
from tide.shared.cache.audit import read_audit_group
from tide.shared.cache.manifest import Manifest
from tide.shared.cache.verify import check_file, unnamed_files
from tide.shared.cache.verify_shards import check_shards
from tide.shared.errors import CacheError, OutputError

MEMORY = 1 << 30


class Where:
    """The folder whose files are damaged."""

    folder = "data"


def shards(root: Path) -> list[Path]:
    """The files that are damaged, in order."""
    return sorted((root / Where.folder).glob("*.parquet"))


def _flip(path: Path, rng: np.random.Generator, start: int, end: int) -> str:
    data = bytearray(path.read_bytes())
    end = end if end > 0 else len(data) + end
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        data[int(rng.integers(start, end))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path.name


def _footer_start(path: Path) -> int:
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def pages(root: Path, rng: np.random.Generator) -> str:
    """Bits between the magic number and the footer."""
    path = shards(root)[int(rng.integers(len(shards(root))))]
    return _flip(path, rng, 4, _footer_start(path))


def footers(root: Path, rng: np.random.Generator) -> str:
    """Bits of the footer, its length and the last magic number."""
    path = shards(root)[int(rng.integers(len(shards(root))))]
    return _flip(path, rng, _footer_start(path), 0)


def bytes_of_footers(root: Path, rng: np.random.Generator) -> str:
    """Some bytes of the footer replaced by others."""
    path = shards(root)[int(rng.integers(len(shards(root))))]
    data, start = bytearray(path.read_bytes()), _footer_start(path)
    place, size = int(rng.integers(start, len(data) - 8)), int(rng.integers(1, 9))
    data[place : place + size] = rng.bytes(len(data[place : place + size]))
    path.write_bytes(data)
    return path.name


def manifest_bits(root: Path, rng: np.random.Generator) -> str:
    """Bits of the manifest."""
    return _flip(root / "manifest.json", rng, 0, 0)


def vocabulary_bits(root: Path, rng: np.random.Generator) -> str:
    """Bits of the vocabulary."""
    return _flip(root / "vocabulary.parquet", rng, 0, 0)


def truncation(root: Path, rng: np.random.Generator) -> str:
    """A shard, the vocabulary or the manifest cut anywhere."""
    others = [root / "vocabulary.parquet", root / "manifest.json"] if Where.folder == "data" else []
    paths = [*shards(root), *others]
    path = paths[int(rng.integers(len(paths)))]
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size - 1))])
    return path.name


def swapped(root: Path, rng: np.random.Generator) -> str:
    """Two shards under each other's names."""
    a, b = (shards(root)[i] for i in rng.permutation(len(shards(root)))[:2])
    a.rename(root / "x")
    b.rename(a)
    (root / "x").rename(b)
    return min(a.name, b.name)


def missing(root: Path, rng: np.random.Generator) -> str:
    """A shard less."""
    path = shards(root)[int(rng.integers(len(shards(root))))]
    path.unlink()
    return path.name


def duplicated(root: Path, rng: np.random.Generator) -> str:
    """One shard in the place of another."""
    a, b = (shards(root)[i] for i in rng.permutation(len(shards(root)))[:2])
    shutil.copy(a, b)
    return b.name


def extra(root: Path, rng: np.random.Generator) -> str:
    """A shard too many."""
    path = shards(root)[0].with_name(f"views-{int(rng.integers(3, 99)):05d}-of-00099.parquet")
    shutil.copy(shards(root)[0], path)
    return path.name


def of_another_plan(root: Path, rng: np.random.Generator) -> str:
    """A shard of the same rows, made under another plan."""
    path = shards(root)[int(rng.integers(len(shards(root))))]
    shutil.copy(root.parent / "other" / "data" / path.name, path)
    return path.name


def moved_rows(root: Path, rng: np.random.Generator) -> str:
    """A sample that went from shard 0 to shard 1; one of them or both exchanged."""
    chosen = shards(root)[:2] if rng.integers(2) else [shards(root)[int(rng.integers(2))]]
    for path in chosen:
        shutil.copy(root.parent / "moved" / "data" / path.name, path)
    return chosen[0].name


DAMAGES: list[tuple[Callable[[Path, np.random.Generator], str], int]] = [
    (pages, 5), (footers, 4), (bytes_of_footers, 1), (manifest_bits, 3), (vocabulary_bits, 1), (truncation, 2),
    (swapped, 1), (missing, 1), (duplicated, 1), (extra, 1), (of_another_plan, 1), (moved_rows, 1),
]  # fmt: skip
OF_AUDITS = [
    (pages, 5), (footers, 4), (bytes_of_footers, 2), (truncation, 2), (swapped, 1), (missing, 1),
    (duplicated, 1), (extra, 1),
]  # fmt: skip


def check(root: Path, *, hashes: bool) -> Manifest:
    """The checks of `verify_cache`, with the manifest's word taken for hashes and sizes or not. Raises: CacheError."""
    manifest = read_manifest(root)
    if hashes:
        for entry in manifest.files():
            check_file(root, entry, full=True)
    for name in unnamed_files(root, manifest):
        raise CacheError(f"{name}: the manifest does not name this file")
    check_shards(root, manifest, full=True, audit=True)
    return manifest


def contents(root: Path) -> str:
    """A digest of everything a reader gets: all rows, audited ones too, the vocabulary, the manifest."""
    digest, cache = hashlib.sha256(), open_cache(root, verify=False)
    for row in cache:
        for value in vars(row).values():
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    for entry in cache.manifest.audit.files if cache.manifest.audit else ():
        with pq.ParquetFile(root / entry.name) as file:
            for group in range(file.num_row_groups):
                read_audit_group(file, group, where=entry.name, first_row=0).update_digest(digest)
    vocabulary = cache.vocabulary()
    digest.update(repr(vocabulary.token_bytes).encode() + vocabulary.teacher_id.tobytes())
    return digest.hexdigest() + cache.manifest.hash


def attempt(folder: Path, number: int, sound: str, *, hashes: bool) -> dict[str, object]:
    """Damage a fresh copy and look whether it is found."""
    root, rng = folder / "damaged", np.random.default_rng(number)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folder / "cache", root)
    damages = DAMAGES if Where.folder == "data" else OF_AUDITS
    weights = np.array([weight for _, weight in damages], float)
    damage = damages[int(rng.choice(len(damages), p=weights / weights.sum()))][0]
    name = damage(root, rng)
    try:
        check(root, hashes=hashes)
    except (CacheError, OutputError) as error:
        result, said = "refused", str(error)
        if not any(text in said for text in (name, "manifest.json", "views-", "audit-")):
            result = "unnamed"
    else:
        result, said = "harmless" if contents(root) == sound else "unnoticed", ""
    return {"number": number, "damage": damage.__name__, "result": result, "said": said[:300]}


def main(folder: str, where: str, first: str, count: str, hashes: str) -> None:
    """Try damages FIRST to FIRST + COUNT - 1."""
    Where.folder = where
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sound = contents(Path(folder) / "cache")
    for number in range(int(first), int(first) + int(count)):
        sys.stdout.write(json.dumps({"number": number}) + "\n")  # so that a crash has a number
        sys.stdout.write(json.dumps(attempt(Path(folder), number, sound, hashes=hashes == "1")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
