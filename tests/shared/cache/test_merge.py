"""Caches of one family become one; whatever differs is named and refused."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tide import cli
from tide.shared.cache import ViewRow, open_cache, read_manifest, verify_cache, write_manifest
from tide.shared.cache.manifest import DataSource
from tide.shared.cache.merge import merge_caches
from tide.shared.cache.statistics import ShardStatistics
from tide.shared.cache.statistics import merge as merge_statistics
from tide.shared.errors import CacheError, CacheMismatch, ConfigError


@pytest.fixture
def part(tmp_path, synthetic) -> Callable[..., Path]:
    """part("a", samples={0, 1}, seed=0, views=2) -> a cache in two shards; a text depends on the sample's number."""

    def make(name: str, *, samples: range, seed: int = 0, views: int = 2, kind: str = "topk", **changes: Any) -> Path:
        root, layout = tmp_path / name, synthetic.make_layout(kind)
        numbers = list(samples)
        halves = [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]
        receipts = [
            synthetic.write(root, [r for n in half for r in _views(synthetic, layout, n, seed, views)], layout, i, 2)
            for i, half in enumerate(halves)
        ]
        manifest = synthetic.finish(root, layout, receipts)
        manifest = dataclasses.replace(manifest, noise={"seed": seed, "views": views, "unit": "chunk"}, **changes)
        write_manifest(root, manifest)
        return root

    return make


def _views(synthetic: Any, layout: Any, number: int, seed: int, views: int) -> list[ViewRow]:
    rng, noise = np.random.default_rng(number), np.random.default_rng([number, seed])
    x_0 = rng.integers(0, synthetic.VOCAB, synthetic.BLOCK * 2).astype(np.int32)
    return [synthetic.make_row(noise, f"s{number}", view, x_0, 3, layout) for view in range(views)]


def same(a: ViewRow, b: ViewRow, *, view: int) -> bool:
    return a.view == view and all(
        np.array_equal(x, y) for (name, x), y in zip(vars(a).items(), vars(b).values(), strict=True) if name != "view"
    )


def test_other_samples_follow_each_other(part, signal, tmp_path):
    roots = [part("a", samples=range(5), kind=signal), part("b", samples=range(5, 8), kind=signal)]
    manifest = merge_caches(roots, tmp_path / "out")
    merged, parts = open_cache(tmp_path / "out", verify="full"), [open_cache(root) for root in roots]
    assert len(merged) == 16
    rows = [row for cache in parts for row in cache]
    assert all(same(row, old, view=old.view) for row, old in zip(merged, rows, strict=True))
    assert (manifest.totals.samples, manifest.totals.shards, manifest.noise["views"]) == (8, 4, 2)
    assert [(info.samples, info.first_view) for info in manifest.parts] == [(5, 0), (3, 0)]
    assert [info.manifest_hash for info in manifest.parts] == [cache.manifest.hash for cache in parts]
    assert manifest.noise["seed"] == 0
    total = merge_statistics([cache.manifest.statistics for cache in parts])
    for field in dataclasses.fields(ShardStatistics):
        if field.name != "column_bytes":
            assert getattr(manifest.statistics, field.name) == pytest.approx(getattr(total, field.name))
    assert merged.vocabulary().token_bytes == parts[0].vocabulary().token_bytes


def test_further_views_stand_beside_the_first_ones_and_are_numbered_on(part, signal, tmp_path):
    roots = [
        part("a", samples=range(6), kind=signal),
        part("b", samples=range(5, -1, -1), seed=1, views=3, kind=signal),
    ]
    manifest = merge_caches(roots, tmp_path / "out")
    a, b = (open_cache(root) for root in roots)
    merged = list(open_cache(tmp_path / "out", verify="full"))
    for number in range(6):
        for view in range(5):
            old = a[number * 2 + view] if view < 2 else b[(5 - number) * 3 + view - 2]
            assert same(merged[number * 5 + view], old, view=view)
    assert (manifest.noise["views"], manifest.noise["seed"]) == (5, None)
    assert [(info.seed, info.first_view, info.views) for info in manifest.parts] == [(0, 0, 2), (1, 2, 3)]
    assert read_manifest(tmp_path / "out") == manifest


def test_both_ways_at_once_and_a_merged_cache_again(part, tmp_path):
    a0, a1 = part("a0", samples=range(4)), part("a1", samples=range(4), seed=1)
    b = part("b", samples=range(4, 7), seed=7, views=4)
    merge_caches([a0, b, a1], tmp_path / "all")
    merge_caches([a0, a1], tmp_path / "a")
    merge_caches([tmp_path / "a", b], tmp_path / "again")
    all_parts, again = (read_manifest(tmp_path / name) for name in ("all", "again"))
    assert again.parts == all_parts.parts
    assert again.plan_hash == all_parts.plan_hash
    assert again.hash == all_parts.hash
    with pytest.raises(CacheMismatch, match=r"same noise\.seed = 1"):
        merge_caches([tmp_path / "a", a1], tmp_path / "no")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "block size": ({"block_size": 4}, "block_size: 8 and 4"),
    "some samples": (
        {"samples": range(2, 6)},
        r"share 2 of their 4 and 4 samples \(such as 's2'\); expected all or none",
    ),
    "the same noise": ({"samples": range(4)}, r"same samples under the same noise\.seed = 0"),
    "number of views": ({"views": 3}, "2 views of every sample and .*b 3"),
    "signal": ({"kind": "chunk"}, r"signal\.kind: 'topk' and 'chunk'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(part, tmp_path, name):
    changes, message = REFUSED[name]
    a = part("a", samples=range(4))
    b = part("b", **{"samples": range(4, 8), **changes})
    with pytest.raises(CacheMismatch, match=message):
        merge_caches([a, b], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    "path", ["teacher.weight_fingerprint", "teacher.dtype", "teacher.quantization", "teacher.spec", "signal.support",
             "student.tokenizer_fingerprint", "student.mask_id", "noise.unit", "signal.min_probability"],
)  # fmt: skip
def test_another_teacher_student_or_noise_is_refused_by_name(part, tmp_path, path):
    roots = [part("a", samples=range(2)), part("b", samples=range(2, 4))]
    manifest, (section, field) = read_manifest(roots[1]), path.split(".")
    new = {"spec": {"logit_shift": 1}, "mask_id": 5, "min_probability": 0.5}.get(field, "other")
    old = getattr(manifest, section)
    changed = {**old, field: new} if section == "noise" else dataclasses.replace(old, **{field: new})
    write_manifest(roots[1], dataclasses.replace(manifest, **{section: changed}))
    with pytest.raises(CacheMismatch, match=rf"a and .*b are of different kinds .*\({path}: .* and "):
        merge_caches(roots, tmp_path / "out")


def test_what_does_not_decide_a_row_may_differ_and_is_kept(part, tmp_path):
    mit, unknown = DataSource("x", "1", "mit"), DataSource("stdlib", "1", "unknown")
    roots = [part("a", samples=range(2)), part("b", samples=range(2, 4), sources=(mit,), dropped={"empty": 1})]
    manifest = read_manifest(roots[1])
    assert manifest.teacher is not None
    teacher = dataclasses.replace(manifest.teacher, id="mirror/teacher", licence="mit")
    write_manifest(roots[1], dataclasses.replace(manifest, teacher=teacher))
    merged = merge_caches(roots, tmp_path / "out")
    assert merged.teacher is not None
    assert (merged.teacher.id, merged.teacher.licence) == ("org/teacher", "apache-2.0, mit")
    assert merged.sources == (unknown, mit)
    assert merged.dropped == {"empty": 1, "too long": 2}
    parts = [read_manifest(root).statistics for root in roots]
    mean = sum(part.codec_kl[0] for part in parts) / merged.statistics.targets
    assert merged.signal.codec_error["1.0"]["kl_mean"] == pytest.approx(mean)
    assert mean > 0


def test_a_part_without_a_seed_is_refused(part, tmp_path):
    roots = [part("a", samples=range(2)), part("b", samples=range(2, 4))]
    manifest = read_manifest(roots[1])
    noise = {**manifest.noise, "seed": None}
    write_manifest(roots[1], dataclasses.replace(manifest, noise=noise))
    with pytest.raises(CacheMismatch, match=r"b: noise\.seed is missing"):
        merge_caches(roots, tmp_path / "out")


def test_a_sample_with_another_text_is_refused_and_nothing_is_left(part, tmp_path, synthetic, monkeypatch):
    a = part("a", samples=range(4))
    views = _views

    def other(*arguments: Any) -> list[ViewRow]:
        return [dataclasses.replace(row, x_0=row.x_0 * 0 + 7) for row in views(*arguments)]

    monkeypatch.setitem(globals(), "_views", other)
    b = part("b", samples=range(4), seed=1)
    with pytest.raises(CacheMismatch, match="sample 's0' has another text or prompt"):
        merge_caches([a, b], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_damaged_part_and_a_bad_output_are_refused(part, tmp_path):
    a, b = part("a", samples=range(2)), part("b", samples=range(2, 4))
    with pytest.raises(ConfigError, match="at least two"):
        merge_caches([a], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        merge_caches([a, b], b)
    shard = next((b / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"X")
    with pytest.raises(CacheError, match="SHA-256 differs"):
        merge_caches([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(part, tmp_path, monkeypatch, capsys):
    roots = [part("a", samples=range(2)), part("b", samples=range(2, 4))]
    monkeypatch.setattr(
        sys, "argv", ["tide", "merge-caches", *map(str, roots), "--out", str(tmp_path / "out"), "--json"]
    )
    for result in ("merged", "done already"):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        said = json.loads(capsys.readouterr().out)
        assert (said["rows"], said["result"]) == (8, result)
    verify_cache(tmp_path / "out")


def test_a_merge_of_other_parts_or_in_another_order_is_not_done_already(part, tmp_path):
    a, b, c = (part(name, samples=range(2 * n, 2 * n + 2)) for n, name in enumerate("abc"))
    merged, out = merge_caches([a, b], tmp_path / "out"), tmp_path / "out"
    for roots in ([b, a], [a, c], [a, b, c]):
        with pytest.raises(ConfigError, match="exists already, and is the merge of other caches"):
            merge_caches(roots, out)
    assert merge_caches([a, b], out).hash == merged.hash
    again = merge_caches([out, c], tmp_path / "all")  # a merge of a merge
    assert merge_caches([out, c], tmp_path / "all").hash == again.hash


def test_a_merge_that_is_damaged_since_is_not_called_done(part, tmp_path):
    a, b = part("a", samples=range(2)), part("b", samples=range(2, 4))
    merge_caches([a, b], tmp_path / "out")
    shard = next((tmp_path / "out" / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"X")
    with pytest.raises(CacheError, match="SHA-256 differs"):
        merge_caches([a, b], tmp_path / "out")
