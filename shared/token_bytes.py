"""The bytes behind token ids.

Tokenizer -> one byte string per id (`ByteTable`); text -> where its tokens begin and end (`TokenPlaces`); two
vocabularies -> the pairs of ids with equal bytes.
How a token spells its bytes is read from the tokenizer's own components (pre-tokenizer, normaliser, decoder), never
guessed from the look of its vocabulary: byte-level "Ġ" and sentencepiece "▁" are ordinary characters elsewhere.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from .errors import DataError

SPACE_MARK = "▁"
"""Sentencepiece's visible space, U+2581."""

Dummy = Literal["none", "first", "unless_space", "always"]


def byte_level_alphabet() -> dict[int, int]:
    """The GPT-2 alphabet of byte-level BPE as {code point: byte}; printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


def tokenizer_label(tokenizer: Any) -> str:
    """How error messages name a tokenizer."""
    return f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


@dataclass(frozen=True)
class ByteTable:
    """Bytes of every token of one vocabulary.

    `dummy` says when the tokenizer itself puts a space in front of the text, and after every added token: `always`, or
    `unless_space` there already; `first` is `unless_space` at the start of the text alone. It is no byte of the text.
    """

    tokens: list[bytes]
    added: frozenset[int]
    dummy: Dummy
    fallback: frozenset[int] = frozenset()
    """Ids such as `<0x41>`, which spell bytes that no ordinary token covers."""

    def spell(self, ids: Sequence[int], text: bytes) -> list[bytes]:
        """Bytes of the tokens `ids` of `text`, without dummy spaces (a dummy space alone becomes b"")."""
        spelt = [self.tokens[i] for i in ids]
        if self.dummy == "none":
            return spelt
        position = 0
        for n, token in enumerate(spelt):
            if n == 0 or (self.dummy != "first" and ids[n - 1] in self.added):
                marked = ids[n] not in self.added and token[:1] == b" "
                if marked and (self.dummy == "always" or text[position : position + 1] != b" "):
                    spelt[n] = token[1:]
            position += len(spelt[n])
        return spelt


def byte_table(tokenizer: Any) -> ByteTable:
    """The byte table of a fast tokenizer: byte-level BPE, or sentencepiece-style with `▁` and byte fallback.

    Added tokens stand for the UTF-8 of their literal content. Where their flags (lstrip, rstrip, normalized) let them
    swallow other text, the spelt bytes differ from the text, and callers compare the two.

    Raises: DataError: another kind of tokenizer (WordPiece, WordLevel, ...), whose tokens do not spell the text.
    """
    backend = tokenizer.backend_tokenizer
    parts = {name: _component(backend, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max([*vocab.values(), *added, -1]) + 1)
    fallback: dict[str, bytes] = {}
    if any(part["type"] == "ByteLevel" for part in _flat(parts["decoder"])):
        alphabet = byte_level_alphabet()
        for token, i in vocab.items():
            spelt = token.translate(alphabet)
            tokens[i] = spelt.encode("latin-1") if _is_byte_level(token, alphabet) else token.encode()
    elif _has_space_mark(parts["decoder"]):
        if _has_byte_fallback(backend):
            fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        for token, i in vocab.items():
            tokens[i] = fallback.get(token) or token.replace(SPACE_MARK, " ").encode()
    else:
        kinds = {name: [part["type"] for part in _flat(tree)] for name, tree in parts.items()}
        raise DataError(
            f"{tokenizer_label(tokenizer)}: {type(backend.model).__name__} with {kinds} does not spell the text's "
            "bytes. Expected byte-level BPE or a sentencepiece-style tokenizer; use a model with one of these"
        )
    for i, content in added.items():
        tokens[i] = content.encode()
    return ByteTable(
        tokens=tokens, added=frozenset(added), dummy=_dummy_space(parts),
        fallback=frozenset(i for token, i in vocab.items() if token in fallback),
    )  # fmt: skip


class TokenPlaces:
    """Where the tokens of a text begin and end.

    Positions are bytes of the spelt tokens. A character position is known there if the text before it, or the text
    after it, is spelt unchanged; else (a normaliser changed both) the tokenizer's character offsets are used.
    """

    def __init__(self, text: str, encoding: Any, table: ByteTable) -> None:
        self._text = text
        self._encoding = encoding
        self.spelt = table.spell(encoding.ids, text.encode())
        self._joined = b"".join(self.spelt)
        self._ends = np.cumsum([len(token) for token in self.spelt], dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends[:-1]])

    def first_from(self, char: int) -> int:
        """Index of the first token that starts at or after a character."""
        position = self._byte(char)
        if position is not None:
            return int(np.searchsorted(self._starts, position, side="left"))
        return next((i for i, (start, _) in enumerate(self._offsets) if start >= char), len(self._offsets))

    def last_until(self, char: int) -> int:
        """Number of tokens that end at or before a character."""
        position = self._byte(char)
        if position is not None:
            return int(np.searchsorted(self._ends, position, side="right"))
        return next((i for i, (_, end) in enumerate(self._offsets) if end > char), len(self._offsets))

    def compare(self, chars: tuple[int, int], first: int, last: int) -> tuple[int, bool]:
        """Bytes of a text span before token `first`, and whether the tokens first to last - 1 spell what follows."""
        text = self._text[slice(*chars)].encode()
        position = self._byte(chars[0])
        if first >= last:
            return 0, self._joined == self._text.encode()
        if position is not None:
            gap = int(self._starts[first]) - position
        else:
            gap = len(self._text[chars[0] : self._offsets[first][0]].encode())
        return gap, text[gap:].startswith(b"".join(self.spelt[first:last]))

    def _byte(self, char: int) -> int | None:
        before = self._text[:char].encode()
        if self._joined.startswith(before):
            return len(before)
        after = self._text[char:].encode()
        return len(self._joined) - len(after) if self._joined.endswith(after) else None

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        """Character spans; a span whose leading space was trimmed starts where the token before it ended."""
        spans, end = [], 0
        for start, stop in self._encoding.offsets:
            spans.append((min(start, end), stop))
            end = max(end, stop)
        return spans


def student_ids_of_teacher(
    teacher: ByteTable, student: ByteTable, *, teacher_mask_id: int | None = None, student_mask_id: int | None = None
) -> np.ndarray:
    """Pair the tokens of two vocabularies that stand for the same bytes, at most one for one.

    Where several ids of a vocabulary have the same bytes, its lowest ordinary id is taken; one that only spells unknown
    bytes (`<0x41>` beside `A`) if there is no ordinary one, and an added (special) one last. Mask tokens and tokens
    without bytes are never paired.

    Returns: int32 [V_teacher]: the student's id, -1 where there is none.
    """
    student_of = _first_ids(student, student_mask_id)
    pairs = np.full(len(teacher.tokens), -1, dtype=np.int32)
    for token, teacher_id in _first_ids(teacher, teacher_mask_id).items():
        pairs[teacher_id] = student_of.get(token, -1)
    return pairs


def _first_ids(table: ByteTable, mask_id: int | None) -> dict[bytes, int]:
    first: dict[bytes, int] = {}
    for i in sorted(range(len(table.tokens)), key=lambda i: (i in table.added, i in table.fallback, i)):
        if table.tokens[i] and i != mask_id:
            first.setdefault(table.tokens[i], i)
    return first


def _component(backend: Any, name: str) -> Mapping[str, Any] | None:
    component = getattr(backend, name)
    return None if component is None else json.loads(component.__getstate__())


def _flat(tree: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The members of a possibly nested Sequence of normalisers, pre-tokenizers or decoders."""
    if tree is None:
        return
    if tree["type"] == "Sequence":
        members = next(value for value in tree.values() if isinstance(value, list))
        for member in members:
            yield from _flat(member)
    else:
        yield tree


def _is_byte_level(token: str, alphabet: Mapping[int, int]) -> bool:
    return all(ord(char) in alphabet for char in token)


def _has_space_mark(decoder: Mapping[str, Any] | None) -> bool:
    return any(
        part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK})
        for part in _flat(decoder)
    )


def _has_byte_fallback(backend: Any) -> bool:
    """Whether the model spells unknown characters as <0x00> ... <0xFF>."""
    flag = getattr(backend.model, "byte_fallback", None)
    return bool(json.loads(backend.to_str())["model"].get("byte_fallback")) if flag is None else bool(flag)


def _dummy_space(parts: Mapping[str, Mapping[str, Any] | None]) -> Dummy:
    if any(part["type"] == "Prepend" for part in _flat(parts["normalizer"])):
        return "always"
    for part in _flat(parts["pre_tokenizer"]):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return "first" if part.get("prepend_scheme") == "first" else "unless_space"
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            return "unless_space"
    return "none"
