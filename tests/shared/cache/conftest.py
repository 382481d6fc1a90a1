"""A small synthetic cache: rows with every edge the format knows, and the manifest around them."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tide.cli import main
from tide.shared.cache import (
    Layout,
    Manifest,
    Receipt,
    ViewRow,
    read_manifest,
    shard_name,
    write_manifest,
    write_receipt,
    write_shard,
)
from tide.shared.cache.manifest import (
    DataSource,
    SignalInfo,
    StudentInfo,
    TeacherInfo,
    file_entry,
    manifest_parts,
    sealed_json,
)  # fmt: skip
from tide.shared.cache.schema import SCHEMA_VERSION
from tide.shared.cache.trust import keep_note, trust_note
from tide.shared.cache.vocabulary import VOCABULARY_NAME, write_vocabulary

VOCAB = 300
BLOCK = 8
PLAN_HASH = "ab" * 32


def make_layout(signal: str = "topk", **changes: Any) -> Layout:
    values = {"vocab_size": VOCAB, "block_size": BLOCK, "top_k": 6, "temperatures": (1.0, 2.0), "logp_dtype": "float16"}
    return Layout(signal=signal, **{**values, **changes})  # type: ignore[arg-type]


def tail_mass(logp: np.ndarray, order: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
    """[n] log mass outside the kept entries, from the dense distribution."""
    p = np.exp(logp / temperature)
    outside = np.ones(p.shape, bool)
    np.put_along_axis(outside, order, ~kept, axis=1)
    return np.log((p * outside).sum(1) / p.sum(1))


def bucket_masses(
    logp: np.ndarray, order: np.ndarray, kept: np.ndarray, temperature: float, layout: Layout
) -> np.ndarray:
    """[n, buckets] the same by ranges of ids."""
    p = np.exp(logp / temperature)
    outside = np.ones(p.shape, bool)
    np.put_along_axis(outside, order, ~kept, axis=1)
    parts = np.split(p * outside, layout.tail_buckets, axis=1)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([part.sum(1) for part in parts], axis=1) / p.sum(1, keepdims=True))


def random_chunks(rng: np.random.Generator, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of chunks over masked positions: mostly of one token, some longer; some tokens are in none."""
    spans, place = [], 0
    while place < len(positions):
        longest = int(rng.choice([0, 1, 1, 1, 2, 3]))
        run = positions[place : place + max(1, longest)]
        length = int(np.argmin(np.append(run == run[0] + np.arange(len(run)), False)))
        spans += [(int(run[0]), length)] if longest else []
        place += length
    starts, lengths = np.array(spans, np.int32).reshape(-1, 2).T
    return starts, lengths


def make_row(rng: np.random.Generator, sample: str, view: int, x_0: np.ndarray, prompt: int, layout: Layout) -> ViewRow:
    """One view with a dense random teacher, reduced to what the layout keeps; t = 0.001 masks nothing, mostly."""
    t = float(rng.choice([1e-3, rng.uniform(1e-3, 1), 1.0]))
    masked = rng.random(len(x_0) - prompt) < t
    positions = (np.flatnonzero(masked) + prompt).astype(np.int32)
    if layout.signal == "none":
        return ViewRow(sample, view, t, x_0, prompt, masked)
    starts, lengths = random_chunks(rng, positions)
    chunk_logp = -rng.exponential(2.0, len(starts)).astype(np.float32)
    if layout.signal == "chunk":
        return ViewRow(sample, view, t, x_0, prompt, masked, starts, lengths, chunk_logp)
    single = lengths == 1
    positions, k = starts[single], layout.top_k
    n = len(positions)
    logits = rng.normal(0, 3, (n, layout.vocab_size))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logp, axis=1)[:, :k].astype(np.int32)
    num_top = rng.integers(0, k + 1, n).astype(np.int32)
    kept = np.arange(k) < num_top[:, None]
    chunk_logp[single] = logp[np.arange(n), x_0[positions]]
    log_tail = [tail_mass(logp, order, kept, temperature) for temperature in layout.temperatures]
    log_buckets = np.zeros((0, 0, 0), np.float32)
    if layout.tail_buckets:
        masses = [bucket_masses(logp, order, kept, temperature, layout) for temperature in layout.temperatures]
        log_buckets = np.stack(masses, axis=1).astype(np.float32)
    draw_ids = np.zeros((n, layout.tail_draws), np.int32)
    for target in range(n if layout.tail_draws else 0):
        p = np.exp(logp[target] / layout.temperatures[-1])
        p[order[target][kept[target]]] = 0
        draw_ids[target] = rng.choice(len(p), layout.tail_draws, p=p / p.sum())
    return ViewRow(
        sample, view, t, x_0, prompt, masked, starts, lengths, chunk_logp,
        target_position=positions,
        num_top=num_top,
        top_ids=order[kept],
        top_logp=np.take_along_axis(logp, order, axis=1)[kept].astype(np.float32),
        log_tail=np.stack(log_tail, axis=1).astype(np.float32),
        log_buckets=log_buckets,
        draw_ids=draw_ids.ravel(),
        draw_logp=np.take_along_axis(logp, draw_ids, axis=1).ravel().astype(np.float32),
    )  # fmt: skip


def make_rows(layout: Layout, *, samples: int = 5, views: int = 3, seed: int = 0, blocks: int = 5) -> list[ViewRow]:
    """Views of samples in order; sample 0 is all prompt, sample 1 has none."""
    rng = np.random.default_rng(seed)
    rows = []
    for sample in range(samples):
        length = layout.block_size * int(rng.integers(1, blocks))
        x_0 = rng.integers(0, layout.vocab_size, length).astype(np.int32)
        prompt = {0: length, 1: 0}.get(sample, int(rng.integers(0, length)))
        rows += [make_row(rng, f"s{seed}-{sample}", view, x_0, prompt, layout) for view in range(views)]
    return rows


def make_manifest(root: Path, layout: Layout, receipts: list[Receipt]) -> Manifest:
    teacher = TeacherInfo("org/teacher", "c0ffee", "11", "float32", None, "22", "33", "apache-2.0", {"logit_shift": 0})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tide_version="0.1.0",
        plan_hash=PLAN_HASH,
        signal=SignalInfo(
            kind=layout.signal, codec=layout.codec, logp_dtype=layout.logp_dtype, logp_step=layout.logp_step,
            top_k=layout.top_k, min_probability=0.0,
            temperatures=layout.temperatures, support="shared: all", codec_error={}, frequent_ids=layout.frequent_ids,
            tail_draws=layout.tail_draws, tail_buckets=layout.tail_buckets,
        ),
        teacher=None if layout.signal == "none" else teacher,
        student=StudentInfo("1f3a" * 16, "44", layout.vocab_size, 299, 0),
        block_size=layout.block_size,
        noise={"seed": 0, "views": 3},
        sources=(DataSource("stdlib", "1", "unknown"),),
        vocabulary=file_entry(root, VOCABULARY_NAME),
        dropped={"too long": 2},
        **manifest_parts(receipts),
    )  # fmt: skip


def write(
    root: Path,
    rows: list[ViewRow],
    layout: Layout,
    shard: int = 0,
    num_shards: int = 1,
    *,
    plan_hash: str | None = None,
) -> Receipt:
    """Write a shard and its receipt."""
    name, plan_hash = shard_name(shard, num_shards), plan_hash or PLAN_HASH
    statistics = write_shard(root / name, rows, layout, plan_hash=plan_hash, shard=shard)
    return write_receipt(root, name, shard=shard, plan_hash=plan_hash, statistics=statistics)


def finish(root: Path, layout: Layout, receipts: list[Receipt]) -> Manifest:
    """Write vocabulary and manifest."""
    write_vocabulary(root, [bytes([i % 256]) * (1 + i // 256) for i in range(VOCAB)], np.arange(VOCAB) - 1)
    manifest = make_manifest(root, layout, receipts)
    write_manifest(root, manifest)
    return manifest


def finish_manifest(root: Path, *, vocabulary: str | None) -> None:
    """Let the manifest name vocabulary.parquet as it is now, or (None) no vocabulary."""
    manifest = read_manifest(root)
    entry = None if vocabulary is None else file_entry(root, VOCABULARY_NAME)
    write_manifest(root, dataclasses.replace(manifest, vocabulary=entry))


@pytest.fixture
def synthetic() -> SimpleNamespace:
    """The functions above: test modules of this folder cannot import each other."""
    names = (
        "make_layout",
        "make_row",
        "make_rows",
        "make_manifest",
        "write",
        "finish",
        "finish_manifest",
        "write_vocabulary",
        "PLAN_HASH",
        "VOCAB",
        "BLOCK",
    )
    return SimpleNamespace(**{name: globals()[name] for name in names})


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., Path]:
    """make_cache(signal, num_shards=2, name="cache") -> the folder of a complete cache."""

    def make(signal: str = "topk", num_shards: int = 2, name: str = "cache", **sizes: int) -> Path:
        root, layout = tmp_path / name, make_layout(signal)
        shards = [make_rows(layout, seed=shard, **sizes) for shard in range(num_shards)]
        finish(root, layout, [write(root, rows, layout, n, num_shards) for n, rows in enumerate(shards)])
        return root

    return make


@pytest.fixture(params=["none", "chunk", "topk"])
def signal(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tide(monkeypatch, capsys):
    """tide("verify-cache", path) -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1, *capsys.readouterr())

    return run


@pytest.fixture
def write_words(tmp_path, synthetic):
    """A cache of one view whose words are given: a chunk of two tokens, a lone masked token, two targets."""

    def write(words: list[bytes], ids: list[int] | None = None, sample_id: str = "s-0"):
        layout = synthetic.make_layout(vocab_size=len(words), top_k=3)
        x_0 = np.array(ids or [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0], np.int32)
        masked = np.zeros(13, bool)
        masked[[1, 2, 4, 5, 6, 9]] = True
        row = ViewRow(
            sample_id, 0, 0.4, x_0, 3, masked,
            chunk_start=np.array([4, 7, 9], np.int32), chunk_len=np.array([2, 1, 1], np.int32),
            chunk_logp=np.array([-2.0, np.log(0.5), np.log(0.125)], np.float32),
            target_position=np.array([7, 9], np.int32),
            num_top=np.array([3, 1], np.int32), top_ids=np.array([8, 2, 1, 6], np.int32),
            top_logp=np.log([0.5, 0.25, 0.125, 0.5]).astype(np.float32), log_tail=np.log([[0.125, 0.3], [0.5, 0.6]]),
        )  # fmt: skip
        receipt = synthetic.write(tmp_path, [row], layout)
        write_vocabulary(tmp_path, words)
        manifest = synthetic.make_manifest(tmp_path, layout, [receipt])
        tree = manifest.to_json() | {"student": {**manifest.to_json()["student"], "mask_id": 1, "eos_id": 0}}
        (tmp_path / "manifest.json").write_bytes(sealed_json(tree))
        return tmp_path

    return write


HOSTILE_WORDS = [
    "</span></div><script>document.title='owned'</script>", "<img src=x onerror=document.title='owned'>",
    "</svg></title></style><script>document.title='owned'</script>", "\" onmouseover=\"document.title='owned'\" '",
    "<a href=javascript:document.title='owned'>x</a>", "\u202egnp.exe\u2066", "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "[red]bold[/red]", "<style>*{display:none}</style>url(https://evil.example/)", "<!-- &lt; &#60;script&#62;",
]  # fmt: skip


@pytest.fixture
def write_hostile(write_words):
    """write_hostile() -> a cache whose every text attacks, and the texts that a page must show as they are."""

    def write() -> tuple[Path, list[str]]:
        ids = [0, 1, 2, 3, 8, 9, 4, 6, 5, 0, 7, 8, 2, 0, 0, 0]
        root = write_words([word.encode() for word in HOSTILE_WORDS], ids, sample_id="<b onclick=x>id</b>")
        tree = json.loads((root / "manifest.json").read_text())
        script = "</title><script>document.title='{}'</script>"
        tree["teacher"] |= {"id": script.format("teacher"), "licence": "<i>", "spec": {"<u>": "</style>"}}
        tree["signal"]["support"] = script.format("support")
        tree["noise"] = {'"><svg onload=x>': "<svg onload=x>"}
        tree["sources"] = [
            {"source": "https://evil.example/<script>", "revision": "'\"", "licence": "<iframe src=//x>"}
        ]
        tree["dropped"] = {script.format("dropped"): 1}
        tree["statistics"]["column_bytes"] = {"<script>1</script>": 50, '" onload="x': 40}
        (root / "manifest.json").write_bytes(sealed_json(tree))
        keep_note(trust_note(root, read_manifest(root)))  # its statistics lie: pages must be inert all the same
        facts = [script.format("teacher"), script.format("support"), script.format("dropped"), "<svg onload=x>"]
        facts += [
            "https://evil.example/<script>",
            "<iframe src=//x>",
            "<b onclick=x>id</b>",
            "<script>1</script>",
        ]
        words = [HOSTILE_WORDS[i] for i in (0, 1, 2, 3, 4, 7, 8, 9)]
        return root, [*facts, *words, "\ufffdgnp.exe\ufffd"]

    return write
