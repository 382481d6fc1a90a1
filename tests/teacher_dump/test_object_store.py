"""Dumps into an S3 server on the loopback interface: the bytes of a local dump, whatever dies or fails on the way."""

import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from dump_checks import file_hashes, fork, join
from s3_server import KEY, SECRET, S3Server
from tide.shared.cache.files import sha256_bytes
from tide.shared.cache.manifest import Manifest, read_manifest
from tide.shared.cache.receipts import listed_receipts
from tide.shared.cache.store import open_store
from tide.shared.config import RunConfig, WorkersConfig
from tide.shared.errors import CacheError, CacheMismatch, ConfigError, TryAgain, Unavailable
from tide.teacher_dump.claims import Claims
from tide.teacher_dump.dump import dump_teacher, prepare_plan
from tide.teacher_dump.launchers import local
from tide.teacher_dump.plan import read_plan, write_plan
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.status import dump_status
from tiny_runs import tiny_config

pytestmark = [  # of aiohttp's and werkzeug's sockets, which nobody closes before their process ends
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <(socket|asyncio):pytest.PytestUnraisableExceptionWarning"
    ),
]

run_shard = ShardTask.run


def quick(root: Path, **more: object) -> RunConfig:
    """A dump of few shards whose workers notice everything within seconds."""
    values = {"shards__samples_per_shard": 2, "noise__views": 2, "workers__store_patience_s": 20.0}
    return tiny_config(root, **{**values, "workers__lease_s": 6.0, **more})


@pytest.fixture
def config(tiny_root: Path, tmp_path: Path) -> RunConfig:
    return quick(tiny_root, workers__scratch=str(tmp_path / "scratch"))


@pytest.fixture(scope="module")
def expected(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of every file of the same dump into a folder."""
    root = tmp_path_factory.mktemp("expected") / "cache"
    dump_teacher(quick(tiny_root), root)
    return {name: digest for name, digest in file_hashes(root).items() if digest != "folder"}


def objects(url: str) -> dict[str, str]:
    """SHA-256 of every object below a URL, by its name there."""
    fs, base = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    return {key.removeprefix(f"{base}/"): sha256_bytes(fs.cat_file(key)) for key in fs.find(base)}


def num_done(calls: list[str]) -> int:
    """Shards that were uploaded."""
    return len([request for request in calls if request.startswith("PUT") and "/data/views-" in request])


def test_one_worker_writes_the_objects_that_a_folder_holds(config, bucket, s3, expected, tmp_path):
    manifest = dump_teacher(config, f"{bucket}/some/cache")
    assert objects(f"{bucket}/some/cache") == expected
    assert expected["manifest.json"] == sha256_bytes(fsspec.open(f"{bucket}/some/cache/manifest.json").open().read())
    assert num_done(s3.requests) == manifest.totals.shards >= 4
    assert not list((tmp_path / "scratch").glob("*/data/*"))
    status = dump_status(f"{bucket}/some/cache")
    assert (status.state, status.done, status.workers) == ("complete", manifest.totals.shards, ())


def test_requests_per_shard_are_those_that_the_documentation_counts(tiny_root, bucket, s3, expected):
    dump_teacher(quick(tiny_root, workers__lease_s=600.0), f"{bucket}/cache")
    uploads = [i for i, r in enumerate(s3.requests) if r.startswith("PUT") and "/data/views-" in r]
    between = [s3.requests[first + 1 : last + 1] for first, last in itertools.pairwise(uploads)]
    kinds = [sorted(_kind(request) for request in requests) for requests in between]
    assert min(kinds, key=len) == sorted([  # one with a sign of life in it has more
        "HEAD data", "PUT receipts", "HEAD receipts", "PUT workers", "GET claims", "DELETE claims", "GET manifest.json",
        "LIST receipts", "LIST claims", "HEAD claims", "LIST claims", "PUT claims", "GET receipts", "PUT workers",
        "PUT data",
    ])  # fmt: skip


def _kind(request: str) -> str:
    method, path = request.split(" ", 1)
    if "list-type=2" in path:
        return f"LIST {re.search('prefix=cache%2F([a-z]*)', path)[1]}"
    return f"{method} {path.split('/')[3].split('?')[0]}"


def test_two_workers_write_the_same_objects(config, bucket, s3, expected, monkeypatch):
    monkeypatch.setattr(local, "START_METHOD", "fork")

    def run(self, root, shard, progress=lambda tokens: None):
        time.sleep(0.2)  # so that each meets what the other holds
        return run_shard(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", run)
    manifest = dump_teacher(config, f"{bucket}/cache", num_workers=2)
    assert objects(f"{bucket}/cache") == expected
    assert num_done(s3.requests) == manifest.totals.shards  # nobody did a shard that another held


def test_a_worker_killed_while_it_uploads_leaves_nothing_under_a_final_name(config, bucket, s3, expected):
    arrived, go_on = threading.Event(), threading.Event()

    def hold() -> bool:
        arrived.set()
        go_on.wait(60)
        return True

    url = f"{bucket}/cache"
    with s3.failing("^PUT .*/data/views-00002", hold, times=1):
        pid = fork(lambda: dump_teacher(config, url))
        assert arrived.wait(60)
        os.kill(pid, 9)
        assert join(pid) == [-9]
        go_on.set()
    there = objects(url)
    assert {name: digest for name, digest in there.items() if not name.startswith(("claims", "workers"))} == {
        name: expected[name]
        for name in expected
        if name in ("plan.json", "receipts/teacher.json")
        or (name[-len(".parquet") :] == ".parquet" and name[:17] in ("data/views-00000-", "data/views-00001-"))
        or name in ("receipts/00000.json", "receipts/00001.json")
    }
    with pytest.raises(CacheError, match=r"is incomplete: 2 of \d shards done"):
        read_manifest(url)
    s3.requests.clear()
    dump_teacher(config, url)
    assert objects(url) == expected
    assert num_done(s3.requests) == len(listed_receipts(url)) - 2
    assert not list(Path(str(config.workers.scratch)).glob("*/data/*"))  # the dead worker's went, too


def test_a_busy_store_is_asked_again(config, bucket, s3, expected):
    with (
        s3.failing("^PUT .*/data/views-00001", times=3) as upload,
        s3.failing("^GET .*list-type=2.*receipts", times=2) as listing,
        s3.failing("^PUT .*/manifest.json", times=2) as commit,
    ):
        dump_teacher(config, f"{bucket}/cache")
    assert (upload.times, listing.times, commit.times) == (0, 0, 0)
    assert objects(f"{bucket}/cache") == expected


def test_a_store_that_is_gone_ends_the_dump_within_seconds_and_loses_nothing(
    tiny_root, tmp_path, expected, monkeypatch, bucket
):
    dying = S3Server()  # moto keeps objects per process, so another server has them, too
    monkeypatch.setenv("AWS_ENDPOINT_URL", dying.url)
    config = quick(tiny_root, workers__scratch=str(tmp_path / "scratch"), workers__store_patience_s=1.0)
    gone = [0.0]

    def run(self, root, shard, progress=lambda tokens: None):
        if shard == 2:
            dying.close()
            gone[0] = time.monotonic()
        return run_shard(self, root, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ShardTask, "run", run)
        with pytest.raises(TryAgain, match=r"s3://.*: the store is busy or out of reach, after \d s: .*run the same"):
            dump_teacher(config, f"{bucket}/cache")
    assert time.monotonic() - gone[0] < 20
    other = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
    assert listed_receipts(f"{bucket}/cache") == {0, 1}
    dump_teacher(config, f"{bucket}/cache")
    assert objects(f"{bucket}/cache") == expected
    assert num_done(other.requests) == len(listed_receipts(f"{bucket}/cache")) - 2
    other.close()


def test_a_bucket_that_is_not_there_is_named(config, s3):
    with pytest.raises(Unavailable, match=r"s3://no-such-bucket.*there is no such bucket .*; make it first"):
        dump_teacher(config, "s3://no-such-bucket/cache")
    with pytest.raises(Unavailable, match="there is no such bucket"):
        dump_status("s3://no-such-bucket/cache")


def test_wrong_credentials_end_the_dump_before_the_work(config, bucket, s3, monkeypatch):
    monkeypatch.setattr("tide.teacher_dump.dump.make_plan", lambda config: pytest.fail("planned"))
    with s3.checking_credentials(), pytest.raises(Unavailable) as caught:
        dump_teacher(config, f"{bucket}/cache")
    assert "does not accept these credentials" in str(caught.value) or "does not permit it" in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_missing_credentials_name_the_variables(config, bucket, s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(Unavailable, match="no credentials were found .* set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS"):
        dump_teacher(config, f"{bucket}/cache")


def test_a_client_that_is_not_installed_is_named(config, monkeypatch):
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(Unavailable, match=r"pip install 'tide-distill\[s3\]'"):
        dump_teacher(config, "s3://bucket/cache")


def test_credentials_appear_nowhere(config, bucket, s3, capfd):
    with s3.failing("^PUT .*/data/views-00001", times=1):
        dump_teacher(config, f"{bucket}/cache")
    fs, base = fsspec.core.url_to_fs(bucket, skip_instance_cache=True)
    everything = b"".join(fs.cat_file(key) for key in fs.find(base)) + "".join(capfd.readouterr()).encode()
    assert len(everything) > 10_000
    assert SECRET.encode() not in everything
    assert KEY.encode() not in everything
    for address in (f"s3://{KEY}:{SECRET}@bucket/cache", f"s3://bucket/cache?key={SECRET}"):
        with pytest.raises(ConfigError, match="do not belong into an address") as caught:
            dump_teacher(config, address)
        assert SECRET not in str(caught.value)


def test_other_objects_under_the_prefix_are_refused(config, bucket, s3):
    with fsspec.open(f"{bucket}/data/notes.txt", "wb") as file:
        file.write(b"mine")
    with pytest.raises(ConfigError, match=r"holds other objects \('data'\)"):
        dump_teacher(config, bucket)


def test_workers_that_plan_at_once_with_other_settings_are_refused(config, tiny_root, bucket, s3):
    plan = prepare_plan(config, f"{bucket}/cache")
    write_plan(f"{bucket}/cache", plan)  # the same one again
    prepare_plan(quick(tiny_root, noise__seed=1), f"{bucket}/other")
    with pytest.raises(CacheMismatch, match="made another plan"):
        write_plan(f"{bucket}/cache", read_plan(f"{bucket}/other"))


def test_verify_makes_damaged_objects_again_and_nothing_else(config, bucket, s3, expected, tiny_root):
    url = f"{bucket}/cache"
    dump_teacher(config, url)
    fs, base = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    shard = next(key for key in fs.find(f"{base}/data") if "views-00003" in key)
    data = fs.cat_file(shard)
    fs.pipe_file(shard, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    s3.requests.clear()
    with pytest.warns(UserWarning, match="shards 3 are missing or damaged"):
        dump_teacher(config, url, verify=True)
    assert objects(url) == expected
    assert num_done(s3.requests) == 1


def test_a_renewal_under_way_does_not_bring_a_released_claim_back(tmp_path, monkeypatch):
    store = open_store(f"memory://{tmp_path.name}/cache")
    claims, renewing, go_on, renew = Claims(store, WorkersConfig()), threading.Event(), threading.Event(), store.renew
    held = claims.take("00000")
    assert held is not None

    def slow(name: str, data: bytes) -> None:
        renewing.set()
        go_on.wait(30)
        renew(name, data)

    monkeypatch.setattr(store, "renew", slow)
    threads = [threading.Thread(target=held.renew), threading.Thread(target=held.release)]
    threads[0].start()
    assert renewing.wait(30)
    threads[1].start()
    threads[1].join(0.3)  # waits for the renewal, or has removed the claim by now
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert claims.names() == set()
    held.renew()
    assert claims.names() == set()


def test_any_file_system_of_fsspec_will_do(config, expected):
    """One that knows no checksums: what was sent is read back. Here by a rank that makes the plan first."""
    url = f"memory://test-{os.getpid()}/cache"
    dump_teacher(config, url, launcher="env")
    assert objects(url) == expected
    manifest = read_manifest(url)
    assert isinstance(manifest, Manifest)
    assert dump_status(url).done == manifest.totals.shards


@pytest.mark.slow
@pytest.mark.timeout(600)  # six commands, each of which starts Python anew
def test_the_command_line_dumps_looks_and_verifies(config, tiny_root, bucket, s3, expected, tmp_path):
    from tiny_runs import settings

    url = f"{bucket}/cache"
    given = settings(tiny_root, shards__samples_per_shard=2, noise__views=2, workers__store_patience_s=3.0)
    words = [word for item in given for word in ("--set", item)]

    def tide(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tide", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    done = tide("dump-teacher", "--out", url, "--workers", "2", "--json", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache"] == url
    assert objects(url) == expected
    assert json.load(io.StringIO(tide("status", url, "--json").stdout))["state"] == "complete"
    assert json.loads(tide("verify-cache", url, "--json").stdout)["result"] == "sound"
    assert url in tide("inspect-cache", url).stdout
    missing = tide("status", "s3://no-such-bucket/cache")
    assert (missing.returncode, missing.stdout) == (69, "")
    assert "there is no such bucket" in missing.stderr
    refused = tide("repair-cache", url)
    assert refused.returncode == 2
    assert "dump-teacher command with --verify" in refused.stderr
    s3.faults.clear()
