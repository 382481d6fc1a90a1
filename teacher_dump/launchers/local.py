"""`--launcher local --workers N`: N processes on this machine, one per device in turn, one plan, one cache folder.

The processes pull shards by themselves; this one watches them, shows progress, and replaces nothing: a worker that
dies loses its own shard, and the others finish what it left. Each worker reports through a pipe of its own, because a
queue's lock would stay closed behind a worker that is killed while it writes.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ...shared.cache.store import Store
from ...shared.config import RunConfig
from ...shared.errors import OutputError, TideError, TryAgain
from ...shared.stop_signals import Stop
from ..worker import Report, work, work_and_tell

START_METHOD = "forkserver"
"""One process imports torch, the workers are forked from it; it never touches a device, so CUDA is safe."""


@dataclass
class _Process:
    process: BaseProcess
    messages: Connection
    error: TideError | None = None
    finished: bool = False


def run_local(store: Store, config: RunConfig, *, num_workers: int, report: Report, stop: Stop) -> None:
    """Work until the cache is complete.

    Args: num_workers: processes; 1 works in this process.
    Raises: TryAgain: asked to stop, or every worker ended, and shards are left. OutputError: a worker cannot write, so
        none can. TideError: what a worker reported, if none finished.
    """
    if num_workers == 1:
        work(store, config, report=report, stop=stop)
        return
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([work.__module__])
    workers: list[_Process] = []

    def pass_on() -> None:
        for worker in workers:
            worker.process.terminate()

    try:
        for rank in range(num_workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(str(store), config, rank, sender), name=f"worker {rank}", daemon=True
            )
            process.start()
            sender.close()  # the worker's end is the only one left: its death closes the pipe
            workers.append(_Process(process, receiver))
        with stop.finishing(pass_on):
            _listen(workers, report, stop)
    finally:
        for worker in workers:
            worker.process.kill()  # nothing is lost, and Ctrl-C should not wait for a shard
        for worker in workers:
            worker.process.join()
            worker.messages.close()
    if not any(worker.finished for worker in workers):
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        raise TryAgain(
            f"{store}: the workers ended before the cache was complete ({'; '.join(map(_ending, workers))}); "
            "run the same command again to continue"
        )


def _listen(workers: list[_Process], report: Report, stop: Stop) -> None:
    """Take messages until every pipe is closed; one that closes before the end of the work is told at once.

    Raises: OutputError: of the first worker that cannot write.
    """
    open_pipes = {worker.messages: worker for worker in workers}
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            worker = open_pipes[pipe]  # type: ignore[index]
            try:
                message = worker.messages.recv()
            except (EOFError, OSError):
                del open_pipes[worker.messages]
                worker.process.join()
                if not worker.finished and not stop.asked_by:
                    if open_pipes:
                        again = "The other workers go on and try its shard again"
                        warnings.warn(f"{_ending(worker)}. {again}", stacklevel=3)
                    elif any(other.finished for other in workers):
                        warnings.warn(f"{_ending(worker)}. The other workers finished its work", stacklevel=3)
                continue
            if message is None:
                worker.finished = True
            elif isinstance(message, OutputError):
                raise message
            elif isinstance(message, TideError):
                worker.error = message
            else:
                report(*message)


def _ending(worker: _Process) -> str:
    code = worker.process.exitcode
    killed = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return f"{worker.process.name}: {worker.error or killed}"


def _run(root: str, config: RunConfig, rank: int, messages: Connection) -> None:
    """The worker process. Sends progress, then None or a TideError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    stop = Stop(config.workers.grace_s)
    error: TideError | None
    try:
        with stop.on_signals(second_ends=False):
            error = work_and_tell(root, config, report=lambda *progress: messages.send(progress), stop=stop)
    except TryAgain as asked:  # between two calls
        error = asked
    messages.send(error)


def _end_with_parent() -> None:
    """No worker outlives the command, not even one that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(TryAgain.exit_code)
