"""`--launcher ray --workers N`: N actors of a Ray cluster, one teacher each, that pull shards from the cache folder.

Ray decides where the actors run and notices when one is gone; which shard is whose is settled in the folder, as for
every launcher. So an actor that dies is simply replaced, the driver may be killed and started again, and another
launcher may go on. Ray Data is not the right layer: shards, their order and their commit are the cache's own.
"""

import importlib.util
import os
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from ...shared.cache.manifest import MANIFEST_NAME
from ...shared.cache.store import Store
from ...shared.config import RunConfig
from ...shared.errors import OutputError, TideError, TryAgain, Unavailable
from ...shared.stop_signals import Stop
from ..worker import Report, work_and_tell

POLL_S = 0.5
PLACE_S = 60.0
"""Without any actor started for so long, the user is told what the cluster lacks."""
MAX_DEATHS = 5
"""Actors that die one after another without a finished shard in between: more of them would not help."""
LAST_WORDS_S = 10.0
"""How long actors that see the complete cache may take to end by themselves."""


def require_ray() -> None:
    """Raises: Unavailable: Ray is not installed here."""
    if importlib.util.find_spec("ray") is None:
        raise Unavailable(
            "--launcher ray needs Ray, which is not installed: pip install 'tide-distill[ray]' here and on every node, "
            "or use --launcher local, env or slurm, which need nothing else"
        )


class PoolWorker:
    """The actor: `run` in one thread, the other methods beside it."""

    def __init__(self, root: str, config: RunConfig, folder: str) -> None:
        os.chdir(folder)  # relative paths of the settings are the driver's
        self.root, self.config = root, config
        self.asked = Stop(config.workers.grace_s)
        self._lock, self._shards, self._tokens = threading.Lock(), 0, 0

    def run(self) -> TideError | None:
        """Work until the cache is complete; an error is given back, not raised: the others may go on."""
        return work_and_tell(self.root, self.config, report=self._add, stop=self.asked)

    def take(self) -> tuple[int, int]:
        """(shards finished, token-forwards) since the last call."""
        with self._lock:
            taken, self._shards, self._tokens = (self._shards, self._tokens), 0, 0
        return taken

    def stop(self, by: str) -> None:
        """Finish or drop the shard in hand, then end."""
        self.asked.ask(by)

    def _add(self, shards: int, tokens: int) -> None:
        with self._lock:
            self._shards, self._tokens = self._shards + shards, self._tokens + tokens


@dataclass
class _Member:
    """An actor of the pool, its run, and a question it has not answered yet."""

    actor: Any
    running: Any
    asked: Any
    has_answered: bool = False


def run_ray(store: Store, config: RunConfig, *, num_workers: int, report: Report, stop: Stop) -> None:
    """Work until the cache is complete.

    Raises: Unavailable: no Ray. TryAgain: asked to stop, or actors keep dying, and shards are left. OutputError: an
        actor cannot write. TideError: what an actor reported, if none is left.
    """
    require_ray()
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False)
    try:
        with stop.on_signals(), stop.finishing():  # ray.init sets a handler for SIGTERM of its own
            _Actors(store, config, report, stop).run(num_workers)
    finally:
        if ours:
            ray.shutdown()


class _Actors:
    """The actors, until the cache is complete."""

    def __init__(self, store: Store, config: RunConfig, report: Report, stop: Stop) -> None:
        import ray

        self.ray, self.store, self.config, self.report, self.stop = ray, store, config, report, stop
        on_gpus = config.teacher.device != "cpu" and ray.cluster_resources().get("GPU", 0)
        gpus = config.teacher.devices_per_replica if on_gpus else 0
        self.kind: Any = ray.remote(PoolWorker).options(num_cpus=1, num_gpus=gpus, max_concurrency=3)
        self.members: list[_Member] = []
        self.errors: list[TideError] = []
        self.deaths = 0
        self.place_by = time.monotonic() + PLACE_S
        self.place = f"1 CPU and {gpus} GPUs"

    def run(self, num_workers: int) -> None:
        """Start the actors, listen to them, replace the dead."""
        told = False
        try:
            for _ in range(num_workers):
                self._start()
            while self.members and not self._is_complete():
                if self.stop.asked_by and not told:
                    told = True
                    for member in self.members:
                        if member.has_answered:
                            member.actor.stop.remote(self.stop.asked_by)
                        else:  # one that has not started has nothing in hand, and could not be told
                            self.ray.kill(member.actor)
                    self.members = [member for member in self.members if member.has_answered]
                self._listen(POLL_S, replace=not told)
            # Actors that work see by themselves that it is complete; one that never got a place in the cluster cannot.
            deadline = time.monotonic() + LAST_WORDS_S
            while any(member.has_answered for member in self.members) and time.monotonic() < deadline:
                self._listen(POLL_S, replace=False)
        finally:
            for member in self.members:
                self.ray.kill(member.actor)
        if not self._is_complete() and not told:
            raise self.errors[-1] if self.errors else TryAgain(f"{self.store}: no actor is left; run the command again")
        if self.errors and not told:
            warnings.warn(f"the other actors finished the work of one that failed: {self.errors[-1]}", stacklevel=3)

    def _start(self) -> None:
        root = str(self.store.folder.absolute()) if self.store.is_folder else str(self.store)
        actor = self.kind.remote(root, self.config, os.getcwd())
        self.members.append(_Member(actor, actor.run.remote(), actor.take.remote()))

    def _listen(self, timeout_s: float, *, replace: bool) -> None:
        """Wait for answers; report progress, note ends and deaths."""
        waited_for = [ref for member in self.members for ref in (member.running, member.asked)]
        self.ray.wait(waited_for, num_returns=1, timeout=timeout_s)
        time.sleep(POLL_S / 10)  # an idle pool's answers come at once
        for member in list(self.members):
            state = self._hears(member)
            if state == "there":
                continue
            self.members.remove(member)
            if state == "dead" and replace and not self._is_complete():
                self._start()
        if time.monotonic() > self.place_by and not any(member.has_answered for member in self.members):
            self.place_by = float("inf")
            warnings.warn(
                f"no actor has started yet: each needs {self.place}; `ray status` shows what the cluster has and what "
                "is taken. Waiting for a place",
                stacklevel=4,
            )

    def _hears(self, member: _Member) -> Literal["there", "ended", "dead"]:
        """Take what an actor has to say, and whether it is still there."""
        ray = self.ray
        try:
            if ray.wait([member.asked], timeout=0)[0]:
                shards, tokens = ray.get(member.asked)
                member.has_answered = True
                self.report(shards, tokens)
                self.deaths = 0 if shards else self.deaths
                member.asked = member.actor.take.remote()
            if not ray.wait([member.running], timeout=0)[0]:
                return "there"
            error = ray.get(member.running)
            if error is None:
                self.report(*ray.get(member.actor.take.remote()))
        except ray.exceptions.RayActorError as death:
            self.deaths += 1
            if self.deaths > MAX_DEATHS:
                raise TryAgain(
                    f"{self.store}: {self.deaths} Ray actors died one after another ({str(death)[:300]}); see the "
                    "logs of Ray on their nodes, then run the same command again"
                ) from death
            return "dead"
        if isinstance(error, OutputError):
            raise error
        if error is not None:
            self.errors.append(error)
        return "ended"

    def _is_complete(self) -> bool:
        return self.store.exists(MANIFEST_NAME)
