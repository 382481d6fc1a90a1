"""The command that scores students on benchmarks: eval."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from .options import ConfigOption, JsonOption, RecipeOption, SetOption, StudentOption, run_config
from .printing import say


class BareFlags(TyperCommand):
    """Gives `--allow-code-execution` its default value where none follows: typer knows no option with and without."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        bare = "--allow-code-execution"
        given = [
            f"{bare}=bubblewrap" if item == bare and (not follows or follows[0].startswith("-")) else item
            for item, follows in ((item, args[i + 1 : i + 2]) for i, item in enumerate(args))
        ]
        return super().parse_args(ctx, given)


def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder for results; the same command continues in it.")],
    student: StudentOption = None,
    compare: Annotated[
        str | None, typer.Option(help="A second student beside it, usually one trained by cross-entropy alone.")
    ] = None,
    suite: Annotated[str, typer.Option(help="tide8: the paper's eight benchmarks by its protocol.")] = "tide8",
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Just these, e.g. gsm8k_cot,bbh; an unknown name lists all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents per task, and per subject of tasks that have some.", min=1)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets as local copies; none: the Hub (docs/evaluation.md).")
    ] = None,
    allow_code_execution: Annotated[
        Literal["bubblewrap", "unsafe-inside-container"] | None,
        typer.Option(
            "--allow-code-execution",
            help="HumanEval and MBPP: run what the student writes; without a value shut in by bubblewrap. "
            "unsafe-inside-container: not shut in.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers written at a time.", min=1)] = 16,
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Score a student on the paper's benchmarks, through lm-eval; writes JSON, Markdown and a picture.

    Needs lm-eval (the extra `eval`: docs/evaluation.md). Under accelerate launch -m tide eval ..., processes share the
    documents.
    The protocol fixes how answers are written; --set decoding.A=B overrides it, and the report says so.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # before it is imported: lm-eval shows a bar per subject, and we a line
    chosen = run_config(recipe, config, settings, student=student)
    from ..student_train.evaluate import EvaluationRun, evaluate_students
    from ..student_train.evaluation_report import markdown

    given = [item.partition("=")[0].removeprefix("decoding.") for item in settings if item.startswith("decoding.")]
    run = EvaluationRun(
        chosen, compare=compare, overrides=frozenset(given), suite=suite,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()), limit=limit,
        batch_size=batch_size, allow_code=allow_code_execution is not None,
        unsafe_code=allow_code_execution == "unsafe-inside-container", data=data,
    )  # fmt: skip
    report = evaluate_students(run, out, say=say)
    if report:  # of several processes, one has it
        table = f"{markdown(report).rstrip()}\n\nIn full: {out / 'evaluation.md'}"
        typer.echo(json.dumps(report) if as_json else table)
