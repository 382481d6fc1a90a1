"""What a plan calls the things that lie on one machine: names without paths, so that a plan means the same everywhere.

A local checkpoint, tokenizer or data file is named by its last path component; what it is, the plan's fingerprints and
content hashes say. Hub ids stay as they are. The same inputs in other folders therefore give the same plan and the same
cache, and nothing that is published shows where something lay. Every command brings the paths with it again.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..shared.config import RunConfig, to_tree
from ..shared.conversations import Source, parse_sources
from ..shared.sources import content_hash, source_kind

PLANNED_SECTIONS = ("data", "student", "teacher", "noise", "signal", "shards")
"""Sections of the configuration that decide bytes of the cache."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def portable_name(path: str) -> str:
    """A hub id as it is, a local path's last component; a folder of the hub's own cache gets its id back."""
    local = Path(path).expanduser()
    if not path or (not local.exists() and _HUB_ID.fullmatch(path)):
        return path
    resolved = local.absolute() if local.name not in ("", "..") else local.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return resolved.name or "root"


def portable_sources(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same sources without the folders that local ones lie in."""
    return tuple(source if source.path == "stdlib" else replace(source, path=_name(source)) for source in sources)


def planned_settings(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides bytes: where the student's weights lie does not, its tokenizer does.

    `data.skip_bad` permits to go on and decides nothing: without it there is no plan of data with bad rows and no shard
    with a bad sample, so what is there is the same. A dump that met one therefore goes on with it.
    `teacher.device` is each worker's own affair, and `teacher.check` permits to go on. `data.alignment` is named where
    it is not tide's own.
    """
    student, teacher, data = config.student, config.teacher, config.data
    sources = portable_sources(parse_sources(data.source))
    tree = to_tree(
        replace(
            config,
            data=replace(data, source="+".join(map(str, sources)), skip_bad=False),
            student=replace(student, path="", tokenizer=portable_name(student.tokenizer or student.path)),
            teacher=replace(
                teacher, path=portable_name(teacher.path),
                tokenizer=None if teacher.tokenizer is None else portable_name(teacher.tokenizer),
                devices_per_replica=1,
            ),
        )
    )  # fmt: skip
    del tree["teacher"]["device"], tree["teacher"]["check"]
    if data.alignment == "bytes":
        del tree["data"]["alignment"]
    return {section: tree[section] for section in PLANNED_SECTIONS}


def find_sources(planned: Sequence[Source], source: str) -> tuple[Source, ...]:
    """A plan's sources with the paths that `data.source` gives them here.

    Two local sources of one name are told apart by their content; one that no longer has its planned content keeps its
    path, and is refused when it is opened.
    """
    here: dict[str, list[Source]] = {}
    for one in parse_sources(source):
        here.setdefault(_name(one), []).append(one)
    found = []
    for one in planned:
        namesakes = here.get(one.path, [one])
        if len(namesakes) > 1 and (one.revision or "").startswith("sha256:"):
            local = [other for other in namesakes if source_kind(other) != "hub"]
            namesakes = [other for other in local if content_hash(other) == one.revision] or namesakes
        found.append(replace(one, path=namesakes[0].path))
    return tuple(found)


def _name(source: Source) -> str:
    return source.path if source.path == "stdlib" else portable_name(source.path)
