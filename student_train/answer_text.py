"""Tokens of an answer to its text, and where it ends: EOS, a stop text, or neither yet.

All searching is done on bytes, in which a character of several tokens is whole as soon as its last token is there, and
in which a stop text may begin and end anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..shared.tokens import TextEncoder

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class AnswerEnd:
    """An answer that is over: its tokens are the first `num_tokens`, its text `text`."""

    finish: Finish
    num_tokens: int
    text: str


class AnswerReader:
    """The student's vocabulary as decoding needs it.

    Args:
        token_bytes: of every id of the tokenizer; empty for an id that spells nothing.
        hidden_ids: special tokens, which are part of no text (but a stop text may name them).
        eos_id: ends an answer.
        mask_id: never part of one.
    """

    def __init__(self, token_bytes: Sequence[bytes], hidden_ids: frozenset[int], *, eos_id: int, mask_id: int) -> None:
        self.token_bytes, self.hidden_ids = token_bytes, hidden_ids
        self.eos_id, self.mask_id = eos_id, mask_id

    @classmethod
    def of(cls, encoder: TextEncoder) -> "AnswerReader":
        """The reader of a student's tokenizer."""
        added: Mapping[int, object] = encoder.tokenizer.added_tokens_decoder
        special = frozenset(i for i, token in added.items() if getattr(token, "special", False))
        return cls(encoder.token_bytes, special, eos_id=encoder.eos_id, mask_id=encoder.mask_id)

    def allowed(self, num_rows: int) -> list[bool]:
        """For each row of the head: may it be written? Not the mask, and nothing that spells no bytes."""
        spelt = [bool(token) for token in self.token_bytes[:num_rows]] + [False] * (num_rows - len(self.token_bytes))
        if self.mask_id < num_rows:
            spelt[self.mask_id] = False
        return spelt

    def text(self, ids: Sequence[int], *, end: int | None = None) -> str:
        """What tokens spell, up to byte `end`; a character that is cut shows as U+FFFD."""
        parts, position = [], 0
        for i in ids:
            token = self.token_bytes[i]
            if i not in self.hidden_ids:
                parts.append(token if end is None else token[: max(0, end - position)])
            position += len(token)
        return b"".join(parts).decode("utf-8", errors="replace")

    def find_end(self, ids: Sequence[int], stop: Sequence[str]) -> AnswerEnd | None:
        """The end of an answer that begins with `ids`, if it is among them.

        The stop text that is complete first ends it (of two that are complete at the same byte, the longer); an EOS
        before that does. Later tokens therefore never change the result.
        """
        eos = next((n for n, i in enumerate(ids) if i == self.eos_id), None)
        kept = ids if eos is None else ids[:eos]
        spelt = b"".join(self.token_bytes[i] for i in kept)
        found = [
            (spelt.find(text) + len(text), spelt.find(text)) for text in (s.encode() for s in stop) if text in spelt
        ]
        if found:
            start, num_tokens, position = min(found)[1], 0, 0
            while position + len(self.token_bytes[kept[num_tokens]]) <= start:
                position += len(self.token_bytes[kept[num_tokens]])
                num_tokens += 1
            return AnswerEnd("stop", num_tokens, self.text(kept, end=start))
        return None if eos is None else AnswerEnd("eos", eos, self.text(kept))
