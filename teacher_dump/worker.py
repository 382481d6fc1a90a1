"""A worker: opens the teacher once and pulls undone shards until none is left.

Workers share nothing but the cache folder. One that dies costs at most the shard it was busy with; running the same
command again continues. Whoever finds every shard done writes the manifest (finalize.py).
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..shared.cache import shard_is_done
from ..shared.cache.manifest import MANIFEST_NAME
from ..shared.config import RunConfig
from ..shared.models.loading import local_folder
from .claims import claim
from .finalize import finalize, tidy
from .placement import open_placed
from .plan import Plan, open_samples, read_plan
from .shard_task import ShardTask
from .teacher import Teacher
from .weights_record import require_same_weights

WAIT_S = 0.5

Report = Callable[[int, int], None]
"""Called with (shards finished by this worker, token-forwards) since the last call."""


def work(root: Path, config: RunConfig, *, report: Report = lambda shards, tokens: None) -> None:
    """Do undone shards until the cache is complete; those of a worker that dies are taken over.

    Args: config: of the command; the plan's settings, with the paths where things lie here.
    Raises: TideError: see `open_task`, `ShardTask.run`, `finalize`.
    """
    plan = read_plan(root).at(config, root)
    task: ShardTask | None = None
    undone = list(range(plan.num_shards))
    while not (root / MANIFEST_NAME).exists():
        worked = False
        undone = [shard for shard in undone if not shard_is_done(root, shard, plan.hash)]
        for shard in undone:
            if shard_is_done(root, shard, plan.hash):
                continue
            with claim(root, f"{shard:05d}") as mine:
                if mine and not shard_is_done(root, shard, plan.hash):
                    task = task or open_task(root, plan)
                    task.run(root, shard, lambda tokens: report(0, tokens))
                    report(1, 0)
                    worked = True
        if not undone:
            with claim(root, "manifest") as mine:
                if mine and not finalize(root, plan, task.pairing if task else None):
                    undone = list(range(plan.num_shards))
                    worked = True
        if not worked and not (root / MANIFEST_NAME).exists():
            time.sleep(WAIT_S)
    tidy(root)


def open_task(root: Path, plan: Plan) -> ShardTask:
    """Load data, tokenizers and the teacher for this worker's devices.

    Raises: CacheMismatch: the teacher's weights are not those that earlier shards were made with. DataError: they
        cannot be loaded, or the data changed since the plan was made.
    """
    config = plan.config
    conversations, pairing = open_samples(plan)
    if pairing.teacher_folder is None or pairing.spec is None or plan.teacher is None:
        return ShardTask(plan, conversations, pairing, None)
    folder = local_folder(config.teacher.path, plan.teacher["revision"] or config.teacher.revision)
    if torch.accelerator.current_accelerator() is None:
        torch.set_num_threads(config.shards.cpu_threads)
    model = open_placed(config.teacher, folder)
    require_same_weights(root, folder)
    support = audit_ids = None
    if plan.signal_kind == "topk":
        support, teacher_id = torch.from_numpy(pairing.student_id >= 0), pairing.teacher_id()
        audit_ids = torch.from_numpy(teacher_id[teacher_id >= 0].astype(np.int64))
    teacher = Teacher(model, pairing.spec, support=support, audit_ids=audit_ids)
    return ShardTask(plan, conversations, pairing, teacher)
