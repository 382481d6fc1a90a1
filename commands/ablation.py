"""The command that compares kinds of students: ablate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..shared.errors import TryAgain
from .options import ConfigOption, JsonOption, RecipeOption, SetOption, StudentOption, run_config
from .printing import say


def ablate(
    cache: Annotated[
        list[str], typer.Option("--cache", help="Cache folder or hub id; may be repeated: an arm takes one it fits.")
    ],
    heldout: Annotated[
        str,
        typer.Option(
            "--heldout",
            help="Cache of unseen documents, to score every student on. dump-teacher --teacher none makes it: no "
            "teacher, clean samples only.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs, ablation.md, ablation.json, ablation.png.")],
    matrix: Annotated[
        str, typer.Option("--matrix", metavar="NAME|FILE", help="paper, cache, demo, a file (student_train/matrix.py).")
    ] = "paper",
    seeds: Annotated[int, typer.Option("--seeds", help="Students per arm; later, more may be asked for.", min=1)] = 3,
    workers: Annotated[
        int, typer.Option("--workers", help="Trainings at a time, one CPU thread each; GPUs are given in turn.", min=1)
    ] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and train nothing.")] = False,
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    student: StudentOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Compare kinds of students from one cache: arms x seeds, with standard errors, as a table and a picture.

    The built-in matrix is the paper's ablations. --recipe, --config and --set are what all arms share; seeds count from
    train.seed. The same command again trains only what is not finished.
    """
    run = run_config(recipe, config, settings, student=student)
    from ..student_train.ablation import PICTURE_NAME, TABLE_NAME, plan_ablation, refuse_own_inputs, run_ablation
    from ..student_train.ablation_report import claims_table, missing, table
    from ..student_train.matrix import read_matrix
    from ..student_train.objective import loss_name

    asked = read_matrix(matrix)
    planned = plan_ablation(asked, run, cache, heldout, num_seeds=seeds)
    refuse_own_inputs(planned, out)
    if dry_run:
        rows = [
            {
                "arm": job.arm, "seed": job.seed, "cache": job.cache, "finished": job.scores(out) is not None,
                "losses": [f"{loss.weight:g} {loss_name(loss)}" for loss in job.config.losses if loss.weight],
            }
            for job in planned.jobs
        ]  # fmt: skip
        if as_json:
            typer.echo(json.dumps({"jobs": rows, "left_out": dict(planned.left_out)}))
            return
        width = max(len(row["arm"]) for row in rows)
        for row in rows:
            done, losses = "finished" if row["finished"] else "to train", " + ".join(row["losses"])
            typer.echo(f"{row['arm']:{width}}  seed {row['seed']}  {done}  {losses}  {row['cache']}")
        for name, reason in planned.left_out.items():
            typer.echo(f"{name:{width}}  left out  {reason}")
        return
    for name, reason in planned.left_out.items():
        say(f"left out: {name} {reason}")
    result = run_ablation(asked, planned, out, workers=workers, say=say)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        parts = table(result), claims_table(result), missing(result), f"{out / TABLE_NAME}, {out / PICTURE_NAME}"
        typer.echo("\n\n".join(filter(None, parts)))
    if result["failed"]:
        raise TryAgain(f"not trained: {', '.join(result['failed'])} (see above); the same command tries them again")
