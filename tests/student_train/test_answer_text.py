"""Where an answer ends and what it spells: stop texts across tokens, blocks and the bytes of one character."""

from itertools import pairwise
from typing import Any

import pytest
from tide.shared.config import DecodingConfig
from tide.shared.tokens import TextEncoder, load_tokenizer
from tide.student_train.answer_text import AnswerEnd, AnswerReader
from tiny_caches import MASK
from tiny_decoders import naive_answer, prompts, tiny_decoder
from tiny_runs import ASSETS

EOS, END = 5, 6
WORDS = [b"Gr", b"\xc3", b"\xbc\xc3", b"\x9fe", b"\n", b"<eos>", b"<end>", b"\n\nQ: ", b"abc"]
READER = AnswerReader([*WORDS, b"<mask>"], frozenset({EOS, END, 9}), eos_id=EOS, mask_id=9)


@pytest.mark.parametrize(
    ("ids", "stop", "end"),
    [
        ([0, 1, 2, 3], (), None),
        ([0, 1, 2, 3, 5, 0], (), ("eos", 4, "Grüße")),
        ([5], (), ("eos", 0, "")),
        ([0, 1, 2, 3], ("ü",), ("stop", 1, "Gr")),
        ([0, 1], ("ü",), None),
        ([0, 1, 2, 3], ("ße",), ("stop", 2, "Grü")),
        ([0, 4, 7, 8], ("\n\n",), ("stop", 1, "Gr")),
        ([0, 7, 8], ("\n\nQ:",), ("stop", 1, "Gr")),
        ([0, 7, 8], ("Q",), ("stop", 1, "Gr\n\n")),
        ([8, 8], ("ca",), ("stop", 0, "ab")),
        ([8, 5, 7], ("Q",), ("eos", 1, "abc")),
        ([8, 7, 5], ("Q",), ("stop", 1, "abc\n\n")),
        ([8, 8], ("bcabc", "ca"), ("stop", 0, "ab")),  # complete first, although the other begins earlier
        ([8, 8], ("ca", "bca"), ("stop", 0, "a")),  # complete at the same byte: the longer
        ([8, 6, 8], ("<end>",), ("stop", 1, "abc")),
        ([8, 6, 8], ("cab",), None),
    ],
)  # fmt: skip
def test_the_end_is_found(ids, stop, end):
    assert READER.find_end(ids, stop) == (None if end is None else AnswerEnd(*end))


def test_later_tokens_never_change_an_end_that_was_found():
    ids, stop = [8, 0, 1, 2, 3, 4, 8, 7, 8, 5, 8], ("ca", "\n\nQ", "ßeX", "e\nabc\n", "abcGrüße\n")
    ends = [READER.find_end(ids[:n], stop) for n in range(len(ids) + 1)]
    found = [end for end in ends if end]
    assert found
    assert all(end == found[0] for end in ends[ends.index(found[0]) :])


def test_special_tokens_are_no_text_and_half_a_character_shows_as_such():
    assert READER.text([0, 6, 1, 2, 3]) == "Grüße"
    assert READER.text([0, 1]) == "Gr�"
    assert READER.text([8, 6, 8], end=9) == "abca"


def test_the_mask_and_tokens_without_bytes_may_not_be_written():
    reader = AnswerReader([b"a", b"", b"c", b"<mask>"], frozenset(), eos_id=0, mask_id=3)
    assert reader.allowed(6) == [True, False, True, False, False, False]
    assert reader.allowed(3) == [True, False, True]


def test_a_real_tokenizer_gives_bytes_special_tokens_eos_and_mask():
    encoder = TextEncoder(load_tokenizer(ASSETS / "student"), block_size=16, max_length=16)
    reader = AnswerReader.of(encoder)
    ids = encoder.tokenizer.backend_tokenizer.encode("Grüße 🌊<|im_end|>", add_special_tokens=False).ids
    assert reader.find_end(ids, ()) == AnswerEnd("eos", len(ids) - 1, "Grüße 🌊")
    assert reader.text([*ids, encoder.mask_id]) == "Grüße 🌊"
    assert not reader.allowed(len(encoder.tokenizer))[encoder.mask_id]


def test_a_stop_text_may_cross_blocks_and_split_a_character():
    """Two tokens of the student are made to spell halves of one character; their pair is the stop text."""
    (request,), settings = prompts(6), {"max_new_tokens": 48, "temperature": 2.0}
    free = naive_answer(tiny_decoder(), request, DecodingConfig(**settings)).ids
    # the answer's blocks begin at 2, 10, 18, ...: two tokens on both sides of a boundary, never together earlier
    place = next(
        p for p in range(10, 47, 8)
        if (free[p - 1], free[p]) not in list(pairwise(free[:p])) and free[p - 1] != free[p]
    )  # fmt: skip
    decoder = tiny_decoder(spelling={free[place - 1]: b"\xe2\x82", free[place]: b"\xac"})
    asked: dict[str, Any] = {**settings, "stop": ("€",)}
    (generation,) = decoder.generate([request], DecodingConfig(**asked))
    assert generation.finish == "stop"
    assert generation.ids == free[: place - 1]
    assert "€" not in generation.text
    assert generation.num_forwards <= place + 1 + 8
    assert decoder.generate([request], DecodingConfig(**settings))[0].ids == free
    assert MASK not in generation.ids
