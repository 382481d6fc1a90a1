"""Diffusion models on Qwen2's and Qwen3's network: WeDLM, SDAR, Dream and Fast-dLLM v2.

Their official classes change how tokens attend to each other and how text is decoded, never a weight or its name
(docs/models.md); so each is transformers' class under the official names. How a model attends is a row of
specs.py. Always call them with an explicit 4D mask (without one, transformers assumes causal).
"""

from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .official import OfficialRope, register


class WeDLMConfig(OfficialRope, Qwen3Config):
    """WeDLM-8B: Qwen3-8B's fields."""

    model_type = "wedlm"


class WeDLMForCausalLM(Qwen3ForCausalLM):
    """WeDLM-8B."""

    config_class = WeDLMConfig


class WeDLMQwen2Config(OfficialRope, Qwen2Config):
    """WeDLM-7B: Qwen2.5-7B's fields, told apart by `qk_norm: false`."""

    model_type = "wedlm"


class WeDLMQwen2ForCausalLM(Qwen2ForCausalLM):
    """WeDLM-7B; saved under the official class's name."""

    config_class = WeDLMQwen2Config


WeDLMQwen2ForCausalLM.__name__ = "WeDLMForCausalLM"  # what transformers writes to `architectures`


class SDARConfig(OfficialRope, Qwen3Config):
    """SDAR and TraDo: Qwen3's fields."""

    model_type = "sdar"


class SDARForCausalLM(Qwen3ForCausalLM):
    """SDAR and TraDo."""

    config_class = SDARConfig


class DreamConfig(OfficialRope, Qwen2Config):
    """Dream, Dream-Coder and DiffuCoder: Qwen2.5's fields."""

    model_type = "Dream"


class DreamModel(Qwen2ForCausalLM):
    """Dream with its head; the official name of the whole model."""

    config_class = DreamConfig


class FastDLLMConfig(OfficialRope, Qwen2Config):
    """Fast-dLLM v2: Qwen2.5's fields and `bd_size`, tokens per block."""

    model_type = "Fast_dLLM_Qwen"


class FastDLLMForCausalLM(Qwen2ForCausalLM):
    """Fast-dLLM v2; saved under the official class's name."""

    config_class = FastDLLMConfig


FastDLLMForCausalLM.__name__ = "Fast_dLLM_QwenForCausalLM"

register(
    (WeDLMConfig, WeDLMForCausalLM),
    (SDARConfig, SDARForCausalLM),
    (DreamConfig, DreamModel),
    (FastDLLMConfig, FastDLLMForCausalLM),
)
