"""Names and links that lead elsewhere read and write nothing there; code beside the data is never run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tide.shared.cache import open_cache, read_manifest, verify_cache
from tide.shared.cache.files import file_inside
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.repair import Quarantine, repair_from
from tide.shared.errors import CacheError, TideError

SHARD = "data/views-00000-of-00002.parquet"
NAMES = [
    "../secret", "data/../../secret", "/etc/passwd", "//server/share/x", "\\\\server\\share\\x", "C:\\x", "C:/x", "C:x",
    "data\\x", "data/\nx", "x\n", "\x00", "data/x\x00.parquet", "", ".", "..", "data/.", "./x", "~/x", "$HOME/x",
    "data//x", "data/", "a/b/c/d/e", "x" * 200, "con:", "data/x parquet", "ü", "\u202e", "%2e%2e/x", "file:///etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_plain_is_refused_before_anything_is_opened(tmp_path, name, monkeypatch):
    monkeypatch.setattr(Path, "resolve", lambda *_: pytest.fail("looked at the disk"))
    with pytest.raises(CacheError, match="not a plain relative path"):
        file_inside(tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["shard", "vocabulary"])
def test_a_manifest_that_names_such_a_file_is_refused(make_cache, name, place):
    root = make_cache("none")
    tree = json.loads((root / "manifest.json").read_text())
    (tree["shards"][0] if place == "shard" else tree["vocabulary"])["name"] = name
    (root / "manifest.json").write_bytes(sealed_json(tree))
    copy = shutil.copytree(root, root.with_name("copy"))
    for act in (verify_cache, open_cache, describe_cache, lambda root: repair_from(root, str(copy))):
        with pytest.raises(CacheError, match=r"manifest\.json: "):
            act(root)


@pytest.fixture
def outside(make_cache, tmp_path) -> Path:
    """A sound cache elsewhere, and files that nobody may read."""
    return make_cache("none", name="outside")


LINKS = [SHARD, "data", "manifest.json", "vocabulary.parquet"]


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_links_out_of_the_folder_are_refused(make_cache, outside, name, mode, is_absolute):
    root = make_cache("none")
    shutil.rmtree(root / name) if name == "data" else (root / name).unlink()
    target = outside / name
    (root / name).symlink_to(target if is_absolute else os.path.relpath(target, (root / name).parent))
    with pytest.raises(CacheError, match="link that leads out of the cache folder"):
        verify_cache(root, mode=mode)
    with pytest.raises(CacheError, match="link that leads out of the cache folder"):
        list(open_cache(root))


@pytest.mark.parametrize("name", ["plan.json", "receipts"])
def test_an_incomplete_cache_is_not_looked_at_through_links(make_cache, tmp_path, name):
    root = make_cache("none")
    (root / "manifest.json").unlink()
    secret = tmp_path / "secret"
    if name == "plan.json":
        secret.write_text("not yours")
    else:
        (root / "plan.json").write_text("{}")
        (root / "receipts").rename(secret)
    (root / name).symlink_to(secret)
    with pytest.raises(CacheError) as caught:
        read_manifest(root)
    assert any(text in str(caught.value) for text in ("link that leads out", f"'{name}' is a link"))


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "vocabulary.parquet", "plan.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(make_cache, name):
    root = make_cache("none")
    if name == "plan.json":
        (root / "manifest.json").unlink()
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(CacheError):
        verify_cache(root)


def test_a_loop_of_links_and_a_folder_in_place_of_a_shard(make_cache):
    root = make_cache("none")
    (root / SHARD).unlink()
    (root / SHARD).symlink_to(root / SHARD)
    with pytest.raises(TideError, match=SHARD):
        verify_cache(root)
    (root / SHARD).unlink()
    (root / SHARD).mkdir()
    with pytest.raises(CacheError, match=f"{SHARD}: missing"):
        verify_cache(root)


def test_a_folder_of_links_into_itself_is_allowed(make_cache):
    root = make_cache("none")
    (root / "real").mkdir()
    (root / SHARD).rename(root / "real" / "a")
    (root / SHARD).symlink_to(root / "real" / "a")
    verify_cache(root)


def test_quarantine_moves_nothing_through_a_link(make_cache, tmp_path):
    root = make_cache("none")
    (root / "quarantine").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(CacheError, match="link that leads out"):
        Quarantine(root).take(SHARD)
    assert (root / SHARD).exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


class _Poison:
    def __reduce__(self):
        return (os.system, ("touch poisoned",))


def test_code_and_pickles_beside_the_data_are_neither_run_nor_read(make_cache, tmp_path, monkeypatch):
    """From inside the hostile folder, with every name that an import or a loader might look for."""
    root = make_cache("none")
    folders = (root, root / "data", root / "receipts")
    modules = (
        "sitecustomize",
        "usercustomize",
        "json",
        "numpy",
        "pyarrow",
        "yaml",
        "tide",
        "shared",
        "cache",
        "dataset",
    )
    for folder in folders:
        for name in (*modules, root.name):
            if folder != root / "data":
                (folder / f"{name}.py").write_text("open('poisoned', 'w')")
        for name in ("cache.pkl", "state.pt", "pytorch_model.bin", "dataset_info.pickle"):
            (folder / (f".{name}" if folder.name == "data" else name)).write_bytes(pickle.dumps(_Poison()))
    (root / "config.json").write_text('{"auto_map": {"AutoModel": "tide.Poison"}}')
    program = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "from tide.shared.cache import open_cache\n"
        "from tide.shared.cache.inspect import describe_cache\n"
        "cache = open_cache('.', verify='full')\n"
        "list(cache); cache.vocabulary(); cache.to_datasets(); describe_cache('.')\n"
        "bad = [n for n in opened if n.endswith(('.pkl', '.pt', '.bin', '.pickle')) or 'config.json' in n\n"
        f"       or n.startswith({str(root)!r}) and n.endswith('.py')]\n"
        "sys.exit(f'opened {bad}' if bad else 0)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("poisoned"))
