"""Options that several commands share, and the configuration they add up to."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..shared.config import RunConfig

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe that ships with tide, e.g. tide-cross.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file with the same sections as a recipe.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one setting; may be repeated.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Conversations: hub ids, folders or files joined by +.")]
TeacherOption = Annotated[
    str | None, typer.Option("--teacher", help="Teacher checkpoint; none: no teacher, clean samples only.")
]
StudentOption = Annotated[str | None, typer.Option("--student", help="Student checkpoint: folder or hub id.")]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out and count what has no usable answer; short for data.skip_bad.")
]
LauncherOption = Annotated[
    Literal["local", "env", "slurm", "ray"],
    typer.Option(
        help="local: workers here; env: one rank of accelerate, torchrun or Slurm; slurm: submit a job array of "
        "workers; ray: actors of a Ray cluster."
    ),
]
StreamOption = Annotated[
    Literal["block", "step", "none"], typer.Option(help="Show text when its block is finished, or in every step.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def run_config(recipe: str | None, path: Path | None, settings: list[str], **flags: str | None) -> "RunConfig":
    """The configuration of a command; `--data`, `--teacher` and `--student` are short for three settings."""
    from ..shared.config import load_config
    from .printing import say

    names = {"data": "data.source", "teacher": "teacher.path", "student": "student.path"}
    short = [f"{names[name]}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return load_config(recipe, path, [*short, *settings], tell=say)
