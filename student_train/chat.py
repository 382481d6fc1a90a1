"""`tide chat`: turns of a conversation, each answered with everything before it.

lines -> text pieces and notes. A line that begins with a slash is a command. Ctrl-C stops an answer and forgets its
question, and leaves the session alone; the end of the input ends it.
"""

from collections.abc import Callable
from typing import Literal

from ..shared.errors import TideError
from .answer_screen import TextStream
from .open_decoder import Writer
from .sampling import Request

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer"


class Chat:
    """One session.

    Args:
        ask: gives the next line; EOFError ends the session.
        write: takes pieces of answers. note: takes remarks that are no answer.
        seed: of the first answer; each further one adds 1.
        stream: what is written at once: whole blocks, whatever is final, or (`none`) whole answers.
    """

    def __init__(
        self, writer: Writer, *, ask: Callable[[], str], write: Callable[[str], object],
        note: Callable[[str], object], seed: int = 0, stream: Literal["block", "step", "none"] = "block",
    ) -> None:  # fmt: skip
        self.writer, self.ask, self.write, self.note, self.stream = writer, ask, write, note, stream
        self.messages: list[dict[str, str]] = []
        self.seed = seed

    def run(self) -> None:
        """Talk until the input ends or /quit."""
        self.note(HELP)
        while True:
            try:
                line = self.ask()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.note("(Ctrl-C: /quit or Ctrl-D ends the session)")
                continue
            except UnicodeDecodeError as error:
                self.note(f"(that line is not UTF-8 text: {error.reason})")
                continue
            command = line.strip()
            if command == "/quit":
                return
            if command == "/reset":
                self.messages.clear()
                self.note("(a new conversation)")
            elif command.startswith("/"):
                self.note(HELP)
            elif command:
                self._turn(line)

    def _turn(self, line: str) -> None:
        """Ask and answer; a question that got no answer is forgotten."""
        encoder, decoder, settings = self.writer
        stream = TextStream(decoder.reader, settings.stop, self.write, by_block=self.stream == "block")
        self.messages.append({"role": "user", "content": line})
        try:
            request = Request(encoder.encode_prompt(self.messages), self.seed)
            (answer,) = decoder.generate([request], settings, watch=None if self.stream == "none" else stream)
            self.write((answer.text if self.stream == "none" else "") + "\n")
            if answer.finish == "length":
                self.note(f"(cut off at decoding.max_new_tokens = {settings.max_new_tokens})")
        except KeyboardInterrupt:
            self.messages.pop()
            self.note("\n(stopped; the question is forgotten)")
        except TideError as error:
            self.messages.pop()
            self.note(f"({error})\n(/reset begins a new conversation)")
        else:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.seed += 1
