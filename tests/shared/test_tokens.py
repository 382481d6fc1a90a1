"""Token ids, prompt lengths, token bytes and pairs: small tokenizers built here, and the two real ones on GSM8K."""

import json
from pathlib import Path

import numpy as np
import pytest
from tide.shared.errors import ConfigError, DataError
from tide.shared.token_bytes import ByteTable, byte_level_alphabet, byte_table, student_ids_of_teacher
from tide.shared.tokenkit_adapter import align_chunks_with_tokenkit
from tide.shared.tokens import Dropped, TextEncoder, load_tokenizer, pair
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_real = pytest.mark.skipif(
    not (SHARED / "tokenizers").is_dir(),
    reason="the real tokenizers lie beside the project, in ../shared, and are absent",
)
TAGS = ("<user>", "<assistant>", "<end>", "<eos>", "<mask>")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def wrap(backend: Tokenizer, template: str | None, tags: tuple[str, ...], **tokens: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(tags))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(
    *merges: tuple[str, str], template: str | None = TEMPLATE, tags=TAGS, normalizer=None, prefix=False, **tokens: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the 256 bytes and the given merges (spelt in the GPT-2 alphabet: Ġ is a space)."""
    vocab = {chr(point): i for i, point in enumerate(byte_level_alphabet())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend, template, tags, **({"eos_token": "<eos>", "mask_token": "<mask>"} | tokens))


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """Llama-style BPE with byte fallback; `scheme` says how the dummy space gets there."""
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("h", "i"), ("▁", "hi"), ("▁", "▁")]
    pieces = [
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz?",
        *(a + b for a, b in merges),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend, TEMPLATE, TAGS, eos_token="<eos>", mask_token="<mask>")


def encoder(tokenizer, *, block_size=4, max_length=64, **settings) -> TextEncoder:
    return TextEncoder(tokenizer, block_size=block_size, max_length=max_length, **settings)


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def spell(side: TextEncoder, ids) -> bytes:
    return b"".join(side.token_bytes[i] for i in ids)


def check_chunks(student: TextEncoder, teacher: TextEncoder, sample) -> None:
    """Every chunk holds the same bytes on both sides, they are contiguous, and lie in both responses."""
    chunks = sample.chunks
    assert chunks.dtype == np.int32
    for t_start, t_end, s_start, s_end in chunks:
        theirs = spell(teacher, sample.teacher.x_0[t_start:t_end])
        assert theirs == spell(student, sample.student.x_0[s_start:s_end]) != b""
    assert (chunks[1:, [0, 2]] == chunks[:-1, [1, 3]]).all()
    assert (chunks[:, 0] >= sample.teacher.prompt_tokens).all()
    assert (chunks[:, 2] >= sample.student.prompt_tokens).all()
    assert (chunks[:, 1] <= len(sample.teacher.x_0)).all()
    assert (chunks[:, 3] <= len(sample.student.x_0)).all()


# --- one side


def test_prompt_answer_and_filling_by_hand():
    side = encoder(byte_level())
    sample = side.encode(talk("hi", "yes"))
    tokens = [side.tokenizer.convert_ids_to_tokens(int(i)) for i in sample.x_0]
    assert tokens == ["<user>", "h", "i", "<end>", "<assistant>", "y", "e", "s", "<end>", "<eos>", "<eos>", "<eos>"]
    assert sample.x_0.dtype == np.int32
    assert sample.prompt_tokens == 5
    assert sample.content == (5, 9)
    assert (sample.gap_bytes, sample.truncated, sample.exact_bytes) == (0, False, True)


def test_no_filling_when_the_length_is_a_block_multiple():
    sample = encoder(byte_level()).encode(talk("hi", "no"))
    assert len(sample.x_0) == 8
    assert sample.x_0[-1] == byte_level().convert_tokens_to_ids("<end>")


def test_only_the_last_assistant_turn_is_learnt():
    side = encoder(byte_level())
    sample = side.encode([*talk("a", "b", "c", "d"), {"role": "user", "content": "e"}])
    assert spell(side, sample.x_0[: sample.prompt_tokens]) == b"<user>a<end><assistant>b<end><user>c<end><assistant>"
    assert spell(side, sample.x_0[slice(*sample.content)]) == b"d<end>"


@pytest.mark.parametrize("answer", ["yes", "user", "assistant", "<user>", "yes<end>"])
def test_a_short_answer_that_stands_in_the_prompt_is_found_in_the_answer(answer):
    side = encoder(byte_level(), max_length=128)
    sample = side.encode(talk(f"{answer}? say {answer}", answer, f"again {answer}", answer))
    assert sample.content[0] == sample.prompt_tokens
    assert spell(side, sample.x_0[slice(*sample.content)]) == f"{answer}<end>".encode()


def test_a_truncated_sample_has_max_length_tokens_and_no_eos():
    side = encoder(byte_level(), max_length=8)
    sample = side.encode(talk("hi", "yes!"))
    assert sample.truncated
    assert len(sample.x_0) == 8
    assert side.eos_id not in sample.x_0
    assert sample.content == (5, 8)
    exactly = side.encode(talk("hi", "no"))
    assert not exactly.truncated
    assert len(exactly.x_0) == 8


def test_a_token_that_straddles_the_boundary_belongs_to_the_prompt():
    side = encoder(byte_level((":", "y"), template=PLAIN))
    sample = side.encode(talk("hi", "yes"))
    assert spell(side, sample.x_0[: sample.prompt_tokens]) == b"u:hi\na:y"
    assert sample.prompt_tokens == 7
    assert sample.gap_bytes == 1
    assert spell(side, sample.x_0[slice(*sample.content)]) == b"es\n"


@pytest.mark.parametrize(
    ("expression", "answer", "kept"),
    [
        ("m.content", " yes\n", " yes\n"),
        ("m.content | trim", " yes\n", "yes"),
        ("m.content.lstrip('\\n')", "\n\n yes\n", " yes\n"),
        ("m.content.rstrip()", " yes \n", " yes"),
    ],
)
def test_content_that_the_template_strips_is_still_found(expression, answer, kept):
    side = encoder(byte_level(template=TEMPLATE.replace("m.content", expression)))
    sample = side.encode(talk("yes?", answer))
    assert spell(side, sample.x_0[slice(*sample.content)]) == f"{kept}<end>".encode()


def test_a_character_split_over_tokens_is_kept_whole():
    side = encoder(byte_level())
    text = "🤗 naïve 漢"
    sample = side.encode(talk("hi", text))
    assert sample.exact_bytes
    assert spell(side, sample.x_0[slice(*sample.content)]) == f"{text}<end>".encode()


def test_text_that_the_normaliser_changes_is_noticed_in_the_answer_only():
    side = encoder(byte_level(normalizer=normalizers.NFC()))
    changed = side.encode(talk("hi", "cafe\u0301 yes"))
    assert not changed.exact_bytes
    assert changed.prompt_tokens == 5
    unchanged = side.encode(talk("cafe\u0301", "yes"))
    assert unchanged.exact_bytes
    assert spell(side, unchanged.x_0[slice(*unchanged.content)]) == b"yes<end>"
    both = side.encode(talk("cafe\u0301", "cafe\u0301"))
    assert not both.exact_bytes
    assert spell(side, both.x_0[: both.prompt_tokens]) == "<user>café<end><assistant>".encode()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
        ([{"role": "assistant", "content": "hi"}], "no prompt before the answer"),
        ([*talk("hi"), {"role": "assistant", "content": ["parts"]}], "content is not text"),
        (talk("hi", " \n"), "empty answer"),
        (talk("hi", "half an emoji: \ud83d"), "text is not valid Unicode"),
        (talk("0123456789", "yes"), "prompt longer than max length"),
        (talk("hi", "<mask>"), "contains the mask token"),
        (talk("<mask>", "yes"), "contains the mask token"),
        ([{"role": "user", "content": None}, *talk("hi", "yes")[1:]], "chat template refuses the conversation"),
        (talk("hi", "<think>why</think>yes"), "template rewrites the content"),
    ],
)
def test_unusable_samples_are_dropped_with_a_reason(messages, reason):
    template = TEMPLATE.replace("m.content", "('' + m.content).split('</think>')[-1]")
    with pytest.raises(Dropped) as dropped:
        encoder(byte_level(template=template), max_length=12).encode(messages)
    assert dropped.value.reason == reason


def test_a_prompt_that_is_no_prefix_drops_the_sample():
    template = TEMPLATE.replace("<{{ m.role }}>", "<{{ m.role }}>{% if messages | length > 3 %}!{% endif %}")
    with pytest.raises(Dropped, match="prompt is not a prefix"):
        encoder(byte_level(template=template)).encode(talk("a", "b", "c", "d"))


# --- settings and their errors


def test_a_mask_token_that_is_absent_gets_the_first_free_id_in_a_copy():
    tokenizer = byte_level(tags=TAGS[:4], mask_token=None)
    side = encoder(tokenizer, mask_token="<|mask|>")
    assert side.mask_id == len(tokenizer)
    assert side.tokenizer.mask_token == "<|mask|>"
    assert side.token_bytes[side.mask_id] == b"<|mask|>"
    assert tokenizer.mask_token is None
    with pytest.raises(Dropped, match="contains the mask token"):
        side.encode(talk("hi", "a <|mask|>"))


def test_a_mask_id_may_lie_beyond_the_vocabulary_or_be_an_added_token():
    assert encoder(byte_level(mask_token=None), mask_id=1000).mask_id == 1000
    tokenizer = byte_level(mask_token=None)
    assert encoder(tokenizer, mask_token="<mask>").mask_id == tokenizer.convert_tokens_to_ids("<mask>")


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ({"mask_token": None}, {}, "has no mask token; set mask_token"),
        ({}, {"mask_id": 64}, "mask id 64 is already used by a token of the text"),
        ({}, {"mask_token": "a"}, "is already used by a token of the text, 'a'"),
        ({}, {"mask_token": "<mask>", "mask_id": 3}, "has id 260, not mask_id = 3"),
        ({}, {"mask_token": "<eos>"}, "both EOS and mask"),
        ({"eos_token": None}, {}, "has no eos token; set eos_token"),
        ({}, {"eos_token": "<stop>"}, "has no token '<stop>'"),
        ({}, {"max_length": 63}, "max_length = 63: expected a positive multiple of block_size = 4"),
        ({}, {"template": {"tokenize": True}}, "tide sets these itself"),
    ],
)
def test_bad_settings_are_refused(tokens, settings, message):
    with pytest.raises(ConfigError, match=message):
        encoder(byte_level(**tokens), **settings)


def test_a_tokenizer_without_a_usable_chat_template_is_refused():
    with pytest.raises(DataError, match="has no chat template"):
        encoder(byte_level(template=None))
    with pytest.raises(DataError, match=r"one question and one answer fails: .*refuses.*\(no system message\)"):
        encoder(byte_level(template="{{ raise_exception('no system message') }}"))
    with pytest.raises(DataError, match="fails: template rewrites the content"):
        encoder(byte_level(template=TEMPLATE.replace("m.content", "m.content | upper")))


def test_an_unknown_kind_of_tokenizer_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "hi": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    side = encoder(wrap(backend, TEMPLATE, TAGS, eos_token="<eos>", mask_token="<mask>"))
    with pytest.raises(DataError, match=r"WordPiece with .*Expected byte-level BPE"):
        side.encode(talk("hi", "his"))


def test_settings_that_others_left_in_the_tokenizer_do_not_matter():
    tokenizer = byte_level(pad_token="<eos>")
    side = encoder(tokenizer)
    before = side.encode(talk("hi", "yes")).x_0.tolist()
    tokenizer("hi", truncation=True, max_length=2, padding="max_length")
    assert side.encode(talk("hi", "yes")).x_0.tolist() == before


# --- token bytes


def test_bytes_of_byte_level_and_added_tokens():
    table = byte_table(byte_level(("Ġ", "y"), ("Ã", "©")))
    assert table.tokens[256:] == [b" y", "é".encode(), *(tag.encode() for tag in TAGS)]
    assert sorted(table.tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert table.dummy == "none"


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("text", ["yes hi", " yes", "  hi", "漢\nyes", "hi 🤗  yes?", "\n"])
def test_sentencepiece_bytes_spell_the_text_without_dummy_spaces(scheme, text):
    side = encoder(sentencepiece(scheme))
    sample = side.encode(talk("hi yes", f"{text}x"))
    assert sample.exact_bytes
    assert b"".join(sample.token_bytes) == f"{text}x<end>".encode()
    assert sample.content[0] == sample.prompt_tokens


def test_sentencepiece_byte_tokens_and_spaces():
    table = byte_table(sentencepiece("always"))
    assert table.tokens[1 + 0x0A] == b"\n"
    assert table.tokens[1 + 0xFF] == b"\xff"
    assert b" yes" in table.tokens
    assert (table.dummy, byte_table(sentencepiece("prepend")).dummy) == ("unless_space", "always")


def test_a_dummy_space_alone_has_no_bytes():
    side = encoder(sentencepiece("always"))
    sample = side.encode(talk("hi", "漢"))
    assert sample.token_bytes == (b"", b"\xe6", b"\xbc", b"\xa2", b"<end>")


def test_the_prefix_space_of_byte_level_bpe_is_no_byte_of_the_text():
    side = encoder(byte_level(("Ġ", "y"), prefix=True))
    sample = side.encode(talk("hi", "yes"))
    assert sample.token_bytes == (b"y", b"e", b"s", b"<end>")


def test_an_added_token_that_swallows_spaces_is_noticed():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    side = encoder(tokenizer)
    assert not side.encode(talk("hi", "yes <x>")).exact_bytes
    sample = side.encode(talk("hi <x>", "yes<x>"))
    assert sample.exact_bytes
    assert spell(side, sample.x_0[slice(*sample.content)]) == b"yes<x><end>"


def test_equal_bytes_are_paired_at_most_once_ordinary_before_special():
    teacher = [b"a", b"b", b"b", b"<end>", b"<mask>", b"", b"only", b"b"]
    student = [b"<end>", b"b", b"", b"a", b"a", b"<mask>", b"<end>"]
    pairs = student_ids_of_teacher(
        ByteTable(teacher, frozenset({1, 3, 4}), "none"), ByteTable(student, frozenset({0, 1, 5}), "none"),
        teacher_mask_id=4, student_mask_id=5,
    )  # fmt: skip
    assert pairs.tolist() == [3, -1, 1, 6, -1, -1, -1, -1]
    assert pairs.dtype == np.int32


def test_a_letter_is_paired_and_not_the_token_for_its_unknown_byte():
    """In a vocabulary with byte fallback `<0x68>` comes before `h` and has the same bytes; text only uses `h`."""
    fallback, bytes_only = byte_table(sentencepiece("always")), byte_table(byte_level())
    for teacher, student in ((fallback, bytes_only), (bytes_only, fallback), (fallback, fallback)):
        pairs = student_ids_of_teacher(teacher, student)
        for table, ids in ((teacher, np.flatnonzero(pairs >= 0)), (student, pairs[pairs >= 0])):
            assert all(i not in table.fallback for i in ids if table.tokens[i] in b"abcdefghijklmnopqrstuvwxyz?")
        assert sum(teacher.tokens[i] in (b"h", b"?", b" ") for i in np.flatnonzero(pairs >= 0)) == 3
        assert pairs[teacher.tokens.index(b"\x80")] >= 0  # no ordinary token: the byte's own is paired


# --- fingerprints and loading


def test_fingerprint_survives_saving_truncation_state_and_the_mask_token(tmp_path):
    tokenizer = byte_level(tags=TAGS[:4], mask_token=None)
    side = encoder(tokenizer, mask_token="<|mask|>")
    tokenizer.save_pretrained(tmp_path / "plain")
    side.tokenizer.save_pretrained(tmp_path / "elsewhere")
    loaded = encoder(load_tokenizer(tmp_path / "elsewhere"), mask_token="<|mask|>")
    assert loaded.fingerprint == side.fingerprint
    plain = load_tokenizer(tmp_path / "plain")
    plain("hi", truncation=True, max_length=2)
    assert encoder(plain, mask_id=261).fingerprint == side.fingerprint
    assert {len(digest) for digest in side.fingerprint.values()} == {64}


def test_fingerprint_changes_with_merges_added_tokens_and_template():
    side = encoder(byte_level(("a", "b")))
    assert encoder(byte_level(("a", "c"))).fingerprint["tokenizer"] != side.fingerprint["tokenizer"]
    assert (
        encoder(byte_level(("a", "b"), tags=(*TAGS, "<x>"))).fingerprint["tokenizer"] != side.fingerprint["tokenizer"]
    )
    other = encoder(byte_level(("a", "b"), template=PLAIN)).fingerprint
    assert other["tokenizer"] == side.fingerprint["tokenizer"]
    assert other["chat_template"] != side.fingerprint["chat_template"]


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    byte_level(template=None).save_pretrained(tmp_path / "plain")
    with pytest.raises(DataError, match="has no chat template"):
        load_tokenizer(tmp_path / "plain")


def test_a_tokenizer_with_its_own_code_is_not_run(tmp_path):
    settings = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my_code.MyTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "my_code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


# --- pairs


def test_answers_are_aligned_by_hand():
    student = encoder(byte_level(("y", "e")))
    teacher = encoder(byte_level(("e", "s"), ("y", "es"), template=f"<end>{TEMPLATE}"))
    sample = pair(student, teacher, talk("yes?", "yes no"), see="own")
    check_chunks(student, teacher, sample)
    assert (sample.teacher.prompt_tokens, sample.student.prompt_tokens) == (6, 6)
    # teacher: yes, " ", n, o, <end>; student: ye, s, " ", n, o, <end>
    assert sample.chunks.tolist() == [[6, 7, 6, 8], *([7 + i, 8 + i, 8 + i, 9 + i] for i in range(4))]


def test_the_end_of_the_turn_is_aligned_only_if_written_alike():
    student = encoder(byte_level())
    teacher = encoder(byte_level(template=TEMPLATE.replace("<end>", "<end>\n")))
    sample = pair(student, teacher, talk("hi", "yes"), see="own")
    check_chunks(student, teacher, sample)
    assert len(sample.chunks) == 3
    assert sample.student.content == (5, 8)


def test_one_tokenizer_and_text_pair_every_response_position_with_eos():
    student, teacher = encoder(byte_level()), encoder(byte_level(), mask_id=999)
    sample = pair(student, teacher, talk("hi", "yes"), see="own")
    assert sample.chunks.tolist() == [[i, i + 1, i, i + 1] for i in range(5, 12)]
    shorter = pair(student, encoder(byte_level(), max_length=8), talk("hi", "yes"), see="own")
    assert shorter.chunks.tolist() == [[i, i + 1, i, i + 1] for i in range(5, 8)]


def test_different_eos_ends_the_identity_before_the_filling():
    teacher = encoder(byte_level(), eos_token="<user>")
    sample = pair(encoder(byte_level()), teacher, talk("hi", "yes"), see="own")
    assert sample.chunks.tolist() == [[i, i + 1, i, i + 1] for i in range(5, 9)]


@pytest.mark.parametrize("late_side", ["teacher", "student"])
def test_a_token_that_straddles_on_one_side_only_delays_the_first_chunk(late_side):
    late = encoder(byte_level((":", "y"), template=PLAIN))
    early = encoder(byte_level(("y", "e"), ("n", "o"), template=PLAIN))
    student, teacher = (early, late) if late_side == "teacher" else (late, early)
    sample = pair(student, teacher, talk("hi", "yes no"), see="own")
    check_chunks(student, teacher, sample)
    first = sample.chunks[0]
    assert spell(student, sample.student.x_0[first[2] : first[3]]) == b"s"
    assert spell(student, sample.student.x_0[first[2] : sample.chunks[-1, 3]]) == b"s no\n"


def test_stripped_on_one_side_only_aligns_what_both_hold():
    student = encoder(byte_level())
    teacher = encoder(byte_level(template=TEMPLATE.replace("m.content", "m.content | trim")))
    sample = pair(student, teacher, talk("hi", "\n yes "), see="own")
    check_chunks(student, teacher, sample)
    first, last = sample.chunks[0], sample.chunks[-1]
    assert spell(student, sample.student.x_0[first[2] : last[3]]) == b"yes"


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_chunks_beyond_a_truncated_side_are_dropped(side):
    merged = byte_level(("y", "e"), ("ye", "s"))
    student = encoder(byte_level(), max_length=8 if side == "student" else 64)
    teacher = encoder(merged, max_length=8 if side == "teacher" else 64)
    sample = pair(student, teacher, talk("hi", "yes yes yes"), see="own")
    check_chunks(student, teacher, sample)
    assert len(sample.chunks) == (1 if side == "student" else 3)
    assert getattr(sample, side).truncated


def test_text_changed_on_one_side_has_chunks_around_the_change():
    student, teacher = encoder(byte_level()), encoder(byte_level(normalizer=normalizers.NFC()))
    sample = pair(student, teacher, talk("hi", "cafe\u0301"), see="own")
    # teacher: c, a, f, two bytes of é, <end>; student: c, a, f, e, two bytes of the accent, <end>
    assert sample.chunks.tolist() == [[5, 6, 5, 6], [6, 7, 6, 7], [7, 8, 7, 8], [10, 11, 11, 12]]
    assert sample.chunks.dtype == np.int32
    assert (sample.student.exact_bytes, sample.teacher.exact_bytes) == (True, False)


def test_byte_level_and_sentencepiece_align():
    student, teacher = encoder(byte_level(("Ġ", "h"))), encoder(sentencepiece("always"))
    sample = pair(student, teacher, talk("hi", "yes hi 漢"), see="own")
    check_spans = [b"yes", b" hi", b" ", b"\xe6", b"\xbc", b"\xa2", b"<end>"]
    assert [spell(student, sample.student.x_0[a:b]) for a, b in sample.chunks[:, 2:]] == check_spans


def test_a_teacher_that_sees_the_students_ids_gets_the_students_sample():
    student, teacher = encoder(byte_level()), encoder(byte_level(template=PLAIN), mask_id=999)
    sample = pair(student, teacher, talk("hi", "yes"), see="student")
    assert sample.teacher is sample.student
    assert sample.chunks.tolist() == [[i, i + 1, i, i + 1] for i in range(5, 12)]


def test_a_teacher_must_share_every_id_it_sees():
    student = encoder(byte_level(("y", "e")))
    with pytest.raises(DataError, match=r"id 256 is b'ye' to the student's tokenizer and b'es' to the teacher's"):
        pair(student, encoder(byte_level(("e", "s"))), talk("hi", "yes"), see="student")
    pair(student, encoder(byte_level(("e", "s"))), talk("hi", "no"), see="student")


def test_the_teachers_mask_must_not_stand_in_the_students_ids():
    teacher = encoder(byte_level(), mask_token="<user>")
    with pytest.raises(Dropped, match="contains the mask token"):
        pair(encoder(byte_level()), teacher, talk("hi", "yes"), see="student")


def test_a_teacher_that_may_read_less_than_the_student_writes_is_refused():
    with pytest.raises(ConfigError, match="the teacher may read 8 tokens"):
        pair(encoder(byte_level()), encoder(byte_level(), max_length=8), talk("hi", "yes"), see="student")


# --- the real tokenizers


@pytest.fixture(scope="module")
def qwen() -> TextEncoder:
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "qwen3")
    return encoder(tokenizer, block_size=32, max_length=512, mask_token="<|mask|>", template={"enable_thinking": False})


@pytest.fixture(scope="module")
def llada() -> TextEncoder:
    return encoder(load_tokenizer(SHARED / "tokenizers" / "llada2-shaped"), block_size=32, max_length=512)


@pytest.fixture(scope="module")
def gsm8k() -> list[list[dict[str, str]]]:
    with open(SHARED / "data" / "gsm8k_train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    return [talk(row["question"], row["answer"]) for row in rows]


@needs_real
def test_qwen3_gets_dllms_mask_id(qwen, llada):
    assert (qwen.mask_id, qwen.eos_id) == (151669, 151645)
    assert (llada.mask_id, llada.eos_id) == (156895, 156892)
    assert len(qwen.token_bytes) == len(qwen.tokenizer) == 151670


@needs_real
def test_gsm8k_ids_are_those_of_the_chat_template(qwen, llada, gsm8k):
    for side, options in ((qwen, {"enable_thinking": False}), (llada, {})):
        for messages in gsm8k[:40]:
            ids = side.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            prompt = side.tokenizer.apply_chat_template(
                messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True, **options
            )
            sample = side.encode(messages)
            assert sample.x_0[: len(ids)].tolist() == ids
            assert set(sample.x_0[len(ids) :].tolist()) <= {side.eos_id}
            assert len(sample.x_0) % 32 == 0
            assert sample.prompt_tokens <= len(prompt)
            straddled = ids[: len(prompt)] != prompt
            assert straddled or sample.prompt_tokens == len(prompt)


@needs_real
def test_gsm8k_token_bytes_spell_the_answer(qwen, llada, gsm8k):
    for side, suffix in ((qwen, "<|im_end|>\n"), (llada, "<|role_end|>")):
        for messages in gsm8k[:100]:
            sample = side.encode(messages)
            assert sample.exact_bytes
            assert sample.gap_bytes == 0
            assert spell(side, sample.x_0[slice(*sample.content)]) == (messages[-1]["content"] + suffix).encode()


@needs_real
def test_nine_chunks_in_ten_are_one_token_on_each_side(qwen, llada, gsm8k):
    samples = [pair(qwen, llada, messages, see="own") for messages in gsm8k]
    for sample in samples[:50]:
        check_chunks(qwen, llada, sample)
    lengths = np.concatenate([sample.chunks[:, [1, 3]] - sample.chunks[:, [0, 2]] for sample in samples])
    assert (lengths == 1).all(axis=1).mean() > 0.9
    covered = sum(len(sample.student.token_bytes) for sample in samples)
    assert lengths[:, 1].sum() == covered


@needs_real
@pytest.mark.parametrize(
    "text", ["🤗🏳️‍🌈!", "naïve 漢字 ကြောင်", "a\n\n  b\t\tc  ", "def f():\r\n    return 'é'", "<|im_end|>"]
)
def test_real_tokenizers_split_any_text_into_its_bytes(qwen, llada, text):
    sample = pair(qwen, llada, talk(text, text), see="own")
    check_chunks(qwen, llada, sample)
    assert b"".join(sample.student.token_bytes) == b"".join(sample.teacher.token_bytes) == text.encode()
    assert sample.chunks[-1, 1] == sample.teacher.content[1]


@needs_real
def test_real_tokenizers_normalise_and_rewrite(qwen, llada):
    sample = pair(qwen, llada, talk("hi", "cafe\u0301"), see="own")
    assert not sample.student.exact_bytes
    check_chunks(qwen, llada, sample)
    assert spell(qwen, sample.student.x_0[sample.chunks[0, 2] : sample.chunks[-1, 3]]) == "café".encode()
    assert len(pair(qwen, llada, talk("cafe\u0301", "cafe"), see="own").chunks)
    with pytest.raises(Dropped, match="template rewrites the content"):
        pair(qwen, llada, talk("hi", "<think>hm</think>yes"), see="own")


@needs_real
def test_tokenkit_finds_the_chunks_of_real_tokenizers(qwen, llada, gsm8k, install_tokenkit):
    install_tokenkit()
    num_chunks = 0
    for messages in gsm8k[:100]:
        found = [pair(qwen, llada, messages, see="own", align=a) for a in (None, align_chunks_with_tokenkit)]
        np.testing.assert_array_equal(found[0].chunks, found[1].chunks)
        num_chunks += len(found[0].chunks)
    assert num_chunks > 5_000


@needs_real
def test_shared_vocabulary_of_the_real_tokenizers_is_injective(qwen, llada):
    pairs = student_ids_of_teacher(
        llada.bytes_of, qwen.bytes_of, teacher_mask_id=llada.mask_id, student_mask_id=qwen.mask_id
    )
    found = pairs[pairs >= 0]
    assert len(pairs) == len(llada.token_bytes)
    assert len(np.unique(found)) == len(found) > 50_000
    assert all(llada.token_bytes[t] == qwen.token_bytes[s] for t, s in enumerate(pairs) if s >= 0)
    assert pairs[llada.mask_id] == -1
