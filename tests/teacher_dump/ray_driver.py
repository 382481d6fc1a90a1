"""A driver for test_ray.py: `tide dump-teacher` with slow shards, in a process that can be killed.

Ray's workers import modules by name and know nothing of a test's patches, so the slowness comes with the actor class.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from tide import cli
from tide.shared.errors import TideError
from tide.teacher_dump.launchers import ray_pool
from tide.teacher_dump.shard_task import ShardTask


class SlowPoolWorker(ray_pool.PoolWorker):
    """Writes down which process began which shard, and takes its time; if there is a file `broken`, one of them is."""

    def run(self) -> TideError | None:
        """As the actor of the pool, with a log."""
        run, beside = ShardTask.run, Path(self.root).parent
        log = beside / "calls"
        log.mkdir(exist_ok=True)

        try:
            (beside / "broken").unlink()  # by one actor alone
            broken = True
        except FileNotFoundError:
            broken = False

        def slowly(task: ShardTask, root: Path, shard: int, *progress: Any):
            (log / f"{shard}-{os.getpid()}-{time.time_ns()}").touch()
            time.sleep(float(os.environ["SHARD_S"]))
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return run(task, root, shard, *progress)

        ShardTask.run = slowly
        return super().run()


if __name__ == "__main__":
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    ray.init(num_cpus=int(os.environ["NUM_CPUS"]), include_dashboard=False)
    ray_pool.PLACE_S = 1.0
    ray_pool.PoolWorker = SlowPoolWorker
    cli.main()
