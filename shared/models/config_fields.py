"""What a config.json may say: known fields with sane values, nothing else, checked before any class is built from them.

Content of config.json -> the fields that a transformers class is given, or an error that names the field. Fields that
no class of tide reads are left out, so that none can steer transformers; those that promise arithmetic which is not
computed here are refused.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from ..errors import DataError

_FIELDS_OF_TIDE = (
    "block_size", "bd_size", "mask_token_id", "qk_norm", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
)  # fmt: skip
"""Beside the fields of the class itself."""
_COUNTS = {
    "vocab_size": (1, 1 << 24), "hidden_size": (1, 1 << 18), "intermediate_size": (1, 1 << 22),
    "moe_intermediate_size": (1, 1 << 22), "num_hidden_layers": (1, 1 << 10), "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14), "head_dim": (1, 1 << 16), "n_routed_experts": (1, 1 << 14),
    "n_shared_experts": (0, 1 << 10), "num_experts_per_tok": (1, 1 << 14), "n_group": (1, 1 << 14),
    "topk_group": (1, 1 << 14), "first_k_dense_replace": (0, 1 << 20), "max_window_layers": (0, 1 << 20),
    "max_position_embeddings": (1, 1 << 31), "block_size": (1, 1 << 31), "bd_size": (1, 1 << 31),
    "num_labels": (0, 1 << 16),
}  # fmt: skip
"""Field -> least and largest number that any model has: a few bytes of config.json must not fill the memory."""
_NEVER_KEPT = ("torch_dtype", "transformers_weights", "num_labels", "attn_implementation", "experts_implementation")
"""Fields by which transformers itself is steered."""
_QUANTIZED = ("quantization_config", "compression_config")
_NOT_COMPUTED = re.compile(
    r"(attn_|final_)?logits?_soft_?cap(ping)?|logits?_scal(e|ing)|scale_logits|\w+_multiplier|scale_(depth|emb)|mup\w*"
    r"|dim_model_base|clip_qkv|attention_(chunk_size|sinks?)|use_alibi|alibi|sliding_window\w*|window_size|no_rope_layers"
    r"|residual_scale|attn_temperature_tuning|query_pre_attn_scalar"
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Those whose angles depend on the position alone, up to the length that the model states (`dynamic`): `longrope` has
two sets of them, and cached keys and new ones could be turned by different ones."""


def known_fields(raw: Mapping[str, Any], config_class: type[PretrainedConfig], where: str) -> dict[str, Any]:
    """The fields of a config.json that `config_class` and tide read.

    Raises: DataError: a count that is none or that no model has; a quantized checkpoint; arithmetic not computed here.
    """
    aliases = {**config_class.attribute_map, **getattr(config_class, "official_names", {})}
    own = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in dataclasses.fields(PretrainedConfig)}  # type: ignore[arg-type]
    known = {*own, *aliases, *aliases.values(), *getattr(config_class, "computed", {}), *_FIELDS_OF_TIDE}
    for name in _QUANTIZED:
        if raw.get(name):
            method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
            raise _refused(
                where, name, method or raw[name],
                "expected a checkpoint in floating point: a quantized one is not read. Use the one it was made from "
                "(teacher.quantization packs a teacher's weights while loading)",
            )  # fmt: skip
    for name, value in raw.items():
        least, most = _COUNTS.get(aliases.get(name, name), (None, None))
        if least is not None and most is not None and value is not None:
            if type(value) is not int or not least <= value <= most:
                raise _refused(where, name, value, f"expected a whole number from {least:,} to {most:,}")
        elif name not in known and _NOT_COMPUTED.fullmatch(name) and _is_active(name, value, raw):
            raise _refused(
                where, name, value, f"{config_class.model_type} is computed without it, so its answers would be others'"
            )
    if all(raw.get(name) is None for name in ("num_attention_heads", "n_heads")):
        raise DataError(f"{where}/config.json lacks num_attention_heads (an integer): the checkpoint is incomplete")
    return {name: value for name, value in raw.items() if name in known}


def keep_notes(raw: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Put plain values of a config.json that no class here reads back into the configuration of a loaded model, so that
    they are saved with it: other programs may read them."""
    for name, value in raw.items():
        plain = value is None or isinstance(value, str | int | float | bool)
        if plain and name.isidentifier() and name[0] != "_" and name not in _NEVER_KEPT and not hasattr(config, name):
            setattr(config, name, value)


def require_computed(config: PretrainedConfig, where: str) -> None:
    """Refuse what transformers would compute wrongly, in another way than training does, or not at all.

    Raises: DataError: names the field.
    """
    _require_heads(config, where)
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACT2FN:
        raise _refused(where, "hidden_act", config.hidden_act, "unknown; expected one such as 'silu' or 'gelu'")
    types = getattr(config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in types):
        raise _refused(
            where, "use_sliding_window" if getattr(config, "sliding_window", None) else "layer_types",
            getattr(config, "sliding_window", None) or sorted(set(types)),
            "some layers would see a window alone, and here every layer sees all that a mask allows; a checkpoint that "
            "was trained so is not computed. If the window is longer than all your texts, set use_sliding_window to "
            "false and leave layer_types out",
        )  # fmt: skip
    _require_rope(config, where)
    pad = config.pad_token_id
    if pad is not None and (type(pad) is not int or not -1 <= pad < config.vocab_size):
        raise _refused(where, "pad_token_id", pad, f"expected an id below vocab_size = {config.vocab_size}, or null")
    for name, least, most in (
        ("rms_norm_eps", 0, 1), ("initializer_range", 0, 1e3), ("attention_dropout", 0, 1),
        ("routed_scaling_factor", 0, 1e6),
    ):  # fmt: skip
        value = getattr(config, name, None)
        if value is not None and not (_is_number(value) and least <= value <= most):
            raise _refused(where, name, value, f"expected a number from {least} to {most:g}")
    if hasattr(config, "n_routed_experts"):
        _require_routing(config, where)


def _require_heads(config: PretrainedConfig, where: str) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise _refused(where, "num_key_value_heads", groups, f"expected a divisor of num_attention_heads = {heads}")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.hidden_size % heads:
        raise _refused(where, "num_attention_heads", heads, f"expected a divisor of hidden_size = {config.hidden_size}")
    rotated = (head_dim or config.hidden_size // heads) * _rope(config).get("partial_rotary_factor", 1)
    if _is_number(rotated) and (int(rotated) < 2 or int(rotated) % 2):
        raise _refused(where, "head_dim", head_dim, "expected an even number of rotated dimensions, 2 or more")


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    return rope if isinstance(rope, dict) else {}


def _require_rope(config: PretrainedConfig, where: str) -> None:
    rope = _rope(config)
    if any(isinstance(value, dict) for value in rope.values()):
        raise _refused(where, "rope_parameters", rope, "expected one set of numbers for all layers")
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise _refused(
            where, "rope_scaling", kind, f"a kind of rotary scaling that is not computed here; expected one of "
            f"{', '.join(_ROPE_TYPES)}",
        )  # fmt: skip
    for name, value in rope.items():
        if isinstance(value, str | bool) or value is None:
            continue
        if not _is_number(value) or value < 0 or (value == 0 and name in ("rope_theta", "factor")):
            raise _refused(where, f"rope_scaling.{name}", value, "expected a positive number")
    needed = ["rope_theta", *(["factor"] if kind != "default" else [])]
    needed += ["low_freq_factor", "high_freq_factor"] if kind == "llama3" else []
    missing = [name for name in needed if not _is_number(rope.get(name))]
    if missing:
        raise _refused(where, "rope_scaling", rope, f"lacks {', '.join(missing)} (numbers)")
    if not 0 < rope.get("partial_rotary_factor", 1) <= 1:
        raise _refused(where, "partial_rotary_factor", rope["partial_rotary_factor"], "expected a share of at most 1")


def _require_routing(config: Any, where: str) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups:
        raise _refused(where, "n_group", groups, f"expected a divisor of the number of experts, {experts}")
    if config.topk_group > groups:
        raise _refused(where, "topk_group", config.topk_group, f"expected at most n_group = {groups}")
    choice = experts // groups * config.topk_group
    if config.num_experts_per_tok > choice:
        raise _refused(where, "num_experts_per_tok", config.num_experts_per_tok, f"expected at most {choice}")


def _is_active(name: str, value: Any, raw: Mapping[str, Any]) -> bool:
    """Does a field ask for something? Zero, false and nothing do not, nor does a factor of one."""
    if name.startswith("sliding_window") and raw.get("use_sliding_window") is False:
        return False
    return bool(value) and not (_is_number(value) and value == 1)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _refused(where: str, name: str, value: Any, why: str) -> DataError:
    return DataError(f"{where}/config.json: {name} = {value!r:.100}: {why}")
