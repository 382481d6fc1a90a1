"""The bytes behind token ids.

Tokenizer -> one byte string per id (`ByteTable`); text -> where its tokens begin and end (`TokenPlaces`); two
vocabularies -> the pairs of ids with equal bytes.
How a token spells its bytes is read from the tokenizer's own components (pre-tokenizer, normaliser, decoder), never
guessed from the look of its vocabulary: byte-level "Ġ" and sentencepiece "▁" are ordinary characters elsewhere.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from .errors import DataError

SPACE_MARK = "▁"
"""Sentencepiece's visible space, U+2581."""

MAX_MARKS = 30
"""Marks of one letter that are looked at; Unicode's stream-safe text format has no letter with more."""

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
    """Added tokens, but for those that are also pieces which the model itself makes of ordinary text."""
    dummy: Dummy
    fallback: frozenset[int] = frozenset()
    """Ids such as `<0x41>`, which spell bytes that no ordinary token covers."""
    unknown: int | None = None
    """Id that stands for any text that the vocabulary lacks."""

    def spell(self, text: str, encoding: Any) -> list[bytes]:
        """Bytes of the tokens of `text`, without dummy spaces (a dummy space alone becomes b"")."""
        ids = encoding.ids
        spelt = [self.tokens[i] for i in ids]
        if self.dummy == "none":
            return spelt
        offsets = encoding.offsets
        for n, token in enumerate(spelt):
            if n == 0 or (self.dummy != "first" and ids[n - 1] in self.added):
                marked = ids[n] not in self.added and token[:1] == b" "
                # not by bytes spelt: a normaliser may have changed their number
                position = offsets[n - 1][1] if n else 0
                if marked and (self.dummy == "always" or text[position : position + 1] != " "):
                    spelt[n] = token[1:]
        return spelt


def byte_table(tokenizer: Any) -> ByteTable:
    """The byte table of a fast tokenizer: byte-level BPE, or sentencepiece-style with `▁` and byte fallback.

    Added tokens stand for the UTF-8 of their literal content, unless they are also pieces of ordinary text: those that
    the model itself makes of their content, and of a sentencepiece-style vocabulary all that are not special (Gemma's
    runs of spaces). Where flags (lstrip, rstrip, normalized) let them swallow other text, the spelt bytes differ from
    the text, and callers compare the two.

    Raises: DataError: another kind of tokenizer (WordPiece, WordLevel, ...), whose tokens do not spell the text.
    """
    backend = tokenizer.backend_tokenizer
    parts: dict[str, Mapping[str, Any] | None] = {}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        parts[name] = None if part is None else json.loads(part.__getstate__())
    added = dict(backend.get_added_tokens_decoder())
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max([*vocab.values(), *added, -1]) + 1)
    fallback: dict[str, bytes] = {}
    pieces = {i for i, token in added.items() if _is_piece(backend.model, i, token.content)}
    literal = added.keys() - pieces
    if any(part["type"] == "ByteLevel" for part in _flat(parts["decoder"])):
        alphabet = byte_level_alphabet()
        for token, i in vocab.items():
            spelt = token.translate(alphabet)
            is_byte_level = all(ord(char) in alphabet for char in token)
            tokens[i] = spelt.encode("latin-1") if is_byte_level else token.encode()
    elif _has_space_mark(parts["decoder"]):
        flag = getattr(backend.model, "byte_fallback", None)  # Unigram's is in its JSON alone
        if json.loads(backend.to_str())["model"].get("byte_fallback") if flag is None else flag:
            fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        for token, i in vocab.items():
            tokens[i] = fallback.get(token) or token.replace(SPACE_MARK, " ").encode()
        literal = {i for i in literal if added[i].special}
    else:
        kinds = {name: [part["type"] for part in _flat(tree)] for name, tree in parts.items()}
        raise DataError(
            f"{tokenizer_label(tokenizer)}: {type(backend.model).__name__} with {kinds} does not spell the text's "
            "bytes. Expected byte-level BPE or a sentencepiece-style tokenizer; use a model with one of these"
        )
    for i in literal:
        tokens[i] = added[i].content.encode()
    return ByteTable(
        tokens=tokens, added=frozenset(i for i, token in added.items() if token.special or i not in pieces),
        dummy=_dummy_space(parts), fallback=frozenset(i for token, i in vocab.items() if token in fallback),
        unknown=_unknown(backend.model),
    )  # fmt: skip


class TokenPlaces:
    """Where the tokens of a text begin and end.

    Positions are bytes of the spelt tokens. A character position is known there if the text before it, or the text
    after it, is spelt unchanged; else (a normaliser changed both) the tokenizer's character offsets are used.
    """

    def __init__(self, text: str, encoding: Any, table: ByteTable) -> None:
        self._text = text
        self._encoding = encoding
        self._ids = encoding.ids  # a list that is made anew each time it is asked for
        self._unknown = table.unknown
        self.spelt = table.spell(text, encoding)
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

    def cuts(self, chars: tuple[int, int], first: int, last: int, exact_gap: int | None) -> np.ndarray:
        """Where tokens first to last - 1 begin in a text span, as `align_stretches` wants it.

        A token that spells its own characters begins at a byte of the text, whatever was changed elsewhere. Of tokens
        that spell something else (a normaliser composed, folded or swallowed characters), only the characters that
        they stand for together are known.

        Args: exact_gap: bytes of the span before token `first`, if the tokens spell the text behind them; else None.
        Returns: int32 [n, 3]: byte of the span; token, counted from `first`; whether the bytes up to the next row are
            known.
        """
        if first >= last:
            return np.zeros((0, 3), dtype=np.int32)
        if exact_gap is not None:
            at = exact_gap + np.concatenate([[0], self._ends[first:last] - self._starts[first]])
            rows = np.stack([at, np.arange(len(at)), np.ones(len(at), np.int64)], axis=1)
        else:
            rows = np.array([row for row in self._known(chars, first, last) if row[1] <= last], dtype=np.int64)
            rows = rows.reshape(-1, 3) - [0, first, 0]
        # A token without bytes belongs to what is before it; at the very start, to what follows.
        distinct = np.diff(rows[:, 0], append=np.iinfo(np.int64).max) > 0
        rows = rows[distinct]
        if len(rows) and rows[0, 1]:
            rows[0, 1] = 0 if not any(map(len, self.spelt[first : first + rows[0, 1]])) else rows[0, 1]
        return rows.astype(np.int32)

    def _known(self, chars: tuple[int, int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows of `cuts` for changed text, with tokens counted from the text's first."""
        text = self._text
        points = np.frombuffer(text[slice(*chars)].encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = [0, *np.cumsum(widths).tolist()]
        low, high = chars
        i, after = first, self._offsets[first][0]
        while i < last:
            begin, end = self._offsets[i]
            j = i + 1
            while j < len(self._offsets) and self._continues(j, end):
                end = max(end, self._offsets[j][1])
                j += 1
            after = min(self._offsets[j][0], high) if j < len(self._offsets) else high
            end = min(end, after)
            if low <= begin < end:
                at = [place - low for place in (begin, end, after)]
                yield from self._cut_group(i, j, begin, end, after, [bytes_before[place] for place in at])
            i = j
        if low <= after:
            yield bytes_before[after - low], i, 1

    def _continues(self, token: int, end: int) -> bool:
        """Whether a token stands for characters before `end` too, or for a mark that a normaliser may have moved."""
        start, stop = self._offsets[token]
        if start < end or stop <= end:
            return True
        if not unicodedata.combining(self._text[start]):
            return False
        low, high = start - 1, start + 1
        while low > 0 and start - low < MAX_MARKS and unicodedata.combining(self._text[low]):
            low -= 1
        while high < len(self._text) and unicodedata.combining(self._text[high]):
            high += 1
            if high - low > MAX_MARKS:
                return True
        place = int(self._starts[token])
        before, after = self._text[max(low, 0) : start].encode(), self._text[start:high].encode()
        return not (self._joined.endswith(before, 0, place) and self._joined.startswith(after, place))

    def _cut_group(
        self, i: int, j: int, begin: int, end: int, after: int, at: Sequence[int]
    ) -> Iterator[tuple[int, int, int]]:
        """Rows for tokens i to j - 1, which stand for characters begin to end; nothing stands for end to after."""
        spelt = b"".join(self.spelt[i:j])
        written = self._text[begin:end]
        if spelt != written.encode() and spelt == self._text[begin:after].encode():  # offsets without blanks behind
            end, written, at = after, self._text[begin:after], [at[0], at[2], at[2]]
        folded = end < after and unicodedata.category(self._text[end])[0] == "M"  # a lost mark belongs to its letter
        if spelt == written.encode() and not folded:
            for n in range(i, j):
                yield at[0] + int(self._starts[n] - self._starts[i]), n, 1
            if end < after:
                yield at[1], j, 1
            return
        if self._unknown in self._ids[i:j]:
            yield at[0], i, 0
        elif spelt and written.strip().encode() == spelt and not folded:
            # an added token that swallows the blanks around it
            lead = len(written) - len(written.lstrip())
            yield at[0], i, 1
            yield at[0] + len(written[:lead].encode()), i, 1
            yield at[0] + len(written[:lead].encode()) + len(spelt), j, 1
        else:
            yield at[0], i, 1

    def _byte(self, char: int) -> int | None:
        before = self._text[:char].encode()
        if self._joined.startswith(before):
            return len(before)
        after = self._text[char:].encode()
        return len(self._joined) - len(after) if self._joined.endswith(after) else None

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        """Character spans; a span whose leading blanks the tokenizer trimmed begins with them."""
        spans, end = [], 0
        for (start, stop), token in zip(self._encoding.offsets, self.spelt, strict=True):
            if start > end:
                blanks = token[: len(token) - len(token.lstrip())].decode()
                trimmed = blanks and not self._text.startswith(blanks, start)
                if trimmed and start - len(blanks) >= end and self._text.endswith(blanks, 0, start):
                    start -= len(blanks)
            spans.append((start, stop))
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


def _has_space_mark(decoder: Mapping[str, Any] | None) -> bool:
    return any(
        part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK})
        for part in _flat(decoder)
    )


def _is_piece(model: Any, token_id: int, content: str) -> bool:
    """Whether the model makes this token of its content, as of any other text."""
    if model.token_to_id(content) != token_id:
        return False
    return [token.id for token in model.tokenize(content)] == [token_id]


def _unknown(model: Any) -> int | None:
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else model.token_to_id(model.unk_token)
    return json.loads(model.__getstate__()).get("unk_id")


def _dummy_space(parts: Mapping[str, Mapping[str, Any] | None]) -> Dummy:
    if any(part["type"] == "Prepend" for part in _flat(parts["normalizer"])):
        return "always"
    for part in _flat(parts["pre_tokenizer"]):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return "first" if part.get("prepend_scheme") == "first" else "unless_space"
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            return "unless_space"
    return "none"
