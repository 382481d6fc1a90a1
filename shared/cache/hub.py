"""Asking the Hub: addresses of caches there, one request with its retries, and errors that say what to do.

An answer of 401 or 403 and a full quota stop at once; 429, 5xx and broken connections are tried again after growing
waits. No token appears in any message: what a server answers is redacted before it is shown.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..errors import ConfigError, OutputError, TideError, TryAgain, Unavailable
from ..shown_text import redact_logs
from .store_errors import ask_again, chain, short_message

T = TypeVar("T")

NUM_TRIES = 6
FIRST_WAIT_S = 2.0
"""Before the second try; each further wait is twice as long."""
LONGEST_WAIT_S = 600.0
"""A Hub that wants to be left alone for longer ends the command instead."""
MAX_MESSAGE_CHARS = 500

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ADDRESS = re.compile(rf"(?:hf://datasets/)?({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_QUOTA_STATUS = {402, 413, 507}
_QUOTA_WORDS = re.compile(r"quota|storage (limit|patterns)|more storage|billing|payment", re.IGNORECASE)
_STATUS_WORDS = re.compile(r"\b(401|403|429|50[0234])\b")
_CLIENTS_ADVICE = ("For more ", "Make sure ", "Please make sure ", "If you are trying ", " make sure you ")
_OWN_FAULT = {"LocalProtocolError", "UnsupportedProtocol", "InvalidURL"}  # another try would end the same way


@dataclass(frozen=True)
class HubAddress:
    """A data set repository on the Hub; `revision` is a branch, tag or commit, None for the newest."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def is_address(text: str) -> bool:
    """Does `text` have the form of an address on the Hub?"""
    return _ADDRESS.fullmatch(text) is not None


Kind = Literal["dataset", "model"]
"""Of a repository; caches are data sets, students are models."""


def parse_model_name(text: str) -> str:
    """`owner/name` of a model. Raises: ConfigError: another form."""
    if not re.fullmatch(f"{_NAME}/{_NAME}", text):
        raise ConfigError(f"{text!r:.200}: expected a model of the Hub as owner/name")
    return text


def parse_address(text: str, revision: str | None = None) -> HubAddress:
    """`owner/name`, `owner/name@revision` or `hf://datasets/owner/name@revision`.

    Raises: ConfigError: another form, or two revisions.
    """
    match = _ADDRESS.fullmatch(text)
    if not match or (revision is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision)):
        raise ConfigError(
            f"{text!r:.200}{f' at revision {revision!r:.80}' if revision else ''}: expected a data set of the Hub as "
            "owner/name, owner/name@revision or hf://datasets/owner/name@revision"
        )
    if match[2] and revision and match[2] != revision:
        raise ConfigError(f"{text}: names a revision, and {revision!r} is asked for besides; leave one of them out")
    return HubAddress(match[1], revision or match[2])


class Hub:
    """The client of the Hub, with this project's patience.

    Args:
        say: called with one line whenever there is something to tell, such as a wait.
        sleep: called with seconds, to wait.
        kind: of the repositories that it is asked about.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda line: None, sleep: Callable[[float], None] = time.sleep,
        kind: Kind = "dataset",
    ) -> None:  # fmt: skip
        from huggingface_hub import HfApi

        self.api, self.kind = HfApi(), kind
        self.say, self.sleep = say, sleep
        redact_logs("huggingface_hub")

    def ask(self, what: str, request: Callable[[], T], *, tries: int = NUM_TRIES) -> T:
        """The answer of `request`, which may be called several times.

        Args: what: names the request in messages, for example "creating me/cache".
        Raises: Unavailable: no login, no permission, not there, refused. OutputError: a quota is used up, or a local
            file cannot be read or written. TryAgain: the Hub stays busy or out of reach.
        """
        attempt = 0

        def judge(error: Exception) -> Exception | float:
            nonlocal attempt
            attempt += 1
            if isinstance(error, ImportError):
                return error  # a client that is not whole
            why = _told(error)
            stop = _final(error, what, why)
            if stop is not None:
                return stop
            wait = max(FIRST_WAIT_S * 2 ** (attempt - 1), _asked_to_wait(error))
            if attempt == tries or wait > LONGEST_WAIT_S:
                return TryAgain(
                    f"{what}: the Hub is busy or out of reach, after {attempt} tries: {why}. Nothing is lost: run the "
                    f"same command again{f' in {wait:.0f} s' if attempt < tries else ''}"
                )
            self.say(f"{what}: {why}; waiting {wait:.0f} s, then try {attempt + 1} of {tries}")
            return wait

        return ask_again(request, judge, self.sleep)

    def commit_of(self, address: HubAddress) -> str:
        """The commit that an address names now."""
        info = self.ask(f"looking up {address}", lambda: self.api.repo_info(
            address.repository, repo_type=self.kind, revision=address.revision))  # fmt: skip
        if not info.sha:
            raise Unavailable(f"{address}: the Hub names no commit for it; give one with @revision")
        return info.sha

    def files(self, repository: str, commit: str, paths: list[str]) -> dict[str, Any]:
        """Path -> huggingface_hub.RepoFile (size, lfs.sha256, blob_id) of those of `paths` that exist at a commit."""
        found = []
        for start in range(0, len(paths), 500):
            part = paths[start : start + 500]
            found += self.ask(f"looking at the files of {repository}", lambda part=part: self.api.get_paths_info(
                repository, part, repo_type=self.kind, revision=commit))  # fmt: skip
        return {entry.path: entry for entry in found if hasattr(entry, "size")}


def _response(error: BaseException) -> Any:
    """The Hub's answer (status_code, headers), if there was one."""
    return next((r for e in chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _told(error: BaseException) -> str:
    """What happened, on one line and without tokens: the root of the chain says more than what wraps it."""
    from huggingface_hub.errors import HfHubHTTPError

    causes = chain(error)
    chosen = next((e for e in causes if isinstance(e, HfHubHTTPError)), causes[-1])
    lines = [line for line in str(chosen).splitlines() if not line.startswith(_CLIENTS_ADVICE)]
    return short_message(" ".join(lines), MAX_MESSAGE_CHARS) or type(chosen).__name__


def _status(error: BaseException, why: str) -> int | None:
    response = _response(error)
    if response is not None:
        return response.status_code
    # The Xet client answers with text alone.
    words = _STATUS_WORDS.search(why)
    return int(words[1]) if words and not isinstance(error, OSError) else None


def _final(error: Exception, what: str, why: str) -> TideError | None:
    """The error that ends the command; None if another try may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status, causes = _status(error, why), chain(error)
    if status == 429 or (status is not None and status >= 500 and status not in _QUOTA_STATUS):
        return None
    if status in _QUOTA_STATUS or (status in (None, 400, 403, 422) and _QUOTA_WORDS.search(why)):
        return OutputError(
            f"{what}: no room left on the Hub: {why}. Free space or ask for more there, then run the same command "
            "again: what is uploaded stays"
        )
    if status in (409, 412):
        return TryAgain(f"{what}: somebody changed the repository meanwhile: {why}. Run the same command again")
    if status == 401 or any(type(e).__name__ == "XetAuthenticationError" for e in causes):
        return Unavailable(
            f"{what}: the Hub does not accept this login, or shows the repository to others only: {why}. Run "
            "`hf auth login`, or set HF_TOKEN to a token that is valid"
        )
    if status == 403:
        return Unavailable(
            f"{what}: this token may not do that: {why}. Use one that may: a push needs write permission for the "
            "repository's owner, a gated repository its owner's consent"
        )
    if status == 404:
        return Unavailable(
            f"{what}: not found: {why}. Check owner/name and the revision; a private repository also needs a login"
        )
    if status is None and any(isinstance(e, OfflineModeIsEnabled) for e in causes):
        return Unavailable(
            f"{what}: HF_HUB_OFFLINE is set, and this asks the Hub; unset it, or use a folder that pull-cache made"
        )
    http_error = HfHubHTTPError.__bases__[0]  # of httpx, or of what the client's version uses in its place
    broken = [e for e in causes if isinstance(e, http_error | ConnectionError | TimeoutError)]
    # RuntimeError: how the Xet client says that its connection broke.
    if status is None and (type(causes[-1]) is RuntimeError or any(type(e).__name__ not in _OWN_FAULT for e in broken)):
        return None
    if status is None and isinstance(error, OSError) and error.errno is not None:
        return OutputError(f"{what}: {why}")
    return Unavailable(f"{what}: refused by the Hub: {why}")


def _asked_to_wait(error: BaseException) -> float:
    """Seconds of a Retry-After header; 0 for none."""
    response = _response(error)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isdigit() else 0.0
