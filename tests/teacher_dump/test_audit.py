"""The audit of a dump: distributions as a naive teacher gives them, the same bytes always, damage found and mended."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dump_checks import file_hashes, fork, join
from tide.shared.attention import block_diffusion_mask
from tide.shared.cache import open_cache, read_manifest, verify_cache
from tide.shared.cache.audit import AuditRow, audit_name, read_audit_group, write_audit
from tide.shared.cache.files import sha256_file
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.merge import merge_caches
from tide.shared.cache.repair import repair_from, require_undamaged
from tide.shared.cache.verify import check_file, unnamed_files
from tide.shared.cache.verify_shards import check_shards
from tide.shared.config import RunConfig, SignalConfig
from tide.shared.errors import CacheError, ConfigError
from tide.shared.models import load_model
from tide.shared.noising import draw_masks, keyed_generator, masking_units
from tide.teacher_dump import shard_task
from tide.teacher_dump.cost import audit_bytes
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import open_samples, read_plan
from tide.teacher_dump.repair import make_again, set_aside
from tide.teacher_dump.shard_task import ShardTask
from tiny_runs import BLOCK, make_cache, tiny_config

SHARE = 0.3
AUDIT = "audit/audit-00002-of-00004.parquet"


def audited(root: Path, **more: object) -> RunConfig:
    values = {"signal__audit_share": SHARE, "shards__samples_per_shard": 2, "signal__logp_dtype": "float16"}
    return tiny_config(root, **{**values, **more})


@pytest.fixture
def config(tiny_root) -> RunConfig:
    return audited(tiny_root)


@pytest.fixture
def root(tiny_root, config, tmp_path) -> Path:
    """A copy of a finished dump with an audit, to be damaged."""
    return Path(shutil.copytree(make_cache(tiny_root, "audited", config), tmp_path / "cache"))


def audit_rows(root: Path) -> list[AuditRow]:
    rows = []
    for path in sorted((root / "audit").glob("[!.]*")):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                rows += list(read_audit_group(file, group, where=str(path), first_row=0, full=True))
    return rows


def naive_logp(model, x_0: np.ndarray, masked: np.ndarray, mask_id: int) -> np.ndarray:
    """float64 log-probabilities [l, V] of one forward over [x_t, x_0], all logits."""
    ids = np.concatenate([np.where(masked, mask_id, x_0), x_0]).astype(np.int64)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids)[None], position_ids=torch.arange(len(x_0)).repeat(2)[None], use_cache=False,
            attention_mask=block_diffusion_mask(len(x_0), BLOCK)[None, None],
        ).logits  # fmt: skip
    return logits[0, : len(x_0)].double().log_softmax(dim=1).numpy()


def test_audited_distributions_are_those_of_a_naive_teacher_at_the_drawn_targets(root, config):
    cache, plan = open_cache(root), read_plan(root).at(config, root)
    conversations, pairing = open_samples(plan)
    model, noise = load_model(config.teacher.path), plan.config.noise
    teacher_ids = cache.vocabulary().teacher_id[cache.vocabulary().teacher_id >= 0]
    samples = {p.sample_id: pairing.encode(conversations.read(*p[:3])) for p in plan.samples}
    rows, expected = iter(audit_rows(root)), 0
    for view in cache:
        sample = samples[view.sample_id]
        student, teacher = sample.student, sample.teacher
        units = masking_units(
            sample.chunks, len(student.x_0), student.prompt_tokens, len(teacher.x_0), teacher.prompt_tokens
        )
        masks = draw_masks(units, view.t, view.sample_id, view.view, noise)
        drawn = keyed_generator(noise.seed, "audit", view.sample_id, view.view).random(len(view.x_0)) < SHARE
        teacher_position = {int(c[2]): int(c[0]) for c in sample.chunks}
        for position in view.target_position[drawn[view.target_position]].tolist():
            row, place = next(rows), teacher_position[position]
            assert (row.sample_id, row.view, row.position) == (view.sample_id, view.view, position)
            assert row.t == pytest.approx(view.t)
            assert row.masked_share == pytest.approx(view.masked.mean())
            shown = masks.teacher_b if masks.teacher_b[place] else masks.teacher_a
            logp = naive_logp(model, teacher.x_0, shown, pairing.teacher.mask_id)[place, teacher_ids]
            np.testing.assert_allclose(row.logp, logp, rtol=2.0**-11, atol=2e-5)  # float16, and sums in float32
            np.testing.assert_array_equal(row.logp, row.logp.astype(np.float16).astype(np.float32))
            expected += 1
    assert next(rows, None) is None
    assert expected > 40
    info = read_manifest(root).audit
    assert info is not None
    assert (info.share, info.support_tokens, sum(f.rows for f in info.files)) == (SHARE, len(teacher_ids), expected)


def test_any_number_of_workers_gives_the_same_audit(root, config, tmp_path):
    many = tmp_path / "many"
    torch.set_num_threads(1)
    assert join(fork(partial(dump_teacher, config, many, num_workers=2)), timeout_s=120) == [0]
    assert file_hashes(many) == file_hashes(root)
    assert len(list((root / "audit").iterdir())) == 4


def test_an_audit_changes_no_row_and_no_audit_leaves_no_folder(tiny_root, root, tmp_path):
    dump_teacher(audited(tiny_root, signal__audit_share=0.0), tmp_path / "without")
    without = open_cache(tmp_path / "without")
    assert without.manifest.audit is None
    assert not (tmp_path / "without" / "audit").exists()
    for row, twin in zip(open_cache(root), without, strict=True):
        for name, value in vars(row).items():
            assert np.array_equal(value, getattr(twin, name)), name


@pytest.mark.parametrize("step", ["write_audit", "write_receipt"])
def test_killed_around_the_audit_the_same_command_ends_with_the_same_bytes(root, config, tmp_path, monkeypatch, step):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_task, step, killed)
        with pytest.raises(KeyboardInterrupt):
            dump_teacher(config, tmp_path / "killed")
    assert not list((tmp_path / "killed" / "receipts").glob("0*"))
    dump_teacher(config, tmp_path / "killed")
    assert file_hashes(tmp_path / "killed") == file_hashes(root)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("act", [flip, Path.unlink])
def test_a_damaged_audit_is_named_and_its_shard_alone_is_asked_again(root, config, monkeypatch, act: Callable):
    sound, asked, run = file_hashes(root), [], ShardTask.run

    def noted(self, root, shard, progress):
        asked.append(shard)
        return run(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", noted)
    act(root / AUDIT)
    with pytest.raises(CacheError, match="audit-00002-of-00004"):
        require_undamaged(root)
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.replaced, report.same_manifest) == ([2], (AUDIT,), True)
    assert {n: v for n, v in file_hashes(root).items() if not n.startswith("quarantine")} == sound


def test_a_damaged_audit_is_fetched_from_another_copy(root, tmp_path):
    other, sound = Path(shutil.copytree(root, tmp_path / "other")), file_hashes(root)
    flip(root / AUDIT)
    (root / "audit" / "audit-00007-of-00009.parquet").write_bytes(b"?")
    report = repair_from(root, str(other))
    assert report.replaced == (AUDIT,)
    assert set(report.moved) == {AUDIT, "audit/audit-00007-of-00009.parquet"}
    assert {n: v for n, v in file_hashes(root).items() if not n.startswith("quarantine")} == sound


def test_dump_again_notices_a_missing_audit(root, config):
    sound = file_hashes(root)
    (root / AUDIT).unlink()
    with pytest.warns(UserWarning, match="shards 2 are missing or damaged"):
        dump_teacher(config, root)
    assert file_hashes(root) == sound


def test_without_its_audit_a_cache_is_sound_and_verification_says_so(root):
    assert verify_cache(root).audit == "checked"
    shutil.rmtree(root / "audit")
    assert verify_cache(root).audit == verify_cache(root, mode="quick").audit == "left out"


def check(root: Path, *, hashes: bool) -> None:
    """The checks of `verify_cache` in this process."""
    manifest = read_manifest(root)
    for entry in manifest.files() if hashes else ():
        check_file(root, entry, full=True)
    for name in unnamed_files(root, manifest):
        raise CacheError(f"{name}: the manifest does not name this file")
    check_shards(root, manifest, full=True)


def vouch_for(root: Path) -> None:
    """Let the manifest name the audit files as they are."""
    tree = json.loads((root / "manifest.json").read_text())
    for entry in tree["audit"]["files"]:
        path = root / entry["name"]
        entry |= {"sha256": sha256_file(path), "bytes": path.stat().st_size, "rows": pq.read_metadata(path).num_rows}
    (root / "manifest.json").write_bytes(sealed_json(tree))


def refusal(root: Path) -> str | None:
    """What the checks say if sizes and hashes are believed; None: nothing."""
    try:
        check(root, hashes=False)
    except CacheError as error:
        return str(error)
    return None


def test_random_damage_to_audit_files_is_found_and_named(root, tmp_path):
    """Bits and truncations anywhere; believed hashes leave it to checksums, footers and meaning."""
    path, rng, kinds = root / AUDIT, np.random.default_rng(0), {"harmless": 0, "refused": 0}
    sound, rows = path.read_bytes(), [row.logp.tobytes() for row in audit_rows(root)]
    check(root, hashes=True)
    for number in range(240):
        data = bytearray(sound)
        if number % 8 == 7:
            data = data[: int(rng.integers(len(data) - 1))]
        else:
            low = len(data) - 1500 if number % 2 else 0
            data[int(rng.integers(low, len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(CacheError, match="audit-00002-of-00004"):
            check(root, hashes=True)
        said = refusal(root)
        kinds["refused" if said else "harmless"] += 1
        if said:
            assert "audit-00002-of-00004" in said
        else:
            assert [row.logp.tobytes() for row in audit_rows(root)] == rows
    print(kinds)
    assert kinds["refused"] > kinds["harmless"]


def rewritten(root: Path, change: Callable[[list[AuditRow]], list[AuditRow]], *, dtype: str = "float16") -> None:
    """AUDIT with other rows, written by tide's own writer, and vouched for."""
    manifest = read_manifest(root)
    with pq.ParquetFile(root / AUDIT) as file:
        groups = range(file.num_row_groups)
        rows = [r for g in groups for r in read_audit_group(file, g, where=AUDIT, first_row=0)]
    layout = dataclasses.replace(manifest.layout, logp_dtype=dtype)
    write_audit(root / AUDIT, change(rows), layout, plan_hash=manifest.plan_hash, shard=2)
    vouch_for(root)


def first(rows: list[AuditRow], **changes: object) -> list[AuditRow]:
    return [dataclasses.replace(rows[0], **changes), *rows[1:]]


def flattened(logp: np.ndarray) -> np.ndarray:
    """The same kept tokens (the largest five) and another tail."""
    changed = logp.copy()
    rest = np.argsort(-logp)[16:]
    changed[rest] = -60.0
    return changed


def other_token(logp: np.ndarray) -> np.ndarray:
    changed = logp.copy()
    changed[np.argmax(logp)] -= 0.25
    return changed


LIES: dict[str, tuple[Callable[[list[AuditRow]], list[AuditRow]], str]] = {
    "a position that is no target": (lambda rows: first(rows, position=0), "is not a target of this view"),
    "a target that was not drawn": (lambda rows: rows[1:], "the draw of noise.seed and audit.share gives"),
    "rows in another order": (lambda rows: rows[::-1], r"audited positions are|not in its order"),
    "another time": (lambda rows: first(rows, t=0.123), "t or masked_share is not the shard's"),
    "another mask ratio": (lambda rows: first(rows, masked_share=0.987), "t or masked_share is not the shard's"),
    "a view the shard lacks": (lambda rows: [*rows, dataclasses.replace(rows[-1], view=77)], "has no such view"),
    "another probability of a kept token": (lambda rows: first(rows, logp=other_token(rows[0].logp)), "the shard has"),
    "another tail": (lambda rows: first(rows, logp=flattened(rows[0].logp)), "outside the kept tokens at temperature"),
    "fewer tokens": (lambda rows: [dataclasses.replace(r, logp=r.logp[1:]) for r in rows], "values for|one for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_an_audit_that_contradicts_its_shard_is_refused(root, name):
    change, message = LIES[name]
    rewritten(root, change)
    with pytest.raises(CacheError, match=f"audit-00002-of-00004.*({message})"):
        check(root, hashes=True)


def test_values_that_are_not_float16_numbers_are_refused(root):
    rewritten(root, lambda rows: first(rows, logp=rows[0].logp * np.float32(1.00001)), dtype="float32")
    with pytest.raises(CacheError, match="logp: holds a value that is not a float16 number"):
        check(root, hashes=True)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.5, 0.0])
def test_what_is_no_distribution_is_not_even_written(root, value):
    before = file_hashes(root)
    with pytest.raises(CacheError, match=r"row 0 .*logp: holds (a value that is not a finite|more than the whole)"):
        rewritten(root, lambda rows: first(rows, logp=np.full_like(rows[0].logp, value)))
    assert file_hashes(root) == before


def test_swapped_duplicated_and_unnamed_audit_files_are_refused(root):
    first_name, second = root / audit_name(0, 4), root / audit_name(1, 4)
    a, b = first_name.read_bytes(), second.read_bytes()
    first_name.write_bytes(b)
    vouch_for(root)
    with pytest.raises(CacheError, match=r"audit-00000-of-00004.*tide\.shard = '1', expected '0'"):
        check(root, hashes=True)
    first_name.write_bytes(a)
    vouch_for(root)
    check(root, hashes=True)
    shutil.copy(first_name, root / "audit" / "audit-00009-of-00004.parquet")
    with pytest.raises(CacheError, match="audit-00009-of-00004.parquet: the manifest does not name this file"):
        verify_cache(root, mode="quick")


@pytest.mark.parametrize(
    "name",
    ["../audit-00000-of-00004.parquet", "/etc/passwd", "audit/../x", "audit\\a", "C:/a",
     "audit/audit-00000-of-00005.parquet", "audit/audit-00001-of-00004.parquet",
     "audit/audit-00000-of-00004.parquet\n"],
)  # fmt: skip
def test_names_that_no_audit_has_are_refused(root, name):
    tree = json.loads((root / "manifest.json").read_text())
    tree["audit"]["files"][0]["name"] = name
    (root / "manifest.json").write_bytes(sealed_json(tree))
    with pytest.raises(CacheError, match=r"audit\.files\.\d\.name is|cannot be printed"):
        read_manifest(root)


def test_an_audit_file_that_is_a_link_out_of_the_cache_is_refused(root, tmp_path):
    shutil.move(root / AUDIT, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / AUDIT)
    with pytest.raises(CacheError, match="is a link that leads out of the cache folder"):
        verify_cache(root, mode="quick")


@pytest.mark.parametrize("change", [{"share": 0.0}, {"share": 1.5}, {"support_tokens": 0}, {"support_tokens": 10**9}])
def test_a_manifest_whose_audit_cannot_be_is_refused(root, change):
    tree = json.loads((root / "manifest.json").read_text())
    tree["audit"] |= change
    (root / "manifest.json").write_bytes(sealed_json(tree))
    with pytest.raises(CacheError, match=r"audit\.share is"):
        read_manifest(root)


def test_an_audit_of_chunks_alone_is_refused():
    with pytest.raises(ConfigError, match="an audit is of token-level targets"):
        SignalConfig(kind="chunk", audit_share=0.1)


def test_a_merged_cache_leaves_the_audits_with_its_parts_and_says_so(root, tiny_root, tmp_path):
    other = make_cache(tiny_root, "audited-too", audited(tiny_root, noise__seed=5, signal__audit_share=0.1))
    with pytest.warns(UserWarning, match="the audit of .* stays where it is"):
        manifest = merge_caches([root, other], tmp_path / "merged")
    assert manifest.audit is None
    assert not (tmp_path / "merged" / "audit").exists()
    assert verify_cache(tmp_path / "merged").audit == "none"


def test_the_plan_estimates_the_audits_bytes(root, config):
    """An upper bound: targets are fewer than masked positions, the support is smaller than the vocabulary."""
    plan = read_plan(root).at(config, root)
    found = sum(entry.bytes for entry in read_manifest(root).audit.files)
    assert 0.3 * audit_bytes(plan) < found < 1.5 * audit_bytes(plan)
    assert audit_bytes(read_plan(root).at(config, root)) > 0


def test_duckdb_polars_and_datasets_read_an_audit(root, tmp_path):
    import datasets
    import duckdb
    import polars

    rows = audit_rows(root)
    expected = [(r.sample_id, r.view, r.position, r.logp.tolist()) for r in rows]
    with duckdb.connect() as connection:
        query = f"SELECT sample_id, view, position, logp FROM read_parquet('{root}/audit/*.parquet')"
        assert connection.execute(query).fetchall() == expected
    frames = [
        polars.read_parquet(f"{root}/audit/*.parquet").to_dicts(),
        datasets.load_dataset(
            "parquet", data_files=sorted(map(str, (root / "audit").iterdir())), split="train", cache_dir=str(tmp_path)
        ),
    ]
    for frame in frames:
        assert [(r["sample_id"], r["view"], r["position"], r["logp"]) for r in frame] == expected
