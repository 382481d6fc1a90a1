"""Plans and caches do not depend on where things lie, and show no path of the machine that made them."""

import json
import shutil
from pathlib import Path

import pytest
from tide.shared import source_rows
from tide.shared.cache import open_cache
from tide.shared.errors import CacheMismatch, DataError
from tide.shared.stdlib_source import STDLIB_LICENCE
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.plan import make_plan, open_samples, read_plan
from tide.teacher_dump.portable import portable_name
from tiny_runs import tiny_config, write_pairs


def test_the_same_inputs_in_other_folders_give_the_same_cache(mine, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "deep"
    shutil.copytree(mine, elsewhere)
    first = dump_teacher(tiny_config(mine), mine / "cache")
    second = dump_teacher(tiny_config(elsewhere), elsewhere / "cache")
    assert second.plan_hash == first.plan_hash
    assert second.hash == first.hash


def test_no_file_of_a_cache_shows_a_path_of_the_machine(mine):
    """Parquet footers included; the pages are compressed, but hold only ids, numbers and the vocabulary."""
    manifest = dump_teacher(tiny_config(mine), mine / "cache")
    assert manifest.teacher is not None
    assert manifest.teacher.id == "teacher"
    assert manifest.sources[0].source == "pairs.jsonl[split=train]"
    for path in (mine / "cache").rglob("*"):
        if path.is_file():
            for text in (str(mine), mine.name, str(Path.home())):
                assert text.encode() not in path.read_bytes(), path


def test_a_dump_continues_after_everything_has_moved(mine, tmp_path):
    config = tiny_config(mine, shards__samples_per_shard=2)
    prepare_plan(config, mine / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("teacher", "student", "pairs.jsonl", "cache"):
        (mine / name).rename(moved / name)
    there = tiny_config(moved, shards__samples_per_shard=2)
    manifest = dump_teacher(there, moved / "cache", num_workers=2)
    assert manifest.plan_hash == read_plan(moved / "cache").hash


def test_another_name_of_teacher_or_data_is_refused_by_name(mine):
    prepare_plan(tiny_config(mine), mine / "cache")
    shutil.copytree(mine / "teacher", mine / "other")
    shutil.copy(mine / "pairs.jsonl", mine / "more.jsonl")
    with pytest.raises(CacheMismatch, match=r"teacher.path: plan 'teacher', now 'other'"):
        dump_teacher(tiny_config(mine, teacher__path=str(mine / "other")), mine / "cache")
    with pytest.raises(CacheMismatch, match=r"data.source: plan 'pairs.jsonl', now 'more.jsonl'"):
        dump_teacher(tiny_config(mine, data__source=str(mine / "more.jsonl")), mine / "cache")


def test_two_files_of_one_name_are_told_apart_by_their_content(mine):
    for folder, number in (("a", 5), ("b", 3)):
        (mine / folder).mkdir()
        write_pairs(mine / folder / "pairs.jsonl", number)
    text = (mine / "b" / "pairs.jsonl").read_text().replace('"prompt": "', '"prompt": "Please: ')
    (mine / "b" / "pairs.jsonl").write_text(text)
    a, b = (str(mine / folder / "pairs.jsonl") for folder in "ab")
    plan = prepare_plan(tiny_config(mine, data__source=f"{a}+{b}"), mine / "cache")
    assert len(plan.samples) == 8
    # The other order on the command line is another plan; the same order finds each file again by its content.
    reader, _ = open_samples(read_plan(mine / "cache").at(tiny_config(mine, data__source=f"{a}+{b}"), mine / "cache"))
    assert [source.path for source in reader.sources] == [a, b]
    for planned in plan.samples:
        assert reader.read(*planned[:3]).sample_id == planned.sample_id


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("owner/model", "owner/model"),
        ("gpt2", "gpt2"),
        ("/somewhere/absent/teacher", "teacher"),
        ("~/absent/teacher/", "teacher"),
        ("./absent", "absent"),
        ("a/b/c", "c"),
        ("/cache/models--owner--model/snapshots/0123abcd", "owner/model"),
        ("", ""),
        ("/", "root"),
    ],
)
def test_names(path, name):
    assert portable_name(path) == name


def test_what_exists_here_is_named_as_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_name("owner/model") == "model"
    monkeypatch.chdir(tmp_path / "owner" / "model")
    assert portable_name(".") == "model"
    assert portable_name("..") == "owner"


def test_a_worker_reads_the_rows_of_its_shard_and_no_other(mine, monkeypatch):
    config = tiny_config(mine, shards__samples_per_shard=3)
    plan = prepare_plan(config, mine / "cache")
    reader, _ = open_samples(plan)
    read: list[int] = []
    original = source_rows._JsonLines.__getitem__
    monkeypatch.setattr(source_rows._JsonLines, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    for planned in plan.shard_samples(1):
        reader.read(*planned[:3])
    assert read == [planned.row for planned in plan.shard_samples(1)] == [3, 4, 5]


@pytest.mark.parametrize(("source", "row"), [(0, 1), (0, 99)], ids=["another row", "no such row"])
def test_a_row_that_is_not_the_planned_sample_is_refused(mine, source, row):
    plan = prepare_plan(tiny_config(mine), mine / "cache")
    reader, _ = open_samples(plan)
    with pytest.raises(DataError, match=rf"pairs.jsonl.*row {row} .*expected sample {plan.samples[0].sample_id}"):
        reader.read(source, row, plan.samples[0].sample_id)


def test_licences_come_from_the_cards_and_settings_win(mine, tmp_path):
    (mine / "teacher" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    folder = mine / "set"
    folder.mkdir()
    shutil.copy(mine / "pairs.jsonl", folder / "pairs.jsonl")
    (folder / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n")
    found = dump_teacher(tiny_config(mine, data__source=f"{folder}+stdlib", data__limit=3), tmp_path / "found")
    assert found.teacher is not None
    assert found.teacher.licence == "apache-2.0"
    assert [source.licence for source in found.sources] == ["mit, cc-by-4.0", STDLIB_LICENCE]
    said = dump_teacher(tiny_config(mine, teacher__licence="mine", data__licence="theirs"), tmp_path / "said")
    assert said.teacher is not None
    assert said.teacher.licence == "mine"
    assert said.sources[0].licence == "theirs"
    assert json.loads((tmp_path / "said" / "manifest.json").read_text())["sources"][0]["licence"] == "theirs"
    open_cache(tmp_path / "said")


@pytest.mark.parametrize(
    "card", ["", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n", "\xff\x00"]
)
def test_a_card_that_says_nothing_leaves_the_licence_unknown(mine, card):
    (mine / "teacher" / "README.md").write_bytes(card.encode("latin-1"))
    assert make_plan(tiny_config(mine))[0].teacher_licence is None
    manifest = dump_teacher(tiny_config(mine), mine / "cache")
    assert manifest.teacher is not None
    assert manifest.teacher.licence == "unknown"
    assert manifest.sources[0].licence == "unknown"
