"""Chunks: hand-worked spans, a slow twin, and the optional tokenkit adapter."""

import importlib.metadata
import itertools
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tide.shared.chunks import align_chunks
from tide.shared.errors import Unavailable
from tide.shared.tokenkit_adapter import align_chunks_with_tokenkit
from tide.shared.tokens import Dropped


def slow_align_chunks(teacher: list[bytes], student: list[bytes]) -> list[list[int]]:
    """The definition, read aloud: grow two spans token by token until they hold the same bytes, then start again."""
    chunks, t, s = [], 0, 0
    while True:
        t_end, s_end = t, s
        while not (same := b"".join(teacher[t:t_end])) or same != b"".join(student[s:s_end]):
            left, right = b"".join(teacher[t:t_end]), b"".join(student[s:s_end])
            if len(left) <= len(right) and t_end < len(teacher):
                t_end += 1
            elif len(right) <= len(left) and s_end < len(student):
                s_end += 1
            else:
                return chunks
        while t_end < len(teacher) and not teacher[t_end]:
            t_end += 1
        while s_end < len(student) and not student[s_end]:
            s_end += 1
        chunks.append([t, t_end, s, s_end])
        t, s = t_end, s_end


@st.composite
def tokenisations(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    text = draw(st.binary(max_size=30))
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
        edges = [0, *cuts, len(text)]
        tokens = [text[a:b] for a, b in itertools.pairwise(edges)]
        sides.append(tokens[: draw(st.integers(0, len(tokens)))])
    return sides[0], sides[1]


def test_shortest_pairs_of_spans_by_hand():
    teacher = [b"The", b" answer", b" is", b" 4", b"2"]
    student = [b"The", b" ans", b"wer is", b" ", b"42"]
    chunks = align_chunks(teacher, student)
    assert chunks.dtype == np.int32
    assert chunks.tolist() == [[0, 1, 0, 1], [1, 3, 1, 3], [3, 5, 3, 5]]


def test_a_character_split_over_tokens_is_one_chunk():
    hug = "🤗".encode()
    assert align_chunks([b" " + hug[:2], hug[2:3], hug[3:]], [b" ", hug]).tolist() == [[0, 3, 0, 2]]


def test_bytes_beyond_the_shorter_side_are_dropped():
    teacher = [b"one", b" two", b" three", b" four"]
    assert align_chunks(teacher, [b"one", b" t", b"wo", b" thr"]).tolist() == [[0, 1, 0, 1], [1, 2, 1, 3]]
    assert align_chunks([b"one"], [b"on", b"e", b" two"]).tolist() == [[0, 1, 0, 2]]


def test_tokens_without_bytes_join_the_chunk_before_or_the_first_one():
    assert align_chunks([b"", b"a", b"", b"b"], [b"a", b"b", b""]).tolist() == [[0, 3, 0, 1], [3, 4, 1, 3]]


@pytest.mark.parametrize(("teacher", "student"), [([], []), ([b"a"], []), ([], [b"a"]), ([b""], [b"", b""])])
def test_no_bytes_on_one_side_give_no_chunks(teacher, student):
    chunks = align_chunks(teacher, student)
    assert chunks.shape == (0, 4)
    assert chunks.dtype == np.int32


def test_different_bytes_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"differ at byte 3: b'a cat' against b'a cow'"):
        align_chunks([b"a c", b"at"], [b"a", b" cow"])


def test_a_difference_beyond_the_shorter_side_is_not_seen():
    assert align_chunks([b"ab"], [b"ab", b"x"]).tolist() == [[0, 1, 0, 1]]


@settings(max_examples=300, deadline=None)
@given(tokenisations())
def test_align_chunks_matches_the_slow_twin(sides):
    assert align_chunks(*sides).tolist() == slow_align_chunks(*sides)


@settings(max_examples=100, deadline=None)
@given(tokenisations())
def test_chunks_are_contiguous_spell_the_same_bytes_and_mirror(sides):
    teacher, student = sides
    chunks = align_chunks(teacher, student)
    for t_start, t_end, s_start, s_end in chunks:
        assert b"".join(teacher[t_start:t_end]) == b"".join(student[s_start:s_end]) != b""
    assert (chunks[1:, [0, 2]] == chunks[:-1, [1, 3]]).all()
    assert align_chunks(student, teacher)[:, [2, 3, 0, 1]].tolist() == chunks.tolist()


def _install(monkeypatch, name: str, module: types.ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, name, module)


def test_tokenkit_is_asked_in_its_own_alphabet(monkeypatch):
    asked = {}

    def get_alignment_indices(teacher, student, teacher_tokenizer, student_tokenizer, *, check=True):
        asked.update(teacher=teacher, student=student, tokenizers=(teacher_tokenizer, student_tokenizer))
        return [(0, 1, 0, 1), (1, 2, 1, 3)], [], [], [], []

    package, align = types.ModuleType("tokenkit"), types.ModuleType("tokenkit.align")
    package.__path__ = []
    align.get_alignment_indices = get_alignment_indices
    _install(monkeypatch, "tokenkit", package)
    _install(monkeypatch, "tokenkit.align", align)
    teacher, student = [b"a", " é".encode()], [b"a", b" ", "é".encode()]
    chunks = align_chunks_with_tokenkit(teacher, student, "teacher", "student")
    assert asked == {"teacher": ["a", "ĠÃ©"], "student": ["a", "Ġ", "Ã©"], "tokenizers": ("teacher", "student")}
    assert chunks.tolist() == align_chunks(teacher, student).tolist()
    assert chunks.dtype == np.int32


def test_pypi_tokenkit_is_recognised_and_refused(monkeypatch):
    namesake = types.ModuleType("tokenkit")
    namesake.__path__ = []
    _install(monkeypatch, "tokenkit", namesake)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.3")
    with pytest.raises(Unavailable, match=r"the installed package tokenkit 0\.1\.3 is not it.*tide needs no tokenkit"):
        align_chunks_with_tokenkit([b"a"], [b"a"], None, None)


def test_missing_tokenkit_says_that_tide_needs_none():
    with pytest.raises(Unavailable, match=r"it is not installed.*tide needs no tokenkit"):
        align_chunks_with_tokenkit([b"a"], [b"a"], None, None)


def test_missing_requirement_of_tokenkit_is_named(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    monkeypatch.setattr("tide.shared.tokenkit_adapter.importlib.import_module", refuse)
    with pytest.raises(Unavailable, match="needs the package 'jax'"):
        align_chunks_with_tokenkit([b"a"], [b"a"], None, None)


def test_a_tokenkit_that_cannot_be_imported_is_refused_with_the_reason(install_tokenkit):
    install_tokenkit("raise ImportError('libfoo.so is missing')")
    with pytest.raises(Unavailable, match=r"cannot be imported .libfoo\.so is missing.; mend it"):
        align_chunks_with_tokenkit([b"a"], [b"a"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(" aé漢\n", max_size=12), st.data())
def test_of_one_text_tokenkit_finds_the_same_chunks(install_tokenkit, text, data):
    install_tokenkit() if "tokenkit" not in sys.modules else None
    text, sides = text.encode(), []
    for _ in range(2):  # some tokens have no bytes
        edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12))), len(text)]
        sides.append([text[a:b] for a, b in itertools.pairwise(edges)])
    chunks = align_chunks_with_tokenkit(*sides)
    assert chunks.dtype == np.int32
    assert chunks.tolist() == align_chunks(*sides).tolist()


def test_a_shorter_side_ends_tokenkits_chunks_and_blanks_that_it_adds_are_never_paired(install_tokenkit):
    install_tokenkit()
    sides = [b"one", b" two", b" three"], [b"one", b" t", b"wo", b" thr"]
    assert align_chunks_with_tokenkit(*sides).tolist() == [[0, 1, 0, 1], [1, 2, 1, 3]]
    with pytest.raises(Dropped, match="tokenkit pairs different bytes"):
        align_chunks_with_tokenkit([b" ", b" "], [b" ", b" ", b" "])
    install_tokenkit("def get_alignment_indices(*arguments):\n    return [(0, 1, 0, 1)], [], [], [], []")
    with pytest.raises(Dropped, match="tokenkit pairs different bytes"):
        align_chunks_with_tokenkit([b"ab"], [b"ac"])


def test_special_tokens_correspond_where_model_kinds_say_so(install_tokenkit):
    install_tokenkit()
    sides = [b"ab", b"<e>", b"c"], [b"a", b"b", b"<e>", b"c"]
    assert align_chunks_with_tokenkit(*sides).tolist() == [[0, 1, 0, 2], [1, 2, 2, 3], [2, 3, 3, 4]]
    kind = types.SimpleNamespace(model_kind_cls=types.SimpleNamespace(replacements={"<|<eot>|>": ["<e>", "c"]}))
    assert align_chunks_with_tokenkit(*sides, kind, kind).tolist() == [[0, 1, 0, 2], [1, 3, 2, 4]]
