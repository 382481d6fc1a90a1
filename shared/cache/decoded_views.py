"""Some views of a cache as text: what was masked, which chunks the teacher judged, and what it would have said.

Views come from the first row group, decoded through vocabulary.parquet and checked for meaning like any other. All text
is inert (shown_text.py): it cannot act in a terminal. HTML needs escaping on top.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any

import numpy as np

from ..shown_text import terminal_text
from .batch import RowBatch
from .checks import check_batch
from .reader import Cache
from .schema import ViewRow
from .vocabulary import Vocabulary

MAX_TEXT_CHARS = 2000
"""Characters, and tokens, of the decoded text that are shown."""
MAX_TOKEN_BYTES = 256
MAX_TOKEN_CHARS = 40
NUM_SHOWN_POSITIONS = 8
NUM_SHOWN_TOKENS = 5
NEATEST_T = 0.4
"""The sample is the view whose t is closest to this: enough masked, enough left to read."""
SPREAD_T = (0.15, 0.4, 0.65, 0.9)
"""Several views are those whose t are closest to these: from little to nearly all masked."""


def sample_view(cache: Cache) -> dict[str, Any] | None:
    """One view with the teacher's answers at a few positions; None for a cache without rows.

    Returns: plain JSON: sample_id, view, t, tokens, prompt_tokens, masked_positions, padding, segments (kind: prompt,
        clean, chunk or masked; text; for a chunk its logp in nats), tokens_not_shown (before the padding, in no
        segment) and teacher (position, token, probability, top).
    Raises: CacheError: a damaged row group.
    """
    decoder = _Decoder(cache)
    if decoder.batch is None:
        return None
    return decoder.described(decoder.nearest(NEATEST_T))


def first_views(cache: Cache, shard: int, limit: int) -> Iterator[dict[str, Any]]:
    """At most `limit` views of a shard's first row group, in order; each as `sample_view`.

    Raises: CacheError: a damaged row group.
    """
    decoder = _Decoder(cache, shard)
    batch = decoder.batch
    for number in range(min(limit, len(batch)) if batch is not None else 0):
        assert batch is not None
        yield decoder.described(batch[number])


def spread_views(cache: Cache) -> list[dict[str, Any]]:
    """Views from little to nearly all masked, of different samples where there are any; [] for a cache without rows.

    Returns: as `sample_view`, but the teacher's answers stand in the segments: `teacher` is the list of all targets
        that a masked segment holds, and `tokens` its number of student tokens.
    Raises: CacheError: a damaged row group.
    """
    decoder = _Decoder(cache)
    views, taken = [], set()
    for t in SPREAD_T if decoder.batch is not None else ():
        row = decoder.nearest(t, without=taken)
        if (row.sample_id, row.view) in taken:
            break  # no other view has as much to show
        taken.add((row.sample_id, row.view))
        segments, found = [], decoder.segments(row)
        not_shown = decoder.not_shown(row, found)
        for segment in found:
            del segment["end"]
            first, last = segment.pop("positions")
            inside = range(*np.searchsorted(row.target_position, [first, last + 1]).tolist())
            segments.append({**segment, "tokens": last + 1 - first, "teacher": [decoder.says(row, i) for i in inside]})
        views.append({**decoder.summary(row), "segments": segments, "tokens_not_shown": not_shown})
    return views


class _Decoder:
    """The first row group of a cache, or of one of its shards, and the words of its vocabulary."""

    def __init__(self, cache: Cache, shard: int | None = None) -> None:
        self.batch: RowBatch | None = None
        self.eos_id = cache.manifest.student.eos_id
        self.words = _Words(cache.vocabulary() if cache.manifest.vocabulary else None)
        # By the manifest: to look for row groups would fetch every shard of a remote cache.
        shards = (n for n, entry in enumerate(cache.manifest.shards) if entry.rows and shard in (None, n))
        first = next(shards, None)
        if first is not None:
            self.batch = cache.read_row_group(first, 0)
            check_batch(self.batch, cache.layout)

    def nearest(self, t: float, *, without: AbstractSet[tuple[str, int]] = frozenset()) -> ViewRow:
        """The view closest to `t`: of those that have something to show, of samples that `without` does not name."""
        batch = self.batch
        assert batch is not None
        informative = np.minimum(batch.counts.get("num_targets", batch.counts["num_masked"]), 2)
        samples = {sample for sample, _ in without}
        places = zip(batch.sample_id, batch.view.tolist(), strict=True)
        repeated = np.array([2 if place in without else int(place[0] in samples) for place in places])
        return batch[int(np.lexsort((np.abs(batch.t - t), repeated, -informative))[0])]

    def described(self, row: ViewRow) -> dict[str, Any]:
        """The view, and the teacher's answers at a few positions spread over it."""
        targets = int(np.searchsorted(row.target_position, self.padding_start(row)))
        spread = np.unique(np.linspace(0, targets - 1, NUM_SHOWN_POSITIONS).round().astype(int)) if targets else []
        found = self.segments(row)
        segments = [{k: v for k, v in s.items() if k not in ("positions", "end")} for s in found]
        return {
            **self.summary(row), "segments": segments, "tokens_not_shown": self.not_shown(row, found),
            "teacher": [self.says(row, int(i)) for i in spread],
        }  # fmt: skip

    def not_shown(self, row: ViewRow, segments: Sequence[dict[str, Any]]) -> int:
        """Tokens before the padding that no segment shows; that the beginning of a prompt is left out, … says in it."""
        return self.padding_start(row) - (segments[-1]["end"] if segments else 0)

    def padding_start(self, row: ViewRow) -> int:
        """Where the trailing run of EOS tokens starts, its first one (the answer's own end) excluded."""
        words = np.flatnonzero(row.x_0[row.prompt_tokens :] != self.eos_id)
        end = row.prompt_tokens + (int(words[-1]) + 1 if len(words) else 0)
        return min(end + 1, len(row.x_0))

    def summary(self, row: ViewRow) -> dict[str, Any]:
        """Which view this is, and its sizes."""
        end = self.padding_start(row)
        return {
            "sample_id": _inert(row.sample_id),
            "view": row.view,
            "t": row.t,
            "tokens": len(row.x_0),
            "prompt_tokens": row.prompt_tokens,
            "masked_positions": int(row.masked.sum()),
            "padding": {"tokens": len(row.x_0) - end, "masked": int(row.masked[end - row.prompt_tokens :].sum())},
        }

    def segments(self, row: ViewRow) -> list[dict[str, Any]]:
        """x_0 up to its padding in pieces of one kind, each with its first and last position, and the `end` of what
        its text shows.

        Kinds: prompt, clean, chunk (masked, with its log-probability), masked (outside chunks).
        """
        label = np.full(len(row.x_0), -2)  # -3 prompt, -2 clean, -1 masked outside chunks, >= 0 number of a chunk
        label[: row.prompt_tokens] = -3
        label[row.prompt_tokens :][row.masked] = -1
        for number, (start, length) in enumerate(zip(row.chunk_start, row.chunk_len, strict=True)):
            label[start : start + length] = number
        kinds = {-3: "prompt", -2: "clean", -1: "masked"}
        # A stranger's tokens may be empty and a row of theirs very long: tokens are bounded too, without a list of all.
        label = label[: min(self.padding_start(row), row.prompt_tokens + MAX_TEXT_CHARS)]
        edges = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(label)]
        segments, room = [], MAX_TEXT_CHARS
        for first, end in pairwise(edges) if len(label) else ():
            value = int(label[first])
            # The end of a prompt says most about the answer.
            shown = slice(max(first, end - MAX_TEXT_CHARS), end) if value == -3 else slice(first, end)
            text = self.words.text(row.x_0[shown])
            if value == -3 and (len(text) > MAX_TEXT_CHARS // 2 or shown.start > first):
                text = "…" + text[-MAX_TEXT_CHARS // 2 :]
            segment: dict[str, Any] = {"kind": kinds.get(value, "chunk"), "text": terminal_text(text, max_chars=room)}
            if value >= 0:
                segment["logp"] = float(row.chunk_logp[value])
            shown_end = end if len(text) <= room else first + self._num_within(row.x_0[first:end], room - 1)
            segments.append({**segment, "positions": (first, end - 1), "end": shown_end})
            room -= len(segment["text"])
            if room <= 0:
                break
        return segments

    def _num_within(self, ids: np.ndarray, num_chars: int) -> int:
        """How many of the first tokens fit into so many characters."""
        ends = np.cumsum([len(self.words.text([token])) for token in ids.tolist()])
        return int(np.searchsorted(ends, num_chars, side="right"))

    def says(self, row: ViewRow, target: int) -> dict[str, Any]:
        """Probability of the clean token at a target, and the teacher's top tokens there."""
        start = int(row.num_top[:target].sum())
        kept = slice(start, start + min(int(row.num_top[target]), NUM_SHOWN_TOKENS))
        position = int(row.target_position[target])
        return {
            "position": position,
            "token": self.words.token(int(row.x_0[position])),
            "probability": float(np.exp(row.gold_logp[target])),
            "top": [
                {"token": self.words.token(int(token)), "probability": float(np.exp(logp))}
                for token, logp in zip(row.top_ids[kept], row.top_logp[kept], strict=True)
            ],
        }


class _Words:
    """Student ids -> inert text."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.token_bytes = vocabulary.token_bytes if vocabulary else []

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids that the vocabulary does not hold appear as <id>."""
        known = len(self.token_bytes)
        raw = b"".join(_short_bytes(self.token_bytes[i]) if i < known else b"<%d>" % i for i in map(int, ids))
        return _inert(raw.decode("utf-8", "replace"))

    def token(self, token_id: int) -> str:
        """One id; the end of a long word is … in place of the rest."""
        text = self.text([token_id])
        return text if len(text) <= MAX_TOKEN_CHARS else text[: MAX_TOKEN_CHARS - 1] + "…"


def _short_bytes(token: bytes) -> bytes:
    return token if len(token) <= MAX_TOKEN_BYTES else token[:MAX_TOKEN_BYTES] + "…".encode()


def _inert(text: str) -> str:
    """terminal_text, and no line breaks but the newline."""
    return terminal_text(text.replace("\u2028", "\n").replace("\u2029", "\n"))
