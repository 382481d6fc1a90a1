"""`tide inspect-cache` and `tide verify-cache`: numbers that are true, text that cannot act, clear errors."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tide.shared.cache import Manifest, Receipt, ShardStatistics, open_cache, read_manifest
from tide.shared.cache.card import card_text
from tide.shared.cache.decoded_views import preview_bytes, spread_views
from tide.shared.cache.html_report import report_html, views_html
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.manifest import (
    DataSource,
    FileEntry,
    ShardEntry,
    SignalInfo,
    StudentInfo,
    TeacherInfo,
    Totals,
    sealed_json,
    write_manifest,
)
from tide.shared.cache.report import report
from tide.shared.cache.schema import SCHEMA_VERSION, ViewRow
from tide.shared.cache.trust import keep_note, trust_note
from tide.shared.errors import CacheError

WORDS = [b"<end>", b"def", b" f", b"(", b")", b":", b"\n", b"return", b" 1", b" \xc3\xa9t\xc3\xa9"]
HOSTILE = [
    b"\x1b[2J\x1b]0;owned\x07", b"[red]", b"[/red][link=file:///x]", b"\nTeacher\n  model  trusted\r",
    b"\x9b31m\x08\x7f", "\u202egnp.exe\u2066".encode(), "a\u2028b\u2029c\x85d".encode(), b"\xff\xfe", b"\x1b", b"[31m",
]  # fmt: skip


def test_numbers_agree_with_the_rows(make_cache, signal):
    root = make_cache(signal)
    description, rows = describe_cache(root), list(open_cache(root))
    assert description["manifest_hash"] == read_manifest(root).hash
    masked = sum(int(row.masked.sum()) for row in rows)
    size = description["size"]
    assert (size["rows"], size["samples"], size["masked_positions"]) == (len(rows), 10, masked)
    assert size["bytes_per_masked_position"] == pytest.approx(size["bytes"] / masked)
    assert sum(description["t"]["views"]) == len(rows)
    chunks, targets = description["chunks"], description["targets"]
    assert (chunks is None, targets is None) == (signal == "none", signal != "topk")
    if chunks:
        lengths = np.concatenate([row.chunk_len for row in rows])
        assert chunks["count"] == len(lengths)
        assert chunks["mean_length"] == pytest.approx(lengths.mean())
        assert chunks["mean_logp"] == pytest.approx(np.concatenate([row.chunk_logp for row in rows]).mean(), rel=1e-5)
    if targets:
        num_top = np.concatenate([row.num_top for row in rows])
        assert (targets["count"], sum(targets["k_counts"])) == (len(num_top), len(num_top))
        assert targets["mean_k"] == pytest.approx(num_top.mean())
        assert 0 < targets["mean_head_mass"] <= 1
        assert sum(targets["by_t"]["targets"]) == len(num_top)
    json.dumps(description, allow_nan=False)


def test_the_sample_is_decoded_with_chunks_marked_and_the_teachers_top(write_words):
    sample = describe_cache(write_words(WORDS))["sample"]
    shown = [(segment["kind"], segment["text"], segment.get("logp")) for segment in sample["segments"]]
    assert shown == [
        ("prompt", "def f(", None),
        ("clean", ")", None),
        ("chunk", ":\n", -2.0),
        ("clean", "return", None),
        ("chunk", " 1", pytest.approx(np.log(0.5), rel=1e-3)),
        ("masked", " été", None),
        ("chunk", "<end>", pytest.approx(np.log(0.125), rel=1e-3)),
    ]
    assert sample["padding"] == {"tokens": 6, "masked": 1}
    (first, second) = sample["teacher"]
    assert (first["position"], first["token"], first["probability"]) == (7, " 1", pytest.approx(0.5, rel=1e-3))
    assert [top["token"] for top in first["top"]] == [" 1", " f", "def"]
    assert [top["probability"] for top in first["top"]] == pytest.approx([0.5, 0.25, 0.125], rel=1e-3)
    assert (second["token"], [top["token"] for top in second["top"]]) == ("<end>", ["\n"])


def test_the_report_shows_the_sample_on_lines_of_its_own(write_words):
    lines = report(describe_cache(write_words(WORDS))).plain.split("\n")
    assert "  │ def f()⟦:" in lines
    assert "  │ ⟧return⟦ 1⟧⟨ été⟩⟦<end>⟧" in lines
    assert "  then 6 tokens of end-of-text padding, 1 of them masked" in lines
    assert any("' 1' 0.500" in line and "' f' 0.250" in line for line in lines)
    assert any("'<end>' 0.125" in line and r"'\n' 0.500" in line for line in lines)


def test_every_signal_gives_a_report(make_cache, signal):
    text = report(describe_cache(make_cache(signal))).plain
    assert f"Signal: {signal}" in text
    assert ("Chunk length in tokens" in text) == (signal != "none")
    assert ("Tokens kept per target (k)" in text) == (signal == "topk")
    assert "  │ " in text


def test_a_cache_without_rows_gives_a_report(tmp_path, synthetic):
    layout = synthetic.make_layout()
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, [], layout)])
    description = describe_cache(tmp_path)
    assert description["sample"] is None
    assert description["targets"]["mean_head_mass"] is None
    assert "0 in 0 views" in report(description).plain


def test_a_cache_without_vocabulary_shows_ids(write_words):
    root = write_words(WORDS)
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_bytes(sealed_json(tree | {"vocabulary": None}))
    assert describe_cache(root)["sample"]["segments"][0]["text"] == "<1><2><3>"


def printed(root, **options: object) -> str:
    """The report as the console writes it."""
    console = Console(highlight=False, markup=False, width=100, **options)  # type: ignore[arg-type]
    with console.capture() as capture:
        console.print(report(describe_cache(root)), soft_wrap=True)
    return capture.get()


@pytest.mark.parametrize(
    "ids", [None, [9, 0, 3, 1, 2, 5, 4, 7, 6, 0, 8, 8, 8, 8, 8, 8], [0, 1, 2, 3, 8, 9, 4, 6, 5, 8, 9, 7, 1, 3, 2, 0]]
)
def test_text_of_a_stranger_cannot_act(write_words, ids):
    root = write_words(HOSTILE, ids, sample_id="[blink]id[/blink]")
    tree = json.loads((root / "manifest.json").read_text())
    tree["teacher"]["id"] = "[bold red]org/teacher[/]"
    (root / "manifest.json").write_bytes(sealed_json(tree))
    text = printed(root, force_terminal=False)
    assert "[bold red]org/teacher[/]" in text
    assert "[blink]id[/blink]" in text
    assert "[red]" in text
    unsafe = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert not unsafe
    assert sum(line.startswith("Teacher") for line in text.split("\n")) == 2  # the report's own headings
    coloured = printed(root, force_terminal=True, color_system="standard")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text  # colours are all that a terminal gets in addition
    assert "\x1b[31m" not in coloured  # none of them is the stranger's


def test_the_json_of_a_stranger_cannot_act(write_words, tide):
    code, out, _ = tide("inspect-cache", write_words(HOSTILE), "--json")
    assert code == 0
    assert out.strip().isprintable()
    assert out.isascii()
    texts = [segment["text"] for segment in json.loads(out)["sample"]["segments"]]
    assert not any(unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" for text in texts for c in text)


def test_a_folder_that_is_no_cache_is_refused(tmp_path, tide):
    assert "no such folder" in tide("inspect-cache", tmp_path / "nowhere")[2]
    code, out, err = tide("inspect-cache", tmp_path)
    assert (code, out) == (65, "")
    assert "is not a tide cache" in err


def test_an_incomplete_cache_says_how_far_it_is(tmp_path, synthetic, tide):
    layout = synthetic.make_layout()
    plan = {"samples": list(range(25)), "settings": {"shards": {"samples_per_shard": 5}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for shard in range(2):
        synthetic.write(tmp_path, synthetic.make_rows(layout, seed=shard), layout, shard=shard, num_shards=5)
    for command in ("inspect-cache", "verify-cache"):
        code, _, err = tide(command, tmp_path)
        assert code == 65
        assert "is incomplete: 2 of 5 shards done; run the same dump-teacher command again" in err


def test_a_damaged_cache_is_refused_by_name(make_cache, tide):
    root = make_cache("topk")
    shard = root / "data" / "views-00000-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    code, _, err = tide("inspect-cache", root)
    assert code == 65
    assert "views-00000-of-00002.parquet" in err
    flipped = bytearray(whole)
    flipped[200] ^= 4  # in the first pages: the size is right, a page checksum is not
    shard.write_bytes(flipped)
    with pytest.raises(CacheError, match="views-00000-of-00002"):
        describe_cache(root)
    code, out, err = tide("verify-cache", root)
    assert (code, out) == (65, "")
    assert "SHA-256 differs" in err


def test_verify_cache_says_what_was_checked(make_cache, tide):
    root = make_cache("topk")
    code, out, err = tide("verify-cache", root)
    assert (code, err) == (0, "")
    assert "page checksums" in out
    assert "sound" in out
    code, out, _ = tide("verify-cache", root, "--quick", "--json")
    answer = json.loads(out)
    assert (code, answer["shards"], answer["rows"]) == (0, 2, 30)
    assert answer["manifest_hash"] == read_manifest(root).hash
    assert "SHA-256" not in answer["checked"]


def test_inspecting_loads_no_model_library(make_cache):
    program = (
        "import sys; from tide.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    for command in ("inspect-cache", "verify-cache"):
        done = subprocess.run(
            [sys.executable, "-c", program, command, str(make_cache("topk", name=command))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not {"torch", "transformers", "datasets", "tokenizers"} & set(done.stderr.split())
        assert "\x1b" not in done.stdout  # plain when piped
        assert done.stdout


def test_the_documented_reader_reads(make_cache, project_root, capsys):
    text = (project_root / "docs" / "cache_format.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    root = make_cache("topk")
    path = root.parent / "reader.py"
    path.write_text(program.replace("CACHE", str(root)))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == read_manifest(root).statistics.targets


def test_the_documented_format_names_every_column_and_field(project_root, synthetic):
    text = (project_root / "docs" / "cache_format.md").read_text()
    kinds = (Manifest, SignalInfo, TeacherInfo, StudentInfo, DataSource, FileEntry, ShardEntry, Totals)
    names = {field.name for kind in (*kinds, ShardStatistics, Receipt) for field in dataclasses.fields(kind)}
    names |= {
        "log_tail_<T>" if c.name.startswith("log_tail") else c.name for c in synthetic.make_layout("topk").columns
    }
    assert sorted(name for name in names if f"`{name}`" not in text) == []
    assert f"schema version {SCHEMA_VERSION}" in text


@pytest.mark.parametrize("prompt_tokens", [8, 3000])
def test_what_a_long_view_does_not_show_is_counted_everywhere(tmp_path, synthetic, prompt_tokens):
    """Report, page and preview; a view that is shown whole says nothing of the kind."""
    layout = synthetic.make_layout("none")
    num_response = 5000
    x_0 = np.full(prompt_tokens + num_response, 97, np.int32)
    row = ViewRow("long", 0, 0.5, x_0, prompt_tokens, np.arange(num_response) % 4 == 0)
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, [row], layout)])
    sample = describe_cache(tmp_path)["sample"]
    shown = "".join(s["text"] for s in sample["segments"] if s["kind"] != "prompt")
    assert set(shown) <= {"a", "…"}
    assert shown.count("a") + sample["tokens_not_shown"] == num_response
    assert 900 < shown.count("a") <= 2000
    assert sample["segments"][0]["text"].startswith("…") == (prompt_tokens > 1000)
    count = f"{sample['tokens_not_shown']:,} more tokens"
    assert f"  and {count}, which are not shown" in report(describe_cache(tmp_path)).plain.split("\n")
    (view,) = spread_views(open_cache(tmp_path))
    assert f"<dt>not shown</dt><dd>{count}</dd>" in views_html([view])
    (previewed,) = pq.read_table(io.BytesIO(preview_bytes(open_cache(tmp_path)))).to_pylist()
    assert previewed["response"].endswith(f" … ({count} are not shown)")


def test_a_view_that_is_shown_whole_and_long_words_that_are_not(write_words):
    sample = describe_cache(write_words(WORDS))["sample"]
    assert sample["tokens_not_shown"] == 0
    assert "not shown" not in report(describe_cache(write_words(WORDS))).plain
    long = [WORDS[0], *(bytes([97 + i]) * (39 + i) for i in range(8)), b"z" * 300]
    sample = describe_cache(write_words(long))["sample"]
    tokens = {top["token"] for says in sample["teacher"] for top in [says, *says["top"]]}
    assert {"a" * 39, "b" * 40, "f" * 39 + "…", "h" * 39 + "…"} <= tokens
    assert all(len(token) <= 40 for token in tokens)
    assert "z" * 256 + "…" in "".join(segment["text"] for segment in sample["segments"])


def test_reasons_why_samples_are_left_out_are_never_cut(make_cache):
    """More of them than fit into the values of other names."""
    root = make_cache("topk")
    manifest = read_manifest(root)
    dropped = {f"a reason of some length, number {number}": 100 - number for number in range(40)}
    manifest = dataclasses.replace(manifest, dropped=dropped)
    write_manifest(root, manifest)
    keep_note(trust_note(root, manifest))
    description = describe_cache(root)
    page = report_html(description, [])
    for text in (report(description).plain, page, card_text(manifest)):
        for reason in dropped:
            assert reason in text
