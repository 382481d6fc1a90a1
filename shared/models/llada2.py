"""LLaDA2 (mini and flash, 2.0 to 2.2): a mixture of experts with half-rotary attention, as transformers' Glm4Moe.

The official class is the same network under other names (docs/models.md): fused query-key-value, experts stored
one by one, a router with a bias. This file reads the official config.json and weights and writes both back; the
arithmetic is transformers' own, with the experts as grouped matrix products.
"""

from types import MappingProxyType

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from .official import OfficialFields, register

_OFFICIAL_NAMES = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}


class LLaDA2Config(OfficialFields, Glm4MoeConfig):
    """The official fields on Glm4Moe's; `use_qk_norm` is on where config.json says nothing, as officially."""

    model_type = "llada2_moe"
    official_names = _OFFICIAL_NAMES
    attribute_map = {**Glm4MoeConfig.attribute_map, **_OFFICIAL_NAMES}  # noqa: RUF012 - transformers' convention
    computed = MappingProxyType({
        "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_bias": False, "use_qkv_bias": False,
        "use_qk_norm": True, "norm_head": False, "rope_scaling": None, "use_sliding_window": False,
    })  # fmt: skip

    use_qk_norm: bool = True


class LLaDA2MoeModelLM(Glm4MoeForCausalLM):
    """Glm4Moe under the official class's name. Always call it with an explicit 4D mask (without one: causal)."""

    config_class = LLaDA2Config
    # transformers looks for the decorator of grouped experts in this file's source, where it cannot be
    _can_set_experts_implementation_cached_value = True
    # The router computes in float32: what a checkpoint stores of it in float32 is not rounded when the rest is
    _keep_in_fp32_modules_strict = ("e_score_correction_bias", "mlp.gate.weight")

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        # Glm4Moe overlooks the weights of layers 46 and 92; here a weight too many is an error
        self._keys_to_ignore_on_load_unexpected = set()


def _weight_rules() -> list[WeightConverter | WeightRenaming]:
    """Official weight names to Glm4Moe's; transformers runs them backwards when it saves."""
    return [
        WeightRenaming("model.word_embeddings.weight", "model.embed_tokens.weight"),
        WeightRenaming("attention.query_layernorm.weight", "self_attn.q_norm.weight"),
        WeightRenaming("attention.key_layernorm.weight", "self_attn.k_norm.weight"),
        WeightRenaming("attention.dense.weight", "self_attn.o_proj.weight"),
        WeightRenaming("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
        WeightConverter(
            source_patterns="attention.query_key_value.weight",
            target_patterns=[f"self_attn.{part}_proj.weight" for part in "qkv"],
            operations=[Split(dim=0)],
        ),
        *(get_checkpoint_conversion_mapping("qwen2_moe") or []),  # experts one by one -> stacked
    ]


register_checkpoint_conversion_mapping(LLaDA2Config.model_type, _weight_rules(), overwrite=True)
register((LLaDA2Config, LLaDA2MoeModelLM))
