"""Every form of data that people have: the same conversations from each, and nothing that decides an answer lost."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tide.shared.conversations import Conversation, Message, open_conversations, parse_sources
from tide.shared.errors import DataError
from tide.shared.models.loading import local_folder
from tide.shared.tokens import Dropped, TextEncoder, load_tokenizer
from tiny_runs import ASSETS

SYSTEM, QUESTION, ANSWER = "Answer in French.", "Name a colour.", "Bleu."
SAME = [
    Message("system", SYSTEM), Message("user", "Hi"), Message("assistant", "Salut."), Message("user", QUESTION),
    Message("assistant", ANSWER),
]  # fmt: skip
TURNS = [message.to_json() for message in SAME]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[message.role], "value": message.content} for message in SAME[1:]
]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages and a system column": {"messages": TURNS[1:], "system": SYSTEM},
    "ShareGPT": {"conversations": SHAREGPT, "system": SYSTEM},
    "conversation": {"conversation": TURNS},
    "Alpaca": {"system": SYSTEM, "history": [["Hi", "Salut."]], "instruction": QUESTION, "input": "", "output": ANSWER},
    "question and answer": {
        "system_prompt": SYSTEM, "history": [["Hi", "Salut."]], "question": QUESTION, "answer": ANSWER,
    },
    "prompt and response": {"prompt": QUESTION, "response": ANSWER, "system": SYSTEM, "history": TURNS[1:3]},
    "TRL": {"prompt": TURNS[:-1], "completion": TURNS[-1:]},
    "parts": {
        "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS],
    },
}  # fmt: skip


def write(tmp_path: Path, *rows: dict[str, Any], name: str = "data.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(path: Path | str, **how: Any) -> list[Conversation]:
    return list(open_conversations(parse_sources(str(path)), **how))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(tmp_path, form):
    (found,) = read(write(tmp_path, FORMS[form]))
    assert found == Conversation.of(SAME)


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_tables_give_the_same_as_lines(tmp_path, ending):
    row = {"messages": [{"role": m.role, "content": m.content} for m in SAME], "rating": 5}
    if ending == "json":
        (tmp_path / "data.json").write_text(json.dumps([row]))
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    assert read(tmp_path / f"data.{ending}") == [Conversation.of(SAME)]


@pytest.mark.parametrize(("name", "delimiter"), [("data.csv", ","), ("data.tsv", "\t")])
def test_tables_of_text_are_read_alone_and_in_folders(tmp_path, name, delimiter):
    rows = [
        {"instruction": 'Say "a, b"', "input": "", "output": "a,\nb\tc", "system": SYSTEM},
        {"instruction": "Add", "input": "3 and 4", "output": "7", "system": ""},
    ]
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    found = read(tmp_path / name)
    assert [m.content for m in found[0].messages] == [SYSTEM, 'Say "a, b"', "a,\nb\tc"]
    assert [m.content for m in found[1].messages] == ["Add\n\n3 and 4", "7"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes((tmp_path / name).read_bytes())
    assert [c.sample_id for c in read(tmp_path / "folder")] == [c.sample_id for c in found]


def test_a_broken_table_of_text_is_refused_with_its_row(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,response\nHi,Ho\nHi,there,Ho\n")
    with pytest.raises(DataError, match=r"data.csv, row 1 .*another number of cells"):
        read(tmp_path / "data.csv")


@pytest.mark.parametrize("order", [1, -1])
def test_optional_columns_count_whichever_row_comes_first(tmp_path, order):
    rows = [
        {"instruction": "Say yes.", "output": "yes"}, {"instruction": "Add", "input": "3 and 4", "output": "7"},
        {"instruction": "Say it.", "output": "oui", "system": SYSTEM},
    ]  # fmt: skip
    said = {m.content for c in read(write(tmp_path, *rows[::order])) for m in c.messages}
    assert {"Add\n\n3 and 4", SYSTEM, "Say yes."} <= said


def test_rows_of_several_forms_in_one_file_are_each_read(tmp_path):
    assert {c.sample_id for c in read(write(tmp_path, *FORMS.values()))} == {Conversation.of(SAME).sample_id}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [TURNS[1], {"role": "assistant", "content": None, "tool_calls": [{}]}, TURNS[-1]]}, "tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, TURNS[-1]]}, "not text"),
        ({"messages": [{"role": "developer", "content": "x"}, *TURNS]}, "role 'developer'"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}, SHAREGPT[1]]}, "function_call"),
        ({"messages": json.dumps(TURNS)}, "expected a list of messages"),
        ({"prompt": "Hi", "response": 4}, "expected text"),
        ({"prompt": TURNS[:-1], "completion": "text"}, "expected text"),
        ({"messages": TURNS, "system": "Answer in German."}, "two system prompts"),
        ({"prompt": "Hi", "response": "Ho", "history": ["Hi"]}, "malformed history"),
        ({"messages": TURNS, "tools": "not JSON"}, "malformed tools"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, "no conversation in the columns prompt, chosen"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_line_and_reason_and_counted(tmp_path, row, why):
    file = write(tmp_path, {"prompt": "Hi", "response": "Ho"}, row)
    with pytest.raises(DataError, match=rf"line 2: .*{why}"):
        read(file)
    kept = open_conversations(parse_sources(str(file)), skip_bad=True)
    assert (len(kept), sum(kept.dropped.values())) == (1, 1)


def test_columns_that_look_like_a_prompt_and_are_not_read_are_named(tmp_path):
    row = {"question": "Which?", "choices": ["a", "b"], "answer": "a"}
    with pytest.warns(UserWarning, match=r"the columns choices are not part of any prompt"):
        read(write(tmp_path, row))


@pytest.mark.parametrize("kind", ["Image", "Audio"])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_columns_that_nobody_needs_are_not_decoded(tmp_path, kind, place):
    """Neither broken media nor a map column stops a data set whose text is sound."""
    text = {"dtype": "string", "_type": "Value"}
    table = pa.table(
        {
            "media": pa.array([{"bytes": b"x", "path": "a"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "labels": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
            "prompt": ["Hi"], "response": ["Ho"],
        }
    )  # fmt: skip
    features = {"media": {"_type": kind}, "prompt": text, "response": text}
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)
    (found,) = read(file if place == "file" else file.parent)
    assert [m.content for m in found.messages] == ["Hi", "Ho"]


def test_a_folder_of_unlike_files_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", {"prompt": "a", "response": "b"}, name="a.jsonl")
    write(tmp_path / "set", {"prompt": "c", "response": "d", "rating": 5}, name="b.jsonl")
    reader = open_conversations(parse_sources(str(tmp_path / "set")))
    assert [c.messages[0].content for c in reader] == ["a", "c"]


def test_each_answer_may_be_a_sample_with_what_comes_before(tmp_path):
    file = write(tmp_path, {"messages": TURNS}, {"prompt": "Hi", "response": "Ho"})
    last, each = read(file), read(file, turns="each")
    assert [c.messages for c in each] == [tuple(SAME[:3]), tuple(SAME), last[1].messages]
    assert last[0] == each[1]
    assert len({c.sample_id for c in each}) == 3
    again = open_conversations(parse_sources(str(file)), turns="each")
    assert [again[i] for i in (2, 0, 1)] == [each[2], each[0], each[1]]


@pytest.mark.parametrize("name", ["a+b.jsonl", "a[b].jsonl", "a [1], b: c.jsonl", "x+y[z].jsonl"])
def test_paths_are_named_as_they_are(tmp_path, name, monkeypatch):
    write(tmp_path, {"prompt": name, "response": "Ho"}, name=name)
    write(tmp_path, {"prompt": "other", "response": "Ho"}, name="other.jsonl")
    monkeypatch.chdir(tmp_path)
    for source in (
        name,
        str(tmp_path / name),
        f"{name}[train]",
        f"other.jsonl+{name}",
        f"{name}[split=train]+other.jsonl",
    ):
        assert name in [c.messages[0].content for c in read(source)], source


@pytest.mark.parametrize("path", ["./no/such", "no.jsonl", "/no/such", "data/such", "~/no-such", "a\\b"])
def test_a_local_path_that_is_not_there_is_never_asked_of_the_hub(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # whoever asks gets Unavailable
    with pytest.raises(DataError, match="no such file or folder"):
        read(path)
    if "jsonl" not in path and "\\" not in path and "~" not in path:
        with pytest.raises(DataError, match="no such folder"):
            local_folder(path)


QWEN_LIKE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"function": {"name": "weather", "arguments": {"city": "Bonn"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def encoder(template: str) -> TextEncoder:
    tokenizer = load_tokenizer(ASSETS / "student", chat_template=template)
    return TextEncoder(tokenizer, block_size=8, max_length=512)


@pytest.mark.parametrize(
    ("turns", "tools", "word", "reason"),
    [
        (
            [*TURNS[1:2], {"role": "assistant", "content": "", "tool_calls": CALL}, *TURNS[3:]],
            (),
            "weather",
            "tool_calls",
        ),
        (TURNS, TOOLS, "<tools>", "tools"),
        (
            [*TURNS[:-1], {**TURNS[-1], "reasoning_content": "Three times seven."}],
            (),
            "Three times",
            "reasoning_content",
        ),
    ],
)
def test_what_stands_beside_roles_and_contents_is_written_or_the_sample_is_left_out(turns, tools, word, reason):
    reader = encoder(QWEN_LIKE)
    assert word in reader.tokenizer.decode(reader.encode(turns, tools).x_0)
    with pytest.raises(Dropped, match=f"template leaves out {reason}"):
        encoder(PLAIN).encode(turns, tools)


def test_ids_of_plain_conversations_are_those_of_their_roles_and_contents(tmp_path):
    """They key the noise: what a data set carries beside must not change them, and what an answer depends on must."""
    plain = Conversation.of([Message("user", "Hi"), Message("assistant", "Ho")])
    assert plain.sample_id == "094cff3843a6acc1"
    with_tools = Conversation.of(plain.messages, TOOLS)
    called = Conversation.of([Message("user", "Hi"), Message("assistant", "Ho", {"tool_calls": CALL})])
    assert len({plain.sample_id, with_tools.sample_id, called.sample_id}) == 3
    (read_back,) = read(write(tmp_path, {"messages": [m.to_json() for m in called.messages]}))
    assert read_back == called
