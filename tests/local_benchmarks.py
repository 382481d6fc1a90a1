"""Benchmarks for tests: the data sets of lm-eval's tasks as local copies, and `tide eval` on them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


def lay_out(folder: Path) -> Path:
    """The data beside the project as `folder / openai / gsm8k` and so on; skips where it is absent."""
    maker = SHARED / "tools" / "make_local_datasets.py"
    if not maker.is_file():
        pytest.skip(f"{maker} is absent: it does not ship with the project")
    subprocess.run([sys.executable, maker, SHARED / "data", folder], check=True, capture_output=True, timeout=120)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a process that finds data sets locally or not at all; what `datasets` prepares is kept in `folder`."""
    values = {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder), "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return os.environ | values | more


def tide_eval(
    arguments: list[object], env: Mapping[str, str], *, program: tuple[str, ...] = ("-m", "tide", "eval"),
    timeout_s: float = 200.0,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run it to its end."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=timeout_s)
