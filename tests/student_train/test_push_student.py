"""Pushing a student with the real client to a Hub on the loopback interface, and reading it back without tide."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_programs import TOKEN, run_program

FILES = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
         "tide_cache.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What `student_hub_programs.push_student` saw; the token is in none of it."""
    script = Path(__file__).parents[1] / "student_hub_programs.py"
    return run_program("push_student", tmp_path_factory.mktemp("push_student"), str(script))


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def requests(result: dict, start: str, ending: str = "") -> list[str]:
    return [r for r in result["requests"] if r.startswith(start) and r.endswith(ending)]


def test_a_student_is_one_commit_and_a_tag_and_names_no_path_of_this_machine(pushed):
    assert pushed["commits"] == [[], FILES]
    done = pushed["whole"]["done"]
    assert pushed["tags"][done["tag"]] == done["commit"]
    assert (done["uploaded_files"], done["files_already_there"]) == (len(FILES), 0)
    assert pushed["private"]
    assert pushed["leaks"] == []


def test_a_pulled_student_gives_the_same_logits_by_tide_and_by_plain_transformers(pushed):
    plain, by_tide, here = (np.array(pushed[name]["logits"]) for name in ("plain", "by tide", "here"))
    assert np.array_equal(by_tide, here)
    assert np.array_equal(plain, by_tide)
    assert pushed["plain"]["class"] == "Qwen3ForCausalLM"
    assert not pushed["plain"]["tide"]
    assert np.abs(np.array(pushed["plain"]["causal"]) - plain).max() > 0.01  # why the card insists on a mask


def test_the_names_are_those_that_dllms_evaluators_look_for_and_auto_classes_refuse(pushed):
    assert pushed["config"]["architectures"] == ["A2DQwen3LMHeadModel"]
    assert pushed["config"]["model_type"] == "a2d-qwen3"
    assert (pushed["config"]["block_size"], pushed["config"]["mask_token_id"]) == (8, 511)
    assert "does not recognize this architecture" in pushed["plain"]["auto"]


def test_the_cards_example_runs_as_it_stands(pushed):
    assert np.array(pushed["plain"]["card"]).shape[-1] == pushed["plain"]["vocabulary"]


def test_the_card_tells_scores_origin_licences_and_cost(pushed):
    card, cache = pushed["card"], pushed["cache"]
    head = front(card)
    assert head["license"] == ["mit", "cc-by-4.0", "apache-2.0"]  # teacher, data, start
    assert head["datasets"] == ["me/cache"]
    assert head["co2_eq_emissions"]["emissions"] == 250
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 41.25
    assert "| gsm8k | score, &#37; | 41.25 | 1.5 | 1,319 |" in card
    assert f"me/cache at {cache['commit']}" in card
    assert cache["manifest_hash"] in card
    assert "bits per byte" in card
    assert "GPU-hours | 3.5" in card
    assert "| Steps | 2 |" in card
    assert "name = kl" in card
    local = pushed["local card"]
    assert "not on the Hub" in local
    assert "datasets" not in front(local)


def test_hostile_text_in_a_card_is_inert(pushed):
    card = pushed["hostile card"]
    head = front(card)
    assert head["license"] == "other"
    assert "\n" not in head["model-index"][0]["results"][0]["dataset"]["name"]
    body = card.split("---\n", 2)[2]
    table = body.split("## How to use it")[0]
    for active in ("<img", "<script", "](", "\x1b", "@all", "**b**", "`c`", "http://"):
        assert active not in table, active
    row = next(line for line in table.splitlines() if "evil" in line)
    assert row.count("|") == 6  # it opens no cell


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("unknown licence", "ConfigError", "--teacher-licence NAME"),
        ("other cache", "CacheMismatch", "was trained from"),
        ("not a student", "DataError", "no student that tide train-student finished"),
        ("revision", "ConfigError", "expected a model of the Hub as owner/name"),
        ("gpu hours", "ConfigError", "--gpu-hours -1.0"),
        ("damaged", "DataError", "model.safetensors is not the file that was written"),
        ("no scores", "DataError", "holds no scores"),
        ("no login", "Unavailable", "hf auth login"),
    ],
)
def test_what_is_not_fit_to_be_published_reaches_no_hub(pushed, name, error, message):
    assert pushed[name]["error"] == error
    assert message in pushed[name]["message"]
    assert pushed[name]["requests"] == []
    assert not pushed["no login needed"]


def test_an_interrupted_push_shows_nothing_and_sends_no_weights_twice(pushed):
    first, second = pushed["interrupted"], pushed["continued"]
    assert first["error"] == "Unavailable"
    assert pushed["shown meanwhile"] == []
    assert len(requests(first, "PUT /lfs/")) == 1
    assert requests(second, "PUT /lfs/") == []
    assert second["done"]["uploaded_files"] == len(FILES)


def test_the_same_push_again_changes_nothing_and_another_card_sends_no_weights(pushed):
    again = pushed["again"]
    assert again["done"]["commit"] == pushed["whole"]["done"]["commit"]
    assert requests(again, "POST", "/commit/main") == []
    assert pushed["other card"]["done"]["uploaded_files"] == 2  # the card, and where the cache lies
    assert requests(pushed["other card"], "PUT /lfs/") == []


@pytest.mark.parametrize(
    ("name", "error", "advice"),
    [
        ("401", "Unavailable", "hf auth login"), ("403", "Unavailable", "write permission"),
        ("quota", "OutputError", "no room left on the Hub"),
    ],
)  # fmt: skip
def test_no_login_no_permission_and_a_full_quota_stop_at_once(pushed, name, error, advice):
    assert (pushed[name]["error"], pushed[name]["waited"]) == (error, [])
    assert advice in pushed[name]["message"]


def test_a_busy_hub_is_waited_for_and_a_lost_answer_is_no_loss(pushed):
    assert pushed["429"]["waited"] == [7, 7]
    assert pushed["500"]["waited"] == [2, 4, 8]
    assert all(pushed[name]["done"]["commit"] for name in ("429", "500", "lost answer"))


def test_weights_of_another_layout_are_never_mixed_in_and_private_stays_private(pushed):
    assert pushed["stray"]["error"] == "CacheMismatch"
    assert "'pytorch_model.bin', weights that are not of this student" in pushed["stray"]["message"]
    assert pushed["public"]["error"] == "ConfigError"


def test_no_message_holds_the_token(pushed):
    assert "<token>" in pushed["401"]["message"] + pushed["403"]["message"]
    assert TOKEN not in json.dumps(pushed)
