"""What tide must know of a model beyond its config.json: one table row per architecture (docs/models.md).

model_type -> family: the native class, how x_0 and x_t attend (`native` as trained, `paper` as the paper's code calls
it), blocks or none, the logit shift, the published special ids. A checkpoint whose vocabulary is large enough to hold
the published ids must have them there; smaller ones (tests, demos) take their ids from the tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from ..attention import AttentionPattern
from ..errors import ConfigError, DataError

BIDIRECTIONAL = AttentionPattern(causal=False)
CAUSAL = AttentionPattern(causal=True)


@dataclass(frozen=True)
class Family:
    """One row: everything that is common to the checkpoints of one architecture."""

    model_class: str
    """`module:class` below tide.shared.models."""
    config_class: str
    examples: str
    """Published checkpoints of this kind, for `tide models`."""
    only_if: tuple[str, Any] | None = None
    """A field of config.json and its value that tell this row from others of the same model type."""
    native: AttentionPattern = BIDIRECTIONAL
    paper: AttentionPattern = BIDIRECTIONAL
    block_size: int | Literal["run"] | None = "run"
    """Where config.json says nothing: the block it was trained with, the run's block size, or None: no blocks."""
    block_field: str = "block_size"
    """Field of config.json that may state the block size."""
    paper_blocks: bool = True
    """False: the paper's code calls it with the whole noised sequence as one block, without x_0."""
    logit_shift: int = 0
    """1: the answer for a position is read one position earlier, as in an autoregressive model."""
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    drop_tokens: tuple[str, ...] = ()
    """Control tokens a teacher may say and a student never should; those the tokenizer has are dropped."""
    is_autoregressive: bool = False
    """Plain autoregressive checkpoints have this model type too; converted ones say what they are."""
    recommended_t: tuple[float, float] = (0.0, 1.0)
    """Diffusion times the model was trained on; outside, a plan warns."""
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers")
    """Fields that config.json must have; the rest may fall back to the class's defaults."""


def _bd3lm(name: str, examples: str, *, is_autoregressive: bool = False) -> tuple[Family, ...]:
    """Anybody's conversion of such a model, with any tokenizer: there are no published ids to compare with."""
    classes = f"a2d:A2D{name}LMHeadModel", f"a2d:A2D{name}Config"
    return (Family(*classes, examples, paper_blocks=False, is_autoregressive=is_autoregressive),)


FAMILIES: dict[str, tuple[Family, ...]] = {
    "a2d-qwen3": _bd3lm("Qwen3", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1, what tide convert and train-student write"),
    "a2d-qwen2": _bd3lm("Qwen2", "dLLM's conversions of Qwen2 and Qwen2.5, what tide convert writes"),
    "a2d-llama": _bd3lm("Llama", "dLLM's conversions of Llama and SmolLM2, what tide convert writes"),
    # Checkpoints that kept their model type: trained as a masked-diffusion model, or about to be converted.
    "qwen3": _bd3lm("Qwen3", "masked-diffusion models that kept this model type", is_autoregressive=True),
    "qwen2": _bd3lm("Qwen2", "masked-diffusion models that kept this model type", is_autoregressive=True),
    "llama": _bd3lm("Llama", "masked-diffusion models that kept this model type", is_autoregressive=True),
    "llada2_moe": (
        Family(
            "llada2:LLaDA2MoeModelLM", "llada2:LLaDA2Config", "inclusionAI/LLaDA2.0-mini, -flash, 2.1, 2.2",
            block_size=32, paper_blocks=False,
            mask_id=156895, eos_id=156892, pad_id=156892, recommended_t=(0.3, 0.8),
            # LLaDA2.2 edits text; the names of its two control tokens are an assumption (docs/models.md)
            drop_tokens=("<|delete|>", "<|insert|>"),
        ),
    ),
    "wedlm": (
        Family(
            "qwen_teachers:WeDLMQwen2ForCausalLM", "qwen_teachers:WeDLMQwen2Config", "WeDLM-7B",
            only_if=("qk_norm", False), native=CAUSAL, block_size=32, mask_id=151665, pad_id=151643,
        ),
        Family(
            "qwen_teachers:WeDLMForCausalLM", "qwen_teachers:WeDLMConfig", "tencent/WeDLM-8B-Instruct",
            native=CAUSAL, block_size=32, mask_id=151665, pad_id=151643,
        ),
    ),
    "sdar": (
        Family(
            "qwen_teachers:SDARForCausalLM", "qwen_teachers:SDARConfig", "SDAR, TraDo",
            block_size=4, mask_id=151669, pad_id=151643,
        ),
    ),
    "Dream": (
        Family(
            "qwen_teachers:DreamModel", "qwen_teachers:DreamConfig", "Dream, Dream-Coder, DiffuCoder",
            block_size=None, logit_shift=1, mask_id=151666, pad_id=151643,
        ),
    ),
    "Fast_dLLM_Qwen": (
        # Its training shifts the logits of the whole x_t half by one, so a block's first token is answered by the last
        # of the block before, noised as that is; its decoder reads the same place after that block is finished.
        Family(
            "qwen_teachers:FastDLLMForCausalLM", "qwen_teachers:FastDLLMConfig", "Fast-dLLM v2",
            block_size=32, block_field="bd_size", logit_shift=1, mask_id=151665, eos_id=151645,
        ),
    ),
    "llada": (
        Family(
            "llada:LLaDAModelLM", "llada:LLaDAConfig", "GSAI-ML/LLaDA-8B-Base, -Instruct, 1.5",
            block_size=None, mask_id=126336, eos_id=126081,
            required=("vocab_size", "d_model", "n_layers", "n_heads"),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TeacherSpec:
    """How to ask one teacher (docs/teachers.md)."""

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
    for rows in FAMILIES.values():
        for family in rows:
            resolve(family.config_class)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The table row of a config.json.

    Raises: DataError: no row for this model type, or a needed field is missing.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise DataError(
            f"{where}/config.json: model_type {model_type!r} has no native class in tide; known: "
            f"{', '.join(sorted(FAMILIES))} (tide models tells more). tide never runs a checkpoint's own code, so "
            "another architecture needs a row in shared/models/specs.py"
        )
    rows = FAMILIES[model_type]
    family = next((row for row in rows if row.only_if and config.get(row.only_if[0]) == row.only_if[1]), rows[-1])
    missing = [name for name in family.required if type(config.get(name)) is not int]
    if missing:
        raise DataError(f"{where}/config.json lacks {', '.join(missing)} (integers): the checkpoint is incomplete")
    return family


def families() -> list[dict[str, str]]:
    """What `tide models` and docs/teachers.md show: a row for each kind of checkpoint, in words."""
    rows = []
    for model_type, family in ((name, family) for name, kinds in FAMILIES.items() for family in kinds):
        blocks = "the run's" if family.block_size == "run" else str(family.block_size)
        native, paper = ("causal" if one.causal else "bidirectional" for one in (family.native, family.paper))
        low, high = family.recommended_t
        rows.append({
            "model_type": model_type + (f" ({family.only_if[0]}: {family.only_if[1]})" if family.only_if else ""),
            "for example": family.examples,
            "serves as": "teacher and student" if family.model_class.startswith("a2d:") else "teacher",
            "blocks": "none" if family.block_size is None else f"{blocks}, or {family.block_field} of its config.json",
            "attention": f"{native}; paper: {paper}" + ("" if family.paper_blocks else ", no blocks"),
            "mask id": "its own" if family.mask_id is None else str(family.mask_id),
            "logits": "one position earlier" if family.logit_shift else "same position",
            "t": "any" if (low, high) == (0.0, 1.0) else f"{low:g} to {high:g}",
            "note": "must say that it is no plain autoregressive model" if family.is_autoregressive else "",
        })  # fmt: skip
    return rows


def published_mask_id(config: dict[str, Any], where: str) -> int | None:
    """The mask id of the family's published checkpoints, if this one's vocabulary holds it; else None."""
    family = family_of(config, where)
    return family.mask_id if family.mask_id is not None and family.mask_id < config["vocab_size"] else None


def require_diffusion(config: Mapping[str, Any], where: str, *, has_mask: bool) -> None:
    """Refuse a plain autoregressive checkpoint as a teacher: its files and a converted model's may be alike.

    Args: has_mask: its tokenizer has a mask token.
    Raises: DataError: nothing in the checkpoint says that it is a masked-diffusion model.
    """
    made_by = config.get("architectures") or []
    declared = isinstance(made_by, list) and any(str(name).startswith(("A2D", "BD3LM")) for name in made_by)
    says_so = declared or has_mask or config.get("mask_token_id") is not None
    if says_so or not family_of(config, where).is_autoregressive:
        return
    raise DataError(
        f"{where}: a plain autoregressive checkpoint ({config['model_type']}, {made_by}): it knows no mask, in "
        "config.json (mask_token_id) or its tokenizer, and predicts each token from those before it. Expected a "
        "masked-diffusion model (tide models lists them). If this is one that merely does not say so, set "
        "teacher.diffusion=true and teacher.mask_token"
    )


def require_published_ids(
    config: dict[str, Any], where: str, *, mask_id: int | None, eos_id: int | None, pad_id: int | None
) -> None:
    """Compare a tokenizer's special ids with the published ones; None is not compared.

    Raises: ConfigError: names the id that differs. A small vocabulary that cannot hold the published ids passes.
    """
    family = family_of(config, where)
    for name, found, published in (
        ("mask", mask_id, family.mask_id), ("eos", eos_id, family.eos_id), ("pad", pad_id, family.pad_id),
    ):  # fmt: skip
        if found is None or published is None or published >= config["vocab_size"] or found == published:
            continue
        remedy = f"name the right one with teacher.{name}_token" if name != "pad" else "use the checkpoint's own"
        raise ConfigError(
            f"{where}: the tokenizer's {name} id is {found}, published {config['model_type']} checkpoints have "
            f"{published}: this tokenizer belongs to another model, or the model was changed; {remedy}"
        )


def teacher_block_size(
    config: dict[str, Any], *, run_block_size: int, attention: Literal["native", "paper"], where: str
) -> int | None:
    """Tokens per block of a teacher: what its config.json states (null: no blocks), what its family has, the run's.

    Raises: DataError: unknown architecture, or a block size that is no positive number.
    """
    family = family_of(config, where)
    if family.block_size is None or (attention == "paper" and not family.paper_blocks):
        return None
    default = run_block_size if family.block_size == "run" else family.block_size
    block_size = config.get(family.block_field, default)
    if block_size is not None and (type(block_size) is not int or block_size < 1):
        raise DataError(
            f"{where}/config.json: {family.block_field} = {block_size!r}: expected a positive number or null"
        )
    return block_size


def teacher_spec(
    config: dict[str, Any], *, mask_id: int, eos_id: int, block_size: int | None,
    attention: Literal["native", "paper"], where: str, drop_ids: tuple[int, ...] = (),
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
        drop_ids=drop_ids,
    )


def outside_recommended_t(config: dict[str, Any], where: str, *, t_min: float, t_max: float) -> str | None:
    """A sentence about diffusion times the teacher was not trained on; None: all are inside."""
    low, high = family_of(config, where).recommended_t
    if low <= t_min and t_max <= high:
        return None
    return (
        f"noise.t_min = {t_min:g} and noise.t_max = {t_max:g}: {config['model_type']} was trained on diffusion times "
        f"in [{low:g}, {high:g}] and may answer worse outside"
    )
