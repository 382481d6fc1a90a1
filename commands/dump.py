"""Commands of stage one: plan, dump-teacher, status."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..shared.errors import ConfigError
from .options import (
    ConfigOption,
    DataOption,
    JsonOption,
    LauncherOption,
    RecipeOption,
    SetOption,
    SkipBadOption,
    StudentOption,
    TeacherOption,
    run_config,
)
from .printing import print_result, say


def plan(
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    data: DataOption = None, teacher: TeacherOption = None, student: StudentOption = None,
    skip_bad: SkipBadOption = False,
    out: Annotated[
        str | None, typer.Option("--out", help="Also write plan.json here, for dump-teacher; or look at its progress.")
    ] = None,
    probe: Annotated[
        int, typer.Option(metavar="N", help="Ask the teacher about N samples, 64 say: bytes within a few per cent.")
    ] = 0,
    tflops: Annotated[
        float | None, typer.Option(help="What one of your GPUs sustains, for the GPU-hours; stated in the answer.")
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Say what a dump would do and cost: samples, views, shards, bytes, the teacher's memory, FLOPs and GPU-hours.

    Needs tokenizers and the teacher's config.json, but no weights, and so states a wide range of bytes: how sure the
    teacher is decides them. --probe asks it; while a dump runs, --out goes by its finished shards.
    """
    run = run_config(recipe, config, _with(settings, skip_bad), data=data, teacher=teacher, student=student)
    if tflops is not None and not tflops > 0:
        raise ConfigError(f"--tflops {tflops:g}: expected a positive number of teraflops a second")
    from ..teacher_dump.cache_size import estimate_size, require_probe
    from ..teacher_dump.cost import ASSUMED_TFLOPS, describe_plan, warn_of_shard_sizes
    from ..teacher_dump.dump import prepare_plan
    from ..teacher_dump.plan import make_plan

    require_probe(probe)
    made = prepare_plan(run, out, say=say) if out else make_plan(run, say=say)[0]
    for line in made.sentences():
        say(line)
    size = estimate_size(made, num_probe=probe, root=out, say=say)
    warn_of_shard_sizes(made, size)
    print_result(describe_plan(made, size, tflops=tflops or ASSUMED_TFLOPS), as_json)


def dump_teacher(
    out: Annotated[
        str, typer.Option("--out", help="Cache folder, or s3://bucket/prefix; the same command again continues it.")
    ],
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    data: DataOption = None, teacher: TeacherOption = None, student: StudentOption = None,
    launcher: LauncherOption = "local",
    workers: Annotated[
        int, typer.Option(help="local: processes; slurm: elements of the array; ray: actors.", min=1)
    ] = 1,
    sbatch: Annotated[
        list[str], typer.Option("--sbatch", metavar="OPTIONS", help='slurm: as in "--partition=gpu --time=4:00:00".')
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="slurm: print the job script, submit nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare finished shards byte by byte first.")] = False,
    skip_bad: SkipBadOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Stage one: ask the teacher about every planned view and write the cache.

    The same command again finishes what was interrupted, and redoes nothing that is whole; `tide status OUT` tells how
    far it is. SIGTERM or SIGUSR1: the shard in hand is finished within workers.grace_s seconds, then exit code 75.
    """
    run = run_config(recipe, config, _with(settings, skip_bad), data=data, teacher=teacher, student=student)
    if launcher == "slurm":
        options = {"--recipe": recipe, "--config": config, "--data": data, "--teacher": teacher, "--student": student}
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        words += [word for item in _with(settings, skip_bad) for word in ("--set", item)]
        words += ["--out", out, *(["--verify"] if verify else [])]
        from ..teacher_dump.dump import require_startable
        from ..teacher_dump.launchers.slurm import array_script, submit

        script = array_script(words, run, num_workers=workers, folder=Path.cwd(), sbatch=sbatch)
        if dry_run:
            typer.echo(script, nl=False)
            return
        require_startable(run, out)
        job = submit(script)
        print_result({"job": job, "workers": workers, "cache": out, "look_with": f"tide status {out}"}, as_json)
        return
    if sbatch or dry_run:
        raise ConfigError("--sbatch and --dry-run belong to --launcher slurm")
    from ..shared.progress import dump_progress
    from ..teacher_dump.dump import dump_teacher as dump
    from ..teacher_dump.dump import prepare_plan

    def prepare() -> int:
        plan = prepare_plan(run, out, launcher=launcher, say=say)
        for line in plan.sentences():
            say(line)
        return plan.num_shards

    with dump_progress(prepare, out) as report:
        manifest = dump(run, out, launcher=launcher, num_workers=workers, verify=verify, report=report)
    from ..shared.cache.coverage import left_out
    from ..shared.cache.verdict import verdict

    said = verdict(manifest)
    hashes = {"manifest_hash": manifest.hash, "plan_hash": manifest.plan_hash}
    shown = {"left_out": left_out(manifest.dropped, manifest.totals.samples) or "nothing"}
    shown |= {"verdict": said["sentence"]} if said else {}
    print_result({"cache": out, **hashes, **vars(manifest.totals), **shown}, as_json)


def status(
    path: Annotated[str, typer.Argument(help="Cache folder or URL: what dump-teacher was given as --out.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until it is complete.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.2)] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """How a dump is doing: shards done, running and failed, tokens per second, time left, every worker, the last error.

    Looks at the folder alone, from any machine that sees it; --watch --json prints one object a line.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.live import Live

    from ..teacher_dump.status import dump_status, status_table
    from ..teacher_dump.status import watch as looks

    statuses = looks(path, every) if watch else [dump_status(path)]
    console = Console(highlight=False, markup=False)
    if as_json or not (watch and console.is_terminal):
        for one in statuses:
            if as_json:
                typer.echo(json.dumps(asdict(one)))
            else:
                console.print(status_table(one))
        return
    with Live(console=console, auto_refresh=False) as live:
        for one in statuses:
            live.update(status_table(one), refresh=True)


def _with(settings: list[str], skip_bad: bool) -> list[str]:
    """The settings of a command, `--skip-bad` included."""
    return [*settings, "data.skip_bad=true"] if skip_bad else settings
