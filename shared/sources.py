"""Data sources by name: the text of `data.source` -> `Source` -> the same pinned to one config, split and revision.

The syntax, and what is chosen where it says nothing, stands in conversations.py. A pinned source gives the same rows
wherever it is opened again: a Hub set by commit, local files by content hash, the standard library by Python version.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError, Unavailable
from .licences import folder_licence
from .regular_files import open_regular, require_regular
from .stdlib_source import STDLIB_LICENCE, STDLIB_SPLITS, stdlib_version

FILE_SUFFIXES = (".jsonl", ".jsonl.zst", ".json", ".parquet", ".csv", ".tsv")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """One data set, config and split; `str()` gives the syntax that `parse_sources` reads."""

    path: str
    config: str | None = None
    split: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    """Pinned: a commit, `sha256:…` of local files, or the Python version."""
    licence: str | None = None
    """What the data set's card declares, found when the source is pinned; None: nothing."""
    names: tuple[str, ...] = ()
    """Bare names in brackets; `pin_sources` decides which is the config and which the split."""

    def __str__(self) -> str:
        settings = (("config", self.config), ("split", self.split), ("revision", self.revision))
        items = [*self.names, *(f"{key}={value}" for key, value in settings if value is not None)]
        return self.path + "".join(f"[{item}]" for item in [*items, *(f"{c}:{v}" for c, v in self.where)])

    @property
    def title(self) -> str:
        """The source as messages name it: without its revision."""
        return str(replace(self, revision=None))


def parse_sources(text: str) -> tuple[Source, ...]:
    """Read `data.source`; nothing is opened or asked.

    Raises: ConfigError: an empty name, unbalanced brackets, an unknown or repeated setting.
    """
    found: list[Source] = []
    rest: str | None = text
    while rest is not None:
        path, filters, more = _existing(rest)
        if path is None:
            part, *after = re.split(r"\+(?![^\[\]]*\])", rest, maxsplit=1)
            found.append(_parse_source(part.strip(), text))
            rest = after[0] if after else None
            continue
        found.append(replace(_parse_source(f"x{filters}", text), path=path))
        rest = more
    return tuple(found)


def _existing(text: str) -> tuple[str | None, str, str | None]:
    """The longest beginning of a text that is a file or folder here, whatever its characters: path, filters, the rest.

    Only names with characters of the syntax need it; None: the text begins with no such path.
    """
    if not re.search(r"[+\[\]]", text):
        return None, "", ""
    ends = [i for i in range(len(text), 0, -1) if i == len(text) or text[i] in "+["]
    for end in ends:
        path = text[:end].strip()
        filters = re.match(r"(?:\s*\[[^\[\]]+\])*\s*", text[end:])
        after = text[end + (filters.end() if filters else 0) :]
        if path and (not after or after[0] == "+") and Path(path).expanduser().exists():
            return path, filters[0].strip() if filters else "", after[1:] if after else None
    return None, "", ""


def _parse_source(part: str, text: str) -> Source:
    match = re.fullmatch(r"([^\[\]]+)((?:\s*\[[^\[\]]+\])*)", part)
    if match is None or not match[1].strip():
        raise ConfigError(
            f"data.source = {text!r}: cannot read {part!r}, and no such file or folder is here; expected "
            "name[filter,…] joined by +"
        )
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
    for source in sources:
        source_kind(source)  # what is not here is told before the Hub is asked about others
    return tuple(pinned for source in sources for pinned in _pin(source))


def _pin(source: Source) -> list[Source]:
    kind = source_kind(source)
    if kind == "hub":
        if source.config and source.split and not source.names and _COMMIT.fullmatch(source.revision or ""):
            return [source]
        source = _hub_commit(source)
    else:
        now = stdlib_version() if kind == "stdlib" else content_hash(source)
        if source.revision not in (None, now):
            remedy = "run the Python it names" if kind == "stdlib" else "restore the files"
            raise DataError(
                f"source {source.path}: pinned as {source.revision}, but it is {now} now; {remedy}, or plan anew"
            )
        found = folder_licence(Path(source.path).expanduser()) if kind == "folder" else None
        licence = source.licence or (STDLIB_LICENCE if kind == "stdlib" else found)
        source = replace(source, revision=now, licence=licence)
    configs, default = _configs(source) if kind in ("hub", "folder") else ([], [None])
    if source.config is not None:
        if source.config not in configs:
            raise DataError(f"source {source.title}: no config {source.config!r}; expected {listed(configs)}")
        default = [source.config]
    else:
        splits = _splits(replace(source, config=default[0])) if source.names and source.split is None else []
        named = next((name for name in source.names if name in configs and name not in splits), None)
        if named is not None:
            default = [named]
            source = replace(source, names=tuple(name for name in source.names if name != named))
    return [_settle_split(replace(source, config=config), configs) for config in default]


def source_kind(source: Source) -> str:
    """stdlib, file, folder or hub; what exists here wins over the Hub, as in `datasets`."""
    if source.path == "stdlib":
        return "stdlib"
    path = Path(source.path).expanduser()
    require_regular([path])
    if path.is_dir():
        return "folder"
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise DataError(f"source {source.path}: cannot read this kind of file; expected {', '.join(FILE_SUFFIXES)}")
        return "file"
    if path.name.endswith(FILE_SUFFIXES) or _HUB_ID.fullmatch(source.path) is None or is_local(source.path):
        raise DataError(
            f"source {source.path}: no such file or folder (seen from {Path.cwd()}), nor a Hub id (owner/name); "
            "correct data.source"
        )
    return "hub"


def is_local(path: str) -> bool:
    """Does a path that does not exist mean this machine all the same? `./x`, `/x`, `~/x`, `data/x` where data/ is."""
    first, slash, _ = path.partition("/")
    if path.endswith((".txt", ".gz", ".zip", ".tar", ".bz2", ".xz", ".zst", ".arrow", ".xlsx", ".md")):
        return True
    return path.startswith((".", "/", "~")) or "\\" in path or bool(slash and Path(first).is_dir())


def content_hash(source: Source) -> str:
    """SHA-256 of a file, or of the names and hashes of all visible files of a folder."""
    path = Path(source.path).expanduser()
    require_regular([path])
    try:
        if path.is_file():
            with open_regular(path) as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        total = hashlib.sha256()
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file_path.relative_to(path)
            if not any(part.startswith(".") for part in name.parts):
                with open_regular(file_path) as file:
                    total.update(f"{name.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return f"sha256:{total.hexdigest()}"
    except OSError as error:
        raise DataError(
            f"source {source.path}: cannot be read ({error}); check the path and its permissions"
        ) from error


def _hub_commit(source: Source) -> Source:
    """The source at the commit that its revision is now, with the licence that its card declares there."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with loading(source):
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        if not commit:
            raise DataError(f"source {source.path}: the Hub names no commit for revision {source.revision or 'main'}")
        try:
            card = hf_hub_download(source.path, "README.md", repo_type="dataset", revision=commit)
        except EntryNotFoundError:
            return replace(source, revision=commit, licence=None)
    return replace(source, revision=commit, licence=folder_licence(Path(card).parent))


def _configs(source: Source) -> tuple[list[str], list[str | None]]:
    """All configs of a folder or Hub set, and those that are meant when none is named."""
    import datasets

    with loading(source):
        configs = datasets.get_dataset_config_names(**address(source))
        default = datasets.get_dataset_default_config_name(**address(source))
    if not configs:
        raise DataError(
            f"source {source.title}: holds no data files that `datasets` can load; name another data.source"
        )
    return configs, [default] if default else ["all"] if "all" in configs else [*configs]


def _splits(source: Source) -> list[str]:
    """The splits of one config."""
    kind = source_kind(source)
    if kind == "stdlib":
        return [*STDLIB_SPLITS]
    if kind == "file":
        return ["train"]
    import datasets

    with loading(source):
        builder = datasets.load_dataset_builder(**address(source), name=source.config)
    return [str(split) for split in builder.info.splits or builder.config.data_files or ()]


def _settle_split(source: Source, configs: list[str]) -> Source:
    """The source with its split: the bare name that is left, else `train`, else the only one."""
    splits = _splits(source)
    wanted = [*source.names, *([source.split] if source.split is not None else [])]
    if len(wanted) > 1:
        raise DataError(
            f"source {source.title}: {listed(wanted)} cannot all be the split; name one of {listed(splits)}"
        )
    if not wanted:
        wanted = ["train"] if "train" in splits else splits
        if len(wanted) != 1:
            raise DataError(f"source {source.title}: name a split in brackets; expected one of {listed(splits)}")
    if wanted[0] not in splits:
        raise DataError(
            f"source {source.title}: {wanted[0]!r} is neither a split ({listed(splits)}) nor a config "
            f"({listed(configs)})"
        )
    return replace(source, split=wanted[0], names=())


def address(source: Source) -> dict[str, Any]:
    """Where `datasets` finds a folder or a Hub set."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        require_regular(path.rglob("*"))
        return {"path": _without_pattern(str(path.resolve()))}
    return {"path": source.path, "revision": source.revision}


@cache
def _without_pattern(folder: str) -> str:
    """A folder as `datasets` may be told of it: it reads *, ? and brackets as patterns, and other folders with them."""
    if not re.search(r"[*?\[\]{}]", folder):
        return folder
    shadow = Path(tempfile.mkdtemp(prefix="tide-data-"))  # its own name is resolved, those of files are not
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        link = shadow / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return str(shadow)


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Translate what the Hub client and `datasets` raise: absent or broken -> DataError, no answer -> Unavailable."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors as hub

    # base of the HTTP library's errors: the Hub client changes libraries between its versions
    http_error: type[Exception] = next(kind for kind in hub.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    try:
        yield
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError, DatasetsError) as error:
        if Path(source.path).expanduser().is_dir():
            raise DataError(f"source {source.title}: the folder cannot be loaded ({_causes(error)})") from error
        if isinstance(error, DatasetsError) and error.__cause__ is not None:
            raise DataError(f"source {source.title}: its files cannot be read ({_causes(error)})") from error
        raise DataError(
            f"source {source.title}: cannot be opened ({first_line(error)}); check the name, the revision and, for "
            "private or gated data sets, the access token (HF_TOKEN)"
        ) from error
    except (http_error, OSError) as error:
        if Path(source.path).expanduser().is_dir():
            raise DataError(f"source {source.title}: the folder cannot be loaded ({first_line(error)})") from error
        raise Unavailable(
            f"source {source.title}: no answer from the Hub ({first_line(error)}); check the network and "
            "HF_ENDPOINT, or name a local file or folder in data.source"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise DataError(f"source {source.title}: `datasets` cannot load it ({first_line(error)})") from error


def _causes(error: BaseException) -> str:
    """What went wrong, and what that came from."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 4:
        said.append(" ".join(str(cause).split())[:300] or type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return "; because: ".join(dict.fromkeys(said))


def first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"
