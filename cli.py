"""The `tide` command: names its subcommands and turns their errors into one message and an exit code.

torch is imported inside commands only. Data goes to stdout, progress and errors to stderr; `--json` prints what a
script would want. Exit codes are those of shared/errors.py.
"""

import io
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .commands import ablation, caches, dump, evaluation, machine, sharing, students, writing
from .shared.errors import EXIT_INTERRUPTED, TideError, printable
from .shared.shown_text import printable_logs, redacted, terminal_text
from .shared.stop_signals import StopAsked, end_on_signals


class _Interrupted(Exception):
    """Ctrl-C, carried past typer, which would end the process without a word."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    name="tide", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Distil large diffusion language models into small ones, offline: ask the teacher once, train from the cache.",
)  # fmt: skip

for command in (
    dump.plan, dump.dump_teacher, dump.status, students.train_student, students.convert, ablation.ablate,
    writing.generate, writing.chat, caches.inspect_cache, caches.verify_cache, sharing.push_cache, sharing.pull_cache,
    sharing.push_student, caches.repair_cache, caches.merge_caches, caches.cache_to_datasets, machine.doctor,
    machine.models, machine.demo,
):  # fmt: skip
    app.command()(command)
app.command("eval", cls=evaluation.BareFlags)(evaluation.evaluate)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a TideError is one message on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    printable_logs()
    warnings.formatwarning = lambda message, category, *_, **__: printable(
        redacted(f"{category.__name__}: {message}\n")
    )
    try:
        with end_on_signals():
            app()
    except TideError as error:
        said = Exception.__str__(error)  # not spelled out: what a stranger wrote to act is left out here
        typer.echo(terminal_text(redacted(f"{type(error).__name__}: {said}")), err=True)
        sys.exit(error.exit_code)
    except (_Interrupted, KeyboardInterrupt):
        typer.echo("interrupted; what was finished is kept, and the same command continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except StopAsked as stop:
        typer.echo(f"TryAgain: {stop}", err=True)
        sys.exit(stop.exit_code)
    except Exception:
        typer.echo(printable(redacted(traceback.format_exc())), err=True, nl=False)
        typer.echo("This is a bug in tide, not a mistake of yours: please report it with the lines above.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
