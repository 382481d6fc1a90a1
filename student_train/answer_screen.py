"""Answers on a terminal while they are written: text as it becomes final, or every step of the denoising.

snapshots -> text pieces, or rich text. What a student writes is a stranger's text: on a terminal it is made inert.
"""

import codecs
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..shared.shown_text import terminal_text
from .answer_text import AnswerReader
from .sampling import Snapshot

MASKED = "░"


class TextStream:
    """Passes on what of an answer is final: nothing masked before it, no stop text that may have begun, no half
    character.

    Args:
        write: takes the pieces, which together are the text of the answer.
        by_block: pass on whole blocks only.
    """

    def __init__(
        self, reader: AnswerReader, stop: Sequence[str], write: Callable[[str], object], by_block: bool
    ) -> None:
        self.reader, self.stop, self.write, self.by_block = reader, stop, write, by_block
        self.shown = 0

    def __call__(self, snapshot: Snapshot) -> None:
        if snapshot.generation is not None:
            self._show(snapshot.generation.text)
        elif snapshot.block_done or not self.by_block:
            final = []
            for i in snapshot.ids:
                if i is None:
                    break
                final.append(i)
            self._show(self._settled(self.reader.text(final)))

    def _settled(self, text: str) -> str:
        """Without an end that later tokens may change."""
        text = text.rstrip("�")
        begun = [n for n in range(max(0, len(text) - max(map(len, self.stop), default=0)), len(text))
                 if any(stop.startswith(text[n:]) for stop in self.stop)]  # fmt: skip
        return text[: begun[0]] if begun else text

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.write(text[self.shown :])
            self.shown = len(text)


def painted(reader: AnswerReader, snapshot: Snapshot, num_tokens: int) -> Text:
    """One step as rich text: what this step fixed in bold, what is masked as shaded cells, and a line that counts."""
    picture, decoder = Text(), codecs.getincrementaldecoder("utf-8")("replace")
    fresh = set(snapshot.fresh)
    for place, i in enumerate(snapshot.ids):
        if i == reader.eos_id:
            break
        if i is None:
            # the bytes of a character whose middle is masked do not belong to what comes behind it
            picture.append(terminal_text(decoder.decode(b"", final=True)))
            picture.append(MASKED, "dim")
            decoder.reset()
        elif i not in reader.hidden_ids:
            picture.append(terminal_text(decoder.decode(reader.token_bytes[i])), "bold green" if place in fresh else "")
    picture.append(terminal_text(decoder.decode(b"", final=True)))
    num_fixed = sum(i is not None for i in snapshot.ids)
    end = f", ended by {snapshot.generation.finish}" if snapshot.generation else ""
    return picture.append(f"\n[{num_fixed} of up to {num_tokens} tokens{end}]", "dim")


class StepPainter:
    """Repaints an answer in place after every step; on a console that is no terminal, each step is printed.

    Use: `with StepPainter(...) as painter: decoder.generate(..., watch=painter)`, one request at a time.
    """

    def __init__(self, reader: AnswerReader, num_tokens: int, console: Console) -> None:
        self.reader, self.num_tokens, self.console = reader, num_tokens, console
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> "StepPainter":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def __call__(self, snapshot: Snapshot) -> None:
        picture = painted(self.reader, snapshot, self.num_tokens)
        if self.console.is_terminal:
            self.live.update(picture, refresh=True)
        else:
            self.console.print(picture, soft_wrap=True)
