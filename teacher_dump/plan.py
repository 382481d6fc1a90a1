"""The plan: everything that decides a byte of the cache, made once, before any model is loaded.

configuration + data + both tokenizers -> `plan.json`: pinned sources, fingerprints, settings, and for each shard its
ordered samples. Shards do not depend on the number of workers, nor the plan on where things lie (portable.py).
`plan_hash` is the SHA-256 of its canonical JSON; every shard and the manifest carry it. A command whose settings differ
from an existing plan is refused by name.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..shared.cache.compact import frequent_ids
from ..shared.cache.coverage import COVERAGE, sentences
from ..shared.cache.files import canonical_json, parse_json, readable_json, sha256_bytes
from ..shared.cache.manifest import MAX_PLAN_BYTES, MAX_SHARDS, PLAN_NAME
from ..shared.cache.schema import SCHEMA_VERSION, Layout, Signal
from ..shared.cache.store import Store, open_store
from ..shared.config import DataConfig, RunConfig, from_tree, to_tree
from ..shared.conversations import (
    ConversationReader,
    Conversations,
    Source,
    open_conversations,
    open_reader,
    parse_sources,
    pin_sources,
)
from ..shared.errors import CacheError, CacheMismatch, ConfigError, DataError
from ..shared.licences import folder_licence
from ..shared.models.loading import read_config
from ..shared.models.specs import outside_recommended_t
from ..shared.noising import keyed_generator
from ..shared.shown_text import some
from ..shared.tokens import Dropped, PairedSample
from .pairing import Pairing, UnwrittenFields, open_pairing
from .portable import find_sources, planned_settings, portable_sources
from .unigram import Unigram, answered_tokens

_SEAL = "plan_hash"
"""The field of plan.json beside those of the plan: the SHA-256 of their canonical JSON."""


class PlannedSample(NamedTuple):
    """Where a sample stands in the data: number of the source, row in it, the id it had, and `digest` of its tokens."""

    source: int
    row: int
    sample_id: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> "PlannedSample":
        """From the fields between colons, as plan.json holds them. Raises: ValueError."""
        source, row, sample_id, tokens = text.split(":")
        return cls(int(source), int(row), sample_id, tokens)


def digest(sample: PairedSample) -> str:
    """8 hex digits over both sides' tokens, prompt lengths and chunks: templates may render another date tomorrow."""
    sides = [(side.x_0.tobytes(), side.prompt_tokens) for side in (sample.student, sample.teacher)]
    parts = [part for tokens, prompt in sides for part in (tokens, str(prompt).encode())]
    return hashlib.sha256(b"|".join([*parts, sample.chunks.tobytes()])).hexdigest()[:8]


@dataclass(frozen=True)
class Plan:
    """What is to be dumped.

    Args:
        settings: the planned sections of the configuration, as plain JSON; no paths.
        sources: pinned; local ones by name alone.
        student, teacher: what identifies the two sides (`Pairing.student_facts`); no teacher: None.
        teacher_licence: what the teacher's card declares.
        samples: in shard order.
        dropped: samples left out, by reason.
        frequent_ids: student ids by how often the answers hold them, for `signal.codec: compact`; otherwise empty.
        unigram: what a unigram model of the answers finds of them, `logp` and `accuracy` a token (unigram.py); None:
            there is no teacher.
        totals: samples, rows, tokens and maskable tokens of either side, and the expected number of masked ones.
        coverage: what was cut off, and what no chunk covers (shared/cache/coverage.py).
        here: the configuration of this machine's command, which says where things lie; not part of the plan.
    """

    settings: Mapping[str, Any]
    sources: tuple[Source, ...]
    student: Mapping[str, Any]
    teacher: Mapping[str, Any] | None
    teacher_licence: str | None
    samples: tuple[PlannedSample, ...]
    dropped: Mapping[str, int]
    frequent_ids: tuple[int, ...]
    totals: Mapping[str, int]
    unigram: Mapping[str, float] | None = None
    coverage: Mapping[str, int] = field(default_factory=dict)
    here: RunConfig | None = field(default=None, compare=False, repr=False)

    @cached_property
    def config(self) -> RunConfig:
        """The planned sections as a configuration; names are paths only in a plan that `at` gave."""
        return self.here or from_tree(RunConfig, self.settings)

    def at(self, config: RunConfig, root: Path | Store) -> "Plan":
        """This plan with the paths of a command's configuration.

        Raises: CacheMismatch: its settings are not those of the plan; names every one that differs.
        """
        require_same_settings(self, config, root)
        return replace(self, here=config)

    def sentences(self) -> list[str]:
        """What is left out, cut off, or has no teacher's word, for people; [] where all is whole."""
        return sentences(self.dropped, self.coverage, len(self.samples), has_teacher=self.teacher is not None)

    @property
    def num_shards(self) -> int:
        """Shards that hold the samples; the last may be smaller."""
        per_shard = self.settings["shards"]["samples_per_shard"]
        return -(-len(self.samples) // per_shard)

    def shard_samples(self, shard: int) -> Sequence[PlannedSample]:
        """The samples of one shard."""
        per_shard = self.settings["shards"]["samples_per_shard"]
        return self.samples[shard * per_shard : (shard + 1) * per_shard]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the content of plan.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": to_tree(self.settings),
            "sources": [vars(source) for source in self.sources],
            "student": dict(self.student),
            "teacher": None if self.teacher is None else dict(self.teacher),
            "teacher_licence": self.teacher_licence,
            "samples": [":".join(map(str, sample)) for sample in self.samples],
            "dropped": dict(self.dropped),
            "frequent_ids": list(self.frequent_ids),
            "totals": dict(self.totals),
            "unigram": None if self.unigram is None else dict(self.unigram),
            "coverage": dict(self.coverage),
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256_bytes(canonical_json(self.to_json()))

    @property
    def signal_kind(self) -> Signal:
        """none (no teacher), chunk or topk."""
        return self.config.signal.kind if self.teacher is not None else "none"

    @cached_property
    def layout(self) -> Layout:
        """Columns of the shards."""
        no_targets = {} if self.signal_kind == "topk" else {"codec": "plain", "tail_buckets": ()}
        return Layout.of(
            self.config.signal, signal=self.signal_kind, vocab_size=self.student["vocab_size"],
            block_size=self.config.student.block_size, frequent_ids=self.frequent_ids, **no_targets,
        )  # fmt: skip

    @property
    def expected_forwards(self) -> int:
        """Token-forwards of the teacher, at most: every view's blocks in each of its passes, and x_0 once.

        A teacher without blocks reads the whole sequence in every pass, and no x_0.
        """
        if self.teacher is None:
            return 0
        noise, totals = self.config.noise, self.totals
        passes = noise.views * (2 if noise.comp_demo else 1)
        if self.teacher["spec"]["block_size"] is None:
            return totals["teacher_tokens"] * passes
        return totals["teacher_tokens"] + totals["teacher_maskable"] * passes


def make_plan(
    config: RunConfig, *, progress: Callable[[], None] = lambda: None, say: Callable[[str], object] = lambda line: None
) -> tuple[Plan, Pairing]:
    """Pin the sources, tokenise every conversation on both sides and cut the usable ones into shards.

    Args:
        progress: called after each conversation.
        say: told what is read of the data and what is not: columns, fields of messages, conversations beyond a limit.
    Raises: DataError, ConfigError: see `open_conversations` and `open_pairing`; no usable sample is left.
    """
    sources = pin_sources(parse_sources(config.data.source))
    conversations = open_conversations(
        sources, columns=config.data.columns, skip_bad=config.data.skip_bad, turns=config.data.turns
    )
    for line in conversations.columns_read:
        say(line)
    pairing, noise = open_pairing(config), config.noise
    licence, folder = config.teacher.licence, pairing.teacher_folder
    if folder is not None:
        licence = licence or folder_licence(folder)
        unusual = outside_recommended_t(read_config(folder), str(folder), t_min=noise.t_min, t_max=noise.t_max)
        if unusual:
            warnings.warn(unusual, stacklevel=2)
    dropped: Counter[str] = Counter()
    coverage: Counter[str] = Counter(dict.fromkeys(COVERAGE, 0))
    samples, counts = [], Counter()
    ranked = config.signal.codec == "compact" and config.signal.kind == "topk" and folder is not None
    occurrences = np.zeros(pairing.student_facts()["vocab_size"] if ranked else 0, np.int64)
    rows = chosen_rows(len(conversations), config.data)
    for line in _limit_sentences(conversations, rows, config.data):
        say(line)
    unwritten = UnwrittenFields(pairing)
    unigram = None if pairing.spec is None else Unigram(len(rows), pairing.spec.vocab_size)
    for row in rows:
        progress()
        conversation = conversations[row]
        try:
            sample = pairing.encode(conversation)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        unwritten.look(sources[conversations.place(row)[0]].title, conversation)
        student, teacher = sample.student, sample.teacher
        if (student.cut_tokens or teacher.cut_tokens) and config.data.too_long != "truncate":
            if config.data.too_long == "error":
                raise _too_long(conversation.sample_id, sample)
            dropped["longer than max length"] += 1
            continue
        samples.append(PlannedSample(*conversations.place(row), conversation.sample_id, digest(sample)))
        for prefix, side in (("", student), ("teacher_", teacher)):
            counts[f"{prefix}tokens"] += len(side.x_0)
            counts[f"{prefix}maskable"] += len(side.x_0) - side.prompt_tokens
        _cover(coverage, sample, has_teacher=unigram is not None)
        if unigram is not None:
            unigram.add(answered_tokens(sample))
        if ranked:
            occurrences += np.bincount(student.x_0[student.prompt_tokens :], minlength=len(occurrences))
    for line in unwritten.sentences():
        say(line)
    dropped.update(conversations.dropped)
    if not samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common()) or "the data set is empty"
        raise DataError(
            f"{config.data.source}: no usable conversation ({reasons}). "
            f"A sample needs room for an answer within data.max_length = {config.data.max_length} tokens."
        )
    num_shards = -(-len(samples) // config.shards.samples_per_shard)
    most = MAX_SHARDS // 2 if config.signal.audit_share else MAX_SHARDS  # each has an audit file, too
    if num_shards > most:
        raise ConfigError(
            f"shards.samples_per_shard = {config.shards.samples_per_shard}: {len(samples):,} samples make "
            f"{num_shards:,} shards, and a manifest describes up to {most:,}; make larger shards"
        )
    totals = {
        "samples": len(samples), "rows": len(samples) * noise.views, **counts,
        "expected_masked": int(counts["maskable"] * noise.views * (noise.t_min + noise.t_max) / 2),
    }  # fmt: skip
    plan = Plan(
        settings=planned_settings(config), sources=portable_sources(sources), student=pairing.student_facts(),
        teacher=pairing.teacher_facts(), teacher_licence=licence, samples=tuple(samples),
        dropped=dict(sorted(dropped.items())), frequent_ids=frequent_ids(occurrences), totals=totals,
        unigram=None if unigram is None else unigram.score(), coverage=dict(coverage), here=config,
    )  # fmt: skip
    return plan, pairing


def _limit_sentences(conversations: Conversations, rows: Sequence[int], data: DataConfig) -> Iterator[str]:
    """What `data.limit` does: which conversations are not used, or that there are not so many."""
    num = len(conversations)
    if data.limit is None:
        return
    if data.limit > num:
        yield f"data.limit = {data.limit:,} is more than the {num:,} conversations that there are: all are used"
    if len(rows) == num:
        return
    how = "the first of" if data.sample_seed is None else "drawn from"
    yield f"data.limit = {data.limit:,}: {len(rows):,} conversations are used, {how} {num:,}"
    used = {conversations.place(row)[0] for row in rows}
    unused = [source.title for number, source in enumerate(conversations.sources) if number not in used]
    if unused:
        cure = "; data.sample_seed=0 would draw from all" if data.sample_seed is None else ""
        yield f"data.limit = {data.limit:,}: nothing of {some(unused)} is used{cure}"


def _cover(coverage: Counter[str], sample: PairedSample, *, has_teacher: bool) -> None:
    """Count what of a sample was cut off, and what of its answer chunks cover."""
    for prefix, side in (("", sample.student), ("teacher_", sample.teacher))[: 2 if has_teacher else 1]:
        coverage[f"{prefix}cut_samples"] += side.cut_tokens > 0
        coverage[f"{prefix}cut_tokens"] += side.cut_tokens
    signal = int((sample.chunks[:, 3] - sample.chunks[:, 2]).sum())
    student = sample.student
    coverage["response_tokens"] += len(student.x_0) - student.prompt_tokens - student.padding
    coverage["signal_tokens"] += signal
    coverage["samples_without_signal"] += has_teacher and signal == 0


def _too_long(sample_id: str, sample: PairedSample) -> DataError:
    side, of = (sample.student, "student") if sample.student.cut_tokens else (sample.teacher, "teacher")
    setting = "data.max_length" if of == "student" else "data.teacher_max_length"
    return DataError(
        f"sample {sample_id}: {len(side.x_0) + side.cut_tokens:,} {of} tokens, and {setting} permits {len(side.x_0):,} "
        "(data.too_long=error). Raise it, or set data.too_long to drop or truncate"
    )


def write_plan(root: Path | Store, plan: Plan) -> None:
    """Write plan.json, once: of several commands that begin at the same time one wins.

    Raises: CacheMismatch: another command was faster, with another plan.
    """
    store = open_store(root)
    store.write_once(PLAN_NAME, readable_json({**plan.to_json(), _SEAL: plan.hash}))
    theirs = read_plan(store)
    if theirs.hash != plan.hash:
        changes = _changes(theirs.settings, plan.settings)
        raise CacheMismatch(
            f"{store.path(PLAN_NAME)}: a command that began at the same time made another plan ({theirs.hash[:12]}, "
            f"here {plan.hash[:12]}): {changes or 'its data or tokenizers differ'}. Give all workers the same, or "
            "another --out"
        )


def read_plan(root: Path | Store) -> Plan:
    """Read plan.json.

    Raises: CacheError: missing, damaged, edited, or of another version.
    """
    store = open_store(root)
    path = store.path(PLAN_NAME)
    try:
        tree = parse_json(store.read(PLAN_NAME, max_bytes=MAX_PLAN_BYTES), path, max_bytes=MAX_PLAN_BYTES)
    except FileNotFoundError as error:
        raise CacheError(f"{store}: no {PLAN_NAME}; start with tide dump-teacher or tide plan") from error
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise CacheError(
            f"{path}: schema_version is {version!r:.40}, this tide writes {SCHEMA_VERSION}; finish the dump with the "
            "tide that began it, or dump into another folder"
        )
    seal = tree.pop(_SEAL, None)  # plans of earlier versions have none
    if seal is not None and seal != sha256_bytes(canonical_json(tree)):
        raise CacheError(
            f"{path}: was edited after it was made: {_SEAL} is {seal!r:.80}, not the hash of the other fields. Restore "
            "the file as it was; other settings are another cache: give them on the command line, with another --out"
        )
    try:
        return Plan(
            settings=tree["settings"], sources=tuple(Source(**_tuples(s)) for s in tree["sources"]),
            student=tree["student"], teacher=tree["teacher"], teacher_licence=tree["teacher_licence"],
            samples=tuple(map(PlannedSample.parse, tree["samples"])), dropped=tree["dropped"], totals=tree["totals"],
            frequent_ids=tuple(tree["frequent_ids"]), unigram=tree["unigram"], coverage=tree["coverage"],
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path}: not a plan ({error!r:.200}); remove the folder and dump again") from error


def require_same_settings(plan: Plan, config: RunConfig, root: Path | Store) -> None:
    """Refuse a command whose settings would change bytes of a cache that is already begun.

    Raises: CacheMismatch: names every setting that differs.
    """
    changes = _changes(plan.settings, planned_settings(config))
    if changes:
        raise CacheMismatch(
            f"{open_store(root).path(PLAN_NAME)} was made with other settings ({changes}). "
            "Give the planned settings to continue, or another --out to start a new cache."
        )


def open_samples(plan: Plan) -> tuple[ConversationReader, Pairing]:
    """Data and tokenizers of an existing plan, for a worker: no row is read yet.

    Raises: DataError: the data changed since the plan was made. CacheMismatch: a tokenizer, the teacher's config.json
        or tokenkit did.
    """
    config = plan.config
    pairing = open_pairing(config, teacher_revision=(plan.teacher or {}).get("revision"))
    facts = {"student": pairing.student_facts(), "teacher": pairing.teacher_facts()}
    changes = _changes({"student": plan.student, "teacher": plan.teacher}, facts)
    if changes:
        raise CacheMismatch(
            "the tokenizers, the teacher's config.json or tokenkit changed since the plan was made "
            f"({changes}). Restore them to continue, or give another --out to start a new cache."
        )
    return open_reader(
        find_sources(plan.sources, config.data.source), columns=config.data.columns, turns=config.data.turns
    ), pairing


def _changes(planned: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Every leaf of two trees that differs, by name, old and new."""
    old, new = dict(_leaves(planned)), dict(_leaves(now))
    different = [name for name in sorted(old | new) if (name in old, old.get(name)) != (name in new, new.get(name))]

    def said(tree: Mapping[str, Any], name: str) -> str:
        return repr(tree[name]) if name in tree else "nothing"

    return "; ".join(f"{name}: plan {said(old, name)}, now {said(new, name)}" for name in different)


def chosen_rows(num_rows: int, data: DataConfig) -> Sequence[int]:
    """Rows of the joined sources that `data.limit` and `data.sample_seed` select, in order."""
    limit = num_rows if data.limit is None else min(data.limit, num_rows)
    if data.sample_seed is None:
        return range(limit)
    return sorted(keyed_generator(data.sample_seed, "sample").permutation(num_rows)[:limit].tolist())


def _leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{where}.{name}" if where else str(name))
    else:
        yield where, list(tree) if isinstance(tree, tuple) else tree


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(tuple(item) for item in v) if isinstance(v, list) else v for k, v in tree.items()}
