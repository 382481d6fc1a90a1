"""What `tide generate` is asked: arguments, a file or standard input -> prompts as messages.

A `.jsonl` file holds a prompt a line, `{"prompt": "..."}` or `{"messages": [{"role": ..., "content": ...}, ...]}`, with
an optional `seed`; any other file, and standard input, is one prompt as a whole, so that code may span lines.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..shared.errors import ConfigError, DataError
from .open_decoder import Writer
from .sampling import Generation, Request, Snapshot, Watch


@dataclass(frozen=True)
class Prompt:
    """One question: its messages, what to show of it, and the seed of its answer."""

    messages: tuple[Mapping[str, Any], ...]
    seed: int

    @property
    def shown(self) -> str:
        """The last message, which the answer answers."""
        return str(self.messages[-1]["content"])

    def request(self, writer: Writer, *, raw: bool = False) -> Request:
        """As tokens. Args: raw: the last message alone, without the chat template, to be continued."""
        encoder = writer.encoder
        return Request(encoder.encode_text(self.shown) if raw else encoder.encode_prompt(self.messages), self.seed)


def read_prompts(arguments: Sequence[str], file: str | None, stdin: TextIO, *, seed: int) -> list[Prompt]:
    """The prompts of a command.

    Args:
        arguments: one prompt each. file: name, or `-` for standard input; None and no arguments: standard input.
        seed: of every prompt that names none.
    Raises: ConfigError: nothing is asked, or from two places. DataError: a file that is not what it should be.
    """
    if arguments and file:
        raise ConfigError("prompts as arguments and --file exclude each other; give one of them")
    if arguments:
        return [_one(text, seed, f"prompt {number + 1}") for number, text in enumerate(arguments)]
    if file in (None, "-"):
        if stdin.isatty():
            raise ConfigError('nothing is asked: give a prompt, tide generate --student FOLDER "...", or --file')
        try:
            return [_one(stdin.read(), seed, "standard input")]
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: cannot be read as text ({error})") from error
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {file}: cannot be read as text ({error})") from error
    prompts = list(_lines(text, file, seed)) if file.endswith(".jsonl") else [_one(text, seed, file)]
    if not prompts:
        raise DataError(f"--file {file}: no prompt in it")
    return prompts


def _one(text: str, seed: int, where: str) -> Prompt:
    if not text.strip():
        raise ConfigError(f"{where} is empty; ask something")
    return Prompt(({"role": "user", "content": text.removesuffix("\n")},), seed)


def _lines(text: str, file: str, seed: int) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--file {file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or type(row.get("seed", seed)) is not int:
            raise DataError(f'{where}: expected {{"prompt": "..."}} or {{"messages": [...]}}, seed a whole number')
        own = row.get("seed", seed)
        messages: Any = row.get("messages")
        if isinstance(row.get("prompt"), str) and row["prompt"].strip():
            messages = [{"role": "user", "content": row["prompt"]}]
        good = isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )  # fmt: skip
        if not good or not messages[-1]["content"].strip():
            raise DataError(
                f"{where}: expected a prompt that is not empty, or messages, each with a role and a text as content"
            )
        yield Prompt(tuple(messages), own)


def answer_prompts(
    writer: Writer, prompts: Sequence[Prompt], *, raw: bool, batch_size: int,
    show: Callable[[Prompt, Generation], object], watch: Watch | None = None,
) -> int:  # fmt: skip
    """Answer all prompts and show each answer as soon as it and all before it are there.

    Args: watch: sees every step as well.
    Returns: how many answers are cut off at `decoding.max_new_tokens`.
    Raises: ConfigError, DataError: a prompt that cannot be answered; nothing is written then.
    """
    done: dict[int, Generation] = {}
    shown = 0

    def step(snapshot: Snapshot) -> None:
        nonlocal shown
        if watch is not None:
            watch(snapshot)
        if snapshot.generation is not None:
            done[snapshot.number] = snapshot.generation
            while shown in done:
                show(prompts[shown], done.pop(shown))
                shown += 1

    requests = [prompt.request(writer, raw=raw) for prompt in prompts]
    answers = writer.decoder.generate(requests, writer.settings, batch_size=batch_size, watch=step)
    return sum(answer.finish == "length" for answer in answers)
