"""`tide convert`: an autoregressive checkpoint -> the start of a block-diffusion student.

No weight changes: a BD3LM student is the same network under another attention mask, so what is added is a mask token
with an embedding, the model type that dLLM's evaluators look for, the block size, and a chat template where there was
none (docs/models.md). The result speaks only after training: `--recipe ce` first, or distillation at once.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..shared.addresses import require_apart
from ..shared.errors import ConfigError, DataError
from ..shared.licences import folder_licence
from ..shared.models.loading import load_model, local_folder, read_config
from ..shared.regular_files import require_regular
from ..shared.tokenizer_setup import DEFAULT_MASK_TOKEN, save_tokenizer
from ..shared.tokens import TextEncoder, load_tokenizer
from .checkpoint import replacing
from .open_student import vocabulary_weights

CONVERTIBLE = ("llama", "qwen2", "qwen3")
"""Model types of autoregressive checkpoints whose network a student class computes."""
EMBEDDING_MULTIPLE = 64
"""New embedding rows are added in multiples of this, for the tensor cores' sake."""


@dataclass(frozen=True)
class Conversion:
    """What was made."""

    folder: Path
    model_type: str
    parameters: int
    mask_id: int
    new_rows: int
    """Embedding rows that had to be added; usually 0, because vocabularies are padded."""


def convert_checkpoint(
    source: str, out: Path, *, revision: str | None = None, block_size: int = 32, mask_token: str | None = None,
    chat_template: Path | None = None, dtype: str = "bfloat16",
) -> Conversion:  # fmt: skip
    """Write a student's start to `out`.

    Args:
        source: folder or hub id of a Qwen3, Qwen2 or Llama checkpoint.
        out: new folder.
        block_size: written to config.json; training may use another.
        mask_token: None: the tokenizer's own, or else `<|mask|>`, added behind the vocabulary.
        chat_template: Jinja file for a tokenizer without one.
        dtype: of the written weights.
    Raises: ConfigError: `out` exists, or lies in `source`; a mask id that text uses. DataError: another
        architecture, no chat template, damaged weights. OutputError: `out` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give the path of a new folder")
    require_apart(out, {"the checkpoint": source, "--chat-template": chat_template})
    folder = local_folder(source, revision)
    config = read_config(folder)
    if config.get("model_type") not in CONVERTIBLE:
        raise DataError(
            f"{source}: model_type {config.get('model_type')!r}: expected an autoregressive checkpoint of type "
            f"{', '.join(CONVERTIBLE)}"
        )
    template = None
    if chat_template is not None:
        try:
            require_regular([chat_template])
            template = chat_template.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {chat_template}: cannot be read ({error}); give a Jinja file") from error
    tokenizer = load_tokenizer(folder, chat_template=template)
    if mask_token is None and tokenizer.mask_token_id is None:
        mask_token = DEFAULT_MASK_TOKEN
    encoder = TextEncoder(tokenizer, block_size=block_size, max_length=block_size, mask_token=mask_token)
    encoder.tokenizer.mask_token = encoder.tokenizer.convert_ids_to_tokens(encoder.mask_id)
    model = load_model(folder, dtype=dtype)
    new_rows = _make_room(model, encoder.mask_id)
    model.config.update({"block_size": block_size, "mask_token_id": encoder.mask_id, "eos_token_id": encoder.eos_id})
    if model.generation_config is not None:  # the source's way of generating is an autoregressive one
        model.generation_config = type(model.generation_config)(eos_token_id=encoder.eos_id)
    with replacing(out) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(encoder.tokenizer, temporary)
        (temporary / "README.md").write_text(_card(source, folder, encoder, model))
    return Conversion(
        out, model.config.model_type, sum(p.numel() for p in model.parameters()), encoder.mask_id, new_rows
    )


def _make_room(model: PreTrainedModel, mask_id: int) -> int:
    """Add embedding rows until there is one for the mask: each the mean of the others. Returns how many."""
    rows = len(vocabulary_weights(model)[0])
    if mask_id < rows:
        return 0
    model.resize_token_embeddings(mask_id + 1, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for weight in vocabulary_weights(model):  # the same tensor twice if they are tied
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    return len(vocabulary_weights(model)[0]) - rows


def _card(source: str, folder: Path, encoder: TextEncoder, model: PreTrainedModel) -> str:
    """README.md: what this is, where it comes from, and that it is not trained yet."""
    licence = folder_licence(folder)
    is_hub_id = not Path(source).expanduser().exists()
    head = ["library_name: transformers", "tags: [tide, diffusion-language-model, block-diffusion]"]
    head += [f"license: {licence}"] if licence and "," not in licence else []
    head += [f"base_model: {source}"] if is_hub_id else []
    lines = "\n".join(head)
    return (
        f"---\n{lines}\n---\n\n# The untrained start of a block-diffusion student\n\n"
        f"The weights of `{source if is_hub_id else folder.name}`, unchanged, as `{model.config.model_type}`: block "
        f"size {encoder.block_size}, mask token id {encoder.mask_id}. It has to be trained (`tide train-student`) "
        "before it writes anything. Always pass an explicit 4D attention mask: without one, transformers assumes "
        "causal attention.\n"
    )
