"""What a cache with k = 16 and a tail category does to the student's gradient, against the dense loss.

    python benchmarks/offline_online.py [--k 16] [--steps 40]

Two caches of the same views, one with k entries, one with the whole loss support (equal to the teacher in the loop:
tests/test_offline_equals_online.py). The same student, fresh and after some steps of cross-entropy, is given the
gradient of one global batch from each: cosine and ratio of norms, at T = 1 and T = 2, for a shared and for two
different tokenizers. About a minute on one core.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tide.shared.cache import open_cache
from tide.shared.config import LossConfig, TidalConfig, load_config
from tide.shared.models.loading import load_model
from tide.student_train.objective import Objective
from tide.student_train.trainer import Run, train_student
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.pairing import open_pairing

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "demo_assets"
LOSSES = {"KL": {}, "reverse KL": {"reverse": True}, "TIDAL": {"tidal": TidalConfig()}}


def teacher_folder(root: Path) -> tuple[Path, str]:
    """The demo's trained teacher, or a random one with sharpened logits."""
    if (ASSETS / "teacher" / "model.safetensors").exists():
        return ASSETS / "teacher", "the demo's trained teacher"
    folder = root / "teacher"
    shutil.copytree(ASSETS / "teacher", folder)
    model = load_model(folder, random_seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)
    return folder, "a random teacher with sharpened logits"


def student_folder(root: Path, tokenizer: str) -> Path:
    """The demo's student without weights, with the tokenizer of either side."""
    folder = root / f"student-{tokenizer}"
    shutil.copytree(ASSETS / tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    config = json.loads((ASSETS / "student" / "config.json").read_text())
    config["vocab_size"] = json.loads((ASSETS / tokenizer / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gradient(run: Run, loss: LossConfig) -> torch.Tensor:
    """The gradient of one global batch, half-way through training, as one vector."""
    run.student.zero_grad()
    run.objective = Objective((loss,), signal="topk", temperatures=(1.0, 2.0))
    step = run.num_steps // 2
    run.gradient(step, *run.build(step))
    return torch.cat([p.grad.flatten().double() for p in run.student.parameters() if p.grad is not None])


def main(k: int, steps: int, root: Path) -> None:
    start = time.perf_counter()
    teacher, what = teacher_folder(root)
    print(f"teacher: {what}; k = {k}; gradient with the tail category against the dense one\n")
    print("| tokenizers | student | loss | T | cosine | norm ratio | relative error |\n|---|---|---|---|---|---|---|")
    for pair, tokenizer in (("shared", "teacher"), ("different", "student")):
        student = student_folder(root, tokenizer)
        settings = [
            "data.source=stdlib[train]", "data.limit=24", "data.max_length=96", "data.teacher_max_length=96",
            f"teacher.path={teacher}", "teacher.dtype=float32", f"student.path={student}", "student.block_size=16",
            "noise.views=2", "signal.temperatures=[1.0, 2.0]", "train.precision=fp32", "train.batch_size=12",
            f"train.steps={steps}", "train.optimizer=muon", "train.lr=3e-3",
        ]  # fmt: skip
        config = load_config(overrides=[*settings, f"signal.top_k={k}"])
        dense = replace(config, signal=replace(config.signal, top_k=open_pairing(config).num_support))
        dump_teacher(config, root / pair / "sparse")
        dump_teacher(dense, root / pair / "dense")
        mass = head_mass(root / pair / "sparse")
        warm = train_student(config, str(root / pair / "sparse"), root / pair / "run")
        for state, path in (("fresh", student), (f"{steps} steps of CE", warm)):
            asked = replace(config, student=replace(config.student, path=str(path)))
            runs = [Run(asked, open_cache(root / pair / cache), root / "unused") for cache in ("sparse", "dense")]
            runs[1].order = runs[0].order  # it follows the row groups, and those of the two caches differ
            for name, more in LOSSES.items():
                for temperature in (1.0, 2.0):
                    loss = LossConfig("kl", temperature=temperature, **more)
                    ours, exact = (gradient(run, loss) for run in runs)
                    cosine = float(ours @ exact / (ours.norm() * exact.norm()))
                    ratio, error = float(ours.norm() / exact.norm()), float((ours - exact).norm() / exact.norm())
                    print(f"| {pair} | {state} | {name} | {temperature:g} | {cosine:.4f} | {ratio:.3f} | {error:.3f} |")
        print(f"| {pair} | support {dense.signal.top_k} | mean head mass | 1, 2 | {mass[0]:.3f} | {mass[1]:.3f} | |")
    print(f"\n{time.perf_counter() - start:.0f} s")


def head_mass(cache: Path) -> list[float]:
    """Mean probability of the stored entries at each temperature."""
    opened = open_cache(cache)
    sums, count = [0.0] * len(opened.manifest.signal.temperatures), 0
    for row in opened:
        begin = 0
        for target, num in enumerate(row.num_top):
            for column, temperature in enumerate(opened.manifest.signal.temperatures):
                scaled = row.top_logp[begin : begin + num] / temperature
                head = np.log1p(-np.exp(row.log_tail[target, column]))
                logs = scaled - np.logaddexp.reduce(scaled) + head
                sums[column] += sum(math.exp(value) for value in logs)
            begin += num
            count += 1
    return [total / max(1, count) for total in sums]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(arguments.k, arguments.steps, Path(folder))
