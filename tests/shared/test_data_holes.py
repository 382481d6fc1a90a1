"""Data that lose something, end in a traceback or read something else: each is read rightly, named or refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tide.shared.conversations import open_conversations, parse_sources
from tide.shared.errors import DataError, TideError
from tide.shared.tokens import Dropped, TextEncoder, load_tokenizer
from tiny_runs import ASSETS

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
LINE = b'{"prompt": "a", "response": "b"}\n'
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + PLAIN
DIVIDES = "{% for c in m.tool_calls or [] %}{{ 1 // (c.function.arguments | length) }}{% endfor %}"
RAISES = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + DIVIDES)
CALLS = "{{ m.content }}{% for c in (m.tool_calls or [])[:1] %}<call>{{ c.function.name }}</call>{% endfor %}"
FIRST_NAME = PLAIN.replace("{{ m.content }}", CALLS)


def told(path: Path | str, **how: Any) -> str:
    """All that a user sees of a source: its prompts and answers, warnings, or the refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = [repr((c.messages, c.tools)) for c in open_conversations(parse_sources(str(path)), **how)]
        except TideError as error:
            found = [str(error)]
    return " ".join([*found, *(str(warning.message) for warning in caught)])


def lines(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "word", "columns"),
    [
        ({"instruction": "Q", "input": "", "context": "CTX", "output": "O"}, "context", None),
        ({"instruction": "Q", "input": "IN", "context": "CTX", "output": "O"}, "context", None),
        ({"messages": [USER, ANSWER], "context": "CTX"}, "context", None),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", None),
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "functions", None),
        ({"instruction": "In French", "question": "Q", "answer": "A"}, "instruction", None),
        ({"prompt": "a", "response": "b", "question": "SECOND", "answer": "d"}, "question", None),
        ({"prompt": "Sum it up.", "article": "long", "response": "A"}, "article", None),
        ({"prompt": "Q", "system_message": "In French", "response": "A"}, "system_message", None),
        ({"q": "Q", "a": "A", "system": "In French"}, "system", {"prompt": "q", "response": "a"}),
        ({"m": [USER, ANSWER], "tools": [{"name": "f"}]}, "tools", {"messages": "m"}),
    ],
)
def test_a_column_that_may_decide_the_answer_is_read_or_named(tmp_path, row, word, columns):
    said = told(lines(tmp_path, row), columns=columns)
    value = row.get(word)
    assert (isinstance(value, str) and value in said) or f"{word}" in said.replace(str(tmp_path), ""), said


def test_a_null_argument_of_a_call_stays(tmp_path):
    call = {"function": {"name": "f", "arguments": {"unit": None}}}
    assert "unit" in told(lines(tmp_path, {"messages": [USER, {**ANSWER, "tool_calls": [call]}]}))


def test_a_last_turn_that_calls_a_tool_is_not_cut_off_without_a_word(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "zap", "arguments": {}}}]}
    file = lines(tmp_path, {"messages": [USER, ANSWER, USER, call]}, {"messages": [USER, ANSWER]})
    assert "line 1: last turn without text" in told(file)
    assert open_conversations(parse_sources(str(file)), skip_bad=True).dropped == {"last turn without text": 1}


@pytest.mark.parametrize(
    "line",
    [
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "\\ud800": 1}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
        b'[{"function": {"name": "f", "arguments": {"\\ud800": 1}}}]}]}',
        b'{"prompt": "a", "response": "b", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"prompt": "a", "prompt": "z", "response": "b"}',
    ],
    ids=["surrogate field", "surrogate argument", "deep nesting", "repeated key"],
)
def test_odd_json_is_refused_by_line(tmp_path, line):
    (tmp_path / "data.jsonl").write_bytes(line + b"\n")
    with pytest.raises(DataError, match="line 1"):
        open_conversations(parse_sources(str(tmp_path / "data.jsonl")))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_table_in_another_encoding_is_not_to_be_fetched_again(tmp_path, encoding):
    (tmp_path / "data.csv").write_bytes("prompt,response\né,b\n".encode(encoding))
    with pytest.raises(DataError) as refused:
        open_conversations(parse_sources(str(tmp_path / "data.csv")))
    assert "fetch the file again" not in str(refused.value)


def test_two_columns_of_one_name_are_not_one(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,prompt,response\nx,y,b\n")
    with pytest.raises(DataError, match="prompt"):
        open_conversations(parse_sources(str(tmp_path / "data.csv")))


@pytest.mark.parametrize("name", ["a*b", "f[1]", "c++"])
def test_a_folder_is_read_and_no_other_whatever_its_characters(tmp_path, monkeypatch, name):
    for folder, prompt in ((name, b"mine"), ("aXb", b"other"), ("f1", b"other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(LINE.replace(b'"a"', b'"' + prompt + b'"'))
    monkeypatch.chdir(tmp_path)
    for source in (name, f"./{name}", f"{name}[train]"):
        said = told(source)
        assert "'mine'" in said, said
        assert "'other'" not in said, said


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(LINE)
    (tmp_path / "set" / "b.csv").write_text("prompt,response\nx,y\n")
    assert "'x'" in (said := told(tmp_path / "set")) or "b.csv" in said, said


def test_a_bad_row_of_a_folder_is_named_with_its_file(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(LINE)
    (tmp_path / "set" / "b.jsonl").write_bytes(LINE + b'{"prompt": "x", "response": 4}\n')
    assert "b.jsonl" in told(tmp_path / "set")


@pytest.mark.parametrize(
    "path", ["data.txt", "x.jsonl.gz", "owner/x.zip", "owner/x.arrow", "no+such.jsonl", "no[such].jsonl"]
)
def test_a_file_that_is_not_there_is_told_as_such(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no such file" in told(path)


def test_a_tokenizer_in_a_folder_that_is_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer("models/x")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (PLAIN, [USER, {**ANSWER, "content": "", "function_call": {"name": "zap", "arguments": "{}"}}, ANSWER]),
        (FIRST_NAME, [USER, {**ANSWER, "tool_calls": [call("f", city="Bonn")]}, USER, ANSWER]),
        (FIRST_NAME, [USER, {**ANSWER, "tool_calls": [call("f"), call("g")]}, USER, ANSWER]),
        (NO_SYSTEM,
         [{"role": "system", "content": "In French"}, USER, ANSWER]),
        (RAISES,
         [USER, {**ANSWER, "tool_calls": [call("f")]}, USER, ANSWER]),
    ],
    ids=["function_call", "arguments", "second call", "system turn", "template that raises"],
)  # fmt: skip
def test_a_template_that_leaves_something_out_or_fails_drops_the_sample_with_a_reason(template, turns):
    encoder = TextEncoder(load_tokenizer(ASSETS / "student", chat_template=template), block_size=8, max_length=512)
    with pytest.raises(Dropped):
        encoder.encode(turns)
