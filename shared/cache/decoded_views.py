"""Some views of a cache as text: what was masked, which chunks the teacher judged, and what it would have said.

Views come from the first row group, decoded through vocabulary.parquet and checked for meaning like any other. All text
is inert (shown_text.py): it cannot act in a terminal. HTML needs escaping on top.

preview/views.parquet holds some of them for people and the Hub's viewer. No reader of the cache opens it, the manifest
does not vouch for it, and no check depends on it: it says nothing that the shards do not say. One row per view:

    sample_id string, view int32, t float32, masked_share float32 (of the response)
    prompt string                  its end, if it is long
    response string                chunks the teacher was asked about stand in ⟦ ⟧, other masked tokens in ⟨ ⟩; at the
                                   end of a long one, how many tokens are not shown
    teacher list<struct<position int32, token string, probability float32,
                        top list<struct<token string, probability float32>>>>     a few positions; up to 5 tokens each
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..shown_text import terminal_text
from .batch import RowBatch
from .checks import check_batch
from .reader import Cache
from .schema import ViewRow

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

PREVIEW_NAME = "preview/views.parquet"
MAX_PREVIEW_ROWS = 200
MAX_PREVIEW_SHARDS = 8
"""Row groups are read from this many shards at most, spread over the cache."""
MARKS = {"chunk": "⟦⟧", "masked": "⟨⟩"}

_TOKEN = [pa.field("token", pa.string()), pa.field("probability", pa.float32())]
_PREVIEW_SCHEMA = pa.schema([
    pa.field("sample_id", pa.string()), pa.field("view", pa.int32()), pa.field("t", pa.float32()),
    pa.field("masked_share", pa.float32()), pa.field("prompt", pa.string()), pa.field("response", pa.string()),
    pa.field("teacher", pa.list_(pa.struct([
        pa.field("position", pa.int32()), *_TOKEN, pa.field("top", pa.list_(pa.struct(_TOKEN))),
    ]))),
])  # fmt: skip


def sample_view(cache: Cache) -> dict[str, Any] | None:
    """One view with the teacher's answers at a few positions; None for a cache without rows.

    Returns: plain JSON: sample_id, view, t, tokens, prompt_tokens, masked_positions, padding, segments (kind: prompt,
        clean, chunk or masked; text; for a chunk its logp in nats), tokens_not_shown (before the padding, in no
        segment) and teacher (position, token, probability, top).
    Raises: CacheError: a damaged row group.
    """
    decoder = _Decoder(cache)
    return decoder.described(decoder.nearest(NEATEST_T)) if decoder.batch else None


def spread_views(cache: Cache) -> list[dict[str, Any]]:
    """Views from little to nearly all masked, of different samples where there are any; [] for a cache without rows.

    Returns: as `sample_view`, but the teacher's answers stand in the segments: `teacher` is the list of all targets
        that a masked segment holds, and `tokens` its number of student tokens.
    Raises: CacheError: a damaged row group.
    """
    decoder = _Decoder(cache)
    views: dict[tuple[str, int], dict[str, Any]] = {}
    for t in SPREAD_T if decoder.batch else ():
        row = decoder.nearest(t, without=views.keys())
        if (row.sample_id, row.view) in views:
            break  # no other view has as much to show
        view, places = decoder.view(row)
        for segment, place in zip(view["segments"], places, strict=True):
            inside = range(*np.searchsorted(row.target_position, [place.start, place.stop]).tolist())
            segment |= {"tokens": len(place), "teacher": [decoder.says(row, target) for target in inside]}
        views[row.sample_id, row.view] = view
    return list(views.values())


def preview_bytes(cache: Cache) -> bytes:
    """The file's content: at most `MAX_PREVIEW_ROWS` views from a few shards; the same for the same cache.

    Raises: CacheError: a shard is damaged.
    """
    num_shards, rows = len(cache.manifest.shards), []
    chosen = np.unique(np.linspace(0, num_shards - 1, min(num_shards, MAX_PREVIEW_SHARDS)).round().astype(int))
    for decoder in (_Decoder(cache, int(shard)) for shard in chosen):
        for view in map(decoder.described, islice(decoder.batch or (), -(-MAX_PREVIEW_ROWS // len(chosen)))):
            texts = {"prompt": "", "response": ""}
            for segment in view["segments"]:
                opening, closing = MARKS.get(segment["kind"], ("", ""))
                side = "prompt" if segment["kind"] == "prompt" else "response"
                texts[side] += opening + segment["text"] + closing
            if view["tokens_not_shown"]:
                texts["response"] += f" … ({view['tokens_not_shown']:,} more tokens are not shown)"
            response_tokens = view["tokens"] - view["prompt_tokens"]
            share = view["masked_positions"] / response_tokens if response_tokens else 0.0
            rows.append({**{k: view[k] for k in ("sample_id", "view", "t", "teacher")}, "masked_share": share, **texts})
    table, sink = pa.Table.from_pylist(rows, schema=_PREVIEW_SCHEMA), pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, write_page_index=True)
    return sink.getvalue().to_pybytes()


class _Decoder:
    """The first row group of a cache, or of one of its shards, and the words of its vocabulary."""

    def __init__(self, cache: Cache, shard: int | None = None) -> None:
        self.batch: RowBatch | None = None
        self.eos_id = cache.manifest.student.eos_id
        self.token_bytes = cache.vocabulary().token_bytes if cache.manifest.vocabulary else []
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
        targets = int(np.searchsorted(row.target_position, self._padding_start(row)))
        spread = np.unique(np.linspace(0, targets - 1, NUM_SHOWN_POSITIONS).round().astype(int)) if targets else []
        return {**self.view(row)[0], "teacher": [self.says(row, int(target)) for target in spread]}

    def _padding_start(self, row: ViewRow) -> int:
        """Where the trailing run of EOS tokens starts, its first one (the answer's own end) excluded."""
        words = np.flatnonzero(row.x_0[row.prompt_tokens :] != self.eos_id)
        end = row.prompt_tokens + (int(words[-1]) + 1 if len(words) else 0)
        return min(end + 1, len(row.x_0))

    def view(self, row: ViewRow) -> tuple[dict[str, Any], list[range]]:
        """The view without the teacher's answers, and the positions of each of its segments.

        Segments are x_0 up to its padding in pieces of one kind: prompt, clean, chunk (masked, with its
        log-probability), masked (outside chunks). That the beginning of a prompt is left out, … says in it.
        """
        padding_start = self._padding_start(row)
        label = np.full(len(row.x_0), -2)  # -3 prompt, -2 clean, -1 masked outside chunks, >= 0 number of a chunk
        label[: row.prompt_tokens] = -3
        label[row.prompt_tokens :][row.masked] = -1
        for number, (start, length) in enumerate(zip(row.chunk_start, row.chunk_len, strict=True)):
            label[start : start + length] = number
        kinds = {-3: "prompt", -2: "clean", -1: "masked"}
        # A stranger's tokens may be empty and a row of theirs very long: tokens are bounded too, without a list of all.
        label = label[: min(padding_start, row.prompt_tokens + MAX_TEXT_CHARS)]
        edges = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(label)]
        segments, places, room, shown_end = [], [], MAX_TEXT_CHARS, 0
        for first, end in pairwise(edges) if len(label) else ():
            value = int(label[first])
            # The end of a prompt says most about the answer.
            shown = slice(max(first, end - MAX_TEXT_CHARS), end) if value == -3 else slice(first, end)
            text = self.text(row.x_0[shown])
            if value == -3 and (len(text) > MAX_TEXT_CHARS // 2 or shown.start > first):
                text = "…" + text[-MAX_TEXT_CHARS // 2 :]
            segment: dict[str, Any] = {"kind": kinds.get(value, "chunk"), "text": terminal_text(text, max_chars=room)}
            if value >= 0:
                segment["logp"] = float(row.chunk_logp[value])
            segments.append(segment)
            places.append(range(first, end))
            shown_end = end
            if len(text) > room:
                ends = np.cumsum([len(self.text([token])) for token in row.x_0[first:end].tolist()])
                shown_end = first + int(np.searchsorted(ends, room - 1, side="right"))
            room -= len(segment["text"])
            if room <= 0:
                break
        masked_padding = int(row.masked[padding_start - row.prompt_tokens :].sum())
        return {
            "sample_id": _inert(row.sample_id), "view": row.view, "t": row.t, "tokens": len(row.x_0),
            "prompt_tokens": row.prompt_tokens, "masked_positions": int(row.masked.sum()),
            "padding": {"tokens": len(row.x_0) - padding_start, "masked": masked_padding}, "segments": segments,
            "tokens_not_shown": padding_start - shown_end,
        }, places  # fmt: skip

    def says(self, row: ViewRow, target: int) -> dict[str, Any]:
        """Probability of the clean token at a target, and the teacher's top tokens there."""
        start = int(row.num_top[:target].sum())
        kept = slice(start, start + min(int(row.num_top[target]), NUM_SHOWN_TOKENS))
        position = int(row.target_position[target])
        return {
            "position": position,
            "token": self.token(int(row.x_0[position])),
            "probability": float(np.exp(row.gold_logp[target])),
            "top": [
                {"token": self.token(int(token)), "probability": float(np.exp(logp))}
                for token, logp in zip(row.top_ids[kept], row.top_logp[kept], strict=True)
            ],
        }

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Student ids as inert text; those that the vocabulary does not hold appear as <id>."""
        known = len(self.token_bytes)
        words = [self.token_bytes[token] if token < known else b"<%d>" % token for token in map(int, ids)]
        raw = b"".join(w if len(w) <= MAX_TOKEN_BYTES else w[:MAX_TOKEN_BYTES] + "…".encode() for w in words)
        return _inert(raw.decode("utf-8", "replace"))

    def token(self, token_id: int) -> str:
        """One id; the end of a long word is … in place of the rest."""
        text = self.text([token_id])
        return text if len(text) <= MAX_TOKEN_CHARS else text[: MAX_TOKEN_CHARS - 1] + "…"


def _inert(text: str) -> str:
    """terminal_text, and no line breaks but the newline."""
    return terminal_text(text.replace("\u2028", "\n").replace("\u2029", "\n"))
