"""`--launcher slurm --workers N`: renders a job array of N workers and hands it to sbatch; `--dry-run` prints it.

Each element of the array is one rank of `--launcher env` with a teacher of its own. Elements may start in any order, at
any time, and be preempted: Slurm puts a preempted one back into the queue (--requeue), and one whose time ends is
warned before (--signal), finishes or drops its shard, and puts itself back. Nothing else is needed to go on.
"""

import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...shared.config import RunConfig
from ...shared.errors import ConfigError, Unavailable

WARNING_MARGIN_S = 60
"""Slurm sends signals up to a minute late."""

_SCRIPT = """\
#!/bin/bash
{directives}

# Made by `tide dump-teacher --launcher slurm`. Run by hand, it works as well: one worker, until the cache is complete.
export RANK="${{SLURM_ARRAY_TASK_ID:-0}}" LOCAL_RANK=0 WORLD_SIZE={num_workers}
{command} &
worker=$!

# Slurm warns this shell alone: pass it on. USR1 means that time ends, so go on later; TERM may be somebody's scancel.
time_ends=0 interrupted=0
trap 'interrupted=1 time_ends=1; kill -USR1 "$worker" 2>/dev/null' USR1
trap 'interrupted=1; kill -TERM "$worker" 2>/dev/null' TERM
while :; do
  interrupted=0
  wait "$worker"
  code=$?
  [ "$interrupted" = 1 ] || break  # a signal ends `wait`, not the worker
done
if [ "$time_ends" = 1 ] && [ "$code" = 75 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def array_script(
    arguments: Sequence[str], config: RunConfig, *, num_workers: int, folder: Path, sbatch: Sequence[str] = ()
) -> str:
    """The job script.

    Args:
        arguments: of `tide dump-teacher`, without the launcher.
        folder: that relative paths in the arguments refer to.
        sbatch: options for sbatch, one or several in each text, such as "--partition=gpu --time=4:00:00"; one that is
            given here replaces ours.
    Raises: ConfigError: a text that is no list of options.
    """
    command = [sys.executable, "-m", "tide", "dump-teacher", *arguments, "--launcher", "env"]
    gpus = [] if config.teacher.device == "cpu" else [f"--gpus={config.teacher.devices_per_replica}"]
    ours = [
        "--job-name=tide-dump", f"--array=0-{num_workers - 1}", "--ntasks=1",
        *gpus, "--requeue", "--open-mode=append",
        f"--signal=B:USR1@{math.ceil(config.workers.grace_s) + WARNING_MARGIN_S}",
        f"--chdir={shlex.quote(str(folder))}",
    ]  # fmt: skip
    theirs = [option for text in sbatch for option in _options(text)]
    replaced = {_name(option) for option in theirs}
    kept = [option for option in ours if _name(option) not in replaced]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in (*kept, *theirs)), num_workers=num_workers,
        command=shlex.join(command),
    )  # fmt: skip


def submit(script: str) -> str:
    """Hand the script to sbatch; the job's number.

    Raises: Unavailable: no sbatch here, or it refused.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise Unavailable(
            "sbatch is not on the PATH: run this on a login node of the cluster, or print the script with --dry-run "
            "and submit it there"
        )
    done = subprocess.run([sbatch, "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(
            f"sbatch refused the job ({(done.stderr or done.stdout).strip()[:500]}); give what your cluster wants with "
            '--sbatch, for example --sbatch "--partition=gpu --time=4:00:00 --account=NAME"'
        )
    return done.stdout.strip().partition(";")[0]


def _options(text: str) -> list[str]:
    """Options of one `--sbatch`: `--name=value`, `--name value`, `-n value` or a bare `--name`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--sbatch {text!r}: {error}; give options as on sbatch's command line") from error
    if not words or not words[0].startswith("-") or not text.isprintable():
        raise ConfigError(f"--sbatch {text!r}: expected options of sbatch, such as --partition=gpu")
    options: list[str] = []
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            options.append(f"{name}={shlex.quote(value)}" if equals else word)
        else:
            options[-1] += f" {shlex.quote(word)}"
    return options


_SHORT = {"-J": "--job-name", "-a": "--array", "-n": "--ntasks", "-G": "--gpus", "-D": "--chdir"}


def _name(option: str) -> str:
    """What an option sets: gpus however they are counted, requeue or not."""
    name = re.split(r"[= ]", option, maxsplit=1)[0]
    name = _SHORT.get(name[:2], name) if not name.startswith("--") else name
    if name == "--gres" or name.startswith("--gpus"):
        return "--gpus"
    return "--requeue" if name == "--no-requeue" else name
