"""Both sides' tokenizers of a run, opened once: conversation -> `PairedSample`, and the map between vocabularies.

Needs tokenizers and the teacher's config.json, no weights. Without a teacher (recipe `ce`), the student is paired with
itself and has no chunks.
"""

import hashlib
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.config import RunConfig, TeacherConfig
from ..shared.conversations import Conversation
from ..shared.errors import ConfigError, DataError
from ..shared.models.loading import local_folder, read_config, snapshot_revision
from ..shared.models.specs import (
    TeacherSpec,
    family_of,
    published_mask_id,
    require_diffusion,
    require_published_ids,
    teacher_block_size,
    teacher_spec,
)
from ..shared.shown_text import some
from ..shared.tokenkit_adapter import align_chunks_with_tokenkit, tokenkit_version
from ..shared.tokens import (
    Dropped,
    PairedSample,
    TextEncoder,
    load_tokenizer,
    pair,
    published_mask,
    student_ids_of_teacher,
    student_mask,
)

MAX_TRIES, WRITTEN = 16, -1
"""Conversations in which a field is tried; and the mark of one that a template writes."""
_ID = re.compile(r"id|uuid|index|idx|hash|(.*_)?(id|uuid|index|idx|hash)|.*[a-z](Id|ID|Uuid)")
"""Names of fields that only tell messages apart."""
_NO_CHUNKS = np.zeros((0, 4), np.int32)


@dataclass
class Pairing:
    """The two encoders; `teacher`, `spec` and `teacher_folder` are None for a cache without a teacher.

    Args: tokenkit: which one finds the chunks (`tokenkit_version`); None: tide does.
    """

    config: RunConfig
    student: TextEncoder
    teacher: TextEncoder | None
    spec: TeacherSpec | None
    teacher_folder: Path | None
    tokenkit: str | None = None

    def encode(self, conversation: Conversation) -> PairedSample:
        """Tokens of both sides and the chunks between them.

        Raises: Dropped: the sample cannot be used, with the reason.
        """
        messages, tools = [message.to_json() for message in conversation.messages], conversation.tools
        if self.teacher is None:
            encoded = self.student.encode(messages, tools)
            return PairedSample(encoded, encoded, _NO_CHUNKS)
        align = align_chunks_with_tokenkit if self.tokenkit else None
        sample = pair(self.student, self.teacher, messages, see=self.config.teacher.see, tools=tools, align=align)
        if self.spec is not None and np.isin(sample.teacher.x_0, self.spec.drop_ids).any():
            raise Dropped("contains a token that the teacher must not say")
        return sample

    @cached_property
    def student_id(self) -> np.ndarray:
        """[V_teacher] int32: the student id inside the loss support with the same bytes, -1 where there is none.

        Raises: ConfigError: there is none at all.
        """
        if self.teacher is None or self.spec is None:
            return np.zeros(0, np.int32)
        mapped = student_ids_of_teacher(
            self.teacher.bytes_of, self.student.bytes_of,
            teacher_mask_id=self.teacher.mask_id, student_mask_id=self.student.mask_id,
        )  # fmt: skip
        table = np.full(self.spec.vocab_size, -1, np.int32)
        table[: len(mapped)] = mapped[: self.spec.vocab_size]
        table[list(self.spec.drop_ids)] = -1
        support = self.config.signal.support
        if support != "shared":
            table[support:] = -1
            table[table >= support] = -1
        if not (table >= 0).any():
            raise ConfigError(
                f"signal.support = {support!r}: the two vocabularies share no token there, so token-level losses have "
                "nothing to range over; use signal.kind=chunk"
            )
        return table

    @property
    def num_support(self) -> int:
        """Tokens in the loss support."""
        return int((self.student_id >= 0).sum())

    def teacher_id(self) -> np.ndarray:
        """[V_student] int32: the inverse of `student_id`; -1 for tokens outside the loss support."""
        teacher_id = np.full(len(self.student.token_bytes), -1, np.int32)
        if self.config.signal.kind == "topk":
            known = np.flatnonzero(self.student_id >= 0)
            teacher_id[self.student_id[known]] = known
        return teacher_id

    def student_facts(self) -> dict[str, Any]:
        """What plan and manifest say of the student's tokenizer; `vocab_size` bounds every id, the mask's included."""
        return {
            **self.student.fingerprint, "vocab_size": max(len(self.student.token_bytes), self.student.mask_id + 1),
            "mask_id": self.student.mask_id, "eos_id": self.student.eos_id,
        }  # fmt: skip

    def teacher_facts(self) -> dict[str, Any] | None:
        """The same for the teacher, with its spec, its config.json, its commit on the hub, and what aligns the two."""
        if self.teacher is None or self.spec is None or self.teacher_folder is None:
            return None
        spec = {
            "architecture": self.spec.architecture, "vocab_size": self.spec.vocab_size,
            "mask_id": self.spec.mask_id, "eos_id": self.spec.eos_id, "block_size": self.spec.block_size,
            "attention": self.config.teacher.attention, "causal": self.spec.attention.causal,
            "logit_shift": self.spec.logit_shift,
            "drop_ids": list(self.spec.drop_ids),
        }  # fmt: skip
        return {
            **self.teacher.fingerprint, "spec": spec, "revision": snapshot_revision(self.teacher_folder),
            "config": hashlib.sha256((self.teacher_folder / "config.json").read_bytes()).hexdigest(),
            **({"alignment": self.tokenkit} if self.tokenkit else {}),
        }  # fmt: skip


class UnwrittenFields:
    """Which fields of messages no chat template writes, source by source: found by rendering without them.

    Templates treat roles differently, so a field is tried role by role. It counts as written once it changed a text;
    until then, it is tried in a few of the conversations that have it. What a template must not leave out (calls,
    reasoning before the answer) drops the sample (`TextEncoder.render`).
    """

    def __init__(self, pairing: Pairing) -> None:
        self._sides = {"student": pairing.student}
        if pairing.teacher is not None and pairing.config.teacher.see == "own":
            self._sides["teacher"] = pairing.teacher
        self._tried: dict[str, Counter[tuple[str, str, str]]] = {}

    def look(self, source: str, conversation: Conversation) -> None:
        """Try the fields of a conversation's messages that are still in doubt."""
        fields = {(m.role, name) for m in conversation.messages for name in m.more if not _ID.fullmatch(name)}
        if not fields:
            return
        tried = self._tried.setdefault(source, Counter())
        for side, encoder in self._sides.items():
            for role, name in fields:
                key = side, name, role
                if 0 <= tried[key] < MAX_TRIES:
                    tried[key] = WRITTEN if _writes(encoder, conversation, role, name) else tried[key] + 1

    def sentences(self) -> list[str]:
        """What is left unwritten, a sentence for each source and the sides that leave it."""
        lines = []
        for source, tried in self._tried.items():
            found: dict[tuple[str, ...], list[str]] = {}
            for name, role in sorted({(name, role) for _, name, role in tried}):
                silent = tuple(side for side in self._sides if tried[side, name, role] != WRITTEN)
                found.setdefault(silent, []).append(f"{name} ({role})")
            for silent, names in found.items():
                which = "no chat template writes"
                if len(silent) < len(self._sides):
                    which = f"the {''.join(silent)}'s chat template does not write"
                if silent:
                    lines.append(
                        f"source {source}: {which} these fields of messages: {some(names)}; if answers depend on them, "
                        "write them into the content"
                    )
        return lines


def _writes(encoder: TextEncoder, conversation: Conversation, role: str, name: str) -> bool:
    """Does a field of the messages of a role change what the template makes of them?"""
    turns = [message.to_json() for message in conversation.messages]
    without = [{k: v for k, v in turn.items() if k != name or turn["role"] != role} for turn in turns]
    try:
        return encoder.render(turns, conversation.tools).text != encoder.render(without, conversation.tools).text
    except Dropped:
        return True  # it cannot do without


def open_pairing(config: RunConfig, *, teacher_revision: str | None = None) -> Pairing:
    """Load both tokenizers and the teacher's config.json.

    Args: teacher_revision: the commit that a plan has pinned; None: `teacher.revision`.
    Raises: ConfigError, DataError: see `TextEncoder`, `load_tokenizer`, `teacher_spec`; top_k or tail_buckets
        beyond the support; data.alignment without effect. Unavailable: see `tokenkit_version`.
    """
    student = config.student
    if not (student.tokenizer or student.path):
        raise ConfigError("student.path is empty: give --student, a checkpoint folder or hub id (or student.tokenizer)")
    student_encoder, by_tokenkit = _open_student(config), config.data.alignment == "tokenkit"
    if by_tokenkit and (not config.teacher.path or config.teacher.see == "student"):
        why = "teacher.see = student" if config.teacher.path else "no teacher"
        raise ConfigError(f"data.alignment = tokenkit has no effect with {why}: nothing is aligned; leave it out")
    if not config.teacher.path:
        return Pairing(config, student_encoder, None, None, None)
    folder = local_folder(config.teacher.path, teacher_revision or config.teacher.revision, weights=False)
    teacher_encoder, spec = _open_teacher(config, folder)
    tokenkit = tokenkit_version() if by_tokenkit else None
    pairing = Pairing(config, student_encoder, teacher_encoder, spec, folder, tokenkit)
    if config.signal.kind == "topk" and config.signal.top_k > pairing.num_support:
        raise ConfigError(
            f"signal.top_k = {config.signal.top_k}: expected at most the {pairing.num_support} tokens of the loss "
            f"support (student vocabulary: {len(student_encoder.token_bytes)} tokens); use a smaller k"
        )
    cuts = config.signal.tail_buckets
    if config.signal.kind == "topk" and cuts and cuts[-1] >= len(student_encoder.token_bytes):
        raise ConfigError(
            f"signal.tail_buckets = {cuts}: expected ids below the student's {len(student_encoder.token_bytes)} tokens"
        )
    return pairing


def _open_student(config: RunConfig) -> TextEncoder:
    """The student's side; its mask may be a new token, which training is about to teach it."""
    student = config.student
    tokenizer = load_tokenizer(student.tokenizer or student.path, student.revision)
    folder = local_folder(student.path, student.revision, weights=False) if student.path else Path()
    described = read_config(folder) if (folder / "config.json").is_file() else {}
    where = student.path or str(student.tokenizer)
    mask_token, mask_id = student_mask(tokenizer, described, student.mask_token, where)
    encoder = TextEncoder(
        tokenizer, block_size=student.block_size, max_length=config.data.max_length, mask_token=mask_token,
        mask_id=mask_id, eos_token=student.eos_token, template=student.template,
    )  # fmt: skip
    rows = described.get("vocab_size")
    # A tokenizer that is larger by itself belongs to weights that are elsewhere: training compares the two.
    if type(rows) is int and len(tokenizer) <= rows <= encoder.mask_id:
        raise ConfigError(
            f"{where}: its tokenizer has no mask token, one that is added gets id {encoder.mask_id}, and the model has "
            f"embeddings for {rows} tokens; make a student with room for it: tide convert {where} --out NEW"
        )
    if mask_token is not None and student.mask_token is None:
        warnings.warn(
            f"{where} publishes no mask token: {mask_token} is added as id {encoder.mask_id}, which the model has "
            "never seen; training will teach it (tide convert makes a student that names its mask)", stacklevel=2,
        )  # fmt: skip
    return encoder


def _open_teacher(config: RunConfig, folder: Path) -> tuple[TextEncoder, TeacherSpec]:
    teacher, where = config.teacher, str(folder)
    described = read_config(folder)
    block_size = teacher_block_size(
        described, run_block_size=config.student.block_size, attention=teacher.attention, where=where
    )
    tokenizer = load_tokenizer(teacher.tokenizer or where, teacher.revision if teacher.tokenizer else None)
    if not teacher.diffusion:
        require_diffusion(described, where, has_mask=tokenizer.mask_token_id is not None)
    mask_id = _teacher_mask(teacher, tokenizer, described, where)
    encoder = TextEncoder(
        tokenizer, block_size=block_size or 1, max_length=config.data.teacher_max_length or config.data.max_length,
        eos_token=teacher.eos_token, template=teacher.template, mask_id=mask_id,
    )  # fmt: skip
    require_published_ids(
        described, where, mask_id=None, eos_id=None if teacher.eos_token else encoder.eos_id,
        pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    known = (tokenizer.backend_tokenizer.token_to_id(token) for token in family_of(described, where).drop_tokens)
    spec = teacher_spec(
        described, mask_id=encoder.mask_id, eos_id=encoder.eos_id, block_size=block_size, attention=teacher.attention,
        where=where, drop_ids=tuple(token_id for token_id in known if token_id is not None),
    )  # fmt: skip
    if len(encoder.token_bytes) > spec.vocab_size:
        raise DataError(
            f"{where}: the tokenizer has {len(encoder.token_bytes)} tokens, config.json a vocab_size of "
            f"{spec.vocab_size}; the tokenizer belongs to another model"
        )
    return encoder, spec


def _teacher_mask(teacher: TeacherConfig, tokenizer: Any, described: dict[str, Any], where: str) -> int | None:
    """The id that the teacher was trained to read as a mask: what its checkpoint publishes, in this order: config.json,
    the published id of its family, the tokenizer's mask token. A token is never added: it would be read untrained.

    Raises: ConfigError: `teacher.mask_token` is no token of the tokenizer, or another one than is published; two of the
        three disagree.
    """
    asked = teacher.mask_token
    of_family = published_mask_id(described, where)
    stated = described.get("mask_token_id")
    if asked is None:
        named = published_mask(tokenizer, described, where)
        if stated is None:
            require_published_ids(described, where, mask_id=named, eos_id=None, pad_id=None)
        return of_family if stated is None and of_family is not None else named
    found = tokenizer.backend_tokenizer.token_to_id(asked)
    published = of_family if stated is None else stated
    if published is None and found is None:
        published = tokenizer.mask_token_id
    name = None if published is None else tokenizer.backend_tokenizer.id_to_token(published)
    remedy = "leave teacher.mask_token out" if published is not None else "name the token that it was trained with"
    publishes = (
        "" if published is None else f"; the checkpoint publishes id {published} ({name or 'not a token of text'})"
    )
    if found is None:
        raise ConfigError(
            f"teacher.mask_token = {asked!r}: the tokenizer of {where} has no such token, and a new one would be read "
            f"by an embedding that was never trained{publishes}: {remedy}"
        )
    if published is not None and found != published:
        raise ConfigError(f"teacher.mask_token = {asked!r} has id {found} in {where}{publishes}: {remedy}")
    return found
