"""`--launcher env`: this process is one rank of a job that accelerate, torchrun or Slurm started.

Rank and world size come from the environment. There is no process group: ranks meet in the cache folder only, so any
of them may die or come later. Rank 0 makes the plan; the others wait for it to appear.
"""

import os
import time
from pathlib import Path

from ...shared.cache.manifest import PLAN_NAME
from ...shared.config import RunConfig
from ...shared.errors import TryAgain
from ..worker import Report, work

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def rank_from_environment() -> int:
    """This process's rank; 0 where nothing says otherwise."""
    for name in _RANK_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def wait_for_plan(root: Path, *, timeout_s: float = 1800.0) -> None:
    """Wait until rank 0 has written the plan.

    Raises: TryAgain: it did not appear in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (root / PLAN_NAME).exists():
        if time.monotonic() > deadline:
            raise TryAgain(
                f"{root}: no {PLAN_NAME} after {timeout_s:.0f} s; is rank 0 running, on the same file system? "
                "Start the job again"
            )
        time.sleep(0.5)


def run_env(root: Path, config: RunConfig, *, report: Report) -> None:
    """Pull shards as one rank until the cache is complete; every rank finds things where its own command says."""
    work(root, config, report=report)
