"""What an object store's client says went wrong -> wait and try again, or an error that tells what to do.

`ask_again` is the one loop for all that is asked over a network; the Hub (hub.py) has words of its own.

Clients of different stores have no error in common, so causes are found by HTTP status, the store's own code and, where
no answer came, the names of the errors. No credential appears in any message: all are redacted.
"""

import errno
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import OutputError, TideError, Unavailable
from ..shown_text import redacted, terminal_text

T = TypeVar("T")

MAX_MESSAGE_CHARS = 300
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (another endpoint: AWS_ENDPOINT_URL)",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}
_BUSY_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict"}
_LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}
_BROKEN = (
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError",
    "ClientError", "ClientConnectionError", "ClientPayloadError", "FSTimeoutError", "IncompleteReadError",
    "ResponseStreamingError", "TransportError",
)  # fmt: skip
"""Names of errors, in botocore, aiohttp, fsspec and google-auth, of requests that got no answer."""


def install_advice(protocol: str, error: Exception) -> TideError:
    """The error for a protocol whose client is not installed."""
    extra = _EXTRAS.get(protocol)
    how = f"pip install 'tide-distill[{extra}]'" if extra else "pip install the package that it names"
    return Unavailable(f"{protocol}:// needs a package that is not installed ({str(error)[:200]}): {how}")


def is_transient(error: BaseException) -> bool:
    """May the same request succeed a moment later: busy, throttled, out of reach?"""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 429) or (status >= 500 and status not in (501, 507)) or _code(error) in _BUSY_CODES
    if any(isinstance(e, OSError) and e.errno in _LOCAL_ERRNOS for e in chain(error)):
        return False
    kinds = (ConnectionError, TimeoutError)
    return any(isinstance(e, kinds) or _names(e).intersection(_BROKEN) for e in chain(error))


def lacks_conditions(error: BaseException) -> bool:
    """Does the store not know requests with a condition?"""
    return _status(error) == 501 or _code(error) == "NotImplemented"


def is_missing_bucket(error: BaseException) -> bool:
    """Is it the bucket that was not found, and not the object?"""
    return _code(error) == "NoSuchBucket" or "bucket does not exist" in str(error).lower()


def final_error(error: BaseException, what: str, protocol: str) -> TideError:
    """The error that ends the command."""
    why, status, names = told(error), _status(error), set().union(*map(_names, chain(error)))
    advice = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(protocol, protocol), "see the documentation of its client")
    if any(isinstance(e, OSError) and e.errno in _LOCAL_ERRNOS for e in chain(error)):
        return OutputError(f"{what}: {why}. Free space on this machine, or give it another folder, and run it again")
    if is_missing_bucket(error):
        return Unavailable(f"{what}: there is no such bucket ({why}); make it first, or correct its name")
    if names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}:
        return Unavailable(f"{what}: no credentials were found ({why}): {advice}")
    if names & {"CredentialRetrievalError", "TokenRetrievalError", "RefreshError", "UnauthorizedSSOTokenError"}:
        return Unavailable(f"{what}: the credentials could not be renewed ({why}): {advice}")
    if status == 401 or _code(error) in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return Unavailable(f"{what}: the store does not accept these credentials ({why}): {advice}")
    if status == 403 or any(isinstance(e, PermissionError) for e in chain(error)):
        return Unavailable(
            f"{what}: the store does not permit it ({why}). A dump needs to list, read, write and delete below this "
            f"address, a reader to list and read; with other credentials: {advice}"
        )
    return Unavailable(f"{what}: refused by the store: {why}")


def told(error: BaseException) -> str:
    """What happened, on one line and without credentials."""
    return short_message(str(error) or type(error).__name__, MAX_MESSAGE_CHARS)


def short_message(text: str, max_chars: int) -> str:
    """Somebody else's message, inert, without credentials, and cut."""
    text = " ".join(terminal_text(redacted(text)).split()).rstrip(".")
    return text if len(text) <= max_chars else text[:max_chars] + "…"


def chain(error: BaseException) -> list[BaseException]:
    """An error and those it came from."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def ask_again(
    request: Callable[[], T], judge: Callable[[Exception], Exception | float], sleep: Callable[[float], None]
) -> T:
    """The answer of `request`, which may be called several times.

    Args: judge: what went wrong -> the error that ends it, or seconds to wait before another try.
    Raises: what `judge` says, not chained: a traceback would show the request, and with it what was sent.
    """
    while True:
        try:
            return request()
        except (TideError, TypeError, AttributeError, NameError, AssertionError):
            raise  # ours, or a mistake in a program
        except Exception as error:  # of several clients, without a common base
            said = judge(error)
        if isinstance(said, Exception):
            raise said from None
        sleep(said)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__} if _status_of(error) is None else set()


def _status_of(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(response, "status_code", None) or getattr(error, "code", None)  # huggingface_hub; gcsfs
    status = getattr(error, "status", None) if status is None else status  # aiohttp
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer, if there was one."""
    return next((status for e in chain(error) if (status := _status_of(e)) is not None), None)


def _code(error: BaseException) -> str | None:
    """The store's own word for it, if it gave one."""
    for e in chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code"):
            return str(response["Error"]["Code"])
    return None
