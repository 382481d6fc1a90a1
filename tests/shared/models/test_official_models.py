"""Every architecture in its official layout: golden logits, official names written back, no code of a checkpoint."""

import json

import numpy as np
import pytest
import torch
from official_models import CONFIGS, naive_logits, spec_of, write_official
from safetensors.torch import load_file, save_file
from tide.shared.errors import ConfigError, DataError
from tide.shared.models import load_model
from tide.shared.models.specs import (
    FAMILIES,
    family_of,
    outside_recommended_t,
    published_mask_id,
    require_published_ids,
    resolve,
    teacher_block_size,
)
from transformers.integrations import moe

VOCAB = 320
KEYS = {
    "llada2": ("model.word_embeddings.weight", "model.layers.1.mlp.experts.7.gate_proj.weight"),
    "wedlm-8b": ("model.layers.0.self_attn.q_norm.weight", "lm_head.weight"),
    "wedlm-7b": ("model.layers.0.self_attn.q_proj.bias", "lm_head.weight"),
    "sdar": ("model.layers.1.self_attn.k_norm.weight", "lm_head.weight"),
    "dream": ("model.layers.0.self_attn.v_proj.bias", "lm_head.weight"),
    "fast-dllm": ("model.layers.0.self_attn.k_proj.bias", "lm_head.weight"),
    "llada": ("model.transformer.blocks.1.ff_out.weight", "model.transformer.ff_out.weight"),
    "bd3lm": ("model.layers.0.self_attn.q_norm.weight", "model.norm.weight"),
}
ARCHITECTURES = {
    "llada2": "LLaDA2MoeModelLM", "wedlm-8b": "WeDLMForCausalLM", "wedlm-7b": "WeDLMForCausalLM",
    "sdar": "SDARForCausalLM", "dream": "DreamModel", "fast-dllm": "Fast_dLLM_QwenForCausalLM",
    "llada": "LLaDAModelLM", "bd3lm": "A2DQwen3LMHeadModel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "attention", "name"),
    [
        ("llada2_tiny", "native", "logits_block"),
        ("wedlm_tiny", "native", "logits_native"),
        ("wedlm_tiny", "paper", "logits_paper"),
        ("bd3lm_tiny", "native", "logits"),
    ],
)
def test_golden_logits_of_the_official_classes(golden, folder, attention, name):
    expected = np.load(golden / folder / "expected.npz")
    model = load_model(golden / folder)
    config = json.loads((golden / folder / "config.json").read_text())
    spec = spec_of(golden / folder, attention, mask_id=int(expected["mask_id"]), eos_id=config["eos_token_id"])
    spec = type(spec)(**{**vars(spec), "block_size": int(expected["block_size"])})
    for ids, masked, logits in zip(expected["ids"], expected["masked"], expected[name], strict=True):
        found = naive_logits(model, spec, ids, masked)
        torch.testing.assert_close(found, torch.from_numpy(logits).double(), atol=1e-5, rtol=0)


def test_golden_logits_of_llada2_without_blocks_and_with_padding(golden):
    """As the paper calls it: the noised sequence alone, everything sees everything that is not padding."""
    expected = np.load(golden / "llada2_tiny" / "expected.npz")
    model = load_model(golden / "llada2_tiny")
    spec = spec_of(golden / "llada2_tiny", "paper", mask_id=int(expected["mask_id"]), eos_id=318)
    assert spec.block_size is None
    assert expected["pad"].any()
    for ids, masked, pad, logits in zip(
        *(expected[name] for name in ("ids", "masked", "pad", "logits_bidirectional")), strict=True
    ):
        found = naive_logits(model, spec, ids[~pad], masked[~pad])
        torch.testing.assert_close(found, torch.from_numpy(logits[~pad]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("folder", ["llada2_tiny", "wedlm_tiny", "bd3lm_tiny"])
def test_saving_a_golden_checkpoint_gives_its_official_bytes(golden, folder, tmp_path):
    load_model(golden / folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (golden / folder / "model.safetensors").read_bytes()
    official, saved = (json.loads((place / "config.json").read_text()) for place in (golden / folder, tmp_path))
    # what tells the checkpoint apart is written as the official class reads it; auto_map would point to absent code
    for field, value in official.items():
        if field not in ("auto_map", "transformers_version", "layer_types"):
            assert saved.get(field) == value, field
    assert "auto_map" not in saved
    assert "rope_parameters" not in saved


@pytest.mark.parametrize("name", CONFIGS)
def test_a_random_checkpoint_survives_its_official_layout(name, tmp_path):
    folder = write_official(tmp_path / "first", name, vocab_size=VOCAB)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == CONFIGS[name]["model_type"]
    assert saved["architectures"] == [ARCHITECTURES[name]]
    keys = load_file(folder / "model.safetensors").keys()
    assert keys >= set(KEYS[name])
    model = load_model(folder)
    model.save_pretrained(tmp_path / "second")
    again = load_file(tmp_path / "second" / "model.safetensors")
    first = load_file(folder / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)
    for field, value in CONFIGS[name].items():
        if field != "head_dim":
            assert saved.get(field) == value, field


def test_experts_run_as_grouped_products(tmp_path, monkeypatch):
    model = load_model(write_official(tmp_path, "llada2", vocab_size=VOCAB))
    calls = []
    original = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *args, **more: calls.append(1) or original(*args, **more)
    )
    ids = torch.arange(12)[None]
    everything = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with torch.no_grad():
        grouped = model(input_ids=ids, attention_mask=everything).logits
        assert len(calls) == model.config.num_hidden_layers - 1
        model.set_experts_implementation("eager")
        one_by_one = model(input_ids=ids, attention_mask=everything).logits
    assert len(calls) == model.config.num_hidden_layers - 1
    torch.testing.assert_close(grouped, one_by_one, atol=1e-5, rtol=0)


def test_the_routers_bias_stays_float32_in_half_precision(tmp_path):
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    model = load_model(folder, dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, stored)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_missing_and_unexpected_weights_of_experts_are_named(tmp_path):
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.46.extra.weight"] = weights["model.norm.weight"].clone()
    del weights["model.layers.1.mlp.gate.expert_bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"missing weights: .*e_score_correction_bias.*unexpected weights: .*46.extra"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("score_function", "softmax"), ("use_bias", True), ("use_qk_norm", False)]
)
def test_a_switch_that_is_not_computed_is_refused(tmp_path, field, value):
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(DataError, match=rf"not a valid configuration.*{field}"):
        load_model(folder)


PUBLISHED = {  # fields of the real config.json; parameters; tensors of the native class
    "llada2": (
        {
            "vocab_size": 157184, "num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5120,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4,
            "rope_theta": 600000, "rope_scaling": None, "max_position_embeddings": 16384, "router_dtype": "fp32",
        },
        16_255_638_528, 299,
    ),
    "wedlm-8b": (
        {
            "vocab_size": 151936, "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mask_token_id": None,
        },
        8_190_735_360, 399,
    ),
    "bd3lm": (
        {
            "vocab_size": 151936, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        },
        596_049_920, 311,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
    """No memory is touched. 16.256, 8.191 and 0.596 billion; biases of routers are buffers and come on top."""
    fields, num_parameters, num_tensors = PUBLISHED[name]
    described = CONFIGS[name] | fields
    family = family_of(described, name)
    config = resolve(family.config_class).from_dict({k: v for k, v in described.items() if k != "model_type"})
    with torch.device("meta"):
        model = resolve(family.model_class)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_code_of_a_checkpoint_never_runs(name, tmp_path):
    """A trap in every file that auto_map could name."""
    folder = write_official(tmp_path / "model", name, vocab_size=VOCAB)
    sprung = tmp_path / "sprung"
    for stem in ("modeling", "configuration", "tokenization"):
        (folder / f"{stem}_trap.py").write_text(f"open({str(sprung)!r}, 'w').write('sprung')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_trap.Trap", "AutoModel": "modeling_trap.Trap",
        "AutoModelForCausalLM": "modeling_trap.Trap", "AutoTokenizer": ["tokenization_trap.Trap", None],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder).save_pretrained(tmp_path / "saved")
    assert not sprung.exists()
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_block_sizes_of_the_families():
    def block_size(name: str, attention: str = "native", **more: object) -> int | None:
        config = {key: value for key, value in CONFIGS[name].items() if key not in ("block_size", "bd_size")}
        config |= {"vocab_size": VOCAB, **more}
        return teacher_block_size(config, run_block_size=64, attention=attention, where="m")  # type: ignore[arg-type]

    native = {name: block_size(name) for name in CONFIGS}
    assert native == {
        "llada2": 32, "wedlm-8b": 32, "wedlm-7b": 32, "sdar": 4, "dream": None, "fast-dllm": 32, "llada": None,
        "bd3lm": 64,
    }  # fmt: skip
    assert block_size("llada2", "paper") is None
    assert block_size("wedlm-8b", "paper") == 32
    assert block_size("fast-dllm", bd_size=16) == 16
    assert block_size("sdar", block_size=8) == 8


def test_published_ids_are_required_where_the_vocabulary_holds_them():
    config = {"model_type": "llada2_moe", "vocab_size": 157184, "hidden_size": 1, "num_hidden_layers": 1}
    assert published_mask_id(config, "m") == 156895
    assert published_mask_id(config | {"vocab_size": 320}, "m") is None
    require_published_ids(config, "m", mask_id=156895, eos_id=156892, pad_id=None)
    require_published_ids(config | {"vocab_size": 320}, "m", mask_id=1, eos_id=2, pad_id=3)
    for name, ids in (
        ("mask", {"mask_id": 156892, "eos_id": None}),
        ("eos", {"mask_id": None, "eos_id": 156895}),
    ):
        with pytest.raises(ConfigError, match=rf"the tokenizer's {name} id is .*the right one with teacher.{name}"):
            require_published_ids(config, "m", **ids, pad_id=None)


def test_times_a_teacher_was_not_trained_on_are_named():
    config = {"model_type": "llada2_moe", "vocab_size": 320, "hidden_size": 1, "num_hidden_layers": 1}
    assert outside_recommended_t(config, "m", t_min=0.3, t_max=0.8) is None
    assert "[0.3, 0.8]" in str(outside_recommended_t(config, "m", t_min=0.001, t_max=0.8))
    assert outside_recommended_t(config | {"model_type": "sdar"}, "m", t_min=0.001, t_max=1.0) is None


def test_every_row_of_the_table_names_classes_that_exist():
    for model_type, rows in FAMILIES.items():
        assert rows[-1].only_if is None, model_type
        for family in rows:
            assert resolve(family.model_class).config_class is resolve(family.config_class)
