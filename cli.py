"""The `tide` command: each subcommand parses, calls one function and prints. torch is imported inside commands only.

Data goes to stdout, progress and errors to stderr; `--json` prints what a script would want. Exit codes are those of
shared/errors.py.
"""

import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from . import __version__
from .shared.errors import EXIT_INTERRUPTED, ConfigError, TideError, Unavailable
from .shared.redaction import redacted

if TYPE_CHECKING:
    from rich.text import Text

    from .shared.config import RunConfig
    from .student_train.open_decoder import Writer
    from .student_train.prompts import Prompt
    from .student_train.sampling import Generation


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

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe that ships with tide, e.g. tide-cross.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file with the same sections as a recipe.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one setting; may be repeated.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Conversations: hub ids, folders or files joined by +.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="Teacher checkpoint; none: cache clean samples.")]
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


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def plan(
    recipe: RecipeOption = None, config: ConfigOption = None, settings: SetOption = [],  # noqa: B006
    data: DataOption = None, teacher: TeacherOption = None, student: StudentOption = None,
    skip_bad: SkipBadOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write plan.json here, for dump-teacher; or look at its progress.")
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
    run = _run_config(recipe, config, _with(settings, skip_bad), data=data, teacher=teacher, student=student)
    if tflops is not None and not tflops > 0:
        raise ConfigError(f"--tflops {tflops:g}: expected a positive number of teraflops a second")
    from .teacher_dump.cache_size import estimate_size, require_probe
    from .teacher_dump.cost import ASSUMED_TFLOPS, describe_plan, warn_of_shard_sizes
    from .teacher_dump.dump import prepare_plan
    from .teacher_dump.plan import make_plan

    require_probe(probe)
    made = prepare_plan(run, out) if out else make_plan(run)[0]
    size = estimate_size(made, num_probe=probe, root=out, say=_say)
    warn_of_shard_sizes(made, size)
    _print(describe_plan(made, size, tflops=tflops or ASSUMED_TFLOPS), as_json)


@app.command()
def dump_teacher(
    out: Annotated[Path, typer.Option("--out", help="Cache folder; the same command again continues it.")],
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
    run = _run_config(recipe, config, _with(settings, skip_bad), data=data, teacher=teacher, student=student)
    if launcher == "slurm":
        options = {"--recipe": recipe, "--config": config, "--data": data, "--teacher": teacher, "--student": student}
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        words += [word for item in _with(settings, skip_bad) for word in ("--set", item)]
        words += ["--out", str(out), *(["--verify"] if verify else [])]
        _submit(run, words, out, workers=workers, sbatch=sbatch, dry_run=dry_run, as_json=as_json)
        return
    if sbatch or dry_run:
        raise ConfigError("--sbatch and --dry-run belong to --launcher slurm")
    from .shared.progress import dump_progress
    from .teacher_dump.dump import dump_teacher as dump
    from .teacher_dump.dump import prepare_plan

    def prepare() -> int:
        return prepare_plan(run, out, launcher=launcher).num_shards

    with dump_progress(prepare, out) as report:
        manifest = dump(run, out, launcher=launcher, num_workers=workers, verify=verify, report=report)
    hashes = {"manifest_hash": manifest.hash, "plan_hash": manifest.plan_hash}
    _print({"cache": str(out), **hashes, **vars(manifest.totals)}, as_json)


@app.command()
def status(
    path: Annotated[Path, typer.Argument(help="Cache folder: what dump-teacher was given as --out.")],
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

    from .teacher_dump.status import dump_status, status_table
    from .teacher_dump.status import watch as looks

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


@app.command()
def train_student(
    cache: Annotated[str, typer.Option("--cache", help="Cache folder, or hf://datasets/owner/name@revision.")],
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
        typer.Option(help="Cache of unseen documents to score the student on, every train.heldout_every steps."),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Stage two: train a student from a cache. The teacher is never opened.

    Started by torchrun or accelerate launch, all processes train one student, and print nothing but the first one's
    progress.
    """
    run = _run_config(recipe, config, settings, student=student)
    from .shared.progress import train_progress
    from .student_train.trainer import train_student as train

    if no_resume and resume not in ("auto", "never"):
        raise ConfigError(f"--no-resume and --resume {resume} exclude each other: drop one")
    how = {"auto": not no_resume, "never": False}.get(resume, Path(resume))
    with train_progress() as report:
        folder = train(run, cache, out, resume=how, heldout=heldout, report=report)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        _print({"student": str(folder), "metrics": str(out / "metrics.jsonl")}, as_json)


@app.command()
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
    from .student_train.convert import convert_checkpoint

    made = convert_checkpoint(
        source, out, revision=revision, block_size=block_size, mask_token=mask_token, chat_template=chat_template,
        dtype=dtype,
    )  # fmt: skip
    _print({**vars(made), "folder": str(made.folder)}, as_json)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Questions; none: --file or standard input.")] = None,
    student: StudentOption = None, recipe: RecipeOption = None, config: ConfigOption = None,
    settings: SetOption = [],  # noqa: B006
    file: Annotated[
        str | None, typer.Option("--file", help='.jsonl: {"prompt": "..."} a line; else the whole file; -: stdin.')
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the answers' random numbers, at a temperature above 0.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time; changes the speed alone.", min=1)] = 8,
    stream: StreamOption = "block",
    show_steps: Annotated[bool, typer.Option("--show-steps", help="Paint every denoising step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with tokens and forwards.")] = False,
) -> None:  # fmt: skip
    """Let a student write: block by block, in each step the tokens it is surest of.

    Further settings by --set: decoding.steps (fewer is faster), decoding.threshold, decoding.top_p, decoding.guidance,
    decoding.prompt_alignment.
    """
    from .student_train.prompts import answer_prompts, read_prompts

    asked = read_prompts(prompts or [], file, sys.stdin, seed=seed)
    writer = _open_writer(
        recipe, config, settings, student=student, max_new_tokens=max_new_tokens, temperature=temperature,
        stop=stop or None,
    )  # fmt: skip
    if show_steps:
        _show_steps(writer, asked, raw)
    elif as_json:
        answer_prompts(writer, asked, raw=raw, batch_size=batch_size, show=_print_generation)
    elif len(asked) == 1 and stream != "none":
        from .student_train.answer_screen import TextStream

        watch = TextStream(writer.decoder.reader, writer.settings.stop, _write, by_block=stream == "block")
        answer_prompts(writer, asked, raw=raw, batch_size=1, show=lambda *_: _write("\n"), watch=watch)
    else:
        answer_prompts(writer, asked, raw=raw, batch_size=batch_size, show=lambda _, answer: _write(f"{answer.text}\n"))


@app.command()
def chat(
    student: StudentOption = None, recipe: RecipeOption = None, config: ConfigOption = None,
    settings: SetOption = [],  # noqa: B006
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first answer; each further one adds 1.")] = 0,
    stream: StreamOption = "block",
) -> None:  # fmt: skip
    """Talk with a student: /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."""
    writer = _open_writer(
        recipe, config, settings, student=student, max_new_tokens=max_new_tokens, temperature=temperature
    )
    from .student_train.chat import Chat

    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    question = "> " if sys.stdin.isatty() else ""
    session = Chat(writer, ask=lambda: input(question), write=_write, note=_say, seed=seed, stream=stream)
    session.run()


def _open_writer(
    recipe: str | None, config: Path | None, settings: list[str], *, student: str | None, **short: Any
) -> "Writer":
    """The student of `generate` and `chat`; `short` are options that stand for settings of `decoding`."""
    # characters stay as they are: YAML would read an escaped pair of surrogates as two halves
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in short.items() if value is not None}
    given = [f"decoding.{name}={value}" for name, value in written.items()]
    run = _run_config(recipe, config, [*given, *settings], student=student)
    from .student_train.open_decoder import open_writer

    return open_writer(run)


def _show_steps(writer: "Writer", prompts: "list[Prompt]", raw: bool) -> None:
    """One prompt after the other, each step painted on stdout."""
    from rich.console import Console

    from .student_train.answer_screen import StepPainter
    from .student_train.prompts import answer_prompts

    console = Console(highlight=False, markup=False)
    for prompt in prompts:
        with StepPainter(writer.decoder.reader, writer.settings.max_new_tokens, console) as painter:
            answer_prompts(writer, [prompt], raw=raw, batch_size=1, show=lambda *_: None, watch=painter)


def _print_generation(prompt: "Prompt", answer: "Generation") -> None:
    """One line of `generate --json`."""
    result = {
        "prompt": prompt.shown, "text": answer.text, "finish": answer.finish, "tokens": len(answer.ids),
        "seed": prompt.seed, "forwards": answer.num_forwards, "token_forwards": answer.num_token_forwards,
    }  # fmt: skip
    typer.echo(json.dumps(result))


def _write(text: str) -> None:
    """A piece of an answer on stdout: harmless on a terminal, exact in a file or a pipe."""
    from .shared.cache.inert import terminal_text

    sys.stdout.write(terminal_text(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@app.command()
def inspect_cache(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write plots and decoded views as one page.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Write the plots as PNG.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compare with the targets stored in full: tails, rounding, gradients.")
    ] = False,
    student: Annotated[
        str | None, typer.Option("--student", help="With --audit: gradients at this checkpoint's logits.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a cache holds: teacher, data, noise, sizes, distributions and one decoded sample.

    With --report or --plots, pictures are written instead, and their names printed. Loads no model and no tokenizer
    (--student does). File sizes and structure are checked; verify-cache checks every byte.

    --audit says, by mask ratio, how far training from this cache is from training on the teacher's whole distributions:
    it needs a cache that was dumped with signal.audit_share.
    """
    if student and not audit:
        raise ConfigError("--student is for --audit: gradients are compared at that student's logits; give both")
    from .shared.cache.inspect import describe_cache

    description = describe_cache(path)
    if audit:
        from .student_train.audit import describe_audit

        description["audit"] = describe_audit(path, student=student)
    if audit and not (report_file or plots):
        from .shared.cache.audit_report import audit_text

        if as_json:
            typer.echo(json.dumps(description["audit"]))
        else:
            _print_text(audit_text(description["audit"]))
    elif report_file or plots:
        _print(_write_pictures(description, report_file, plots), as_json)
    elif as_json:
        typer.echo(json.dumps(description))
    else:
        from .shared.cache.report import report

        _print_text(report(description))


def _write_pictures(description: dict[str, Any], page: Path | None, folder: Path | None) -> dict[str, Any]:
    """A page, PNG files or both; what was written where."""
    written: dict[str, Any] = {"cache": description["cache"], "manifest_hash": description["manifest_hash"]}
    if page:
        from .shared.cache.html_report import write_report

        written["report"] = str(write_report(description, page))
    if folder:
        from .shared.cache.png import write_pngs

        written["plots"] = [str(path) for path in write_pngs(description, folder)]
    return written


@app.command()
def verify_cache(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, file sizes and structure only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a cache from the manifest down to every value; a damaged one ends with exit code 65.

    A cache that a stranger made is safe to train from when this succeeds.
    """
    from .shared.cache.verify import verify_cache as verify

    done = verify(path, mode="quick" if quick else "full")
    checked = ["manifest", "file sizes", "structure of every shard"]
    if not quick:
        checked += ["SHA-256 of every file", "page checksums", "meaning of every value", "statistics"]
    sizes = {"shards": done.shards, "rows": done.rows, "bytes": done.bytes}
    audit = {"left out": "left out: the manifest names one, and none of its files is here"}.get(done.audit, done.audit)
    result = {"cache": done.root, "manifest_hash": done.manifest_hash, **sizes, "checked": ", ".join(checked)}
    result |= {"audit": audit}
    _print({**result, "result": "sound"}, as_json)


@app.command()
def push_cache(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    repository: Annotated[str, typer.Argument(help="Data set of the Hub: owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="For you and your organisation only.")] = False,
    tag: Annotated[str | None, typer.Option(help="Default: v- and the start of the manifest's hash.")] = None,
    teacher_licence: Annotated[
        str | None, typer.Option(help="Licence of the teacher, if the manifest says unknown.")
    ] = None,
    data_licence: Annotated[str | None, typer.Option(help="Licence of the data, if the manifest says unknown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a cache and publish it on the Hub, with a card and a preview; the manifest goes up last, then a tag.

    The same command again continues what was interrupted and uploads nothing twice.
    """
    from .shared.cache.push import push_cache as push

    done = push(
        path, repository, private=private, tag=tag, teacher_licence=teacher_licence, data_licence=data_licence,
        say=_say,
    )  # fmt: skip
    _print(vars(done), as_json)


@app.command()
def pull_cache(
    address: Annotated[str, typer.Argument(help="owner/name, owner/name@revision or hf://datasets/owner/name.")],
    out: Annotated[Path, typer.Argument(help="New folder; the same command again continues it.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the newest.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Fetch the audit too, which inspect-cache --audit reads.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Fetch a cache from the Hub at one commit and verify it in full; OUT/hub.json says which commit."""
    from .shared.cache.pull import pull_cache as pull

    _print(vars(pull(address, out, revision=revision, audit=audit, say=_say)), as_json)


@app.command()
def repair_cache(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
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
    from .shared.cache import repair

    if source is not None:
        result = repair.repair_from(path, source, revision=revision)
    elif not any((recipe, config, settings, data, teacher, student)):
        result = repair.require_undamaged(path)
    else:
        run = _run_config(recipe, config, settings, data=data, teacher=teacher, student=student)
        from .shared.progress import dump_progress
        from .teacher_dump.repair import make_again, set_aside

        aside = set_aside(run, path)
        with dump_progress(lambda: aside.plan.num_shards, path) as report:
            result = make_again(run, path, aside, num_workers=workers, report=report)
    _print(vars(result), as_json)


@app.command()
def merge_caches(
    paths: Annotated[list[Path], typer.Argument(help="Two or more cache folders.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    as_json: JsonOption = False,
) -> None:
    """Put caches of one teacher, student and signal together: other samples, or further views of the same ones.

    Parts of the same samples need different noise.seed; their views are numbered one part after the other.
    """
    from .shared.cache.merge import merge_caches as merge

    manifest = merge(paths, out)
    _print({"cache": str(out), "manifest_hash": manifest.hash, **vars(manifest.totals)}, as_json)


@app.command()
def cache_to_datasets(
    cache: Annotated[str, typer.Argument(help="Cache folder or hub id.")],
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
    from .shared.cache.decoded import write_decoded
    from .shared.cache.reader import open_cache

    opened = open_cache(cache)
    if form == "parquet":
        write_decoded(opened, out, temperature=temperature)
    elif out.exists():
        raise ConfigError(f"{out}: exists already; give a new folder")
    else:
        opened.to_datasets(decoded=True, temperature=temperature).save_to_disk(out)
    _print({"folder": str(out), "rows": len(opened), "format": form}, as_json)


@app.command()
def doctor(
    path: Annotated[Path, typer.Option(help="Folder to test writing in; default: the current one.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: versions, devices, memory, disk, hub login, and what is known to cause trouble.

    Changes nothing and needs no network. Exit code 69 if something that tide needs is missing.
    """
    from .shared.doctor import examine, report

    health = examine(path)
    if as_json:
        typer.echo(json.dumps(health))
    else:
        _print_text(report(health))
    if not health["ok"]:
        raise typer.Exit(Unavailable.exit_code)


@app.command()
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
    from .demo import SIZES, run_demo, table, verdict

    size = SIZES["full" if full else "ci" if ci else "default"]
    result = run_demo(out, size=size, workers=workers, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        typer.echo(f"\n{table(result)}\n\n{verdict(result)}\n\npicture: {out / 'demo.png'}")


def _submit(
    run: "RunConfig", words: list[str], out: Path, *, workers: int, sbatch: list[str], dry_run: bool, as_json: bool
) -> None:
    """Print the job array of a dump, or submit it."""
    from .teacher_dump.dump import require_startable
    from .teacher_dump.launchers.slurm import array_script, submit

    script = array_script(words, run, num_workers=workers, folder=Path.cwd(), sbatch=sbatch)
    if dry_run:
        typer.echo(script, nl=False)
        return
    require_startable(run, out)
    job = submit(script)
    _print({"job": job, "workers": workers, "cache": str(out), "look_with": f"tide status {out}"}, as_json)


def _with(settings: list[str], skip_bad: bool) -> list[str]:
    """The settings of a command, `--skip-bad` included."""
    return [*settings, "data.skip_bad=true"] if skip_bad else settings


def _run_config(recipe: str | None, path: Path | None, settings: list[str], **flags: str | None) -> "RunConfig":
    """The configuration of a command; `--data`, `--teacher` and `--student` are short for three settings."""
    from .shared.config import load_config

    names = {"data": "data.source", "teacher": "teacher.path", "student": "student.path"}
    short = [f"{names[name]}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return load_config(recipe, path, [*short, *settings])


def _print(result: dict[str, Any], as_json: bool) -> None:
    """A result on stdout, for people or for scripts."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        typer.echo(f"{name.replace('_', ' '):{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    """A number with separators, a list or names with their values as words, anything else as it prints."""
    if isinstance(value, dict):
        value = [f"{name} {_shown(item)}" for name, item in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _say(line: str) -> None:
    """A line of progress, on stderr."""
    from .shared.cache.inert import terminal_text

    typer.echo(terminal_text(redacted(line)), err=True)


def _print_text(text: "Text") -> None:
    """Styled lines on a terminal, plain ones into a pipe or a file."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text, soft_wrap=True)


def main() -> None:
    """Run the command line; a TideError is one message on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, category, *_, **__: redacted(f"{category.__name__}: {message}\n")
    try:
        app()
    except TideError as error:
        from .shared.cache.inert import terminal_text  # messages may quote what a stranger wrote

        typer.echo(terminal_text(redacted(f"{type(error).__name__}: {error}")), err=True)
        sys.exit(error.exit_code)
    except (_Interrupted, KeyboardInterrupt):
        typer.echo("interrupted; what was finished is kept, and the same command continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        typer.echo(redacted(traceback.format_exc()), err=True, nl=False)
        typer.echo("This is a bug in tide, not a mistake of yours: please report it with the lines above.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
