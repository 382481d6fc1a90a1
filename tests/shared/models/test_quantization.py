"""4-bit weights: which are replaced, how far off the answers are, and what happens without the package."""

import importlib.util
import json

import pytest
import torch
from official_models import write_official
from tide.shared.config import load_config
from tide.shared.errors import ConfigError, Unavailable
from tide.shared.models import load_model
from tide.shared.models.quantization import quantize, require_bitsandbytes
from tide.shared.models.size import model_size
from tide.teacher_dump.dump import dump_teacher
from tiny_runs import tiny_config

VOCAB, CPU = 320, torch.device("cpu")


def logits(model) -> torch.Tensor:
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    with torch.inference_mode():
        return model(input_ids=torch.arange(16)[None], attention_mask=everything, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_mixture_of_experts_in_four_bits_equals_its_unpacked_weights(kind, tmp_path):
    """A slow twin: the same model whose weights are packed and unpacked beforehand, then run as usual."""
    from bitsandbytes import functional

    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    model, twin = quantize(load_model(folder), kind, CPU), load_model(folder)
    for layer in twin.model.layers:
        places = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        weights = [place.weight for place in places] + [p for p in layer.parameters() if p.ndim == 3]
        for weight in weights:
            packed, state = functional.quantize_4bit(weight.data, quant_type=kind)
            weight.data = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=0)
    exact = logits(load_model(folder))
    assert not torch.allclose(logits(model), exact, atol=1e-2)
    assert torch.cosine_similarity(logits(model).flatten(), exact.flatten(), dim=0) > 0.5  # 0 for unrelated weights


def test_head_embeddings_norms_and_routers_keep_their_precision(tmp_path):
    model = quantize(load_model(write_official(tmp_path, "llada2", vocab_size=VOCAB), dtype="bfloat16"), "nf4", CPU)
    packed = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    whole = {name.removesuffix(".weight") for name in model.state_dict()} - packed
    assert {"model.embed_tokens", "lm_head", "model.norm", "model.layers.1.mlp.gate"} <= whole
    assert "model.layers.1.mlp.experts.gate_up_proj" in packed
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32


def test_the_estimate_of_packed_bytes_is_close(tmp_path):
    folder = write_official(tmp_path, "llada2", vocab_size=VOCAB)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 256, "moe_intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    load_model(folder, random_seed=0).save_pretrained(folder)
    model = quantize(load_model(folder, dtype="bfloat16"), "nf4", CPU)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    size = model_size(config, "m", dtype="bfloat16", quantization="nf4")
    assert size.weight_bytes == pytest.approx(stored, rel=0.02)
    assert size.weight_bytes < 0.4 * model_size(config, "m", dtype="bfloat16").weight_bytes


def test_a_dump_in_four_bits_says_so(tiny_root, tmp_path):
    exact = dump_teacher(tiny_config(tiny_root), tmp_path / "exact")
    rough = dump_teacher(tiny_config(tiny_root, teacher__quantization="nf4"), tmp_path / "rough")
    assert exact.teacher.quantization is None
    assert rough.teacher.quantization == "nf4"
    assert rough.teacher.dtype == "float32"
    assert rough.plan_hash != exact.plan_hash
    assert rough.statistics.gold_logp != exact.statistics.gold_logp
    assert rough.statistics.gold_logp == pytest.approx(exact.statistics.gold_logp, rel=0.2)


def test_without_the_package_nothing_is_written(tiny_root, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(Unavailable, match=r"needs the package bitsandbytes.*pip install 'tide-distill\[4bit\]'"):
        dump_teacher(tiny_config(tiny_root, teacher__quantization="nf4"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_unknown_kind_and_several_devices_are_refused():
    with pytest.raises(ConfigError, match=r"quantization = 'int3': expected one of nf4, fp4"):
        require_bitsandbytes("int3")
    with pytest.raises(ConfigError, match=r"teacher.quantization"):
        load_config(overrides=["teacher.quantization=int3"])
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config(overrides=["teacher.quantization=nf4", "teacher.devices_per_replica=2"])
