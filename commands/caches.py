"""Commands on a finished cache: inspect, verify, repair, merge, decode."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..shared.addresses import is_url, require_apart, require_folder
from ..shared.errors import ConfigError
from .options import (
    ConfigOption,
    DataOption,
    JsonOption,
    RecipeOption,
    SetOption,
    StudentOption,
    TeacherOption,
    run_config,
)
from .printing import print_result, print_text, say_first_look


def inspect_cache(
    path: Annotated[str, typer.Argument(help="Cache folder, or URL: s3://bucket/prefix, hf://datasets/owner/name.")],
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write plots and decoded views as one page.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Write the plots as PNG.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compare with the targets stored in full: tails, rounding, gradients.")
    ] = False,
    student: Annotated[
        str | None,
        typer.Option("--student", help="With --audit: gradients at this checkpoint's logits, or a run's."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a cache holds: teacher, data, noise, sizes, distributions and one decoded sample.

    With --report or --plots, pictures are written instead, and their names printed. Loads no model and no tokenizer
    (--student does). A folder that is new here is checked in full first, a known one in sizes and structure.

    --audit says, by mask ratio, how far training from this cache is from training on the teacher's whole distributions:
    it needs a cache that was dumped with signal.audit_share.
    """
    if student and not audit:
        raise ConfigError("--student is for --audit: gradients are compared at that student's logits; give both")
    if audit and is_url(path):
        raise ConfigError(
            f"--audit reads what stays behind when a cache is read from {path}: copy it to a folder first"
        )
    for option, place in (("--report", report_file), ("--plots", plots)):
        if place is not None:
            read = {"the cache": path, "--student": student}
            require_apart(place, read, what=option, may_hold=True)
    from ..shared.cache.inspect import describe_cache

    say_first_look(path)
    description = describe_cache(path)
    if audit:
        from ..student_train.audit import describe_audit

        description["audit"] = describe_audit(path, student=student)
    if audit and not (report_file or plots):
        from ..shared.cache.audit_report import audit_text

        if as_json:
            typer.echo(json.dumps(description["audit"]))
        else:
            print_text(audit_text(description["audit"]))
    elif report_file or plots:
        written = {"cache": description["cache"], "manifest_hash": description["manifest_hash"]}
        if report_file:
            from ..shared.cache.html_report import write_report

            written["report"] = str(write_report(description, report_file))
        if plots:
            from ..shared.cache.plots import write_pngs

            written["plots"] = [str(path) for path in write_pngs(description, plots)]
        print_result(written, as_json)
    elif as_json:
        typer.echo(json.dumps(description))
    else:
        from ..shared.cache.report import report

        print_text(report(description))


def verify_cache(
    path: Annotated[str, typer.Argument(help="Cache folder, or URL: s3://bucket/prefix, hf://datasets/owner/name.")],
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, file sizes and structure only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a cache from the manifest down to every value; a damaged one ends with exit code 65.

    A cache that a stranger made is safe to train from when this succeeds.
    """
    from ..shared.cache.reader import verify_anywhere

    done = verify_anywhere(path, mode="quick" if quick else "full")
    checked = ["manifest", "file sizes", "structure of every shard"]
    if not quick:
        checked += ["SHA-256 of every file", "page checksums", "meaning of every value", "statistics"]
    sizes = {"shards": done.shards, "rows": done.rows, "bytes": done.bytes}
    audit = {"left out": "left out: the manifest names one, and none of its files is here"}.get(done.audit, done.audit)
    result = {"cache": done.root, "manifest_hash": done.manifest_hash, **sizes, "checked": ", ".join(checked)}
    result |= {"audit": audit}
    print_result({**result, "result": "sound"}, as_json)


def repair_cache(
    path: Annotated[str, typer.Argument(help="Cache folder.")],
    source: Annotated[
        str | None, typer.Option("--from", help="Folder or hub id of another copy; else: ask the teacher again.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    data: DataOption = None, teacher: TeacherOption = None, student: StudentOption = None,
    workers: Annotated[int, typer.Option(help="Processes that ask the teacher.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Replace damaged shards, and nothing else: from another copy, or by the dump's own command options.

    What was damaged is moved into quarantine/ below the cache; nothing is deleted. Without --from and options: only
    say what is damaged.
    """
    from ..shared.cache import repair

    if is_url(path):
        raise ConfigError(
            f"repair-cache works on folders, and {path} is an object store. To mend it there, run its dump-teacher "
            "command with --verify: it compares every byte and makes damaged shards again, the same bytes. Without the "
            f"teacher: copy it to a folder, repair that with --from, and copy it back; tide verify-cache {path} names "
            "what is damaged"
        )
    folder = Path(path)
    if source is not None:
        result = repair.repair_from(folder, source, revision=revision)
    elif not any((recipe, config, settings, data, teacher, student)):
        result = repair.require_undamaged(folder)
    else:
        run = run_config(recipe, config, settings, data=data, teacher=teacher, student=student)
        from ..shared.progress import dump_progress
        from ..teacher_dump.repair import make_again, set_aside

        aside = set_aside(run, folder)
        with dump_progress(lambda: aside.plan.num_shards, folder) as report:
            result = make_again(run, folder, aside, num_workers=workers, report=report)
    print_result(vars(result), as_json)


def merge_caches(
    paths: Annotated[list[Path], typer.Argument(help="Two or more cache folders.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    as_json: JsonOption = False,
) -> None:
    """Put caches of one teacher, student and signal together: other samples, or further views of the same ones.

    Parts of the same samples need different noise.seed; their views are numbered one part after the other. Given again,
    the same command verifies what is there.
    """
    from ..shared.cache.merge import is_merged
    from ..shared.cache.merge import merge_caches as merge

    for path in (*paths, out):
        require_folder(path, "merge-caches")
    done = "done already" if is_merged(out) else "merged"
    manifest = merge(paths, out)
    result = {"cache": str(out), "manifest_hash": manifest.hash, **vars(manifest.totals), "result": done}
    print_result(result, as_json)


def cache_to_datasets(
    cache: Annotated[str, typer.Argument(help="Cache folder, or URL: s3://bucket/prefix, hf://datasets/owner/name.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    temperature: Annotated[float | None, typer.Option(help="One of the cache's; default: its first.")] = None,
    form: Annotated[
        Literal["parquet", "disk"], typer.Option("--format", help="disk: what datasets.load_from_disk reads.")
    ] = "parquet",
    as_json: JsonOption = False,
) -> None:
    """Decode a cache into plain rows for other trainers: token ids, probabilities, tail mass, text.

    examples/train_elsewhere.py learns from them without tide.
    """
    from ..shared.cache.decoded import write_decoded
    from ..shared.cache.reader import open_cache

    require_folder(out, "cache-to-datasets")
    require_apart(out, {"the cache": cache}, what="OUT")
    opened = open_cache(cache)
    if form == "parquet":
        write_decoded(opened, out, temperature=temperature)
    elif out.exists():
        raise ConfigError(f"{out}: exists already; give a new folder")
    else:
        opened.to_datasets(decoded=True, temperature=temperature).save_to_disk(out)
    print_result({"folder": str(out), "rows": len(opened), "format": form}, as_json)
