"""README.md of a cache: a data set card for people and for the Hub, made from the manifest alone.

The YAML front matter tells the Hub licence, tags, size and configs; the tables below say all that docs/cache_format.md
asks a manifest to say. Names in a manifest may be a stranger's: they are quoted for YAML and inert in Markdown. Nothing
in tide parses a card.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ConfigError
from ..licences import hub_fields
from ..shown_text import markdown_text, terminal_text
from .facts import identity, origin, value_chars
from .files import atomic_write
from .manifest import Manifest
from .manifest_fields import UNKNOWN
from .verdict import verdict

if TYPE_CHECKING:
    from .trained_from import TrainedFrom

CARD_NAME = "README.md"
PREVIEW_CONFIG = "preview"
DATA_GLOB, PREVIEW_GLOB = "data/*.parquet", "preview/*.parquet"
MAX_CELL_CHARS = 500
_SIZES = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M"),
          (10**9, "1B"), (10**10, "10B"), (10**11, "100B"), (10**12, "1T")]  # fmt: skip


@dataclass(frozen=True)
class Licences:
    """What a card declares: the teacher's licence (None without a teacher), and every source's in order."""

    teacher: str | None
    data: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Teacher first."""
        return [*([self.teacher] if self.teacher is not None else []), *self.data]


def licences_of(manifest: "Manifest | TrainedFrom") -> Licences:
    """What the manifest says, "unknown" included."""
    return Licences(manifest.teacher.licence if manifest.teacher else None, tuple(s.licence for s in manifest.sources))


def required_licences(
    manifest: "Manifest | TrainedFrom", *, teacher: str | None = None, data: str | None = None
) -> Licences:
    """The manifest's licences, its unknown ones replaced by what the publisher states.

    Args: teacher, data: given as options; they fill in what is unknown and contradict nothing.
    Raises: ConfigError: a licence is still unknown, or an option contradicts the manifest; names the option.
    """
    known = licences_of(manifest)
    model = manifest.teacher.id if manifest.teacher else "no teacher"
    found = []
    for option, given, who, licences in (
        ("--teacher-licence", teacher, f"the teacher ({model})", [known.teacher] if known.teacher is not None else []),
        ("--data-licence", data, "the data", list(known.data)),
    ):
        if given is not None and (not given.strip() or given.strip() == UNKNOWN or not given.isprintable()):
            raise ConfigError(f"{option} {given!r:.80}: expected the name of a licence, for example apache-2.0")
        if given is not None and UNKNOWN not in licences and given not in licences:
            raise ConfigError(
                f"{option} {given}: the manifest declares {', '.join(licences) or 'none'} for {who}; leave it out"
            )
        if given is None and UNKNOWN in licences:
            raise ConfigError(
                f"the licence of {who} is unknown, and what is published needs one: find out, then give "
                f"{option} NAME (for example {option} apache-2.0), or ask whoever owns the rights"
            )
        found.append([given.strip() if given and licence == UNKNOWN else licence for licence in licences])
    return Licences(found[0][0] if found[0] else None, tuple(found[1]))


def write_card(root: str | Path, manifest: Manifest) -> None:
    """Write `root / README.md` atomically. Raises: OutputError."""
    atomic_write(Path(root) / CARD_NAME, card_text(manifest).encode())


def card_text(manifest: Manifest, licences: Licences | None = None, *, repository: str | None = None) -> str:
    """The card as Markdown with the Hub's YAML front matter.

    Args:
        licences: default: the manifest's.
        repository: owner/name it is published as, where a preview lies beside the data; None: a local cache.
    """
    licences, has_preview = licences or licences_of(manifest), repository is not None
    header = yaml.safe_dump(_front_matter(manifest, licences, has_preview), sort_keys=False, width=2**16)
    shown = (
        " The config `preview` shows some views as text, with the teacher's first choices (long ones are cut, and say "
        "so); it is for people, and no training reads it." if has_preview else ""
    )  # fmt: skip
    sections = [
        f"---\n{header}---\n",
        "# A teacher's answers, cached by tide\n",
        "One row per view (sample x noise draw). docs/cache_format.md of tide-distill describes the columns, and "
        f"`manifest.json` describes this cache completely; any Parquet reader opens it.{shown}\n",
        f"{markdown_text(said['sentence'])}\n" if (said := verdict(manifest)) else "",
        _USE.replace("OWNER/NAME", repository) if repository else "",
        *(f"## {title}\n\n{table(rows)}\n" for title, rows in _sections(manifest, licences)),
    ]
    return "\n".join(section for section in sections if section)


_USE = """```sh
tide pull-cache OWNER/NAME cache                      # fetch, pinned to a commit, and verify
tide train-student --cache hf://datasets/OWNER/NAME --student STUDENT --out run
```
"""


def _front_matter(manifest: Manifest, licences: Licences, has_preview: bool) -> dict[str, Any]:
    configs: list[dict[str, Any]] = [
        {"config_name": "default", "default": True, "data_files": [{"split": "train", "path": DATA_GLOB}]}
    ]
    if has_preview:
        configs.append({"config_name": PREVIEW_CONFIG, "data_files": [{"split": "train", "path": PREVIEW_GLOB}]})
    teacher = f" of {one_line(manifest.teacher.id, 100)}" if manifest.teacher else ""
    fields = hub_fields([one_line(licence) for licence in licences.all])
    return {
        "pretty_name": f"tide cache{teacher}",
        **fields,
        "tags": ["tide", "distillation", "diffusion-language-model", f"signal-{manifest.signal.kind}"],
        "size_categories": [size_category(manifest.totals.rows)],
        "configs": configs,
    }


def size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows, for example "1K<n<10K"."""
    below = None
    for bound, name in _SIZES:
        if num_rows < bound:
            return f"n<{name}" if below is None else f"{below}<n<{name}"
        below = name
    return "n>1T"


def _sections(manifest: Manifest, licences: Licences) -> list[tuple[str, Mapping[str, str]]]:
    """Titles and rows of all tables, values as plain text."""
    tree, totals, audit = manifest.to_json(), manifest.totals, manifest.audit
    if tree["teacher"]:
        tree["teacher"] |= {"licence": licences.teacher or UNKNOWN}
    tree["sources"] = [s | {"licence": licence} for s, licence in zip(tree["sources"], licences.data, strict=True)]
    sections: list[tuple[str, Mapping[str, str]]] = []
    for title, rows in origin(tree, totals.samples):
        name, _, kind = title.partition(": ")
        text = {k: settings_text(v) if isinstance(v, Mapping) else str(v) for k, v in rows.items()}
        text = text if name == "Noise" else {_capital(k): v for k, v in text.items()}
        sections.append((name, {"Kind": kind} | text if kind else text))
    audit_rows = {"Targets stored in full": "none"}
    if audit is not None:
        num_targets, num_bytes = sum(entry.rows for entry in audit.files), sum(entry.bytes for entry in audit.files)
        audit_rows = {
            "Targets stored in full": f"{num_targets:,}, each drawn with probability {audit.share:g}",
            "Bytes": f"{num_bytes:,} in {len(audit.files):,} files; no training reads them",
        }
    per_masked = f"{totals.bytes / totals.masked_positions:.1f}" if totals.masked_positions else "no"
    return [
        *sections,
        ("Size", {
            "Samples": f"{totals.samples:,}", "Views (rows)": f"{totals.rows:,}", "Tokens": f"{totals.tokens:,}",
            "Masked positions": f"{totals.masked_positions:,}",
            "Bytes": f"{totals.bytes:,} in {totals.shards:,} shards, {per_masked} per masked position",
        }),
        ("Audit", audit_rows),
        ("Identity", {_capital(k): v for k, v in identity(tree | {"manifest_hash": manifest.hash}).items()}),
    ]  # fmt: skip


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def settings_text(settings: Mapping[str, Any]) -> str:
    """`name = value` of all, on one line."""
    return ", ".join(f"{name} = {value}" for name, value in sorted(settings.items()))


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of names and values, in which nothing acts."""
    lines: Iterable[str] = (
        f"| {markdown_text(name, max_chars=MAX_CELL_CHARS)} "
        f"| {markdown_text(value, max_chars=value_chars(name, MAX_CELL_CHARS))} |"
        for name, value in rows.items()
    )
    return "| | |\n|---|---|\n" + "\n".join(lines)


def one_line(text: str, max_chars: int = MAX_CELL_CHARS) -> str:
    """Text without control characters on one line, for a YAML value."""
    return " ".join(terminal_text(text, max_chars=max_chars).split())
