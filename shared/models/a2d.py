"""BD3LM students (`a2d-…`): autoregressive networks whose weights and keys stay, only the attention mask differs.

tide passes that mask explicitly, so the native Qwen3, Qwen2 or Llama class is the whole model. The names below exist so
that saved checkpoints carry the `model_type` and `architectures` that dLLM's evaluators look for. Always call them with
an explicit 4D mask (without one, transformers assumes causal).
"""

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .official import OfficialRope, register


class A2DQwen3Config(OfficialRope, Qwen3Config):
    """Qwen3's configuration under the model type of the published BD3LM students."""

    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    """Qwen3 with a head."""

    config_class = A2DQwen3Config


class A2DQwen2Config(OfficialRope, Qwen2Config):
    """The same for Qwen2 and Qwen2.5."""

    model_type = "a2d-qwen2"


class A2DQwen2LMHeadModel(Qwen2ForCausalLM):
    """Qwen2 with a head."""

    config_class = A2DQwen2Config


class A2DLlamaConfig(OfficialRope, LlamaConfig):
    """The same for Llama 2 and 3, SmolLM2 and others of this shape."""

    model_type = "a2d-llama"


class A2DLlamaLMHeadModel(LlamaForCausalLM):
    """Llama with a head."""

    config_class = A2DLlamaConfig


register(
    (A2DQwen3Config, A2DQwen3LMHeadModel),
    (A2DQwen2Config, A2DQwen2LMHeadModel),
    (A2DLlamaConfig, A2DLlamaLMHeadModel),
)
