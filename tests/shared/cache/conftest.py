"""What the tests of the cache share."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import synthetic_caches
from tide.cli import main
from tide.shared.cache import ViewRow, read_manifest
from tide.shared.cache.manifest import sealed_json
from tide.shared.cache.trust import keep_note, trust_note
from tide.shared.cache.vocabulary import write_vocabulary


@pytest.fixture
def synthetic() -> ModuleType:
    """tests/synthetic_caches.py."""
    return synthetic_caches


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., Path]:
    """make_cache(signal, num_shards=2, name="cache") -> the folder of a complete cache."""

    def make(signal: str = "topk", num_shards: int = 2, name: str = "cache", **sizes: int) -> Path:
        root, layout = tmp_path / name, synthetic_caches.make_layout(signal)
        shards = [synthetic_caches.make_rows(layout, seed=shard, **sizes) for shard in range(num_shards)]
        synthetic_caches.finish(
            root, layout, [synthetic_caches.write(root, rows, layout, n, num_shards) for n, rows in enumerate(shards)]
        )
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
def write_words(tmp_path):
    """A cache of one view whose words are given: a chunk of two tokens, a lone masked token, two targets."""

    def write(words: list[bytes], ids: list[int] | None = None, sample_id: str = "s-0"):
        layout = synthetic_caches.make_layout(vocab_size=len(words), top_k=3)
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
        receipt = synthetic_caches.write(tmp_path, [row], layout)
        write_vocabulary(tmp_path, words)
        manifest = synthetic_caches.make_manifest(tmp_path, layout, [receipt])
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
