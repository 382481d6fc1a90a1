"""Programs that push, pull and read caches against the loopback Hub; each prints one JSON object.

    python tests/hub_programs.py NAME FOLDER

A process of their own, because the Hub's client reads its settings when it is imported.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopback_hub import Fault, File, LoopbackHub, Repository

TOKEN = "hf_secretSECRETsecretSECRETsecretSECRET"
NUM_SHARDS, SAMPLES, VIEWS = 6, 2, 3


def synthetic_cache(root: Path, num_shards: int = NUM_SHARDS) -> Path:
    """A complete cache, without torch: its import would take longer than most programs here."""
    import synthetic_caches

    layout = synthetic_caches.make_layout()
    shards = [
        synthetic_caches.make_rows(layout, samples=SAMPLES, views=VIEWS, seed=shard) for shard in range(num_shards)
    ]
    synthetic_caches.finish(
        root, layout, [synthetic_caches.write(root, s, layout, n, num_shards) for n, s in enumerate(shards)]
    )
    return root


@dataclass(frozen=True)
class Longer(File):
    """A file of which the Hub says that it has `told` bytes, and sends more."""

    told: int = 0

    def entry(self, path: str) -> dict[str, Any]:
        """As `File.entry`."""
        entry = super().entry(path) | {"size": self.told}
        return entry | ({"lfs": {**entry["lfs"], "size": self.told}} if self.sha256 else {})


def attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """{"done": the result} or {"error": class of tide, "message": text}."""
    from tide.shared.errors import TideError

    try:
        done = action()
    except TideError as error:
        return {"error": type(error).__name__, "code": error.exit_code, "message": str(error)}
    return {"done": vars(done) if hasattr(done, "__dict__") else done}


class Pushes:
    """Pushes of one cache, two shards to a commit; each records what was said, how long it waited, what it asked."""

    def __init__(self, hub: LoopbackHub, root: Path) -> None:
        from tide.shared.cache import hub_push, push

        hub_push.FILES_PER_COMMIT = 2
        self.hub, self.root, self.push = hub, root, push

    def __call__(self, name: str, *faults: Fault, **options: Any) -> dict[str, Any]:
        self.hub.faults[:] = list(faults)
        self.hub.requests.clear()
        said, waited = [], []
        options = {"data_licence": "mit", "root": self.root, **options}
        result = attempt(lambda: self.push.push_cache(
            repository=name, say=said.append, sleep=waited.append, **options))  # fmt: skip
        self.hub.faults.clear()
        return {**result, "said": said, "waited": waited, "requests": list(self.hub.requests)}


def push(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """Everything that may happen to a push."""
    root, other = synthetic_cache(work / "cache"), synthetic_cache(work / "other", 2)
    pushes = Pushes(hub, root)
    out: dict[str, Any] = {"unknown licence": pushes("me/cache", data_licence=None)}
    out["whole"] = pushes("me/whole", private=True)
    repository = hub.repositories["me/whole"]
    out["commits"] = [commit.paths for commit in repository.commits]
    out["tags"], out["private"] = repository.tags, repository.private
    out["card"] = repository.head.tree["README.md"].data.decode()
    shard = next(root.glob("data/*00003*"))
    sound = shard.read_bytes()
    shard.write_bytes(sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    out["damaged"] = pushes("me/damaged")
    shard.write_bytes(sound)
    pushes.push.verify_cache = lambda *_, **__: None  # from here on the Hub is what is tried, not the cache

    out["again"] = pushes("me/whole")
    out["other cache"] = pushes("me/whole", root=other, data_licence="mit")
    out["other tag"] = pushes("me/whole", tag="nightly")
    hub.repositories["me/whole"].tags["taken"] = hub.repositories["me/whole"].commits[0].oid
    out["taken tag"] = pushes("me/whole", tag="taken")
    hub.large.clear()  # what the pushes above sent must be sent anew
    out["interrupted"] = pushes("me/again", Fault("POST", "/commit/", skip=2, status=403, message="no write access"))
    out["continued"] = pushes("me/again")
    out["its commits"] = [commit.paths for commit in hub.repositories["me/again"].commits]
    out["public"] = pushes("me/again", private=True)
    echo = f"Bearer {TOKEN} has been rejected"
    out["401"] = pushes("me/401", Fault("POST", "/create", status=401, message=echo))
    out["403"] = pushes("me/403", Fault("POST", "/create", status=403, message=echo))
    full = "Private repository storage limit reached, please upgrade your plan"
    out["quota"] = pushes("me/quota", Fault("POST", "/commit/", status=403, message=full))
    out["402"] = pushes("me/402", Fault("POST", "/commit/", status=402, message="payment required"))
    out["429"] = pushes("me/429", Fault("POST", "/commit/", times=2, status=429, headers={"Retry-After": "7"}))
    out["500"] = pushes("me/500", Fault("GET", "me/500$", times=3, status=503))
    out["dead"] = pushes("me/dead", Fault("GET", "me/dead$", status=500, message=echo))
    out["long"] = pushes("me/long", Fault("POST", "/commit/", status=429, headers={"Retry-After": "3600"}))
    # The commit is made and its answer lost: the second try must find that nothing is left to do.
    out["lost answer"] = pushes("me/lost", Fault("POST", "/commit/", times=1, cut_after=0))
    out["commits after a lost answer"] = [commit.paths for commit in hub.repositories["me/lost"].commits]
    hub.repositories["me/stray"] = stray = Repository(private=False)
    stray.commit("theirs", {"data/views-00000-of-00001.parquet": File(b"x", "0" * 64)}, [])
    out["stray"] = pushes("me/stray")
    stray.commit("a data set", {".gitattributes": File(b""), "README.md": File(b"# Mine"), "a.csv": File(b"1")}, [])
    out["data set"] = pushes("me/stray")
    del os.environ["HF_TOKEN"]
    out["no login"] = pushes("me/anonymous")
    return out


def publish(hub: LoopbackHub, name: str, root: Path, names: list[str] | None = None) -> str:
    """Put a folder's files into a repository as they are; the new commit."""
    from tide.shared.cache.files import sha256_bytes

    tree = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        key, data = path.relative_to(root).as_posix(), path.read_bytes()
        if names is None or key in names:
            tree[key] = File(data, sha256_bytes(data) if key.endswith(".parquet") else None)
    repository = hub.repositories.setdefault(name, Repository(private=False))
    return repository.commit("published", tree, sorted(tree)).oid


def check_here(root: Path, manifest: Any, shard: int | None = None, *, audit: bool = False) -> None:
    """The checks of shards without starting a process for them."""
    from tide.shared.cache.checks import SampleOrder
    from tide.shared.cache.verify_shards import check_pages, check_shards

    if shard is None:
        check_shards(root, manifest, full=True, audit=audit)
    else:
        check_pages(root, manifest, shard, SampleOrder())


def edited(hub: LoopbackHub, name: str, source: str, **changes: File | None) -> None:
    """A repository like `source` with other files; None removes one. Keys: parts of one path each."""
    tree = dict(hub.repositories[source].head.tree)
    for key, file in changes.items():
        (path,) = [path for path in tree if key in path]
        if file is None:
            del tree[path]
        else:
            tree[path] = file
    hub.repositories[name] = Repository(private=False)
    hub.repositories[name].commit("edited", tree, [])


def pull(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """Everything that may happen to a pull."""
    from tide.shared.cache import open_cache, verify
    from tide.shared.cache.pull import pull_cache

    root, other = synthetic_cache(work / "cache"), synthetic_cache(work / "other", 2)
    first = publish(hub, "me/cache", root)
    hub.repositories["me/cache"].tags["v1"] = first

    def pulled(name: str, out: str, *faults: Fault, **options: Any) -> dict[str, Any]:
        hub.faults[:] = list(faults)
        hub.requests.clear()
        result = attempt(lambda: pull_cache(name, work / out, sleep=lambda s: None, **options))
        hub.faults.clear()
        held = sorted(p.relative_to(work / out).as_posix() for p in (work / out).rglob("*") if p.is_file())
        visible = [path for path in held if not path.startswith(".pull/")]
        return {**result, "held": visible, "fetched": [r.split("/")[-1] for r in hub.asked("^GET .*/resolve/")]}

    out: dict[str, Any] = {"first": first, "whole": pulled("me/cache", "a")}
    out["asked for"] = hub.asked("resolve")
    verify._check_in_child = check_here
    out["same bytes"] = all((work / "a" / p).read_bytes() == (root / p).read_bytes()
                            for p in out["whole"]["held"] if p.endswith(".parquet"))  # fmt: skip
    out["record"] = json.loads((work / "a" / "hub.json").read_text())
    out["again"] = pulled("me/cache", "a")
    publish(hub, "me/cache", other)
    out["moved on"] = pulled("me/cache", "a")
    out["tag"] = pulled("hf://datasets/me/cache@v1", "b")
    out["revision"] = pulled("me/cache", "c", Fault("GET", "00004-of", status=403), revision=first)
    out["opened half"] = attempt(lambda: open_cache(work / "c"))
    out["continued"] = pulled("me/cache", "c", revision=first)
    for name in ("manifest.json", "vocabulary.parquet"):
        (work / "c" / name).unlink()  # as if killed while files were moved
    out["half moved"] = pulled("me/cache", "c", revision="v1")
    bent = work / "c" / "data" / "views-00003-of-00006.parquet"
    bent.write_bytes(bent.read_bytes()[:-9] + b"damaged!!")
    out["damaged"] = pulled("me/cache", "c", revision="v1")
    (work / "mine" / "data").mkdir(parents=True)
    (work / "mine" / "data" / "mine.parquet").write_bytes(b"mine")
    out["my data"] = pulled("me/cache", "mine")
    out["cut"] = pulled("me/cache", "d", Fault("GET", "00002-of", times=1, cut_after=1000), revision="v1")
    publish(hub, "me/base", root)
    edited(hub, "me/incomplete", "me/base", **{"manifest.json": None})
    out["incomplete"] = pulled("me/incomplete", "e")
    edited(hub, "me/hole", "me/base", **{"00001-of": None})
    out["hole"] = pulled("me/hole", "f")
    sound = (root / "data" / "views-00001-of-00006.parquet").read_bytes()
    bent = sound[:200] + bytes([sound[200] ^ 1]) + sound[201:]
    edited(hub, "me/bent", "me/base", **{"00001-of": File(bent, "1" * 64)})
    out["bent"] = pulled("me/bent", "g")
    true_hash = hub.repositories["me/base"].head.tree["data/views-00001-of-00006.parquet"].sha256
    edited(hub, "me/liar", "me/base", **{"00001-of": File(bent, true_hash)})
    out["liar"] = pulled("me/liar", "h")
    edited(hub, "me/flood", "me/base", **{"00001-of": Longer(sound + bytes(30 << 20), true_hash, len(sound))})
    out["flood"] = pulled("me/flood", "n")
    sizes = [path.stat().st_size for path in (work / "n").rglob("*") if path.is_file()]
    out["most of a flood"] = max(sizes) <= max(path.stat().st_size for path in root.rglob("*") if path.is_file())
    words = (root / "vocabulary.parquet").read_bytes()
    edited(hub, "me/long", "me/base", vocabulary=Longer(words * 2, None, len(words)))
    out["long"] = pulled("me/long", "o")
    from tide.shared.cache.manifest import sealed_json

    out["read from afar"] = attempt(lambda: len(list(open_cache("me/flood"))))
    tree = json.loads((root / "manifest.json").read_text())
    tree["statistics"]["t_histogram"][3] += 1
    edited(hub, "me/wrong", "me/base", **{"manifest.json": File(sealed_json(tree))})
    out["wrong"] = pulled("me/wrong", "i")
    tree["vocabulary"]["name"] = "../../escaped.parquet"
    edited(hub, "me/escape", "me/base", **{"manifest.json": File(sealed_json(tree))})
    out["escape"] = pulled("me/escape", "j/k")
    (work / "full").mkdir()
    (work / "full" / "notes.txt").write_text("mine")
    out["not empty"] = pulled("me/base", "full")
    out["nowhere"] = pulled("me/nowhere", "l")
    out["no revision"] = pulled("me/base", "m", revision="v9")
    return out


def remote(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """Reading a cache where it lies."""
    import numpy as np
    from tide.shared.cache import open_cache, read_manifest, remote, verify_shards
    from tide.shared.cache.checks import SampleOrder
    from tide.shared.cache.remote import RemoteCache
    from tide.shared.errors import CacheError

    local = open_cache(synthetic_cache(work / "cache"))
    commit = publish(hub, "me/cache", local.root)
    address = f"hf://datasets/me/cache@{commit}"

    def fetched() -> list[int]:
        return sorted({int(r.split("views-")[1][:5]) for r in hub.asked("^GET .*/resolve/.*views-")})

    def same(ours: list[Any], theirs: list[Any]) -> bool:
        return [str(vars(row)) for row in ours] == [str(vars(row)) for row in theirs]

    def settled() -> None:
        for thread in threading.enumerate():
            if thread.name.endswith("(_fetch_into)"):
                thread.join(30)

    out: dict[str, Any] = {}
    cache = open_cache(address)
    assert isinstance(cache, RemoteCache)
    out["opened"] = fetched()
    rows = cache.rows([0, 1])
    settled()
    out["first rows"] = fetched()
    last = [len(local) - 1, 3, 0]
    out["rows"] = same(cache.rows(last), local.rows(last)) and same(rows, local.rows([0, 1]))
    settled()
    out["last row"] = fetched()
    out["iterated"] = same(list(cache), list(local))
    out["text"] = cache.vocabulary().decode(rows[0].x_0) == local.vocabulary().decode(rows[0].x_0)
    copy = pickle.loads(pickle.dumps(cache))
    remote.verify_shard = lambda root, shard: verify_shards.check_pages(root, read_manifest(root), shard, SampleOrder())
    out["index"] = all(np.array_equal(a, b) for a, b in zip(
        vars(copy.index()).values(), vars(local.index()).values(), strict=True))  # fmt: skip
    out["datasets"] = len(copy.to_datasets())
    out["decoded"] = sorted(copy.to_datasets(decoded=True, temperature=2.0).features)
    out["address"] = [str(copy.address), commit]
    # What lies in the client's folder is compared again by the next process.
    blob = Path(copy.root, "data", "views-00000-of-00006.parquet").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    hub.requests.clear()
    out["damaged here"] = same(open_cache("me/cache").rows([0]), local.rows([0]))
    settled()
    out["fetched again"] = len(hub.asked("^GET .*views-00000"))

    # A hostile author: every hash agrees, the values cannot be true.
    bad = synthetic_cache(work / "bad")
    _lie_in_shard(bad, 4)
    publish(hub, "me/bad", bad)
    read = 0
    with contextlib.suppress(CacheError):
        for _ in open_cache("me/bad"):
            read += 1
    out["rows before the lie"] = [read, 4 * SAMPLES * VIEWS]
    out["bad"] = attempt(lambda: open_cache("me/bad").rows([4 * SAMPLES * VIEWS]))
    out["bad index"] = attempt(lambda: open_cache("me/bad").index())
    out["bad full"] = attempt(lambda: open_cache("me/bad", verify="full"))
    out["nowhere"] = attempt(lambda: open_cache("me/nowhere", revision="x"))
    out["no name"] = attempt(lambda: open_cache("no/such/folder"))
    out["two revisions"] = attempt(lambda: open_cache("me/cache@v1", revision="v2"))
    edited(hub, "me/incomplete", "me/cache", **{"manifest.json": None})
    out["incomplete"] = attempt(lambda: open_cache("me/incomplete"))
    return out


def _lie_in_shard(root: Path, number: int) -> None:
    """Replace one log-probability by a positive one, and let the manifest vouch for the new file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tide.shared.cache.files import sha256_file
    from tide.shared.cache.manifest import read_manifest, sealed_json
    from tide.shared.cache.schema import parquet_options, shard_metadata

    manifest = read_manifest(root)
    path = root / manifest.shards[number].name
    table = pq.read_table(path)
    lists = table["chunk_logp"].to_pylist()
    next(values for values in lists if values)[0] = 0.5
    column = table.schema.get_field_index("chunk_logp")
    table = table.set_column(column, table.schema.field(column), pa.array(lists, table.schema.types[column]))
    options: dict[str, Any] = parquet_options(manifest.layout)
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(shard_metadata(manifest.plan_hash, number))
    tree = json.loads((root / "manifest.json").read_text())
    tree["totals"]["bytes"] += path.stat().st_size - tree["shards"][number]["bytes"]
    tree["shards"][number] |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (root / "manifest.json").write_bytes(sealed_json(tree))


def load_datasets(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """Every config of a pushed cache through `datasets`, streamed and not."""
    import datasets
    from tide.shared.cache import open_cache
    from tide.shared.cache.push import push_cache

    cache = open_cache(synthetic_cache(work / "cache", 2))
    push_cache(cache.root, "me/cache", data_licence="mit")
    out: dict[str, Any] = {"names": datasets.get_dataset_config_names("me/cache")}
    for config in ("default", "preview"):
        rows = list(datasets.load_dataset("me/cache", config, split="train"))
        streamed = list(datasets.load_dataset("me/cache", config, split="train", streaming=True))
        out[config] = {"rows": len(rows), "columns": list(rows[0]), "same": rows == streamed}
        out[config]["ids"] = [row["sample_id"] for row in rows]
    out["expected"] = [row.sample_id for row in cache]
    out["unnamed"] = len(datasets.load_dataset("me/cache", split="train"))
    return out


def train(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """A dump, pushed, and a student trained from its folder and from the Hub."""
    from tide.shared.cache.push import push_cache
    from tide.student_train.trainer import train_student
    from tiny_runs import hybrid, make_cache

    config = hybrid(work, train__steps=2)
    root = make_cache(work, "cache", config)
    done = push_cache(root, "me/cache", teacher_licence="mit", data_licence="mit")
    hub.requests.clear()
    students = [
        train_student(config, cache, work / out) / "model.safetensors"
        for cache, out in [(str(root), "local"), (f"hf://datasets/me/cache@{done.tag}", "remote")]
    ]
    return {
        "same": students[0].read_bytes() == students[1].read_bytes(),
        "origins": [json.loads((student.parent / "tide_cache.json").read_text()) for student in students],
        "commit": done.commit,
        "fetched": [request.split("/")[-1] for request in hub.asked("^GET .*/resolve/")],
        "pushed": sorted(hub.repositories["me/cache"].head.tree),
        "shards": sorted(path.name for path in (root / "data").iterdir()),
    }


def run_program(name: str, folder: Path, script: str = __file__) -> dict[str, Any]:
    """What a program found; it must not have shown the token, nor written it anywhere below `folder`."""
    done = subprocess.run(
        [sys.executable, script, name, str(folder)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_without_token(done.stdout + done.stderr, folder)
    return json.loads(done.stdout.splitlines()[-1])


def assert_without_token(output: str, folder: Path) -> None:
    """Neither the output nor a file holds the token."""
    assert TOKEN not in output
    assert [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def audits(hub: LoopbackHub, work: Path) -> dict[str, Any]:
    """A cache with an audit (`work / cache`) is pushed, pulled with it and without, and opened from afar."""
    from tide.shared.cache import open_cache
    from tide.shared.cache.pull import pull_cache
    from tide.shared.cache.push import push_cache

    def done(name: str, action: Callable[[], Any]) -> None:
        hub.requests.clear()
        out[name] = attempt(action) | {"fetched": [r.split("/")[-1] for r in hub.asked("^GET .*/resolve/")]}

    def push_from(root: Path, name: str) -> Any:
        return push_cache(root, name, teacher_licence="mit", data_licence="mit")

    out: dict[str, Any] = {}
    done("push", lambda: push_from(work / "cache", "me/audited"))
    out["commits"] = [commit.paths for commit in hub.repositories["me/audited"].commits]
    done("without", lambda: pull_cache("me/audited", work / "a", audit=False))
    out["held without"] = (work / "a" / "audit").exists()
    done("push without", lambda: push_from(work / "a", "me/half"))
    done("with", lambda: pull_cache("me/audited", work / "a"))
    out["same bytes"] = {
        path.name: path.read_bytes() == (work / "cache" / "audit" / path.name).read_bytes()
        for path in sorted((work / "a" / "audit").iterdir())
    }
    done("opened", lambda: open_cache("hf://datasets/me/audited", verify="full").manifest.hash)
    edited(hub, "me/hole", "me/audited", **{"audit-00001-of": None})
    done("hole", lambda: pull_cache("me/hole", work / "b"))
    done("hole without", lambda: pull_cache("me/hole", work / "b", audit=False))
    bent = bytearray(sorted((work / "cache" / "audit").iterdir())[1].read_bytes())
    bent[200] ^= 1
    edited(hub, "me/bent", "me/audited", **{"audit-00001-of": File(bytes(bent), "1" * 64)})
    done("bent", lambda: pull_cache("me/bent", work / "c"))
    return out


PROGRAMS = {function.__name__: function for function in (push, pull, remote, load_datasets, train, audits)}

if __name__ == "__main__":
    program, folder = PROGRAMS[sys.argv[1]], Path(sys.argv[2])
    with LoopbackHub() as server:
        os.environ.update(server.environment(folder / "home", TOKEN))
        print(json.dumps(program(server, folder)))
