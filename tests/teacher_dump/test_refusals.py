"""A cache that is begun keeps to its plan: what changed is named and refused, what is damaged is made again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dump_checks import file_hashes
from tide.shared.cache import read_manifest, verify_cache
from tide.shared.errors import CacheError, CacheMismatch, ConfigError, DataError, OutputError
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.plan import make_plan, read_plan, write_plan
from tide.teacher_dump.worker import open_task
from tiny_runs import tiny_config


def begin(config, root: Path, num_shards: int = 1) -> dict[str, str]:
    """Do the first shards of a dump and leave it so."""
    task = open_task(root, prepare_plan(config, root))
    for shard in range(num_shards):
        task.run(root, shard)
    return file_hashes(root)


def small(root: Path, **more):
    return tiny_config(root, shards__samples_per_shard=2, noise__views=1, **more)


def test_every_changed_setting_is_named_with_its_old_and_new_value(mine):
    before = begin(small(mine), mine / "cache")
    changed = small(mine, signal__top_k=7, noise__seed=5, data__limit=3, student__template={"x": 1})
    with pytest.raises(CacheMismatch, match=r"plan.json was made with other settings") as caught:
        dump_teacher(changed, mine / "cache")
    for part in (
        "signal.top_k: plan 16, now 7", "noise.seed: plan 0, now 5", "data.limit: plan None, now 3",
        "student.template.x: plan nothing, now 1", "student.template.enable_thinking: plan False, now nothing",
        "another --out",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert str(caught.value).count("now ") == 5
    assert file_hashes(mine / "cache") == before


def test_settings_of_the_training_may_change_between_two_dump_commands(mine):
    begin(small(mine), mine / "cache")
    dump_teacher(small(mine, train__lr=3e-4, train__batch_size=2), mine / "cache")


def test_other_weights_of_the_teacher_are_refused(mine):
    before = begin(small(mine), mine / "cache")
    weights = mine / "teacher" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1  # one bit of one number
    weights.write_bytes(data)
    with pytest.raises(CacheMismatch, match=r"its weights \(\w{12}\) are not those this cache was begun with"):
        dump_teacher(small(mine), mine / "cache")
    assert file_hashes(mine / "cache").items() >= before.items()


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("teacher/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "teacher.config: plan"),
        ("student/chat_template.jinja", "<|im_start|>", "<|im_end|>", "student.chat_template: plan"),
    ],
)
def test_a_changed_tokenizer_or_model_configuration_is_refused(mine, file, old, new, named):
    begin(small(mine), mine / "cache")
    text = (mine / file).read_text()
    assert old in text
    (mine / file).write_text(text.replace(old, new))
    with pytest.raises(CacheMismatch, match=named):
        dump_teacher(small(mine), mine / "cache")


def test_data_that_changed_since_the_plan_are_refused(mine):
    before = begin(small(mine), mine / "cache")
    (mine / "pairs.jsonl").write_text((mine / "pairs.jsonl").read_text().replace("compute", "tell"))
    with pytest.raises(DataError, match=r"pairs.jsonl: pinned as sha256:.*restore the files"):
        dump_teacher(small(mine), mine / "cache")
    assert file_hashes(mine / "cache").items() >= before.items()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_of_an_unfinished_cache_is_made_again_before_the_commit(mine, how):
    """Sizes are compared at once; every byte is hashed before the manifest vouches for it."""
    dump_teacher(small(mine), mine / "whole")
    begin(small(mine), mine / "cache", num_shards=3)
    damage(sorted((mine / "cache" / "data").iterdir())[1], how)
    with pytest.warns(UserWarning, match="shards 1 are missing or damaged and are made again"):
        dump_teacher(small(mine), mine / "cache")
    assert file_hashes(mine / "cache") == file_hashes(mine / "whole")
    verify_cache(mine / "cache")


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_of_a_complete_cache_is_made_again(mine, how):
    """Without `verify`, the same command compares sizes alone: a flipped bit is for `verify` (or tide verify-cache)."""
    dump_teacher(small(mine), mine / "cache")
    expected = file_hashes(mine / "cache")
    damage(sorted((mine / "cache" / "data").iterdir())[0], how)
    if how == "flipped":
        dump_teacher(small(mine), mine / "cache")
        assert file_hashes(mine / "cache") != expected
    with pytest.warns(UserWarning, match="shards 0 are missing or damaged"):
        dump_teacher(small(mine), mine / "cache", verify=how == "flipped")
    assert file_hashes(mine / "cache") == expected


@pytest.mark.parametrize("file", ["manifest.json", "vocabulary.parquet", "README.md"])
@pytest.mark.filterwarnings("ignore:.*the manifest is made again")
def test_other_files_of_a_complete_cache_are_made_again(mine, file):
    dump_teacher(small(mine), mine / "cache")
    expected = file_hashes(mine / "cache")
    if file == "README.md":  # nobody vouches for it: it is made again with the manifest
        (mine / "cache" / "manifest.json").unlink()
    damage(mine / "cache" / file, "truncated")
    dump_teacher(small(mine), mine / "cache")
    assert file_hashes(mine / "cache") == expected


def test_a_lost_record_of_the_weights_is_an_error_that_says_what_to_do(mine):
    dump_teacher(small(mine), mine / "cache")
    expected = file_hashes(mine / "cache")
    (mine / "cache" / "manifest.json").unlink()
    (mine / "cache" / "receipts" / "teacher.json").write_text("{")
    with pytest.raises(CacheError, match=r"teacher.json: missing or damaged.*remove the folder .*receipts"):
        dump_teacher(small(mine), mine / "cache")
    shutil.rmtree(mine / "cache" / "receipts")
    dump_teacher(small(mine), mine / "cache")
    assert file_hashes(mine / "cache") == expected


def test_an_empty_plan_beside_shards_is_refused_and_alone_it_is_none(mine):
    """Where there are no hard links, a writer that is killed at the wrong moment leaves an empty file."""
    begin(small(mine), mine / "cache")
    (mine / "cache" / "plan.json").write_text("")
    with pytest.raises(ConfigError, match=r"holds other files and no plan.json"):
        dump_teacher(small(mine), mine / "cache")
    (mine / "new").mkdir()
    (mine / "new" / "plan.json").touch()
    assert dump_teacher(small(mine), mine / "new").totals.samples > 0


@pytest.mark.parametrize("text", ["[]", "{", '{"schema_version": 1}'])
def test_a_damaged_plan_is_refused(mine, text):
    begin(small(mine), mine / "cache")
    (mine / "cache" / "plan.json").write_text(text)
    with pytest.raises(CacheError, match=r"plan.json: "):
        dump_teacher(small(mine), mine / "cache")


def test_a_plan_of_another_version_is_refused(mine):
    begin(small(mine), mine / "cache")
    path = mine / "cache" / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(CacheError, match="schema_version is 99, this tide writes 1"):
        dump_teacher(small(mine), mine / "cache")


def test_a_manifest_of_another_plan_is_refused(mine):
    dump_teacher(small(mine), mine / "cache")
    path = mine / "cache" / "plan.json"
    tree = json.loads(path.read_text())
    tree["samples"] = tree["samples"][:-1]
    del tree["plan_hash"]  # or it would be called edited
    path.write_text(json.dumps(tree))
    with pytest.raises(CacheMismatch, match="is not the plan that manifest.json was made from"):
        dump_teacher(small(mine), mine / "cache")


def test_a_folder_with_other_files_is_never_written_to(mine):
    folder = mine / "project"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"project: the folder holds other files"):
        dump_teacher(small(mine), folder)
    assert file_hashes(folder).keys() == {"README.md"}
    with pytest.raises(OutputError, match=r"README.md is a file; give the path of a folder"):
        dump_teacher(small(mine), folder / "README.md" / "cache")


def test_threads_of_torch_are_those_of_the_plan(mine):
    """Sums round differently on another number of threads, so it is a setting of the plan."""
    torch.set_num_threads(2)
    try:
        begin(small(mine), mine / "cache")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_of_two_dumps_that_begin_together_the_one_with_other_settings_is_refused_by_name(mine, monkeypatch):
    """Both see no plan; the slower one must neither replace the other's plan nor go home with its cache."""
    theirs, ours = make_plan(small(mine))[0], make_plan(small(mine, noise__seed=7))[0]
    write_plan(mine / "cache", theirs)
    with pytest.raises(CacheMismatch, match=r"noise.seed: plan 0, now 7"):
        write_plan(mine / "cache", ours)
    assert read_plan(mine / "cache").hash == theirs.hash


def test_nobody_gets_another_ones_cache_under_exit_code_0(mine, monkeypatch):
    """The folder's plan and manifest are exchanged while a dump runs: what is there at its end is not its cache."""
    other = dump_teacher(small(mine, noise__seed=7), mine / "other")

    def exchanged(store, config, **how):
        shutil.rmtree(mine / "cache")
        shutil.copytree(mine / "other", mine / "cache")

    monkeypatch.setattr("tide.teacher_dump.dump.run_local", exchanged)
    with pytest.raises(CacheMismatch, match="the cache of other settings or data"):
        dump_teacher(small(mine), mine / "cache")
    assert read_manifest(mine / "cache").hash == other.hash
