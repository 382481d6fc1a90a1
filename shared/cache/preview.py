"""A cache -> preview/views.parquet: some views as text, with masked chunks marked and the teacher's first choices.

For people and the Hub's viewer. No reader of the cache opens it, the manifest does not vouch for it, and no check
depends on it: it says nothing that the shards do not say. One row per view:

    sample_id string, view int32, t float32, masked_share float32 (of the response)
    prompt string                  its end, if it is long
    response string                chunks the teacher was asked about stand in ⟦ ⟧, other masked tokens in ⟨ ⟩; at the
                                   end of a long one, how many tokens are not shown
    teacher list<struct<position int32, token string, probability float32,
                        top list<struct<token string, probability float32>>>>     a few positions; up to 5 tokens each
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .decoded_views import first_views
from .reader import Cache

PREVIEW_NAME = "preview/views.parquet"
MAX_PREVIEW_ROWS = 200
MAX_PREVIEW_SHARDS = 8
"""Row groups are read from this many shards at most, spread over the cache."""
MARKS = {"chunk": "⟦⟧", "masked": "⟨⟩"}

_TOKEN = [pa.field("token", pa.string()), pa.field("probability", pa.float32())]
_SCHEMA = pa.schema([
    pa.field("sample_id", pa.string()), pa.field("view", pa.int32()), pa.field("t", pa.float32()),
    pa.field("masked_share", pa.float32()), pa.field("prompt", pa.string()), pa.field("response", pa.string()),
    pa.field("teacher", pa.list_(pa.struct([
        pa.field("position", pa.int32()), *_TOKEN, pa.field("top", pa.list_(pa.struct(_TOKEN))),
    ]))),
])  # fmt: skip


def preview_bytes(cache: Cache) -> bytes:
    """The file's content: at most `MAX_PREVIEW_ROWS` views from a few shards; the same for the same cache.

    Raises: CacheError: a shard is damaged.
    """
    table = pa.Table.from_pylist(list(_rows(cache)), schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, write_page_index=True)
    return sink.getvalue().to_pybytes()


def _rows(cache: Cache) -> Iterator[dict[str, Any]]:
    num_shards = len(cache.manifest.shards)
    if not num_shards:
        return
    chosen = np.unique(np.linspace(0, num_shards - 1, min(num_shards, MAX_PREVIEW_SHARDS)).round().astype(int))
    quota = -(-MAX_PREVIEW_ROWS // len(chosen))
    for shard in map(int, chosen):
        for view in first_views(cache, shard, quota):
            yield _row(view)


def _row(view: dict[str, Any]) -> dict[str, Any]:
    prompt = "".join(s["text"] for s in view["segments"] if s["kind"] == "prompt")
    response = ""
    for segment in view["segments"]:
        if segment["kind"] != "prompt":
            opening, closing = MARKS.get(segment["kind"], ("", ""))
            response += opening + segment["text"] + closing
    if view["tokens_not_shown"]:
        response += f" … ({view['tokens_not_shown']:,} more tokens are not shown)"
    response_tokens = view["tokens"] - view["prompt_tokens"]
    return {
        "sample_id": view["sample_id"], "view": view["view"], "t": view["t"],
        "masked_share": view["masked_positions"] / response_tokens if response_tokens else 0.0,
        "prompt": prompt, "response": response, "teacher": view["teacher"],
    }  # fmt: skip
