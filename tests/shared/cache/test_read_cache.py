"""The independent reader of examples/ and the snippet of the documentation read what ours reads."""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tide.shared.cache import open_cache, read_manifest, writer
from tide.shared.sparse_logits import SparseLogits, log_z_from_tail


@pytest.fixture
def script(project_root):
    return project_root / "examples" / "read_cache.py"


@pytest.fixture
def read_views(script):
    spec = importlib.util.spec_from_file_location("read_cache", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.read_views


def test_it_is_short_and_needs_little(script):
    text = script.read_text()
    assert len([line for line in text.splitlines() if line]) <= 60
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert names == {"json", "sys", "collections.abc", "pathlib", "numpy", "pyarrow.parquet"}


@pytest.mark.parametrize("group_bytes", [2000, 4 << 20])
def test_every_view_of_every_kind_is_the_one_that_we_read(make_cache, signal, read_views, monkeypatch, group_bytes):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", group_bytes)
    root = make_cache(signal)
    cache = open_cache(root, verify="full")
    assert (len(cache.row_groups) > 2) == (group_bytes == 2000)
    count = 0
    for ours, theirs in zip(cache, read_views(root), strict=True):
        for name, value in vars(ours).items():
            if name == "log_tail":
                columns = [theirs[column] for column in cache.layout.log_tail_names]
                assert np.array_equal(value, np.stack(columns, axis=1) if columns else value)
            elif name in theirs:
                assert np.array_equal(value, theirs[name]), name
            else:
                assert len(value) == 0, name
        assert list(theirs["distributions"]) == (list(cache.layout.temperatures) if signal == "topk" else [])
        for temperature, targets in theirs["distributions"].items():
            count += len(targets)
            _require_equal(targets, ours, cache.layout.temperatures, temperature)
    assert (count > 100) == (signal == "topk")


def test_a_compact_cache_reads_as_its_plain_twin(tmp_path, synthetic, read_views):
    plain = synthetic.make_layout(logp_step=1 / 16)
    compact = dataclasses.replace(plain, codec="compact", frequent_ids=(5, 290, 0))
    rows = synthetic.make_rows(plain)
    for name, layout in (("plain", plain), ("compact", compact)):
        synthetic.finish(tmp_path / name, layout, [synthetic.write(tmp_path / name, rows, layout)])
    for one, other in zip(read_views(tmp_path / "plain"), read_views(tmp_path / "compact"), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(value, other[name]) for name, value in one.items() if name != "distributions")
        for temperature, targets in one["distributions"].items():
            for ours, theirs in zip(targets, other["distributions"][temperature], strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_tails_that_are_cut_are_read_as_one(synthetic, tmp_path, read_views):
    layout = synthetic.make_layout(tail_buckets=(3, 90))
    rows = synthetic.make_rows(layout, samples=7)
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, rows, layout)])
    count = 0
    for ours, theirs in zip(open_cache(tmp_path, verify="full"), read_views(tmp_path), strict=True):
        for temperature, targets in theirs["distributions"].items():
            count += len(targets)
            _require_equal(targets, ours, layout.temperatures, temperature)
    assert count > 40


def _require_equal(targets, row, temperatures, temperature) -> None:
    """Against SparseLogits, which losses see: float32, so to 1e-4 nats."""
    n, k = len(row.num_top), max([1, *row.num_top])
    ids, logp = torch.full((n, k), -1), torch.full((n, k), -torch.inf)
    inside = torch.arange(k) < torch.from_numpy(row.num_top.copy())[:, None]
    ids[inside], logp[inside] = torch.from_numpy(row.top_ids.astype(np.int64)), torch.from_numpy(row.top_logp.copy())
    gold, log_tail = torch.from_numpy(row.gold_logp.copy()), torch.from_numpy(row.log_tail.copy())
    log_z = log_z_from_tail(logp, log_tail, temperatures)
    sparse = SparseLogits(gold, ids, logp, log_z, log_tail, tuple(temperatures))
    simplex, gold = sparse.simplex_logp(temperature), sparse.gold_logp_at(temperature)
    assert [target[0] for target in targets] == row.target_position.tolist()
    for j, (_, kept, kept_logp, gold_logp, tail) in enumerate(targets):
        num = int(row.num_top[j])
        assert kept.tolist() == ids[j, :num].tolist()
        assert kept_logp == pytest.approx(simplex[j, :num].numpy(), abs=1e-4)
        assert gold_logp == pytest.approx(float(gold[j]), abs=1e-4)
        assert tail == pytest.approx(float(simplex[j, -1]))
        # nothing kept that could take up what float16 buckets of the tail lack
        assert np.exp(kept_logp).sum() + np.exp(tail) == pytest.approx(1, abs=1e-9 if len(kept) else 1e-3)


def test_another_codec_is_refused(make_cache, read_views):
    root = make_cache("none")
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"codec": "plain"', '"codec": "packed"'))
    with pytest.raises(SystemExit, match="codec packed; not known here"):
        next(read_views(root))


def test_it_prints_probabilities(make_cache, script):
    root = make_cache("topk")
    command = [sys.executable, str(script), str(root), "2.0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == read_manifest(root).statistics.targets
    numbers = [float(x) for x in re.findall(r": ([\d.]+)", lines[0])]
    assert sum(numbers) == pytest.approx(1, abs=2e-2)


def test_the_readers_of_the_documentation_work(make_cache, project_root):
    root = make_cache("topk")
    text = (project_root / "docs" / "cache_format.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(snippet.replace("CACHE", str(root)), {})
        assert len(out.getvalue().splitlines()) == read_manifest(root).statistics.targets
