"""Trainings on several processes for tests: one program that goes through a list of trainings, and its launcher.

Starting torch costs seconds, so each process goes through all trainings of a job, taking part in those that need its
rank, with a process group of its own each time. Run as `python training_ranks.py JOB.json RANK`.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_ports(num: int) -> list[int]:
    """Ports nobody listens on, all different; below those that the kernel gives to outgoing connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 32_000), 500):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == num:
            return ports
    raise AssertionError("no free ports")


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set, for a process started by hand."""
    values = (rank, rank, num_ranks, num_ranks, "127.0.0.1", port)
    return dict(zip(VARIABLES, map(str, values), strict=True))


def run_ranks(folder: Path, trainings: list[dict[str, Any]], *, timeout_s: float) -> list[str]:
    """Go through `trainings` and return what each process wrote to stderr; every one must end with 0 in time.

    A training: root (of tiny_runs), cache, out, settings, num_ranks; and if wanted stop_after (a step), environment,
    heldout. `<out>-items-<rank>.jsonl` says which items each step of a rank trained on, how many rows of the head it
    holds, and how many numbers of AdamW's state.
    """
    num_ranks = max(training["num_ranks"] for training in trainings)
    for training, port in zip(trainings, free_ports(len(trainings)), strict=True):
        training["port"] = port
    job = folder / "job.json"
    job.write_text(json.dumps(trainings, default=str))
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {"OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stderr:
            command = [sys.executable, __file__, str(job), str(rank)]
            processes.append(subprocess.Popen(command, env=environment, stderr=stderr))
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [log.read_text() for log in logs]
    assert codes == [0] * num_ranks, "\n\n".join(texts)
    return texts


def _train(training: dict[str, Any], rank: int) -> None:
    """One training of a job, in a process group that lives as long."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, PartialState
    from tide.shared.errors import TryAgain
    from tide.student_train.trainer import train_student
    from tiny_runs import hybrid

    num_ranks, out = training["num_ranks"], Path(training["out"])
    for name in VARIABLES:
        os.environ.pop(name, None)
    if num_ranks > 1:
        os.environ.update(rank_environment(rank, num_ranks, training["port"]))
    os.environ.update(training.get("environment", {}))
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    stop_after = training.get("stop_after")
    try:
        with _recorded(out.with_name(f"{out.name}-items-{rank}.jsonl"), stop_after if rank == 0 else None):
            config = hybrid(Path(training["root"]), **training["settings"])
            train_student(config, training["cache"], out, heldout=training.get("heldout"))
        assert stop_after is None, "was not stopped"
    except TryAgain as error:
        assert f"stopped after step {stop_after}, which is saved" in str(error)  # noqa: PT017
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in training.get("environment", {}):
            os.environ.pop(name)


@contextlib.contextmanager
def _recorded(log: Path, stop_after: int | None) -> Any:
    """Write down what every finished step trained on; after step `stop_after`, this process gets a SIGTERM."""
    from tide.student_train.trainer import Run

    original = Run.step

    def held(run: Run) -> int:
        weight: Any = run.student.head_weight()
        return len(getattr(weight, "_local_tensor", weight))

    def moments(run: Run) -> int:
        engine: Any = run.engine
        tensors = [tensor for fields in engine.optimizers["adamw"].state.values() for tensor in fields.values()]
        return sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)

    def step(self: Run, step: int, *arguments: Any) -> None:
        original(self, step, *arguments)
        items = [(item.sample, list(item.views)) for item in self.share(self.order.items(step))]
        with log.open("a") as file:
            line = {"step": step, "items": items, "held": held(self), "moments": moments(self)}
            file.write(json.dumps(line) + "\n")
        if step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    Run.step = step
    try:
        yield
    finally:
        Run.step = original


def main(job: str, rank: int) -> None:
    """All trainings that this rank takes part in, in order."""
    for training in json.loads(Path(job).read_text()):
        if rank < training["num_ranks"]:
            _train(training, rank)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], int(sys.argv[2]))
