"""Which of the paper's claims hold at the size of the demo: one command from nothing to the table of docs/log.md.

    python benchmarks/paper_claims.py --out FOLDER --seeds 5 --workers 2     # again: continues
    python benchmarks/paper_claims.py --out FOLDER --warm                    # students that can already write a little

Dumps the demo's functions twice (without CompDemo and with it) and its held-out documents, then does what `tide ablate
--matrix paper` does. Students start from random weights, as in the demo; with `--warm`, as the paper's student is a
trained model, from one that read all functions of the same modules, with cross-entropy alone.
"""

import argparse
import os
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tide.demo import SIZES, demo_config, heldout_config
from tide.shared.config import LossConfig, RunConfig
from tide.student_train.ablation import plan_ablation, run_ablation
from tide.student_train.ablation_report import claims_table, table
from tide.student_train.matrix import read_matrix
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher

FIRST_SEED = 41  # neither the demo's nor those with which its settings were chosen
WARM_SEED, WARM_STEPS = 40, 800


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def dump_all(config: RunConfig, out: Path, workers: int) -> None:
    """The caches without and with CompDemo, and the held-out documents."""
    say("dumping")
    dump_teacher(config, out / "cache", num_workers=workers)
    dump_teacher(replace(config, noise=replace(config.noise, comp_demo=True)), out / "comp_demo", num_workers=workers)
    dump_teacher(heldout_config(config, SIZES["full"]), out / "heldout", num_workers=1)


def warm_student(config: RunConfig, out: Path, workers: int) -> Path:
    """A student of all functions of these modules, by cross-entropy on fresh noise."""
    data = replace(config.data, limit=None, sample_seed=None)
    clean = replace(config, data=data, teacher=replace(config.teacher, path=""), noise=replace(config.noise, views=1))
    dump_teacher(clean, out / "clean", num_workers=workers)
    train = replace(config.train, steps=WARM_STEPS, seed=WARM_SEED, ce_noise="fresh", save_every=200)
    start = replace(clean, losses=(LossConfig("ce"),), train=train)
    return train_student(start, str(out / "clean"), out / "warm", report=lambda metrics: say(str(metrics)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--matrix", default="paper", help="as tide ablate --matrix")
    parser.add_argument("--warm", action="store_true", help="begin with a trained student")
    asked = parser.parse_args()
    with resources.as_file(resources.files("tide.recipes").joinpath("demo_assets")) as assets:
        config = demo_config(assets, SIZES["full"])
        config = replace(config, train=replace(config.train, seed=FIRST_SEED))
        dump_all(config, asked.out, asked.workers)
        if asked.warm:
            warm = warm_student(config, asked.out, asked.workers)
            config = replace(config, student=replace(config.student, path=str(warm)))
        matrix = read_matrix(asked.matrix)
        caches = [str(asked.out / name) for name in ("cache", "comp_demo")]
        planned = plan_ablation(matrix, config, caches, str(asked.out / "heldout"), num_seeds=asked.seeds)
        where = asked.out / (Path(asked.matrix).stem + ("-warm" if asked.warm else ""))
        result = run_ablation(matrix, planned, where, workers=asked.workers, say=say)
    print(f"{table(result)}\n\n{claims_table(result)}")


if __name__ == "__main__":
    main()
