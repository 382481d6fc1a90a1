"""LLaDA-8B: Llama's network with OLMo's field and weight names (docs/models.md).

Without blocks and without x_0: the whole noised sequence is read at once. This file renames fields and weights in both
directions. Always call it with an explicit 4D mask (without one, transformers assumes causal).
"""

from types import MappingProxyType

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from .official import OfficialFields, register

_OFFICIAL_NAMES = {
    "d_model": "hidden_size", "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "weight_tying": "tie_word_embeddings",
    "max_sequence_length": "max_position_embeddings", "activation_type": "hidden_act",
}  # fmt: skip


class LLaDAConfig(OfficialFields, LlamaConfig):
    """The official fields on Llama's."""

    model_type = "llada"
    official_names = _OFFICIAL_NAMES
    attribute_map = {**LlamaConfig.attribute_map, **_OFFICIAL_NAMES}  # noqa: RUF012 - transformers' convention
    computed = MappingProxyType({
        "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False,
        "include_bias": False, "include_qkv_bias": False, "scale_logits": False, "input_emb_norm": False,
        "attention_layer_norm": False,
    })  # fmt: skip


class LLaDAModelLM(LlamaForCausalLM):
    """LLaDA-8B under the official class's name."""

    config_class = LLaDAConfig


_WEIGHT_RULES: list[WeightConverter | WeightRenaming] = [
    WeightRenaming("model.transformer.wte.weight", "model.embed_tokens.weight"),
    WeightRenaming("model.transformer.ln_f.weight", "model.norm.weight"),
    WeightRenaming("model.transformer.ff_out.weight", "lm_head.weight"),
    *(
        WeightRenaming(rf"model.transformer.blocks.(\d+).{official}.weight", rf"model.layers.\1.{native}.weight")
        for official, native in (
            ("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"), ("v_proj", "self_attn.v_proj"),
            ("attn_out", "self_attn.o_proj"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"),
            ("ff_out", "mlp.down_proj"), ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"),
        )
    ),
]  # fmt: skip

register_checkpoint_conversion_mapping(LLaDAConfig.model_type, _WEIGHT_RULES, overwrite=True)
register((LLaDAConfig, LLaDAModelLM))
