"""`tide dump-teacher` and `tide plan`: configuration -> plan -> shards -> manifest, through a launcher.

Running the same command again finishes the job and redoes nothing that is whole; a changed setting is refused by name.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..shared.cache import Manifest, read_manifest
from ..shared.cache.manifest import MANIFEST_NAME, PLAN_NAME, FileEntry
from ..shared.cache.store import Store
from ..shared.config import RunConfig
from ..shared.devices import rank, require_shareable
from ..shared.errors import CacheError, CacheMismatch
from ..shared.models.quantization import require_bitsandbytes
from ..shared.stop_signals import Stop
from .claims import CLAIMS_NAME
from .finalize import discard_damaged, tidy
from .launchers.env import plan_once
from .launchers.local import run_local
from .launchers.ray_pool import require_ray, run_ray
from .plan import Plan, make_plan, read_plan, write_plan
from .worker import Report, open_output, work
from .worker_records import RECORDS_NAME

Launcher = Literal["local", "env", "ray"]
_EXPECTED = ("lost+found", CLAIMS_NAME, RECORDS_NAME)
"""Names without a plan beside them that are no strangers; the last two: of ranks that wait for the plan."""


def prepare_plan(
    config: RunConfig, root: str | Path | Store, *, launcher: Launcher = "local", stop: Stop | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Plan:  # fmt: skip
    """The plan below `root`: the one that is there, if its settings are these; otherwise a new one.

    Args:
        launcher: `env`: of the ranks that come at the same time, one makes it and the others wait.
        say: see `make_plan`.
    Raises: CacheMismatch: a plan with other settings is there. DataError, ConfigError: see `make_plan`. OutputError:
        `root` cannot be written, found out before the work of planning. TryAgain: asked to stop.
    """
    store = open_output(root, config)
    if not store.exists(PLAN_NAME):
        store.require_usable(_EXPECTED)
        stop = stop or Stop(config.workers.grace_s)
        with stop.on_signals():
            if launcher == "env":
                plan_once(store, config, stop, say=say)
            else:
                plan, _ = make_plan(config, say=say)
                write_plan(store, plan)
                return plan
    return read_plan(store).at(config, store)


def require_startable(config: RunConfig, root: str | Path | Store) -> None:
    """Find out here, and not in a queue, whether a dump of these settings could begin or go on below `root`.

    Raises: CacheMismatch, ConfigError, OutputError: see `prepare_plan`.
    """
    store = open_output(root, config)
    if store.exists(PLAN_NAME):
        read_plan(store).at(config, store)
    else:
        store.require_usable(_EXPECTED)


def dump_teacher(
    config: RunConfig, root: str | Path | Store, *, launcher: Launcher = "local", num_workers: int = 1,
    verify: bool = False, report: Report = lambda shards, tokens: None,
) -> Manifest:  # fmt: skip
    """Ask the teacher about every planned view and write the cache below `root`.

    Args:
        launcher: `local`: `num_workers` processes here; `env`: this process is one rank of a job; `ray`: `num_workers`
            actors of a Ray cluster.
        root: a folder or a URL that fsspec understands; the cache's bytes do not depend on it.
        verify: compare the SHA-256 of finished shards first and redo the damaged ones. Otherwise sizes are compared,
            and every byte once, before the manifest is written.
        report: called with (shards finished, teacher token-forwards) since the last call.
    Raises: TryAgain: stopped before the end. CacheMismatch, DataError, ConfigError, OutputError, Unavailable.
    """
    require_bitsandbytes(config.teacher.quantization)
    require_shareable(config.teacher.device, "teacher.device", num_workers if launcher == "local" else 1)
    if launcher == "ray":
        require_ray()
    stop, store = Stop(config.workers.grace_s), open_output(root, config)
    with stop.on_signals():
        plan = prepare_plan(config, store, launcher=launcher, stop=stop)
        if launcher != "env" or rank() == 0:
            _reopen_if_damaged(store, plan, full=verify)
        if not store.exists(MANIFEST_NAME):
            if launcher == "env":
                work(store, config, report=report, stop=stop)  # one rank, until the cache is complete
            else:
                run = run_ray if launcher == "ray" else run_local
                run(store, config, num_workers=num_workers, report=report, stop=stop)
        tidy(store)
        manifest = read_manifest(store)
        if manifest.plan_hash != plan.hash:  # whoever wrote it, it is not what this command was asked for
            raise _another_cache(store)
        return manifest


def _reopen_if_damaged(store: Store, plan: Plan, *, full: bool) -> None:
    """Forget damaged shards, and withdraw a manifest whose promise is broken: what is missing is then made again.

    Raises: CacheMismatch: the manifest was made from another plan.
    """
    if not store.exists(MANIFEST_NAME):
        discard_damaged(store, plan, full=full)
        return
    try:
        manifest = read_manifest(store)
    except CacheError as error:
        warnings.warn(f"{error}; the manifest is made again from the finished shards", stacklevel=2)
    else:
        if manifest.plan_hash != plan.hash:
            raise _another_cache(store)
        if all(_is_whole(store, entry, full=full) for entry in manifest.files()):
            return
    store.remove(MANIFEST_NAME)
    discard_damaged(store, plan, full=full)


def _another_cache(store: Store) -> CacheMismatch:
    return CacheMismatch(
        f"{store.path(PLAN_NAME)} is not the plan that {MANIFEST_NAME} was made from, which is the cache of other "
        "settings or data; restore the plan, or dump into another folder"
    )


def _is_whole(store: Store, entry: FileEntry, *, full: bool) -> bool:
    """Is a file what the manifest says: its size and, if `full`, its SHA-256?"""
    try:
        return store.num_bytes(entry.name) == entry.bytes and (not full or store.sha256(entry.name) == entry.sha256)
    except CacheError:
        return False
