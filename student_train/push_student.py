"""`tide push-student`: a finished student -> a model on the Hub, in one commit, then a tag.

Weights are sent before the commit names them, so an interrupted push shows nothing, and the same command sends only
what is missing. The card is made anew, nothing is written into the student's folder, and no path of this machine goes
out.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..shared.cache import open_cache
from ..shared.cache.card import required_licences
from ..shared.cache.files import sha256_bytes
from ..shared.cache.hub import Hub, HubAddress, parse_model_name
from ..shared.cache.hub_push import Repository, Upload, checked_tag
from ..shared.cache.trained_from import TRAINED_FROM_NAME, TrainedFrom, read_trained_from, trained_from
from ..shared.errors import CacheMismatch, ConfigError, TryAgain
from ..shared.models.loading import native_class, read_config, student_of_run
from .checkpoint import Checkpoint, read_student
from .evaluation_scores import find_evaluation, read_scores
from .metrics import METRICS_NAME
from .public_card import Cost, StudentFacts, public_card

_SENT = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "chat_template.jinja",
)  # fmt: skip
"""Of a student's folder. The rest stays: its state names paths of the machine, and others may have left notes there."""
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Published:
    """What the publisher states, besides what the student's folder says.

    Args:
        cache: folder or hub id of the cache it was trained from; None: what the student remembers.
        evaluation: file of scores; None: one that lies beside the student, if any.
        teacher_licence, data_licence: where the cache says "unknown". start_licence: of the checkpoint it began as.
    """

    cache: str | None = None
    evaluation: Path | None = None
    teacher_licence: str | None = None
    data_licence: str | None = None
    start_licence: str | None = None
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class StudentReport:
    """What was done: the commit that holds the student, its tag, and what had to be uploaded for it."""

    repository: str
    commit: str
    tag: str
    evaluation: str | None
    uploaded_files: int
    uploaded_bytes: int
    files_already_there: int


def push_student(
    path: Path, repository: str, published: Published, *, private: bool = False, tag: str | None = None,
    say: Callable[[str], None] = lambda line: None, sleep: Callable[[float], None] = time.sleep,
) -> StudentReport:  # fmt: skip
    """Publish a student.

    Args:
        path: a student's folder, or the run folder that holds it.
        repository: owner/name of a model; made if it is not there.
        private: make it private; a public one that is there already is refused then.
        tag: default: "v-" and the first 12 digits of the weights' hash.
        say, sleep: see `push_cache`.
    Raises:
        ConfigError: a licence is unknown, or an argument is wrong. DataError: the student or the evaluation is not
        sound. CacheMismatch: `cache` is not the one it was trained from, or the repository holds other weights besides.
        Unavailable, OutputError, TryAgain: see `push_cache`.
    """
    name = parse_model_name(repository)
    folder = student_of_run(path.expanduser())
    state = read_student(folder)
    say(f"{folder}: every file is as it was written")
    facts, evaluation = _facts(folder, state, name, published)
    contents: dict[str, Path | bytes] = {f.name: f for pattern in _SENT for f in folder.glob(pattern) if f.is_file()}
    contents |= {"README.md": public_card(facts).encode(), TRAINED_FROM_NAME: facts.origin.to_bytes()}
    uploads = [Upload.of(file, content) for file, content in sorted(contents.items())]
    weights = "".join(u.sha256 for u in uploads if u.name.endswith(".safetensors"))
    tag = checked_tag(tag or f"v-{sha256_bytes(weights.encode())[:12]}")
    push = Repository(Hub(say, sleep, "model"), name)
    push.open(private)
    ours = {upload.name for upload in uploads}
    stray = next((path for path in push.paths() if path.endswith(_WEIGHT_ENDINGS) and path not in ours), None)
    if stray is not None:  # it would be read in place of these, or beside them
        raise CacheMismatch(
            f"{push.name} holds {stray!r:.150}, weights that are not of this student. Push to a new repository, or "
            "remove them there"
        )
    missing = push.missing(uploads)
    if missing:
        size = sum(upload.size for upload in missing)
        say(f"uploading {len(missing)} of {len(uploads)} files, {size / 1e6:,.1f} MB")
        push.commit(missing, "A student trained by tide")
    else:
        say(f"{name} holds this student already")

    def is_there(commit: str) -> bool:
        remote = push.hub.files(push.name, commit, [upload.name for upload in uploads])
        return all(upload.is_same(remote.get(upload.name)) for upload in uploads)

    push.head = push.hub.commit_of(HubAddress(push.name))
    if not is_there(push.head):
        raise TryAgain(
            f"{push.name}: not everything is on the Hub as it is here; somebody changed one of them meanwhile. Run the "
            "same command again"
        )
    push.set_tag(tag, push.head, is_there)
    return StudentReport(
        name, push.head, tag, str(evaluation) if evaluation else None, push.num_uploaded, push.bytes_uploaded,
        push.num_skipped,
    )  # fmt: skip


def _facts(folder: Path, state: Checkpoint, repository: str, published: Published) -> tuple[StudentFacts, Path | None]:
    """What the card says, and the file that the scores are from."""
    origin = _origin(folder, state, published.cache)
    licences = required_licences(origin, teacher=published.teacher_licence, data=published.data_licence)
    for option, number in (("--gpu-hours", published.cost.gpu_hours), ("--carbon-kg", published.cost.carbon_kg)):
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ConfigError(f"{option} {number}: expected a number, 0 or more")
    for option, text in (("--hardware", published.cost.hardware), ("--start-licence", published.start_licence)):
        if text is not None and not (text.strip() and text.isprintable()):
            raise ConfigError(f"{option} {text!r:.80}: expected printable text")
    config = read_config(folder)
    _, model_class = native_class(config, str(folder))  # its name is that of transformers' class it is made of
    class_name = next(c.__name__ for c in model_class.__mro__ if c.__module__.startswith("transformers."))
    start = str(state.identity.get("student.path", ""))
    evaluation = published.evaluation or find_evaluation(folder)
    facts = StudentFacts(
        repository, origin, licences, start=start if _HUB_ID.fullmatch(start) and not Path(start).exists() else None,
        start_licence=published.start_licence, settings=state.identity, steps=state.step,
        model_class=class_name, model_type=str(config["model_type"]),
        block_size=int(config["block_size"]), mask_id=int(config["mask_token_id"]),
        num_parameters=_num_parameters(folder), scores=read_scores(evaluation) if evaluation else [],
        heldout=_heldout(folder.parent / METRICS_NAME), cost=published.cost,
    )  # fmt: skip
    return facts, evaluation


def _origin(folder: Path, state: Checkpoint, cache: str | None) -> TrainedFrom:
    """The cache's identity, from the student's folder or the cache itself."""
    origin, cache_hash = read_trained_from(folder), state.identity.get("cache")
    if cache is not None:
        opened = open_cache(cache, verify=False)
        if opened.manifest.hash != cache_hash:
            raise CacheMismatch(
                f"--cache {cache} is {opened.manifest.hash:.12}…, and {folder} was trained from {cache_hash:.12}…; "
                "give that one"
            )
        return origin.at(opened) if origin is not None else trained_from(opened)
    if origin is None:
        raise ConfigError(
            f"{folder} does not say what it was trained from (an older tide wrote it); give --cache CACHE"
        )
    return origin


def _num_parameters(folder: Path) -> int:
    """Stored numbers; tied weights are stored once."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _heldout(metrics: Path) -> Mapping[str, float]:
    """The last evaluation on unseen documents in metrics.jsonl; {}: none."""
    found: dict[str, Any] = {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line that a killed run was cut off in
        if isinstance(values, dict) and {"heldout_bits_per_byte", "heldout_accuracy"} <= values.keys():
            found = {name: float(value) for name, value in values.items() if name.startswith("heldout_")}
    return found
