"""No command writes into what it reads: every one refuses, names both paths, and has touched nothing."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tide import cli
from tide.shared.addresses import require_apart
from tide.shared.errors import ConfigError
from tiny_runs import make_cache, settings, tiny_config, write_pairs


def refusal(out: str | Path, **inputs: str | Path | None) -> str:
    """What `require_apart` says; "" where it has nothing against it."""
    try:
        require_apart(out, inputs)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data, a file in it, and a link to it from elsewhere."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize(
    "out",
    [
        "data", "data/", "data/new", "data/deep/new/er", "link", "link/new", "other/../data/new", "data/../data", ".",
        "data/deep/..", "file://{root}/data/new", "loop/data/x",
    ],
)  # fmt: skip
def test_an_output_that_is_or_holds_an_input_or_lies_in_one_is_refused(folder, out, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "loop").symlink_to(folder)
    out = out.format(root=folder)
    for given in ("data", folder / "data", folder / "link"):
        said = refusal(out, source=given)
        assert f"--out {out} and source {given} lie in each other" in said
        assert "Give a path outside of it" in said


@pytest.mark.parametrize("out", ["data2", "new/data", "data.new", "s3://bucket/data/new", "link2"])
@pytest.mark.parametrize("given", ["data", "link", "owner/data", "s3://bucket/data", "", None])
def test_places_beside_each_other_and_far_away_are_none_of_it(folder, out, given, monkeypatch):
    monkeypatch.chdir(folder)
    assert refusal(out, source=given) == ""


def test_a_file_is_not_written_over_and_single_files_may_lie_around(folder):
    file = folder / "data" / "rows.jsonl"
    assert "they are one place" in refusal(file, source=file)
    assert "the second in the first" in refusal(folder, source=file)
    require_apart(folder, {"source": file}, may_hold=True)
    with pytest.raises(ConfigError, match="the first in the second"):
        require_apart(folder / "data" / "page.html", {"source": folder / "link"}, may_hold=True)


def test_a_runs_folder_is_its_student(folder):
    (folder / "run" / "student").mkdir(parents=True)
    (folder / "run" / "student" / "config.json").write_text("{}")
    assert "lie in each other" in refusal(folder / "run" / "student" / "scores", student=folder / "run")
    assert "lie in each other" in refusal(folder / "run", student=folder / "run")
    assert refusal(folder / "run" / "scores", student=folder / "run") == ""


def test_no_output_lies_in_any_cache(tiny_root, tmp_path):
    cache = shutil.copytree(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid")), tmp_path / "cache")
    assert "lies in the cache" in refusal(cache / "new")
    assert "lies in the cache" in refusal(cache)
    require_apart(cache, {}, makes_cache=True)  # a dump that goes on
    with pytest.raises(ConfigError, match="lies in the cache"):
        require_apart(cache / "new", {}, makes_cache=True)
    (tmp_path / "site" / "data").mkdir(parents=True)
    (tmp_path / "site" / "manifest.json").write_text("{}")  # of a web page, say
    assert refusal(tmp_path / "site" / "run") == ""


@pytest.fixture
def place(tiny_root: Path, tmp_path: Path) -> SimpleNamespace:
    """Copies of a cache, models and a folder of data, and a run with its student."""
    config = tiny_config(tiny_root, "tide-hybrid")
    cache = make_cache(tiny_root, "hybrid", config)
    for name in ("cache", "second", "unseen"):
        shutil.copytree(cache, tmp_path / name)
    for name in ("teacher", "student"):
        shutil.copytree(tiny_root / name, tmp_path / name)
    shutil.copytree(tiny_root / "student", tmp_path / "run" / "student")
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data" / "pairs.jsonl")
    more = {
        "data__source": tmp_path / "data", "teacher__path": tmp_path / "teacher", "student__path": tmp_path / "student"
    }  # fmt: skip
    words = [word for item in settings(tiny_root, **more) for word in ("--set", item)]
    return SimpleNamespace(root=tmp_path, words=words)


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


COMMANDS = {
    "convert inside": ("convert", "student", "--out", "student/start"),
    "merge inside": ("merge-caches", "cache", "second", "--out", "second/both"),
    "decode inside": ("cache-to-datasets", "cache", "cache/rows"),
    "decode to disk inside": ("cache-to-datasets", "cache", "cache/rows", "--format", "disk"),
    "report over the manifest": ("inspect-cache", "cache", "--report", "cache/manifest.json"),
    "report inside": ("inspect-cache", "cache", "--report", "cache/data/page.html"),
    "plots inside": ("inspect-cache", "cache", "--plots", "cache/plots"),
    "repair from itself": ("repair-cache", "cache", "--from", "cache"),
    "pull inside": ("pull-cache", "owner/name", "cache/copy"),
    "eval in the student": ("eval", "--student", "student", "--out", "student/scores"),
    "eval in the run's student": ("eval", "--student", "run", "--out", "run/student"),
    "eval around the student": ("eval", "--student", "run", "--out", "run"),
    "eval in the other": ("eval", "--student", "student", "--compare", "run", "--out", "run/student/x"),
    "eval in its data": ("eval", "--student", "student", "--data", "data", "--out", "data/scores"),
    "dump in its data": ("dump-teacher", "--out", "data/cache", "WORDS"),
    "dump in the teacher": ("dump-teacher", "--out", "teacher", "WORDS"),
    "dump around the student": ("dump-teacher", "--out", ".", "WORDS"),
    "dump by slurm": ("dump-teacher", "--out", "student/cache", "--launcher", "slurm", "WORDS"),
    "plan in its data": ("plan", "--out", "data/cache", "WORDS"),
    "train in the cache": ("train-student", "--cache", "cache", "--out", "cache/run", "WORDS"),
    "train in the held-out cache": (
        "train-student", "--cache", "cache", "--heldout", "unseen", "--out", "unseen/run", "WORDS",
    ),
    "train in the student": ("train-student", "--cache", "cache", "--out", "student/run", "WORDS"),
    "train over its student": (
        "train-student", "--cache", "cache", "--student", "run", "--out", "run", "WORDS", "student.path=run",
    ),
    "train in another cache": ("train-student", "--cache", "cache", "--out", "second", "WORDS"),
    "ablate in a cache": ("ablate", "--cache", "cache", "--heldout", "unseen", "--out", "unseen/x", "WORDS"),
    "ablate dry": ("ablate", "--cache", "cache", "--heldout", "unseen", "--out", "student", "--dry-run", "WORDS"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_and_has_touched_nothing(place, name, monkeypatch, capsys):
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = list(COMMANDS[name])
    if "WORDS" in words:
        at = words.index("WORDS")
        own = [word for item in words[at + 1 :] for word in ("--set", item)]
        words = [*words[:at], *place.words, *own]
    before = everything(place.root)
    monkeypatch.setattr(sys, "argv", ["tide", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "lie in each other" in said or "lies in the cache" in said, said
    assert "Traceback" not in said
    assert everything(place.root) == before


def test_pages_and_pictures_may_lie_beside_the_cache(place, monkeypatch, capsys):
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(sys, "argv", ["tide", "inspect-cache", "cache", "--report", "page.html", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["report"] == "page.html"
