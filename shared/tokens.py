"""Conversations -> clean token ids x_0, prompt lengths and, for a teacher and a student, aligned chunks.

messages -> chat template -> text -> x_0 (EOS-padded to a block multiple) on each side; `pair` adds the chunks between
both. Everything is found by position: the prompt is a prefix of the rendered text, the answer is where a sentinel put
in its place comes out, and tokens are located by the bytes they spell. Searching for the answer's text instead would
align a short answer ("yes") to its first occurrence in the prompt.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from .bounded import Bounded, Refused
from .chunks import Align, align_stretches
from .errors import ConfigError, DataError
from .token_bytes import ByteTable, TokenPlaces, byte_table, student_ids_of_teacher, tokenizer_label
from .tokenizer_setup import (
    find_eos,
    is_plain,
    load_tokenizer,
    published_mask,
    require_template,
    student_mask,
    tokenizer_fingerprint,
    with_mask,
)

__all__ = [
    "Dropped",
    "EncodedSample",
    "PairedSample",
    "Rendering",
    "TextEncoder",
    "load_tokenizer",
    "pair",
    "published_mask",
    "student_ids_of_teacher",
    "student_mask",
]

Messages = Sequence[Mapping[str, Any]]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which data sets keep what was thought before the answer."""
SENTINEL = "\ue000tide answer\ue001"
"""Stands for the answer in a probe of the chat template; private-use characters, so no data holds it."""


class Dropped(DataError):
    """A sample that cannot be used. `reason` is one of few fixed texts, to be counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Rendering:
    """A conversation up to its last assistant turn, as the chat template writes it."""

    text: str
    prompt_chars: int
    """Length of the part before the answer, generation prompt included."""
    content: tuple[int, int]
    """Character span of the answer, as far as it follows the prompt; the rest of `text` is the turn's end."""
    content_offset: int
    """Characters of the message's content before the span (stripped by the template)."""


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """Clean tokens of one conversation on one side."""

    x_0: np.ndarray
    """int32 [l]: clean ids; l is a multiple of the block size, filled up with EOS, which are learnt."""
    prompt_tokens: int
    """Leading positions that are never masked."""
    content: tuple[int, int]
    """Token span of the alignable text: the tokens that lie wholly inside it."""
    gap_bytes: int
    """Bytes of that text before the span's first token, usually 0 (a token straddled the boundary)."""
    truncated: bool
    """Cut to exactly max_length tokens; no EOS was added."""
    exact_bytes: bool
    """The span's token bytes are the text's UTF-8. False: a normaliser changed some of it, which may have no chunks."""
    token_bytes: tuple[bytes, ...]
    """Bytes of the tokens in `content`."""
    cuts: np.ndarray
    """int32 [n, 3]: where tokens of `content` begin in the alignable text (see `TokenPlaces.cuts`)."""
    cut_tokens: int = 0
    """Tokens beyond max_length, which were cut off."""
    padding: int = 0
    """EOS at the end of x_0 that fill its last block."""


@dataclass(frozen=True, eq=False)
class PairedSample:
    """One conversation as both sides read it. Empty chunks: no loss but cross-entropy applies."""

    student: EncodedSample
    teacher: EncodedSample
    chunks: np.ndarray
    """int32 [c, 4]: teacher start, end, student start, end; positions in the two x_0."""


class TextEncoder:
    """One side's way from messages to tokens: tokenizer, chat template, block size, mask and EOS.

    Args:
        tokenizer: a fast tokenizer with a chat template. It is never changed; if a mask token has to be added, this
            happens in a copy, which is `self.tokenizer`.
        block_size: x_0 is filled up with EOS to a multiple of this.
        max_length: tokens a sample may have; a multiple of block_size.
        mask_token: token used as [MASK]; added behind the vocabulary if it is not part of it. None: `mask_id`, or else
            the tokenizer's mask token.
        eos_token: token that fills up the last block. None: the tokenizer's eos token.
        template: extra arguments of the chat template.
        mask_id: id used as [MASK]; may lie beyond the vocabulary.
    Raises:
        ConfigError: no mask or EOS token; a mask id that ordinary text uses; lengths that do not fit.
        DataError: no chat template, or one that a plain conversation cannot be rendered with.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        block_size: int,
        max_length: int,
        mask_token: str | None = None,
        eos_token: str | None = None,
        template: Mapping[str, Any] | None = None,
        mask_id: int | None = None,
    ) -> None:
        if block_size <= 0 or max_length <= 0 or max_length % block_size:
            raise ConfigError(f"max_length = {max_length}: expected a positive multiple of block_size = {block_size}")
        reserved = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message"} & set(template or {})
        if reserved:
            raise ConfigError(f"template sets {sorted(reserved)}: tide sets these itself; remove them")
        self.block_size = block_size
        self.max_length = max_length
        self.template = dict(template or {})
        self.tokenizer, self.mask_id = with_mask(tokenizer, mask_token, mask_id)
        self.eos_id = find_eos(self.tokenizer, eos_token)
        if self.eos_id == self.mask_id:
            raise ConfigError(
                f"{tokenizer_label(tokenizer)}: id {self.eos_id} is both EOS and mask; name another token for one"
            )
        require_template(self.tokenizer)
        label = tokenizer_label(tokenizer)
        write = partial(self.tokenizer.apply_chat_template, tokenize=False)
        self._render = Bounded(write, f"{label}: the chat template")
        # A tokenizer of another kind reads every text twice, first where it can do no harm.
        self._try = None if is_plain(self.tokenizer) else Bounded(_Reading(self.tokenizer), f"{label}: the tokenizer")
        self._turn_end = ""
        self._turn_end = self._find_turn_end()

    @cached_property
    def bytes_of(self) -> ByteTable:
        """The vocabulary's byte table."""
        return byte_table(self.tokenizer)

    @property
    def token_bytes(self) -> list[bytes]:
        """Bytes of every token, by id; an added token stands for its literal content."""
        return self.bytes_of.tokens

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 hex digests `tokenizer` and `chat_template` (see `tokenizer_fingerprint`)."""
        return tokenizer_fingerprint(self.tokenizer, self.mask_id)

    def encode(self, messages: Messages, tools: Sequence[Any] = ()) -> EncodedSample:
        """The last assistant turn with what precedes it; `content` covers the answer and the end of its turn.

        Args: tools: descriptions of functions that the assistant may call, for the template.
        Raises: Dropped: the sample cannot be used, with the reason.
        """
        rendering = self.render(messages, tools)
        return self.tokenize(rendering, (rendering.content[0], len(rendering.text)))

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation that awaits an answer, as the template writes it up to there.

        Raises: Dropped: the template refuses the conversation. ConfigError: it holds the mask token.
        """
        return self.encode_text(self._apply([dict(message) for message in messages], add_generation_prompt=True))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as it stands; names of special tokens in it count as those tokens.

        Raises: ConfigError: it holds the mask token, which no student has seen in a prompt. DataError: it is not
            Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a stray byte of an argument, or half of a pair, as JSON can hold it
            raise DataError(
                f"the prompt is not Unicode text at character {error.start}: half of a surrogate pair, or a byte that "
                "is not UTF-8, which no tokenizer can read; correct it"
            ) from None
        ids = self._read(text).ids
        if self.mask_id in ids:
            raise ConfigError("the prompt holds the student's mask token, which stands for what is not written yet")
        return ids

    def render(self, messages: Messages, tools: Sequence[Any] = ()) -> Rendering:
        """Write the conversation up to its last assistant turn and find the answer in it.

        Raises: Dropped: no answer, the template leaves out what the answer depends on (tools, calls, reasoning), or it
            does something with the answer that cannot be followed.
        """
        last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=None)
        if last is None:
            raise Dropped("no assistant turn")
        before, turn = [dict(message) for message in messages[:last]], dict(messages[last])
        answer = turn.get("content")
        if not before:
            raise Dropped("no prompt before the answer")
        if not isinstance(answer, str):
            raise Dropped("content is not text")
        if not answer.strip():
            raise Dropped("empty answer")
        given: dict[str, Any] = {"tools": list(tools)} if tools else {}
        text = self._apply([*before, turn], **given)
        prompt = self._apply(before, add_generation_prompt=True, **given)
        self._require_written([*before, turn], text, given)
        head, tail = prompt, self._turn_end
        if text != head + answer + tail:  # the usual case needs no third rendering
            probe = self._apply([*before, {**turn, "content": SENTINEL}], **given)
            head, found, tail = probe.partition(SENTINEL)
            if not found or SENTINEL in tail:
                raise Dropped("template rewrites the content")
        offset = _offset_in(answer, text, head, tail)
        if offset is None:
            raise Dropped("template rewrites the content")
        if not text.startswith(prompt):
            raise Dropped("prompt is not a prefix of the conversation")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold it
            raise Dropped("text is not valid Unicode") from error
        end = len(text) - len(tail)
        start = min(max(len(head), len(prompt)), end)
        return Rendering(text, len(prompt), (start, end), offset + start - len(head))

    def _require_written(self, messages: Messages, text: str, given: Mapping[str, Any]) -> None:
        """Does the template write what it was given beside roles and contents? Earlier turns may lose their reasoning.

        Raises: Dropped: it renders the same text without; names what it leaves out.
        """
        if given and self._apply(messages) == text:
            raise Dropped("template leaves out tools")
        if messages[0].get("role") == "system" and self._apply(messages[1:], **given) == text:
            raise Dropped("template leaves out the system prompt")
        for name in ("tool_calls", "function_call", *REASONING):
            holders = messages[-1:] if name in REASONING else messages
            if any(message.get(name) for message in holders):
                without = [{k: v for k, v in message.items() if k != name} for message in messages]
                if self._apply(without, **given) == text:
                    raise Dropped(f"template leaves out {name}")
        for word in (word for message in messages for word in _words(message.get("tool_calls"))):
            if word not in text and json.dumps(word)[1:-1] not in text:
                raise Dropped("template leaves out tool_calls")

    def tokenize(self, rendering: Rendering, alignable: tuple[int, int]) -> EncodedSample:
        """Tokenise a rendering; `alignable` is the character span that `content` shall describe.

        Raises: Dropped: the prompt leaves no room, or the text holds the mask token.
        """
        encoding = self._read(rendering.text)
        ids = encoding.ids
        places = TokenPlaces(rendering.text, encoding, self.bytes_of)
        prompt_tokens = places.first_from(rendering.prompt_chars)
        if prompt_tokens >= self.max_length:
            raise Dropped("prompt longer than max length")
        if prompt_tokens >= len(ids):
            raise Dropped("empty answer")
        start, end = alignable
        first = places.first_from(start)
        last = max(first, places.last_until(end))
        gap, exact = places.compare(alignable, first, last)
        truncated = len(ids) > self.max_length
        filler = 0 if truncated else -len(ids) % self.block_size
        x_0 = np.array(ids[: self.max_length] + [self.eos_id] * filler, dtype=np.int32)
        if (x_0 == self.mask_id).any():
            raise Dropped("contains the mask token")
        first, last = min(first, len(x_0)), min(last, len(x_0))
        spelt, cuts = tuple(places.spelt[first:last]), places.cuts(alignable, first, last, gap if exact else None)
        cut = max(0, len(ids) - self.max_length)
        return EncodedSample(x_0, prompt_tokens, (first, last), gap, truncated, exact, spelt, cuts, cut, filler)

    def write(self, messages: Messages, **options: Any) -> str:
        """What the template makes of messages, within limits of time, memory and length (bounded.py).

        Args: options: of `apply_chat_template`, beside those of the encoder.
        Raises: Refused: the template, or transformers, refuses them. DataError: a limit is exceeded.
        """
        return self._render(list(messages), **self.template, **options)

    def _apply(self, messages: Messages, **options: Any) -> str:
        try:
            return self.write(messages, **options)
        except Refused as error:
            raise Dropped("chat template refuses the conversation") from error

    def _read(self, text: str) -> Any:
        """The tokenizer's encoding of a text. Raises: DataError: it takes more time or memory than a text may."""
        if self._try is not None:
            try:
                self._try(text)
            except Refused as error:
                raise DataError(f"{tokenizer_label(self.tokenizer)} fails on a text: {error}") from error
        return _Reading(self.tokenizer).encoding(text)

    def _find_turn_end(self) -> str:
        """What follows the answer in a plain conversation. A template that fails on it would drop every sample."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            rendering = self.render(messages)
        except Dropped as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise DataError(
                f"{tokenizer_label(self.tokenizer)}: with the template arguments {self.template}, a conversation of "
                f"one question and one answer fails: {error.reason}{cause}. Expected the conversation to begin with "
                "the rendered prompt and to hold the answer once; fix the template or its arguments"
            ) from error
        return rendering.text[rendering.content[1] :]


@dataclass(frozen=True)
class _Reading:
    """A tokenizer as texts are read with it, names of special tokens included; called: "" if it can read the text."""

    tokenizer: Any

    def encoding(self, text: str) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # other users of the tokenizer leave their settings behind
        backend.no_padding()
        return backend.encode(text, add_special_tokens=False)

    def __call__(self, text: str) -> str:
        self.encoding(text)
        return ""


def _words(calls: Any) -> Iterator[str]:
    """Names and texts of tool calls, which a template that writes them writes as they are."""
    if isinstance(calls, str):
        with contextlib.suppress(ValueError):
            calls = json.loads(calls)
        if isinstance(calls, str):
            yield calls
            return
    if isinstance(calls, Mapping):
        for name, value in calls.items():
            if name not in ("id", "type", "index"):
                yield from _words(value)
    elif isinstance(calls, list | tuple):
        for value in calls:
            yield from _words(value)


def pair(
    student_encoder: TextEncoder, teacher_encoder: TextEncoder, messages: Messages, *,
    see: Literal["own", "student"], tools: Sequence[Any] = (), align: Align | None = None,
) -> PairedSample:  # fmt: skip
    """Encode one conversation for both sides and align the answers.

    Args:
        see: `own`: the teacher reads its own template and tokens; `student`: it reads the student's ids.
        align: see `align_stretches`; not asked where both sides hold the same tokens.
    Returns: chunks are positions of both x_0. If both sides hold the same tokens of the same text, every token of the
        response, EOS filling included, is a chunk of its own. Else the answers are aligned, with the end of the turn if
        it is written alike, as far as both tokenizers spell them alike: what one normaliser changed has no chunk.
    Raises:
        Dropped: one side cannot use the sample.
        DataError: see = "student", and a token of the sample means something else to the teacher.
    """
    if see == "student":
        sample = student_encoder.encode(messages, tools)
        _require_shared(sample.x_0, student_encoder, teacher_encoder)
        return PairedSample(sample, sample, _identity(sample, sample))
    renderings = student_encoder.render(messages, tools), teacher_encoder.render(messages, tools)
    spans = _alignable(*renderings)
    student = student_encoder.tokenize(renderings[0], spans[0])
    teacher = teacher_encoder.tokenize(renderings[1], spans[1])
    same_tokenizer = student_encoder.fingerprint["tokenizer"] == teacher_encoder.fingerprint["tokenizer"]
    if same_tokenizer and renderings[0].text == renderings[1].text:
        return PairedSample(student, teacher, _identity(student, teacher))
    chunks = align_stretches(teacher.token_bytes, student.token_bytes, teacher.cuts, student.cuts, align)
    starts = np.array([teacher.content[0], student.content[0]], dtype=np.int32)
    return PairedSample(student, teacher, chunks + np.repeat(starts, 2))


def _offset_in(answer: str, text: str, head: str, tail: str) -> int | None:
    """Where in `answer` the part of `text` between head and tail begins; None if that is not the answer, stripped."""
    if len(text) < len(head) + len(tail) or not (text.startswith(head) and text.endswith(tail)):
        return None
    written = text[len(head) : len(text) - len(tail)]
    offset = answer.find(written)
    if offset < 0 or answer[:offset].strip() or answer[offset + len(written) :].strip():
        return None
    return offset


def _alignable(student: Rendering, teacher: Rendering) -> tuple[tuple[int, int], tuple[int, int]]:
    """Character spans, student's and teacher's, of the longest text after the prompt that both sides share.

    It grows around the answer: by what both write alike between prompt and answer (reasoning), and by the turn's end.
    """
    sides = (student, teacher)
    starts = [side.content_offset for side in sides]
    ends = [side.content_offset + side.content[1] - side.content[0] for side in sides]
    low, high = max(starts), min(ends)
    suffixes = [side.text[side.content[1] :] for side in sides]
    more = len(suffixes[0]) if ends[0] == ends[1] and suffixes[0] == suffixes[1] else 0
    between = [side.text[side.prompt_chars : side.content[0]] if starts[0] == starts[1] else "" for side in sides]
    pairs = zip(reversed(between[0]), reversed(between[1]), strict=False)
    less = sum(1 for _ in takewhile(lambda chars: chars[0] == chars[1], pairs))
    spans = []
    for side, start in zip(sides, starts, strict=True):
        shift = side.content[0] - start
        spans.append((shift + low - less, max(shift + high + more, shift + low)))
    return spans[0], spans[1]


def _identity(student: EncodedSample, teacher: EncodedSample) -> np.ndarray:
    """One chunk per response position, as far as both x_0 agree."""
    length = min(len(student.x_0), len(teacher.x_0))
    different = np.flatnonzero(student.x_0[:length] != teacher.x_0[:length])
    end = int(different[0]) if len(different) else length
    positions = np.arange(max(student.prompt_tokens, teacher.prompt_tokens), end, dtype=np.int32)
    return np.stack([positions, positions + 1, positions, positions + 1], axis=1)


def _require_shared(ids: np.ndarray, student: TextEncoder, teacher: TextEncoder) -> None:
    if (ids == teacher.mask_id).any():
        raise Dropped("contains the mask token")
    if len(ids) > teacher.max_length:
        raise ConfigError(
            f"the teacher may read {teacher.max_length} tokens, the student's samples have up to {student.max_length}: "
            "with teacher.see = student, data.teacher_max_length must not be smaller than data.max_length"
        )
    for i in np.unique(ids).tolist():
        theirs = teacher.token_bytes[i] if i < len(teacher.token_bytes) else None
        if theirs != student.token_bytes[i]:
            raise DataError(
                f"teacher.see = student: id {i} is {student.token_bytes[i]!r} to the student's tokenizer and "
                f"{theirs!r} to the teacher's. Expected a shared vocabulary; use teacher.see = own"
            )
