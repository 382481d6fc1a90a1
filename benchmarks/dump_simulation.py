"""A simulation: what planning, claiming, listing and finalising cost as shards and workers grow. No teacher is asked.

Hundreds of workers are simulated in one process, on a simulated clock: a shard takes five minutes, give or take a
fifth, and one worker in a hundred dies each hour, leaves its claim behind and is replaced five minutes later. Real are
the folder and all that is done in it: tide's own plan, claims, receipts, records, `tide status` and manifest, on this
machine's disk, with shards of a few bytes. So seconds are what one machine's file system and Python need for the
bookkeeping of all workers together; a network file system needs its round trips on top, and hashing real shards, by
which the manifest vouches for every byte, runs at the speed of the disk: both are not simulated.

Run: python benchmarks/dump_simulation.py [--shards 10000] [--workers 512]. Six minutes of one core, and what its disk
takes for 21,000 fsynced shards.
"""

import argparse
import dataclasses
import heapq
import itertools
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tide.shared.cache import ShardStatistics, shard_is_done, shard_name, write_receipt
from tide.shared.config import load_config
from tide.teacher_dump import claims
from tide.teacher_dump.board import Board
from tide.teacher_dump.finalize import discard_damaged, finalize
from tide.teacher_dump.pairing import Pairing
from tide.teacher_dump.plan import Plan, PlannedSample, make_plan, read_plan, write_plan
from tide.teacher_dump.status import dump_status
from tide.teacher_dump.worker import next_wait_s

SHARD_S, SPREAD, REPLACED_AFTER_S = 300.0, 0.2, 300.0
BEAT_S = 30.0
"""Between two signs of life here; tide gives them every `heartbeat_s`, 10 s, and the table counts that many."""
WHOLE_BEATS = 16
"""One sign of life in so many is given whole and timed; of the others only what other workers see: a touched claim."""
DEATHS_PER_HOUR = 0.01
SAMPLES_PER_SHARD = 64
COLUMNS = [f"column_{i}" for i in range(16)]


class Costs:
    """Seconds and calls by kind of work."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - begin
        self.calls[kind] += 1


@dataclasses.dataclass
class SimulatedWorker:
    """One worker between two events."""

    board: Board
    dies_at: float
    hand: ExitStack | None = None
    shard: int = -1
    wait_s: float = 0.0


class Simulation:
    """Events in order of simulated time until every shard has a receipt."""

    def __init__(self, root: Path, plan: Plan, num_workers: int, seed: int) -> None:
        self.root, self.plan, self.random, self.costs = root, plan, random.Random(seed), Costs()
        self.now, self.begun, self.deaths, self.worker_s = 0.0, 0, 0, 0.0
        self.numbers, self.beats = itertools.count(), itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.alive: dict[str, SimulatedWorker] = {}
        self.statistics = typical_statistics()
        for _ in range(num_workers):
            self.at(self.random.uniform(0, 60), self.join)
        self.at(BEAT_S, self.beat)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def run(self) -> None:
        while self.events and (self.alive or self.begun == 0):
            self.now, _, event = heapq.heappop(self.events)
            event()

    def join(self) -> None:
        name = f"host-{next(self.numbers)}"
        board = Board(
            self.root, self.plan.hash, self.plan.num_shards, self.plan.config.workers, worker=name,
            clock=lambda: self.now,
        )  # fmt: skip
        worker = SimulatedWorker(board, self.now + self.random.expovariate(DEATHS_PER_HOUR / 3600))
        self.alive[name] = worker
        self.next_shard(name, worker)

    def next_shard(self, name: str, worker: SimulatedWorker) -> None:
        """What Worker.step does, without the shard."""
        with self.costs.of("listing"):
            left = worker.board.left()
            free = worker.board.free(left)
        if not left:
            del self.alive[name]
            return
        worker.hand = ExitStack()
        with self.costs.of("claiming"):
            shard = worker.hand.enter_context(worker.board.take_one(free))
        if shard is None:
            worker.hand = None
            worker.wait_s = next_wait_s(worker.wait_s, worker.board.num_workers())
            self.at(self.now + worker.wait_s, lambda: self.next_shard(name, worker))
            return
        self.begun += 1
        worker.shard, worker.wait_s = shard, 0.0
        end = self.now + SHARD_S * self.random.uniform(1 - SPREAD, 1 + SPREAD)
        if worker.dies_at < end:
            self.at(worker.dies_at, lambda: self.die(name))
        else:
            self.at(end, lambda: self.finish(name, worker))

    def finish(self, name: str, worker: SimulatedWorker) -> None:
        shard = shard_name(worker.shard, self.plan.num_shards)
        (self.root / shard).write_bytes(b"%d" % worker.shard)
        with self.costs.of("receipts"):
            write_receipt(self.root, shard, shard=worker.shard, plan_hash=self.plan.hash, statistics=self.statistics)
        with self.costs.of("claiming"):
            worker.board.finished()
            assert worker.hand is not None
            worker.hand.close()
        self.next_shard(name, worker)

    def die(self, name: str) -> None:
        """The claim and the record stay."""
        dead.append(self.alive.pop(name))
        self.deaths += 1
        self.at(self.now + REPLACED_AFTER_S, self.join)

    def beat(self) -> None:
        self.worker_s += BEAT_S * len(self.alive)
        for worker in self.alive.values():
            worker.board.progress(1000)
            if next(self.beats) % WHOLE_BEATS == 0:
                with self.costs.of("signs of life"):
                    worker.board.beat()
            elif worker.board._held is not None:
                worker.board._held.renew()
        self.at(self.now + BEAT_S, self.beat)


dead: list[SimulatedWorker] = []
"""Kept, so that what they hold is not closed with them."""


def typical_statistics() -> ShardStatistics:
    """As large as those of a real shard."""
    return dataclasses.replace(
        ShardStatistics.empty(), samples=SAMPLES_PER_SHARD, rows=10 * SAMPLES_PER_SHARD, tokens=10**6,
        response_tokens=10**6, masked_positions=500_000, num_top_counts=(12345,) * 17, chunk_len_counts=(54321,) * 40,
        column_bytes=dict.fromkeys(COLUMNS, 1234567),
    )  # fmt: skip


def planned(num_shards: int) -> tuple[Plan, Pairing]:
    """The plan of some functions of the standard library, with as many made-up samples as it takes."""
    student = Path(__file__).resolve().parents[1] / "recipes" / "demo_assets" / "student"
    settings = [
        f"student.path={student}",
        "data.limit=8",
        "data.source=stdlib",
        f"shards.samples_per_shard={SAMPLES_PER_SHARD}",
    ]
    plan, pairing = make_plan(load_config(overrides=settings))
    samples = tuple(PlannedSample(0, i, f"{i:016x}", "0" * 8) for i in range(num_shards * SAMPLES_PER_SHARD))
    return dataclasses.replace(plan, samples=samples), pairing


def simulate(num_shards: int, num_workers: int, seed: int = 0) -> dict[str, float]:
    """Seconds by kind of work, and what happened."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plan, pairing = planned(num_shards)
        costs = Costs()
        with costs.of("writing the plan"):
            write_plan(root, plan)
        with costs.of("reading the plan"):
            assert read_plan(root).hash == plan.hash
        (root / "data").mkdir()
        simulation = Simulation(root, plan, num_workers, seed)
        simulation.run()
        with costs.of("status"):
            assert dump_status(root).done == num_shards
        with costs.of("asking each shard, as one round did before"):
            assert all(shard_is_done(root, shard, plan.hash) for shard in range(num_shards))
        with costs.of("one listing"):
            board = Board(root, plan.hash, num_shards, plan.config.workers)
            assert board.free(board.left()) == []
        with costs.of("looking at all shards (start)"):
            assert discard_damaged(root, plan, full=False) == []
        with costs.of("finalising"):
            assert finalize(root, plan, pairing) is not None
        redone = simulation.begun - num_shards
        assert redone <= simulation.deaths, "more was done again than one shard for each dead worker"
        dead.clear()
        ideal_s = math.ceil(num_shards / num_workers) * SHARD_S
        seconds, looks = simulation.costs.seconds, simulation.costs.calls["listing"]
        given = simulation.worker_s / plan.config.workers.heartbeat_s
        seconds["signs of life"] *= given / simulation.costs.calls["signs of life"]
        return {
            **costs.seconds, **seconds, "deaths": simulation.deaths, "redone": redone,
            "simulated hours": simulation.now / 3600, "hours / ideal": simulation.now / ideal_s,
            "looks": looks, "ms a look": 1e3 * seconds["listing"] / looks,
            "signs given": given, "ms a sign": 1e3 * seconds["signs of life"] / given,
        }  # fmt: skip


def main() -> None:
    """Three sizes: the wanted one, a tenth of its shards, an eighth of its workers."""
    numbers = itertools.count()
    claims.this_machine = lambda: f"host {next(numbers)}"  # nobody is on the machine of a claim it looks at
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=512)
    arguments = parser.parse_args()
    shards, workers = arguments.shards, arguments.workers
    sizes = [(shards, workers), (max(1, shards // 10), workers), (shards, max(1, workers // 8))]
    results = []
    for size in sizes:
        print(f"simulating {size[0]:,} shards on {size[1]:,} workers ...", file=sys.stderr)
        begin = time.perf_counter()
        results.append(simulate(*size))
        print(f"... took {time.perf_counter() - begin:.0f} s: {results[-1]}", file=sys.stderr)
    big, fewer_shards, fewer_workers = results
    heads = " | ".join(f"{num_shards:,} shards, {num:,} workers" for num_shards, num in sizes)
    print(f"| SIMULATED | {heads} | shards x10 | workers x8 |")
    print("|---" * 6 + "|")
    for name, value in big.items():
        shown = " | ".join(f"{result[name]:,.3f}".rstrip("0").rstrip(".") for result in results)
        growth = [f"x{value / other[name]:.1f}" if other[name] else "" for other in (fewer_shards, fewer_workers)]
        print(f"| {name} | {shown} | {' | '.join(growth)} |")
    kinds = ("listing", "claiming", "receipts", "signs of life")
    busy_s = sum(big[kind] for kind in kinds)
    worker_hours = big["simulated hours"] * workers
    print(f"\nbookkeeping of all workers together: {busy_s:.0f} s in {worker_hours:,.0f} worker-hours,"
          f" {busy_s / (3600 * worker_hours):.1e} of their time")  # fmt: skip
    print(f"a look at the folder, new against asking for every shard: 1 / "
          f"{big['asking each shard, as one round did before'] / big['one listing']:.0f}")  # fmt: skip
    for kind, seconds in (("listing, per look", big["listing"] / big["looks"]), ("finalising", big["finalising"])):
        print(f"{kind}: {seconds:.3f} s; under a minute: {seconds < 60}")


if __name__ == "__main__":
    main()
