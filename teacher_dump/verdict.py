"""Does the teacher know this text, and is it asked as it was trained? Found out before the first shard.

Some samples of the plan, masked at t in [0.5, 1] (there a wrong mask hurts most; inside the times that its family was
trained on), are asked as the plan says, and in every other way that a mistake could have hidden: with another special
token as mask, with the other kind of attention inside blocks, with another template or none. A teacher that does no
better than a unigram model of the text, or that answers better in another way, is not asked rightly. Differences are
paired by sample; what chance does once in a thousand times for each way is not said. A better template is refused from
a larger gain on: text may be unlike the answers a template was trained with. What all answers were worth is counted
while shards are made (`shard_task.answered_sums`; shared/cache/verdict.py puts it in words).

Blocks of other sizes are not tried: smaller ones show a teacher more of the clean text, and so always look better.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..shared.errors import DataError, TideError
from ..shared.models.loading import read_config
from ..shared.models.specs import TeacherSpec, family_of
from ..shared.noising import GOLDEN_RATIO, keyed_generator
from ..shared.tokens import Dropped, TextEncoder
from .pairing import Pairing, open_pairing
from .shard_task import ShardTask, by_tokens
from .teacher import Pass, Teacher

NUM_SAMPLES = 192
"""A template may cost 0.2 nats of 4, and samples differ by far more."""
MASK_EVERY = 4
"""Other masks are tried on every so many of them: a wrong one costs whole nats."""
FEWEST_SAMPLES, FEWEST_TOKENS = 20, 300
"""Below these nothing is examined: chance would decide."""
LOWEST_T = 0.5
"""Of the probe's diffusion times; the highest is 1."""
SURE_Z = 3.09
"""One in a thousand, one-sided, for many samples."""
SMALLEST_GAIN = 0.02
"""Nats a token; less is not worth a word."""
MOST_MASKS = 12
"""Other special tokens tried as mask."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% if m.role != 'assistant' %}\n{% endif %}{% endfor %}"
_log = logging.getLogger(__name__)


class UnsoundTeacher(DataError):
    """The teacher does not know this text, or is asked in a way it was not trained for."""


@dataclass(frozen=True)
class Way:
    """A way to ask: what differs from the plan, in words, and what it takes."""

    name: str
    cure: str
    spec: TeacherSpec
    encoder: TextEncoder | None = None
    """None: the plan's own tokens."""
    refused_from: float = 0.1
    """Nats a token by which it must be better for the plan's way to be refused; below, it is only told."""
    every: int = 1
    """Tried on every so many samples."""


@dataclass(frozen=True)
class Examination:
    """What the probe found.

    Args:
        samples, tokens: asked about; logp, accuracy: of the clean tokens, a token.
        unigram_logp: of a unigram model of the text.
        doubts: why the teacher should not be trusted, in sentences; is_refused: they are reason enough to stop.
    """

    samples: int
    tokens: int
    logp: float
    accuracy: float
    unigram_logp: float
    doubts: tuple[str, ...]
    is_refused: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, numbers rounded."""
        return {
            "samples": self.samples, "tokens": self.tokens, "logp": round(self.logp, 3),
            "accuracy": round(self.accuracy, 4), "unigram_logp": round(self.unigram_logp, 3),
            "doubts": list(self.doubts), "refused": self.is_refused,
        }  # fmt: skip


def require_sound(task: ShardTask) -> tuple[str, ...]:
    """Examine the teacher of a task and refuse it, or say so, as `teacher.check` wants.

    Returns: doubts that were said and passed over.
    Raises: UnsoundTeacher: there are doubts, and `teacher.check` is refuse.
    """
    check = task.plan.config.teacher.check
    found = None if check == "off" else examine(task)
    if found is None:
        return ()
    if found.is_refused and check == "refuse":
        raise UnsoundTeacher(
            f"{task.plan.config.teacher.path}: {' '.join(found.doubts)} To dump all the same: --set teacher.check=warn"
        )
    for doubt in found.doubts:
        _log.warning("%s: %s The dump goes on.", task.plan.config.teacher.path, doubt)
    return found.doubts


def examine(task: ShardTask) -> Examination | None:
    """Ask the teacher about some samples in the plan's way and in others; None: too few for any verdict."""
    plan, pairing, teacher = task.plan, task.pairing, task.teacher
    if teacher is None or pairing.spec is None or plan.unigram is None or len(plan.samples) < FEWEST_SAMPLES:
        return None
    chosen = np.unique(np.linspace(0, len(plan.samples) - 1, NUM_SAMPLES).astype(int)).tolist()
    planned = [plan.samples[i] for i in chosen]
    conversations = [task.conversations.read(one.source, one.row, one.sample_id) for one in planned]
    probe = _Probe(task, conversations)
    own = probe.ask(Way("", "", pairing.spec))
    known = own.count > 0
    if known.sum() < FEWEST_SAMPLES or own.count.sum() < FEWEST_TOKENS:
        return None
    logp, accuracy = own.logp.sum() / own.count.sum(), own.correct.sum() / own.count.sum()
    unigram = plan.unigram["logp"]
    doubts, is_refused = [], False
    gain, is_sure = _paired(own.mean[known] - unigram)
    if not (is_sure and gain > 0):
        is_refused = True
        doubts.append(
            f"on {int(known.sum())} samples it gives the clean tokens {logp:.2f} nats on average and finds "
            f"{accuracy:.1%} of them, no better than a unigram model of the text ({unigram:.2f}). Its weights, mask, "
            "template or attention are wrong, or it does not know this kind of text."
        )
    for way in _other_ways(task):
        other = probe.ask(way)
        both = known & (other.count > 0)
        gain, is_sure = _paired(other.mean[both] - own.mean[both])
        if is_sure and gain > SMALLEST_GAIN:
            said = f"{way.name} it gives the clean tokens {gain:.2f} nats more on average: {way.cure}."
            doubts.append(said[0].upper() + said[1:])
            is_refused = is_refused or gain >= way.refused_from
    return Examination(
        int(known.sum()), int(own.count.sum()), float(logp), float(accuracy), unigram, tuple(doubts), is_refused
    )


@dataclass(frozen=True)
class _Sums:
    """Over each sample's answered tokens, [samples]."""

    logp: np.ndarray
    correct: np.ndarray
    count: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.logp / np.maximum(self.count, 1)


class _Probe:
    """The same samples under the same noise, to be asked in several ways."""

    def __init__(self, task: ShardTask, conversations: Sequence[Any]) -> None:
        self.task, self.conversations = task, conversations
        folder = task.pairing.teacher_folder
        assert folder is not None
        low, high = family_of(read_config(folder), str(folder)).recommended_t
        low, high = max(LOWEST_T, low), max(high, LOWEST_T)
        self.t = [low + (high - low) * (number * GOLDEN_RATIO % 1) for number in range(len(conversations))]
        encoded = [task.pairing.encode(conversation).teacher for conversation in conversations]
        self.answers = [one.x_0[slice(*one.content)] for one in encoded]  # ids, as the plan's way reads them

    def ask(self, way: Way) -> _Sums:
        """What the teacher says of each answer's masked tokens when it is asked in this way."""
        teacher = Teacher(self.task.teacher.model, way.spec)  # type: ignore[union-attr]
        pairing = self.task.pairing if way.encoder is None else replace(self.task.pairing, teacher=way.encoder)
        numbers = range(0, len(self.conversations), way.every)
        asked = [(number, *one) for number in numbers if (one := self._pass(number, pairing)) is not None]
        sums = np.zeros((3, len(self.conversations)))
        for group in by_tokens([2 * len(x_0) for _, x_0, _ in asked], self.task.plan.config.teacher.tokens_per_batch):
            numbers, x_0, passes = zip(*(asked[i] for i in group), strict=True)
            context = teacher.prefill(x_0, [teacher.last_block(one.masked) for one in passes])
            said = teacher.score(context, [p._replace(sample=i) for i, p in enumerate(passes)], k=0, temperatures=())
            logp, correct = said.gold_logp.double().cpu().numpy(), said.gold_is_top.cpu().numpy()
            end = 0
            for number, one in zip(numbers, passes, strict=True):
                start, end = end, end + int(one.answered.sum())
                sums[:, number] += logp[start:end].sum(), correct[start:end].sum(), end - start
        return _Sums(*sums)

    def _pass(self, number: int, pairing: Pairing) -> tuple[np.ndarray, Pass] | None:
        """One sample and what is asked about it; None: this way does not read the same answer."""
        conversation = self.conversations[number]
        try:
            sample = pairing.encode(conversation).teacher
        except (Dropped, TideError):
            return None
        expected, (first, last) = self.answers[number], sample.content
        length = min(len(expected), last - first)
        if not length or not np.array_equal(sample.x_0[first : first + length], expected[:length]):
            return None
        generator = keyed_generator(0, "verdict", conversation.sample_id)
        uniform = generator.random(4 * len(sample.x_0) + 64)[: len(sample.x_0) - first]
        masked = np.zeros(len(sample.x_0), bool)
        masked[first:] = uniform < self.t[number]
        answered = masked.copy()
        answered[first + length :] = False
        return (sample.x_0, Pass(0, masked, answered, np.zeros(len(masked), bool))) if answered.any() else None


def _other_ways(task: ShardTask) -> Iterator[Way]:
    """Every way that is tried beside the plan's own."""
    pairing, config = task.pairing, task.plan.config
    spec, encoder = pairing.spec, pairing.teacher
    assert spec is not None
    assert encoder is not None
    backend = encoder.tokenizer.backend_tokenizer
    added = {i: str(token.content) for i, token in backend.get_added_tokens_decoder().items() if i < spec.vocab_size}
    others = [i for i in added if i not in (spec.mask_id, spec.eos_id)]
    for i in sorted(others, key=lambda i: ("mask" not in added[i].lower(), i))[:MOST_MASKS]:
        yield Way(
            f"with {added[i]!r} (id {i}) as its mask in place of id {spec.mask_id}",
            "is that the token it was trained with? Then teacher.mask_token, its config.json or its tokenizer is wrong",
            replace(spec, mask_id=i),
            every=MASK_EVERY,
        )
    attention = spec.attention
    other = "bidirectional" if attention.causal else "causal"
    as_paper = config.teacher.attention == "paper"
    yield Way(
        f"with {other} attention inside blocks",
        "it was trained so, and is asked otherwise: its model_type may be another's (tide models)",
        replace(spec, attention=replace(attention, causal=not attention.causal)),
        refused_from=math.inf if as_paper else 0.1,
    )  # fmt: skip
    if as_paper:
        native = open_pairing(replace(config, teacher=replace(config.teacher, attention="native"))).spec
        if native is not None and native != spec:
            name, cure = "with teacher.attention=native, as it was trained,", "teacher.attention=paper was asked for"
            yield Way(name, cure, native, refused_from=math.inf)
    templates = {"without any chat template": BARE}
    if backend.token_to_id("<|im_start|>") is not None:
        templates["with ChatML as its chat template"] = CHATML
    for name, template in templates.items() if config.teacher.see == "own" else ():
        tokenizer = copy.copy(encoder.tokenizer)
        tokenizer.chat_template = template
        try:
            other_encoder = TextEncoder(
                tokenizer, block_size=encoder.block_size, max_length=encoder.max_length, mask_id=encoder.mask_id,
                eos_token=encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id),
            )  # fmt: skip
        except TideError:
            continue
        cure = "its own template is not the one it was trained with; look at chat_template.jinja and teacher.template"
        yield Way(name, cure, spec, other_encoder, refused_from=0.25)


def _paired(differences: np.ndarray) -> tuple[float, bool]:
    """Mean of differences [n], and whether it is above 0 by more than chance: Student's t at one in a thousand."""
    n = len(differences)
    if n < FEWEST_SAMPLES:
        return 0.0, False
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    z, df = SURE_Z, n - 1
    threshold = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)  # Cornish and Fisher
    return mean, mean > threshold * error
