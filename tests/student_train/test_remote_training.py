"""Training from a cache on the Hub is training from its folder."""

from hub_programs import run_program


def test_a_student_trained_from_the_hub_is_the_one_trained_from_the_folder(tmp_path):
    found = run_program("train", tmp_path)
    assert found["same"]
    assert sorted(found["fetched"]) == sorted(["manifest.json", *found["shards"], "vocabulary.parquet"])
    assert found["pushed"] == sorted([
        "README.md", "manifest.json", "plan.json", "preview/views.parquet", "vocabulary.parquet",
        *(f"data/{name}" for name in found["shards"]),
    ])  # fmt: skip
    local, remote = found["origins"]
    assert (local["address"], local["commit"]) == (None, None)
    assert remote == {**local, "address": "me/cache", "commit": found["commit"]}
