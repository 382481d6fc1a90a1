"""Students to be compared: jobs (arm x seed) -> trained and scored, each in a process of its own, one folder for each.

    <out>/runs/<arm>-<seed>-<key>/   student/, metrics.jsonl, and heldout.json once the student is scored

The key is a hash of everything that changes a score: the same job again, under whatever name, is only read, and one
that was interrupted continues from its checkpoint. A job that fails leaves the others alone.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..shared.cache import Cache, open_cache, read_manifest
from ..shared.cache.files import atomic_write, canonical_json, output_errors, readable_json, sha256_bytes
from ..shared.config import RunConfig
from ..shared.errors import TideError, TryAgain
from ..shared.models.loading import load_model
from ..shared.stop_signals import noted_signals
from .checkpoint import remove_checkpoints
from .heldout import T_GRID, evaluate_heldout
from .open_student import open_encoder
from .processes import own_device
from .trainer import run_identity, train_student

SCORES_NAME = "heldout.json"
RUNS_NAME = "runs"
_KEY_CHARS = 12
_START_METHOD = "forkserver"
"""One process imports torch, and a job's process is forked from it; it never touches a device, so CUDA is safe."""

Scores = Mapping[str, Any]
"""What `heldout.json` holds: `t`, `bits_per_byte` and `accuracy` at each of them, and `documents`, the bits per byte of
each document over all t (None: it was never masked)."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One student: the losses and settings of an arm, with a seed, from a cache.

    Args: config: `train.seed` is the seed. cache, heldout: folders or hub ids.
    """

    arm: str
    config: RunConfig
    cache: str
    heldout: str

    @property
    def seed(self) -> int:
        """Of order, noise and random weights."""
        return self.config.train.seed

    @cached_property
    def key(self) -> str:
        """Hash of what changes a score: training, both caches, and the questions asked in the end."""
        settings = run_identity(self.config, described(self.cache))
        questions = {"heldout": described(self.heldout).manifest.hash, "t": list(T_GRID)}
        return sha256_bytes(canonical_json({"settings": settings, "questions": questions}))[:_KEY_CHARS]

    def folder(self, out: Path) -> Path:
        """Where it lies or will lie below `out`."""
        there = sorted((out / RUNS_NAME).glob(f"*-{self.key}"))
        return there[0] if there else out / RUNS_NAME / f"{self.arm}-{self.seed}-{self.key}"

    def scores(self, out: Path) -> Scores | None:
        """What it scored; None if it is not finished."""
        file = self.folder(out) / SCORES_NAME
        return json.loads(file.read_text()) if file.exists() else None


_CACHES: dict[str, Cache] = {}


def described(path: str) -> Cache:
    """A cache by its manifest alone, read once."""
    if path not in _CACHES:
        _CACHES[path] = Cache(Path(path), read_manifest(path)) if Path(path).is_dir() else open_cache(path)
    return _CACHES[path]


def run_job(job: Job, out: Path) -> Scores:
    """Train and score one student in this process; a finished one is only read.

    Raises: whatever `train_student` raises.
    """
    done = job.scores(out)
    if done is not None:
        return done
    folder = job.folder(out)
    comp_demo = bool(open_cache(job.cache).manifest.noise.get("comp_demo"))  # a matrix chooses the cache it means
    config = replace(job.config, noise=replace(job.config.noise, comp_demo=comp_demo))
    student = train_student(config, job.cache, folder)
    device = own_device(job.config.train.device, "train.device")
    heldout = open_cache(job.heldout)
    mask_id = open_encoder(job.config, heldout).mask_id
    model = load_model(student, device_map=None if device.type == "cpu" else {"": device})
    scores = evaluate_heldout(model, heldout, mask_id=mask_id)
    documents = scores.document_bits_per_byte
    result = {
        "arm": job.arm, "seed": job.seed, "t": list(scores.t), "bits_per_byte": scores.bits_per_byte.tolist(),
        "accuracy": scores.accuracy.tolist(), "documents": [None if np.isnan(v) else v for v in documents.tolist()],
    }  # fmt: skip
    with output_errors(folder):
        atomic_write(folder / SCORES_NAME, readable_json(result))
    remove_checkpoints(folder)
    return result


@dataclass
class Outcome:
    """Scores of the jobs that finished and errors of those that did not, by arm and seed."""

    scores: dict[tuple[str, int], Scores] = field(default_factory=dict)
    failed: dict[tuple[str, int], TideError] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job], out: Path, *, workers: int, say: Say) -> Outcome:
    """Run what is not finished yet, in order, on so many processes of one CPU thread each.

    Args: say: called with a line for every job that ends.
    Raises: TryAgain: asked to stop by a signal; every training saved its state. KeyboardInterrupt: the same by Ctrl-C.
    """
    outcome, waiting = Outcome(), dict[str, list[Job]]()
    for job in jobs:
        waiting.setdefault(job.key, []).append(job)  # two arms that are the same training are trained once
    pool = _Pool(out, workers)
    with noted_signals() as stop:
        try:
            for same, result in pool.finished(list(waiting.values()), lambda: bool(stop)):
                for job in same:
                    if isinstance(result, TideError):
                        outcome.failed[job.arm, job.seed] = result
                        say(f"{job.arm} seed {job.seed} failed: {result}")
                    else:
                        outcome.scores[job.arm, job.seed] = result
                        bits = np.mean(result["bits_per_byte"])
                        say(
                            f"{len(outcome.scores)}/{len(jobs)}  {job.arm:15} seed {job.seed}: {bits:.3f} bits per byte"
                        )
        finally:
            pool.end()
        if stop and stop[0] == signal.SIGINT:
            raise KeyboardInterrupt
        if stop:
            raise TryAgain(f"{out}: stopped; finished students are kept, and the same command continues the others")
    return outcome


@dataclass
class _Worker:
    process: BaseProcess
    messages: Connection
    same: list[Job]


class _Pool:
    """Processes that live for one job each: one that is killed takes nothing else with it."""

    def __init__(self, out: Path, size: int) -> None:
        self.out, self.size = out, size
        self._context = multiprocessing.get_context(_START_METHOD)
        if _START_METHOD == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._running: dict[int, _Worker] = {}

    def finished(
        self, groups: list[list[Job]], stopped: Callable[[], bool]
    ) -> Iterator[tuple[list[Job], Scores | TideError]]:
        """Yield (equal jobs, scores or error) as they end; when stopped, wait for the running ones to save."""
        left = list(groups)
        told = False
        while left or self._running:
            if stopped() and not told:
                told, left = True, []
                for worker in self._running.values():
                    worker.process.terminate()
            while left and len(self._running) < self.size:
                same = left.pop(0)
                done = same[0].scores(self.out)
                if done is not None:
                    yield same, done
                    continue
                self._start(same)
            wait([worker.process.sentinel for worker in self._running.values()], timeout=0.5)
            for slot in [slot for slot, worker in self._running.items() if not worker.process.is_alive()]:
                worker = self._running.pop(slot)
                result = self._result(worker)
                if not told:
                    yield worker.same, result

    def end(self) -> None:
        """No process outlives the block, whatever ended it."""
        for worker in self._running.values():
            worker.process.terminate()
        for worker in self._running.values():
            worker.process.join(30)
            worker.process.kill()
            worker.process.join()

    def _start(self, same: list[Job]) -> None:
        slot = min(set(range(self.size)) - set(self._running))
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(same[0], str(self.out), slot, sender))
        process.start()
        sender.close()
        self._running[slot] = _Worker(process, receiver, same)

    def _result(self, worker: _Worker) -> Scores | TideError:
        """What a process that ended left behind."""
        worker.process.join()
        job = worker.same[0]
        error: TideError | None = None
        if worker.messages.poll():
            with contextlib.suppress(EOFError, OSError):
                error = worker.messages.recv()
        worker.messages.close()
        code = worker.process.exitcode
        failure = TideError(f"its process ended with code {code} (out of memory?); the same command tries it again")
        return error or job.scores(self.out) or failure


def worker_device(slot: int, visible: str | None, count: int, wanted: str = "auto") -> str | None:
    """CUDA_VISIBLE_DEVICES of the worker in a slot: the machine's devices in turn; None: as it is.

    Args: wanted: `train.device`; what it names by number would have another number in a narrower view.
    """
    if wanted not in ("auto", "cuda"):
        return None
    names = [name for name in visible.split(",") if name] if visible is not None else [str(i) for i in range(count)]
    return names[slot % len(names)] if names else None


def _run(job: Job, out: str, slot: int, messages: Connection) -> None:
    """The worker process. Sends a TideError, or nothing."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the command, which then asks its workers to save
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Unlike `accelerators`, this count does not start CUDA, which would not look at the variable again.
    count, wanted = torch.cuda.device_count(), job.config.train.device
    device = worker_device(slot, os.environ.get("CUDA_VISIBLE_DEVICES"), count, wanted)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        run_job(job, Path(out))
    except TideError as error:
        messages.send(error)
    except Exception as error:
        traceback.print_exc()
        messages.send(TideError(f"{type(error).__name__}: {error}"))


def _stop_with_parent() -> None:
    """A worker whose command was killed saves its state and ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
