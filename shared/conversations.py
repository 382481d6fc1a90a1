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
import mmap
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import ConfigError, DataError, Unavailable
from .stdlib_source import STDLIB_SPLITS, StdlibPair, stdlib_pairs, stdlib_version

FILE_SUFFIXES = (".jsonl", ".jsonl.zst", ".json", ".parquet")
MESSAGES_COLUMNS = ("messages", "conversations")
PAIR_COLUMNS = (
    ("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("prompt", "completion"),
)  # fmt: skip
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "function": "tool", "observation": "tool",  # ShareGPT
}  # fmt: skip

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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


@dataclass(frozen=True)
class Source:
    """One data set, config and split; `str()` gives the syntax that `parse_sources` reads."""

    path: str
    config: str | None = None
    split: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    """Pinned: a commit, `sha256:…` of local files, or the Python version."""
    names: tuple[str, ...] = ()
    """Bare names in brackets; `pin_sources` decides which is the config and which the split."""

    def __str__(self) -> str:
        settings = (("config", self.config), ("split", self.split), ("revision", self.revision))
        items = [*self.names, *(f"{key}={value}" for key, value in settings if value is not None)]
        return self.path + "".join(f"[{item}]" for item in [*items, *(f"{c}:{v}" for c, v in self.where)])


def parse_sources(text: str) -> tuple[Source, ...]:
    """Read `data.source`; nothing is opened or asked.

    Raises: ConfigError: an empty name, unbalanced brackets, an unknown or repeated setting.
    """
    return tuple(_parse_source(part.strip(), text) for part in re.split(r"\+(?![^\[\]]*\])", text))


def _parse_source(part: str, text: str) -> Source:
    match = re.fullmatch(r"([^\[\]]+)((?:\s*\[[^\[\]]+\])*)", part)
    if match is None or not match[1].strip():
        raise ConfigError(f"data.source = {text!r}: cannot read {part!r}; expected name[filter,…] joined by +")
    settings: dict[str, str] = {}
    where, names = [], []
    for item in (item.strip() for group in re.findall(r"\[([^\]]+)\]", match[2]) for item in group.split(",")):
        key, separator, value = (piece.strip() for piece in re.match(r"([^:=]*)([:=]?)(.*)", item, re.DOTALL).groups())  # pyright: ignore[reportOptionalMemberAccess]
        if not key or (separator and not value):
            raise ConfigError(f"data.source = {text!r}: cannot read [{item}]; expected split, config or column:value")
        if separator == ":":
            where.append((key, value))
        elif not separator:
            names.append(key)
        elif key in ("config", "split", "revision") and key not in settings:
            settings[key] = value
        else:
            raise ConfigError(
                f"data.source = {text!r}: [{item}] is {'given twice' if key in settings else 'not known'}; expected "
                "one each of config=, split= and revision=, or column:value"
            )
    return Source(path=match[1].strip(), where=tuple(where), names=tuple(names), **settings)


def pin_sources(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Settle config, split and revision of every source, so that opening it again gives the same rows.

    A data set of several configs becomes one source per config. Pinning a pinned source checks local files and the
    Python version against it and asks the Hub nothing.

    Raises:
        DataError: a file, data set, config, split or revision does not exist, or has changed since it was pinned.
        Unavailable: the Hub cannot be reached.
    """
    if not sources:
        raise DataError("data.source: no source is given; name at least one, for example stdlib")
    return tuple(pinned for source in sources for pinned in _pin(source))


def _pin(source: Source) -> list[Source]:
    kind = _kind(source)
    if kind == "hub":
        if source.config and source.split and not source.names and _COMMIT.fullmatch(source.revision or ""):
            return [source]
        source = replace(source, revision=_hub_commit(source))
    else:
        now = stdlib_version() if kind == "stdlib" else _content_hash(source)
        if source.revision not in (None, now):
            remedy = "run the Python it names" if kind == "stdlib" else "restore the files"
            raise DataError(
                f"source {source.path}: pinned as {source.revision}, but it is {now} now; {remedy}, or plan anew"
            )
        source = replace(source, revision=now)
    configs, default = _configs(source) if kind in ("hub", "folder") else ([], [None])
    if source.config is not None:
        if source.config not in configs:
            raise DataError(f"source {_name(source)}: no config {source.config!r}; expected {_listed(configs)}")
        default = [source.config]
    else:
        splits = _splits(replace(source, config=default[0])) if source.names and source.split is None else []
        named = next((name for name in source.names if name in configs and name not in splits), None)
        if named is not None:
            default = [named]
            source = replace(source, names=tuple(name for name in source.names if name != named))
    return [_settle_split(replace(source, config=config), configs) for config in default]


def _kind(source: Source) -> str:
    """stdlib, file, folder or hub; what exists here wins over the Hub, as in `datasets`."""
    if source.path == "stdlib":
        return "stdlib"
    path = Path(source.path).expanduser()
    if path.is_dir():
        return "folder"
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise DataError(f"source {source.path}: cannot read this kind of file; expected {', '.join(FILE_SUFFIXES)}")
        return "file"
    if path.name.endswith(FILE_SUFFIXES) or _HUB_ID.fullmatch(source.path) is None or source.path.startswith("."):
        raise DataError(
            f"source {source.path}: no such file or folder (seen from {Path.cwd()}), nor a Hub id (owner/name); "
            "correct data.source"
        )
    return "hub"


def _content_hash(source: Source) -> str:
    """SHA-256 of a file, or of the names and hashes of all visible files of a folder."""
    path = Path(source.path).expanduser()
    try:
        if path.is_file():
            with path.open("rb") as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        total = hashlib.sha256()
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file_path.relative_to(path)
            if not any(part.startswith(".") for part in name.parts):
                with file_path.open("rb") as file:
                    total.update(f"{name.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return f"sha256:{total.hexdigest()}"
    except OSError as error:
        raise DataError(
            f"source {source.path}: cannot be read ({error}); check the path and its permissions"
        ) from error


def _hub_commit(source: Source) -> str:
    from huggingface_hub import HfApi

    with _loading(source):
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
    if not commit:
        raise DataError(f"source {source.path}: the Hub names no commit for revision {source.revision or 'main'}")
    return commit


def _configs(source: Source) -> tuple[list[str], list[str | None]]:
    """All configs of a folder or Hub set, and those that are meant when none is named."""
    import datasets

    with _loading(source):
        configs = datasets.get_dataset_config_names(**_address(source))
        default = datasets.get_dataset_default_config_name(**_address(source))
    if not configs:
        raise DataError(
            f"source {_name(source)}: holds no data files that `datasets` can load; name another data.source"
        )
    return configs, [default] if default else ["all"] if "all" in configs else [*configs]


def _splits(source: Source) -> list[str]:
    """The splits of one config."""
    kind = _kind(source)
    if kind == "stdlib":
        return [*STDLIB_SPLITS]
    if kind == "file":
        return ["train"]
    import datasets

    with _loading(source):
        builder = datasets.load_dataset_builder(**_address(source), name=source.config)
    return [str(split) for split in builder.info.splits or builder.config.data_files or ()]


def _settle_split(source: Source, configs: list[str]) -> Source:
    """The source with its split: the bare name that is left, else `train`, else the only one."""
    splits = _splits(source)
    wanted = [*source.names, *([source.split] if source.split is not None else [])]
    if len(wanted) > 1:
        raise DataError(
            f"source {_name(source)}: {_listed(wanted)} cannot all be the split; name one of {_listed(splits)}"
        )
    if not wanted:
        wanted = ["train"] if "train" in splits else splits
        if len(wanted) != 1:
            raise DataError(f"source {_name(source)}: name a split in brackets; expected one of {_listed(splits)}")
    if wanted[0] not in splits:
        raise DataError(
            f"source {_name(source)}: {wanted[0]!r} is neither a split ({_listed(splits)}) nor a config "
            f"({_listed(configs)})"
        )
    return replace(source, split=wanted[0], names=())


def _address(source: Source) -> dict[str, Any]:
    """Where `datasets` finds a folder or a Hub set."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return {"path": str(path.resolve())}
    return {"path": source.path, "revision": source.revision}


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Translate what the Hub client and `datasets` raise: absent or broken -> DataError, no answer -> Unavailable."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors as hub

    try:
        yield
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError, DatasetsError) as error:
        raise DataError(
            f"source {_name(source)}: cannot be opened ({_first_line(error)}); check the name, the revision and, for "
            "private or gated data sets, the access token (HF_TOKEN)"
        ) from error
    except (_http_error(), OSError) as error:
        if Path(source.path).expanduser().is_dir():
            raise DataError(f"source {_name(source)}: the folder cannot be loaded ({_first_line(error)})") from error
        raise Unavailable(
            f"source {_name(source)}: no answer from the Hub ({_first_line(error)}); check the network and "
            "HF_ENDPOINT, or name a local file or folder in data.source"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise DataError(f"source {_name(source)}: `datasets` cannot load it ({_first_line(error)})") from error


def _http_error() -> type[Exception]:
    """Base of the HTTP library's errors: the Hub client changes libraries between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _name(source: Source) -> str:
    """The source as messages name it: without its revision."""
    return str(replace(source, revision=None))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


class _Rows(Protocol):
    """The rows of one source, read one at a time."""

    columns: Sequence[str]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...
    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...
    def place(self, i: int, /) -> str:
        """Where row i stands, for messages."""
        ...


class _JsonLines:
    """Rows of JSON lines, found by byte offset in a memory map or in the unpacked bytes of a file."""

    def __init__(self, data: mmap.mmap | bytes, name: str):
        self._data, self._name = data, name
        self._starts = array("Q")
        start = 0
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            if data[start:end].strip():
                self._starts.append(start)
            start = end
        self.columns: Sequence[str] = list(self[0]) if self._starts else []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        start = self._starts[i]
        end = self._data.find(b"\n", start)
        try:
            row = json.loads(self._data[start : end if end >= 0 else len(self._data)])
        except ValueError as error:
            raise DataError(
                f"{self._name}, {self.place(i)}: broken JSON ({error}); repair or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self._name}, {self.place(i)}: expected a JSON object with named columns, got {row!r:.60}"
            )
        return row

    def place(self, i: int) -> str:
        num_before = self._data[: self._starts[i]].count(b"\n")
        return f"line {num_before + 1}"


class _RowList:
    """Rows that are in memory already, or in an Arrow table that `datasets` reads."""

    def __init__(self, rows: Any, columns: Sequence[str]):
        self._rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._rows[i]

    def place(self, i: int) -> str:
        return f"row {i} (the first is 0)"


def _open_rows(source: Source) -> _Rows:
    """The rows of a pinned source."""
    kind = _kind(source)
    if kind == "stdlib":
        rows = [pair._asdict() for pair in stdlib_pairs(source.split or "train")]
        return _RowList(rows, list(StdlibPair._fields))
    if kind == "file":
        return _open_file(Path(source.path).expanduser(), source)
    import datasets

    with _loading(source):
        dataset = datasets.load_dataset(**_address(source), name=source.config, split=source.split)
    assert isinstance(dataset, datasets.Dataset)
    return _RowList(dataset, dataset.column_names)


def _open_file(path: Path, source: Source) -> _Rows:
    """The rows of a local file, without writing anything."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"source {source.path}: the file is empty")
        if path.name.endswith(".parquet"):
            return _open_parquet(path)
        if path.name.endswith(".zst"):
            return _JsonLines(_unpack_zst(path), str(path))
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if path.name.endswith(".json") and data[:4096].lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
            rows = json.loads(data[:])
            bad = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
            if bad is not None:
                raise DataError(f"source {source.path}, row {bad} (the first is 0): expected an object with columns")
            return _RowList(rows, list(rows[0]) if rows else [])
        return _JsonLines(data, str(path))
    except (ValueError, OSError) as error:  # pyarrow's own errors are among these
        raise DataError(f"source {source.path}: cannot be read ({error}); write or fetch the file again") from error


def _open_parquet(path: Path) -> _Rows:
    import datasets
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    dataset = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    return _RowList(dataset, dataset.column_names)


def _unpack_zst(path: Path) -> bytes:
    """The content of a .zst file of any number of frames; a cut-off frame is an error."""
    import zstandard

    unpacked = bytearray()
    frame = None
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    unpacked += frame.decompress(piece)
                except zstandard.ZstdError as error:
                    raise DataError(f"source {path}: not sound zstd data ({error}); fetch the file again") from error
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise DataError(f"source {path}: the zstd data is cut off; fetch the file again")
    return bytes(unpacked)


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
        f"source {_name(source)}: no conversation in the columns {_listed(present)}; expected "
        f"{' or '.join(MESSAGES_COLUMNS)}, or {pairs}; name them with data.columns, as {{messages: NAME}} or "
        "{prompt: NAME, response: NAME}"
    )


def _passes(row: Mapping[str, Any], column: str, values: set[str]) -> bool:
    """True when the column holds one of the values; what is not text is compared as JSON (true, 3, null)."""
    if column not in row:
        return column == "lang"  # judged by the answer, once it is read
    value = row[column]
    return (value if isinstance(value, str) else json.dumps(value, default=str)) in values


class Conversations:
    """The conversations of pinned sources joined in order, after filters and without repeated samples."""

    def __init__(self, sources: Sequence[Source], *, columns: Mapping[str, str], skip_bad: bool):
        self.sources = tuple(sources)
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason; what a filter refused is not counted."""
        self._parts = [_open_rows(source) for source in self.sources]
        if columns and not any(set(columns.values()) <= set(part.columns) for part in self._parts):
            raise DataError(f"data.columns = {dict(columns)}: no source has these columns; correct the names")
        self._readings = [_reading(s, p.columns, columns) for s, p in zip(self.sources, self._parts, strict=True)]
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
        source, rows, reading = self.sources[part], self._parts[part], self._readings[part]
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
                        f"source {_name(source)}, {rows.place(i)}: {bad.reason} ({bad}); correct the row, or leave "
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
                f"source {_name(source)}: no column lang; kept the rows whose answer contains "
                f"{' or '.join(sorted(where['lang']))}",
                stacklevel=2,
            )
        if unseen and len(rows):
            raise DataError(
                f"source {_name(source)}: no row has the column {_listed(sorted(unseen))} to filter by; it has "
                f"{_listed(rows.columns)}. Correct data.source; of several configs, name those that have the column"
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def sample_id(self, i: int) -> str:
        """The id of conversation i, without reading its text."""
        return f"{self._ids[i]:016x}"

    def __getitem__(self, i: int) -> Conversation:
        part, row = int(self._part_of[i]), int(self._row_of[i])
        conversation = self._readings[part].of(self._parts[part][row])
        if conversation.sample_id != self.sample_id(i):
            raise DataError(
                f"source {_name(self.sources[part])}, {self._parts[part].place(row)}: changed while it was in use; "
                "start again"
            )
        return conversation


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
    columns = columns or {}
    if columns and set(columns) not in ({"messages"}, {"prompt", "response"}):
        raise ConfigError(
            f"data.columns = {dict(columns)}: expected {{messages: NAME}} or {{prompt: NAME, response: NAME}}"
        )
    return Conversations(pin_sources(sources), columns=columns, skip_bad=skip_bad)
