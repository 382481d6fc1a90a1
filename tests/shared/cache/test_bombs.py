"""Small files that are made to exhaust memory or time are refused within 2 s of computing and 300 MB.

Each cache is verified as a user's command does it: a process that reads the manifest, and its child that reads shards.
Time is both processes' CPU seconds, imports included (this machine may be busy); memory is the larger one's peak. The
hostile author vouches for every file: hashes and sizes in the manifest are those of the bombs.
"""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parquet_by_hand as by_hand
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_by_hand import Long, data_page, dictionary_page, levels, replace_chunk, run
from tide.shared.cache import write_vocabulary
from tide.shared.cache.files import sha256_file
from tide.shared.cache.manifest import sealed_json
from tiny_runs import make_cache as make_tiny_cache
from tiny_runs import tiny_config

SHARD = "data/views-00000-of-00001.parquet"
AUDIT = "audit/audit-00000-of-00001.parquet"
MAX_S, MAX_MB = 8.0, 300  # bombs take minutes, or gigabytes
MANY = 60_000_000
LEAF = "x_0.list.element"

# A process that the system forks from inherits its peak, so this small one lies between pytest and the verifier.
LAUNCHER = """
import json, resource, subprocess, sys
code = "import sys; from tide.shared.cache import verify_cache; from tide.shared.errors import TideError\\n" \\
    "try: verify_cache(sys.argv[1])\\nexcept TideError as error: sys.exit(f'refused: {error}')"
done = subprocess.run([sys.executable, "-c", code, sys.argv[1]], capture_output=True, text=True, timeout=120)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stderr, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def verify(root: Path) -> tuple[str, float, float]:
    """What the verifier says ("" for sound), CPU seconds, peak MB."""
    command = [sys.executable, "-S", "-E", "-c", LAUNCHER, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)
    code, said, seconds, megabytes = json.loads(done.stdout)
    print(f"{seconds:.2f} s, {megabytes:.0f} MB: {said.strip()[:200]}")
    assert (code == 0) == (said == ""), said
    assert "Traceback" not in said, said
    return said, seconds, megabytes


def require_refused(root: Path, *, max_s: float = MAX_S) -> str:
    said, seconds, megabytes = verify(root)
    assert said.startswith("refused: "), said
    assert seconds < max_s
    assert megabytes < MAX_MB
    return said


def vouch_for(root: Path) -> None:
    tree = json.loads((root / "manifest.json").read_text())
    audits = tree["audit"]["files"] if tree["audit"] else []
    for entry in (*tree["shards"], *audits, tree["vocabulary"]):
        entry |= {"sha256": sha256_file(root / entry["name"]), "bytes": (root / entry["name"]).stat().st_size}
    tree["totals"]["bytes"] = sum(shard["bytes"] for shard in tree["shards"])
    (root / "manifest.json").write_bytes(sealed_json(tree))


@pytest.fixture
def root(make_cache) -> Path:
    """A sound cache of one shard, with some ten kilobytes of x_0 to put something else into."""
    return make_cache("topk", num_shards=1, samples=20, blocks=100, views=2)


def test_what_a_sound_cache_takes(root):
    said, seconds, megabytes = verify(root)
    assert said == ""
    assert seconds < MAX_S
    assert megabytes < MAX_MB


SEVEN = dictionary_page(1, struct.pack("<i", 7))
PAGES: dict[str, Callable[[], bytes]] = {
    "a list of 60 million in a run of levels": lambda: (
        SEVEN + data_page(MANY, levels(run(1, 0), run(MANY - 1, 1)) + levels(run(MANY, 1)) + b"\1" + run(MANY, 0))
    ),
    "60 million lists of one": lambda: (
        SEVEN + data_page(MANY, levels(run(MANY, 0)) + levels(run(MANY, 1)) + b"\1" + run(MANY, 0))
    ),
    "60 million empty lists": lambda: SEVEN + data_page(MANY, levels(run(MANY, 0)) + levels(run(MANY, 0)) + b"\1"),
    "a run that is longer than its page": lambda: (
        SEVEN + data_page(40, levels(run(40, 0)) + levels(run(40, 1)) + b"\1" + run(2**31 - 1, 0))
    ),
    "a dictionary of 60 million": lambda: dictionary_page(MANY, bytes(4 * MANY)),
    "a dictionary that claims 2 billion entries": lambda: dictionary_page(2**31 - 1, bytes(4)),
    "a page that claims 2 GB and holds 4 bytes": lambda: dictionary_page(1, bytes(4), size=2**31 - 1),
    "a page that claims 4 bytes and holds 240 MB": lambda: dictionary_page(1, bytes(4 * MANY), size=4),
    "a page of negative size": lambda: dictionary_page(1, bytes(4), size=-1),
    "values of negative number": lambda: SEVEN + data_page(-1, b""),
    "a header with a text of 2 GB": lambda: by_hand.thrift({1: 0, 2: 4, 3: 4})[:-1] + b"\x28\xff\xff\xff\x7f",
    "a header nested 9,000 deep": lambda: b"\x5c" + b"\x1c" * 9_000,
    "a header with a list of 2 billion": lambda: b"\x19\xfc\xff\xff\xff\xff\x07",
    "nothing at all": lambda: b"",
}  # fmt: skip


@pytest.fixture
def audited(tiny_root, tmp_path) -> Path:
    """A sound cache with an audit."""
    config = tiny_config(tiny_root, signal__audit_share=0.3)
    return Path(shutil.copytree(make_tiny_cache(tiny_root, "audited-to-be-bombed", config), tmp_path / "audited"))


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_an_audit_that_say_otherwise_than_its_footer(audited, name):
    replace_chunk(audited / AUDIT, "logp.list.element", PAGES[name]())
    vouch_for(audited)
    assert AUDIT in require_refused(audited)


def test_an_audit_of_more_tokens_than_the_support_is_refused_by_its_footer(audited):
    """Four million equal values, which compress to little, and a footer that owns up to them."""
    rows = pq.read_metadata(audited / AUDIT).num_rows
    schema = pq.read_schema(audited / AUDIT)
    length = 4_000_000 // rows
    one = pa.array(np.full(rows * length, -8.0, np.float32))
    logp = pa.ListArray.from_arrays(
        pa.array(np.arange(rows + 1, dtype=np.int32) * length), one, type=schema.field("logp").type
    )
    table = pq.read_table(audited / AUDIT).set_column(schema.names.index("logp"), schema.field("logp"), logp)
    metadata = pq.read_metadata(audited / AUDIT).metadata
    options = {"version": "2.6", "compression": "zstd", "store_schema": False, "write_page_checksum": True}
    with pq.ParquetWriter(audited / AUDIT, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)
    assert (audited / AUDIT).stat().st_size < 200_000
    vouch_for(audited)
    assert re.search(r"expands to|values for", require_refused(audited))


@pytest.mark.parametrize("name", PAGES)
def test_pages_that_say_otherwise_than_the_footer(root, name):
    replace_chunk(root / SHARD, LEAF, PAGES[name]())
    vouch_for(root)
    assert SHARD in require_refused(root)


def test_many_pages_that_unpack_to_nothing_end_by_their_time(root):
    """Decompression is work that no footer announces: here 6 GB from 250 kB. The time limit follows from the bytes."""
    shard = root / SHARD
    ends = levels(run(1, 1)) + b"\1" + run(1, 0) + bytes(5_000_000)
    pages = data_page(1, levels(run(1, 0)) + ends) + data_page(1, levels(run(1, 1)) + ends) * 1200
    data = shard.read_bytes()
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - footer_bytes], data[-8 - footer_bytes : -8]
    chunk = by_hand.chunk(shard, LEAF)
    start = chunk.dictionary_page_offset
    for old, new in ((start, len(body)), (chunk.data_page_offset, len(body) + len(SEVEN))):
        footer = footer.replace(by_hand.thrift(Long(old)), by_hand.thrift(Long(new)), 1)
    old, new = (by_hand.thrift(Long(n)) for n in (chunk.total_compressed_size, len(SEVEN + pages)))
    place = footer.find(old, footer.find(b"x_0"))
    footer = footer[:place] + new + footer[place + len(old) :]
    shard.write_bytes(body + SEVEN + pages + footer + struct.pack("<I", len(footer)) + b"PAR1")
    moved = by_hand.chunk(shard, LEAF)
    assert (moved.dictionary_page_offset, moved.total_compressed_size) == (len(body), len(SEVEN + pages))
    vouch_for(root)
    require_refused(root, max_s=15.0)


def leaf(name: bytes) -> dict[int, Any]:
    return {1: 1, 3: 0, 4: name}


def footer(schema: list[Any], groups: list[Any], **more: Any) -> bytes:
    return by_hand.thrift({1: 1, 2: schema, 3: Long(0), 4: groups})


def group_of(num_columns: int) -> dict[int, Any]:
    return {1: [{2: Long(0)}] * num_columns, 2: Long(0), 3: Long(0)}


ONE_LEAF = [{4: b"schema", 5: 1}, leaf(b"a")]
FOOTERS: dict[str, Callable[[], bytes]] = {
    "a million columns": lambda: footer([{4: b"s", 5: 10**6}, *[leaf(b"a")] * 10**6], []),
    "ten thousand columns": lambda: footer([{4: b"s", 5: 10**4}, *[leaf(b"%d" % i) for i in range(10**4)]], []),
    "a group of a million columns": lambda: footer(ONE_LEAF, [group_of(10**6)]),
    "eighty thousand empty column chunks": lambda: footer(ONE_LEAF, [group_of(20_000)] * 4),
    "groups nested 90 deep": lambda: footer([*[{3: 0, 4: b"s", 5: 1}] * 90, leaf(b"a")], []),
    "groups nested 50,000 deep": lambda: footer([*[{3: 0, 4: b"s", 5: 1}] * 50_000, leaf(b"a")], []),
    "structs nested 50,000 deep": lambda: b"\x1c" * 50_000,
    "a root that counts 2 billion columns": lambda: footer([{4: b"s", 5: 2**31 - 1}, leaf(b"a")], []),
    "a schema that claims a billion entries": lambda: b"\x15\x02\x19\xfc\xff\xff\xff\xff\x03",
    "a row group of 2^62 rows": lambda: footer(ONE_LEAF, [{1: [], 2: Long(2**62), 3: Long(2**62)}]),
    "no schema": lambda: footer([], []),
    "nothing": lambda: b"",
}  # fmt: skip


@pytest.mark.parametrize("name", FOOTERS)
def test_footers_of_a_file_of_nothing_else(root, name):
    data = FOOTERS[name]()
    (root / SHARD).write_bytes(b"PAR1" + data + struct.pack("<I", len(data)) + b"PAR1")
    vouch_for(root)
    assert SHARD in require_refused(root)


@pytest.mark.parametrize("length", [2**32 - 1, 2**31 - 1, 2**31, 10**6, 9_000])
def test_a_footer_that_claims_another_length(root, length):
    data = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(data[:-8] + struct.pack("<I", length) + b"PAR1")
    vouch_for(root)
    assert SHARD in require_refused(root)


def in_noise(root: Path, value: Any) -> bytes:
    """The manifest with a value where any JSON is allowed."""
    tree = json.loads((root / "manifest.json").read_text())
    return json.dumps({**tree, "noise": {"seed": "VALUE"}}).encode().replace(b'"VALUE"', value)


def _many_shards(root: Path) -> bytes:
    tree = json.loads((root / "manifest.json").read_text())
    tree["shards"] = [{**tree["shards"][0], "name": f"data/views-{i:05d}-of-30000.parquet"} for i in range(30_000)]
    return json.dumps(tree).encode()


MANIFESTS: dict[str, Callable[[Path], bytes]] = {
    "100 MB": lambda root: b" " * 100_000_000,
    "lists of nothing": lambda root: in_noise(root, b"[" + b"[]," * 2_500_000 + b"0]"),
    "lists of one": lambda root: in_noise(root, b"[" + b"[0]," * 1_900_000 + b"0]"),
    "objects": lambda root: in_noise(root, b"[" + b'{"":0},' * 1_100_000 + b"0]"),
    "numbers": lambda root: in_noise(root, b"[" + b"1e1," * 1_900_000 + b"0]"),
    "a number of seven million digits": lambda root: in_noise(root, b"1" * 7_000_000),
    "deeper than the parser": lambda root: in_noise(root, b"[" * 200_000 + b"]" * 200_000),
    "deep": lambda root: in_noise(root, b"[" * 900 + b"]" * 900),
    "a bit deeper than sixteen": lambda root: in_noise(root, b'{"a":' * 20 + b"1" + b"}" * 20),
    "thirty thousand shards": _many_shards,
    "as many texts as are allowed": lambda root: in_noise(root, b"[" + b'"0123456789abc",' * 400_000 + b"0]"),
    "as many lists as are allowed": lambda root: in_noise(
        root, b"[" + b"[0                           ]," * 240_000 + b"0]"
    ),
    "one text of wide characters": lambda root: in_noise(root, b'"' + "\U0001f30a".encode() * 1_900_000 + b'"'),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(root, name):
    (root / "manifest.json").write_bytes(MANIFESTS[name](root))
    assert "manifest.json" in require_refused(root)


VOCABULARIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "a token of 240 MB": lambda: (
        "token_bytes", data_page(300, struct.pack("<I", 4 * MANY - 4) + bytes(4 * MANY), by_hand.PLAIN)),
    "sixty million ids": lambda: ("student_id", SEVEN + data_page(MANY, b"\1" + run(MANY, 0))),
    "sixty million nulls": lambda: ("teacher_id", data_page(MANY, levels(run(MANY, 1)), by_hand.PLAIN)),
}  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(root, name):
    rng = np.random.default_rng(0)
    write_vocabulary(root, [rng.bytes(60) for _ in range(300)], np.arange(300))
    leaf, pages = VOCABULARIES[name]()
    replace_chunk(root / "vocabulary.parquet", leaf, pages)
    vouch_for(root)
    assert "vocabulary.parquet" in require_refused(root)
