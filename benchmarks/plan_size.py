"""How close `tide plan` comes to the bytes of the real dump: settings, and what the prediction was made from.

Every setting is planned, predicted and then dumped in full, all in one run. The columns are predicted / real:

    no teacher        answers at measured prices: the stated value and, in brackets, the stated range
    probe of n        the teacher asked about n samples spread over the plan
    first shard       the bytes of the dump's first shard scaled up, as `tide plan --out` does while a dump runs

Run: python benchmarks/plan_size.py TEXT.jsonl ... (fields question/answer or prompt/response). With the
demo's shipped teacher some minutes on one core; another one by --teacher and --student.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tide.shared.cache import Manifest
from tide.shared.cache.receipts import receipt_path
from tide.shared.config import RunConfig, load_config
from tide.teacher_dump import cache_size
from tide.teacher_dump.cache_size import SizeEstimate, estimate_size
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import Plan, make_plan

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "demo_assets"
SETTINGS = {
    "no teacher, shards of 64": {"teacher.path": "", "shards.samples_per_shard": 64},
    "chunk, one shard": {"signal.kind": "chunk", "shards.samples_per_shard": 100_000, "noise.comp_demo": True},
    "k = 16, shards of 24": {"signal.top_k": 16, "shards.samples_per_shard": 24},
    "p > 5e-3, k <= 50, shards of 80, uniform t": {
        "signal.top_k": 50, "signal.min_probability": 5e-3, "shards.samples_per_shard": 80,
        "noise.timesteps": "uniform",
    },
    "p > 2e-2, k <= 50, one shard, float32": {
        "signal.top_k": 50, "signal.min_probability": 2e-2, "shards.samples_per_shard": 100_000,
        "signal.logp_dtype": "float32", "signal.logp_step": None,
    },
}  # fmt: skip


def run_config(arguments: argparse.Namespace, text: Path, more: dict[str, object]) -> RunConfig:
    values = {
        "data.source": str(text), "data.limit": arguments.documents, "data.max_length": arguments.length,
        "data.teacher_max_length": arguments.length, "teacher.path": str(arguments.teacher),
        "student.path": str(arguments.student), "noise.views": arguments.views, "teacher.check": "off", **more,
    }  # fmt: skip
    return load_config("demo", overrides=[f"{name}={json.dumps(value)}" for name, value in values.items()])


def after_one_shard(plan: Plan, root: Path, folder: Path) -> SizeEstimate:
    """What would have been said when the first shard was finished."""
    receipt = receipt_path(root, 0)
    for file in (receipt, *root.glob("data/views-00000-*")):
        (folder / file.relative_to(root)).parent.mkdir(parents=True)
        shutil.copy(file, folder / file.relative_to(root))
    return estimate_size(plan, root=folder)


def line(name: str, manifest: Manifest, shards: int, said: list[SizeEstimate]) -> str:
    real, (made_up, *others) = manifest.totals.bytes, said
    ranged = f"{made_up.bytes / real:.3f} ({made_up.low / real:.2f} to {made_up.high / real:.2f})"
    each = real / max(1, manifest.totals.masked_positions)
    cells = [name, f"{shards}", f"{real:,}", f"{each:.1f}", ranged, *(f"{one.bytes / real:.3f}" for one in others)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=200, help="of each file")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--length", type=int, default=192, help="tokens of a sample at most; a multiple of 32")
    parser.add_argument("--probe", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--settings", nargs="+", type=int, default=range(len(SETTINGS)), help="numbers, from 0")
    parser.add_argument("--teacher", type=Path, default=ASSETS / "teacher")
    parser.add_argument("--student", type=Path, default=ASSETS / "student")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache_size.examine = lambda task: None  # bytes alone are measured here
    head = ["setting", "shards", "real bytes", "per masked", "no teacher", *(f"probe of {n}" for n in arguments.probe)]
    head.append("first shard")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for text in arguments.text:
        for number in arguments.settings:
            name = list(SETTINGS)[number]
            config = run_config(arguments, text, SETTINGS[name])
            plan, _ = make_plan(config)
            said = [estimate_size(plan), *(estimate_size(plan, num_probe=n) for n in arguments.probe)]
            with tempfile.TemporaryDirectory() as folder:
                manifest = dump_teacher(config, Path(folder) / "cache")
                said.append(after_one_shard(plan, Path(folder) / "cache", Path(folder) / "part"))
            print(line(f"{text.stem}: {name}", manifest, plan.num_shards, said), flush=True)


if __name__ == "__main__":
    main()
