"""Reading a cache from a Hub on the loopback interface, shard by shard."""

import pytest
from hub_programs import NUM_SHARDS, SAMPLES, VIEWS, run_program


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What `hub_programs.remote` saw."""
    return run_program("remote", tmp_path_factory.mktemp("remote"))


def test_opening_fetches_no_shard_and_reading_the_next_two_besides(read):
    assert read["opened"] == []
    assert read["first rows"] == [0, 1, 2]


def test_rows_fetch_the_shards_they_are_in(read):
    assert read["last row"] == [0, 1, 2, NUM_SHARDS - 1]


@pytest.mark.parametrize("name", ["rows", "iterated", "text", "index"])
def test_rows_index_and_text_are_those_of_the_folder(read, name):
    assert read[name]


def test_it_is_pinned_and_opens_as_datasets(read):
    name, commit = read["address"]
    assert name == f"me/cache@{commit}"
    assert read["datasets"] == NUM_SHARDS * SAMPLES * VIEWS
    assert {"top_probabilities", "tail_mass", "text"} <= set(read["decoded"])


def test_a_file_damaged_in_the_clients_folder_is_fetched_again(read):
    assert read["damaged here"]
    assert read["fetched again"] == 1


def test_no_row_of_a_shard_that_lies_is_read(read):
    before, expected = read["rows before the lie"]
    assert before == expected


@pytest.mark.parametrize("name", ["bad", "bad index", "bad full"])
def test_a_lie_is_named(read, name):
    assert read[name]["error"] == "CacheError"
    assert "views-00004-of-00006.parquet, row" in read[name]["message"]
    assert "chunk_logp: 0.5 is not a finite log-probability" in read[name]["message"]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("nowhere", "Unavailable", "looking up me/nowhere@x: not found"),
        ("no name", "CacheError", "no such folder"),
        ("two revisions", "ConfigError", "leave one of them out"),
        ("incomplete", "CacheError", "is incomplete: it holds no manifest.json"),
    ],
)
def test_what_cannot_be_opened_says_why(read, name, error, message):
    assert read[name]["error"] == error
    assert message in read[name]["message"]
