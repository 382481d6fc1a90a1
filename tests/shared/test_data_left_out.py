"""What is not read of data is said: columns, fields, rows that a filter refuses, empty files, nulls of tables; and what
is not needed refuses no row."""

import datetime
import json
import shutil
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tide.shared.conversations import Conversation, Message, open_conversations, open_reader, parse_sources
from tide.shared.errors import DataError
from tide.teacher_dump.pairing import UnwrittenFields, open_pairing
from tide.teacher_dump.plan import make_plan
from tiny_runs import tiny_config

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
WHEN = datetime.datetime(2023, 4, 9, 0, 2, 53)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(file: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def pairs(num: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i}?", "response": f"The number {i}.", **more} for i in range(num)]


def test_which_columns_are_read_is_said_once_for_each_source(tmp_path):
    first = write(tmp_path / "a.jsonl", {**USER, "messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "note": 1})
    second = parquet(tmp_path / "b.parquet", *pairs(2, system="Be brief.", when=WHEN, id=3))
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "x.jsonl", *pairs(1, level="easy"))
    write(tmp_path / "c" / "y.jsonl", {"question": "Q", "answer": "A", "stars": 5, "level": "hard"})
    found = open_conversations(parse_sources(f"{first}+{second}+{tmp_path / 'c'}[level:easy,level:hard]"))
    said = [line.partition(": ")[2] for line in found.columns_read]
    assert said == [
        "reads the columns messages; does not read content, note, role",
        "reads the columns prompt, response, system; does not read id, when",
        "reads the columns answer, level, prompt, question, response; does not read stars",
    ]


def test_many_columns_are_named_with_how_many_more_there_are(tmp_path):
    file = write(tmp_path / "a.jsonl", *pairs(1, **{f"c{i}": i for i in range(20)}))
    (line,) = open_conversations(parse_sources(str(file))).columns_read
    assert line.endswith("does not read c0, c1, c10, c11, c12, c13, c14, c15 and 12 more")
    (line,) = open_conversations(parse_sources(str(write(tmp_path / "b.jsonl", *pairs(1))))).columns_read
    assert line.endswith("reads the columns prompt, response")


def test_rows_that_a_filter_refuses_are_counted(tmp_path):
    rows = [{**row, "kind": kind} for row, kind in zip(pairs(4), "abab", strict=True)]
    file = write(tmp_path / "a.jsonl", *rows)
    assert open_conversations(parse_sources(f"{file}[kind:a]")).dropped == {"refused by a filter": 2}
    assert open_conversations(parse_sources(f"{file}[kind:a,kind:b]")).dropped == {}
    bad = write(tmp_path / "b.jsonl", *rows, {"prompt": "", "response": "x", "kind": "a"})
    both = open_conversations(parse_sources(f"{bad}[kind:a]"), skip_bad=True)
    assert both.dropped == {"refused by a filter": 2, "no prompt": 1}


def test_answers_that_the_filter_by_language_refuses_are_counted_one_by_one(tmp_path):
    turns = [USER, {**ANSWER, "content": "```c```"}, USER, {**ANSWER, "content": "```python```"}]
    file = write(tmp_path / "a.jsonl", {"messages": turns})
    with pytest.warns(UserWarning, match="no column lang"):
        found = open_conversations(parse_sources(f"{file}[lang:python]"), turns="each")
    assert (len(found), found.dropped) == (1, {"refused by a filter": 1})


def test_a_filter_compares_dates_as_text(tmp_path):
    rows = [{**row, "when": when} for row, when in zip(pairs(2), (WHEN, WHEN.replace(year=2024)), strict=True)]
    file = parquet(tmp_path / "a.parquet", *[{**row, "price": Decimal(f"{i}.50")} for i, row in enumerate(rows)])
    for given in ("when:2024-04-09T00:02:53", "price:1.50"):
        (found,) = open_conversations(parse_sources(f"{file}[{given}]"))
        assert found.messages[0].content == "What is 1?"


@pytest.mark.parametrize("empty", [b"", b"\n \n", b"prompt,response\n"], ids=["no byte", "no row", "a header"])
def test_empty_files_of_a_folder_are_passed_over_and_counted(tmp_path, empty):
    suffix = "csv" if b"," in empty else "jsonl"
    (tmp_path / f"b.{suffix}").write_bytes(empty)
    (tmp_path / f"d.{suffix}").write_bytes(b"")
    for name in "ac":
        (tmp_path / f"{name}.{suffix}").write_text(
            f"prompt,response\n{name},b\n" if suffix == "csv" else f'{{"prompt": "{name}", "response": "b"}}\n'
        )
    with pytest.warns(UserWarning, match=rf"2 of its 4 files are empty and passed over: b\.{suffix}, d\.{suffix}"):
        found = open_conversations(parse_sources(str(tmp_path)))
    assert [one.messages[0].content for one in found] == ["a", "c"]


def test_a_worker_that_opens_scanned_data_says_nothing_again(tmp_path):
    write(tmp_path / "a.jsonl", *pairs(1))
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.csv").write_text("prompt,response\nx,y\n")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_conversations(parse_sources(str(tmp_path)))
    assert len(said) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_reader(parse_sources(str(tmp_path)))


def test_a_folder_of_empty_files_and_an_empty_file_that_is_named_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 2 files holds a row \(a\.jsonl, b\.jsonl\)"):
        open_conversations(parse_sources(str(tmp_path / "set")))
    with pytest.raises(DataError, match="the file is empty"):
        open_conversations(parse_sources(str(tmp_path / "set" / "a.jsonl")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.zst"])
def test_text_of_wide_letters_is_told_with_its_cure(tmp_path, encoding, name):
    text = {"csv": "prompt,response\na,b\n", "json": '[{"prompt": "a", "response": "b"}]'}.get(
        name.rpartition(".")[2], '{"prompt": "a", "response": "b"}\n'
    )
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(data) if name.endswith("zst") else data)
    kind = encoding[:6].upper()
    with pytest.raises(DataError, match=rf"is {kind} text, and tide reads UTF-8.*iconv -f {kind} -t UTF-8"):
        open_conversations(parse_sources(str(tmp_path / name)))


def test_the_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "a.jsonl", *pairs(1))
    (tmp_path / "b.jsonl").write_bytes('{"prompt": "a", "response": "b"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"b\.jsonl: is UTF-16 text"):
        open_conversations(parse_sources(str(tmp_path)))


def test_a_line_in_another_encoding_is_told_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xe9", "response": "b"}\n')
    with pytest.raises(DataError, match=r"line 2: is not UTF-8 text .*save the file as UTF-8"):
        open_conversations(parse_sources(str(tmp_path / "a.jsonl")))


def test_a_byte_order_mark_of_utf_8_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\n')
    assert len(open_conversations(parse_sources(str(tmp_path / "a.jsonl")))) == 1


ODD = {
    "timestamp": WHEN, "zone": WHEN.replace(tzinfo=datetime.UTC), "day": WHEN.date(), "clock": WHEN.time(),
    "price": Decimal("1.50"), "took": datetime.timedelta(seconds=3),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_dates_and_the_like_refuse_no_row_wherever_they_stand(tmp_path, name):
    """As in WildChat, whose messages carry the time beside the text."""
    turns = [{**USER, name: ODD[name]}, {**ANSWER, name: ODD[name]}]
    file = parquet(tmp_path / "a.parquet", {"conversation": turns, name: ODD[name]})
    (found,) = open_conversations(parse_sources(str(file)))
    assert [m.content for m in found.messages] == ["Hi", "Ho"]
    json.dumps([m.to_json() for m in found.messages])
    if name == "timestamp":  # the same conversation as from lines of JSON
        written = [{**turn, name: "2023-04-09T00:02:53"} for turn in turns]
        (same,) = open_conversations(parse_sources(str(write(tmp_path / "b.jsonl", {"conversation": written}))))
        assert same == found


def test_bytes_inside_a_message_are_refused_still(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"messages": [{**USER, "image": b"x"}, {**ANSWER, "image": None}]})
    with pytest.raises(DataError, match="bytes is not JSON"):
        open_conversations(parse_sources(str(file)))


@pytest.mark.parametrize("place", ["file", "folder of two"])
def test_null_arguments_of_calls_in_a_table_are_named(tmp_path, place):
    calls = [{"function": {"name": "f", "arguments": {"city": "Bonn", "unit": unit}}} for unit in (None, "C")]
    rows = [{"messages": [USER, {**ANSWER, "content": str(i), "tool_calls": [call]}]} for i, call in enumerate(calls)]
    file = parquet(tmp_path / "a.parquet", *rows)
    if place != "file":
        parquet(tmp_path / "b.parquet", *pairs(1))
    with pytest.warns(UserWarning, match=r"null arguments of calls \(unit\) are taken for absent.*as JSON text"):
        found = open_conversations(parse_sources(str(file if place == "file" else tmp_path)))
    assert [list(one.messages[1].more["tool_calls"][0]["function"]["arguments"]) for one in list(found)[:2]] == [
        ["city"], ["city", "unit"],
    ]  # fmt: skip


def test_nulls_in_what_tools_say_of_their_parameters_are_named_too(tmp_path):
    tools = [{"name": "f", "parameters": {"unit": {"type": "string", "default": default}}} for default in (None, "C")]
    file = parquet(tmp_path / "a.parquet", {"messages": [USER, ANSWER], "tools": tools, "note": None})
    with pytest.warns(UserWarning, match=r"\(default\) are taken for absent"):
        open_conversations(parse_sources(str(file)))


def test_arguments_as_text_and_other_nulls_of_a_table_need_no_word(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"unit": null}'}}
    rows = [{"messages": [USER, {**ANSWER, "tool_calls": [call]}], "note": None}, {"messages": [USER, ANSWER]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_conversations(parse_sources(str(parquet(tmp_path / "a.parquet", *rows))))
    assert "null" in str(found[0].messages[1].more)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(tiny_root: Path, template: str | None) -> Path:
    """The student, or a copy of it with another chat template."""
    if template is None:
        return tiny_root / "student"
    folder = tiny_root / f"student-{abs(hash(template))}"
    shutil.copytree(tiny_root / "student", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def fields_told(tiny_root: Path, *messages: dict[str, Any], template: str | None = None) -> list[str]:
    pairing = open_pairing(tiny_config(tiny_root, student__path=str(with_template(tiny_root, template))))
    unwritten = UnwrittenFields(pairing)
    turns = [Message(m["role"], m["content"], {k: v for k, v in m.items() if k not in USER}) for m in messages]
    for _ in range(20):
        unwritten.look("a.jsonl", Conversation.of(turns))
    return unwritten.sentences()


def test_fields_of_messages_that_no_template_writes_are_named_once(tiny_root):
    (said,) = fields_told(tiny_root, {**USER, "name": "Ann", "id": 7, "turn_id": "x"}, {**ANSWER, "weight": 1})
    assert said.startswith(
        "source a.jsonl: no chat template writes these fields of messages: name (user), weight (assistant);"
    )
    assert fields_told(tiny_root, {**USER, "id": 7, "parentId": "x", "uuid": "y", "turn_index": 3}, ANSWER) == []
    assert fields_told(tiny_root, USER, ANSWER) == []


def test_fields_that_one_side_alone_writes_are_named_with_the_other(tiny_root):
    (said,) = fields_told(tiny_root, {**USER, "name": "Ann"}, ANSWER, template=TEMPLATE)
    assert "the teacher's chat template does not write these fields of messages: name (user);" in said


def test_a_field_that_is_written_for_one_role_alone_is_named_for_the_other(tiny_root):
    template = TEMPLATE.replace("{% if m.name %}", "{% if m.name and m.role == 'user' %}")
    pairing = open_pairing(
        tiny_config(tiny_root, teacher__path="", student__path=str(with_template(tiny_root, template)))
    )
    unwritten = UnwrittenFields(pairing)
    ann = {"name": "Ann"}
    for number in range(40):  # the user's name comes after the field was tried often in vain
        user = Message("user", "Hi", ann if number > 30 else {})
        unwritten.look("a.jsonl", Conversation.of([user, Message("assistant", "Ho", ann)]))
    (said,) = unwritten.sentences()
    assert "no chat template writes these fields of messages: name (assistant);" in said


def plan_told(root: Path, source: str, **more: Any) -> list[str]:
    said: list[str] = []
    plan, _ = make_plan(tiny_config(root, data__source=source, **more), say=said.append)
    return [*said, *plan.sentences()]


def test_a_plan_says_what_is_read_and_what_a_filter_refused(tiny_root, tmp_path):
    rows = [{**row, "kind": kind} for row, kind in zip(pairs(4), "abab", strict=True)]
    said = plan_told(tiny_root, f"{write(tmp_path / 'a.jsonl', *rows)}[kind:a]")
    assert any(line.endswith("reads the columns kind, prompt, response") for line in said)
    assert "2 of 4 samples are left out (refused by a filter: 2)" in said


def test_a_plan_says_what_a_limit_does(tiny_root, tmp_path):
    first, second = write(tmp_path / "a.jsonl", *pairs(4)), write(tmp_path / "b.jsonl", *pairs(9)[4:])
    both = f"{first}+{second}"
    assert any(
        "data.limit = 20 is more than the 9 conversations" in s for s in plan_told(tiny_root, both, data__limit=20)
    )
    said = plan_told(tiny_root, both, data__limit=3)
    assert "data.limit = 3: 3 conversations are used, the first of 9" in said
    assert any(line.startswith("data.limit = 3: nothing of ") and "b.jsonl" in line for line in said)
    drawn = plan_told(tiny_root, both, data__limit=8, data__sample_seed=1)
    assert "data.limit = 8: 8 conversations are used, drawn from 9" in drawn
    assert not any("data.limit" in line for line in plan_told(tiny_root, both))
    assert not any("data.limit" in line for line in plan_told(tiny_root, both, data__limit=9))
