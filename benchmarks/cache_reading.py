"""How fast a cache is decoded, and that memory stays flat while a hundred times as much streams through.

Synthetic views (V = 151,936, k = 16, values in steps of 1/16 nat) are written by tide's own writer as one shard and as
a hundred. Each cache is then read from start to end in a process of its own, one thread, every row touched: positions a
second of computing, and the peak memory of the process, libraries included.

Run: python benchmarks/cache_reading.py [--rows 120] [--codec compact]. Minutes on one core, most of them for writing.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from tide.shared.cache import Layout, Manifest, ViewRow, open_cache, shard_name, write_manifest, write_receipt
from tide.shared.cache.manifest import DataSource, SignalInfo, StudentInfo, TeacherInfo, manifest_parts
from tide.shared.cache.schema import SCHEMA_VERSION
from tide.shared.cache.writer import write_shard

sys.path.insert(0, str(Path(__file__).parent))
from student_step import BLOCK, TEMPERATURES, TOP_K, synthetic_view

VOCAB, LENGTH, SHARDS = 151_936, 512, 100
LAYOUTS = {
    "plain": Layout("topk", VOCAB, BLOCK, TOP_K, TEMPERATURES, "float16", 1 / 16),
    "compact": Layout(
        "topk", VOCAB, BLOCK, TOP_K, TEMPERATURES, "float16", 1 / 16, codec="compact", frequent_ids=tuple(range(4096))
    ),
}


def rows_of(shard: int, num_rows: int) -> Iterator[ViewRow]:
    """Views whose times are spread over (0, 1], each a sample of its own."""
    for number in range(shard * num_rows, (shard + 1) * num_rows):
        row = synthetic_view(number, LENGTH, VOCAB, (number % num_rows + 1) / num_rows)
        yield dataclasses.replace(row, chunk_logp=row.chunk_logp.clip(max=-0.5))


def make_cache(root: Path, num_shards: int, num_rows: int, layout: Layout) -> None:
    """A complete cache."""
    receipts = []
    for shard in range(num_shards):
        name = shard_name(shard, num_shards)
        statistics = write_shard(root / name, rows_of(shard, num_rows), layout, plan_hash="0", shard=shard)
        receipts.append(write_receipt(root, name, shard=shard, plan_hash="0", statistics=statistics))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, tide_version="0", plan_hash="0",
        signal=SignalInfo(
            "topk", layout.codec, "float16", 1 / 16, TOP_K, 0.0, TEMPERATURES, "all", {}, layout.frequent_ids
        ),
        teacher=TeacherInfo("none", "0", "0", "float32", None, "0", "0", "mit", {}),
        student=StudentInfo("0", "0", VOCAB, VOCAB - 1, 0), block_size=BLOCK, noise={"seed": 0, "views": 1},
        sources=(DataSource("synthetic", "0", "mit"),), vocabulary=None, dropped={}, **manifest_parts(receipts),
    )  # fmt: skip
    write_manifest(root, manifest)


def read(root: str, answer: Connection) -> None:
    """Every row of a cache; sends masked positions, seconds of computing and the peak memory of this process."""
    cache = open_cache(root, verify=False)
    begin, positions = time.process_time(), 0
    for row in cache:
        positions += int(row.masked.sum())
        row.top_logp.sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.send((positions, time.process_time() - begin, peak))


def in_child(root: Path) -> tuple[int, float, int]:
    receive, send = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=read, args=(str(root), send))
    process.start()
    found = receive.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help="views of a shard")
    parser.add_argument("--codec", choices=sorted(LAYOUTS), default="plain")
    arguments = parser.parse_args()
    num_rows, layout = arguments.rows, LAYOUTS[arguments.codec]
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        for num_shards in (1, SHARDS):
            root = Path(temporary) / str(num_shards)
            make_cache(root, num_shards, num_rows, layout)
            positions, seconds, peak = in_child(root)
            peaks.append(peak)
            size = sum(file.stat().st_size for file in (root / "data").iterdir())
            print(
                f"{num_shards:>3} shards, {size / 1e6:.1f} MB, {positions:,} positions: "
                f"{positions / seconds / 1e6:.2f} million a second, peak {peak / 2**20:.0f} MiB"
            )
    print(f"peak of {SHARDS} shards against that of one: {peaks[1] / max(1, peaks[0]):.2f}x")


if __name__ == "__main__":
    main()
