"""A cache with an audit on a loopback Hub: pushed whole, pulled with it or without, opened without it."""

import shutil
from typing import Any

import pytest
from hub_programs import run_program
from tiny_runs import make_cache, tiny_config

AUDITS = [f"audit-{shard:05d}-of-00004.parquet" for shard in range(4)]


@pytest.fixture(scope="module")
def told(tiny_root, tmp_path_factory) -> dict[str, Any]:
    """What `hub_programs.audits` saw."""
    folder = tmp_path_factory.mktemp("audits")
    config = tiny_config(tiny_root, signal__audit_share=0.3, shards__samples_per_shard=2)
    shutil.copytree(make_cache(tiny_root, "audited-for-a-hub", config), folder / "cache")
    return run_program("audits", folder)


def test_audit_files_go_up_before_the_manifest(told):
    assert (
        told["push"]["done"]["uploaded_files"] == 4 + 4 + 5
    )  # shards, audits, and card, preview, vocabulary, plan, manifest
    assert [f"audit/{name}" for name in AUDITS] in told["commits"]
    assert told["commits"][-1] == ["manifest.json"]


def test_a_pull_brings_the_audit_unless_told_otherwise_and_says_which(told):
    without, complete = told["without"], told["with"]
    assert without["done"]["audit"] == "left out"
    assert not [name for name in without["fetched"] if name.startswith("audit")]
    assert not told["held without"]
    assert complete["done"]["audit"] == "checked"
    assert sorted(complete["fetched"]) == [*AUDITS, "manifest.json"]
    assert told["same bytes"] == dict.fromkeys(AUDITS, True)


def test_a_cache_whose_audit_was_left_out_is_not_pushed(told):
    assert told["push without"]["error"] == "CacheError"
    assert "its audit was left out when it was pulled" in told["push without"]["message"]


def test_a_cache_opened_from_afar_is_checked_without_its_audit(told):
    assert told["opened"]["done"] == told["push"]["done"]["manifest_hash"]
    assert not [name for name in told["opened"]["fetched"] if name.startswith("audit")]


def test_a_missing_or_damaged_audit_on_the_hub_is_named(told):
    assert "audit/audit-00001-of-00004.parquet is missing there" in told["hole"]["message"]
    assert told["hole without"]["done"]["audit"] == "left out"
    assert "audit/audit-00001-of-00004.parquet is not the file that the manifest names" in told["bent"]["message"]
