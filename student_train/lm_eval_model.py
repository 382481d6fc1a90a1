"""A student as lm-eval sees it: requests -> answers and likelihoods, through the one decode function of sampling.py.

Registered as `tide`. What a request's result depends on is the student, the settings and the request itself: seeds are
keyed by its text, so that order, batch and number of processes decide nothing. The same three are in every key of a
cache: lm-eval's request cache (`tokenizer_name`), its response cache (`--use_cache`, where each combination of student
and settings gets a table of its own) and the result files of `tide eval`.

Needs lm-eval (`pip install 'tide-distill[eval]'`); nothing else in tide imports this module before it is used.
"""

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..shared.bounded import Refused
from ..shared.cache.files import sha256_file
from ..shared.config import DecodingConfig, EvaluationConfig, RunConfig, load_config, to_tree
from ..shared.config_tree import suggest
from ..shared.errors import ConfigError, DataError
from ..shared.models.loading import local_folder
from .likelihood import AnswerScorer
from .open_decoder import Writer, open_writer
from .sampling import Decoder, Request, Snapshot, answer_settings

_LOG = logging.getLogger(__name__)
THINK_PREFIX = "<think>\n\n</think>\n\n"
_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_OF_STUDENT = ("tokenizer", "revision", "mask_token", "eos_token")
_OF_REQUESTS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_new_tokens"}
_AUTO_BATCH = 16
CUT_KEY = "cut "
"""In lm-eval's response cache, before the digest of a text that lost its beginning."""


class OpenStudent(NamedTuple):
    """A student that is loaded, and the SHA-256 of what it consists of."""

    writer: Writer
    fingerprint: str


def open_student(config: RunConfig) -> OpenStudent:
    """Load a student for evaluation. Raises: as `open_writer`."""
    writer = open_writer(config)
    folder = local_folder(config.student.path, config.student.revision)
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    digest.update(json.dumps([writer.encoder.fingerprint, writer.encoder.mask_id, writer.encoder.eos_id]).encode())
    return OpenStudent(writer, digest.hexdigest())


class TideLM(TemplateLM):
    """A block-diffusion student under evaluation.

    Args:
        pretrained: checkpoint folder or hub id, or a student that is open already.
        batch_size: answers written at a time; a number, or lm-eval's `auto`.
        max_batch_size: for lm-eval's sake.
        device: `decoding.device`; but `cuda:0`, which lm-eval's command asks for on every machine, means auto.
        max_length: prompt and answer together; None: what the model has positions for.
        config: settings, all of which come before a task's own. None: `arguments` alone do.
        arguments: settings of `decoding` and `evaluation`, and tokenizer, revision, mask_token, eos_token.
    Raises: ConfigError: an argument nobody knows; no mask token. DataError, Unavailable: as `open_writer`.
    """

    def __init__(
        self, pretrained: str | OpenStudent = "", *, batch_size: int | str = 1,
        max_batch_size: int | str | None = None, device: str | None = None, max_length: int | None = None,
        config: RunConfig | None = None, **arguments: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        names = frozenset(f.name for f in fields(DecodingConfig)) if config else frozenset(arguments)
        self._given = names - {"device"}  # no task has a say in it, and no answer changes with it
        if config is None:
            asked = {} if device in (None, "cuda:0") else {"device": device}
            config = _config(pretrained if isinstance(pretrained, str) else "", {**asked, **arguments})
        student = pretrained if isinstance(pretrained, OpenStudent) else open_student(config)
        self.student, self.evaluation = student, config.evaluation
        writer = student.writer
        self.decoding = replace(config.decoding, block_size=config.decoding.block_size or writer.decoder.block_size)
        self.tokenizer = writer.encoder.tokenizer
        self.batch_size = _AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = min(max_length or writer.decoder.max_positions, writer.decoder.max_positions)
        self.cut: set[str] = set()
        """Texts that lost their beginning, as digests."""
        self.progress: Callable[[int, int], object] = lambda done, asked: None
        """Told how many requests of a call are answered."""
        self._state = PartialState()
        self._rank, self._world_size = self._state.process_index, self._state.num_processes
        self._device = writer.decoder.model.device
        if device not in (None, str(self._device)):  # lm-eval's command asks for cuda:0 on every machine
            _LOG.info("device %s: computing on %s; decoding.device chooses it", device, self._device)

    @cached_property
    def settings_digest(self) -> str:
        """Of the student and everything that may change one of its results; 16 hex digits."""
        described = {
            "student": self.student.fingerprint, "decoding": answer_settings(self.decoding),
            "given": sorted(self._given), "evaluation": to_tree(self.evaluation), "max_length": self.max_length,
            "template": dict(self.student.writer.encoder.template), "device": self._device.type,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def decoder(self) -> Decoder:
        """What writes."""
        return self.student.writer.decoder

    @property
    def tokenizer_name(self) -> str:
        """In the names of lm-eval's request cache."""
        return f"tide-{self.settings_digest}"

    @property
    def eot_token_id(self) -> int:
        """Stands before a text without any context."""
        return self.student.writer.encoder.eos_id

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called for `--use_cache`: results of other students or settings in the same file are out of sight."""
        super().set_cache_hook(cache_hook)
        database = cache_hook.dbdict
        if database is not None:
            name = f"tide_{self.settings_digest}"
            connection: Any = database.conn
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{name}" (key TEXT PRIMARY KEY, value BLOB)')
            connection.commit()
            database.tablename = name

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {
            "tide_student": self.student.fingerprint, "tide_decoding": answer_settings(self.decoding),
            "tide_evaluation": to_tree(self.evaluation), "tide_truncated": len(self.cut),
        }  # fmt: skip

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each process, in a row."""
        result: Any = gather(tensor.reshape(1).to(self._device))
        return result

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on one of them."""
        objects = gather_object([obj])
        return objects if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other processes."""
        self._state.wait_for_everyone()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text as it stands."""
        return self.student.writer.encoder.encode_text(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages to the prompt a student was trained on; without `add_generation_prompt`, the last one goes on."""
        encoder = self.student.writer.encoder
        try:
            written = encoder.write(
                chat_history, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
        except Refused as error:
            raise DataError(f"the student's chat template refuses a prompt of this task: {error}") from error
        if not add_generation_prompt and chat_history[-1]["content"][:1].isspace():
            # As in transformers 4: tasks were written for it, and MBPP's reading counts on the student to write the
            # line break after "```python"; a newer one leaves it in the prompt, and every answer loses its first word.
            return written.rstrip()
        append = self.evaluation.think_prefix == "append" and add_generation_prompt and THINK_PREFIX not in written
        return written + THINK_PREFIX if append else written

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write the answers; requests with the same settings share batches."""
        groups: dict[DecodingConfig, list[tuple[int, str, int]]] = defaultdict(list)
        repeats = Counter[int]()
        for number, request in enumerate(requests):
            context, wishes = request.arguments
            # the very same request again gets a seed of its own
            seed = int(_digest(f"{self.evaluation.seed}\x1f{repeats[id(request)]}\x1f{context}")[:15], 16)
            repeats[id(request)] += 1
            groups[self._settings(wishes)].append((number, context, seed))
        answers = [""] * len(requests)
        done = 0
        for settings, group in groups.items():
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise DataError(
                    f"answers of {settings.max_new_tokens} tokens leave no room for a prompt in the {self.max_length} "
                    "positions of this student; lower decoding.max_new_tokens"
                )
            numbers = [number for number, _, _ in group]
            asked = [
                Request(self._cut(self.tok_encode(context) or [self.eot_token_id], room, context), seed)
                for _, context, seed in group
            ]

            def keep(snapshot: Snapshot, numbers: list[int] = numbers) -> None:
                nonlocal done
                if snapshot.generation is not None:
                    number = numbers[snapshot.number]
                    # without thoughts, should a student have written some, as in the paper's code
                    answers[number] = text = _THOUGHTS.sub("", snapshot.generation.text)
                    self.cache_hook.add_partial("generate_until", requests[number].arguments, text)
                    done += 1
                    self.progress(done, len(requests))

            self.decoder.generate(asked, settings, batch_size=self.batch_size, watch=keep)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in windows as long as the student can read."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            asked = [((f"{text} {n}", ""), list(before), list(after)) for n, (before, after) in enumerate(pairs)]
            results.append(sum(logp for logp, _ in self._loglikelihood_tokens(asked, cached=False)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], *, cached: bool = True, **options: Any
    ) -> list[tuple[float, bool]]:
        """Options of one question are those with the same context; they are scored together."""
        scorer = AnswerScorer(self.decoder, self.decoding, draws=self.evaluation.draws, seed=self.evaluation.seed)
        questions: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        answers = []
        for number, ((context, _), context_ids, answer_ids) in enumerate(requests):
            answer = answer_ids
            if len(answer) > self.max_length - 1:  # the end of an answer goes before the last of its context
                self._cut(answer, self.max_length - 1, str(answer))
                answer = answer[: self.max_length - 1]
            answers.append(answer)
            prompt = self._cut(context_ids, self.max_length - len(answer), str(context_ids))
            questions[context, tuple(prompt)].append(number)
        results = [(0.0, False)] * len(requests)
        done = 0
        for (context, prompt), numbers in questions.items():
            for number, found in zip(
                numbers, scorer.score(prompt, [answers[n] for n in numbers], _digest(context)), strict=True
            ):
                results[number] = (found.logp, found.greedy)
                if cached:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
            done += len(numbers)
            self.progress(done, len(requests))
        return results

    def _settings(self, asked: Mapping[str, Any]) -> DecodingConfig:
        """A request's wishes, where the model was not told otherwise; stop texts add up."""
        unknown = sorted(set(asked) - _OF_REQUESTS)
        if unknown:
            _LOG.warning("settings of generation that a diffusion student does not have are ignored: %s", unknown)
        until = asked.get("until") or []
        values: dict[str, Any] = {
            "stop": tuple(
                dict.fromkeys([*self.decoding.stop, *filter(None, [until] if isinstance(until, str) else until)])
            )
        }
        length = asked.get("max_gen_toks", asked.get("max_new_tokens"))
        if length is not None and "max_new_tokens" not in self._given:
            values["max_new_tokens"] = int(length)
        if "temperature" not in self._given and not asked.get("do_sample", bool(asked.get("temperature"))):
            values["temperature"] = 0.0
        elif "temperature" not in self._given and asked.get("temperature") is not None:
            values["temperature"] = float(asked["temperature"])
        if "top_p" not in self._given and asked.get("top_p") is not None:
            values["top_p"] = float(asked["top_p"])
        return replace(self.decoding, **values)

    def _cut(self, ids: list[int], room: int, text: str) -> list[int]:
        """The last `room` tokens; a cut is counted, or refused."""
        if len(ids) <= room:
            return ids
        if self.evaluation.long_inputs == "refuse":
            raise DataError(
                f"a text of {len(ids)} tokens, and room for {room} in the {self.max_length} positions of this student; "
                "with evaluation.long_inputs=truncate it would lose its beginning"
            )
        self.cut.add(digest := _digest(text))
        if self.cache_hook.dbdict is not None:  # a run that continues finds the answer there, and cuts nothing
            self.cache_hook.dbdict[f"{CUT_KEY}{digest}"] = True
        return ids[-room:]


register_model("tide")(TideLM)  # not as a decorator, whose result type checkers take for a mere LM


def _config(pretrained: str, arguments: Mapping[str, Any]) -> RunConfig:
    """What `--model_args` add up to."""
    sections = dict.fromkeys(_OF_STUDENT, "student")
    sections |= {f.name: "decoding" for f in fields(DecodingConfig) if f.name != "stop"}
    sections |= {f.name: "evaluation" for f in fields(EvaluationConfig)}
    for name in arguments:
        if name not in sections:
            raise ConfigError(f"the model tide knows no argument {name!r}{suggest(name, sorted(sections))}")
    values = [f"{sections[name]}.{name}={json.dumps(value)}" for name, value in arguments.items()]
    return load_config(overrides=[f"student.path={json.dumps(pretrained)}", *values])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
