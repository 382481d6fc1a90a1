"""Checkpoints open as native classes, whole and silently, or not at all with every name that is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tide.shared.errors import ConfigError, DataError
from tide.shared.models import load_model, read_config
from tide.shared.models.a2d import A2DQwen3LMHeadModel
from tide.shared.models.loading import local_folder, snapshot_revision
from tide.shared.models.specs import teacher_block_size, teacher_spec
from tide.shared.tokens import load_tokenizer
from tiny_runs import write_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "student", seed=4)


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_saving_the_golden_checkpoint_gives_its_official_keys_and_bytes(golden, tmp_path):
    load_model(golden / "bd3lm_tiny").save_pretrained(tmp_path)
    official, ours = golden / "bd3lm_tiny" / "model.safetensors", tmp_path / "model.safetensors"
    assert list(load_file(ours)) == list(load_file(official))
    assert ours.read_bytes() == official.read_bytes()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "a2d-qwen3"
    assert saved["architectures"] == ["A2DQwen3LMHeadModel"]
    again = load_model(tmp_path)
    assert isinstance(again, A2DQwen3LMHeadModel)
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_opening_and_saving_a_model_says_nothing(checkpoint, tmp_path, capfd):
    """No progress bars, no `You are using a model of type`: stderr is for tide's own words."""
    load_tokenizer(checkpoint)
    load_model(checkpoint).save_pretrained(tmp_path / "saved")
    assert capfd.readouterr() == ("", "")


def test_a_plain_qwen3_opens_under_its_own_model_type(checkpoint):
    before = load_model(checkpoint).state_dict()
    change_config(checkpoint, model_type="qwen3", architectures=["Qwen3ForCausalLM"], auto_map={"AutoConfig": "x.Y"})
    after = load_model(checkpoint).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_dtype_is_the_one_asked_for(checkpoint):
    assert {p.dtype for p in load_model(checkpoint, dtype="bfloat16").parameters()} == {torch.bfloat16}
    for wrong in ({"dtype": "bf16"}, {"attn_implementation": "eager"}):
        with pytest.raises(ConfigError, match="expected one of"):
            load_model(checkpoint, **wrong)


def test_random_weights_depend_on_the_seed_alone_and_leave_the_generator(tmp_path):
    folder = write_model(tmp_path / "empty", "student", seed=None)
    state = torch.get_rng_state()
    one, same, other = (load_model(folder, random_seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match=r"no \*.safetensors weights"):
        load_model(folder)


def test_missing_unexpected_and_mismatched_weights_are_all_listed(checkpoint):
    def change(weights):
        del weights["model.layers.0.self_attn.q_norm.weight"], weights["model.norm.weight"]
        weights["model.extra.weight"] = torch.zeros(2)
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)

    change_weights(checkpoint, change)
    with pytest.raises(DataError) as caught:
        load_model(checkpoint)
    for part in (
        "missing weights: model.layers.0.self_attn.q_norm.weight, model.norm.weight",
        "unexpected weights: model.extra.weight",
        "mismatched weights: model.layers.1.mlp.up_proj.weight ([3, 32] in the file, [64, 32] by config.json)",
    ):
        assert part in str(caught.value)


def test_of_many_missing_weights_eight_are_named_and_the_rest_counted(checkpoint):
    change_weights(checkpoint, lambda weights: [weights.pop(name) for name in sorted(weights)[1:13]])
    with pytest.raises(DataError, match="and 4 more"):
        load_model(checkpoint)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_weight_file_is_an_error(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=r"model: the weights cannot be loaded .*fetch the checkpoint again"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * 2**20 + "{}", "larger than"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' has no native class in tide; known: Dream, Fast_dLLM_Qwen,"),
        ('{"model_type": "qwen3", "vocab_size": 9}', "lacks hidden_size, num_hidden_layers"),
        ('{"model_type": "qwen3", "vocab_size": "9", "hidden_size": 1, "num_hidden_layers": 1}', "lacks vocab_size"),
    ],
)
def test_a_config_that_is_not_one_is_an_error(checkpoint, text, message):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        load_model(checkpoint)


def test_a_field_of_the_wrong_type_is_an_error(checkpoint):
    change_config(checkpoint, rms_norm_eps="tiny")
    with pytest.raises(DataError, match=r"config\.json is not a valid configuration"):
        load_model(checkpoint)


def test_a_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        local_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no config\.json"):
        read_config(tmp_path)


def test_the_commit_of_a_snapshot_is_the_name_of_its_folder(tmp_path):
    assert snapshot_revision(tmp_path / "models--a--b" / "snapshots" / "c0ffee") == "c0ffee"
    assert snapshot_revision(tmp_path / "teacher") is None


def test_a_plan_downloads_no_weights(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        "tide.shared.models.loading.snapshot_download", lambda *_, **k: asked.update(k) or str(tmp_path)
    )
    local_folder("owner/teacher", "main", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]
    local_folder("owner/teacher", "main")
    assert {"*.json", "*.safetensors"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_the_block_size_is_the_checkpoints_or_else_the_runs():
    config = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 1, "num_hidden_layers": 1}

    def block_size(attention="native", **more):
        return teacher_block_size(config | more, run_block_size=32, attention=attention, where="m")

    assert block_size() == 32
    assert block_size(block_size=4) == 4
    assert block_size(block_size=None) is None
    assert block_size(attention="paper") is None  # the paper calls a masked-diffusion teacher without blocks
    for wrong in (0, -1, "8", True):
        with pytest.raises(DataError, match=r"block_size = .*: expected a positive number or null"):
            block_size(block_size=wrong)


def test_ids_outside_the_vocabulary_are_refused():
    config = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 1, "num_hidden_layers": 1}

    def spec(**ids):
        return teacher_spec(config, **{"mask_id": 7, "eos_id": 8} | ids, block_size=4, attention="native", where="m")

    assert spec().mask_id == 7
    for ids in ({"mask_id": 9}, {"eos_id": 12}, {"mask_id": -1}):
        with pytest.raises(DataError, match="outside the vocabulary of 9 tokens"):
            spec(**ids)
