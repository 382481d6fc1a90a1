"""The preview shows what the shards say, and nothing that reads a cache depends on it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from tide.shared.cache import decoded_views, open_cache, verify_cache
from tide.shared.cache.decoded_views import PREVIEW_NAME, preview_bytes


def rows_of(data: bytes) -> list[dict]:
    return pq.read_table(io.BytesIO(data)).to_pylist()


def test_a_preview_says_what_the_rows_say(make_cache):
    cache = open_cache(make_cache("topk"))
    words = cache.vocabulary()
    shown = rows_of(preview_bytes(cache))
    assert [(row["sample_id"], row["view"]) for row in shown] == [(row.sample_id, row.view) for row in cache]
    compared = 0
    for row, view in zip(shown, cache, strict=True):
        assert row["t"] == pytest.approx(view.t)
        assert row["masked_share"] == pytest.approx(view.masked.mean() if len(view.masked) else 0)
        assert row["response"].count("⟦") == row["response"].count("⟧") <= len(view.chunk_start)
        starts = np.concatenate([[0], np.cumsum(view.num_top)])
        for says in row["teacher"]:
            target = int(np.flatnonzero(view.target_position == says["position"])[0])
            kept = slice(starts[target], starts[target] + min(5, view.num_top[target]))
            assert [t["probability"] for t in says["top"]] == pytest.approx(np.exp(view.top_logp[kept]), rel=1e-6)
            assert len(says["top"]) <= 5
            letters = [words.decode([i]) for i in view.top_ids[kept]]
            plain = [(a, b["token"]) for a, b in zip(letters, says["top"], strict=True) if a.isalnum() and a.isascii()]
            assert all(a == b for a, b in plain)
            compared += len(plain)
    assert compared > 20


def test_a_preview_is_small_spread_over_the_shards_and_the_same_every_time(make_cache, monkeypatch):
    monkeypatch.setattr(decoded_views, "MAX_PREVIEW_ROWS", 6)
    monkeypatch.setattr(decoded_views, "MAX_PREVIEW_SHARDS", 2)
    cache = open_cache(make_cache("chunk", num_shards=3))
    data = preview_bytes(cache)
    assert data == preview_bytes(open_cache(cache.root))
    assert [row["sample_id"] for row in rows_of(data)] == ["s0-0"] * 3 + ["s2-0"] * 3


def test_clean_samples_have_a_preview_too(make_cache):
    shown = rows_of(preview_bytes(open_cache(make_cache("none"))))
    assert len(shown) == 30
    assert {len(row["teacher"]) for row in shown} == {0}
    assert any("⟨" in row["response"] for row in shown)


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_verification_neither_reads_nor_trusts_a_preview(make_cache, mode):
    root = make_cache("chunk")
    (root / "preview").mkdir()
    (root / PREVIEW_NAME).write_bytes(b"PAR1 but no Parquet")
    (root / "preview" / "link.parquet").symlink_to("/etc/passwd")
    verify_cache(root, mode=mode)
    assert rows_of(preview_bytes(open_cache(root)))
