"""A damaged shard is set aside and asked again, alone; the manifest ends as it began."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dump_checks import file_hashes
from tide import cli
from tide.shared.cache import verify_cache
from tide.shared.cache.manifest import sealed_json
from tide.shared.config import RunConfig
from tide.shared.errors import CacheError, CacheMismatch
from tide.teacher_dump import repair
from tide.teacher_dump.repair import make_again, set_aside
from tide.teacher_dump.shard_task import ShardTask
from tiny_runs import make_cache, settings, tiny_config

SHARD = "data/views-00002-of-00004.parquet"


@pytest.fixture
def config(tiny_root) -> RunConfig:
    return tiny_config(tiny_root, shards__samples_per_shard=2, noise__views=1)


@pytest.fixture
def root(tiny_root, config, tmp_path) -> Path:
    """A copy of a finished dump, to be damaged."""
    return Path(shutil.copytree(make_cache(tiny_root, "to-repair", config), tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Numbers of the shards that the teacher was asked about."""
    shards: list[int] = []
    run = ShardTask.run

    def noted(self, root, shard, progress):
        shards.append(shard)
        return run(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", noted)
    return shards


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(data)


def without_quarantine(root: Path) -> dict[str, str]:
    return {name: value for name, value in file_hashes(root).items() if not name.startswith("quarantine")}


@pytest.mark.parametrize("act", [flip, Path.unlink])
def test_a_damaged_shard_is_made_again_with_the_same_bytes(config, root, asked, act: Callable[[Path], None]):
    sound = file_hashes(root)
    act(root / SHARD)
    report = make_again(config, root, set_aside(config, root))
    assert asked == [2]
    assert report.replaced == (SHARD,)
    assert report.same_manifest
    assert {"manifest.json", "receipts/00002.json"} <= set(report.moved)
    assert without_quarantine(root) == sound
    if act is flip:
        assert (root / "quarantine" / "0001" / SHARD).exists()


def test_a_sound_cache_is_left_alone(config, root, asked):
    sound = file_hashes(root)
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.replaced, report.moved) == ([], (), ())
    assert file_hashes(root) == sound


def test_the_vocabulary_is_made_again_without_the_teacher(config, root, asked):
    sound = file_hashes(root)
    flip(root / "vocabulary.parquet")
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.replaced, report.same_manifest) == ([], ("vocabulary.parquet",), True)
    assert without_quarantine(root) == sound


def test_between_setting_aside_and_the_end_the_cache_is_incomplete_and_the_command_continues(config, root, asked):
    sound = file_hashes(root)
    flip(root / SHARD)
    set_aside(config, root)
    with pytest.raises(CacheError, match="is incomplete: 3 of 4 shards done"):
        verify_cache(root)
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.same_manifest) == ([2], True)
    assert without_quarantine(root) == sound


@pytest.mark.parametrize("killed_after", ["manifest.json", "receipts/00002.json"])
def test_killed_while_setting_aside_the_command_continues(config, root, asked, monkeypatch, killed_after):
    sound = file_hashes(root)
    flip(root / SHARD)
    take = repair.Quarantine.take

    def killed(self, name):
        take(self, name)
        if name == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(repair.Quarantine, "take", killed)
    with pytest.raises(KeyboardInterrupt):
        set_aside(config, root)
    monkeypatch.setattr(repair.Quarantine, "take", take)
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.same_manifest) == ([2], True)
    assert without_quarantine(root) == sound
    assert SHARD in report.moved


def test_a_damaged_manifest_is_made_again_from_the_shards(config, root, asked):
    sound = file_hashes(root)
    (root / "manifest.json").write_text("{")
    flip(root / SHARD)
    report = make_again(config, root, set_aside(config, root))
    assert (asked, report.same_manifest) == ([2], None)
    assert without_quarantine(root) == sound
    assert (root / "quarantine" / "0001" / "manifest.json").read_text() == "{"


def test_other_settings_are_refused_before_anything_moves(config, root, tiny_root):
    flip(root / SHARD)
    before = file_hashes(root)
    other = tiny_config(tiny_root, shards__samples_per_shard=2, noise__views=2)
    with pytest.raises(CacheMismatch, match=r"noise\.views: plan 1, now 2"):
        set_aside(other, root)
    assert file_hashes(root) == before


def test_another_manifest_than_before_is_said_aloud(config, root):
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_bytes(sealed_json({**tree, "tide_version": "0.0.1"}))
    flip(root / SHARD)
    aside = set_aside(config, root)
    with pytest.warns(UserWarning, match="are another cache now"):
        assert make_again(config, root, aside).same_manifest is False


def test_the_command_takes_the_options_of_the_dump(root, tiny_root, monkeypatch, capsys):
    sound = file_hashes(root)
    flip(root / SHARD)
    options = settings(tiny_root, shards__samples_per_shard=2, noise__views=1)
    arguments = ["tide", "repair-cache", str(root), "--json", *(word for text in options for word in ("--set", text))]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    result = json.loads(capsys.readouterr().out)
    assert (result["replaced"], result["same_manifest"]) == ([SHARD], True)
    assert without_quarantine(root) == sound
