"""Pushing a cache with the real client to a Hub on the loopback interface."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from hub_programs import NUM_SHARDS, TOKEN, assert_without_token, run_program, synthetic_cache
from loopback_hub import Fault, LoopbackHub

SHARDS = [f"data/views-{shard:05d}-of-{NUM_SHARDS:05d}.parquet" for shard in range(NUM_SHARDS)]
COMMITS = [[], SHARDS[:2], SHARDS[2:4], SHARDS[4:], ["README.md", "preview/views.parquet", "vocabulary.parquet"],
           ["manifest.json"]]  # fmt: skip


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What `hub_programs.push` saw; the token is in none of it."""
    return run_program("push", tmp_path_factory.mktemp("push"))


def posts(result: dict, ending: str) -> int:
    return sum(request.startswith("POST") and request.endswith(ending) for request in result["requests"])


def test_shards_go_first_and_the_manifest_last_and_alone(pushed):
    assert pushed["commits"] == COMMITS
    done = pushed["whole"]["done"]
    assert done["tag"] == f"v-{done['manifest_hash'][:12]}"
    assert (done["uploaded_files"], done["files_already_there"]) == (NUM_SHARDS + 4, 0)
    assert pushed["tags"][done["tag"]] == done["commit"]
    assert pushed["private"]


def test_the_card_declares_both_licences_and_both_configs(pushed):
    front = yaml.safe_load(pushed["card"].split("---\n")[1])
    assert front["license"] == ["apache-2.0", "mit"]
    assert [config["config_name"] for config in front["configs"]] == ["default", "preview"]


def test_an_unknown_licence_and_a_damaged_cache_reach_no_hub(pushed):
    for name, error, message in [
        ("unknown licence", "ConfigError", "--data-licence NAME"),
        ("damaged", "CacheError", "views-00003-of-00006.parquet: SHA-256 differs"),
        ("no login", "Unavailable", "hf auth login"),
    ]:
        assert pushed[name]["error"] == error
        assert message in pushed[name]["message"]
        assert pushed[name]["requests"] == []


def test_what_was_interrupted_continues_and_sends_nothing_twice(pushed):
    first, second = pushed["interrupted"], pushed["continued"]
    assert first["error"] == "Unavailable"
    assert "4 of 6 shards are there" in second["said"]
    sent = [r for result in (first, second) for r in result["requests"] if r.startswith("PUT /lfs/")]
    assert len(sent) == len(set(sent)) == NUM_SHARDS + 2  # preview and vocabulary
    assert pushed["its commits"] == COMMITS


def test_the_same_push_again_changes_nothing(pushed):
    again = pushed["again"]
    assert again["done"]["commit"] == pushed["whole"]["done"]["commit"]
    assert again["done"]["uploaded_files"] == posts(again, "/commit/main") == 0


def test_another_cache_is_never_mixed_in(pushed):
    names = ("other cache", "stray", "data set")
    assert [pushed[name]["error"] for name in names] == ["CacheMismatch"] * 3
    assert "holds another cache" in pushed["other cache"]["message"]
    assert "'data/views-00000-of-00001.parquet', which is not of this cache" in pushed["stray"]["message"]
    assert "'a.csv', which is not of this cache" in pushed["data set"]["message"]
    assert [posts(pushed[name], "/preupload/main") for name in names] == [0] * 3


def test_a_tag_is_added_to_a_complete_cache_but_never_moved(pushed):
    assert pushed["tags"]["nightly"] == pushed["whole"]["done"]["commit"]
    assert pushed["taken tag"]["error"] == "CacheMismatch"
    assert "Give another --tag" in pushed["taken tag"]["message"]


def test_a_private_cache_does_not_go_to_a_public_repository(pushed):
    assert pushed["public"]["error"] == "ConfigError"
    assert "is public" in pushed["public"]["message"]


@pytest.mark.parametrize(
    "name, ending, error, code, advice",
    [
        ("401", "/create", "Unavailable", 69, "hf auth login"),
        ("403", "/create", "Unavailable", 69, "write permission"),
        ("quota", "/commit/main", "OutputError", 74, "no room left on the Hub"),
        ("402", "/commit/main", "OutputError", 74, "no room left on the Hub"),
    ],
)
def test_no_login_no_permission_and_a_full_quota_stop_at_once(pushed, name, ending, error, code, advice):
    result = pushed[name]
    assert (result["error"], result["code"], result["waited"]) == (error, code, [])
    assert advice in result["message"]
    assert posts(result, ending) == 1


def test_a_busy_hub_is_waited_for_and_this_is_said(pushed):
    assert pushed["429"]["waited"] == [7, 7]  # its Retry-After
    assert pushed["500"]["waited"] == [2, 4, 8]
    assert "waiting 7 s, then try 2 of 6" in " ".join(pushed["429"]["said"])
    assert pushed["429"]["done"]
    assert pushed["500"]["done"]


def test_a_hub_that_stays_busy_ends_the_push_after_bounded_tries(pushed):
    for name, waited in [("dead", [2, 4, 8, 16, 32]), ("long", [])]:
        assert (pushed[name]["error"], pushed[name]["code"]) == ("TryAgain", 75)
        assert pushed[name]["waited"] == waited
    assert "in 3600 s" in pushed["long"]["message"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(pushed):
    assert pushed["lost answer"]["waited"] == [2]
    assert pushed["commits after a lost answer"] == COMMITS


def test_a_killed_command_is_continued_by_the_same_command(tmp_path):
    root = synthetic_cache(tmp_path / "cache")
    with LoopbackHub() as hub:
        fault = Fault("PUT", "^/lfs/", skip=2, stall=True)
        hub.add_fault(fault)
        command = [sys.executable, "-m", "tide", "push-cache", str(root), "me/cache", "--data-licence", "mit", "--json"]
        options = {"env": {**os.environ, **hub.environment(tmp_path / "home", TOKEN)}, "text": True}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
            assert hub.stalled.wait(60)
            deadline = time.monotonic() + 30
            while len(hub.large) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            process.kill()
            output = "".join(process.communicate(timeout=30))
        arrived = set(hub.large)
        assert len(arrived) == 2
        assert "manifest.json" not in hub.repositories["me/cache"].head.tree
        hub.faults.clear()
        hub.requests.clear()
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, **options)
        assert done.returncode == 0, done.stderr
        sent = {request.split("/")[-1] for request in hub.asked("^PUT /lfs/")}
        assert not sent & arrived
        repository = hub.repositories["me/cache"]
        assert repository.commits[-1].paths == ["manifest.json"]
        assert {path for path in repository.head.tree if path.startswith("data/")} == set(SHARDS)
        assert all((root / path).read_bytes() == repository.head.tree[path].data for path in [*SHARDS, "manifest.json"])
        assert sorted(path.name for path in root.iterdir()) == [
            "data",
            "manifest.json",
            "receipts",
            "vocabulary.parquet",
        ]
        pull = [*command[:3], "pull-cache", "hf://datasets/me/cache", str(tmp_path / "pulled"), "--json"]
        pulled = subprocess.run(pull, capture_output=True, timeout=60, check=False, **options)
        assert pulled.returncode == 0, pulled.stderr
        pushed_as = json.loads(done.stdout)
        assert json.loads(pulled.stdout)["commit"] == pushed_as["commit"] == repository.tags[pushed_as["tag"]]
        assert_without_token(output + done.stdout + done.stderr + pulled.stdout + pulled.stderr, tmp_path)
