"""`tide inspect-cache --report` and `--plots`: pages that show true numbers and cannot act, pictures that open."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from PIL import Image
from tide.shared.cache import ViewRow, read_manifest, write_vocabulary
from tide.shared.cache.decoded_views import MAX_TEXT_CHARS, SPREAD_T, spread_views
from tide.shared.cache.html_report import POLICY, report_html
from tide.shared.cache.inspect import describe_cache
from tide.shared.cache.manifest import file_entry, sealed_json
from tide.shared.cache.plots import MAX_COLUMNS, MAX_TICKS, Absent, Plot, draw, make_plots
from tide.shared.cache.reader import open_cache
from tide.shared.cache.report import report
from tide.shared.cache.trust import keep_note, trust_note
from tide.shared.cache.vocabulary import VOCABULARY_NAME
from tide.shared.config import to_tree
from tide.shared.pictures import PALETTE, drawing

PLOTS = {
    "none": {"t", "mask_ratio", "column_bytes"},
    "chunk": {"t", "mask_ratio", "chunk_length", "column_bytes"},
    "topk": {"t", "mask_ratio", "entropy", "head_mass", "chunk_length", "k", "one_to_one", "column_bytes"},
}
VOID = {"meta", "link", "br"}
HARMLESS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "main", "section", "article", "aside", "div",
    "span", "p", "h1", "h2", "h3", "b", "i", "code", "dl", "dt", "dd", "details", "summary", "figure", "figcaption",
    "svg", "g", "path", "defs", "clippath", "rect", "use", "text",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see of a page: elements with attributes and text; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "parents": list(self.open), "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "parents": list(self.open), "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag: str = "", **attributes: str) -> list[dict[str, Any]]:
        """Elements of a tag, and with these classes or ids."""
        return [
            e for e in self.elements
            if (not tag or e["tag"] == tag) and all(value in (e.get(name) or "").split()
            for name, value in ((name.rstrip("_"), value) for name, value in attributes.items()))
        ]  # fmt: skip

    def values(self, name: str) -> list[float]:
        """The numbers of a plot's marks."""
        (plot,) = self.find("svg", id=f"plot-{name}")
        marks = [e for e in self.find("g", class_="mark") if plot in e["parents"]]
        return [float(e["data-value"]) for e in marks]


def page_of(root) -> Page:
    return Page(report_html(describe_cache(root), spread_views(open_cache(root))))


def rewrite(root, **changes: Any) -> None:
    """Change fields of the manifest, as a stranger may, and believe them: pages must not depend on the checks."""
    tree = json.loads((root / "manifest.json").read_text())
    for path, value in changes.items():
        place, *names = path.split("__")
        tree[place] = value if not names else tree[place] | {names[0]: value}
    (root / "manifest.json").write_bytes(sealed_json(tree))
    keep_note(trust_note(root, read_manifest(root)))


def test_the_page_holds_what_the_signal_has(make_cache, signal):
    page = page_of(make_cache(signal))
    assert {e["id"].removeprefix("plot-") for e in page.find("svg")} == PLOTS[signal]
    for plot in page.find("svg"):
        (caption,) = [e for e in page.find("figcaption") if plot["parents"][-1] in e["parents"]]
        title, note = (e["text"] for e in page.elements if e["parents"][-1:] == [caption])
        assert plot["role"] == "img"
        assert plot["aria-label"].startswith(f"{title}. {note} ")
    left_out = [e["text"] for e in page.find("section") if e["text"].startswith("Left out")]
    assert len(left_out) == (signal != "topk")
    if left_out:
        assert "Head mass by t" in left_out[0]
        assert f"signal {signal} keeps no distributions over tokens" in left_out[0]
    kinds = {name for e in page.find("span") for name in (e.get("class") or "").split()}
    assert "masked" in kinds  # tokens in no chunk
    assert ("chunk" in kinds, "choice" in kinds) == (signal != "none", signal == "topk")


def test_numbers_of_the_plots_are_those_of_the_description(make_cache, signal):
    root = make_cache(signal, samples=8)
    d, page = describe_cache(root), page_of(root)
    assert page.values("t") == d["t"]["views"]
    assert page.values("mask_ratio") == d["t"]["mask_ratio_views"]
    assert page.values("column_bytes") == sorted(d["size"]["column_bytes"].values(), reverse=True)
    if d["chunks"]:
        assert page.values("chunk_length") == d["chunks"]["length_counts"][1:]
    if d["targets"]:
        for name in ("entropy", "head_mass"):  # a bin without targets has no mark
            assert page.values(name) == [value for value in d["targets"]["by_t"][name] if value is not None]
        assert page.values("k") == d["targets"]["k_counts"]
        assert page.values("one_to_one")[0] == min(d["targets"]["count"], d["chunks"]["count"])
        assert sum(page.values("one_to_one")) == d["chunks"]["count"]


def drawn(root) -> dict[str, tuple[Plot, Any]]:
    """Plots and their axes by name."""
    with drawing():
        return {plot.name: (plot, draw(plot).axes[0]) for plot in make_plots(describe_cache(root))
                if isinstance(plot, Plot)}  # fmt: skip


def test_bars_and_dots_are_where_their_numbers_say(make_cache):
    plots = drawn(make_cache("topk"))
    for name in ("t", "chunk_length"):
        plot, axes = plots[name]
        assert [bar.get_height() for bar in axes.containers[0]] == list(plot.values)
        assert axes.get_ylim()[0] == 0  # a length that is cut off would lie
        assert axes.get_ylim()[1] > max(plot.values)
    plot, axes = plots["column_bytes"]
    assert [bar.get_width() for bar in axes.containers[0]] == list(plot.values)
    assert axes.get_xlim()[0] == 0
    assert [label.get_text() for label in axes.get_yticklabels()] == list(plot.labels)
    plot, axes = plots["one_to_one"]
    lefts = [axes.patches[3 * number].get_x() for number in range(len(plot.values))]
    shares = np.array(plot.values) / sum(plot.values)
    assert lefts == pytest.approx([0, *np.cumsum(shares)[:-1]])
    plot, axes = plots["entropy"]
    places, heights = axes.lines[0].get_data()
    assert places.tolist() == [bin + 0.5 for bin in range(20)]
    assert heights.tolist() == pytest.approx([np.nan if v is None else v for v in plot.values], nan_ok=True)
    assert {text.get_text() for text in axes.texts} == {"at most"}


def test_a_bin_far_from_all_others_is_an_arrow_with_its_value_and_squeezes_nothing(make_cache):
    description = describe_cache(make_cache("topk"))
    by_t = description["targets"]["by_t"]
    by_t |= {"entropy": [1 + 0.1 * (bin % 7) for bin in range(20)], "entropy_most": [2.0] * 20, "targets": [9] * 20}
    by_t["entropy"][12] = 50.0
    (plot,) = [plot for plot in make_plots(description) if plot.name == "entropy"]
    with drawing():
        (axes,) = draw(plot).axes
    assert 2 < axes.get_ylim()[1] < 3
    (arrow,) = [line for line in axes.lines if line.get_marker() == "^"]
    assert (*arrow.get_xdata(), *arrow.get_ydata()) == (12.5, axes.get_ylim()[1])
    assert "50.00" in [text.get_text() for text in axes.texts]


def test_every_mark_can_be_pointed_at_where_it_is(make_cache):
    """The places that answer the mouse cover their columns, and have the words of their own number."""
    for plot, axes in drawn(make_cache("topk")).values():
        spots = [patch for patch in axes.patches if patch.get_gid()]
        assert [patch.get_gid() for patch in spots] == [f"mark-{number}" for number in range(len(plot.marks))]
        if plot.shape in ("columns", "line"):
            known = [bin for bin, v in enumerate(plot.values) if v is not None or plot.shape == "columns"]
            assert [patch.get_x() for patch in spots] == pytest.approx(known)


def test_the_header_says_what_this_is(make_cache):
    root = make_cache("topk")
    d, text = describe_cache(root), page_of(root).find("header")[0]["text"]
    per_position = f"{d['size']['bytes_per_masked_position']:,.1f}"
    for fact in ("org/teacher", "c0ffee", "licence apache-2.0", "stdlib", "licence unknown", "seed 0", "topk",
                 d["manifest_hash"], d["plan_hash"], per_position, f"{d['size']['masked_positions']:,}"):  # fmt: skip
        assert fact in text


def test_a_page_names_no_path_and_is_the_same_every_time(make_cache):
    first, second = (make_cache("topk", name=f"{folder}/cache") for folder in ("a", "b"))
    pages = [report_html(describe_cache(root), spread_views(open_cache(root))) for root in (first, second)]
    assert pages[0] == pages[1]
    assert str(first.parent) not in pages[0]


def test_masked_chunks_carry_the_teachers_candidates(write_words):
    page = page_of(write_words([b"<end>", b"def", b" f", b"(", b")", b":", b"\n", b"return", b" 1", b" \xc3\xa9"]))
    (words,) = page.find("div", class_="words")
    pieces = [e for e in page.find("span", tabindex="0") if e["parents"][-1] is words]
    shown = [(e["class"], e["text"]) for e in pieces]
    assert [kind for kind, _ in shown] == ["chunk shade-2", "chunk shade-2", "masked", "chunk shade-1"]
    assert shown[0][1].startswith(":↵\nChunk of 2 tokens")
    assert "probability 0.135 (-2.00 nats)" in shown[0][1]  # exp(-2); exp(-1) per token gives the shade
    assert shown[1][1].startswith(" 1Chunk of 1 token probability 0.500 (-0.69 nats) Clean token ' 1': 0.500")
    assert [e["text"] for e in page.find("span", class_="choice") if pieces[1] in e["parents"]] == [
        "' 1'0.500", "' f'0.250", "'def'0.125"
    ]  # fmt: skip
    assert [e["text"] for e in page.find("span", class_="clean")] == [")", "return", "' 1'0.500"]
    assert "' 1'" not in shown[2][1]
    assert "no answer of a teacher" in shown[2][1]
    assert "'↵'0.500" in shown[3][1]


def test_views_go_from_little_to_nearly_all_masked(make_cache):
    views = spread_views(open_cache(make_cache("topk", num_shards=1, samples=20)))
    assert len(views) == len(SPREAD_T)
    assert len({view["sample_id"] for view in views}) == len(SPREAD_T)
    assert [view["t"] for view in views] == sorted(view["t"] for view in views)
    assert max(len(says["top"]) for view in views for s in view["segments"] for says in s["teacher"]) == 5


def test_a_view_of_empty_tokens_is_shown_in_part(tmp_path, synthetic):
    layout = synthetic.make_layout("none")
    x_0 = np.full(200_000, 2, np.int32)
    row = ViewRow("long", 0, 0.5, x_0, 100_000, np.arange(100_000) % 2 == 0)
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, [row], layout)])
    write_vocabulary(tmp_path, [b""] * synthetic.VOCAB)
    rewrite(tmp_path, vocabulary=to_tree(file_entry(tmp_path, VOCABULARY_NAME)))
    (view,) = spread_views(open_cache(tmp_path))
    assert (view["tokens"], len(view["segments"])) == (200_000, 1 + MAX_TEXT_CHARS)
    assert len(page_of(tmp_path).find("span", class_="masked")) == MAX_TEXT_CHARS // 2 + 1  # one of them in the key


def test_a_page_of_a_stranger_is_inert(write_hostile):
    root, texts = write_hostile()
    html = report_html(describe_cache(root), spread_views(open_cache(root)))
    page = Page(html)
    assert {e["tag"] for e in page.elements} <= HARMLESS
    for element in page.elements:
        attributes = {name: value for name, value in element.items() if name not in ("tag", "parents", "text")}
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        assert re.fullmatch(r"data:,|#m[0-9a-f]+", attributes.get("href", "data:,"))
        if any(parent["tag"] == "svg" for parent in element["parents"]):
            assert re.fullmatch(r"[a-z0-9 .,:;()-]*", attributes.get("style", ""))
        else:
            assert re.fullmatch(r"width:[0-9.]+%", attributes.get("style", "width:0%"))
        known = ("clip-path", "data-value", "aria-label", "text")  # words of a plot are a stranger's, and no address
        values = [value for name, value in attributes.items() if value and name not in known]
        assert not [value for value in values if re.search(r"https?:|javascript:|url\(", value)]
        assert re.fullmatch(r"url\(#p[0-9a-f]+\)", attributes.get("clip-path", "url(#p0)"))
    (policy,) = [e["content"] for e in page.find("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert policy == POLICY
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    (style,) = page.find("style")
    assert not re.search(r"url\(|@import|https?:", style["text"])
    shown = page.find("body")[0]["text"]
    for text in texts:
        assert text in shown
    unsafe = {c for c in html if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert not unsafe


def test_numbers_that_lie_still_give_a_page(make_cache):
    root = make_cache("topk")
    huge, tree = 2**62 - 1, json.loads((root / "manifest.json").read_text())["statistics"]
    columns = tree["column_bytes"] | {f"column {number}": huge for number in range(100)}
    lies = {
        "t_histogram": [huge] * 20, "t_entropy": [-1e308] * 20, "t_head_mass": [1e308] * 20, "t_targets": [1] * 20,
        "num_top_counts": [huge] * 5000, "chunk_len_counts": [0] * 5000 + [1], "targets": huge, "column_bytes": columns,
    }  # fmt: skip
    rewrite(root, statistics=tree | lies)
    page = page_of(root)
    assert len(page.values("k")) <= MAX_COLUMNS
    assert not re.search(r"nan|inf", " ".join(e.get("d", "") for e in page.find("path")))
    rewrite(root, statistics=tree | {"t_targets": [0] * 20, "num_top_counts": [], "chunk_len_counts": []})
    assert not page_of(root).find("svg", id="plot-entropy")


def test_a_cache_without_rows_gives_a_page_and_no_picture_fails(tmp_path, synthetic):
    layout = synthetic.make_layout()
    synthetic.finish(tmp_path, layout, [synthetic.write(tmp_path, [], layout)])
    page = page_of(tmp_path)
    assert page.find("svg") == []
    assert "it has no views" in page.find("main")[0]["text"]
    assert "This cache has no views." in page.find("main")[0]["text"]


@pytest.mark.parametrize(
    "counts, columns, last, ticks",
    [
        ([0, 5, 3], 2, "2 tokens", ["1", "2"]),
        ([2, 5, 3], 3, "2 tokens", ["0", "1", "2"]),
        ([1] * 24, 24, "23 tokens", [str(value) for value in range(0, 24, 2)]),
        ([0] * 128 + [9], 32, "125 to 128 tokens", ["1", "21", "41", "61", "81", "101", "121"]),
        ([0, 900, 95, 4] + [0] * 90 + [1], 3, "3 or more tokens", ["1", "2", "3+"]),
        ([0, *[100] * 30, 5, 4, 3], 31, "31 or more tokens", ["5", "10", "15", "20", "25", "31+"]),
    ],
)  # fmt: skip
def test_long_distributions_are_grouped_and_nothing_is_lost(make_cache, counts, columns, last, ticks):
    description = describe_cache(make_cache("chunk"))
    description["chunks"]["length_counts"] = counts
    (plot,) = [plot for plot in make_plots(description) if plot.name == "chunk_length"]
    assert not isinstance(plot, Absent)
    assert (len(plot.values), plot.labels[-1], sum(plot.values)) == (columns, last, sum(counts))
    assert 1 <= len(plot.ticks) <= MAX_TICKS
    assert [text for _, text in plot.ticks] == ticks


def test_the_command_writes_a_page_and_pictures_and_names_them(make_cache, tide, tmp_path, signal):
    root, page, folder = make_cache(signal), tmp_path / "out" / "report.html", tmp_path / "plots"
    code, out, err = tide("inspect-cache", root, "--report", page, "--plots", folder, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["report"] == str(page)
    assert answer["manifest_hash"] in page.read_text()
    assert answer["plots"] == [str(folder / f"{name}.png") for name in
        [plot.name for plot in make_plots(describe_cache(root)) if not isinstance(plot, Absent)]]  # fmt: skip
    assert {path.stem for path in folder.iterdir()} == PLOTS[signal]
    for path in folder.iterdir():
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html"]
    code, out, _ = tide("inspect-cache", root, "--report", page)
    assert (code, "Signal" in out, str(page) in out) == (0, False, True)


def test_names_of_a_stranger_are_drawn_as_they_are(write_hostile, tide, tmp_path_factory):
    (root, _), folder = write_hostile(), tmp_path_factory.mktemp("plots")
    tree = json.loads((root / "manifest.json").read_text())["statistics"]
    rewrite(root, statistics=tree | {"column_bytes": {r"$\frac{1}{0$": 5, "東京": 3, "<b>": 2}})
    code, _, err = tide("inspect-cache", root, "--plots", folder)
    assert (code, err) == (0, "")


def test_a_page_that_cannot_be_written_is_an_error_that_says_so(make_cache, tide, tmp_path):
    blocked = tmp_path / "folder.html"
    (blocked / "inside").mkdir(parents=True)
    code, out, err = tide("inspect-cache", make_cache(), "--report", blocked)
    assert (code, out) == (74, "")
    assert f"{blocked}: cannot be written" in err
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_page_shows_words_and_no_dictionaries(make_cache):
    root = make_cache("topk")
    tree = json.loads((root / "manifest.json").read_text())
    tree["teacher"]["spec"] = {"architecture": "llada2", "causal": False, "drop_ids": [], "stop": [1, 2], "x": None}
    tree["signal"]["codec_error"] = {"1.0": {"kl_mean": 1.25e-05, "kl_p99": 0.0003}}
    rewrite(root, teacher=tree["teacher"], signal=tree["signal"], noise=tree["noise"] | {"comp_demo": True})
    page = page_of(root)
    shown = page.find("body")[0]["text"]
    assert not re.search(
        r"[{}\[\]]|'kl_|\bTrue\b|\bFalse\b|\bNone\b", page.find("main")[0]["text"].split("comes from")[1]
    )
    pairs = list(zip([e["text"] for e in page.find("dt")], [e["text"] for e in page.find("dd")], strict=True))
    for pair in (("causal", "no"), ("drop ids", "none"), ("stop", "1, 2"), ("x", "none"), ("comp demo", "yes"),
                 ("T = 1.0", "mean KL 1.25e-05, 99th percentile of KL 0.0003")):  # fmt: skip
        assert pair in pairs
    assert "comp demo yes" in shown  # at a glance, on one line
    assert "drop ids none" in report(describe_cache(root)).plain  # the terminal's words are the same


def test_a_long_hash_is_short_and_whole_on_demand(make_cache):
    root = make_cache("topk")
    page, manifest = page_of(root), read_manifest(root)
    details = {e["text"] for e in page.find("details")}
    for whole in (manifest.hash, manifest.plan_hash, manifest.student.tokenizer_fingerprint):
        assert f"{whole[:12]}…{whole}" in details
    assert manifest.hash in [e["title"] for e in page.find("summary")]
    visible = [e["text"] for e in page.find("summary")]
    assert all(len(text) == 13 for text in visible)


def test_colours_are_the_pages_own_and_follow_light_and_dark(make_cache):
    html = report_html(describe_cache(make_cache("topk")), [])
    (style,) = Page(html).find("style")
    dark = style["text"].split("@media (prefers-color-scheme: dark)")[1].split("@media")[0]
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        used = set(re.findall(r"var\(--([a-z]+)\)", svg))
        assert used <= set(PALETTE)
        assert {"ink", "muted"} & used
        for role in used:
            assert f"--{role}: {PALETTE[role][1]}" in dark
            assert f"--{role}: {PALETTE[role][0]}" in style["text"]


def test_pictures_of_equal_caches_are_equal_bytes_and_say_what_they_show(make_cache, tide, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert tide("inspect-cache", make_cache("topk", name=f"{folder.name}-cache"), "--plots", folder)[0] == 0
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
        said = Image.open(path).text
        assert set(said) == {"Description"}
        assert len(said["Description"]) > 40


def test_a_page_needs_no_models_and_another_command_no_pictures(make_cache, tmp_path):
    program = (
        "import sys; from tide.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join({m.split('.')[0] for m in sys.modules}))"
    )

    def loaded(*arguments: str) -> set[str]:
        command = [sys.executable, "-c", program, *arguments]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())

    root, page = str(make_cache()), tmp_path / "r.html"
    assert not {"torch", "transformers", "datasets", "tokenizers"} & loaded(
        "inspect-cache", root, "--report", str(page)
    )
    assert os.path.getsize(page) < 200_000
    assert not {"matplotlib", "PIL"} & loaded("inspect-cache", root)
