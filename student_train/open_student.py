"""The student of a run: its tokenizer and weights, checked against the cache; and what its card says in the end.

Never the teacher: everything about it that training needs is in the cache.
"""

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..shared.addresses import require_apart
from ..shared.cache import Cache
from ..shared.config import RunConfig, to_tree
from ..shared.errors import CacheMismatch, ConfigError
from ..shared.models.loading import load_model, local_folder, read_config
from ..shared.tokens import TextEncoder, load_tokenizer, student_mask
from .checkpoint import STATE_NAME
from .objective import loss_name


def open_encoder(config: RunConfig, cache: Cache) -> TextEncoder:
    """The student's tokenizer with its mask and EOS, checked against what the cache was made for.

    Raises: CacheMismatch: another tokenizer, chat template, mask id, EOS id or block size.
    """
    student, manifest = config.student, cache.manifest
    if not student.path:
        raise ConfigError("student.path is empty: give --student, a checkpoint folder or hub id")
    tokenizer = load_tokenizer(student.tokenizer or student.path, student.revision)
    described = read_config(local_folder(student.path, student.revision, weights=False))
    mask_token, mask_id = student_mask(tokenizer, described, student.mask_token, student.path)
    encoder = TextEncoder(
        tokenizer, block_size=student.block_size, max_length=student.block_size, mask_token=mask_token,
        mask_id=mask_id, eos_token=student.eos_token, template=student.template,
    )  # fmt: skip
    cache.require_student(encoder.fingerprint["tokenizer"], encoder.fingerprint["chat_template"])
    for setting, ours, theirs in (
        ("block_size", manifest.block_size, encoder.block_size),
        ("mask_token", manifest.student.mask_id, encoder.mask_id),
        ("eos_token", manifest.student.eos_id, encoder.eos_id),
    ):
        if ours != theirs:
            what = "" if setting == "block_size" else " (as ids)"
            raise CacheMismatch(
                f"{cache.root} was dumped for {setting} {ours}, student.{setting} gives {theirs}{what}; "
                "use the cache's, or dump again"
            )
    return encoder


def open_model(config: RunConfig, cache: Cache, checkpoint: Path | None) -> PreTrainedModel:
    """The student's weights, from a checkpoint of this run or from where it starts.

    Raises: ConfigError: its embedding is too small for the cache's token ids. DataError: see `load_model`.
    """
    student, train = config.student, config.train
    if checkpoint:
        model = load_model(checkpoint)
    else:
        folder = Path(student.path).expanduser()  # one that holds no weights begins at random; else that is an error
        seed = train.seed if folder.is_dir() and not list(folder.glob("*.bin")) else None
        model = load_model(student.path, revision=student.revision, random_seed=seed)
    needed, rows = cache.manifest.student.vocab_size, len(vocabulary_weights(model)[0])
    if needed > rows:
        raise ConfigError(
            f"{student.path}: the model has {rows} embeddings, and the cache holds ids up to {needed - 1} (mask id "
            f"{cache.manifest.student.mask_id}); use a checkpoint with room for them"
        )
    if train.gradient_checkpointing:
        # transformers 5.20 or so gave it another name, and v6 drops the old one
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def vocabulary_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The input embedding and the head, [v, d] each; one tensor if they are tied."""
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[union-attr, return-value]


def refuse_own_input(config: RunConfig, out: Path, cache: str | Path, heldout: str | None = None) -> None:
    """A run replaces folders below `out`, so nothing that it reads may lie there, nor `out` in what it reads.

    Raises: ConfigError: it does.
    """
    student = config.student
    read = {"student.path": student.path, "student.tokenizer": student.tokenizer}
    require_apart(out, {"the cache": cache, "--heldout": heldout, **read})
    inside = next((folder for folder in [out, *out.absolute().parents] if (folder / STATE_NAME).is_file()), None)
    if inside is not None:
        raise ConfigError(
            f"--out {out} lies in {inside}, a student or checkpoint of another run; give a folder outside of it"
        )


def student_card(config: RunConfig, cache: Cache, encoder: TextEncoder, num_steps: int) -> str:
    """README.md of the finished student."""
    terms = " + ".join(f"{loss.weight:g} {loss_name(loss)}" for loss in config.losses if loss.weight > 0)
    manifest = cache.manifest
    return (
        "---\nlibrary_name: transformers\ntags: [tide, diffusion-language-model, block-diffusion]\n---\n\n"
        f"# Student trained with tide\n\nLoss: {terms}. Cache: `{manifest.hash}` (plan `{manifest.plan_hash}`). "
        f"Steps: {num_steps}.\n\n"
        f"Block size {encoder.block_size}, mask token id {encoder.mask_id}. Always pass an explicit 4D attention mask: "
        "without one, transformers assumes causal attention.\n\n"
        f"```json\n{json.dumps(to_tree(config.train), indent=1)}\n```\n"
    )


def begins_at_random(path: str) -> bool:
    """Is this a folder that describes a student and holds no weights?"""
    folder = Path(path).expanduser()
    return (folder / "config.json").is_file() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
