"""Pulling a cache with the real client from a Hub on the loopback interface."""

import pytest
from hub_programs import NUM_SHARDS, run_program

SHARDS = [f"views-{shard:05d}-of-{NUM_SHARDS:05d}.parquet" for shard in range(NUM_SHARDS)]
HELD = [*(f"data/{name}" for name in SHARDS), "hub.json", "manifest.json", "vocabulary.parquet"]


@pytest.fixture(scope="module")
def pulled(tmp_path_factory):
    """What `hub_programs.pull` saw."""
    return run_program("pull", tmp_path_factory.mktemp("pull"))


def test_exactly_the_named_files_arrive_and_the_commit_is_recorded(pulled):
    whole, commit = pulled["whole"], pulled["first"]
    assert whole["held"] == HELD
    assert sorted(whole["fetched"]) == ["manifest.json", *SHARDS, "vocabulary.parquet"]
    assert pulled["same bytes"]
    assert pulled["record"] == {
        "repository": "me/cache", "commit": commit, "manifest_hash": whole["done"]["manifest_hash"],
    }  # fmt: skip


def test_every_file_is_asked_for_at_the_commit(pulled):
    assert len(pulled["asked for"]) == 2 * (NUM_SHARDS + 2)
    assert all(f"/resolve/{pulled['first']}/" in request for request in pulled["asked for"])


@pytest.mark.parametrize("name", ["tag", "continued"])
def test_a_tag_or_commit_gives_the_old_state_after_the_branch_moved_on(pulled, name):
    assert pulled[name]["held"] == HELD
    assert pulled[name]["done"]["commit"] == pulled["first"]


def test_a_folder_that_holds_the_cache_is_verified_and_nothing_is_fetched(pulled):
    assert pulled["again"]["fetched"] == ["manifest.json"]
    assert pulled["again"]["done"]["downloaded_files"] == 0


def test_what_was_interrupted_continues(pulled):
    assert (pulled["revision"]["error"], pulled["revision"]["held"]) == ("Unavailable", [])
    assert "incomplete: a pull was interrupted; run the same pull-cache" in pulled["opened half"]["message"]
    first, second = pulled["revision"]["fetched"], pulled["continued"]["fetched"]
    assert set(first) & set(second) == {"manifest.json", SHARDS[4]}  # the one that failed
    assert {*first, *second} == {"manifest.json", *SHARDS, "vocabulary.parquet"}
    assert pulled["half moved"]["fetched"] == ["manifest.json", "vocabulary.parquet"]
    assert pulled["half moved"]["held"] == HELD


def test_a_damaged_file_alone_is_fetched_again(pulled):
    assert pulled["damaged"]["fetched"] == ["manifest.json", SHARDS[3]]
    assert pulled["damaged"]["held"] == HELD
    assert pulled["damaged"]["done"]["downloaded_files"] == 1


def test_a_connection_that_breaks_is_taken_up_where_it_broke(pulled):
    assert pulled["cut"]["held"] == HELD
    assert pulled["cut"]["fetched"].count(SHARDS[2]) == 2


@pytest.mark.parametrize(
    "name, error, message, num_fetched",
    [
        ("incomplete", "CacheError", "is incomplete: it holds no manifest.json", 0),
        ("hole", "CacheError", "data/views-00001-of-00006.parquet is missing there", 1),
        ("bent", "CacheError", "is not the file that the manifest names", 1),
        ("liar", "CacheError", "arrived with another size or SHA-256", None),
        ("flood", "CacheError", "sends more than the", None),
        ("long", "CacheError", "sends more than the", None),
        ("wrong", "CacheError", "statistics.t_histogram is", NUM_SHARDS + 2),
        ("escape", "CacheError", "vocabulary.name is '../../escaped.parquet'", 1),
        ("nowhere", "Unavailable", "looking up me/nowhere: not found", 0),
        ("no revision", "Unavailable", "Revision Not Found", 0),
    ],
)
def test_what_is_not_a_sound_cache_is_refused_and_leaves_nothing(pulled, name, error, message, num_fetched):
    result = pulled[name]
    assert (result["error"], result["held"]) == (error, [])
    assert message in result["message"]
    assert num_fetched in (None, len(result["fetched"]))


def test_no_more_bytes_are_written_than_the_manifest_names(pulled):
    assert pulled["most of a flood"]
    assert "sends more than the" in pulled["read from afar"]["message"]


def test_other_things_in_the_folder_are_left_alone(pulled):
    assert pulled["moved on"]["error"] == "CacheMismatch"
    assert pulled["moved on"]["held"] == HELD
    assert pulled["not empty"]["error"] == pulled["my data"]["error"] == "OutputError"
    assert pulled["my data"]["held"] == ["data/mine.parquet"]
    assert pulled["not empty"]["held"] == ["notes.txt"]
