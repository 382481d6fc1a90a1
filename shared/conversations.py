"""Data sources -> conversations with a stable sample id, in one fixed order.

`data.source` joins sources with `+`; filters in brackets follow a name, in one pair or each in its own:
    stdlib                functions of the running Python (stdlib_source.py); splits train, heldout
    chat.jsonl            a local file (.jsonl, .jsonl.zst, .json, .parquet); split train
    ./folder              a local folder, as `datasets` loads it
    owner/name            a Hub data set (data files only: code from the Hub never runs)
    x[train]  x[all]      a split or a config: looked up in the data set; what could be both is the split
    x[split=a,config=b]   the same, said outright; also revision=
    x[column:value]       only rows with this value; values of one column are alternatives, columns add up

Without a config: the data set's default, else the one called `all`, else every config, one after another.
Without a split: `train`, or the only one. A filter on a column that no row has is an error, but for one: without a
column `lang`, `lang:python` keeps the rows whose answer contains `python` and says so. That is what the paper's data
code does with the OpenCoder sets of its mixture.

Stages: parse_sources (text -> Source) -> pin_sources (config, split, commit or content hash) -> open_conversations
(one pass: filter, check, hash, drop repeated samples) -> Conversations. It keeps 24 bytes per sample and reads the text
when asked: Hub sets and folders from datasets' Arrow cache, .jsonl by byte offset, other local files from memory.
Traded away: streaming. A plan and an exact epoch order need the length and random access.
"""

import hashlib
import json
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import ConfigError, DataError
from .source_rows import open_rows
from .sources import Source, listed, parse_sources, pin_sources

__all__ = [
    "Conversation", "ConversationReader", "Conversations", "Message", "Source", "open_conversations", "open_reader",
    "parse_sources", "pin_sources",
]  # fmt: skip

MESSAGES_COLUMNS = ("messages", "conversations")
PAIR_COLUMNS = (
    ("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("prompt", "completion"),
)  # fmt: skip
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "function": "tool", "observation": "tool",  # ShareGPT
}  # fmt: skip
_CONTEXT_COLUMN = "input"  # Alpaca: what an instruction is about


@dataclass(frozen=True)
class Message:
    """One turn; role is one of system, user, assistant, tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's answer: the part that is learnt."""

    sample_id: str
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "Conversation":
        """The conversation with its id: [{"content": …, "role": …}, …] as UTF-8 JSON without blanks."""
        turns = [{"content": message.content, "role": message.role} for message in messages]
        canonical = json.dumps(turns, ensure_ascii=False, separators=(",", ":")).encode()
        return cls(hashlib.sha256(canonical).hexdigest()[:16], tuple(messages))


class _BadRow(Exception):
    """A row that holds no conversation."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class _Reading(NamedTuple):
    """Which columns of a source hold the conversation: the messages, or prompt and response."""

    messages: str | None
    prompt: str = ""
    response: str = ""
    context: str | None = None

    def of(self, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a row up to its last answer; _BadRow where there is none."""
        try:
            if self.messages is not None:
                turns = _turns(row[self.messages])
            else:
                context = row.get(self.context) if self.context else None
                prompt = _text(row[self.prompt], "prompt") + (f"\n\n{_text(context, 'context')}" if context else "")
                turns = [Message("user", prompt), Message("assistant", _text(row[self.response], "response"))]
        except KeyError as error:
            raise _BadRow("missing column", f"no column {error}") from None
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.content.strip()]
        if not answers:
            raise _BadRow("no answer", "no assistant turn with text")
        turns = turns[: answers[-1] + 1]
        if not any(turn.role == "user" and turn.content.strip() for turn in turns):
            raise _BadRow("no prompt", "no user turn with text before the answer")
        return Conversation.of(turns)


def _turns(value: Any) -> list[Message]:
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        # What `datasets` makes of a feature that a data set card declares as a sequence of named fields.
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise _BadRow("malformed messages", f"expected a list of messages, got {value!r:.60}")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise _BadRow("malformed messages", f"message {i}: expected role and content, got {turn!r:.60}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise _BadRow("malformed messages", f"message {i}: role {role!r}; expected one of {', '.join(ROLES)}")
        turns.append(Message(ROLES[role], _text(content, f"message {i}")))
    return turns


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadRow("malformed messages", f"{what}: expected text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow("malformed messages", f"{what}: half a surrogate pair, which no tokenizer can read") from None
    return value


def _reading(source: Source, present: Sequence[str], columns: Mapping[str, str]) -> _Reading:
    """The mapping `data.columns` where its columns are present, else what the column names say."""
    if columns and set(columns.values()) <= set(present):
        return _Reading(columns.get("messages"), columns.get("prompt", ""), columns.get("response", ""))
    for name in MESSAGES_COLUMNS:
        if name in present:
            return _Reading(name)
    for prompt, response in PAIR_COLUMNS:
        if prompt in present and response in present:
            context = _CONTEXT_COLUMN if prompt == "instruction" and _CONTEXT_COLUMN in present else None
            return _Reading(None, prompt, response, context)
    pairs = ", ".join("/".join(pair) for pair in PAIR_COLUMNS)
    raise DataError(
        f"source {source.title}: no conversation in the columns {listed(present)}; expected "
        f"{' or '.join(MESSAGES_COLUMNS)}, or {pairs}; name them with data.columns, as {{messages: NAME}} or "
        "{prompt: NAME, response: NAME}"
    )


def _passes(row: Mapping[str, Any], column: str, values: set[str]) -> bool:
    """True when the column holds one of the values; what is not text is compared as JSON (true, 3, null)."""
    if column not in row:
        return column == "lang"  # judged by the answer, once it is read
    value = row[column]
    return (value if isinstance(value, str) else json.dumps(value, default=str)) in values


class ConversationReader:
    """The conversations of pinned sources by source and row number; opening reads no row."""

    def __init__(self, sources: Sequence[Source], *, columns: Mapping[str, str]):
        self.sources = tuple(sources)
        self.parts = [open_rows(source) for source in self.sources]
        if columns and not any(set(columns.values()) <= set(part.columns) for part in self.parts):
            raise DataError(f"data.columns = {dict(columns)}: no source has these columns; correct the names")
        self.readings = [_reading(s, p.columns, columns) for s, p in zip(self.sources, self.parts, strict=True)]

    def read(self, source: int, row: int, sample_id: str) -> Conversation:
        """The conversation of one row.

        Args: sample_id: what it had when the data were scanned.
        Raises: DataError: it is another one now, or gone.
        """
        try:
            conversation = self.readings[source].of(self.parts[source][row])
        except (_BadRow, IndexError) as error:
            raise self._changed(source, row, sample_id, f"{error}") from None
        if conversation.sample_id != sample_id:
            raise self._changed(source, row, sample_id, f"sample {conversation.sample_id}")
        return conversation

    def _changed(self, source: int, row: int, sample_id: str, found: str) -> DataError:
        return DataError(
            f"source {self.sources[source].title}, row {row} (the first is 0): expected sample {sample_id}, found "
            f"{found}: the data changed since they were scanned; restore them, or dump into another folder"
        )


class Conversations:
    """The conversations of pinned sources joined in order, after filters and without repeated samples."""

    def __init__(self, sources: Sequence[Source], *, columns: Mapping[str, str], skip_bad: bool):
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason; what a filter refused is not counted."""
        self._reader = ConversationReader(sources, columns=columns)
        self.sources = self._reader.sources
        part_of, row_of, ids = array("Q"), array("Q"), array("Q")
        num_found = Counter({source.path: 0 for source in self.sources})
        for part, source in enumerate(self.sources):
            for row, sample_id in self._scan(part, skip_bad):
                part_of.append(part)
                row_of.append(row)
                ids.append(int(sample_id, 16))
                num_found[source.path] += 1
        for path, num in num_found.items():
            if num == 0:
                raise DataError(
                    f"source {path}: no conversation is left after filters and checks (left out so far: "
                    f"{dict(self.dropped) or 'none but by filters'}); correct data.source"
                )
        kept = np.sort(np.unique(np.asarray(ids), return_index=True)[1])
        if len(kept) < len(ids):
            self.dropped["duplicate"] = len(ids) - len(kept)
        self._part_of, self._row_of, self._ids = (np.asarray(values)[kept] for values in (part_of, row_of, ids))

    def _scan(self, part: int, skip_bad: bool) -> Iterator[tuple[int, str]]:
        """Row number and sample id of every sound row that the filters let through."""
        source, rows, reading = self.sources[part], self._reader.parts[part], self._reader.readings[part]
        where: dict[str, set[str]] = {}
        for column, value in source.where:
            where.setdefault(column, set()).add(value)
        unseen = set(where)
        for i, row in enumerate(rows):
            unseen -= row.keys()
            if not all(_passes(row, column, values) for column, values in where.items()):
                continue
            try:
                conversation = reading.of(row)
            except _BadRow as bad:
                if not skip_bad:
                    raise DataError(
                        f"source {source.title}, {rows.place(i)}: {bad.reason} ({bad}); correct the row, or leave "
                        "such rows out with data.skip_bad=true"
                    ) from None
                self.dropped[bad.reason] += 1
                continue
            answer = conversation.messages[-1].content
            if "lang" not in where or "lang" in row or any(value in answer for value in where["lang"]):
                yield i, conversation.sample_id
        if "lang" in unseen and len(rows):
            unseen.discard("lang")
            warnings.warn(
                f"source {source.title}: no column lang; kept the rows whose answer contains "
                f"{' or '.join(sorted(where['lang']))}",
                stacklevel=2,
            )
        if unseen and len(rows):
            raise DataError(
                f"source {source.title}: no row has the column {listed(sorted(unseen))} to filter by; it has "
                f"{listed(rows.columns)}. Correct data.source; of several configs, name those that have the column"
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def sample_id(self, i: int) -> str:
        """The id of conversation i, without reading its text."""
        return f"{self._ids[i]:016x}"

    def place(self, i: int) -> tuple[int, int]:
        """Source number and row of conversation i, as `ConversationReader.read` takes them."""
        return int(self._part_of[i]), int(self._row_of[i])

    def __getitem__(self, i: int) -> Conversation:
        return self._reader.read(*self.place(i), self.sample_id(i))


def open_conversations(
    sources: Sequence[Source], *, columns: Mapping[str, str] | None = None, skip_bad: bool = False
) -> Conversations:
    """Pin the sources if they are not, read every row once, and give the conversations in order.

    Args:
        columns: `data.columns`; used for the sources that have these columns, the others are recognised by name.
        skip_bad: leave out rows without a conversation and count them in `.dropped`; broken JSON stays an error.
    Raises:
        ConfigError: `columns` is not {messages: …} or {prompt: …, response: …}.
        DataError: no such data, a bad row without `skip_bad`, no conversation left of some source, a column is missing.
        Unavailable: the Hub cannot be reached.
    """
    return Conversations(pin_sources(sources), columns=_checked_columns(columns), skip_bad=skip_bad)


def open_reader(sources: Sequence[Source], *, columns: Mapping[str, str] | None = None) -> ConversationReader:
    """Open sources that a plan has pinned, without reading a row: what a worker does.

    Raises: DataError: a source has changed since it was pinned; a column is missing. Unavailable, ConfigError.
    """
    return ConversationReader(pin_sources(sources), columns=_checked_columns(columns))


def _checked_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    columns = columns or {}
    if columns and set(columns) not in ({"messages"}, {"prompt", "response"}):
        raise ConfigError(
            f"data.columns = {dict(columns)}: expected {{messages: NAME}} or {{prompt: NAME, response: NAME}}"
        )
    return columns
