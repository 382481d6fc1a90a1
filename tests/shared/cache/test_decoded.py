"""Decoded rows: the distributions of the cache as plain numbers, for `datasets` and for a stranger's training loop."""

import ast
import json
import re
import subprocess
import sys
from itertools import pairwise

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from tide import cli
from tide.shared.cache import open_cache
from tide.shared.cache.decoded import write_decoded
from tide.shared.errors import ConfigError


def plain(files) -> list[dict]:
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
def test_probabilities_are_those_of_the_format(make_cache, tmp_path, temperature):
    cache = open_cache(make_cache("topk"))
    files = write_decoded(cache, tmp_path / "out", temperature=temperature)
    assert len(files) == 2
    column, at = (1, 2.0) if temperature == 2.0 else (0, 1.0)
    count = 0
    for row, decoded in zip(cache, plain(files), strict=True):
        assert decoded["temperature"] == at
        assert (decoded["sample_id"], decoded["view"], decoded["x_0"]) == (row.sample_id, row.view, row.x_0.tolist())
        hidden = np.flatnonzero(row.masked) + row.prompt_tokens
        assert [i for i, m in enumerate(decoded["masked"]) if m] == hidden.tolist()
        assert [i for i, (a, b) in enumerate(zip(decoded["x_0"], decoded["x_t"], strict=True)) if a != b] == [
            i for i in hidden if row.x_0[i] != 299
        ]
        assert {decoded["x_t"][i] for i in hidden} <= {299}
        assert decoded["chunk_logp"] == row.chunk_logp.tolist()
        assert decoded["target_position"] == row.target_position.tolist()
        start = 0
        for j, k in enumerate(row.num_top):  # in float64, entry by entry
            tail = float(np.exp(float(row.log_tail[j, column])))
            scaled = [float(x) / at for x in row.top_logp[start : start + k]]
            log_z = np.log(sum(np.exp(scaled))) - np.log(1 - tail) if k else 0.0
            kept = [np.exp(x - log_z) for x in scaled]
            assert decoded["top_ids"][j] == row.top_ids[start : start + k].tolist()
            assert decoded["top_probabilities"][j] == pytest.approx(kept, rel=1e-6)
            assert decoded["tail_mass"][j] == pytest.approx(tail, rel=1e-6)
            assert sum(kept) + tail == pytest.approx(1.0)
            gold = np.exp(float(row.gold_logp[j]) / at - log_z)
            assert decoded["gold_probability"][j] == pytest.approx(gold, rel=1e-6)
            start, count = start + k, count + 1
    assert count > 50


def test_text_is_decoded_where_the_vocabulary_allows(make_cache, tmp_path, synthetic):
    root = make_cache("topk")
    cache, vocabulary = open_cache(root), open_cache(root).vocabulary()
    rows = plain(write_decoded(cache, tmp_path / "with"))
    for row, decoded in zip(cache, rows, strict=True):
        assert decoded["text"] == vocabulary.decode(row.x_0)
        flat = [text for texts in decoded["top_text"] for text in texts]
        assert flat == [vocabulary.token_bytes[i].decode("utf-8", "replace") for i in row.top_ids]
    synthetic.write_vocabulary(root, [b"a"] * 100, np.arange(100))
    synthetic.finish_manifest(root, vocabulary="short")
    short = plain(write_decoded(open_cache(root), tmp_path / "short"))
    assert any("<299>" in row["text"] or re.search(r"<\d+>", row["text"]) for row in short)
    synthetic.finish_manifest(root, vocabulary=None)
    assert "text" not in plain(write_decoded(open_cache(root), tmp_path / "without"))[0]


@pytest.mark.parametrize("kind", ["none", "chunk"])
def test_a_cache_without_distributions_gives_what_it_has(make_cache, tmp_path, kind):
    cache = open_cache(make_cache(kind))
    rows = plain(write_decoded(cache, tmp_path / "out"))
    assert len(rows) == 30
    assert ("chunk_logp" in rows[0]) == (kind == "chunk")
    assert "top_ids" not in rows[0]
    with pytest.raises(ConfigError, match="holds no distributions"):
        write_decoded(cache, tmp_path / "no", temperature=1.0)


def test_other_temperatures_and_existing_folders_are_refused(make_cache, tmp_path):
    cache = open_cache(make_cache("topk"))
    with pytest.raises(ConfigError, match=r"temperature 1\.5: .* holds normalisers for 1, 2 alone"):
        write_decoded(cache, tmp_path / "out", temperature=1.5)
    with pytest.raises(ConfigError, match="expected decoded=True"):
        cache.to_datasets(temperature=1.0)
    with pytest.raises(ConfigError, match="exists already"):
        write_decoded(cache, tmp_path)
    assert not (tmp_path / "out").exists()


def test_datasets_reads_what_the_command_writes(make_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    root = make_cache("topk")
    for form in ("parquet", "disk"):
        arguments = [
            "cache-to-datasets",
            str(root),
            str(tmp_path / form),
            "--temperature",
            "2",
            "--format",
            form,
            "--json",
        ]
        monkeypatch.setattr(sys, "argv", ["tide", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert json.loads(capsys.readouterr().out)["rows"] == 30
    loaded = datasets.load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "hf"))
    saved = datasets.load_from_disk(str(tmp_path / "disk"))
    direct = open_cache(root).to_datasets(decoded=True, temperature=2.0)
    assert loaded.column_names == saved.column_names == direct.column_names
    for a, b, c in zip(loaded, saved, direct, strict=True):
        assert a == b == c


def test_the_training_loop_of_a_stranger_learns_from_the_rows_without_tide(make_cache, tmp_path, project_root):
    write_decoded(open_cache(make_cache("topk", samples=4)), tmp_path / "rows", temperature=1.0)
    script = project_root / "examples" / "train_elsewhere.py"
    imported = {node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names}  # fmt: skip
    assert not {name for name in imported if name.split(".")[0] == "tide"}
    block = "import sys; sys.modules['tide'] = None; sys.argv = sys.argv[1:]; import runpy; " \
            "runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", block, str(script), str(tmp_path / "rows" / "data"), "--epochs", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    losses = [float(x) for x in re.findall(r"epoch \d+: ([\d.]+) nats", done.stdout)]
    floors = [float(x) for x in re.findall(r"entropy is ([\d.]+)", done.stdout)]
    assert len(losses) == 6
    assert all(a > b for a, b in pairwise(losses))
    assert losses[-1] - floors[-1] < 0.6 * (losses[0] - floors[0])  # what is left above the teacher's own entropy
    assert losses[-1] > floors[-1] > 0
