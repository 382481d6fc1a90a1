"""Tokens do not survive into messages and logs."""

import io
import logging

import pytest
from tide.shared.shown_text import HIDDEN, redact_logs, redacted

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize("text", [f"Bearer {TOKEN}", f"x={TOKEN}&y", f"b'Bearer {TOKEN}\\n'", f"({TOKEN})"])
def test_what_looks_like_a_token_is_hidden(text):
    assert TOKEN not in redacted(text)
    assert redacted(text) == text.replace(TOKEN, HIDDEN)


def test_the_token_in_use_is_hidden_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-gateway:secret")
    assert redacted("denied for my-own-gateway:secret.") == f"denied for {HIDDEN}."


def test_keys_of_object_stores_are_hidden(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    assert redacted("key AKIAIOSFODNN7EXAMPLE, wJalrXUtnFEMI/K7MDENG") == f"key {HIDDEN}, {HIDDEN}"


@pytest.mark.parametrize("text", ["use hf_hub_download or hf_xet", "hf://datasets/me/cache", "half_a_sentence"])
def test_other_words_stay(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "hf_x")  # a placeholder
    assert redacted(text) == text


def test_logs_are_redacted_once():
    logger, stream = logging.getLogger("tide-test-of-redaction"), io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    logger.propagate = False
    redact_logs(logger.name)
    redact_logs(logger.name)
    logger.getChild("below").warning("retrying with %s after %d s", TOKEN, 3)
    assert stream.getvalue() == f"retrying with {HIDDEN} after 3 s\n"
    assert len(logger.handlers[0].filters) == 1
