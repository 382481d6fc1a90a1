"""What tide must know of a model beyond its config.json: one table row per architecture (models.md, section 5).

model_type -> family: the native class, how x_0 and x_t attend (`native` as trained, `paper` as the paper's code calls
it), blocks or none, the logit shift. Ids come from the tokenizer and are checked when a teacher is opened.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from ..attention import AttentionPattern
from ..errors import DataError

BIDIRECTIONAL = AttentionPattern(causal=False)


@dataclass(frozen=True)
class Family:
    """One row: everything that is common to the checkpoints of one architecture."""

    model_class: str
    """`module:class` below tide.shared.models."""
    config_class: str
    native: AttentionPattern = BIDIRECTIONAL
    paper: AttentionPattern = BIDIRECTIONAL
    paper_blocks: bool = True
    """False: the paper's code calls it with the whole noised sequence as one block, without x_0."""
    logit_shift: int = 0
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers")
    """Fields that config.json must have; the rest may fall back to the class's defaults."""


FAMILIES: dict[str, Family] = {
    "a2d-qwen3": Family("a2d_qwen3:A2DQwen3LMHeadModel", "a2d_qwen3:A2DQwen3Config", paper_blocks=False),
    # A Qwen3 checkpoint that was trained as a masked-diffusion model and kept its model type.
    "qwen3": Family("a2d_qwen3:A2DQwen3LMHeadModel", "a2d_qwen3:A2DQwen3Config", paper_blocks=False),
}


@dataclass(frozen=True)
class TeacherSpec:
    """How to ask one teacher (architecture.md: Teacher interface)."""

    architecture: str
    vocab_size: int
    mask_id: int
    eos_id: int
    block_size: int | None
    """None: the whole sequence is one block (a masked-diffusion model without blocks)."""
    attention: AttentionPattern
    logit_shift: int = 0
    drop_ids: tuple[int, ...] = ()
    """Ids removed before normalising: control tokens the teacher should never say."""


def resolve(name: str) -> Any:
    """The class that a `module:class` of the table names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)


def register_families() -> None:
    """Make transformers' Auto classes know every family: AutoTokenizer reads config.json too, and warns of others."""
    for family in FAMILIES.values():
        resolve(family.config_class)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The table row of a config.json.

    Raises: DataError: no row for this model type, or a needed field is missing.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise DataError(
            f"{where}/config.json: model_type {model_type!r} has no native class in tide; known: "
            f"{', '.join(sorted(FAMILIES))}. tide never runs a checkpoint's own code, so another architecture needs a "
            "row in shared/models/specs.py"
        )
    family = FAMILIES[model_type]
    missing = [name for name in family.required if type(config.get(name)) is not int]
    if missing:
        raise DataError(f"{where}/config.json lacks {', '.join(missing)} (integers): the checkpoint is incomplete")
    return family


def teacher_block_size(
    config: dict[str, Any], *, run_block_size: int, attention: Literal["native", "paper"], where: str
) -> int | None:
    """Tokens per block of a teacher: what its config.json states (null: no blocks), or else the run's.

    Raises: DataError: unknown architecture, or a block size that is no positive number.
    """
    family = family_of(config, where)
    if attention == "paper" and not family.paper_blocks:
        return None
    block_size = config.get("block_size", run_block_size)
    if block_size is not None and (type(block_size) is not int or block_size < 1):
        raise DataError(f"{where}/config.json: block_size = {block_size!r}: expected a positive number or null")
    return block_size


def teacher_spec(
    config: dict[str, Any], *, mask_id: int, eos_id: int, block_size: int | None,
    attention: Literal["native", "paper"], where: str,
) -> TeacherSpec:  # fmt: skip
    """The spec of one teacher from its config.json, its tokenizer's ids and `teacher_block_size`.

    Args: attention: `native` or `paper`.
    Raises: DataError: unknown architecture, missing field, or an id outside the vocabulary.
    """
    family = family_of(config, where)
    for name, token_id in (("mask", mask_id), ("eos", eos_id)):
        if not 0 <= token_id < config["vocab_size"]:
            raise DataError(
                f"{where}: {name} id {token_id} is outside the vocabulary of {config['vocab_size']} tokens that "
                "config.json states; the tokenizer belongs to another model"
            )
    return TeacherSpec(
        architecture=config["model_type"],
        vocab_size=config["vocab_size"],
        mask_id=mask_id,
        eos_id=eos_id,
        block_size=block_size,
        attention=family.native if attention == "native" else family.paper,
        logit_shift=family.logit_shift,
    )
