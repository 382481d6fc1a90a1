"""A tokenizer made ready: loading it, its mask and EOS tokens, and what identifies it.

Folder or hub id -> a fast tokenizer with a chat template; tokenizer and settings -> mask id, EOS id, fingerprint.
"""

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bounded import Bounded, Refused
from .errors import ConfigError, DataError
from .regular_files import require_regular
from .token_bytes import tokenizer_label

DEFAULT_MASK_TOKEN = "<|mask|>"
"""What a student's mask is called where nothing says otherwise, as in the paper's student."""
MAX_TOKENIZER_BYTES = 128 << 20
"""Of each of a tokenizer's files; the largest in use have a third of it."""
MAX_ADDED_TOKENS = 100_000
LOAD_CPU_S, LOAD_BYTES = 30, 2 << 30
"""What reading a tokenizer's files may take: half a second and 0.2 GB for 150,000 tokens."""
_MAX_GROWTH = 64.0
"""How many times as long a plain tokenizer's normaliser may make a text."""
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_tokenizer(path: str | Path, revision: str | None = None, *, chat_template: str | None = None) -> Any:
    """Load a fast tokenizer with a chat template from a folder or the hub, never running its code.

    Args: chat_template: takes the place of the tokenizer's own; None: it must have one.
    Returns: a `PreTrainedTokenizerFast`.
    Raises: DataError: missing, unreadable, needs remote code, is not a fast tokenizer or has no chat template.
    """
    from transformers import AutoTokenizer

    from .models.loading import is_local, student_of_run
    from .models.specs import register_families

    register_families()
    name = str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
    if Path(name).is_dir():
        name = str(student_of_run(Path(name)))
        require_regular(Path(name).iterdir())
    if is_local(name) and not Path(name).is_dir():
        raise DataError(f"tokenizer {name}: no such folder; give a folder with tokenizer.json, or a hub id")
    _require_harmless(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers, tokenizers and the hub raise their own kinds, down to bare Exception
        raise DataError(
            f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {error}). Expected tokenizer.json and "
            "tokenizer_config.json of a fast tokenizer that needs no code of its own"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {name}: {type(tokenizer).__name__} is not a fast tokenizer; tokenizer.json is missing"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    require_template(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that transformers 4.57 reads it too: a class that it has, and no field that it refuses."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text())
    for name in ("backend", "is_local", "local_files_only"):
        described.pop(name, None)
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(described.get("extra_special_tokens"), list):
        described["additional_special_tokens"] = described.pop("extra_special_tokens")
    file.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def tokenizer_fingerprint(tokenizer: Any, mask_id: int | None = None) -> dict[str, str]:
    """SHA-256 of what turns text into ids, and of the chat template; independent of where the files lie.

    `tokenizer`: canonical JSON of the backend tokenizer, without truncation and padding state, and without fields that
    are null, false or empty (a newer `tokenizers` writes out more of these). A mask token that stands behind the whole
    vocabulary, where `TextEncoder` and dllm append it, is left out: with and without it, text has the same ids.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model = tree.pop("model")
    big = {name: model.pop(name) for name in ("vocab", "merges") if name in model}
    del tree["truncation"], tree["padding"], tree["version"]
    last = max((token["id"] for token in tree["added_tokens"]), default=None)
    if last is not None and last in (mask_id, tokenizer.mask_token_id) and last == len(tokenizer) - 1:
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] != last]
    whole = {"model": _without_defaults(model), "tree": _without_defaults(tree), "big": big}
    canonical = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    template = tokenizer.get_chat_template()
    return {
        "tokenizer": hashlib.sha256(canonical.encode()).hexdigest(),
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
    }


def with_mask(tokenizer: Any, mask_token: str | None, mask_id: int | None) -> tuple[Any, int]:
    """The tokenizer (a copy if the mask token had to be added) and the mask id (see `TextEncoder`).

    Raises: ConfigError: none is named, the two names disagree, or ordinary text contains the id. An added token such as
        `<tool_response>` is allowed (WeDLM's mask has that id in Qwen3's vocabulary): samples that hold it are dropped.
    """
    backend = tokenizer.backend_tokenizer
    named = None
    if mask_token is not None:
        if backend.token_to_id(mask_token) is None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_special_tokens({"mask_token": mask_token})
            backend = tokenizer.backend_tokenizer
        named = backend.token_to_id(mask_token)
        if mask_id is not None and mask_id != named:
            raise ConfigError(
                f"{tokenizer_label(tokenizer)}: mask token {mask_token!r} has id {named}, not mask_id = {mask_id}"
            )
    found = next((i for i in (mask_id, named, tokenizer.mask_token_id) if i is not None), None)
    if found is None:
        raise ConfigError(
            f"{tokenizer_label(tokenizer)} has no mask token; set mask_token, for example mask_token: '<|mask|>'"
        )
    token = backend.id_to_token(found)
    if token is not None and found not in backend.get_added_tokens_decoder():
        raise ConfigError(
            f"{tokenizer_label(tokenizer)}: mask id {found} is already used by a token of the text, {token!r}. "
            "Expected an added token or an id beyond the vocabulary"
        )
    return tokenizer, found


def published_mask(tokenizer: Any, config: Mapping[str, Any], where: str) -> int | None:
    """The mask id that a checkpoint names itself, in config.json or by its tokenizer's mask token; None: nowhere.

    Raises: ConfigError: the two disagree, or config.json names no id.
    """
    stated, named = config.get("mask_token_id"), tokenizer.mask_token_id
    if stated is not None and (type(stated) is not int or stated < 0):
        raise ConfigError(f"{where}/config.json: mask_token_id = {stated!r}: expected a token id; correct the file")
    if stated is not None and named is not None and stated != named:
        raise ConfigError(
            f"{where}: config.json says mask_token_id = {stated}, and the tokenizer's mask token "
            f"{tokenizer.mask_token!r} has id {named}; correct whichever is wrong before anything is computed with it"
        )
    return named if stated is None else stated


def student_mask(
    tokenizer: Any, config: Mapping[str, Any], mask_token: str | None, where: str
) -> tuple[str | None, int | None]:
    """`mask_token` and `mask_id` of a student's `TextEncoder`: as asked, as published, or a token that is to be added.

    Raises: ConfigError: see `published_mask`; what is asked for is not what the checkpoint was trained with.
    """
    published = published_mask(tokenizer, config, where)
    if mask_token is None:
        return (DEFAULT_MASK_TOKEN, None) if published is None else (None, published)
    stated = config.get("mask_token_id")
    known = tokenizer.backend_tokenizer.token_to_id(mask_token)
    if stated is not None and known is not None and known != stated:
        raise ConfigError(
            f"student.mask_token = {mask_token!r} has id {known}, and {where}/config.json says mask_token_id = "
            f"{stated}, which the student was trained with; leave the setting out"
        )
    return mask_token, None if known is not None or stated is None else stated


def find_eos(tokenizer: Any, eos_token: str | None) -> int:
    """Id of the named EOS token, or of the tokenizer's own.

    Raises: ConfigError: there is none.
    """
    eos_id = tokenizer.eos_token_id if eos_token is None else tokenizer.backend_tokenizer.token_to_id(eos_token)
    if eos_id is None:
        what = "no eos token" if eos_token is None else f"no token {eos_token!r}"
        raise ConfigError(
            f"{tokenizer_label(tokenizer)} has {what}; set eos_token to the token that fills up the last block"
        )
    return eos_id


def require_template(tokenizer: Any) -> None:
    """Raises: DataError: the tokenizer has no chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{tokenizer_label(tokenizer)} has no chat template (chat_template in tokenizer_config.json, or "
            "chat_template.jinja); use an instruction-tuned model's tokenizer, or add a template"
        ) from error


def is_plain(tokenizer: Any) -> bool:
    """Does every text take it time and memory in proportion, by what its normaliser and pre-tokenizer are made of?"""
    backend = tokenizer.backend_tokenizer
    return _is_plain([json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part])


def _is_plain(trees: Sequence[Any]) -> bool:
    """The same, from the JSON of both. A regular expression without repeated groups and with few repetitions in each
    alternative does not backtrack for long; replacements must not make a text much longer."""
    parts = [part for tree in trees for part in _mappings(tree)]
    growth = 1.0
    for part in parts:
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if isinstance(regex, str) and not _is_plain_regex(regex):
            return False
        literal = pattern.get("String", "") if isinstance(pattern, Mapping) else ""
        growth *= max(1.0, (len(part.get("content") or "") + (regex is not None)) / max(1, len(literal)))
        growth *= max(1.0, len(part.get("prepend") or ""))
    return growth <= _MAX_GROWTH


def _mappings(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Every JSON object in a tree, at any depth."""
    if isinstance(tree, Mapping):
        yield tree
    members = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    for member in members:
        yield from _mappings(member)


def _is_plain_regex(regex: str) -> bool:
    bare = re.sub(r"\\[pP]\{[^}]*\}|\\[^0-9]", "x", regex)
    bare = re.sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]", "x", bare)
    if len(regex) > 4096 or re.search(r"\\|\)[*+{]|\)\?[*+?]|\{[^}]*\d{4}|\}\{", bare):
        return False
    return all(len(re.findall(r"[*+]|,\}", part)) <= 3 for part in bare.split("|"))


def _require_harmless(name: str, revision: str | None) -> None:
    """Look at a tokenizer's files before they are loaded here, and load one that is not plain in a child first.

    Raises: DataError: larger than any tokenizer, or it cannot be loaded within limits of time and memory.
    """
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        with contextlib.suppress(Exception):  # what is wrong is said by whoever loads it
            found = cached_file(name, "tokenizer.json", revision=revision)
            folder = folder if found is None else Path(found).parent
    sizes = {file: (folder / file).stat().st_size for file in _FILES if (folder / file).is_file()}
    for file, size in sizes.items():
        if size > MAX_TOKENIZER_BYTES:
            raise DataError(
                f"{folder / file}: {size:,} bytes, and a tokenizer's files have up to {MAX_TOKENIZER_BYTES:,}; use "
                "another checkpoint's"
            )
    if not sizes:
        return
    try:
        wrong = Bounded(_looked_at, f"tokenizer {name}", cpu_s=LOAD_CPU_S, memory_bytes=LOAD_BYTES)(folder)
    except Refused:  # it cannot be read: what is wrong is said by whoever loads it
        return
    if wrong:
        raise DataError(f"tokenizer {name}: {wrong}; use another checkpoint's, or correct the file")


def _looked_at(folder: Path) -> str:
    """What is wrong with a tokenizer's files, "" for nothing; runs in a child."""
    trees = {}
    for file in _FILES:
        if file.endswith(".json") and (folder / file).is_file():
            trees[file] = json.loads((folder / file).read_text())
            for key in ("added_tokens", "added_tokens_decoder"):
                added = trees[file].get(key, ())
                if len(added) > MAX_ADDED_TOKENS:
                    return f"{file} adds {len(added):,} tokens, and {MAX_ADDED_TOKENS:,} are allowed"
    described = trees.get("tokenizer.json", {})
    if not _is_plain([described.get("normalizer"), described.get("pre_tokenizer")]):
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ""


def _without_defaults(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_defaults(v) for k, v in tree.items() if v is not None and v is not False and v != ""}
    return [_without_defaults(item) for item in tree] if isinstance(tree, list) else tree
