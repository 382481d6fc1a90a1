"""`data.alignment=tokenkit`: a stand-in of the package (tests/stand_ins) is asked, pinned, named and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dump_checks import file_hashes
from rendered_cards import Rendered
from tide.shared.cache import open_cache
from tide.shared.cache.card import card_text
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.merge import merge_caches
from tide.shared.cache.report import report
from tide.shared.config import RunConfig
from tide.shared.errors import CacheMismatch, ConfigError, DataError, Unavailable
from tide.shared.tokenkit_adapter import tokenkit_version
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import make_plan, read_plan
from tiny_runs import hybrid, make_cache, tiny_config


def by_tokenkit(tiny_root: Path, **more: object) -> RunConfig:
    return hybrid(tiny_root, data__alignment="tokenkit", **more)


def test_a_cache_of_tokenkits_chunks_is_tides_own_under_another_plan(install_tokenkit, tiny_root, tmp_path):
    install_tokenkit()
    own, root = make_cache(tiny_root, "own chunks", hybrid(tiny_root)), tmp_path / "cache"
    dump_teacher(by_tokenkit(tiny_root), root)
    caches = open_cache(own), open_cache(root)
    rows = [list(cache) for cache in caches]
    assert len(rows[0]) == len(rows[1]) == 24
    for mine, theirs in zip(*rows, strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            np.testing.assert_array_equal(value, vars(theirs)[name], err_msg=name)
    assert caches[0].manifest.plan_hash != caches[1].manifest.plan_hash
    assert "alignment" not in read_plan(own).settings["data"]
    assert "alignment" not in json.loads((own / "manifest.json").read_text())["signal"]


def test_plan_manifest_report_and_card_name_the_tokenkit_of_a_cache(install_tokenkit, tiny_root, tmp_path):
    install_tokenkit()
    root = tmp_path / "cache"
    dump_teacher(by_tokenkit(tiny_root), root)
    name = tokenkit_version()
    assert name.startswith("tokenkit 0.0.1, align.py ")
    plan, manifest = read_plan(root), open_cache(root).manifest
    assert plan.settings["data"]["alignment"] == "tokenkit"
    assert plan.teacher is not None
    assert plan.teacher["alignment"] == manifest.signal.alignment == name
    assert f"chunks found by {name}" in " ".join(report(describe_cache(root)).plain.split())
    cells = Rendered(card_text(manifest).split("---\n", 2)[2]).cells
    assert dict(zip(cells[::2], cells[1::2], strict=True))["Chunks found by"] == name


def test_a_finished_cache_needs_no_tokenkit(install_tokenkit, tiny_root, tmp_path):
    file, root = install_tokenkit(), tmp_path / "cache"
    config = by_tokenkit(tiny_root, train__steps=2)
    dump_teacher(config, root)
    shutil.rmtree(file.parent)
    install_tokenkit(code=None)
    with pytest.raises(Unavailable):
        tokenkit_version()
    open_cache(root, verify="full")
    train_student(config, str(root), tmp_path / "run")


def test_caches_of_different_alignments_are_not_merged(install_tokenkit, tiny_root, tmp_path):
    install_tokenkit()
    own = make_cache(tiny_root, "own chunks", hybrid(tiny_root))
    dump_teacher(by_tokenkit(tiny_root, noise__seed=7), tmp_path / "cache")
    with pytest.raises(CacheMismatch, match=r"signal\.alignment: None and 'tokenkit 0\.0\.1"):
        merge_caches([own, tmp_path / "cache"], tmp_path / "out")


@pytest.mark.parametrize("change", ["another align.py", "another version", "tide's own chunks"])
def test_a_dump_goes_on_with_the_planned_tokenkit_alone(install_tokenkit, tiny_root, tmp_path, change):
    install_tokenkit()
    root = tmp_path / "cache"
    dump_teacher(by_tokenkit(tiny_root), root)
    for name in ("manifest.json", "receipts/00000.json"):
        (root / name).unlink()
    before, config = file_hashes(root), by_tokenkit(tiny_root)
    if change == "another align.py":
        install_tokenkit("# a later commit")
        said = r"tokenkit changed since .*teacher\.alignment: plan 'tokenkit 0\.0\.1, align\.py .*Restore"
    elif change == "another version":
        install_tokenkit(version="0.0.2")
        said = r"teacher\.alignment: plan 'tokenkit 0\.0\.1, .* now 'tokenkit 0\.0\.2"
    else:
        config, said = hybrid(tiny_root), r"data\.alignment: plan 'tokenkit', now nothing"
    with pytest.raises(CacheMismatch, match=said):
        dump_teacher(config, root)
    after = {name: text for name, text in file_hashes(root).items() if not name.startswith("workers")}
    assert after == before
    install_tokenkit()
    dump_teacher(by_tokenkit(tiny_root), root)
    assert (root / "manifest.json").exists()


def test_the_namesake_is_refused_before_anything_is_written(install_tokenkit, tiny_root, tmp_path):
    install_tokenkit(code=None, version="0.1.3")
    with pytest.raises(
        Unavailable, match=r"the installed package tokenkit 0\.1\.3 is not it.*pip uninstall tokenkit; pip"
    ):
        dump_teacher(by_tokenkit(tiny_root), tmp_path / "cache")
    assert not (tmp_path / "cache" / "plan.json").exists()
    install_tokenkit("del get_alignment_indices", version="0.1.3")
    with pytest.raises(Unavailable, match=r"the installed package tokenkit 0\.1\.3 is not it"):
        make_plan(by_tokenkit(tiny_root))


def test_a_missing_tokenkit_is_refused_with_the_line_that_installs_it(tiny_root):
    with pytest.raises(Unavailable, match=r"not installed.*pip install --no-deps git\+https://github\.com/bminixhofer"):
        make_plan(by_tokenkit(tiny_root))


MASKS_FIRST = """
def get_alignment_indices(tokens_t, tokens_s, mask_t, mask_s, tokenizer_t, tokenizer_s, check=True):
    raise AssertionError("never called")
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (MASKS_FIRST, "TypeError: .*missing 2 required positional arguments"),
        ("def get_alignment_indices(*tokens):\n    return [(0, 1, 0, 1)], [], [], [], []", r"got \[\[0, 1, 0, 1\]\]"),
        ("def get_alignment_indices(*tokens):\n    return [(0, 1, 0, 2)], [], [], [], []", "pairs different bytes"),
        ("def get_alignment_indices(*tokens):\n    return {}", "KeyError: 0"),
    ],
)  # fmt: skip
def test_a_tokenkit_that_answers_otherwise_is_refused(install_tokenkit, tiny_root, code, said):
    install_tokenkit(code)
    with pytest.raises(
        Unavailable, match=f"(?s)answers otherwise than tide was written for.*{said}.*Install another commit"
    ):
        make_plan(by_tokenkit(tiny_root))


def test_where_nothing_is_aligned_the_setting_is_refused(install_tokenkit, tiny_root):
    install_tokenkit()
    with pytest.raises(ConfigError, match=r"no effect with teacher\.see = student"):
        make_plan(tiny_config(tiny_root, "kl", shared=True, data__alignment="tokenkit"))
    with pytest.raises(ConfigError, match="no effect with no teacher"):
        make_plan(tiny_config(tiny_root, "ce", teacher__path="none", data__alignment="tokenkit"))


WRONG = """
_right = get_alignment_indices
def get_alignment_indices(*arguments):
    if "yes" in "".join(arguments[0]):
        {then}
    return _right(*arguments)
"""


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("assert arguments[0] == arguments[1], 'not the same text'", "tokenkit cannot align the answer"),
        ("return [(0, 1, 0, len(arguments[1]))], 0, 0, 0, 0", "tokenkit pairs different bytes"),
        ("return [(1, 2, 1, 2), (0, 1, 0, 1)], 0, 0, 0, 0", "tokenkit pairs tokens out of order"),
        ("return [(0, 99, 0, 99)], 0, 0, 0, 0", "tokenkit pairs tokens out of order"),
    ],
)  # fmt: skip
def test_an_answer_that_tokenkit_pairs_wrongly_is_left_out_and_counted(install_tokenkit, tiny_root, then, reason):
    install_tokenkit(WRONG.format(then=then))
    plan, _ = make_plan(by_tokenkit(tiny_root))
    assert plan.dropped == {reason: 1}
    assert len(plan.samples) == 7
    assert plan.sentences()[0] == f"1 of 8 samples are left out ({reason}: 1)"


def test_a_tokenkit_that_aligns_nothing_makes_no_plan(install_tokenkit, tiny_root, monkeypatch):
    install_tokenkit("def get_alignment_indices(*arguments):\n    raise IndexError")
    monkeypatch.setattr("tide.teacher_dump.pairing.tokenkit_version", lambda: "tokenkit")
    with pytest.raises(DataError, match="no usable conversation .tokenkit cannot align the answer: 8"):
        make_plan(by_tokenkit(tiny_root))
