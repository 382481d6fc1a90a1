"""Commands that let a student write: generate, chat."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..shared.shown_text import terminal_text
from .options import ConfigOption, RecipeOption, SetOption, StreamOption, StudentOption, run_config
from .printing import say

if TYPE_CHECKING:
    from ..student_train.open_decoder import Writer
    from ..student_train.prompts import Prompt
    from ..student_train.sampling import Generation


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
    from ..student_train.prompts import answer_prompts, read_prompts

    asked = read_prompts(prompts or [], file, sys.stdin, seed=seed)
    writer = _open_writer(
        recipe, config, settings, student=student, max_new_tokens=max_new_tokens, temperature=temperature,
        stop=stop or None,
    )  # fmt: skip
    if show_steps:
        from rich.console import Console

        from ..student_train.answer_screen import StepPainter

        console, cut = Console(highlight=False, markup=False), 0
        for prompt in asked:
            with StepPainter(writer.decoder.reader, writer.settings.max_new_tokens, console) as painter:
                cut += answer_prompts(writer, [prompt], raw=raw, batch_size=1, show=lambda *_: None, watch=painter)
    elif as_json:
        cut = answer_prompts(writer, asked, raw=raw, batch_size=batch_size, show=_print_generation)
    elif len(asked) == 1 and stream != "none":
        from ..student_train.answer_screen import TextStream

        watch = TextStream(writer.decoder.reader, writer.settings.stop, _write, by_block=stream == "block")
        cut = answer_prompts(writer, asked, raw=raw, batch_size=1, show=lambda *_: _write("\n"), watch=watch)
    else:
        cut = answer_prompts(
            writer, asked, raw=raw, batch_size=batch_size, show=lambda _, answer: _write(f"{answer.text}\n")
        )
    if cut:
        most = writer.settings.max_new_tokens
        say(f"{cut:,} of {len(asked):,} answers are cut off at decoding.max_new_tokens = {most:,} (--max-new-tokens)")


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
    from ..student_train.chat import Chat

    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    question = "> " if sys.stdin.isatty() else ""
    session = Chat(writer, ask=lambda: input(question), write=_write, note=say, seed=seed, stream=stream)
    session.run()


def _open_writer(
    recipe: str | None, config: Path | None, settings: list[str], *, student: str | None, **short: Any
) -> "Writer":
    """The student of `generate` and `chat`; `short` are options that stand for settings of `decoding`."""
    # characters stay as they are: YAML would read an escaped pair of surrogates as two halves
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in short.items() if value is not None}
    given = [f"decoding.{name}={value}" for name, value in written.items()]
    run = run_config(recipe, config, [*given, *settings], student=student)
    from ..student_train.open_decoder import open_writer

    return open_writer(run)


def _print_generation(prompt: "Prompt", answer: "Generation") -> None:
    """One line of `generate --json`."""
    result = {
        "prompt": prompt.shown, "text": answer.text, "finish": answer.finish, "tokens": len(answer.ids),
        "seed": prompt.seed, "forwards": answer.num_forwards, "token_forwards": answer.num_token_forwards,
    }  # fmt: skip
    typer.echo(json.dumps(result))


def _write(text: str) -> None:
    """A piece of an answer on stdout: harmless on a terminal, exact in a file or a pipe."""
    sys.stdout.write(terminal_text(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
