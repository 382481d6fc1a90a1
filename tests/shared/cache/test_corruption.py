"""Thousands of random corruptions: each is refused with the file's name, or changes nothing that a reader gets.

Half of them meet `verify_cache`'s checks with hashes. The other half is vouched for: sizes and SHA-256 are believed, so
that page checksums, footers and meaning have to find it. corruptions.py does the damage and the checks in a process of
its own, as `verify_cache` does: one that crashes there is refused, and counted here.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_cache as dump_tiny
from tiny_runs import tiny_config

WORKER = Path(__file__).with_name("corruptions.py")
KINDS = ("none", "chunk", "topk", "audit")
OTHER_PLAN = "cd" * 32


@pytest.fixture
def folder(tmp_path, synthetic, tiny_root, request) -> Path:
    """`cache`, `other` (another plan) and `moved` (a sample in the next shard), in three shards of one signal kind.

    "audit": a small dump with an audit, of which only the audit is damaged.
    """
    if request.param == "audit":
        config = tiny_config(tiny_root, signal__audit_share=0.3, shards__samples_per_shard=2)
        shutil.copytree(dump_tiny(tiny_root, "audited-to-be-damaged", config), tmp_path / "cache")
        return tmp_path
    layout = synthetic.make_layout(request.param)
    parts = [synthetic.make_rows(layout, seed=seed, samples=3, views=2) for seed in range(3)]
    moved = [parts[0][:-2], parts[0][-2:] + parts[1], parts[2]]
    for name, rows, plan_hash in (("cache", parts, None), ("other", parts, OTHER_PLAN), ("moved", moved, None)):
        root = tmp_path / name
        receipts = [synthetic.write(root, some, layout, n, 3, plan_hash=plan_hash) for n, some in enumerate(rows)]
        if name == "cache":
            synthetic.finish(root, layout, receipts)
    return tmp_path


def corrupt(folder: Path, first: int, count: int, *, hashes: bool, timeout_s: float) -> list[dict[str, Any]]:
    """Results of the damages first, first + 1, ...; a process that dies is a result, and the next one goes on."""
    results: list[dict[str, Any]] = []
    where = "data" if (folder / "other").exists() else "audit"
    end = first + count
    while first < end:
        command = [sys.executable, str(WORKER), str(folder), where, str(first), str(end - first), "01"[hashes]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        results += [line for line in lines if "result" in line]
        if done.returncode == 0:
            break
        assert done.returncode < 0 and lines, done.stderr[-2000:]  # noqa: PT018 - a signal, not a traceback
        results.append({"number": lines[-1]["number"], "damage": "?", "result": f"died of {-done.returncode}"})
        first = lines[-1]["number"] + 1
    return results


def require_all_found(folder: Path, first: int, count: int, *, timeout_s: float) -> None:
    for hashes in (True, False):
        results = corrupt(folder, first, count // 2, hashes=hashes, timeout_s=timeout_s)
        counts = Counter((line["damage"], line["result"]) for line in results)
        print(f"{'with' if hashes else 'without'} hashes: {len(results)} corruptions")
        for (damage, result), number in sorted(counts.items()):
            print(f"  {damage:18} {result:10} {number}")
        assert len(results) == count // 2
        bad = [
            line for line in results if line["result"] not in ("refused", "harmless") and "died" not in line["result"]
        ]
        assert not bad, json.dumps(bad[:5], indent=1)
        if hashes:  # JSON alone has spaces and zeros to spare
            harmless = {line["damage"] for line in results if line["result"] == "harmless"}
            assert harmless <= {"manifest_bits"}
            assert not [line for line in results if "died" in line["result"]]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_some_hundred_corruptions_are_found(folder):
    require_all_found(folder, 0, 300, timeout_s=60)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_ten_thousand_corruptions_are_found(folder):
    """3,400 of each signal kind, and as many of audits: 13,600."""
    require_all_found(folder, 1_000_000, 3_400, timeout_s=1200)
