"""What is damaged is set aside and replaced from another copy; nothing else moves, and nothing is deleted."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
from dump_checks import file_hashes
from tide import cli
from tide.shared.cache import open_cache, read_manifest, verify_cache
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.repair import repair_from, require_undamaged
from tide.shared.errors import CacheError, Unavailable

SHARD = "data/views-00000-of-00002.parquet"
OTHER = "data/views-00001-of-00002.parquet"


def flip(path: Path, place: int = 300) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.fixture
def pair(make_cache, tmp_path) -> tuple[Path, Path]:
    """A cache and a copy of it."""
    root = make_cache("topk")
    return root, Path(shutil.copytree(root, tmp_path / "copy"))


DAMAGE = {
    "a flipped bit": (flip, True),
    "missing": (Path.unlink, False),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), True),
    "empty": (lambda path: path.write_bytes(b""), True),
}


@pytest.mark.parametrize("name", [OTHER, "vocabulary.parquet"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_fetched_and_the_rest_stays(pair, name, damage):
    root, copy = pair
    sound, (act, is_kept) = file_hashes(root), DAMAGE[damage]
    act(root / name)
    bad = (root / name).read_bytes() if is_kept else None
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*.*") if path != root / name}
    report = repair_from(root, str(copy))
    assert (report.replaced, report.moved) == ((name,), (name,) if is_kept else ())
    assert report.same_manifest
    after = file_hashes(root)
    assert {k: v for k, v in after.items() if not k.startswith("quarantine")} == sound
    assert {path: path.stat().st_mtime_ns for path in times} == times
    if is_kept:
        assert (root / "quarantine" / "0001" / name).read_bytes() == bad
    else:
        assert report.quarantine is None
        assert not (root / "quarantine").exists()
    assert len(list(open_cache(root, verify="full"))) == 30


def test_each_repair_has_a_folder_of_its_own_and_readers_ignore_them(pair):
    root, copy = pair
    for number in (1, 2):
        flip(root / SHARD, 300 + number)
        report = repair_from(root, str(copy))
        assert report.quarantine == str(root / "quarantine" / f"{number:04d}")
    verify_cache(root)
    assert len(open_cache(root).to_datasets()) == 30
    assert repair_from(root, str(copy)).moved == ()


def test_an_unnamed_file_is_set_aside_and_a_receipt_that_disagrees_too(pair):
    root, copy = pair
    shutil.copy(root / SHARD, root / "data" / "extra.parquet")
    flip(root / SHARD)
    receipt = root / "receipts" / "00000.json"
    receipt.write_text(receipt.read_text().replace('"bytes": ', '"bytes": 1'))
    report = repair_from(root, str(copy))
    assert report.replaced == (SHARD,)
    assert set(report.moved) == {SHARD, "receipts/00000.json", "data/extra.parquet"}
    verify_cache(root)


@pytest.mark.parametrize("change", [flip, lambda path: path.write_bytes(path.read_bytes() + b"x"), Path.unlink])
def test_a_source_with_other_bytes_is_refused_and_changes_nothing(pair, change):
    root, copy = pair
    flip(root / SHARD)
    change(copy / SHARD)
    before = file_hashes(root)
    with pytest.raises(CacheError, match=rf"copy/{SHARD}: "):
        repair_from(root, str(copy))
    assert file_hashes(root) == before


def test_nothing_is_written_through_a_link(pair, tmp_path):
    root, copy = pair
    outside = tmp_path / "outside"
    (root / "data").rename(outside)
    (root / "data").symlink_to(outside)
    before = file_hashes(outside)
    with pytest.raises(CacheError, match="data: is a link that leads out"):
        repair_from(root, str(copy))
    (root / "data").unlink()
    outside.rename(root / "data")
    flip(root / SHARD)
    (root / "quarantine").symlink_to(tmp_path)
    with pytest.raises(CacheError, match="is a link that leads out"):
        repair_from(root, str(copy))
    assert before[SHARD.removeprefix("data/")] != file_hashes(root)[SHARD]
    assert not (tmp_path / "0001").exists()


def test_a_link_in_place_of_a_shard_is_set_aside_as_a_link(pair, tmp_path):
    root, copy = pair
    (root / SHARD).rename(tmp_path / "elsewhere.parquet")
    (root / SHARD).symlink_to(tmp_path / "elsewhere.parquet")
    repair_from(root, str(copy))
    assert (root / "quarantine" / "0001" / SHARD).is_symlink()
    assert not (root / SHARD).is_symlink()
    assert (tmp_path / "elsewhere.parquet").exists()


def test_what_the_manifest_itself_vouches_for_cannot_be_repaired(pair):
    root, copy = pair
    for folder in pair:
        tree = json.loads((folder / "manifest.json").read_text())
        tree["statistics"]["gold_logp"] -= 1
        (folder / "manifest.json").write_bytes(sealed_json(tree))
    with pytest.raises(CacheError, match=r"statistics\.gold_logp .*a repair would bring the same bytes again"):
        repair_from(root, str(copy))


def test_the_command_says_what_is_damaged_and_repairs_from_a_folder(pair, monkeypatch, capsys):
    root, copy = pair

    def tide(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["tide", "repair-cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    assert tide(root)[0] == 0
    flip(root / SHARD)
    code, said = tide(root)
    assert code == 65
    assert f"{SHARD}: SHA-256 differs" in said
    assert "--from another copy" in said
    code, said = tide(root, "--from", copy)
    assert code == 0
    assert SHARD in said
    require_undamaged(root)
    flip(root / SHARD)
    code, said = tide(root, "--from", "nobody/here/at/all")
    assert (code, "no such folder" in said) == (65, True)


def test_the_hub_is_asked_for_the_damaged_files_alone(pair, monkeypatch):
    root, copy = pair
    asked = []

    def hf_hub_download(self, name: str, file: str, *, repo_type: str, revision: str | None, **_: object) -> str:
        asked.append((name, repo_type, revision, file))
        if name != "me/cache":
            raise huggingface_hub.errors.HFValidationError("401")
        return str(copy / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", hf_hub_download)
    assert repair_from(root, "me/cache").replaced == ()
    assert asked == []
    flip(root / OTHER)
    with pytest.raises(Unavailable, match=f"fetching {OTHER} of me/other"):
        repair_from(root, "me/other")
    repair_from(root, "me/cache", revision="v1")
    assert asked[1:] == [("me/cache", "dataset", "v1", OTHER)]
    assert read_manifest(root).hash == read_manifest(copy).hash
