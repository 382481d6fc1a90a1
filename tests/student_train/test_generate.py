"""`tide generate` and `tide chat` end to end on a tiny random student, and what they show while it writes."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tide import cli
from tide.shared.config import load_config
from tide.shared.errors import ConfigError, DataError
from tide.student_train.answer_screen import MASKED, StepPainter, TextStream, painted
from tide.student_train.answer_text import AnswerReader
from tide.student_train.chat import Chat
from tide.student_train.open_decoder import Writer, open_writer
from tide.student_train.prompts import read_prompts
from tide.student_train.sampling import Generation, Request, Snapshot
from tiny_runs import write_model

QUESTION = "def area(width, height):"


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("writer") / "student", "student", seed=5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_size": 8}))
    return folder


@pytest.fixture
def tide(monkeypatch, capsys, student):
    """tide("generate", ..., stdin="...") with the tiny student -> exit code, stdout, stderr."""

    def run(command: str, *arguments: object, stdin: str = "", path: object = student) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", command, "--student", str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def writer(student: Path, *settings: str) -> Writer:
    return open_writer(load_config(None, None, [f"student.path={student}", *settings]))


def test_one_answer_is_the_same_streamed_in_blocks_steps_or_not_and_in_json(tide, student):
    arguments = (QUESTION, "--max-new-tokens", 21, "--temperature", 0.8, "--seed", 4)
    shown = {stream: tide("generate", *arguments, "--stream", stream) for stream in ("block", "step", "none")}
    code, out, _ = tide("generate", *arguments, "--json")
    row = json.loads(out)
    assert code == 0
    assert len(row["text"]) > 10
    assert {stream: answer[:2] for stream, answer in shown.items()} == dict.fromkeys(shown, (0, row["text"] + "\n"))
    own = writer(student, "decoding.max_new_tokens=21", "decoding.temperature=0.8")
    ids = own.encoder.encode_prompt([{"role": "user", "content": QUESTION}])
    (generation,) = own.decoder.generate([Request(ids, 4)], own.settings)
    assert (row["text"], row["tokens"], row["finish"]) == (generation.text, len(generation.ids), generation.finish)
    assert own.settings.block_size == 8, "what config.json says"


def test_prompts_come_from_arguments_files_or_standard_input_in_order(tide, tmp_path):
    lines = [{"prompt": QUESTION}, {"messages": [{"role": "user", "content": "a\nb"}], "seed": 7}, {"prompt": "x"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    short = ("--max-new-tokens", 9, "--set", "decoding.temperature=1.0", "--json")
    rows = [json.loads(line) for line in tide("generate", "--file", file, *short)[1].splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(QUESTION, 0), ("a\nb", 7), ("x", 0)]
    arguments = [json.loads(line) for line in tide("generate", QUESTION, "x", *short)[1].splitlines()]
    assert [row["text"] for row in arguments] == [rows[0]["text"], rows[2]["text"]]
    for name in ("-", None):
        (line,) = tide("generate", *(["--file", name] if name else []), *short, stdin=QUESTION + "\n")[1].splitlines()
        assert json.loads(line)["text"] == rows[0]["text"]
    plain = tmp_path / "one.txt"
    plain.write_text("a\nb\n")
    (line,) = tide("generate", "--file", plain, "--seed", 7, *short)[1].splitlines()
    assert json.loads(line) == rows[1]
    code, out, _ = tide("generate", QUESTION, "x", "--max-new-tokens", 9, "--temperature", 1.0)
    assert (code, out) == (0, f"{rows[0]['text']}\n{rows[2]['text']}\n")


def test_stop_texts_end_an_answer_and_are_no_part_of_it(tide):
    arguments = (QUESTION, "--max-new-tokens", 30, "--temperature", 1.0, "--json")
    free = json.loads(tide("generate", *arguments)[1])["text"]
    stop = next(free[n : n + 2] for n in range(4, len(free)) if "�" not in free[n : n + 2])
    row = json.loads(tide("generate", *arguments, "--stop", "🌊", "--stop", stop)[1])
    assert row["finish"] == "stop"
    assert row["text"] == free[: free.index(stop)]


def test_raw_text_is_continued_without_a_template(tide, student):
    arguments = (QUESTION, "--max-new-tokens", 12, "--temperature", 0.9)
    answers = [tide("generate", *arguments, *more)[1] for more in ([], ["--raw"])]
    own = writer(student, "decoding.max_new_tokens=12", "decoding.temperature=0.9")
    (generation,) = own.decoder.generate([Request(own.encoder.encode_text(QUESTION))], own.settings)
    assert answers[1] == generation.text + "\n"
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        ([""], "", 2, "prompt 1 is empty"),
        (["a", " "], "", 2, "prompt 2 is empty"),
        ([], " \n", 2, "standard input is empty"),
        (["a", "--file", "b"], "", 2, "exclude each other"),
        (["--file", "no.txt"], "", 65, "--file no.txt: cannot be read"),
        (["word " * 600], "", 65, "more than the 1024 positions of this student"),
        (["a", "--max-new-tokens", "1024"], "", 65, "more than the 1024 positions"),
        (["a<|mask|>"], "", 2, "holds the student's mask token"),
        (["a", "--temperature", "-1"], "", 2, "decoding.temperature = -1"),
        (["a", "--set", "decoding.top_p=0"], "", 2, "decoding.top_p"),
        (["a", "--set", "decoding.step=3"], "", 2, "did you mean 'steps'"),
        (["a", "--stop", ""], "", 2, "decoding.stop"),
    ],
)
def test_bad_input_is_one_message_and_its_exit_code(tide, arguments, stdin, code, message):
    ended, out, err = tide("generate", *arguments, stdin=stdin)
    assert (ended, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_checkpoint_without_a_mask_token_or_of_another_kind_is_refused(tide, student, tmp_path):
    for file in student.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del tokenizer["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    code, _, err = tide("generate", "a", path=tmp_path)
    assert code == 2
    assert "has no mask token" in err
    for field, value, message in (("mask_token_id", 511, ""), ("block_size", "x", "expected a positive number")):
        config = json.loads((student / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        code, _, err = tide("generate", "a", "--max-new-tokens", 3, path=tmp_path)
        assert code == (65 if message else 0)
        assert message in err
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "Dream"}))
    code, _, err = tide("generate", "a", path=tmp_path)
    assert code == 65
    assert "a Dream does not write block by block" in err
    code, _, err = tide("generate", "a", path="")
    assert code == 2
    assert "give --student" in err


def lines_of(rows: str, tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    return file


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "line 1: not JSON"), ("[1]", "line 1: expected"), ('{"prompt": "a"}\n{"prompt": ""}', "line 2: expected"),
        ('{"prompt": "a", "seed": 1.5}', "seed a whole number"), ('{"messages": []}', "line 1: expected"),
        ('{"messages": [{"role": "user"}]}', "line 1: expected"), ("\n\n", "no prompt in it"),
        ("[" * 99999, "not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_prompts([], str(lines_of(rows, tmp_path)), io.StringIO(), seed=0)


def test_without_any_prompt_a_terminal_is_not_waited_for(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with pytest.raises(ConfigError, match="nothing is asked"):
        read_prompts([], None, terminal, seed=0)


WORDS = [b"a", b"\xc3", b"\xa9", b"\x1b[2J", b"<eos>", b"<mask>"]
READER = AnswerReader(WORDS, frozenset({4, 5}), eos_id=4, mask_id=5)


def snapshots(*steps: tuple[int | None, ...], text: str) -> list[Snapshot]:
    last = Generation((), text, "length", 1, 1)
    return [Snapshot(0, ids, (), None not in ids, last if n == len(steps) - 1 else None) for n, ids in enumerate(steps)]


@pytest.mark.parametrize(("by_block", "pieces"), [(False, ["a", "éa", "é"]), (True, ["aéa", "é"])])
def test_a_stream_shows_only_what_is_final(by_block, pieces):
    shown: list[str] = []
    stream = TextStream(READER, ("xx",), shown.append, by_block)
    steps = [(0, None, 2, None), (0, 1, None, None), (0, 1, 2, 0), (0, 1, 2, 0, 1, 2)]
    for snapshot in snapshots(*steps, text="aéaé"):
        stream(snapshot)
    assert "".join(shown) == "aéaé"
    assert shown == pieces
    assert not any("�" in piece for piece in shown)


def test_the_beginning_of_a_stop_text_is_held_back():
    shown: list[str] = []
    stream = TextStream(READER, ("aaé",), shown.append, False)
    for snapshot in snapshots((0,), (0, 0), (0, 0, 0), (0, 0, 0, 1, 2), text="a"):
        stream(snapshot)
    assert shown == ["a"]


def test_a_painted_step_shows_masks_new_tokens_and_nothing_that_acts():
    picture = painted(READER, Snapshot(0, (0, 1, 2, None, 3, None, 1), (2, 4), False, None), 16)
    assert picture.plain == f"aé{MASKED}{MASKED}�\n[5 of up to 16 tokens]"
    assert [picture.plain[s.start : s.end] for s in picture.spans if s.style == "bold green"] == ["é"]
    ended = painted(READER, Snapshot(0, (0, 4, None), (1,), True, Generation((0,), "a", "eos", 1, 1)), 16)
    assert ended.plain == "a\n[2 of up to 16 tokens, ended by eos]"


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_painted_in_place_on_a_terminal_and_one_after_the_other_elsewhere(terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=40, color_system=None)
    with StepPainter(READER, 4, console) as painter:
        for snapshot in snapshots((0, None), (0, 0), text="aa"):
            painter(snapshot)
    shown = file.getvalue()
    assert f"a{MASKED}" in shown
    assert "[2 of up to 4 tokens" in shown
    assert ("\x1b[" in shown) == terminal


def test_show_steps_ends_with_the_answer(tide):
    arguments = (QUESTION, "--max-new-tokens", 6)
    text = tide("generate", *arguments, "--json")[1]
    code, out, _ = tide("generate", *arguments, "--show-steps")
    assert code == 0
    assert out.count("tokens") == 6
    assert "".join(json.loads(text)["text"].split()) in "".join(out.split())


@pytest.mark.parametrize("how", [(), ("--json",), ("--stream", "none"), ("--show-steps",)])
def test_answers_that_are_cut_off_are_counted(tide, how):
    code, _, err = tide("generate", QUESTION, "--max-new-tokens", 4, *how)
    assert code == 0
    assert err == "1 of 1 answers are cut off at decoding.max_new_tokens = 4 (--max-new-tokens)\n"
    drawn = (QUESTION, "--max-new-tokens", 21, "--temperature", 0.8, "--seed", 4)
    text = json.loads(tide("generate", *drawn, "--json")[1])["text"]
    stop = next(letter for letter in text[2:] if letter.isascii() and letter.isalnum())
    assert tide("generate", *drawn, "--stop", stop, *how)[2] == ""


class Script:
    """Lines of a user; an exception class among them is raised instead."""

    def __init__(self, *lines: Any) -> None:
        self.lines, self.written, self.notes = list(lines), [], []

    def ask(self) -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def chat(self, own: Writer, **more: Any) -> Chat:
        return Chat(own, ask=self.ask, write=self.written.append, note=self.notes.append, **more)


def test_a_chat_answers_with_everything_before_and_forgets_on_reset(student):
    own = writer(student, "decoding.max_new_tokens=10", "decoding.temperature=0.5")
    script = Script("first", "second", "/reset", "second", "/help", "", "/quit", "never asked")
    chat = script.chat(own)
    chat.run()
    assert script.lines == ["never asked"]

    def expected(seed: int, *messages: tuple[str, str]) -> str:
        ids = own.encoder.encode_prompt([{"role": role, "content": content} for role, content in messages])
        return own.decoder.generate([Request(ids, seed)], own.settings)[0].text

    first = expected(0, ("user", "first"))
    second = expected(1, ("user", "first"), ("assistant", first), ("user", "second"))
    third = expected(2, ("user", "second"))
    assert "".join(script.written) == f"{first}\n{second}\n{third}\n"
    assert [message["content"] for message in chat.messages] == ["second", third]
    cut = "(cut off at decoding.max_new_tokens = 10)"
    assert len([note for note in script.notes if note != cut]) == 3
    assert script.notes.count(cut) == 3  # the tiny student never ends an answer by itself


@pytest.mark.parametrize("stream", ["step", "none"])
def test_control_c_stops_an_answer_or_a_line_and_keeps_the_session(student, monkeypatch, stream):
    own = writer(student, "decoding.max_new_tokens=10")
    script = Script("one", KeyboardInterrupt, "two", "word " * 700, "three")
    chat, generate, calls = script.chat(own, stream=stream), own.decoder.generate, []

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **more)

    monkeypatch.setattr(own.decoder, "generate", interrupted)
    chat.run()
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["one", "three"]
    assert len(calls) == 4
    assert any("Ctrl-C" in note for note in script.notes[1:])
    assert any("forgotten" in note for note in script.notes)
    assert any("more than the 1024 positions" in note and "/reset" in note for note in script.notes)


def test_chat_reads_lines_and_ends_with_its_input(tide):
    code, out, err = tide("chat", "--max-new-tokens", 5, stdin=f"{QUESTION}\n/reset\n{QUESTION}\n")
    assert code == 0
    first, second, *rest = out.split("\n")
    assert first == second
    assert rest == [""]
    assert "/quit" in err


def test_a_trained_student_says_its_block_size_and_mask(tiny):
    folder = tiny.train(tiny.config(train__steps=1))
    config = json.loads((folder / "config.json").read_text())
    own = open_writer(load_config(None, None, [f"student.path={folder}"]))
    assert config["block_size"] == own.settings.block_size == 8
    assert config["mask_token_id"] == own.encoder.mask_id
