"""The manifest and the receipts: strict, and true about the files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tide.shared.cache import Manifest, Receipt, open_cache, read_manifest, shard_is_done, write_manifest, write_receipt
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.receipts import read_receipt, receipt_path
from tide.shared.errors import CacheError, OutputError

SHARD = "data/views-00000-of-00002.parquet"


def tamper(root: Path, path: str, value: object) -> None:
    """Set (or with `...`, delete) the manifest's entry at a dotted path."""
    tree = json.loads((root / "manifest.json").read_text())
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = tree
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    (root / "manifest.json").write_bytes(sealed_json(tree))


def test_the_manifest_round_trips_and_its_hash_names_the_cache(make_cache):
    roots = [make_cache("topk", name="a"), make_cache("topk", name="b"), make_cache("topk", name="c", samples=6)]
    manifests = [read_manifest(root) for root in roots]
    assert Manifest.from_json(json.loads(json.dumps(manifests[0].to_json()))) == manifests[0]
    assert manifests[0].hash == manifests[1].hash != manifests[2].hash
    assert (roots[0] / "manifest.json").read_bytes() == (roots[1] / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version is 2, this tide reads 1"),
        ("schema_version", "1", "schema_version is '1'"),
        ("schema_version", True, "schema_version is True"),
        ("schema_version", ..., "schema_version is None"),
        ("plan_hash", ..., "plan_hash"),
        ("totals.rows", ..., "rows"),
        ("statistics.tokens", ..., "tokens"),
        ("statistics.t_histogram", [1, 2], r"statistics\.t_histogram"),
        ("signal.extra", 1, "extra"),
        ("surprise", 1, "surprise"),
        ("signal.kind", "logits", "kind = 'logits'"),
        ("signal.codec", "quantised", "expected one of plain, compact"),
        ("signal.temperatures", [], "at least one temperature"),
        ("signal.temperatures", ["1.0"], "temperatures"),
        ("signal.logp_dtype", "bfloat16", "logp_dtype"),
        ("block_size", 0, "block_size 0"),
        ("block_size", 8.5, "block_size"),
        ("student.vocab_size", -1, "expected a count"),
        ("student.vocab_size", 2**70, "expected a count"),
        ("student.mask_id", 300, "mask_id or eos_id is not below"),
        ("teacher", None, "without a teacher"),
        ("teacher.id", "\x1b[31mred", "cannot be printed"),
        ("noise.\x1b", 1, "cannot be printed"),
        ("shards.0.name", "../outside.parquet", r"shards\.0\.name"),
        ("shards.0.name", "/etc/passwd", r"shards\.0\.name"),
        ("shards.0.name", "data/views-00001-of-00002.parquet", r"shards\.0\.name"),
        ("shards.0.rows", 16, r"totals\.rows"),
        ("shards.0.bytes", "1", "bytes"),
        ("totals.masked_positions", 0, r"totals\.masked_positions"),
        ("totals.samples", 3, r"statistics\.samples"),
        ("dropped.too long", -1, "expected a count"),
        ("dropped.too long", "2", "expected (counts|int)"),
        ("vocabulary.bytes", None, "bytes"),
    ],
)
def test_a_tampered_manifest_is_refused(make_cache, path, value, message):
    root = make_cache("topk")
    tamper(root, path, value)
    with pytest.raises(CacheError, match=message) as caught:
        read_manifest(root)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    "change", [("apache-2.0", "apache-2.1"), ("org/teacher", "org/teachep"), ('"seed": 0', '"seed": 1')]
)
def test_a_manifest_with_another_word_or_number_is_refused(make_cache, change):
    path = make_cache("topk") / "manifest.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(
        CacheError, match=r"manifest\.json: sha256 is '[0-9a-f]{64}', which is not the hash of the other"
    ):
        read_manifest(path.parent)


def test_the_seal_of_a_manifest_is_its_hash(make_cache):
    root = make_cache("none")
    assert json.loads((root / "manifest.json").read_text())["sha256"] == read_manifest(root).hash


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "data/../../x", ".hidden", "a//b", "a\\b", "a\x00b", "ü"])
def test_names_that_could_leave_the_folder_are_refused(make_cache, name):
    root = make_cache("topk")
    tamper(root, "vocabulary.name", name)
    with pytest.raises(CacheError, match=r"expected 'vocabulary\.parquet'|cannot be printed"):
        open_cache(root)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 1}', b"[" * 100_000,
        b'{"schema_version": 1}', b"1" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CacheError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_manifest_too_large_is_refused_unread(make_cache, monkeypatch):
    root = make_cache("none")
    monkeypatch.setattr("tide.shared.cache.manifest.MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(CacheError, match="larger than 1,000 bytes"):
        read_manifest(root)
    with pytest.raises(CacheError, match="make larger shards"):
        write_manifest(root, read_manifest_unbounded(root, monkeypatch))


def read_manifest_unbounded(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tide.shared.cache.manifest.MAX_MANIFEST_BYTES", 1 << 20)
        return read_manifest(root)


def test_a_manifest_that_contradicts_itself_is_not_written(make_cache):
    root = make_cache("none")
    manifest = read_manifest(root)
    wrong = dataclasses.replace(manifest, totals=dataclasses.replace(manifest.totals, rows=1))
    before = (root / "manifest.json").read_bytes()
    with pytest.raises(CacheError, match=r"totals\.rows is 1, the rest of the manifest gives 30"):
        write_manifest(root, wrong)
    assert (root / "manifest.json").read_bytes() == before


def test_an_incomplete_cache_says_how_far_it_is(make_cache):
    root = make_cache("none")
    (root / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"cache is not a tide cache: it holds neither manifest.json nor plan.json"):
        open_cache(root)
    plan = {"samples": [[i, f"s{i}"] for i in range(25)], "settings": {"shards": {"samples_per_shard": 5}}}
    (root / "plan.json").write_text(json.dumps(plan))
    (root / "receipts" / "teacher.json").write_text("{}")
    with pytest.raises(CacheError, match="incomplete: 2 of 5 shards done; run the same dump-teacher command again"):
        open_cache(root)
    (root / SHARD).write_bytes(b"")
    with pytest.raises(CacheError, match="incomplete: 1 of 5 shards done"):
        open_cache(root)
    (root / "plan.json").write_text("[]")
    with pytest.raises(CacheError, match="1 of an unknown number of shards done"):
        open_cache(root)


def test_a_path_that_is_nothing_is_neither_folder_nor_hub_id():
    with pytest.raises(CacheError, match="no such folder"):
        open_cache("./nowhere/at/all")


def test_a_shard_is_done_when_receipt_and_file_agree(make_cache, synthetic):
    root, plan = make_cache("topk"), synthetic.PLAN_HASH
    receipt = shard_is_done(root, 0, plan)
    assert receipt is not None
    assert receipt == shard_is_done(root, 0, plan, full=True) == read_receipt(root, 0)
    assert receipt.statistics.rows == receipt.rows == 15
    assert shard_is_done(root, 0, "another plan") is None
    assert shard_is_done(root, 2, plan) is None
    data = bytearray((root / SHARD).read_bytes())
    data[50] ^= 1
    (root / SHARD).write_bytes(data)
    assert shard_is_done(root, 0, plan) is not None  # same size: only the hash can tell
    assert shard_is_done(root, 0, plan, full=True) is None
    (root / SHARD).write_bytes(data[:-1])
    assert shard_is_done(root, 0, plan) is None
    (root / SHARD).unlink()
    assert shard_is_done(root, 0, plan) is None


@pytest.mark.parametrize("edit", ["cut", "shard", "name", "statistics", "extra", "missing", "type"])
def test_a_damaged_receipt_means_not_done(make_cache, synthetic, edit):
    root = make_cache("topk")
    path = receipt_path(root, 0)
    tree = json.loads(path.read_text())
    changes = {
        "shard": {"shard": 1}, "name": {"name": "../x"}, "statistics": {"statistics": {}}, "extra": {"extra": 1},
        "type": {"rows": "15"},
    }  # fmt: skip
    tree |= changes.get(edit, {})
    if edit == "missing":
        del tree["sha256"]
    path.write_text(json.dumps(tree)[: 40 if edit == "cut" else None])
    assert shard_is_done(root, 0, synthetic.PLAN_HASH) is None


def test_a_receipt_needs_its_shard(tmp_path, make_cache):
    statistics = read_manifest(make_cache("none")).statistics
    with pytest.raises(CacheError, match="missing"):
        write_receipt(tmp_path, SHARD, shard=0, plan_hash="p", statistics=statistics)


def test_a_receipt_that_cannot_be_written_is_an_output_error(make_cache):
    root = make_cache("none")
    statistics = read_manifest(root).statistics
    for path in (root / "receipts").iterdir():
        path.unlink()
    (root / "receipts").rmdir()
    (root / "receipts").write_text("a file is in the way")
    with pytest.raises(OutputError, match=r"receipts/00000\.json: cannot be written"):
        write_receipt(root, SHARD, shard=0, plan_hash="p", statistics=statistics)


def test_statistics_add_up_and_describe_the_rows(make_cache):
    root = make_cache("topk", samples=12)
    manifest, rows = read_manifest(root), list(open_cache(root))
    total = manifest.statistics
    parts = [
        receipt.statistics for receipt in (read_receipt(root, n) for n in range(2)) if isinstance(receipt, Receipt)
    ]
    assert parts[0] + parts[1] == total
    assert total.rows == len(rows) == 72
    assert total.samples == 24
    assert total.tokens == sum(len(row.x_0) for row in rows)
    assert total.response_tokens == sum(len(row.masked) for row in rows)
    assert total.masked_positions == sum(int(row.masked.sum()) for row in rows)
    assert total.chunks == sum(len(row.chunk_start) for row in rows) == sum(total.chunk_len_counts)
    assert total.targets == sum(len(row.target_position) for row in rows) == sum(total.t_targets)
    assert total.kept_entries == sum(len(row.top_ids) for row in rows)
    assert total.kept_entries == sum(k * count for k, count in enumerate(total.num_top_counts))
    assert sum(total.t_histogram) == sum(total.mask_ratio_histogram) == len(rows)
    head = sum(float(np.exp(row.top_logp.astype(np.float64)).sum()) for row in rows)
    assert sum(total.t_head_mass) == pytest.approx(head, rel=1e-9)
    gold = sum(float(row.gold_logp.astype(np.float64).sum()) for row in rows)
    assert total.gold_logp == pytest.approx(gold, rel=1e-9)
    assert 0 < sum(total.column_bytes.values()) < manifest.totals.bytes


def test_entropy_and_bins_worked_by_hand(tmp_path, synthetic):
    import tide.shared.cache as cache

    half = np.log(0.5).astype(np.float32)
    rows = [
        cache.ViewRow(
            "s", view, t, np.zeros(8, np.int32), 6, np.array([True, False]),
            chunk_start=np.array([6]), chunk_len=np.array([1]), chunk_logp=np.array([half]),
            target_position=np.array([6]), num_top=np.array([num]),
            top_ids=np.arange(num), top_logp=np.full(num, half),
            log_tail=np.log(np.array([[max(1 - num / 2, 1e-9), 0.5 if num else 1.0]])),
        )
        for view, (t, num) in enumerate([(0.04, 1), (0.06, 2), (1.0, 0)])
    ]  # fmt: skip
    layout = synthetic.make_layout(logp_dtype="float32")
    statistics = cache.write_shard(tmp_path / "x.parquet", rows, layout, plan_hash="p", shard=0)
    assert statistics.t_histogram == (1, 1, *[0] * 17, 1)
    assert statistics.mask_ratio_histogram[9] == 3
    assert statistics.num_top_counts == (1, 1, 1)
    # one kept half + a tail of one half; two halves; nothing kept: all is tail
    np.testing.assert_allclose(statistics.t_entropy[:2], [np.log(2), np.log(2)], rtol=1e-6)
    assert statistics.t_entropy[19] == 0
    np.testing.assert_allclose(statistics.t_head_mass[:2], [0.5, 1.0], rtol=1e-6)
