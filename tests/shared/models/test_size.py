"""Sizes from a config.json alone: published numbers, the loaded model's own bytes, and counted floating-point work."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from official_models import CONFIGS, spec_of, write_official
from tide.shared.errors import DataError
from tide.shared.models import load_model
from tide.shared.models.size import model_size
from tide.teacher_dump.teacher import Teacher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

VOCAB = 320
LLADA2_MINI = {
    "model_type": "llada2_moe", "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 20,
    "intermediate_size": 5120, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
WEDLM_8B = {
    "model_type": "wedlm", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36,
    "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "qk_norm": True,
    "tie_word_embeddings": False,
}  # fmt: skip
STUDENT = {
    "model_type": "a2d-qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
    "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "active", "kv_kib"),
    [(LLADA2_MINI, 16.256, 1.433, 40), (WEDLM_8B, 8.191, 8.191, 144), (STUDENT, 0.596, 0.596, 112)],
)
def test_published_models_have_their_published_sizes(config: dict[str, Any], parameters, active, kv_kib):
    size = model_size(config, "m", dtype="bfloat16")
    assert size.parameters / 1e9 == pytest.approx(parameters, abs=5e-4)
    assert size.active_parameters / 1e9 == pytest.approx(active, abs=5e-4)
    assert size.kv_bytes_per_token == kv_kib * 1024
    assert size.weight_bytes == pytest.approx(2 * size.parameters, rel=1e-3)


def test_the_experts_of_llada2_are_counted_by_those_that_a_token_visits():
    size = model_size(LLADA2_MINI, "m", dtype="bfloat16")
    expert = 3 * 2048 * 512
    assert size.parameters - size.active_parameters == 19 * (256 - 8) * expert
    assert size.flops_per_token / 2 == pytest.approx(0.789e9, rel=1e-3)  # active, without embedding and head
    assert size.flops_per_answer == 2 * 157184 * 2048


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_parameters_and_bytes_are_those_of_the_loaded_model(name, dtype, tmp_path):
    model = load_model(write_official(tmp_path, name, vocab_size=VOCAB), dtype=dtype)
    size = model_size(json.loads((tmp_path / "config.json").read_text()), "m", dtype=dtype)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    assert size.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["llada2", "wedlm-8b", "dream", "llada", "bd3lm"])
def test_kv_bytes_are_those_of_a_prefill(name, tmp_path):
    folder = write_official(tmp_path, name, vocab_size=VOCAB)
    spec = spec_of(folder, "native", mask_id=VOCAB - 1, eos_id=VOCAB - 2)
    teacher, length = Teacher(load_model(folder), spec), 16
    cache = teacher.prefill([np.arange(length, dtype=np.int32)], [length // teacher.block_size or 1]).cache
    stored = sum(t.numel() * t.element_size() for layer in cache._prefix_layers() for t in layer.stored())
    size = model_size(json.loads((folder / "config.json").read_text()), "m", dtype="float32")
    assert stored == length * size.kv_bytes_per_token


@pytest.mark.parametrize("name", ["wedlm-8b", "wedlm-7b", "llada", "bd3lm"])
def test_flops_are_those_that_torch_counts(name, tmp_path):
    """A dense model, so that every matrix product is one that torch's counter knows."""
    model, length = load_model(write_official(tmp_path, name, vocab_size=VOCAB)), 24
    everything = torch.ones(1, 1, length, length, dtype=torch.bool)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model(input_ids=torch.arange(length)[None], attention_mask=everything, use_cache=False)
    size = model_size(json.loads((tmp_path / "config.json").read_text()), "m", dtype="float32")
    layers = length * size.flops_per_token + length**2 * size.flops_per_token_pair
    biases_and_norms = 2 * length * sum(weight.numel() for weight in model.parameters() if weight.ndim == 1)
    counted = counter.get_total_flops()
    assert counted <= layers + length * size.flops_per_answer <= counted + biases_and_norms


def test_an_unknown_architecture_has_no_size():
    with pytest.raises(DataError, match="model_type 'gpt2' has no native class"):
        model_size({"model_type": "gpt2"}, "m", dtype="float32")
