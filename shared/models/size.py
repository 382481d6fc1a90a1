"""How large a model is, from its config.json alone: parameters, memory, work per token. No weight is loaded.

The model is built without storage ("meta" tensors), so the counts are those of the class that would be loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .loading import native_class

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FOUR_BIT_BYTES = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits: half a byte, and a float32 scale for each 64 weights."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of one model.

    Args:
        parameters: all of them, each once; buffers left out.
        active_parameters: those that one token passes: of a mixture of experts, the chosen ones alone.
        weight_bytes: of the weights as loaded; router biases stay float32, 4-bit weights carry their scales.
        kv_bytes_per_token: keys and values of all layers.
        flops_per_token: of the layers' matrix products, two for each multiply and add; attention scores left out.
        flops_per_token_pair: of the attention scores and their sum, for each token and each token it sees.
        flops_per_answer: of the head, at one position.
    """

    parameters: int
    active_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    flops_per_token_pair: int
    flops_per_answer: int


def model_size(config: Mapping[str, Any], where: str, *, dtype: str, quantization: str | None = None) -> ModelSize:
    """Size of the model that a config.json describes.

    Args:
        config: the content of config.json.
        where: names it in errors.
        dtype, quantization: as of `load_model`.
    Raises: DataError: unknown architecture, or a configuration that its class refuses.
    """
    model = empty_model(config, where)
    parameters = sum(weight.numel() for weight in model.parameters())
    stored = parameters + sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    read = model.config
    chosen = read.to_dict().get("num_experts_per_tok")  # of stacked experts [e, ., .]; a token passes no other
    stacked = [weight for weight in model.parameters() if weight.ndim == 3]
    idle = sum(weight.numel() // len(weight) * max(0, len(weight) - (chosen or len(weight))) for weight in stacked)
    table = read.vocab_size * read.hidden_size  # embeddings, and the head; one table where they are tied
    outside = table if read.tie_word_embeddings else 2 * table
    heads = read.num_attention_heads
    head_dim = getattr(read, "head_dim", None) or read.hidden_size // heads
    four_bit = sum(getattr(*place).numel() for place in quantizable(model)) if quantization else 0
    routers = tuple(model._keep_in_fp32_modules_strict or ())  # not rounded to the model's dtype
    named = [*model.named_parameters(), *model.named_buffers()]
    precise = sum(tensor.numel() for name, tensor in named if any(part in name for part in routers))
    return ModelSize(
        parameters=parameters,
        active_parameters=parameters - idle,
        weight_bytes=int((stored - four_bit - precise) * BYTES[dtype] + four_bit * FOUR_BIT_BYTES) + 4 * precise,
        kv_bytes_per_token=int(2 * read.num_hidden_layers * read.num_key_value_heads * head_dim * BYTES[dtype]),
        flops_per_token=2 * (parameters - idle - outside),
        flops_per_token_pair=4 * read.num_hidden_layers * heads * head_dim,
        flops_per_answer=2 * table,
    )


def empty_model(config: Mapping[str, Any], where: str) -> PreTrainedModel:
    """The class that `load_model` would load, without storage.

    Raises: DataError: see `model_size`.
    """
    native, model_class = native_class(config, where)
    with torch.device("meta"):
        return model_class(native)


def quantizable(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Weights that 4 bits are for, as (module, name of its parameter): linear layers and stacked experts.

    The head, embeddings, norms and routers are left out.
    """
    head = model.get_output_embeddings()
    return [
        (module, name)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 or (isinstance(module, nn.Linear) and module is not head and weight.ndim == 2)
    ]
