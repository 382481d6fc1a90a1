"""Tiny random checkpoints of every architecture in its official layout, and the slow twin of asking a teacher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tide.shared.models import TeacherSpec, load_model, teacher_spec
from tide.shared.models.specs import teacher_block_size
from torch import Tensor

BLOCK = 8
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
_LLADA2 = {
    **_SIZES, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1, "moe_intermediate_size": 16,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0, "use_bias": False, "use_qkv_bias": False, "block_size": BLOCK,
}  # fmt: skip
_LLADA = {
    "d_model": 32, "mlp_hidden_size": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "weight_tying": False, "max_sequence_length": 512, "activation_type": "silu",
    "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False, "include_bias": False,
    "include_qkv_bias": False, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llada2": {"model_type": "llada2_moe", **_LLADA2},
    "wedlm-8b": {"model_type": "wedlm", **_SIZES, "qk_norm": True, "attention_bias": False, "block_size": BLOCK},
    "wedlm-7b": {"model_type": "wedlm", **_SIZES, "qk_norm": False, "attention_bias": True, "block_size": BLOCK},
    "sdar": {"model_type": "sdar", **_SIZES},  # blocks of 4
    "dream": {"model_type": "Dream", **_SIZES},
    "fast-dllm": {"model_type": "Fast_dLLM_Qwen", **_SIZES, "bd_size": BLOCK},
    "llada": {"model_type": "llada", **_LLADA},
    "bd3lm": {"model_type": "a2d-qwen3", **_SIZES, "block_size": BLOCK},
}
"""config.json of a tiny model per architecture."""


def write_official(folder: Path, name: str, *, vocab_size: int, seed: int = 0) -> Path:
    """A checkpoint folder without a tokenizer: config.json and random weights under the official names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | {"vocab_size": vocab_size}))
    model = load_model(folder, random_seed=seed)
    if name == "llada2":  # a router bias of zeros would hide a wrong one
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def spec_of(folder: Path, attention: str, *, mask_id: int, eos_id: int) -> TeacherSpec:
    """The spec of a checkpoint as `open_pairing` makes it."""
    config = json.loads((folder / "config.json").read_text())
    block_size = teacher_block_size(config, run_block_size=BLOCK, attention=attention, where="m")  # type: ignore[arg-type]
    return teacher_spec(
        config, mask_id=mask_id, eos_id=eos_id, block_size=block_size, attention=attention, where="m",  # type: ignore[arg-type]
    )  # fmt: skip


def naive_mask(spec: TeacherSpec, masked: np.ndarray) -> Tensor:
    """[2L, 2L] bool over [x_t, x_0], pair by pair as the papers word it; a model without blocks: [L, L]."""
    length = len(masked)
    if spec.block_size is None:
        return torch.ones(length, length, dtype=torch.bool)
    may = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    block = [i // spec.block_size for i in range(length)]
    order = [(bool(masked[i]), i) for i in range(length)]  # WeDLM moves observed tokens before masked ones
    for i in range(length):
        for j in range(length):
            in_block = block[i] == block[j] and (not spec.attention.causal or order[j] <= order[i])
            before = j <= i if spec.attention.causal else block[j] <= block[i]
            may[i, j] = in_block  # x_t to x_t
            may[i, length + j] = block[j] < block[i]  # x_t to x_0
            may[length + i, length + j] = before  # x_0 to x_0
    return may


def naive_logits(model: Any, spec: TeacherSpec, x_0: np.ndarray, masked: np.ndarray) -> Tensor:
    """float64 logits [l, V], row i the answer for position i, of one forward over everything."""
    clean = torch.from_numpy(x_0.astype(np.int64))
    noised = torch.where(torch.from_numpy(masked), spec.mask_id, clean)
    blocks = spec.block_size is not None
    ids = torch.cat([noised, clean]) if blocks else noised
    position = torch.arange(len(x_0)).repeat(2 if blocks else 1)
    may = naive_mask(spec, masked)[None, None]
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=position[None], attention_mask=may, use_cache=False).logits
    answers = logits[0, : len(x_0)].double()
    if spec.logit_shift:
        answers = torch.cat([torch.full_like(answers[: spec.logit_shift], torch.nan), answers[: -spec.logit_shift]])
    return answers
