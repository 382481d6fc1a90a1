"""`--launcher env`: this process is one rank of a job that accelerate, torchrun or Slurm started.

The rank comes from the environment. There is no process group: ranks meet in the cache folder only, so any of them may
die, come later or be alone. Whoever comes first makes the plan; the others wait for it.
"""

import contextlib
from collections.abc import Callable

from ...shared.cache.manifest import PLAN_NAME
from ...shared.cache.store import Store
from ...shared.config import RunConfig
from ...shared.stop_signals import Stop
from ..board import Board
from ..claims import CLAIMS_NAME
from ..plan import make_plan, write_plan

LONGEST_LOOK_S = 5.0
"""Between two looks at whether the plan is there: planning may take an hour, and ranks may be hundreds."""


def plan_once(
    store: Store, config: RunConfig, stop: Stop, *, look_again_s: float = 0.5,
    say: Callable[[str], object] = lambda line: None,
) -> None:  # fmt: skip
    """Make the plan at its place, or wait for the rank that is at it.

    Args: say: see `make_plan`; the rank that makes it speaks.
    Raises: DataError, ConfigError: see `make_plan`. TryAgain: asked to stop.
    """
    board = Board(store, "", 0, config.workers)
    try:
        with board.present():
            while not store.exists(PLAN_NAME):
                with board.holding("plan") as mine:
                    if mine and not store.exists(PLAN_NAME):
                        board.say("planning")
                        plan, _ = make_plan(config, progress=board.progress, say=say)
                        write_plan(store, plan)
                if not mine:
                    stop.sleep(look_again_s)
                    look_again_s = min(LONGEST_LOOK_S, 1.5 * look_again_s)
    except BaseException:
        if store.is_folder:  # nothing was begun: leave nothing, unless others are at it
            for folder in (store.folder / CLAIMS_NAME, store.folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
