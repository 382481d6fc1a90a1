"""Every setting of a run and its one default, as frozen dataclasses.

YAML (a recipe or `--config run.yaml`) and `--set a.b=c` -> `RunConfig`. Unknown names are refused with the
nearest known one, values are checked for type and range here, and nowhere else is a default repeated.
What changes a byte of the cache (data, student tokenizer, teacher, noise, signal, shards) is copied into the
plan and the manifest; training reads it from there, never from its own configuration.
"""

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from .config_tree import from_tree, merge, override, read_yaml, suggest, to_tree
from .errors import ConfigError

__all__ = [
    "EPS_T", "STORE_PATIENCE_S", "DataConfig", "DecodingConfig", "EvaluationConfig", "LossConfig", "NoiseConfig",
    "RunConfig", "ShardCacheConfig", "ShardConfig", "SignalConfig", "StudentConfig", "TeacherConfig", "TidalConfig",
    "TrainConfig", "WorkersConfig", "from_tree", "load_config", "recipe_names", "to_tree",
]  # fmt: skip

_log = logging.getLogger(__name__)

EPS_T = 1e-3
"""Smallest diffusion time (docs/math.md: t in [eps, 1])."""
STORE_PATIENCE_S = 60.0
"""How long an object store that is busy or out of reach is asked again."""
SMALLEST_HEAD = 1e-12
"""Probability of the kept tokens below which a stored tail counts as everything."""
MAX_TAIL_BUCKETS = 256
"""A position with so many costs more than the format saves."""


def _checked(default: Any, expected: str, fits: Callable[[Any], object] = lambda value: value > 0) -> Any:
    """A setting with its default and what else its values have to be, in words for a message; null is its type's."""
    return field(default=default, metadata={"expected": expected, "fits": fits})


def _require(condition: bool, setting: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{setting} = {value!r}: expected {expected}")


class _Section:
    """Settings of one section: every one is checked when the section is made."""

    def __init_subclass__(cls, where: str) -> None:
        cls._where = where

    def __post_init__(self) -> None:
        for setting in fields(self):  # pyright: ignore[reportArgumentType]
            value, check = getattr(self, setting.name), setting.metadata
            if check and value is not None:
                _require(bool(check["fits"](value)), f"{self._where}.{setting.name}", value, check["expected"])


_DEVICE = re.compile(r"auto|cpu|(cuda|mps|xpu|npu|hpu|mtia)(:\d+)?")


def _device() -> Any:
    return _checked("auto", "auto, cpu, or a kind such as cuda, cuda:1 or mps", _DEVICE.fullmatch)


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


def _is_ascending(values: Sequence[float]) -> bool:
    return sorted(set(values)) == list(values)


@dataclass(frozen=True)
class DataConfig(_Section, where="data"):
    """Where conversations come from (see shared/conversations.py for the syntax of `source`)."""

    source: str = "stdlib"
    columns: Mapping[str, str] = field(default_factory=dict)
    """`{messages: NAME}` or `{prompt: NAME, response: NAME}`; empty: recognised from the column names."""
    turns: Literal["last", "each"] = "last"
    """What is learnt of a conversation of several answers: the last one, or each, with what comes before as prompt."""
    skip_bad: bool = False
    """Leave out and count rows without a usable answer, and samples that the teacher cannot answer; False: an error."""
    limit: int | None = _checked(None, "a positive number or null")
    """Use so many conversations; None: all."""
    sample_seed: int | None = None
    """With `limit`: draw them at random with this seed; None: take the first."""
    max_length: int = _checked(512, "a positive number of tokens")
    """Student tokens a sample may have, prompt included; a multiple of `student.block_size`."""
    teacher_max_length: int | None = _checked(None, "a positive number of tokens")
    """The same for the teacher's tokens; None: `max_length`."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """A sample longer than one of these: its end is cut off, it is left out, or it ends the plan; each is counted."""
    alignment: Literal["bytes", "tokenkit"] = "bytes"
    """What finds the chunks of two tokenisations: `bytes`: tide, wherever both have a token boundary; `tokenkit`: the
    paper's library, which must be installed (shared/tokenkit_adapter.py)."""
    licence: str | None = None
    """Of the data, for the manifest; None: what the data sets' cards declare."""


@dataclass(frozen=True)
class StudentConfig(_Section, where="student"):
    """The model that is trained, and the tokenizer that the cache is made for."""

    path: str = ""
    """Checkpoint folder or hub id; a folder that holds only config.json and a tokenizer starts from random weights."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; None: `path`."""
    revision: str | None = None
    block_size: int = _checked(32, "a positive number of tokens")
    mask_token: str | None = None
    """Token used as [MASK]; None: what the checkpoint publishes, or else `<|mask|>`, added behind the vocabulary."""
    eos_token: str | None = None
    """Token that pads a sample to a block multiple and is learnt; None: the tokenizer's eos token."""
    template: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    """Extra arguments of the chat template."""


Quantization = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class TeacherConfig(_Section, where="teacher"):
    """The model that is asked once, in stage one only."""

    path: str = ""
    """Checkpoint folder or hub id; `none`, null or empty: no teacher, clean samples only (for `ce`)."""
    tokenizer: str | None = None
    revision: str | None = None
    attention: Literal["native", "paper"] = "native"
    """As the teacher was trained, or as the paper's code calls it (see docs/reproducing.md)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and arithmetic; routers of mixtures of experts compute in float32 either way."""
    quantization: Quantization | None = None
    """4-bit weights through bitsandbytes, for a teacher that does not fit otherwise; every answer changes."""
    device: str = _device()
    """Where it runs: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, `mps`; decides no byte of the
    plan, and of answers no more than another machine does."""
    devices_per_replica: int = _checked(1, "at least 1")
    """Accelerators that one copy of the teacher is spread over; decides no byte of the cache."""
    see: Literal["own", "student"] = "own"
    """`own`: the teacher reads its own chat template and tokens; `student`: the student's ids (shared vocabulary)."""
    diffusion: bool = False
    """The checkpoint is a masked-diffusion model although nothing in it says so (its files are those of an
    autoregressive one, which tide refuses to ask)."""
    mask_token: str | None = None
    """A token of its tokenizer; None: what the checkpoint publishes, which may not be contradicted."""
    eos_token: str | None = None
    """The same; it fills up the last block."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Extra arguments of its chat template."""
    licence: str | None = None
    """Of the teacher, for the manifest; None: what the README.md of its checkpoint declares."""
    check: Literal["refuse", "warn", "off"] = "refuse"
    """Before the first shard the teacher is asked about some samples: one that knows no more of the text than a unigram
    model, or answers better when it is asked in another way, is refused; warn: it is said, and the dump goes on."""
    tokens_per_batch: int = _checked(8192, "a positive number")
    """Token budget of one teacher forward (x_0 and all noised pieces); part of the plan, never shrunk silently."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization is not None and self.devices_per_replica > 1:
            raise ConfigError("teacher.quantization and teacher.devices_per_replica > 1 exclude each other: drop one")


@dataclass(frozen=True)
class NoiseConfig(_Section, where="noise"):
    """How views are drawn (docs/math.md, Noise and CompDemo)."""

    seed: int = 0
    views: int = _checked(10, "at least 1")
    """Noise draws per sample; one is used per epoch."""
    timesteps: Literal["stratified", "uniform"] = "stratified"
    t_min: float = EPS_T
    t_max: float = 1.0
    unit: Literal["chunk", "token"] = "chunk"
    comp_demo: bool = True
    demo_ratio: float = _checked(0.5, "a probability in [0, 1]", _is_share)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.t_min <= self.t_max <= 1, "noise.t_min", (self.t_min, self.t_max), "0 < t_min <= t_max <= 1")


@dataclass(frozen=True)
class SignalConfig(_Section, where="signal"):
    """What is kept of the teacher's answer (docs/cache_format.md)."""

    kind: Literal["topk", "chunk"] = "topk"
    """`chunk`: log-probabilities of chunks only (CALM family); `topk`: SparseLogits at token-level targets as well."""
    top_k: int = _checked(16, "a positive number of tokens")
    min_probability: float = _checked(0.0, "0 <= p < 1", lambda p: 0 <= p < 1)
    """Entries of the top-k below this probability are left to the tail (adaptive k); 0 keeps all k."""
    temperatures: tuple[float, ...] = _checked(
        (1.0, 2.0), "distinct temperatures > 0 in ascending order",
        lambda values: values and min(values) > 0 and _is_ascending(values),
    )  # fmt: skip
    """Training temperatures whose tail mass is stored; token-level losses may use no other."""
    support: Literal["shared"] | int = _checked(
        "shared", "shared, or a number of ids", lambda value: value == "shared" or value > 0
    )
    """Tokens that token-level losses range over: all with equal bytes in both vocabularies, or ids below a number."""
    logp_dtype: Literal["float32", "float16"] = "float16"
    """Precision of stored log-probabilities of chunks and tails."""
    logp_step: float | None = _checked(
        1 / 16, "a power of two up to 1 (1/16, 1/32, ...), whose multiples are exact in float32, or null",
        lambda step: 0 < step <= 1 and math.frexp(step)[0] == 0.5,
    )  # fmt: skip
    """Log-probabilities of top tokens are rounded to multiples of this many nats; None: stored as `logp_dtype`."""
    codec: Literal["plain", "compact"] = "plain"
    """`compact`: kept tokens as frequency ranks and differences, about an eighth fewer bytes; `plain`: as they are."""
    tail_buckets: tuple[int, ...] = _checked(
        (), f"fewer than {MAX_TAIL_BUCKETS} distinct ids > 0 in ascending order",
        lambda cuts: _is_ascending(cuts) and len(cuts) < MAX_TAIL_BUCKETS and all(cut > 0 for cut in cuts),
    )  # fmt: skip
    """Student ids, ascending, at which the tail is cut into ranges of ids whose masses are stored one by one.
    Vocabularies count common tokens first: a range holds tokens of like frequency. Empty: the tail is one mass."""
    audit_share: float = _checked(0.0, "a share in [0, 1]", _is_share)
    """Share of the token-level targets that are also stored in full, for `tide inspect-cache --audit`. Each takes about
    1.3 bytes for every token of the loss support: at 152,000 tokens, a share of 0.0002 doubles the cache. A worker
    holds those of one shard in memory, at 2 bytes a token (4 in float32)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what, cure in (
            ("audit_share", "an audit is", "leave the share at 0"), ("tail_buckets", "tails are", "leave it empty"),
        ):  # fmt: skip
            if getattr(self, name) and self.kind == "chunk":
                raise ConfigError(
                    f"signal.{name} = {getattr(self, name)}: {what} of token-level targets, and signal.kind = 'chunk' "
                    f"has none; use signal.kind=topk, or {cure}"
                )
        if self.codec == "compact" and self.logp_step is None:
            raise ConfigError(
                "signal.codec = 'compact' counts in steps: set signal.logp_step, or use signal.codec=plain"
            )


@dataclass(frozen=True)
class ShardConfig(_Section, where="shards"):
    """How stage one is cut into tasks; the number of workers is not part of it."""

    samples_per_shard: int = _checked(512, "at least 1")
    cpu_threads: int = _checked(1, "at least 1")
    """Threads of one worker's tensor operations on CPU: fixed, because a sum's rounding depends on it."""


@dataclass(frozen=True)
class WorkersConfig(_Section, where="workers"):
    """How the workers of stage one stop, fail and take over; decides no byte, so it may change from run to run."""

    grace_s: float = _checked(30.0, "seconds >= 0", lambda value: value >= 0)
    """After SIGTERM or SIGUSR1, the shard in hand may take so long to finish before it is dropped."""
    lease_s: float = _checked(120.0, "a positive number of seconds")
    """A shard whose worker gave no sign of life for so long is taken over; if it died on this machine, at once."""
    stuck_s: float = _checked(900.0, "a positive number of seconds")
    """A worker whose shard made no progress for so long gives no more signs of life."""
    store_patience_s: float = _checked(STORE_PATIENCE_S, "a positive number of seconds")
    """--out is an object store: how long one that is busy or out of reach is asked again before the worker gives up."""
    scratch: str | None = None
    """--out is an object store: folder for the shard in hand, on its way there; None: the system's temporary folder."""

    @property
    def heartbeat_s(self) -> float:
        """Between two signs of life: a lease is several of these."""
        return min(10.0, self.lease_s / 6)


@dataclass(frozen=True)
class ShardCacheConfig(_Section, where="shard_cache"):
    """Where shards of caches that lie elsewhere are kept on this machine; decides nothing that is computed."""

    folder: str | None = None
    """None: `tide/shards` below $XDG_CACHE_HOME, or below ~/.cache."""
    limit_gb: float = _checked(100.0, "a positive number of gigabytes")
    """Those not used for longest make room for others; what running commands read stays, even beyond the limit."""

    @property
    def path(self) -> Path:
        """The folder."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.folder or f"{base}/tide/shards").expanduser().absolute()


@dataclass(frozen=True)
class TidalConfig(_Section, where="tidal"):
    """TIDAL's interpolation weights and time weighting (paper §2.1)."""

    axis: Literal["both", "training_only", "timestep_only"] = "both"
    schedule: Literal["cosine", "linear"] = "cosine"
    lambda_init: float = 0.1
    lambda_max: float = 0.9
    timestep_weight: Literal["uniform", "midrange"] = "uniform"

    def __post_init__(self) -> None:
        _require(
            0 <= self.lambda_init <= self.lambda_max <= 1,
            "tidal.lambda_init", (self.lambda_init, self.lambda_max), "0 <= lambda_init <= lambda_max <= 1",
        )  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """One weighted term of the objective; a recipe lists several."""

    name: Literal["ce", "kl", "calm"]
    weight: float = 1.0
    temperature: float = 1.0
    reverse: bool = False
    tidal: TidalConfig | None = None
    target: Literal["teacher", "clean"] = "teacher"
    """`clean`: the hard-label control; every teacher distribution is replaced by the clean token."""
    chunks: Literal["all", "unmatched"] = "all"
    """calm only. `unmatched`: chunks that are not one token on each side; a token-level loss serves the others."""
    timestep_weight: Literal["scheduler", "uniform"] = "scheduler"
    """ce only. w(t) = 1/t, or 1."""
    normalise: Literal["token", "sequence", "batch"] = "token"
    """ce only. Divide by the maskable tokens of the global batch, of each sequence, or by the batch size."""

    def __post_init__(self) -> None:
        where = f"losses.{self.name}"
        _require(self.weight >= 0, f"{where}.weight", self.weight, "a weight >= 0")
        _require(self.temperature > 0, f"{where}.temperature", self.temperature, "a temperature > 0")
        if self.reverse and self.tidal is not None:
            raise ConfigError(
                f"{where}: reverse and tidal exclude each other. TIDAL moves the target towards the student, and a "
                "reverse loss already takes its expectation under the student: the gradient of the mixture vanishes "
                "where the teacher should correct most (paper, gradient analysis of §2). Drop one of the two."
            )
        if self.name == "ce" and (self.reverse or self.tidal is not None or self.target == "clean"):
            raise ConfigError("losses.ce takes neither reverse, tidal nor target: its target is the clean token")
        if self.target == "clean" and (self.reverse or self.tidal is not None or self.name != "kl"):
            raise ConfigError(f"{where}.target = 'clean' is the hard-label control of the forward KL only")
        defaults = {f.name: f.default for f in fields(self)}
        for name, owner in _LOSS_OF_SETTING.items():
            if self.name != owner and getattr(self, name) != defaults[name]:
                raise ConfigError(f"{where}.{name} has no effect: only the loss {owner} reads it; remove it")
        _require(
            self.name != "ce" or self.temperature == 1, f"{where}.temperature", self.temperature,
            "nothing: cross-entropy is taken at temperature 1",
        )  # fmt: skip


_LOSS_OF_SETTING = {"chunks": "calm", "timestep_weight": "ce", "normalise": "ce"}


Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]  # those of transformers.get_scheduler that follow from the step and the number of steps alone


@dataclass(frozen=True)
class TrainConfig(_Section, where="train"):
    """Optimisation of the student."""

    seed: int = 0
    epochs: float = _checked(10.0, "a positive number")
    """Passes over the samples; each epoch shows one view of every sample. Ignored when `steps` is given."""
    steps: int | None = _checked(None, "a positive number or null")
    batch_size: int = _checked(16, "at least 1")
    """Samples of one optimiser step, over all processes and accumulation steps."""
    micro_batch_size: int | None = _checked(None, "at least 1, or null for no limit")
    """Samples of one forward at most; None: all that a process has of `batch_size`. The gradient is the same."""
    views_per_row: int = _checked(1, "at least 1")
    """Views of one sample that share a training row [x_t1, ..., x_tK, x_0]."""
    max_views: int | None = _checked(None, "a positive number or null")
    """Train on so many views of each sample, the first ones; None: on all that the cache holds."""
    max_top_k: int | None = _checked(None, "a positive number or null")
    """Read so many top tokens of each target, and count the others to the tail; None: all that the cache holds."""
    ce_noise: Literal["cached", "fresh"] = "cached"
    """Masks of the cross-entropy: the cached views', or drawn anew in extra steps (see `fresh_ratio`)."""
    fresh_ratio: float = _checked(0.5, "a share in [0, 1]", _is_share)
    """ce_noise = fresh: share of steps that are CE-only on fresh noise; with CE as the only loss, every step is."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: torch.optim.Muon on hidden matrices, AdamW on embeddings, head and norms."""
    lr: float = _checked(1e-4, "a learning rate in (0, 1]", lambda lr: 0 < lr <= 1)
    muon_lr: float = _checked(8e-3, "a learning rate in (0, 1]", lambda lr: 0 < lr <= 1)
    betas: tuple[float, float] = _checked(
        (0.9, 0.999), "two numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)
    )
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    """A schedule of transformers.get_scheduler; it scales both learning rates."""
    warmup_ratio: float = _checked(0.1, "a share in [0, 1]", _is_share)
    grad_clip: float | None = _checked(1.0, "a norm > 0, or null for no clipping")
    """Largest norm of the whole gradient; None: not clipped."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward and backward pass, under autocast; weights and optimiser are float32 either way."""
    device: str = _device()
    """Where the student is trained: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, `mps`; of
    several processes each takes its own. A run may continue on another."""
    gradient_checkpointing: bool = False
    log_every: int = _checked(10, "at least 1")
    save_every: int = _checked(500, "at least 1")
    keep_checkpoints: int = _checked(2, "at least 1")
    heldout_every: int = _checked(500, "at least 1")
    """With --heldout: the student is scored before the first step, every so many steps, and after the last."""
    collective_timeout_s: float = _checked(
        600.0, "seconds, more than 0 and at most a day", lambda value: 0 < value <= 86400
    )
    """Longest wait for the other processes of a run; a dead one is noticed earlier, within about a minute."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers besides metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lr, decay = max(self.lr, self.muon_lr), self.weight_decay
        _require(0 <= decay < 1 / lr, "train.weight_decay", decay, f"a number >= 0 and less than {1 / lr:g}: 1 / lr")


@dataclass(frozen=True)
class DecodingConfig(_Section, where="decoding"):
    """How a student writes (student_train/sampling.py); every field but `device` changes the answer."""

    max_new_tokens: int = _checked(256, "at least 1")
    steps: int | None = _checked(None, "at least 1")
    """Denoising steps of a whole answer, spread over its blocks; None: `max_new_tokens`, one token a step."""
    block_size: int | None = _checked(None, "at least 1")
    """None: what the checkpoint was trained with."""
    prompt_alignment: Literal["training", "boundary"] = "training"
    """`training`: blocks count from the prompt's first token, and the answer may begin inside one, as in training;
    `boundary`: the answer begins a block (the paper's code pads prompts on the left to get there)."""
    temperature: float = _checked(0.0, "0 or more", lambda value: value >= 0)
    """0: the most likely token. Above: tokens are drawn from softmax(logits / temperature)."""
    top_p: float = _checked(1.0, "a probability in (0, 1]", lambda p: 0 < p <= 1)
    """Draw only among the most likely tokens that together hold this probability."""
    guidance: float = _checked(0.0, "0 (none) or more", lambda value: value >= 0)
    """Classifier-free guidance g: logits u + (1 + g) (c - u), with u from a masked prompt; doubles the work."""
    threshold: float | None = _checked(None, "a probability, or null", lambda p: 0 < p <= 1)
    """Also fix every token of at least this confidence in a step; None: as many as the schedule says."""
    stop: tuple[str, ...] = _checked((), "texts that are not empty", all)
    """Texts that end an answer; they are not part of it."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the forward passes, under autocast; None: bf16 on accelerators, fp32 on the CPU."""
    device: str = _device()
    """Where it writes, and `tide eval` asks: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`,
    `mps`; in no key of a result."""


@dataclass(frozen=True)
class EvaluationConfig(_Section, where="evaluation"):
    """How `tide eval` asks and scores, beside `decoding`; every field may change a score."""

    seed: int = 0
    """Of all random numbers; each request's follow from this and its own text alone."""
    draws: int = _checked(128, "more than 0")
    """Masks per block of an answer whose likelihood is asked; fewer where all masks of a block can be enumerated."""
    think_prefix: Literal["template", "append"] = "template"
    """`template`: what the student's chat template writes before an answer, as in training; `append`: an empty think
    block is also added to prompts without one, as the paper's code does whatever the template says."""
    long_inputs: Literal["truncate", "refuse"] = "truncate"
    """A prompt that leaves no room for its answer loses its beginning, and is counted; or it is an error."""
    code_time_s: float = _checked(10.0, "more than 0")
    """With --allow-code-execution: longest time of one program."""
    code_memory_mb: int = _checked(1024, "more than 0")
    """Largest address space of one program."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what `recipes/*.yaml` and `--config` files hold."""

    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    signal: SignalConfig = field(default_factory=SignalConfig)
    shards: ShardConfig = field(default_factory=ShardConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    shard_cache: ShardCacheConfig = field(default_factory=ShardCacheConfig)
    losses: tuple[LossConfig, ...] = (LossConfig(name="ce"),)
    train: TrainConfig = field(default_factory=TrainConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        block = self.student.block_size
        _require(
            self.data.max_length % block == 0, "data.max_length", self.data.max_length,
            f"a multiple of student.block_size = {block}, so that truncation never needs an invented EOS",
        )  # fmt: skip
        if self.train.ce_noise == "fresh" and not any(loss.name == "ce" and loss.weight for loss in self.losses):
            raise ConfigError("train.ce_noise = 'fresh': its extra steps are cross-entropy alone; give ce a weight > 0")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with tide, sorted."""
    folder = resources.files("tide.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(
    recipe: str | None = None, path: str | Path | None = None, overrides: Sequence[str] = (), *,
    tell: Callable[[str], None] = _log.warning,
) -> RunConfig:  # fmt: skip
    """Merge a recipe, a YAML file and `a.b=c` overrides, in this order, into one checked configuration.

    A recipe's settings of its own teacher and student (`OF_MODEL`) hold for these two alone: where another one is
    named they are dropped, unless the file or an override gives them again, and `tell` says which.

    Args:
        recipe: a name of `recipe_names()`.
        path: a YAML file with the same sections as a recipe.
        overrides: strings `section.setting=value`, the value as in a YAML file; list items by index
            (`losses.0.weight=2`).
        tell: called with a sentence about what was dropped.
    Raises: ConfigError: unknown recipe, file, section or setting; a value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if recipe is not None:
        if recipe not in recipe_names():
            raise ConfigError(f"no recipe {recipe!r}{suggest(recipe, recipe_names())}")
        merge(tree, read_yaml(resources.files("tide.recipes").joinpath(f"{recipe}.yaml").read_text(), recipe))
    of_recipe = copy.deepcopy(tree)
    if path is not None:
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from error
        given = read_yaml(text, str(path))
        merge(tree, copy.deepcopy(given))
    for item in overrides:
        override(tree, item)
    teacher = tree.get("teacher")
    if isinstance(teacher, dict) and "path" in teacher and teacher["path"] in (None, "none"):
        teacher["path"] = ""  # a folder of this name is ./none
    named = {*_leaf_names(given), *(item.partition("=")[0].strip() for item in overrides)}
    for side in OF_MODEL:
        _drop_of_another_model(side, tree, of_recipe, named, recipe or "", tell)
    return from_tree(RunConfig, tree)


OF_MODEL = {
    "teacher": (
        "teacher.tokenizer", "teacher.revision", "teacher.attention", "teacher.see", "teacher.mask_token",
        "teacher.eos_token", "teacher.template", "teacher.licence", "signal.support", "data.teacher_max_length",
    ),
    "student": (
        "student.tokenizer", "student.revision", "student.mask_token", "student.eos_token", "student.template",
    ),
}  # fmt: skip
"""Settings of a recipe that say something of the one model it names, and nothing of another."""


def _drop_of_another_model(
    side: str, tree: dict[str, Any], of_recipe: Mapping[str, Any], named: set[str], recipe: str,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Take a recipe's settings of its own teacher or student out of the tree if the run has another one."""
    sections = (one.get(side) for one in (of_recipe, tree))
    own, path = (section.get("path") if isinstance(section, dict) else None for section in sections)
    if not own or not isinstance(path, str) or not path or is_same_model(path, own):
        return
    dropped = []
    for name in OF_MODEL[side]:
        section, setting = name.split(".")
        known = of_recipe.get(section, {})
        if setting in known and not any(one == name or one.startswith(f"{name}.") for one in named):
            del tree[section][setting]
            if known[setting] != getattr(getattr(RunConfig(), section), setting):
                dropped.append(f"{name} = {known[setting]}")
    if dropped:
        tell(
            f"recipe {recipe} is made for the {side} {own}; for {path} its settings of that one are not used "
            f"({', '.join(dropped)}): what the checkpoint publishes holds. --set gives others"
        )


def is_same_model(path: str, hub_id: str) -> bool:
    """Is a path this Hub model: its id, a local folder of its name, or its place in the Hub client's cache?"""
    parts = Path(path).parts
    return path == hub_id or f"models--{hub_id.replace('/', '--')}" in parts or parts[-1:] == (hub_id.split("/")[-1],)


def _leaf_names(tree: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for name, value in tree.items():
        full = f"{where}.{name}" if where else str(name)
        if isinstance(value, Mapping) and value:
            yield from _leaf_names(value, full)
        else:
            yield full
