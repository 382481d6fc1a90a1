"""Addresses, retries and errors of the Hub, without a Hub."""

from typing import Any

import hf_xet
import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tide.shared.cache.hub import FIRST_WAIT_S, NUM_TRIES, Hub, HubAddress, parse_address
from tide.shared.errors import CacheError, ConfigError, OutputError, TryAgain, Unavailable

TOKEN = "hf_" + "k" * 34


@pytest.mark.parametrize(
    "text, revision, expected",
    [
        ("me/cache", None, HubAddress("me/cache")),
        ("me/cache", "v1", HubAddress("me/cache", "v1")),
        ("me/cache@refs/pr/1", None, HubAddress("me/cache", "refs/pr/1")),
        ("hf://datasets/me/my.cache-2", None, HubAddress("me/my.cache-2")),
        ("hf://datasets/me/cache@c0ffee", "c0ffee", HubAddress("me/cache", "c0ffee")),
    ],
)
def test_addresses_are_understood(text, revision, expected):
    assert parse_address(text, revision) == expected


@pytest.mark.parametrize(
    "text", ["cache", "a/b/c", "hf://models/me/cache", "../cache", "me/cache@", "me/../x", "me/ca che", "-x/y", ""]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="expected a data set of the Hub as owner/name"):
        parse_address(text)


def test_two_revisions_are_refused():
    with pytest.raises(ConfigError, match="leave one of them out"):
        parse_address("me/cache@v1", "v2")


def answered(status: int, message: str = "", **headers: str) -> HfHubHTTPError:
    """The error that the client raises for an answer of the Hub."""
    request = httpx2.Request("POST", "http://127.0.0.1/x", headers={"authorization": f"Bearer {TOKEN}"})
    return HfHubHTTPError(f"{status} {message}", response=httpx2.Response(status, headers=headers, request=request))


def wrapped(error: Exception) -> RuntimeError:
    """As the client's upload threads pass errors on."""
    outer = RuntimeError("Error while uploading 'data/x' to the Hub.")
    outer.__cause__ = error
    return outer


class Patient:
    """Asks once, with requests that fail in order and then succeed; remembers waits and words."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.said, self.waited, self.asked = list(errors), [], [], 0
        self.hub = Hub(self.said.append, self.waited.append)

    def request(self) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    def ask(self) -> Any:
        return self.hub.ask("uploading", self.request)


@pytest.mark.parametrize(
    "error",
    [
        answered(429), answered(500), answered(503), wrapped(answered(502)), httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"), wrapped(httpx2.RemoteProtocolError("peer closed")), ConnectionResetError("reset"),
        RuntimeError("xet: 503 Service Unavailable"), RuntimeError("xet: connection reset"),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_after_growing_waits(error):
    patient = Patient(error, error, error)
    assert patient.ask() == "answer"
    assert patient.waited == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert len(patient.said) == 3
    assert f"waiting 2 s, then try 2 of {NUM_TRIES}" in patient.said[0]


def test_a_hub_that_says_how_long_is_obeyed_up_to_a_limit():
    patient = Patient(answered(429, **{"Retry-After": "31"}))
    assert patient.ask() == "answer"
    assert patient.waited == [31]
    patient = Patient(answered(429, **{"Retry-After": "86400"}))
    with pytest.raises(TryAgain, match="run the same command again in 86400 s"):
        patient.ask()
    assert patient.waited == []


def test_tries_are_bounded():
    patient = Patient(*[answered(500, "broken")] * 50)
    with pytest.raises(TryAgain, match=f"after {NUM_TRIES} tries: 500 broken. Nothing is lost"):
        patient.ask()
    assert patient.asked == NUM_TRIES
    assert patient.waited == sorted(set(patient.waited))


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (answered(401, "Unauthorized"), Unavailable, "hf auth login"),
        (wrapped(answered(401)), Unavailable, "hf auth login"),
        (answered(403, "Forbidden"), Unavailable, "write permission"),
        (hf_xet.XetAuthenticationError("token expired"), Unavailable, "hf auth login"),
        (RuntimeError("xet: 403 Forbidden"), Unavailable, "write permission"),
        (answered(404, "Not Found"), Unavailable, "not found"),
        (answered(400, "bad card"), Unavailable, "refused by the Hub: 400 bad card"),
        (answered(412, "changed"), TryAgain, "somebody changed"),
        (answered(402), OutputError, "no room left"),
        (answered(413), OutputError, "no room left"),
        (answered(403, "Private repository storage limit reached"), OutputError, "no room left"),
        (answered(403, "Your storage patterns tripped our systems"), OutputError, "no room left"),
        (ValueError("LFS batch API returned errors: over its data quota"), OutputError, "no room left"),
        (OfflineModeIsEnabled("offline"), Unavailable, "HF_HUB_OFFLINE"),
        (OSError(28, "No space left on device"), OutputError, "No space left on device"),
        (httpx2.LocalProtocolError(f"Illegal header value b'Bearer {TOKEN} '"), Unavailable, "<token>"),
        (CacheError("as it is"), CacheError, "^as it is$"),
    ],
)
def test_what_cannot_pass_stops_at_once_and_says_what_to_do(error, kind, message):
    patient = Patient(error)
    with pytest.raises(kind, match=message):
        patient.ask()
    assert (patient.asked, patient.waited, patient.said) == (1, [], [])


def test_rate_limits_that_speak_of_a_quota_are_waited_for():
    patient = Patient(answered(429, "you hit the quota of 1000 api requests"))
    assert patient.ask() == "answer"


@pytest.mark.parametrize("status", [401, 403, 402, 400, 500])
def test_an_answer_that_repeats_the_token_does_not_show_it(status):
    patient = Patient(*[wrapped(answered(status, f"\x1b[2Jno: Bearer {TOKEN}"))] * 9)
    with pytest.raises((Unavailable, OutputError, TryAgain)) as caught:
        patient.ask()
    shown = [str(caught.value), *patient.said]
    assert caught.value.__suppress_context__  # a traceback would show the error it came from
    assert not [text for text in shown if TOKEN in text or "\x1b" in text]
    assert "Bearer <token>" in shown[0]
