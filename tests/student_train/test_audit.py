"""What `inspect-cache --audit` says against a slow twin in numpy, target by target and token by token."""

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tide import cli
from tide.shared.attention import block_diffusion_mask
from tide.shared.cache import open_cache
from tide.shared.errors import CacheError
from tide.shared.models import load_model
from tide.student_train.audit import describe_audit
from tiny_runs import BLOCK, make_cache, tiny_config

T_LIST = (1.0, 2.0)


COARSE = {"signal__audit_share": 0.3, "signal__top_k": 6, "signal__logp_dtype": "float16", "signal__logp_step": 1 / 16}


@pytest.fixture
def root(tiny_root) -> Path:
    """k = 6 of a few hundred tokens, float16 and steps of 1/16: rounding and tails are felt."""
    return make_cache(tiny_root, "audited-coarse", tiny_config(tiny_root, **COARSE))


@pytest.fixture
def cut_root(tiny_root) -> Path:
    """The same with tails cut into three ranges of ids."""
    more = {**COARSE, "signal__tail_buckets": [40, 150]}
    return make_cache(tiny_root, "audited-cut", tiny_config(tiny_root, **more))


def audit_table(root: Path) -> list[dict]:
    return [row for path in sorted((root / "audit").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def softmax(values: np.ndarray) -> np.ndarray:
    p = np.exp(values - values.max())
    return p / p.sum()


class TwinTarget:
    """One audited target: the teacher in full and as stored, all by the formulas of docs/cache_format.md."""

    def __init__(self, row: dict, view, support: np.ndarray) -> None:
        target = view.target_position.tolist().index(row["position"])
        start = int(view.num_top[:target].sum())
        ids = view.top_ids[start : start + view.num_top[target]]
        self.view, self.position, self.share = view, row["position"], row["masked_share"]
        self.logp = np.array(row["logp"], np.float64)
        self.kept = np.array([support.tolist().index(i) for i in ids])
        outside = np.setdiff1d(np.arange(len(support)), self.kept)
        self.parts, tails = [outside], view.log_tail[target][:, None]
        if view.log_buckets.size:
            edges = [0, 40, 150, 10**6]
            self.parts = [outside[(support[outside] >= a) & (support[outside] < b)] for a, b in pairwise(edges)]
            tails = view.log_buckets[target]
        self.top_logp = view.top_logp[start : start + view.num_top[target]].astype(np.float64)
        self.log_tail = dict(zip(T_LIST, tails.astype(np.float64), strict=True))
        self.gold = support.tolist().index(view.x_0[row["position"]])
        self.chunk_logp = float(view.chunk_logp[view.chunk_start.tolist().index(row["position"])])

    def stored(self, temperature: float) -> np.ndarray:
        """Kept tokens and, last, the parts of the tail."""
        tail = np.exp(self.log_tail[temperature])
        return np.append(softmax(self.top_logp / temperature) * (1 - tail.sum()), tail)

    def coarse(self, p: np.ndarray) -> np.ndarray:
        return np.append(p[self.kept], [p[part].sum() for part in self.parts])

    def spread(self, category: np.ndarray, p: np.ndarray) -> np.ndarray:
        """A gradient by category, at the tokens: those of the tail take their share of it."""
        full = np.zeros(len(p))
        full[self.kept] = category[: len(self.kept)]
        for part, value in zip(self.parts, category[len(self.kept) :], strict=True):
            full[part] = value * p[part] / p[part].sum()
        return full


def token_gradients(one: TwinTarget, logits: np.ndarray, support: np.ndarray, temperature: float):
    """{(loss, lambda): (stored, dense)}: gradients dL/dz by hand."""
    s, q = softmax(logits[support] / temperature), softmax(one.logp / temperature)
    sc, qc = one.coarse(s), one.stored(temperature)

    def reverse(s: np.ndarray, q: np.ndarray) -> np.ndarray:
        difference = np.log(s / q)
        return temperature * s * (difference - (s * difference).sum())

    found = {
        ("kl", None): (one.spread(temperature * (sc - qc), s), temperature * (s - q)),
        ("reverse_kl", None): (one.spread(reverse(sc, qc), s), reverse(s, q)),
    }
    for weight in (0.1, 0.5, 0.9):
        mixed, coarse = (softmax((1 - weight) * np.log(a) + weight * np.log(b)) for a, b in ((s, q), (sc, qc)))
        found["tidal_kl", weight] = one.spread(temperature * (sc - coarse), s), temperature * (s - mixed)
    return found


def calm_gradients(one: TwinTarget, logits: np.ndarray, support: np.ndarray, temperature: float):
    p, gold = softmax(logits), support[one.gold]
    s = p[gold] ** (1 / temperature)
    direction = -p / temperature
    direction[gold] += 1 / temperature
    found = {}
    for name in ("calm", "reverse_calm"):
        pair = []
        for logp in (one.chunk_logp, one.logp[one.gold]):
            q = min(max(math.exp(logp / temperature), 1e-7), 1 - 1e-7)
            slope = -(q - (1 - q) * s / (1 - s)) if name == "calm" else -s * math.log(q / (1 - q))
            pair.append(slope * direction)
        found[name, None] = tuple(pair)
    return found


def twin_losses(targets: list[TwinTarget], logits: list[np.ndarray], support: np.ndarray) -> dict:
    """(loss, lambda, T) -> [(cosine, norm ratio)] of all targets and by bin."""
    out = {}
    edges = pairwise(np.arange(6) / 5)
    bins = [[True] * len(targets), *([low < one.share <= high for one in targets] for low, high in edges)]
    for temperature in T_LIST:
        each = [
            token_gradients(o, z, support, temperature) | calm_gradients(o, z, support, temperature)
            for o, z in zip(targets, logits, strict=True)
        ]
        for key in each[0]:
            pairs = []
            for chosen in bins:
                some = [e[key] for e, use in zip(each, chosen, strict=True) if use]
                ours, dense = (np.concatenate([pair[i] for pair in some] or [np.zeros(1)]) for i in (0, 1))
                length = np.linalg.norm(ours) * np.linalg.norm(dense)
                pairs.append((ours @ dense / length, np.linalg.norm(ours) / np.linalg.norm(dense)) if length else None)
            out[(*key, temperature)] = pairs
    return out


def load_targets(root: Path) -> tuple[list[TwinTarget], np.ndarray]:
    cache = open_cache(root)
    support = np.flatnonzero(cache.vocabulary().teacher_id >= 0)
    views = {(view.sample_id, view.view): view for view in cache}
    return [TwinTarget(row, views[row["sample_id"], row["view"]], support) for row in audit_table(root)], support


def compare(student: dict, expected: dict) -> None:
    assert len(student["losses"]) == len(expected) == 14
    for loss in student["losses"]:
        pairs = expected[loss["loss"], loss["tidal_lambda"], loss["temperature"]]
        for name, column in (("cosine", 0), ("norm_ratio", 1)):
            found = [loss[name]["all"], *loss[name]["by_bin"]]
            for got, pair in zip(found, pairs, strict=True):
                assert (got is None) == (pair is None)
                assert got is None or got == pytest.approx(pair[column], abs=2e-5, rel=2e-5), loss  # float32 log_z


def test_gradients_at_the_stand_ins_are_those_of_a_slow_twin(root):
    targets, support = load_targets(root)
    audit = describe_audit(root)
    assert [student["name"] for student in audit["students"]] == ["unigram", "halfway"]
    unigram = np.log(np.mean([softmax(one.logp) for one in targets], axis=0))
    everywhere = np.arange(len(support))
    compare(audit["students"][0], twin_losses(targets, [unigram] * len(targets), everywhere))
    compare(audit["students"][1], twin_losses(targets, [(unigram + one.logp) / 2 for one in targets], everywhere))


def test_gradients_of_tails_that_are_cut_are_those_of_a_slow_twin(cut_root):
    targets, support = load_targets(cut_root)
    audit = describe_audit(cut_root)
    unigram = np.log(np.mean([softmax(one.logp) for one in targets], axis=0))
    compare(audit["students"][0], twin_losses(targets, [unigram] * len(targets), np.arange(len(support))))
    for told in audit["temperatures"]:
        exact = [one.coarse(softmax(one.logp / told["temperature"]))[len(one.kept) :].sum() for one in targets]
        assert told["tail_exact"]["all"] == pytest.approx(np.mean(exact), rel=1e-6)
        assert told["tail_error"]["all"] < 2e-3


def test_gradients_at_a_real_student_are_those_of_its_naive_forward(root, tiny_root):
    targets, support = load_targets(root)
    model, mask_id = load_model(tiny_root / "student"), open_cache(root).manifest.student.mask_id
    logits = []
    for one in targets:
        view, length = one.view, len(one.view.x_0)
        masked = np.concatenate([np.zeros(view.prompt_tokens, bool), view.masked])
        ids = np.concatenate([np.where(masked, mask_id, view.x_0), view.x_0]).astype(np.int64)
        with torch.no_grad():
            answer = model(
                input_ids=torch.from_numpy(ids)[None], position_ids=torch.arange(length).repeat(2)[None],
                attention_mask=block_diffusion_mask(length, BLOCK)[None, None], use_cache=False,
            ).logits  # fmt: skip
        logits.append(answer[0, one.position].double().numpy())
    (tiny_root / "audited-run").mkdir(exist_ok=True)
    (tiny_root / "audited-run" / "student").symlink_to(tiny_root / "student")
    (student,) = describe_audit(root, student=str(tiny_root / "student"))["students"]
    assert student["name"] == "student"
    (of_run,) = describe_audit(root, student=str(tiny_root / "audited-run"))["students"]
    assert of_run == {**student, "name": "audited-run"}
    expected = twin_losses(targets, logits, support)
    assert min(pair[0] for pair in expected["reverse_kl", None, 1.0] if pair) < 0.9  # k = 6 is felt
    assert len(student["losses"]) == len(expected)
    for loss in student["losses"]:
        pairs = expected[loss["loss"], loss["tidal_lambda"], loss["temperature"]]
        assert loss["cosine"]["all"] == pytest.approx(pairs[0][0], abs=1e-4)  # two float32 forwards
        assert loss["norm_ratio"]["all"] == pytest.approx(pairs[0][1], rel=1e-4)


def test_tails_and_divergences_are_those_of_a_slow_twin(root):
    targets, _ = load_targets(root)
    audit = describe_audit(root)
    bins = [sum(low < one.share <= high for one in targets) for low, high in pairwise(audit["bin_edges"])]
    assert (audit["targets"], audit["compared"], audit["bin_targets"]) == (len(targets), len(targets), bins)
    for told in audit["temperatures"]:
        temperature = told["temperature"]
        exact = [one.coarse(softmax(one.logp / temperature)) for one in targets]
        stored = [one.stored(temperature) for one in targets]
        kl = [float((p * np.log(p / q)).sum()) for p, q in zip(exact, stored, strict=True)]
        assert told["tail_exact"]["all"] == pytest.approx(np.mean([p[-1] for p in exact]), rel=1e-6)
        assert told["tail_stored"]["all"] == pytest.approx(np.mean([q[-1] for q in stored]), rel=1e-6)
        errors = [abs(p[-1] - q[-1]) for p, q in zip(exact, stored, strict=True)]
        assert told["tail_error"]["all"] == pytest.approx(max(errors), rel=1e-4, abs=1e-7)
        assert told["kl_mean"]["all"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-8)
        assert told["kl_p99"]["all"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-8)
        assert told["kl_mean"]["all"] > 1e-6  # steps of 1/16


def test_with_everything_kept_and_nothing_rounded_gradients_are_the_dense_ones(tiny_root):
    support = open_cache(make_cache(tiny_root, "plain", tiny_config(tiny_root))).vocabulary().teacher_id
    num_support = int((support >= 0).sum())
    config = tiny_config(tiny_root, signal__audit_share=0.1, signal__top_k=num_support, noise__views=1)
    root = make_cache(tiny_root, "audited-whole", config)
    for audit in (describe_audit(root), describe_audit(root, student=str(tiny_root / "student"))):
        for student in audit["students"]:
            for loss in student["losses"]:
                assert loss["cosine"]["all"] == pytest.approx(1, abs=1e-6), loss
                assert loss["norm_ratio"]["all"] == pytest.approx(1, abs=1e-5), loss
        assert all(told["tail_error"]["all"] < 1e-6 for told in audit["temperatures"])


def test_many_targets_are_thinned_out_evenly(root, monkeypatch):
    audit = describe_audit(root)
    monkeypatch.setattr("tide.student_train.audit.MAX_VALUES", audit["targets"] * audit["support_tokens"] // 3)
    thinned = describe_audit(root)
    assert thinned["targets"] == audit["targets"]
    assert thinned["compared"] in [math.ceil(audit["targets"] / step) for step in (3, 4)]


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tide", "inspect-cache", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_a_table_json_and_a_page(root, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, str(root), "--audit")
    assert code == 0
    assert re.search(r"masked share +all +0 to 0\.2", out)
    assert "Gradients at unigram's logits against the dense loss: cosine / norm ratio" in out
    assert "stand-in" in out
    code, out, _ = run(monkeypatch, capsys, str(root), "--audit", "--json")
    audit = json.loads(out)
    assert audit["share"] == 0.3
    page = tmp_path / "page.html"
    code, _, _ = run(monkeypatch, capsys, str(root), "--audit", "--report", str(page))
    text = page.read_text()
    for temperature in ("1", "2"):
        assert f'id="plot-audit_kl_{temperature}"' in text
    kl = audit["students"][-1]["losses"][0]
    assert all(f'data-value="{value!r}"' in text for value in kl["cosine"]["by_bin"] if value is not None)


def test_without_an_audit_the_command_says_how_to_get_one(tiny_root, monkeypatch, capsys):
    plain = make_cache(tiny_root, "plain", tiny_config(tiny_root))
    code, _, err = run(monkeypatch, capsys, str(plain), "--audit")
    assert code == 65
    assert "this cache has no audit: dump again with --set signal.audit_share=0.001" in err
    code, _, err = run(monkeypatch, capsys, str(plain), "--student", "x")
    assert code == 2
    assert "--student is for --audit" in err


def test_an_audit_without_a_drawn_target_says_so(tiny_root):
    config = tiny_config(tiny_root, signal__audit_share=1e-9)
    with pytest.raises(CacheError, match="no target was drawn for the audit at signal.audit_share = 1e-09"):
        describe_audit(make_cache(tiny_root, "audited-nothing", config))
