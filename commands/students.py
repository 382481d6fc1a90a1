"""Commands of stage two: train-student, convert."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..shared.addresses import require_folder
from ..shared.errors import ConfigError
from .options import ConfigOption, JsonOption, RecipeOption, SetOption, StudentOption, run_config
from .printing import print_result, say, say_first_look


def train_student(
    cache: Annotated[str, typer.Option("--cache", help="Cache folder, s3://bucket/prefix, or hf://datasets/owner/name@revision.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder: metrics.jsonl, checkpoints/, student/.")],
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    student: StudentOption = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|FOLDER",
            help="auto: continue from the newest checkpoint below --out; never: begin anew, removing what is there; or "
            "a checkpoint, e.g. run/checkpoints/step-00000500.",
        ),
    ] = "auto",
    no_resume: Annotated[bool, typer.Option("--no-resume", help="The same as --resume never.")] = False,
    heldout: Annotated[
        str | None,
        typer.Option(
            help="Cache of unseen documents to score the student on, every train.heldout_every steps. dump-teacher "
            "--teacher none makes it: no teacher, clean samples only."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Stage two: train a student from a cache. The teacher is never opened.

    Started by torchrun or accelerate launch, all processes train one student, and print nothing but the first one's
    progress.
    """
    require_folder(out, "train-student --out")
    run = run_config(recipe, config, settings, student=student)
    from ..shared.devices import speaks
    from ..shared.progress import train_progress
    from ..student_train.trainer import train_student as train

    if no_resume and resume not in ("auto", "never"):
        raise ConfigError(f"--no-resume and --resume {resume} exclude each other: drop one")
    if speaks(on_machine=True):
        say_first_look(cache)
        if recipe is None and config is None:
            say(f"no --recipe: the losses are {' + '.join(loss.name for loss in run.losses)}, which are the defaults")
    how = {"auto": not no_resume, "never": False}.get(resume, Path(resume))
    with train_progress() as report:
        folder = train(run, cache, out, resume=how, heldout=heldout, report=report, say=say)
    if speaks():
        print_result({"student": str(folder), "metrics": str(out / "metrics.jsonl")}, as_json)


def convert(
    source: Annotated[str, typer.Argument(help="Autoregressive checkpoint (Qwen3, Qwen2, Llama): folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the student's start.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block.", min=1)] = 32,
    mask_token: Annotated[str | None, typer.Option(help="Default: the tokenizer's own, or <|mask|>, added.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, for a tokenizer without a template.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the untrained start of a block-diffusion student from an autoregressive checkpoint.

    Weights stay as they are; adapt the result with train-student, for example --recipe ce.
    """
    from ..student_train.convert import convert_checkpoint

    made = convert_checkpoint(
        source, out, revision=revision, block_size=block_size, mask_token=mask_token, chat_template=chat_template,
        dtype=dtype,
    )  # fmt: skip
    print_result({**vars(made), "folder": str(made.folder)}, as_json)
