"""Chunks of texts that a tokenizer's normaliser changes: what both sides spell alike keeps them, wherever it stands."""

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tide.shared.chunks import align_chunks, align_stretches
from tide.shared.token_bytes import byte_level_alphabet, byte_table
from tide.shared.tokenkit_adapter import align_chunks_with_tokenkit
from tide.shared.tokens import TextEncoder, load_tokenizer, pair
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOKENIZERS = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"
needs_real = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason="the real tokenizers lie beside the project, in ../shared, and are absent"
)
TAGS = ("<user>", "<assistant>", "<end>", "<eos>", "<mask>")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
TEXTS = {
    "Bengali": "আমি \u09ac\u09be\u09a1\u09bc\u09bf যাই, পাহাড় \u09dc দেখি", "Hindi": "मैं \u0958लम से \u0921\u093cर लिखता हूँ",
    "Korean": unicodedata.normalize("NFD", "한국어를 배우고 있어요") + " 한국",
    "Greek": unicodedata.normalize("NFD", "Ο άνθρωπος είναι πολύ καλός") + " και Ἀθήνα",
    "Vietnamese": unicodedata.normalize("NFD", "Tiếng Việt rất hay, được không?") + " Có",
    "Arabic": "\ufefb \ufe8d\ufedf\ufecc\ufeae\ufe91\ufbef and \ufdfa end", "ligatures": "the ﬁrst oﬃce ﬂoor №5 ½ cup",
    "emoji": "👩\u200d👩\u200d👧 cafe\u0301 👍🏽 ok", "line breaks": "one cafe\u0301\r\ntwo\r\n\r\nthree  four\t",
    "repeated": "go go e\u0301 go go e\u0301 go", "capitals": "The THE the İstanbul STRASSE ß",
}  # fmt: skip


def wrap(backend: Tokenizer, added=()) -> PreTrainedTokenizerFast:
    backend.add_tokens(list(added))
    backend.add_special_tokens(list(TAGS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", mask_token="<mask>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_level(*merges, normalizer=None, added=(), trim=False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the 256 bytes; merges in the GPT-2 alphabet. `trim`: RoBERTa's offsets."""
    vocab = {chr(point): i for i, point in enumerate(byte_level_alphabet())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=trim)
    backend.decoder = decoders.ByteLevel()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(backend, added)


def sentencepiece(
    *, normalizer=None, scheme="never", letters="", fallback=True, added=(), merges=(("▁", "▁"), ("t", "h"), ("e", "s"))
) -> PreTrainedTokenizerFast:
    """Pieces of characters with ▁ for spaces; unknown characters are bytes, or <unk>."""
    parts = [part for merge in merges for part in merge]
    plain = dict.fromkeys([*"▁abcdefghijklmnopqrstuvwxyz,.?", *letters, *parts, *(a + b for a, b in merges)])
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256) if fallback), *plain]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, list(merges), unk_token="<unk>", byte_fallback=fallback)
    )
    mark = [normalizers.Replace(" ", "▁")]
    if scheme == "prepend":
        mark.insert(0, normalizers.Prepend("▁"))
    elif scheme != "never":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.normalizer = normalizers.Sequence([*([normalizer] if normalizer else []), *mark])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap(backend, added)


def encoder(tokenizer, max_length=512, **options) -> TextEncoder:
    return TextEncoder(tokenizer, block_size=4, max_length=max_length, **options)


def talk(answer: str, question: str = "Say it.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def spell(side: TextEncoder, ids) -> bytes:
    return b"".join(side.token_bytes[i] for i in ids)


def chunk_texts(student: TextEncoder, teacher: TextEncoder, sample) -> list[bytes]:
    """The bytes of every chunk, after a check that both sides spell them."""
    texts = []
    for a, b, c, d in sample.chunks:
        texts.append(
            b"".join(sample.student.token_bytes[c - sample.student.content[0] : d - sample.student.content[0]])
        )
        theirs = sample.teacher.token_bytes[a - sample.teacher.content[0] : b - sample.teacher.content[0]]
        assert b"".join(theirs) == texts[-1] != b""
    assert (sample.chunks[1:, [0, 2]] >= sample.chunks[:-1, [1, 3]]).all()
    return texts


# --- the twins


def letters_of(text: str, *changes) -> list[str]:
    """Letters, with their marks where any of the changes touches them; Jamo that compose are one letter."""
    letters: list[str] = []
    for char in text:
        jamo = "\u1160" <= char <= "\u11ff" and any(
            change(letters[-1] + char) != change(letters[-1]) + change(char) for change in changes
        )
        if letters and (unicodedata.combining(char) or jamo):
            letters[-1] += char
        else:
            letters.append(char)
    apart = [[*letter] if all(change(letter) == letter for change in changes) else [letter] for letter in letters]
    return list(itertools.chain(*apart))


def changed_by(side: TextEncoder):
    normalizer = side.tokenizer.backend_tokenizer.normalizer
    return lambda text: normalizer.normalize_str(text).replace("▁", " ") if normalizer else text


def slow_chunks(text: str, *sides: tuple[TextEncoder, tuple[bytes, ...]]) -> list[list[int]]:
    """The definition, letter by letter: a boundary is a letter and a byte of what is spelt for it.

    A chunk lies between neighbouring boundaries of both sides, if all letters it touches are spelt alike.
    """
    changes = [changed_by(side) for side, _ in sides]
    letters, boundaries = letters_of(text, *changes), []
    spelt = [[change(letter).encode() for letter in letters] for change in changes]
    alike = [a == b for a, b in zip(*spelt, strict=True)]
    for pieces, (_, tokens) in zip(spelt, sides, strict=True):
        names = [(c, o) for c, piece in enumerate(pieces) for o in range(len(piece))] + [(len(letters), 0)]
        token_at = {names[place]: n for n, place in enumerate([0, *itertools.accumulate(map(len, tokens))])}
        boundaries.append({(c, o): n for (c, o), n in token_at.items() if o == 0 or alike[c]})
    common = sorted(boundaries[0].keys() & boundaries[1].keys())
    chunks = []
    for (c, o), (d, p) in itertools.pairwise(common):
        if all(alike[c : d + (p > 0)]):
            chunks.append([side[place] for side in boundaries for place in ((c, o), (d, p))])
    return chunks


def chunks_of_unchanged_text(student, teacher) -> np.ndarray:
    """How chunks were found before changed text had any: one stretch, and a stand-in for what one side begins later."""
    ahead = teacher.gap_bytes - student.gap_bytes
    sides = [list(teacher.token_bytes), list(student.token_bytes)]
    late, early = (0, 1) if ahead > 0 else (1, 0)
    if ahead:
        sides[late].insert(0, b"".join(sides[early])[: abs(ahead)])
    chunks = align_chunks(*sides)
    if ahead:
        chunks = chunks[chunks[:, 2 * late] > 0]
        chunks[:, 2 * late : 2 * late + 2] -= 1
    return chunks + np.repeat(np.array([teacher.content[0], student.content[0]], dtype=np.int32), 2)


LETTERS = "aeé\u0301\u0323ßAﬁ ড\u09bc\u09dc\u1112\u1161\u11ab한漢"
SIDES = [
    encoder(sentencepiece(normalizer=change, letters=unicodedata.normalize("NFC", LETTERS) + "A", merges=merges))
    for change in (None, normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), ACCENTS)
    for merges in ((("a", "e"), ("▁", "a")), (("e", "a"), ("a", "é"), ("▁", "▁"), ("ড", "ড")))
]


@settings(max_examples=300, deadline=None)
@given(st.text(LETTERS, min_size=1, max_size=12), st.sampled_from(SIDES), st.sampled_from(SIDES))
def test_chunks_match_the_slow_twin(text, student, teacher):
    text = f"a{text}a"  # marks belong to a letter of the answer; the answer is not blank
    sample = pair(student, teacher, talk(text), see="own")
    if student.fingerprint["tokenizer"] == teacher.fingerprint["tokenizer"]:
        return  # every position is a chunk
    chunk_texts(student, teacher, sample)
    answers = [(teacher, sample.teacher.token_bytes[:-1]), (student, sample.student.token_bytes[:-1])]
    starts = np.repeat([sample.teacher.content[0], sample.student.content[0]], 2)
    expected = (np.array(slow_chunks(text, *answers), dtype=int).reshape(-1, 4) + starts).tolist()
    end = [[*sample.teacher.content, *sample.student.content][i] for i in (1, 3)]
    assert sample.chunks.tolist() == [*expected, [end[0] - 1, end[0], end[1] - 1, end[1]]]


@settings(max_examples=100, deadline=None)
@given(st.text("aeé ßAﬁড漢\u0301", min_size=1, max_size=12))
def test_unchanged_text_has_the_chunks_it_always_had(text):
    unchanged = [side for side in SIDES if side.encode(talk(f"a{text}a")).exact_bytes]
    for student, teacher in itertools.permutations(unchanged[:4], 2):
        sample = pair(student, teacher, talk(f"a{text}a"), see="own")
        expected = chunks_of_unchanged_text(sample.student, sample.teacher)
        assert sample.chunks.dtype == expected.dtype == np.int32
        assert sample.chunks.tolist() == expected.tolist()


STRADDLING = [
    encoder(byte_level(("a", "Ã"), ("©", "a"), ("a", "Ì"), ("Ģ", "a"), ("e", "Ì"), normalizer=change, trim=trim))
    for change in (None, normalizers.NFC(), normalizers.Lowercase(), ACCENTS)
    for trim in (False, True)
]


@settings(max_examples=100, deadline=None)
@given(st.text("aeé A\u0301\u0300", min_size=1, max_size=10), st.sampled_from(STRADDLING), st.sampled_from(STRADDLING))
def test_chunks_of_tokens_that_split_letters_stand_for_the_same_letters(text, student, teacher):
    text = f"a{text}a"
    sample = pair(student, teacher, talk(text), see="own")
    if student.fingerprint["tokenizer"] == teacher.fingerprint["tokenizer"]:
        return
    chunk_texts(student, teacher, sample)
    sides = [(teacher, sample.teacher, 0), (student, sample.student, 2)]
    changes = [changed_by(side) for side, *_ in sides]
    letters = letters_of(text, *changes)
    for chunk in sample.chunks.tolist():
        spans = []
        for change, (_, encoded, column) in zip(changes, sides, strict=True):
            places = [0, *itertools.accumulate(map(len, encoded.token_bytes))]
            names = [(n, o) for n, letter in enumerate(letters) for o in range(len(change(letter).encode()))]
            names += [(len(letters), o) for o in range(6)]  # <end>
            ends = chunk[column] - encoded.content[0], chunk[column + 1] - encoded.content[0]
            spans.append(names[places[ends[0]] : places[ends[1]]])
        assert spans[0] == spans[1]


# --- by hand


def test_all_but_the_changed_letter_is_aligned_before_and_after_it():
    student, teacher = encoder(byte_level()), encoder(sentencepiece(normalizer=normalizers.Lowercase()))
    sample = pair(student, teacher, talk("one Two one two"), see="own")
    assert b"".join(chunk_texts(student, teacher, sample)) == b"one wo one two<end>"
    lost = sample.chunks[:-1, [1, 3]] != sample.chunks[1:, [0, 2]]
    assert np.flatnonzero(lost.any(axis=1)).tolist() == [3]  # after o, n, e and the space


def test_a_repeated_word_is_never_taken_for_another_occurrence():
    drops = normalizers.Replace(Regex("no "), "")
    student, teacher = encoder(byte_level()), encoder(byte_level(normalizer=drops))
    sample = pair(student, teacher, talk("so no no so"), see="own")
    assert chunk_texts(student, teacher, sample) == [b"s", b"o", b" ", b"s", b"o", b"<end>"]
    assert sample.chunks[3, 2] - sample.student.content[0] == len("so no no ")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(
    "change", [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD(), ACCENTS], ids=["NFC", "NFKC", "NFD", "accents"]
)
def test_two_sides_that_change_alike_keep_all_their_chunks(text, change):
    student = encoder(byte_level(("e", "s"), normalizer=change))
    teacher = encoder(byte_level(("Ġ", "g"), ("o", "n"), normalizer=change))
    sample = pair(student, teacher, talk(text, question=text), see="own")
    whole = f"{change.normalize_str(text)}<end>".encode()
    assert b"".join(chunk_texts(student, teacher, sample)) == whole
    assert spell(student, sample.student.x_0[: sample.student.prompt_tokens]).endswith(b"<end><assistant>")
    assert sample.chunks[0].tolist()[::2] == [sample.teacher.prompt_tokens, sample.student.prompt_tokens]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("change", [normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase(), ACCENTS])
def test_the_answer_begins_at_its_token_where_the_prompt_is_changed_too(text, change):
    for tokenizer in (byte_level(normalizer=change), sentencepiece(normalizer=change, scheme="always")):
        side = encoder(tokenizer)
        sample = side.encode(talk(text, question=text))
        before = sample.x_0[: sample.prompt_tokens]
        assert side.tokenizer.convert_ids_to_tokens(int(before[-1])) == "<assistant>"
        if not sample.exact_bytes:
            assert b"".join(sample.token_bytes) == f"{change.normalize_str(text)}<end>".encode()


def test_swallowed_blanks_and_unknown_letters_cost_no_other_chunk():
    student = encoder(byte_level())
    strips = encoder(sentencepiece(normalizer=normalizers.Strip()))
    assert b"".join(chunk_texts(student, strips, pair(student, strips, talk(" yes  "), see="own"))) == b"yes<end>"
    unknown = encoder(sentencepiece(fallback=False))
    sample = pair(student, unknown, talk("go u漢unk go"), see="own")
    assert b"".join(chunk_texts(student, unknown, sample)) == b"go uunk go<end>"
    both = encoder(sentencepiece(fallback=False, merges=(("g", "o"), ("n", "k"))))
    assert b"".join(chunk_texts(both, unknown, pair(both, unknown, talk("a漢b"), see="own"))) == b"ab<end>"


def test_a_dummy_space_after_changed_text_is_no_byte_of_the_answer():
    side = encoder(sentencepiece(normalizer=normalizers.NFC(), letters="é", scheme="always"))
    student = encoder(byte_level())
    for question in ("cafe\u0301 ", "e\u0301e\u0301 a b", "\u09dc"):
        sample = pair(student, side, talk("yes no", question=question), see="own")
        assert b"".join(chunk_texts(student, side, sample)) == b"yes no<end>"


def test_offsets_without_blanks_do_not_widen_a_change():
    student, teacher = encoder(byte_level()), encoder(byte_level(normalizer=normalizers.NFC(), trim=True))
    sample = pair(student, teacher, talk("go cafe\u0301 go  \n go", question="e\u0301"), see="own")
    assert b"".join(chunk_texts(student, teacher, sample)) == b"go caf go  \n go<end>"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_around_changed_text_tokenkit_finds_what_tide_finds(install_tokenkit, text):
    install_tokenkit()
    aligned = 0
    for student, teacher in zip(SIDES, [*SIDES[3:], *SIDES[:3]], strict=True):
        found = [pair(student, teacher, talk(text), see="own", align=a) for a in (None, align_chunks_with_tokenkit)]
        assert found[0].chunks.tolist() == found[1].chunks.tolist()
        aligned += len(found[0].chunks)
    assert aligned > 100


# --- added tokens


RUNS = [AddedToken("▁▁", normalized=False, special=False), AddedToken("\n\n", normalized=False, special=False)]


def test_pieces_that_are_added_tokens_too_keep_their_bytes():
    tokenizer = sentencepiece(letters="\n", merges=(("▁", "▁"), ("\n", "\n")), added=RUNS)
    table = byte_table(tokenizer)
    runs = [tokenizer.convert_tokens_to_ids(text) for text in ("▁▁", "\n\n")]
    assert [table.tokens[i] for i in runs] == [b"  ", b"\n\n"]
    assert table.added.isdisjoint(runs)
    student, teacher = encoder(byte_level()), encoder(tokenizer)
    sample = pair(student, teacher, talk("def f\n\n    go  on"), see="own")
    assert sample.teacher.exact_bytes
    assert b"".join(chunk_texts(student, teacher, sample)) == b"def f\n\n    go  on<end>"
    assert set(runs) <= set(sample.teacher.x_0.tolist())
    marked = pair(student, teacher, talk("a ▁▁ b"), see="own")  # the mark itself is spelt as what it stands for
    assert b"".join(chunk_texts(student, teacher, marked)) == b"a  b<end>"


def test_the_mark_is_an_ordinary_letter_of_special_tokens_and_of_other_tokenizers():
    table = byte_table(sentencepiece(added=[AddedToken("<a▁b>", special=True)]))
    assert "<a▁b>".encode() in table.tokens
    assert "▁▁".encode() in byte_table(byte_level(added=[AddedToken("▁▁", special=False)])).tokens


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}])
@pytest.mark.parametrize("change", [None, normalizers.NFC(), normalizers.Lowercase()])
def test_added_tokens_that_swallow_blanks_are_aligned_with_all_around_them(flags, change):
    student = encoder(byte_level(added=[AddedToken("<x>", normalized=False)]))
    teacher = encoder(byte_level(normalizer=change, added=[AddedToken("<x>", **{"normalized": False} | flags)]))
    sample = pair(student, teacher, talk("go <x> go\n<x>\n", question="<x> "), see="own")
    swallowed = b"go <x> go\n<x>\n"
    if "lstrip" in flags:
        swallowed = b"go<x> go<x>\n"
    elif "rstrip" in flags:
        swallowed = b"go <x>go\n<x>"
    assert b"".join(chunk_texts(student, teacher, sample)) == swallowed + b"<end>"


def test_reasoning_that_both_templates_write_before_the_answer_is_aligned():
    template = TEMPLATE.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n\n{% endif %}{{ m.content }}",
    )
    tokenizers = byte_level(), byte_level(("e", "s"))
    for tokenizer in tokenizers:
        tokenizer.chat_template = template
    tokenizers[1].chat_template = template.replace("<think>", "<thinking>")
    student, teacher = map(encoder, tokenizers)
    turns = talk("yes")
    turns[1]["reasoning_content"] = "so e\u0301"
    sample = pair(student, teacher, turns, see="own")
    expected = ">so e\u0301</think>\n\nyes<end>".encode()
    assert b"".join(chunk_texts(student, teacher, sample)) == expected


# --- the real tokenizers


@pytest.fixture(scope="module")
def real() -> dict[str, TextEncoder]:
    options = {"mask_token": "<|mask|>", "template": {"enable_thinking": False}}
    return {
        "qwen": encoder(load_tokenizer(TOKENIZERS / "qwen3"), **options),
        "llada": encoder(load_tokenizer(TOKENIZERS / "llada2-shaped")),
        "bytes": encoder(byte_level(("Ġ", "g"), ("e", "s"))),
        "lower": encoder(sentencepiece(normalizer=normalizers.Lowercase(), scheme="prepend")),
        "accents": encoder(sentencepiece(normalizer=ACCENTS)),
        "NFKC": encoder(sentencepiece(normalizer=normalizers.NFKC(), scheme="first")),
    }


@needs_real
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_real_tokenizers_keep_all_chunks_of_any_script(real, text):
    sample = pair(real["qwen"], real["llada"], talk(text, question=text), see="own")
    spelt = b"".join(chunk_texts(real["qwen"], real["llada"], sample))
    assert spelt == unicodedata.normalize("NFC", text).encode()
    assert sample.chunks[0].tolist()[::2] == [sample.teacher.prompt_tokens, sample.student.prompt_tokens]


@needs_real
@pytest.mark.parametrize("other", ["bytes", "lower", "accents", "NFKC"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_real_tokenizers_keep_what_others_spell_alike(real, text, other):
    for student, teacher in ((real["qwen"], real[other]), (real[other], real["qwen"])):
        text_around = f"go on, {text} and so it goes"
        sample = pair(student, teacher, talk(text_around, question=text), see="own")
        spelt = b"".join(chunk_texts(student, teacher, sample))
        assert spelt.startswith(b"go on,")
        assert spelt.endswith(b" and so it goes")


@needs_real
def test_a_long_line_that_is_changed_throughout_is_read(real):
    for text in ("cafe\u0301 " * 200_000, "\u09dc" * 300_000, "a" + "\u0301" * 300_000):
        sample = pair(real["qwen"], real["llada"], talk(text), see="own")
        assert len(sample.student.x_0) == 512
        assert sample.student.truncated
        assert len(sample.chunks) or text.startswith("a")
        chunk_texts(real["qwen"], real["llada"], sample)


def test_a_deleted_letter_and_a_dummy_space_together_leave_no_empty_chunk():
    """A row more and a token less: the numbers of rows and tokens agree by chance."""
    cuts = np.array([[0, 0, 1], [1, 2, 1], [3, 2, 1], [4, 3, 1]])
    tokens = [b"", b"a", b"b"]
    assert align_stretches(tokens, tokens, cuts, cuts).tolist() == [[0, 2, 0, 2], [2, 3, 2, 3]]
    deleted = normalizers.Replace("\u00ad", "")
    student = encoder(sentencepiece(normalizer=deleted, scheme="always"))
    teacher = encoder(sentencepiece(normalizer=deleted, scheme="always", added=[AddedToken("<x>")]))
    chunks = pair(student, teacher, talk("a\u00adb"), see="own").chunks
    assert len(chunks)
    assert (chunks[:, 1] > chunks[:, 0]).all()
    assert (chunks[:, 3] > chunks[:, 2]).all()
    assert (chunks[1:, 0] >= chunks[:-1, 1]).all()
