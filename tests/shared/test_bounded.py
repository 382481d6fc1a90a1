"""Chat templates and tokenizers that take all the time or memory there is: bounded, one message, exit code 65."""

import json
import os
import pickle
import resource
import threading
import time
import warnings
from pathlib import Path

import pytest
from tide.shared import bounded
from tide.shared.bounded import Bounded, Refused
from tide.shared.errors import DataError
from tide.shared.tokenizer_setup import MAX_ADDED_TOKENS, _is_plain_regex, is_plain, load_tokenizer
from tide.shared.tokens import TextEncoder
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = {"role": "user", "content": "what is it"}
ANSWER = {"role": "assistant", "content": "it is a test"}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a giant": "{{ 'a' * 10**9 }}",
    "a giant that no memory holds": "{{ 'a' * 10**13 }}",
    "macros that call themselves": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters that multiply": "{{ ('a' * 1000)|replace('a', 'b' * 1000)|replace('b', 'c' * 1000) }}",
    "a number of many digits": "{{ (10 ** 10 ** 9) % 7 }}",
    "a format of many digits": "{{ '%3000000000d'|format(1) }}",
    "nested": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
}


def tokenizer(template: str = CHAT, normalizer=None, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*([pre_tokenizer] if pre_tokenizer else []), level])
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", mask_token="<|mask|>")
    made.chat_template = template
    return made


def encoder(*arguments, **options) -> TextEncoder:
    return TextEncoder(tokenizer(*arguments, **options), block_size=4, max_length=4096)


@pytest.fixture(autouse=True)
def less(monkeypatch):
    """Smaller limits show the same, sooner."""
    monkeypatch.setattr(bounded, "CPU_S", 1)
    monkeypatch.setattr(Bounded.__init__, "__kwdefaults__", {"cpu_s": 1, "memory_bytes": 256 << 20})


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_one_message(template):
    with pytest.raises(DataError) as caught:
        encoder(template)
    assert caught.value.exit_code == 65
    assert "template" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("harm", ["loops", "a giant", "macros that double"])
def test_a_template_that_explodes_on_one_row_alone_is_bounded_there(harm):
    side = encoder("{% if 'row 500' in messages[0]['content'] %}" + ENDLESS[harm] + "{% endif %}" + CHAT)
    side.encode([QUESTION, ANSWER])
    with pytest.raises(DataError, match="the chat template exceeds what it may take"):
        side.encode([{**QUESTION, "content": "row 500"}, ANSWER])
    side.encode([QUESTION, ANSWER])  # a child of its own again


def test_what_a_template_writes_is_the_same_in_a_child():
    side = encoder()
    for text in ("a", "\ud83d", "é" * 1000, "\ud83d\ude00 <|end|>", "x" * 3_000_000):
        messages = [{**QUESTION, "content": text}, ANSWER]
        direct = side.tokenizer.apply_chat_template(messages, tokenize=False)
        assert side.write(messages) == direct


def test_a_refusal_of_the_template_is_told_in_its_words():
    side = encoder("{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHAT)
    with pytest.raises(Refused, match="too many turns"):
        side.write([QUESTION, ANSWER, QUESTION])


def test_an_encoder_can_be_pickled_and_used_in_a_fork():
    side = encoder()
    expected = side.encode([QUESTION, ANSWER]).x_0.tolist()
    assert pickle.loads(pickle.dumps(side)).encode([QUESTION, ANSWER]).x_0.tolist() == expected
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps(side.encode([QUESTION, ANSWER]).x_0.tolist()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert json.loads(os.read(read, 1 << 16)) == expected
    os.close(read)
    os.close(write)
    assert side.encode([QUESTION, ANSWER]).x_0.tolist() == expected


def test_an_interrupt_in_a_call_does_not_mix_up_the_answers(monkeypatch):
    call = Bounded(lambda text: text, "a test")
    assert call("one") == "one"
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "_read", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call("two")
    assert call("three") == "three"


def test_a_child_is_gone_with_its_owner():
    call = Bounded(lambda: str(os.getpid()), "a test")
    pid = int(call())
    del call
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_holds_no_file_of_its_parent(tmp_path):
    with open(tmp_path / "held", "w"):
        held = Bounded(
            lambda: " ".join(os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")), ""
        )
        assert str(tmp_path) not in held()


EXPLODING = {
    "a replacement by a giant": {"normalizer": normalizers.Replace("t", "x" * 2_000_000)},
    "replacements that double": {
        "normalizer": normalizers.Sequence([normalizers.Replace("t", "tt") for _ in range(40)]),
    },
    "a regular expression that backtracks": {"pre_tokenizer": pre_tokenizers.Split(Regex(r"(t+)+\1x"), "isolated")},
    "a prefix of a giant": {"normalizer": normalizers.Sequence([normalizers.Prepend("x" * 10_000)] * 200)},
}


@pytest.mark.parametrize("name", ["a replacement by a giant", "replacements that double"])
def test_a_tokenizer_that_explodes_on_a_text_is_bounded(name):
    side = encoder(**EXPLODING[name])
    with pytest.raises(DataError, match="the tokenizer exceeds what it may take"):
        side.encode_text("t" * 2000)


@pytest.mark.parametrize("name", EXPLODING)
def test_what_may_explode_is_read_in_a_child_first(name):
    assert not is_plain(tokenizer(**EXPLODING[name]))


@pytest.mark.parametrize(
    "regex", [r"(a+)+$", r"(a|a)*b", r"a*a*a*a*a*b", r"(a{1,30}){1,30}", r"(\w+\s?)*$", r"(.)\1", r"a{5000}"]
)
def test_a_pattern_that_may_backtrack_is_not_plain(regex):
    assert not _is_plain_regex(regex)


def test_the_patterns_of_known_tokenizers_are_plain(project_root):
    folders = sorted((project_root.parent / "shared" / "tokenizers").glob("*/tokenizer.json"))
    if not folders:
        pytest.skip("../shared/tokenizers is absent: it does not ship with the project")
    for file in folders:
        assert is_plain(load_tokenizer(file.parent)), file
    cl100k = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    o200k = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|\s+"
    assert _is_plain_regex(cl100k)
    assert _is_plain_regex(o200k)


def saved(folder: Path, change) -> Path:
    """A tokenizer's folder whose tokenizer.json was changed."""
    tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return folder


def test_millions_of_added_tokens_are_refused_before_they_are_loaded(tmp_path):
    one = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    many = [{**one, "id": 300 + i, "content": f"<{i}>"} for i in range(MAX_ADDED_TOKENS + 1)]
    with pytest.raises(DataError, match="tokenizer.json adds 100,0.. tokens"):
        load_tokenizer(saved(tmp_path / "t", lambda tree: tree.update(added_tokens=many)))


def test_a_file_of_absurd_size_is_refused_unread(tmp_path):
    folder = saved(tmp_path / "t", lambda tree: None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        kept = (folder / name).read_bytes()
        os.truncate(folder / name, 1 << 40)
        with pytest.raises(DataError, match=rf"{name}: 1,099,511,627,776 bytes"):
            load_tokenizer(folder)
        (folder / name).write_bytes(kept)
    load_tokenizer(folder)


def test_a_tokenizer_that_explodes_while_it_is_loaded_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("tide.shared.tokenizer_setup.LOAD_CPU_S", 1)
    monkeypatch.setattr("tide.shared.tokenizer_setup.LOAD_BYTES", 256 << 20)
    double = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
    token = {
        "id": 300, "content": "tttt", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
        "special": False,
    }  # fmt: skip
    harm = {"normalizer": {"type": "Sequence", "normalizers": [double] * 40}, "added_tokens": [token]}
    with pytest.raises(DataError, match=r"tokenizer .* exceeds what it may take"):
        load_tokenizer(saved(tmp_path / "t", lambda tree: tree.update(harm)))


def test_a_fork_of_a_moment_in_which_another_thread_renders_is_no_deadlock():
    def slow() -> str:
        time.sleep(0.05)
        return "x"

    bounded = Bounded(slow, "a template")
    thread = threading.Thread(target=lambda: [bounded() for _ in range(20)])
    thread.start()
    time.sleep(0.2)
    children = []
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            os._exit(0 if bounded() == "x" else 1)
        children.append(pid)
        time.sleep(0.07)
    thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]


def test_what_a_system_cannot_limit_stays_unlimited(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**63 - 1 if name == "SC_OPEN_MAX" else 4096)
    assert Bounded(lambda: "x", "a template")() == "x"
