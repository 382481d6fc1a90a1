"""The plan: made without weights, cut into shards by the settings alone, pinned to data and tokenizers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tide import cli
from tide.shared.config import load_config
from tide.shared.conversations import open_conversations, parse_sources
from tide.shared.errors import CacheError, ConfigError
from tide.shared.tokens import Dropped
from tide.teacher_dump import pairing as pairing_module
from tide.teacher_dump import plan as plan_module
from tide.teacher_dump.cache_size import estimate_size
from tide.teacher_dump.cost import describe_plan
from tide.teacher_dump.dump import prepare_plan
from tide.teacher_dump.pairing import open_pairing
from tide.teacher_dump.plan import Plan, chosen_rows, make_plan, read_plan, write_plan
from tiny_runs import settings, tiny_config, write_model, write_pairs


@pytest.fixture
def without_weights(tmp_path: Path) -> Path:
    """config.json and tokenizers alone."""
    write_model(tmp_path / "teacher", "teacher", seed=None)
    write_model(tmp_path / "student", "student", seed=None)
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def test_a_plan_needs_no_weights_and_says_what_a_dump_would_do(without_weights, monkeypatch, capsys):
    arguments = [text for item in settings(without_weights) for text in ("--set", item)]
    monkeypatch.setattr(sys, "argv", ["tide", "plan", *arguments, "--json", "--out", str(without_weights / "cache")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = json.loads(capsys.readouterr().out)
    cache = without_weights / "cache"
    plan = read_plan(cache).at(load_config(overrides=settings(without_weights)), cache)
    assert said == describe_plan(plan, estimate_size(plan))
    assert said["plan_hash"] == plan.hash
    assert said["samples"] == 8
    assert said["views"] == 3 * 8
    assert said["tokens"] > said["expected_masked_positions"] / 3 > 0
    assert said["expected_token_forwards"] > 0
    low, high = said["estimated_bytes_range"]
    assert 0 < low < said["estimated_bytes"] == sum(said["estimated_bytes_by_column"].values()) < high
    assert [path.name for path in (without_weights / "cache").iterdir()] == ["plan.json"]


def test_a_plan_survives_the_disk(tiny_root, tmp_path):
    config = tiny_config(tiny_root, data__columns={"prompt": "prompt", "response": "response"})
    plan, _ = make_plan(config)
    write_plan(tmp_path, plan)
    again = read_plan(tmp_path)
    assert again == plan
    assert again.hash == plan.hash
    assert again.config.signal == config.signal
    assert again.config.noise == config.noise


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["settings"]["noise"].update(seed=99), lambda tree: tree["samples"].pop(),
        lambda tree: tree["settings"]["noise"].update(seed="many"), lambda tree: tree.update(more=1),
        lambda tree: tree.pop("totals"), lambda tree: tree.update(plan_hash="0" * 64),
    ],
    ids=["a setting", "a sample", "no setting", "a field more", "a field less", "its hash"],
)  # fmt: skip
def test_a_plan_that_was_edited_is_called_edited(tiny_root, tmp_path, edit):
    config = tiny_config(tiny_root)
    prepare_plan(config, tmp_path)
    tree = json.loads((tmp_path / "plan.json").read_text())
    edit(tree)
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    for read in (lambda: read_plan(tmp_path), lambda: prepare_plan(config, tmp_path)):
        with pytest.raises(CacheError, match=r"plan\.json: was edited after it was made"):
            read()


def test_a_plan_is_the_same_written_in_another_way_or_by_an_earlier_tide(tiny_root, tmp_path):
    plan = prepare_plan(tiny_config(tiny_root), tmp_path)
    tree = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(tree, indent=7))
    assert read_plan(tmp_path).hash == plan.hash == tree.pop("plan_hash")
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    assert read_plan(tmp_path).hash == plan.hash


def test_shards_hold_every_sample_once_and_in_order(tiny_root):
    for size in (1, 3, 8, 100):
        plan, _ = make_plan(tiny_config(tiny_root, shards__samples_per_shard=size))
        shards = [plan.shard_samples(shard) for shard in range(plan.num_shards)]
        assert [sample for shard in shards for sample in shard] == list(plan.samples)
        assert {len(shard) for shard in shards[:-1]} <= {size}
        assert 1 <= len(shards[-1]) <= size


def test_where_the_students_weights_lie_is_not_part_of_the_plan(tiny_root, tmp_path):
    """A cache serves every student with this tokenizer."""
    plan, _ = make_plan(tiny_config(tiny_root))
    tokenizer = str(tiny_root / "student")
    elsewhere = {"student.path": str(tmp_path), "student.tokenizer": tokenizer}
    assert make_plan(tiny_config(tiny_root, **elsewhere))[0].hash == plan.hash


def test_an_existing_plan_is_read_and_not_made_again(tiny_root, tmp_path, monkeypatch):
    config = tiny_config(tiny_root)
    made = prepare_plan(config, tmp_path)
    for name in ("open_pairing", "open_conversations"):
        monkeypatch.setattr(plan_module, name, None)
    assert prepare_plan(config, tmp_path) == made


def test_the_hash_of_a_plan_is_computed_once(tiny_root, monkeypatch):
    plan, _ = make_plan(tiny_config(tiny_root))
    calls = []
    monkeypatch.setattr(Plan, "to_json", lambda self: calls.append(1) or {})
    assert plan.hash == plan.hash
    assert len(calls) == 1
    assert plan.config is plan.config


def test_a_limit_takes_the_first_rows_or_draws_them():
    def chosen(**data):
        overrides = [f"data.{name}={value}" for name, value in data.items()]
        return list(chosen_rows(10, load_config(overrides=overrides).data))

    assert chosen() == list(range(10))
    assert chosen(limit=3) == [0, 1, 2]
    assert chosen(limit=99) == list(range(10))
    drawn = chosen(limit=4, sample_seed=1)
    assert drawn == sorted(set(drawn)) != [0, 1, 2, 3]
    assert len(drawn) == 4
    assert chosen(limit=4, sample_seed=1) == drawn != chosen(limit=4, sample_seed=2)


def test_the_two_vocabularies_are_mapped_by_bytes_one_to_one(tiny_root):
    pairing = open_pairing(tiny_config(tiny_root))
    assert pairing.teacher is not None
    known = (pairing.student_id >= 0).nonzero()[0]
    assert len(known) == pairing.num_support == len(set(pairing.student_id[known].tolist())) > 200
    for teacher_id in known:
        student_id = pairing.student_id[teacher_id]
        assert pairing.teacher.token_bytes[teacher_id] == pairing.student.token_bytes[student_id]
        assert pairing.teacher_id()[student_id] == teacher_id
    assert pairing.student_id[pairing.teacher.mask_id] == -1


def test_a_support_below_a_number_keeps_both_sides_ids_below_it(tiny_root):
    pairing = open_pairing(tiny_config(tiny_root, signal__support=300))
    known = (pairing.student_id >= 0).nonzero()[0]
    assert 0 < len(known) < 300
    assert known.max() < 300
    assert pairing.student_id.max() < 300


def test_tokens_a_teacher_must_not_say_are_no_targets_and_no_sample_holds_them(tiny_root):
    """LLaDA2.2's edit controls, say: they are normalised away, so a clean token among them would have probability 0."""
    config = tiny_config(tiny_root)
    plain = open_pairing(config)
    conversations = open_conversations(parse_sources(config.data.source))
    assert plain.spec is not None
    said = plain.encode(conversations[0]).teacher.x_0
    dropped = int(said[-1]) if plain.student_id[said[-1]] >= 0 else int(said[plain.student_id[said] >= 0][-1])
    pairing = replace(plain, spec=replace(plain.spec, drop_ids=(dropped,)))
    assert plain.student_id[dropped] >= 0
    assert pairing.student_id[dropped] == -1
    assert pairing.num_support == plain.num_support - 1
    with pytest.raises(Dropped, match="a token that the teacher must not say"):
        pairing.encode(conversations[0])


def test_vocabularies_without_a_common_token_are_refused_for_token_losses(tiny_root, monkeypatch):
    def nothing(teacher, student, **ids):
        return np.full(len(teacher.tokens), -1, np.int32)

    monkeypatch.setattr(pairing_module, "student_ids_of_teacher", nothing)
    with pytest.raises(ConfigError, match=r"share no token there.*use signal.kind=chunk"):
        open_pairing(tiny_config(tiny_root))
    open_pairing(tiny_config(tiny_root, signal__kind="chunk"))


def test_the_real_vocabularies_bound_every_id(tmp_path):
    """Qwen3's tokenizer with an added mask against a Ling vocabulary with LLaDA2's special ids."""
    tokenizers = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
    if not tokenizers.is_dir():
        pytest.skip(f"{tokenizers} is absent: it does not ship with the project")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    config = {"model_type": "a2d-qwen3", "vocab_size": 157184, "hidden_size": 8, "num_hidden_layers": 1}
    (teacher / "config.json").write_text(json.dumps(config))
    write_pairs(tmp_path / "pairs.jsonl", 3)
    overrides = {
        "data.source": tmp_path / "pairs.jsonl", "data.max_length": 96, "student.path": tokenizers / "qwen3",
        "student.mask_token": "<|mask|>", "teacher.path": teacher, "teacher.tokenizer": tokenizers / "llada2-shaped",
    }  # fmt: skip
    plan, pairing = make_plan(load_config(overrides=[f"{k}={v}" for k, v in overrides.items()]))
    assert plan.student["vocab_size"] == plan.student["mask_id"] + 1 == 151670
    assert plan.teacher is not None
    assert plan.teacher["spec"]["mask_id"] == 156895
    assert pairing.student_id.max() < 151670
    assert pairing.student_id[156895] == -1
    assert len(pairing.student_id) == 157184


def test_more_shards_than_a_manifest_describes_are_refused_at_once(tiny_root, monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_SHARDS", 3)
    make_plan(tiny_config(tiny_root, shards__samples_per_shard=3))
    with pytest.raises(ConfigError, match=r"shards\.samples_per_shard = 2: 8 samples make 4 shards, .* up to 3; make"):
        make_plan(tiny_config(tiny_root, shards__samples_per_shard=2))
