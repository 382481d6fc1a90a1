"""Other people's tools read what we write: `datasets` from a Hub, DuckDB and polars from disk."""

import pytest
from hub_programs import run_program
from tide.shared.cache import open_cache


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What `hub_programs.load_datasets` saw."""
    return run_program("load_datasets", tmp_path_factory.mktemp("datasets"))


def test_load_dataset_opens_every_config_streamed_and_not(loaded):
    assert loaded["names"] == ["default", "preview"]
    for config in loaded["names"]:
        assert loaded[config]["same"]
        assert loaded[config]["ids"] == loaded["expected"]
    assert loaded["unnamed"] == len(loaded["expected"])  # without a name: the data, not the preview
    assert {"x_0", "masked", "top_ids", "log_tail_2.0"} <= set(loaded["default"]["columns"])
    assert {"prompt", "response", "teacher"} <= set(loaded["preview"]["columns"])


@pytest.mark.parametrize("kind", ["chunk", "topk"])
def test_duckdb_reads_every_value(make_cache, kind):
    duckdb = pytest.importorskip("duckdb")
    cache = open_cache(make_cache(kind))
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT * FROM read_parquet('{cache.root}/data/*.parquet')").fetchall()
        names = [column[0] for column in connection.description]
    assert_rows([dict(zip(names, row, strict=True)) for row in found], cache)


@pytest.mark.parametrize("kind", ["chunk", "topk"])
def test_polars_reads_every_value(make_cache, kind):
    polars = pytest.importorskip("polars")
    cache = open_cache(make_cache(kind))
    assert_rows(polars.read_parquet(f"{cache.root}/data/*.parquet").to_dicts(), cache)


def assert_rows(found, cache):
    assert len(found) == len(cache)
    for row, view in zip(found, cache, strict=True):
        assert (row["sample_id"], row["view"], row["t"]) == (view.sample_id, view.view, view.t)
        names = ["x_0", "masked", "chunk_logp"]
        names += ["target_position", "num_top", "top_ids", "top_logp"] if "top_ids" in row else []
        assert [length for length in row["chunk_len"] if length] == view.chunk_len.tolist()
        for name in names:
            assert row[name] == getattr(view, name).tolist(), name
        for number, temperature in enumerate(cache.manifest.signal.temperatures if "top_ids" in row else ()):
            assert row[f"log_tail_{temperature}"] == view.log_tail[:, number].tolist()
