"""Commands about this machine and what tide knows: doctor, models, demo."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..shared.errors import ConfigError, Unavailable
from .options import JsonOption
from .printing import print_text


def doctor(
    out: Annotated[
        Path,
        typer.Option("--out", help="Where caches or runs would go, there or not yet; default: the current folder."),
    ] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: versions, devices, memory, disk, hub login, and what is known to cause trouble.

    Changes nothing and needs no network. Exit code 69 if something that tide needs is missing.
    """
    from ..shared.doctor import examine, report

    health = examine(out)
    if as_json:
        typer.echo(json.dumps(health))
    else:
        print_text(report(health))
    if not health["ok"]:
        raise typer.Exit(Unavailable.exit_code)


def models(as_json: JsonOption = False) -> None:
    """List the teachers and students that tide has native classes for, and how each is asked."""
    from ..shared.models.specs import families

    rows = families()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(row["model_type"])
        for name, value in row.items():
            if value and name != "model_type":
                typer.echo(f"    {name:12}{value}")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the caches, the runs, demo.json and demo.png.")] = Path(
        "demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="All arms and more seeds: about twenty minutes.")] = False,
    ci: Annotated[bool, typer.Option("--ci", help="Few arms and steps: proves that the path works, no more.")] = False,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.", min=1)] = 2,
    as_json: JsonOption = False,
) -> None:
    """All of tide in a few minutes on two CPU cores: dump a small teacher, train students, compare, draw."""
    if full and ci:
        raise ConfigError("--full and --ci exclude each other")
    from ..demo import SIZES, run_demo, table, verdict

    size = SIZES["full" if full else "ci" if ci else "default"]
    result = run_demo(out, size=size, workers=workers, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(f"\n{table(result)}\n\n{verdict(result)}\n\npicture: {out / 'demo.png'}")
