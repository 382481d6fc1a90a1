"""What tests of stage one share: hashes of a cache's files, the check after a kill, work in forked processes."""

import contextlib
import errno
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tide.shared.cache import shard_is_done, shard_name
from tide.shared.cache.files import is_written
from tide.shared.cache.receipts import audit_name
from tide.teacher_dump.plan import read_plan


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, hidden ones included; folders as such, so that empty ones show up too."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


def without_links_and_folder_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT, SMB and many FUSE file systems answer."""
    fsync = os.fsync

    def link(*args: object, **how: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def files_alone(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", files_alone)


def require_sound_files(root: Path) -> int:
    """Every file under a final name can be read and belongs to its receipt; how many shards are done.

    Raises: AssertionError, or what pyarrow says of a damaged page.
    """
    if not is_written(root / "plan.json"):  # without hard links, a writer that was killed leaves it empty
        assert not [path for path in root.rglob("*") if is_written(path) and path.is_file() and path.name[0] != "."]
        return 0
    plan = read_plan(root)
    names = {name(shard, plan.num_shards) for shard in range(plan.num_shards) for name in (shard_name, audit_name)}
    for path in sorted(path for folder in ("data", "audit") for path in (root / folder).glob("[!.]*")):
        assert str(path.relative_to(root)) in names
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            file.read().validate(full=True)
            assert file.metadata.metadata[b"tide.plan_hash"].decode() == plan.hash
    done = 0
    for shard in range(plan.num_shards):
        if (root / "receipts" / f"{shard:05d}.json").exists():
            assert shard_is_done(root, shard, plan.hash, full=True), f"receipt {shard} and its file disagree"
            done += 1
    return done


def fork(function: Callable[[], object], *, group: int | None = None) -> int:
    """Run `function` in a child of this process, which has torch imported already; it ends with the error's exit code.

    Args: group: process group to join; 0: a new one, led by the child.
    Returns: the child's process id.
    """
    assert torch.get_num_threads() == 1, "fork with a running thread pool"
    pid = os.fork()
    if pid:
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the child was faster
                os.setpgid(pid, group or pid)
        return pid
    code = 1
    try:
        sys.stdout, sys.stderr = open(os.devnull, "w"), sys.__stderr__  # noqa: SIM115 - pytest's belong to the parent
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler belongs to the parent
        signal.setitimer(signal.ITIMER_REAL, 0)
        if group is not None:
            os.setpgid(0, group)
        forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined] - the parent's is no child of this one
        function()
        code = 0
    except BaseException as error:  # the child must never return into pytest
        code = error.code or 0 if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
    finally:
        os._exit(code)


def join(*pids: int, timeout_s: float = 60.0) -> list[int]:
    """Exit codes of children (negative: the signal that killed one); those that take too long are killed."""
    deadline, codes = time.monotonic() + timeout_s, []
    for pid in pids:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    return codes
