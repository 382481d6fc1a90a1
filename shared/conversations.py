"""Data sources -> conversations with a stable sample id, in one fixed order.

`data.source` joins sources with `+`; filters in brackets follow a name, in one pair or each in its own:
    stdlib                functions of the running Python (stdlib_source.py); splits train, heldout
    chat.jsonl            a local file (.jsonl, .jsonl.zst, .json, .parquet, .csv, .tsv); split train
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import ConfigError, DataError
from .shown_text import some
from .source_rows import open_rows
from .sources import Source, listed, parse_sources, pin_sources

__all__ = [
    "Conversation", "ConversationReader", "Conversations", "Message", "Source", "open_conversations", "open_reader",
    "parse_sources", "pin_sources",
]  # fmt: skip

MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
PAIR_COLUMNS = (
    ("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("prompt", "completion"),
    ("instruction", "response"),
)  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = ("input", "context")
"""What an instruction or question is about (Alpaca, Dolly, SQuAD): part of the prompt, after a blank line."""
HISTORY_COLUMN, TOOLS_COLUMN = "history", "tools"
PROMPT_LIKE = (
    "choices", "options", "passage", "article", "document", "documents", "images", "image", "audio", "video",
    "functions", "chat_template_kwargs",
)  # fmt: skip
"""Columns that often decide an answer and that tide does not read: named in a warning, never passed over in silence."""
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "function": "tool", "observation": "tool",  # ShareGPT
}  # fmt: skip
KNOWN_COLUMNS = frozenset(
    [*MESSAGES_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair), *SYSTEM_COLUMNS, *CONTEXT_COLUMNS,
     HISTORY_COLUMN, TOOLS_COLUMN]
)  # fmt: skip
FILTERED = "refused by a filter"
"""Reason under which rows are counted that a filter of `data.source` does not let through."""
_TURN_FIELDS = ("role", "from", "content", "value")

Turns = Literal["last", "each"]


@dataclass(frozen=True)
class Message:
    """One turn; role is one of system, user, assistant, tool.

    Args: more: what else stands in it (tool_calls, reasoning_content, name, ...), for the chat template.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a chat template reads."""
        return {"content": self.content, "role": self.role, **self.more}


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's answer: the part that is learnt."""

    sample_id: str
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    """Descriptions of the functions that the assistant may call, for the chat template."""

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Sequence[Any] = ()) -> "Conversation":
        """The conversation with its id: [{"content": …, "role": …}, …] as UTF-8 JSON without blanks.

        Further fields follow these two by name; with tools it is {"messages": …, "tools": …}.
        """
        turns: Any = [{**message.to_json(), **dict(sorted(message.more.items()))} for message in messages]
        tree = {"messages": turns, "tools": list(tools)} if tools else turns
        canonical = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
        return cls(hashlib.sha256(canonical).hexdigest()[:16], tuple(messages), tuple(tools))


class _BadRow(Exception):
    """A row that holds no conversation."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class _Reading(NamedTuple):
    """Which columns of a row hold the conversation: the messages, or prompt and response; and what else is read."""

    messages: str | None
    prompt: str = ""
    response: str = ""
    context: tuple[str, ...] = ()
    extras: bool = True
    """Are system prompts, history and tools looked for, too? Not where `data.columns` names what is meant."""

    @property
    def columns(self) -> set[str]:
        """All that are looked at."""
        read = {self.messages or "", self.prompt, self.response, *self.context}
        return read | ({*SYSTEM_COLUMNS, HISTORY_COLUMN, TOOLS_COLUMN} if self.extras else set())

    def unread(self, row: Mapping[str, Any]) -> set[str]:
        """Columns of a row that look like a part of the prompt, hold something, and are not read."""
        known = {*KNOWN_COLUMNS, *PROMPT_LIKE} - self.columns
        if not self.extras:  # data.columns says which pair is meant
            known -= {*MESSAGES_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair)}
        return {name for name in known if row.get(name) not in (None, "", [], {})}

    def all_of(self, row: Mapping[str, Any], turns: Turns) -> list[Conversation]:
        """The conversation of a row up to its last answer, or one for each answer; _BadRow where there is none."""
        try:
            found = self._turns(row)
            tools = _tools(row.get(TOOLS_COLUMN)) if self.extras else ()
        except KeyError as error:
            raise _BadRow("missing column", f"no column {error}") from None
        answers = [i for i, turn in enumerate(found) if turn.role == "assistant" and turn.content.strip()]
        said = [i for i, turn in enumerate(found) if turn.role == "assistant" and (turn.content.strip() or turn.more)]
        if turns == "last" and said and said[-1] not in answers:
            raise _BadRow("last turn without text", "the assistant's last turn calls a tool, and only text is learnt")
        if not answers:
            raise _BadRow("no answer", "no assistant turn with text")
        asked = next((i for i, turn in enumerate(found) if turn.role == "user" and turn.content.strip()), len(found))
        answered = [i for i in answers if i > asked]
        if not answered or (turns == "last" and answers[-1] < asked):
            raise _BadRow("no prompt", "no user turn with text before the answer")
        ends = answered[-1:] if turns == "last" else answered
        return [Conversation.of(found[: end + 1], tools) for end in ends]

    def _turns(self, row: Mapping[str, Any]) -> list[Message]:
        if self.messages is not None:
            turns = _turns(row[self.messages])
        else:
            prompt, response = row[self.prompt], row[self.response]
            if isinstance(prompt, list) and isinstance(response, list):  # TRL's conversational prompt and completion
                turns = [*_turns(prompt), *_turns(response)]
            else:
                about = [_text(row[name], name) for name in self.context if row.get(name)]
                asked = "\n\n".join([_text(prompt, "prompt"), *(text for text in about if text.strip())])
                turns = [Message("user", asked), Message("assistant", _text(response, "response"))]
        if not self.extras:
            return turns
        if row.get(HISTORY_COLUMN):
            turns = [*_history(row[HISTORY_COLUMN]), *turns]
        for name in SYSTEM_COLUMNS:
            said = _text(row[name], name) if row.get(name) else ""
            if not said.strip():
                continue
            own = turns[0].content if turns and turns[0].role == "system" else None
            if own not in (None, said):
                raise _BadRow("two system prompts", f"the column {name} and the first message differ")
            turns = turns if own is not None else [Message("system", said), *turns]
        return turns


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
        more = {name: v for name, v in turn.items() if name not in _TURN_FIELDS and v not in (None, [], {}, "")}
        if "tool_calls" in more:
            calls = more["tool_calls"]
            for call in calls if isinstance(calls, list) else [None]:
                function = call.get("function", call) if isinstance(call, Mapping) else None
                if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                    raise _BadRow("malformed tool calls", f"message {i}: expected function and name, got {call!r:.60}")
            content = "" if content is None else content
        turns.append(Message(ROLES[role], _content(content, f"message {i}"), _checked(more, f"message {i}")))
    return turns


def _content(value: Any, what: str) -> str:
    """Text, or parts that are all text."""
    if not isinstance(value, list):
        return _text(value, what)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise _BadRow("content that is not text", f"{what}: a part of type {kind!r:.40}; only text is read")
        texts.append(_text(part.get("text"), what))
    return "".join(texts)


def _tools(value: Any) -> tuple[Any, ...]:
    """Descriptions of tools, as a list or as its JSON text."""
    if not value:
        return ()
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise _BadRow("malformed tools", f"expected a list, or its JSON, got {value!r:.60}") from None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise _BadRow("malformed tools", f"expected a list of descriptions, got {found!r:.60}")
    return tuple(_checked(found, "tools"))


def _history(value: Any) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return _turns(value)
    turns = []
    for pair in value if isinstance(value, list) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _BadRow("malformed history", f"expected pairs of question and answer, got {pair!r:.60}")
        turns += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    return turns


def _checked(tree: Any, what: str) -> Any:
    """A tree of JSON, if every tokenizer can read its texts."""
    if isinstance(tree, Mapping):
        return {_text(name, what): _checked(value, what) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_checked(value, what) for value in tree]
    if isinstance(tree, str):
        return _text(tree, what)
    if isinstance(tree, date | time):  # of a table; lines of JSON have them as texts
        return tree.isoformat()
    if isinstance(tree, Decimal | timedelta):
        return str(tree)
    if tree is not None and not isinstance(tree, bool | int | float):
        raise _BadRow("malformed messages", f"{what}: {type(tree).__name__} is not JSON")
    return tree


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadRow("malformed messages", f"{what}: expected text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow("malformed messages", f"{what}: half a surrogate pair, which no tokenizer can read") from None
    return value


def _reading(present: Collection[str], columns: Mapping[str, str]) -> _Reading | None:
    """The mapping `data.columns` where its columns are present, else what the column names say; None: nothing known."""
    if columns and set(columns.values()) <= set(present):
        return _Reading(columns.get("messages"), columns.get("prompt", ""), columns.get("response", ""), extras=False)
    for name in MESSAGES_COLUMNS:
        if name in present:
            return _Reading(name)
    for prompt, response in PAIR_COLUMNS:
        if prompt in present and response in present:
            context = tuple(name for name in CONTEXT_COLUMNS if name in present)
            return _Reading(None, prompt, response, context)
    return None


def _unreadable(present: Sequence[str]) -> str:
    pairs = ", ".join("/".join(pair) for pair in PAIR_COLUMNS)
    return (
        f"no conversation in the columns {listed(present)}; expected {' or '.join(MESSAGES_COLUMNS)}, or {pairs}; name "
        "them with data.columns, as {messages: NAME} or {prompt: NAME, response: NAME}"
    )


def _passes(row: Mapping[str, Any], column: str, values: set[str]) -> bool:
    """True when the column holds one of the values; what is no text is compared as JSON (true, 3), dates as text."""
    if column not in row:
        return column == "lang"  # judged by the answer, once it is read
    value = row[column]
    if isinstance(value, date | time | Decimal):
        value = value.isoformat() if isinstance(value, date | time) else str(value)
    return (value if isinstance(value, str) else json.dumps(value, default=str)) in values


class ConversationReader:
    """The conversations of pinned sources by source and row number; opening reads no row.

    Args: tell: told of files that are not read; nobody where the data were scanned before.
    """

    def __init__(
        self, sources: Sequence[Source], *, columns: Mapping[str, str], turns: Turns = "last",
        tell: Callable[[str], object] = lambda line: None,
    ) -> None:  # fmt: skip
        self.sources = tuple(sources)
        self.turns: Turns = turns
        self._columns = columns
        self.parts = [
            open_rows(source, KNOWN_COLUMNS | {*columns.values(), *(name for name, _ in source.where), "lang"}, tell)
            for source in self.sources
        ]
        if columns and not any(set(columns.values()) <= set(part.columns) for part in self.parts):
            raise DataError(f"data.columns = {dict(columns)}: no source has these columns; correct the names")
        for source, part in zip(self.sources, self.parts, strict=True):
            if (part.is_table or not len(part)) and _reading(part.columns, columns) is None:
                raise DataError(f"source {source.title}: {_unreadable(part.columns)}")
        self._readings: dict[frozenset[str], _Reading | None] = {}

    def conversations(self, row: Mapping[str, Any]) -> list[Conversation]:
        """Those of a row, read by the columns that it has itself: optional ones may be missing from others.

        Raises: _BadRow: there is none.
        """
        return self.reading(row).all_of(row, self.turns)

    def reading(self, row: Mapping[str, Any]) -> _Reading:
        """How a row is read. Raises: _BadRow: it has no column that is known."""
        present = frozenset(name for name, value in row.items() if value is not None)
        if present not in self._readings:
            self._readings[present] = _reading(present, self._columns) or _reading(row, self._columns)
        reading = self._readings[present]
        if reading is None:
            raise _BadRow("missing column", _unreadable(list(row)))
        return reading

    def read(self, source: int, row: int, sample_id: str) -> Conversation:
        """The conversation of one row.

        Args: sample_id: what it had when the data were scanned.
        Raises: DataError: it is another one now, or gone.
        """
        try:
            found = self.conversations(self.parts[source][row])
        except (_BadRow, IndexError) as error:
            raise self._changed(source, row, sample_id, f"{error}") from None
        wanted = next((one for one in found if one.sample_id == sample_id), None)
        if wanted is None:
            raise self._changed(source, row, sample_id, f"sample {found[-1].sample_id}")
        return wanted

    def _changed(self, source: int, row: int, sample_id: str, found: str) -> DataError:
        return DataError(
            f"source {self.sources[source].title}, row {row} (the first is 0): expected sample {sample_id}, found "
            f"{found}: the data changed since they were scanned; restore them, or dump into another folder"
        )


class Conversations:
    """The conversations of pinned sources joined in order, after filters and without repeated samples."""

    def __init__(
        self, sources: Sequence[Source], *, columns: Mapping[str, str], skip_bad: bool, turns: Turns = "last"
    ) -> None:
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.columns_read: list[str] = []
        """A sentence for each source: which of its columns are read, and which are not."""
        self._reader = ConversationReader(sources, columns=columns, turns=turns, tell=warnings.warn)
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
                    f"{dict(self.dropped) or 'none'}); correct data.source"
                )
        kept = np.sort(np.unique(np.asarray(ids), return_index=True)[1])
        if len(kept) < len(ids):
            self.dropped["duplicate"] = len(ids) - len(kept)
        self._part_of, self._row_of, self._ids = (np.asarray(values)[kept] for values in (part_of, row_of, ids))

    def _scan(self, part: int, skip_bad: bool) -> Iterator[tuple[int, str]]:
        """Row number and sample id of every sound row that the filters let through."""
        source, rows = self.sources[part], self._reader.parts[part]
        unread: set[str] = set()
        present, read = set(rows.columns), {column for column, _ in source.where}
        where: dict[str, set[str]] = {}
        for column, value in source.where:
            where.setdefault(column, set()).add(value)
        unseen = set(where)
        for i, row in enumerate(rows):
            unseen -= row.keys()
            if not all(_passes(row, column, values) for column, values in where.items()):
                self.dropped[FILTERED] += 1
                continue
            present |= row.keys()
            try:
                reading = self._reader.reading(row)
                unread |= reading.unread(row)
                read |= reading.columns
                found = self._reader.conversations(row)
            except _BadRow as bad:
                if not skip_bad:
                    raise DataError(
                        f"source {source.title}, {rows.place(i)}: {bad.reason} ({bad}); correct the row, or leave "
                        "such rows out with data.skip_bad=true"
                    ) from None
                self.dropped[bad.reason] += 1
                continue
            for conversation in found:
                answer = conversation.messages[-1].content
                if "lang" not in where or "lang" in row or any(value in answer for value in where["lang"]):
                    yield i, conversation.sample_id
                else:
                    self.dropped[FILTERED] += 1
        self.columns_read.append(
            f"source {source.title}: reads the columns {some(sorted(present & read))}"
            + (f"; does not read {some(sorted(present - read))}" if present - read else "")
        )
        said = []
        if rows.lost_arguments:
            said.append(
                f"null arguments of calls ({some(sorted(rows.lost_arguments))}) are taken for absent, because every "
                "row of a table has all fields of all its rows; where null is meant, store the calls' arguments, and "
                "the tools, as JSON text"
            )
        unread |= {name for name in PROMPT_LIKE if name in rows.columns}
        if unread:
            said.append(
                f"the columns {listed(sorted(unread))} are not part of any prompt; if answers depend on them, write "
                "them into the prompt or the messages"
            )
        if "lang" in unseen and len(rows):
            unseen.discard("lang")
            contained = " or ".join(sorted(where["lang"]))
            said.append(f"no column lang; kept the rows whose answer contains {contained}")
        for line in said:
            warnings.warn(f"source {source.title}: {line}", stacklevel=2)
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
    sources: Sequence[Source], *, columns: Mapping[str, str] | None = None, skip_bad: bool = False,
    turns: Turns = "last",
) -> Conversations:  # fmt: skip
    """Pin the sources if they are not, read every row once, and give the conversations in order.

    Args:
        columns: `data.columns`; used for the sources that have these columns, the others are recognised by name.
        turns: the last answer of a row is a sample, or each of its answers with all that comes before.
        skip_bad: leave out rows without a conversation and count them in `.dropped`, beside repeated samples and what
            filters refuse; broken JSON stays an error.
    Raises:
        ConfigError: `columns` is not {messages: …} or {prompt: …, response: …}.
        DataError: no such data, a bad row without `skip_bad`, no conversation left of some source, a column is missing.
        Unavailable: the Hub cannot be reached.
    """
    return Conversations(pin_sources(sources), columns=_checked_columns(columns), skip_bad=skip_bad, turns=turns)


def open_reader(
    sources: Sequence[Source], *, columns: Mapping[str, str] | None = None, turns: Turns = "last"
) -> ConversationReader:
    """Open sources that a plan has pinned, without reading a row: what a worker does.

    Raises: DataError: a source has changed since it was pinned; a column is missing. Unavailable, ConfigError.
    """
    return ConversationReader(pin_sources(sources), columns=_checked_columns(columns), turns=turns)


def _checked_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    columns = columns or {}
    if columns and set(columns) not in ({"messages"}, {"prompt", "response"}):
        raise ConfigError(
            f"data.columns = {dict(columns)}: expected {{messages: NAME}} or {{prompt: NAME, response: NAME}}"
        )
    return columns
