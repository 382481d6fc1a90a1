"""Caches in an object store, read from where they lie: the rows of the folder, each shard fetched once and whole."""

import pickle
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import synthetic_caches
from tide.shared.cache import Cache, open_cache, verify_shards
from tide.shared.cache import remote as remote_module
from tide.shared.cache import verify as verify_module
from tide.shared.cache.checks import SampleOrder
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.manifest import read_manifest
from tide.shared.cache.reader import verify_anywhere
from tide.shared.cache.remote import RemoteCache
from tide.shared.config import ShardCacheConfig
from tide.shared.errors import CacheError, ConfigError

NUM_SHARDS, SAMPLES, VIEWS = 6, 2, 3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A synthetic cache in a folder."""
    root, layout = tmp_path_factory.mktemp("local") / "cache", synthetic_caches.make_layout()
    rows = [synthetic_caches.make_rows(layout, samples=SAMPLES, views=VIEWS, seed=n) for n in range(NUM_SHARDS)]
    receipts = [synthetic_caches.write(root, r, layout, n, NUM_SHARDS) for n, r in enumerate(rows)]
    synthetic_caches.finish(root, layout, receipts)
    return open_cache(root)


@pytest.fixture
def url(local: Cache, bucket: str, s3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same cache in a bucket; shards are checked in this process, which is faster than in children."""
    fs, base = fsspec.core.url_to_fs(f"{bucket}/cache", skip_instance_cache=True)
    fs.put(f"{local.root}/", f"{base}/", recursive=True)
    monkeypatch.setattr(
        remote_module, "verify_shard",
        lambda root, shard: verify_shards.check_pages(Path(root), read_manifest(root), shard, SampleOrder()),
    )  # fmt: skip
    s3.requests.clear()
    return f"{bucket}/cache"


def flip(url: str, name: str, at: int = 200) -> None:
    """Damage one byte of an object."""
    fs, base = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    data = fs.cat_file(f"{base}/{name}")
    fs.pipe_file(f"{base}/{name}", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def same(ours, theirs) -> bool:
    return [str(vars(row)) for row in ours] == [str(vars(row)) for row in theirs]


def settled() -> None:
    """Wait for shards that are fetched ahead."""
    for thread in threading.enumerate():
        if thread.name.endswith("(_fetch_into)"):
            thread.join(30)


def gets(s3) -> list[str]:
    """Names of the files that were fetched, once per request."""
    return sorted(r.rsplit("/", 1)[1].split("?")[0] for r in s3.asked("^GET .*(data/views|vocabulary)"))


def test_rows_are_those_of_the_folder_and_each_shard_is_one_request(local, url, s3):
    cache = open_cache(url)
    assert isinstance(cache, RemoteCache)
    assert len(s3.requests) <= 6  # the manifest, two listings; one of them empty
    assert not gets(s3)
    rows = cache.rows([0, 1])
    settled()
    assert [name[:11] for name in gets(s3)] == ["views-00000", "views-00001", "views-00002"]
    assert same(rows, local.rows([0, 1]))
    last = [len(local) - 1, 3, 0]
    assert same(cache.rows(last), local.rows(last))
    assert same(list(cache), list(local))
    assert all(np.array_equal(a, b) for a, b in zip(
        vars(cache.index()).values(), vars(local.index()).values(), strict=True))  # fmt: skip
    assert cache.vocabulary().decode(rows[0].x_0) == local.vocabulary().decode(rows[0].x_0)
    settled()
    assert gets(s3) == sorted([*(Path(s.name).name for s in local.manifest.shards), "vocabulary.parquet"])
    copy = pickle.loads(pickle.dumps(cache))
    assert same(copy.rows([5]), local.rows([5]))
    assert same(open_cache(url).rows([7]), local.rows([7]))
    settled()
    assert len(gets(s3)) == NUM_SHARDS + 1  # everything was on this machine


def test_a_copy_of_the_cache_elsewhere_is_not_fetched_again(local, url, s3, bucket):
    list(open_cache(url))
    settled()
    fs, base = fsspec.core.url_to_fs(f"{bucket}/moved", skip_instance_cache=True)
    fs.put(f"{local.root}/", f"{base}/", recursive=True)
    s3.requests.clear()
    assert same(list(open_cache(f"{bucket}/moved")), list(local))
    settled()
    assert gets(s3) == []


def test_a_flipped_byte_is_found_and_its_shard_named(url, s3):
    flip(url, "data/views-00004-of-00006.parquet")
    s3.requests.clear()
    with pytest.raises(CacheError) as caught:
        verify_anywhere(url)
    assert f"{url}: data/views-00004-of-00006.parquet arrived twice with another" in str(caught.value)
    assert "Run its dump-teacher command with --verify" in str(caught.value)
    assert len([name for name in gets(s3) if "00004" in name]) == 2
    assert len(open_cache(url).rows([0])) == 1  # the others can be read


def test_a_sound_cache_is_called_so(url):
    report = verify_anywhere(url)
    assert (report.root, report.mode, report.shards) == (url, "full", NUM_SHARDS)


def test_all_shards_are_checked_once_by_a_user_and_their_hashes_always(local, url, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    looks = []
    check, check_one = verify_module._check_in_child, remote_module.verify_shard
    monkeypatch.setattr(verify_module, "_check_in_child", lambda *a, **k: (looks.append("all"), check(*a, **k)))
    monkeypatch.setattr(remote_module, "verify_shard", lambda *a: (looks.append("one"), check_one(*a)))
    open_cache(url).rows([0])
    settled()
    assert set(looks) == {"one"}, "what has not passed as a whole is looked at again"
    open_cache(url).index()
    assert looks.pop() == "all"
    looks.clear()
    reader = open_cache(url)
    index = reader.index()
    assert same(list(open_cache(url)), list(local))
    settled()
    assert looks == []
    assert len(index) == len(local)

    blob = (Path(reader.root) / local.manifest.shards[2].name).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    s3.requests.clear()
    assert same(list(open_cache(url)), list(local))
    settled()
    assert [name[:11] for name in gets(s3)] == ["views-00002"], "its hash was compared, and it was fetched again"
    monkeypatch.setattr("tide.shared.cache.trust.__version__", "the next one")
    for _ in range(2):
        open_cache(url).index()
    assert looks == ["all"], "another version of tide looks for itself, once"


def test_missing_extra_and_resized_objects_are_named_before_anything_is_fetched(url, s3):
    fs, base = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    name = f"{base}/data/views-00001-of-00006.parquet"
    data = fs.cat_file(name)
    fs.pipe_file(f"{base}/data/extra.parquet", b"x")
    with pytest.raises(CacheError, match=r"data/extra.parquet: the manifest does not name this object"):
        open_cache(url)
    fs.rm_file(f"{base}/data/extra.parquet")
    fs.pipe_file(name, data[:-1])
    with pytest.raises(CacheError, match=r"views-00001-of-00006.parquet: [\d,]+ bytes, the manifest says"):
        open_cache(url)
    fs.rm_file(name)
    with pytest.raises(CacheError, match=r"views-00001-of-00006.parquet: missing, the manifest says"):
        open_cache(url)
    fs.rm_file(f"{base}/manifest.json")
    with pytest.raises(CacheError, match="is not a tide cache: it holds neither manifest.json nor plan.json"):
        open_cache(url)
    with pytest.raises(ConfigError, match="an object store has no revision"):
        open_cache(url, revision="main")


def test_a_description_fetches_no_more_than_the_sample(local, url, s3):
    ours, theirs = describe_cache(url), describe_cache(local.root)
    settled()
    assert ours["cache"] == url
    assert {**ours, "cache": ""} == {**theirs, "cache": ""}
    assert len(gets(s3)) <= 4


def test_reading_a_cache_larger_than_the_limit_keeps_to_the_limit(local, url, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "HELD_SHARDS", 2)
    largest = max(shard.bytes for shard in local.manifest.shards)
    config = ShardCacheConfig(str(tmp_path / "shards"), 4.5 * largest / 1e9)
    seen = []

    cache = open_cache(url, shard_cache=config)
    for number, row in enumerate(cache):
        assert str(vars(row)) == str(vars(local[number]))
        settled()
        seen.append(sum(path.stat().st_size for path in (tmp_path / "shards" / "blobs").iterdir()))
    assert max(seen) <= 4.5 * largest < local.manifest.totals.bytes
    assert len(gets(s3)) == NUM_SHARDS
