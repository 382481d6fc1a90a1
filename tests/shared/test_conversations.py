"""Data sources: what opens, what is refused and how, and that ids and order are stable; the Hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tide.shared.conversations import (
    Conversation,
    Message,
    Source,
    open_conversations,
    parse_sources,
    pin_sources,
)
from tide.shared.errors import ConfigError, DataError
from tide.shared.stdlib_source import STDLIB_LICENCE, stdlib_pairs, stdlib_version

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
PAPER_MIXTURE = (
    "allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk"
    "+OpenCoder-LLM/opc-sft-stage1[lang:python]+OpenCoder-LLM/opc-sft-stage2[lang:python]"
)
ROWS = [
    {"prompt": "one?", "response": "1", "lang": "en", "level": 1},
    {"prompt": "zwei?", "response": "2", "lang": "de", "level": 2},
    {"prompt": "trois?", "response": "3 — ∇", "lang": "fr", "level": 2},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def open_text(text, **settings):
    return open_conversations(parse_sources(text), **settings)


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def messages_row(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def opened_row(tmp_path, row, **settings):
    return turns(open_text(write_lines(tmp_path / "row.jsonl", [row]), **settings)[0])


def test_paper_mixture_parses_to_four_sources():
    assert parse_sources(PAPER_MIXTURE) == (
        Source("allenai/tulu-3-sft-mixture"),
        Source("HuggingFaceTB/smoltalk"),
        Source("OpenCoder-LLM/opc-sft-stage1", where=(("lang", "python"),)),
        Source("OpenCoder-LLM/opc-sft-stage2", where=(("lang", "python"),)),
    )


@pytest.mark.parametrize("text", ["a/b[train,lang:python]", "a/b[train][lang:python]", " a/b [train , lang : python] "])
def test_filters_may_share_brackets_or_have_their_own(text):
    assert parse_sources(text) == (Source("a/b", where=(("lang", "python"),), names=("train",)),)


@pytest.mark.parametrize(
    "source",
    [
        Source("stdlib"),
        Source("./data/x.jsonl", split="train", revision="sha256:ab"),
        Source("a/b", "all", "test", (("lang", "c++"), ("time", "10:30=now")), "0" * 40),
        Source("a/b", names=("main", "train")),
    ],
)
def test_source_prints_as_the_syntax_it_is_read_from(source):
    assert parse_sources(f"{source}+{source}") == (source, source)


@pytest.mark.parametrize(
    "text", ["", "a+", "+a", "a[", "a]b", "a[]", "a[x]b", "[x]", "a[col:]", "a[:v]", "a[split=x,split=y]", "a[name=x]"]
)
def test_unreadable_source_is_refused_by_name_of_the_setting(text):
    with pytest.raises(ConfigError, match=r"data\.source"):
        parse_sources(text)


def test_sample_id_is_the_hash_of_canonical_json():
    conversation = Conversation.of([Message("user", 'é "?"'), Message("assistant", "1\n")])
    canonical = '[{"content":"é \\"?\\"","role":"user"},{"content":"1\\n","role":"assistant"}]'
    assert conversation.sample_id == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert conversation.sample_id == "b670ae3aace9e143"


def write_all_kinds(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    packed = tmp_path / "rows.jsonl.zst"
    lines = path.read_bytes().splitlines(keepends=True)
    packed.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))  # three frames
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(path.read_bytes())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return [str(path), str(packed), *(str(tmp_path / name) for name in ("list.json", "lines.json", "rows.parquet"))]


def test_every_kind_of_file_gives_the_same_conversations_in_order(tmp_path):
    for name in write_all_kinds(tmp_path):
        conversations = open_text(name)
        assert len(conversations) == 3
        assert [turns(c) for c in conversations] == [
            [("user", row["prompt"]), ("assistant", row["response"])] for row in ROWS
        ]
        assert conversations[2] == conversations[-1] == Conversation.of(conversations[2].messages)
        assert conversations.sample_id(1) == conversations[1].sample_id
        with pytest.raises(IndexError):
            conversations[3]


def test_local_files_leave_nothing_behind(tmp_path):
    names = write_all_kinds(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    program = "import sys; from tide.shared.conversations import *\nopen_conversations(parse_sources(sys.argv[1]))"
    cache = tmp_path / "hf"
    subprocess.run(
        [sys.executable, "-c", program, "+".join(names)], check=True, env={**os.environ, "HF_HOME": str(cache)}
    )
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert [path for path in sorted(tmp_path.rglob("*")) if cache not in (path, *path.parents)] == before


def test_crlf_blank_lines_byte_order_mark_and_missing_last_newline_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\r\n\r\n  \n{"prompt": "c", "response": "d"}')
    assert [turns(c)[1] for c in open_text(str(path))] == [("assistant", "b"), ("assistant", "d")]


def test_sources_are_joined_in_order_and_a_repeated_sample_is_kept_once(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    second = write_lines(tmp_path / "b.jsonl", [ROWS[1], ROWS[2]])
    conversations = open_text(f"{first}+{second}")
    assert [turns(c)[0][1] for c in conversations] == ["one?", "zwei?", "trois?"]
    assert conversations.dropped == {"duplicate": 2}


def test_values_of_one_column_are_alternatives_and_columns_add_up(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)

    def prompts(filters):
        return [turns(c)[0][1] for c in open_text(name + filters)]

    assert prompts("[lang:de]") == ["zwei?"]
    assert prompts("[lang:de][lang:en]") == ["one?", "zwei?"]
    assert prompts("[train][level:2,lang:fr]") == ["trois?"]


def test_filter_on_an_absent_column_names_the_columns(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no row has the column tag .*it has prompt, response, lang, level"):
        open_text(f"{name}[tag:x]")


def test_filter_that_leaves_nothing_is_an_error(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl: no conversation is left"):
        open_text(f"stdlib[heldout]+{name}[lang:it]")


def test_lang_without_such_a_column_looks_into_the_answer_and_says_so(tmp_path):
    rows = [{"prompt": "a", "response": "```python\n1\n```"}, {"prompt": "python?", "response": "```c\n1\n```"}]
    name = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.warns(UserWarning, match="no column lang; kept the rows whose answer contains python"):
        conversations = open_text(f"{name}[lang:python]")
    assert [turns(c)[0][1] for c in conversations] == ["a"]


def test_filtered_rows_are_not_judged(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", [*ROWS, {"prompt": 3, "response": None, "lang": "it"}])
    assert len(open_text(f"{name}[lang:de]")) == 1


def test_conversation_ends_with_its_last_answer(tmp_path):
    row = messages_row(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", " "))
    assert opened_row(tmp_path, row) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_sharegpt_turns_are_renamed(tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert opened_row(tmp_path, row) == [("user", "a"), ("assistant", "b")]


def test_struct_of_lists_is_read_as_messages(tmp_path):
    assert opened_row(tmp_path, {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}) == [
        ("user", "a"), ("assistant", "b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names", [("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("prompt", "completion")]
)
def test_pairs_are_recognised_by_their_column_names(names, tmp_path):
    row = {"id": 1, names[0]: "a", names[1]: "b"}
    assert opened_row(tmp_path, row) == [("user", "a"), ("assistant", "b")]


def test_input_of_an_instruction_belongs_to_the_prompt(tmp_path):
    row = {"instruction": "Sum up.", "input": "1 2", "output": "3"}
    assert opened_row(tmp_path, row) == [("user", "Sum up.\n\n1 2"), ("assistant", "3")]
    assert opened_row(tmp_path, {**row, "input": ""}) == [("user", "Sum up."), ("assistant", "3")]


def test_mapped_columns_come_before_recognised_ones(tmp_path):
    row = {"question": "a", "answer": "3", "solution": "1 + 2 = 3", "chat": messages_row(("user", "x"))["messages"]}
    assert opened_row(tmp_path, row, columns={"prompt": "question", "response": "solution"})[1][1] == "1 + 2 = 3"
    row["chat"].append({"role": "assistant", "content": "y"})
    assert opened_row(tmp_path, row, columns={"messages": "chat"}) == [("user", "x"), ("assistant", "y")]


def test_mapping_that_fits_one_source_leaves_the_others_to_recognition(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", [{"problem": "a", "solution": "b"}])
    both = open_text(f"stdlib[heldout]+{name}", columns={"prompt": "problem", "response": "solution"})
    assert turns(both[-1]) == [("user", "a"), ("assistant", "b")]
    assert len(both) > 100


def test_mapping_that_fits_no_source_is_an_error(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.columns = .*no source has these columns"):
        open_text(name, columns={"messages": "chat"})
    with pytest.raises(ConfigError, match=r"data\.columns"):
        open_text(name, columns={"prompt": "prompt"})


def test_unknown_columns_are_named_with_the_setting_that_maps_them(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", [{"frage": "a", "antwort": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl.*frage, antwort; expected .*data\.columns"):
        open_text(name)


BAD_ROWS = [
    ("no answer", messages_row(("user", "a"))),
    ("no answer", messages_row(("user", "a"), ("assistant", " \n"))),
    ("no answer", {"messages": []}),
    ("no prompt", messages_row(("assistant", "b"))),
    ("no prompt", messages_row(("system", "s"), ("user", ""), ("assistant", "b"), ("user", "late"))),
    ("malformed messages", {"messages": "hello"}),
    ("malformed messages", {"messages": None}),
    ("malformed messages", {"messages": [["user", "a"]]}),
    ("malformed messages", messages_row(("user", None), ("assistant", "b"))),
    ("malformed messages", messages_row(("boss", "a"), ("assistant", "b"))),
    ("malformed messages", messages_row((["user"], "a"), ("assistant", "b"))),
    ("missing column", {"text": "a"}),
]
GOOD_ROW = messages_row(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize("reason, row", BAD_ROWS)
def test_bad_row_is_named_by_line_and_skipped_when_asked(reason, row, tmp_path):
    name = write_lines(tmp_path / "a.jsonl", [GOOD_ROW, row])
    with pytest.raises(DataError, match=rf"a\.jsonl.*line 2: {reason} .*data\.skip_bad=true"):
        open_text(name)
    conversations = open_text(name, skip_bad=True)
    assert [turns(c) for c in conversations] == [[("user", "a"), ("assistant", "b")]]
    assert conversations.dropped == {reason: 1}


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD_ROW) + "\n" + json.dumps(messages_row(("user", "\ud800"), ("assistant", "b"))))
    with pytest.raises(DataError, match=r"line 2: malformed messages .*surrogate"):
        open_text(str(path))


def test_only_bad_rows_are_an_error_that_counts_them(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", [row for _, row in BAD_ROWS[:4]])
    with pytest.raises(DataError, match=r"no conversation is left .*'no answer': 3, 'no prompt': 1"):
        open_text(name, skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("line", ['{"messages": [', "[1, 2]", "\x00", '{"a": 1} {"b": 2}'])
def test_broken_json_line_is_always_an_error_with_file_and_line(line, skip_bad, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD_ROW)}\n\n{line}\n{json.dumps(GOOD_ROW)}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .*JSON"):
        open_text(str(path), skip_bad=skip_bad)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "a b", "data/nowhere.parquet"])
def test_missing_file_is_named(name):
    with pytest.raises(DataError, match="no such file or folder"):
        open_text(name)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "no conversation in the columns none"),
        ("a.json", b"[]", "no conversation in the columns none"),
        ("a.json", b"[1]", "row 0"),
        ("a.json", b'[{"prompt": 1},', "cannot be read"),
        ("a.parquet", b"PAR1 or not", "cannot be read"),
        ("a.txt", b"a,b\n1,2\n", "cannot read this kind of file"),
        ("a.jsonl.zst", b"not packed", "not sound zstd"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"prompt": "a"}\n' * 99)[:-5], "cut off"),
    ],
)
def test_damaged_or_foreign_file_is_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_text(str(tmp_path / name))


@pytest.mark.parametrize("text", ["stdlib[test]", "stdlib[config=a]", "stdlib[train][heldout]", "{file}[test]"])
def test_unknown_split_or_config_is_refused(text, tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"expected|neither a split|cannot all be"):
        open_text(text.format(file=name))


def test_pinned_file_is_refused_once_it_has_changed(tmp_path):
    name = write_lines(tmp_path / "a.jsonl", ROWS)
    pinned = pin_sources(parse_sources(name))
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert pinned == (Source(name, split="train", revision=f"sha256:{digest}"),)
    assert pin_sources(parse_sources("+".join(map(str, pinned)))) == pinned
    assert open_conversations(pinned).sources == pinned
    write_lines(Path(name), ROWS[:2])
    with pytest.raises(DataError, match=r"a\.jsonl: pinned as sha256:.*plan anew"):
        open_conversations(pinned)


def test_nothing_to_open_is_refused():
    with pytest.raises(DataError, match=r"data\.source"):
        open_conversations(())


@pytest.mark.parametrize("text, split", [("stdlib", "train"), ("stdlib[heldout]", "heldout")])
def test_stdlib_gives_one_conversation_for_each_pair(text, split):
    conversations = open_text(text)
    assert conversations.sources == (Source("stdlib", split=split, revision=stdlib_version(), licence=STDLIB_LICENCE),)
    assert [turns(c) for c in conversations] == [
        [("user", pair.prompt), ("assistant", pair.response)] for pair in stdlib_pairs(split)
    ]
    assert not conversations.dropped


def test_stdlib_of_another_python_is_refused():
    with pytest.raises(DataError, match=r"pinned as python-3\.0\.0, but it is python-"):
        open_text("stdlib[revision=python-3.0.0]")


# Run in a process of its own: the clients read their settings when they are imported.
PROGRAM = r"""
import json, os, pathlib, sys, tempfile, warnings
work, tools, mixture = sys.argv[1:]
work = pathlib.Path(work)
url = "http://127.0.0.1:9"  # nobody listens there
if tools:
    sys.path.insert(0, tools)
    import mini_hub
    server, url = mini_hub.serve(work / "hub")
os.environ.update(HF_ENDPOINT=url, HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_x", HF_HOME=str(work / "home"),
                  HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
import pyarrow as pa, pyarrow.parquet as pq
from tide.shared.conversations import open_conversations, parse_sources, pin_sources
from tide.shared.errors import TideError
warnings.simplefilter("ignore")

def repo(name, tables):
    # tables: {config: {split: rows}}
    folder = work / "repos" / name
    card = ["---", "license: odc-by", "configs:"]
    for config, splits in tables.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder

def chat(name, num):
    return [{"messages": [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"{i}"}]}
            for i in range(num)]

def code(name, languages, **more):
    return [{"instruction": f"{name} {i}", "output": f"```{language}\n{i}\n```", **more}
            for i, language in enumerate(languages)]

def attempt(text):
    try:
        found = open_conversations(text if isinstance(text, tuple) else parse_sources(text))
    except TideError as error:
        return [type(error).__name__, str(error)]
    return [[str(source) for source in found.sources], [c.messages[0].content for c in found]]

folders = {
    "allenai/tulu-3-sft-mixture": repo("allenai/tulu-3-sft-mixture", {"default": {"train": chat("tulu", 3)}}),
    "HuggingFaceTB/smoltalk": repo("HuggingFaceTB/smoltalk", {
        "everyday": {"train": chat("everyday", 2), "test": chat("everyday test", 1)},
        "all": {"train": chat("smol", 4), "test": chat("smol test", 2)}}),
    "OpenCoder-LLM/opc-sft-stage1": repo("OpenCoder-LLM/opc-sft-stage1", {
        "filter_infinity_instruct": {"train": code("infinity", ["python", "c"])},
        "realuser_instruct": {"train": code("realuser", ["rust", "python"])}}),
    "OpenCoder-LLM/opc-sft-stage2": repo("OpenCoder-LLM/opc-sft-stage2", {
        "educational_instruct": {"train": code("edu", ["python"] * 2, testcase=["assert True"])},
        "evol_instruct": {"train": code("evol", ["java", "python"])}}),
    "acme/tricky": repo("acme/tricky", {"test": {"train": chat("config test", 1)},
                                        "default": {"train": chat("default", 1), "test": chat("split test", 1)}}),
    "acme/eval": repo("acme/eval", {"default": {"validation": chat("validation", 1), "test": chat("test", 1)}}),
}
"""

FOLDERS = r"""
tricky = str(folders["acme/tricky"])
out = {key: attempt(tricky + key) for key in ("", "[test]", "[config=test]", "[x]", "[config=x]", "[test][train]")}
pinned = pin_sources(parse_sources(tricky))
out["repinned"] = pin_sources(pinned) == pinned
pq.write_table(pa.Table.from_pylist(chat("new", 1)), folders["acme/tricky"] / "default" / "train-00000.parquet")
out["changed"] = attempt(pinned)
(work / "hollow").mkdir()
out["hollow"] = attempt(str(work / "hollow"))
out["unreachable"] = attempt("acme/tricky")
print(json.dumps(out))
"""

HUB = r"""
from huggingface_hub import HfApi
api = HfApi()
for name, folder in folders.items():
    api.create_repo(name, repo_type="dataset")
    api.upload_folder(folder_path=str(folder), repo_id=name, repo_type="dataset")
out = {"commits": {name: api.dataset_info(name).sha for name in folders}, "mixture": attempt(mixture)}
pinned = pin_sources(parse_sources(mixture))
repo("allenai/tulu-3-sft-mixture", {"default": {"train": chat("later", 1)}})
api.upload_folder(folder_path=str(folders["allenai/tulu-3-sft-mixture"]), repo_id="allenai/tulu-3-sft-mixture",
                  repo_type="dataset")
bare = work / "repos" / "acme" / "bare"
bare.mkdir(parents=True)
(bare / "train.jsonl").write_text(json.dumps(chat("bare", 1)[0]) + "\n")
api.create_repo("acme/bare", repo_type="dataset")
api.upload_folder(folder_path=str(bare), repo_id="acme/bare", repo_type="dataset")
out["bare licence"] = [source.licence for source in pin_sources(parse_sources("acme/bare"))]
mini_hub.H.log.clear()
out["licences"] = [source.licence for source in pinned]
out["pinned again"] = [str(source) for source in pin_sources(pinned)]
out["requests"] = list(mini_hub.H.log)
out["pinned mixture"] = attempt(pinned)
for text in ("allenai/tulu-3-sft-mixture", "HuggingFaceTB/smoltalk[everyday,test]", "HuggingFaceTB/smoltalk[test]",
             "HuggingFaceTB/smoltalk[nope]", "OpenCoder-LLM/opc-sft-stage2[evol_instruct]", "acme/tricky[test]",
             "OpenCoder-LLM/opc-sft-stage2[tag:x]", "acme/eval", "acme/nowhere", "acme/eval[test,revision=v9]"):
    out[text] = attempt(text)
print(json.dumps(out))
"""


def run_program(program, work, tools=""):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, str(work), str(tools), PAPER_MIXTURE],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return run_program(FOLDERS, tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    if not (SHARED / "tools" / "mini_hub.py").is_file():
        pytest.skip(f"no loopback Hub: {SHARED}/tools/mini_hub.py is absent")
    return run_program(HUB, tmp_path_factory.mktemp("hub"), SHARED / "tools")


def test_folder_takes_its_default_config_and_train(folders):
    (source,), prompts = folders[""]
    assert prompts == ["default 0?"]
    assert "[config=default][split=train][revision=sha256:" in source


def test_name_that_is_split_and_config_is_the_split_unless_said_outright(folders):
    assert folders["[test]"][1] == ["split test 0?"]
    assert folders["[config=test]"][1] == ["config test 0?"]


def test_unknown_name_in_a_folder_lists_splits_and_configs(folders):
    kind, message = folders["[x]"]
    assert kind == "DataError"
    assert "'x' is neither a split (train, test) nor a config (test, default)" in message
    assert folders["[config=x]"] == ["DataError", folders["[config=x]"][1]]
    assert "expected test, default" in folders["[config=x]"][1]
    assert "test, train cannot all be the split" in folders["[test][train]"][1]


def test_changed_or_hollow_folder_is_refused(folders):
    assert folders["repinned"]
    assert folders["changed"][0] == folders["hollow"][0] == "DataError"
    assert "pinned as sha256:" in folders["changed"][1]


def test_hub_that_does_not_answer_is_unavailable(folders):
    kind, message = folders["unreachable"]
    assert kind == "Unavailable"
    assert "acme/tricky: no answer from the Hub" in message


def test_paper_mixture_opens_from_the_hub(hub):
    sources, prompts = hub["mixture"]
    assert prompts == [
        "tulu 0?", "tulu 1?", "tulu 2?", "smol 0?", "smol 1?", "smol 2?", "smol 3?",
        "infinity 0", "realuser 1", "edu 0", "edu 1", "evol 1",
    ]  # fmt: skip
    commit = hub["commits"]
    assert sources[1] == f"HuggingFaceTB/smoltalk[config=all][split=train][revision={commit['HuggingFaceTB/smoltalk']}]"
    assert [source.split("[revision")[0] for source in sources[2:]] == [
        "OpenCoder-LLM/opc-sft-stage1[config=filter_infinity_instruct][split=train]",
        "OpenCoder-LLM/opc-sft-stage1[config=realuser_instruct][split=train]",
        "OpenCoder-LLM/opc-sft-stage2[config=educational_instruct][split=train]",
        "OpenCoder-LLM/opc-sft-stage2[config=evol_instruct][split=train]",
    ]


def test_pinned_mixture_stays_what_it_was_when_the_hub_moves_on(hub):
    assert hub["pinned mixture"] == hub["mixture"]
    assert hub["allenai/tulu-3-sft-mixture"][1] == ["later 0?"]


def test_pinning_pinned_hub_sources_asks_the_hub_nothing(hub):
    assert hub["pinned again"] == hub["mixture"][0]
    assert hub["requests"] == []


def test_licences_of_the_cards_are_pinned_with_the_sources(hub):
    assert hub["licences"] == ["odc-by"] * len(hub["mixture"][0])
    assert hub["bare licence"] == [None]


def test_names_in_brackets_are_looked_up_on_the_hub(hub):
    assert hub["HuggingFaceTB/smoltalk[everyday,test]"][1] == ["everyday test 0?"]
    assert hub["HuggingFaceTB/smoltalk[test]"][1] == ["smol test 0?", "smol test 1?"]
    assert hub["OpenCoder-LLM/opc-sft-stage2[evol_instruct]"][1] == ["evol 0", "evol 1"]
    assert hub["acme/tricky[test]"][1] == ["split test 0?"]


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("HuggingFaceTB/smoltalk[nope]", "DataError", "neither a split (train, test) nor a config"),
        ("OpenCoder-LLM/opc-sft-stage2[tag:x]", "DataError", "[config=educational_instruct][split=train][tag:x]: no"),
        ("acme/eval", "DataError", "name a split in brackets; expected one of validation, test"),
        ("acme/nowhere", "DataError", "acme/nowhere: cannot be opened"),
        ("acme/eval[test,revision=v9]", "DataError", "cannot be opened"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, text, kind, message):
    assert hub[text][0] == kind, hub[text]
    assert message in hub[text][1]
