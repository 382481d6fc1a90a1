"""`tide dump-teacher` and `tide plan`: configuration -> plan -> shards -> manifest, through a launcher.

Running the same command again finishes the job and redoes nothing that is whole; a changed setting is refused by name.
"""

import os
import warnings
from pathlib import Path
from typing import Literal

from ..shared.cache import Manifest, read_manifest
from ..shared.cache.files import sha256_file
from ..shared.cache.manifest import MANIFEST_NAME, PLAN_NAME, NamedFile
from ..shared.config import RunConfig
from ..shared.errors import CacheError, CacheMismatch, ConfigError, OutputError
from ..shared.models.quantization import require_bitsandbytes
from .claims import CLAIMS_NAME
from .finalize import discard_damaged, tidy
from .launchers.env import plan_once, rank_from_environment, run_env
from .launchers.local import run_local
from .launchers.ray_pool import require_ray, run_ray
from .plan import Plan, make_plan, read_plan, write_plan
from .stopping import Stop
from .worker import Report
from .worker_records import RECORDS_NAME

Launcher = Literal["local", "env", "ray"]


def prepare_plan(config: RunConfig, root: Path, *, launcher: Launcher = "local", stop: Stop | None = None) -> Plan:
    """The plan below `root`: the one that is there, if its settings are these; otherwise a new one.

    Args: launcher: `env`: of the ranks that come at the same time, one makes it and the others wait.
    Raises: CacheMismatch: a plan with other settings is there. DataError, ConfigError: see `make_plan`. OutputError:
        `root` cannot be written, found out before the work of planning. TryAgain: asked to stop.
    """
    if not (root / PLAN_NAME).exists():
        _require_usable_output(root)
        stop = stop or Stop(config.workers.grace_s)
        with stop.on_signals():
            if launcher == "env":
                plan_once(root, config, stop)
            else:
                plan, _ = make_plan(config)
                write_plan(root, plan)
                return plan
    return read_plan(root).at(config, root)


def require_startable(config: RunConfig, root: Path) -> None:
    """Find out here, and not in a queue, whether a dump of these settings could begin or go on below `root`.

    Raises: CacheMismatch, ConfigError, OutputError: see `prepare_plan`.
    """
    if (root / PLAN_NAME).exists():
        read_plan(root).at(config, root)
    else:
        _require_usable_output(root)


def dump_teacher(
    config: RunConfig, root: Path, *, launcher: Launcher = "local", num_workers: int = 1, verify: bool = False,
    report: Report = lambda shards, tokens: None,
) -> Manifest:  # fmt: skip
    """Ask the teacher about every planned view and write the cache below `root`.

    Args:
        launcher: `local`: `num_workers` processes here; `env`: this process is one rank of a job; `ray`: `num_workers`
            actors of a Ray cluster.
        verify: compare the SHA-256 of finished shards first and redo the damaged ones. Otherwise sizes are compared,
            and every byte once, before the manifest is written.
        report: called with (shards finished, teacher token-forwards) since the last call.
    Raises: TryAgain: stopped before the end. CacheMismatch, DataError, ConfigError, OutputError, Unavailable.
    """
    require_bitsandbytes(config.teacher.quantization)
    if launcher == "ray":
        require_ray()
    stop = Stop(config.workers.grace_s)
    with stop.on_signals():
        plan = prepare_plan(config, root, launcher=launcher, stop=stop)
        if launcher != "env" or rank_from_environment() == 0:
            _reopen_if_damaged(root, plan, full=verify)
        if not (root / MANIFEST_NAME).exists():
            if launcher == "env":
                run_env(root, config, report=report, stop=stop)
            else:
                run = run_ray if launcher == "ray" else run_local
                run(root, config, num_workers=num_workers, report=report, stop=stop)
        tidy(root)
        return read_manifest(root)


def _reopen_if_damaged(root: Path, plan: Plan, *, full: bool) -> None:
    """Forget damaged shards, and withdraw a manifest whose promise is broken: what is missing is then made again.

    Raises: CacheMismatch: the manifest was made from another plan.
    """
    if not (root / MANIFEST_NAME).exists():
        discard_damaged(root, plan, full=full)
        return
    try:
        manifest = read_manifest(root)
    except CacheError as error:
        warnings.warn(f"{error}; the manifest is made again from the finished shards", stacklevel=2)
    else:
        if manifest.plan_hash != plan.hash:
            raise CacheMismatch(
                f"{root / PLAN_NAME} is not the plan that {MANIFEST_NAME} was made from; restore it, or dump into "
                "another folder"
            )
        if all(_is_whole(root, entry, full=full) for entry in manifest.files()):
            return
    (root / MANIFEST_NAME).unlink()
    discard_damaged(root, plan, full=full)


def _is_whole(root: Path, entry: NamedFile, *, full: bool) -> bool:
    """Is a file what the manifest says: its size and, if `full`, its SHA-256?"""
    path = root / entry.name
    if not path.is_file() or path.stat().st_size != entry.bytes:
        return False
    return not full or sha256_file(path) == entry.sha256


def _require_usable_output(root: Path) -> None:
    """Raises: ConfigError: files that are no cache lie there. OutputError: the folder cannot be made or written."""
    expected = ("lost+found", CLAIMS_NAME, RECORDS_NAME)  # the last two: of ranks that wait for the plan
    if root.is_dir() and any(path.name[0] != "." and path.name not in expected for path in root.iterdir()):
        raise ConfigError(f"--out {root}: the folder holds other files and no {PLAN_NAME}; give a new or empty folder")
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise OutputError(f"--out {root}: {nearest} is a file; give the path of a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"--out {root}: {nearest} is read-only; give a folder that can be written")
