"""The student, Qwen3 BD3LM (`a2d-qwen3`): Qwen3 weights and keys unchanged, only the attention mask differs.

tide passes that mask explicitly, so the native Qwen3 class is the whole model; the two names below exist so that
saved checkpoints carry the `model_type` and `architectures` that dLLM's evaluators look for.
"""

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .official_rope import OfficialRope


class A2DQwen3Config(OfficialRope, Qwen3Config):
    """Qwen3's configuration under the model type of the published BD3LM students."""

    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    """Qwen3 with a head; always call it with an explicit 4D mask (without one, transformers assumes causal)."""

    config_class = A2DQwen3Config


AutoConfig.register("a2d-qwen3", A2DQwen3Config, exist_ok=True)
AutoModelForCausalLM.register(A2DQwen3Config, A2DQwen3LMHeadModel, exist_ok=True)
