"""What a distillation loss costs: step time and peak memory of each recipe against cross-entropy only.

Everything is measured in one run on one random student and one batch of synthetic views (prompt share one third, block
size 32, nine chunks in ten single tokens with top-16 targets). Variants are interleaved, round after round; the table
shows medians of CPU time and of the rounds' own ratios, so that a busy machine slows both sides of a ratio. What a
token-level loss adds is a few passes over each slice of logits, beside products that cost d times as much: the wider
the student (d = 1024 for Qwen3-0.6B), the smaller the share.

    step      forward, losses and backward; the optimiser costs the same for all and is left out
    memory    peak resident memory of two steps above what the process held before, each variant in its own forked
              child (so no variant profits from another's freed memory); gradients of the weights included
    naive     cross-entropy on the full [x_t, x_0] layout with logits of all 2 L positions, as the paper's code does

Run: python benchmarks/student_step.py [--quick] [--precision bf16]. Minutes on one core; --quick takes seconds;
--vocab 151936 --width 1024 is Qwen3-0.6B's head on 4 of its 28 layers.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tide.shared.attention import block_diffusion_mask
from tide.shared.cache import ViewRow
from tide.shared.config import LossConfig, NoiseConfig, TidalConfig
from tide.shared.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from tide.shared.noising import timesteps
from tide.student_train.batches import Batch, GlobalCounts, Item, collate, views_of
from tide.student_train.objective import Objective
from tide.student_train.student import Student

BLOCK, TOP_K, TEMPERATURES = 32, 16, (1.0, 2.0)
CE = LossConfig("ce")
RECIPES = {
    "ce": [CE],
    "hard label": [CE, LossConfig("kl", target="clean")],
    "kl, T = 1": [CE, LossConfig("kl")],
    "kl, T = 2": [CE, LossConfig("kl", temperature=2.0)],
    "tidal kl": [CE, LossConfig("kl", temperature=2.0, tidal=TidalConfig())],
    "calm": [CE, LossConfig("calm", temperature=2.0)],
    "reverse calm": [CE, LossConfig("calm", temperature=2.0, reverse=True)],
    "hybrid": [CE, LossConfig("kl"), LossConfig("calm", chunks="unmatched")],
}
Step = Callable[[], None]


def synthetic_view(number: int, length: int, vocab: int, t: float) -> ViewRow:
    """A view of random tokens: chunks of one token (with a target) or, one in ten, two."""
    rng, prompt = np.random.default_rng(number), length // 3
    x_0 = rng.integers(0, vocab - 1, length).astype(np.int32)
    sizes = np.where(rng.random(length) < 0.1, 2, 1)
    ends = prompt + np.cumsum(sizes)
    starts, ends = (ends - sizes)[ends <= length], ends[ends <= length]
    active = rng.random(len(starts)) < t
    starts, ends = starts[active].astype(np.int32), ends[active].astype(np.int32)
    masked = np.zeros(length, bool)
    for start, end in zip(starts, ends, strict=True):
        masked[start:end] = True
    target = starts[ends - starts == 1]
    logp = np.sort(rng.dirichlet(np.full(TOP_K + 1, 0.3), len(target))[:, :TOP_K] + 1e-6)[:, ::-1] * 0.9
    ids = rng.permuted(np.tile(np.arange(64), (len(target), 1)), axis=1)[:, :TOP_K]
    return ViewRow(
        f"s{number}", 0, t, x_0, prompt, masked[prompt:], starts, ends - starts,
        -rng.exponential(1.0, len(starts)).astype(np.float32), target,
        np.full(len(target), TOP_K, np.int32), ids.ravel().astype(np.int32),
        np.log(logp).ravel().astype(np.float32), np.tile(np.log([0.1, 0.6]), (len(target), 1)).astype(np.float32),
    )  # fmt: skip


def make_batch(num_samples: int, length: int, vocab: int) -> tuple[Batch, GlobalCounts, list[ViewRow]]:
    """One batch whose times are spread over (0, 1) as in training."""
    noise = NoiseConfig(views=num_samples)
    rows = [synthetic_view(i, length, vocab, float(timesteps(i, "", noise)[0])) for i in range(num_samples)]
    batch = collate(
        [views_of(Item(i, (0,)), [row], 0) for i, row in enumerate(rows)], mask_id=vocab - 1, block_size=BLOCK,
        top_k=TOP_K, temperatures=TEMPERATURES,
    )  # fmt: skip
    maskable = sum(len(row.masked) for row in rows)
    targets, chunks = len(batch.target), len(batch.chunk_logp)
    return batch, GlobalCounts(len(rows), len(rows), maskable, targets, chunks, chunks - targets), rows


def make_student(vocab: int, width: int, layers: int) -> Student:
    torch.manual_seed(0)
    config = A2DQwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        tie_word_embeddings=True, attn_implementation="sdpa", pad_token_id=None,
    )  # fmt: skip
    return Student(A2DQwen3LMHeadModel(config))


def recipe_step(student: Student, losses: list[LossConfig], batch: Batch, counts: GlobalCounts, bf16: bool) -> Step:
    """Forward, losses and backward of a recipe."""
    objective = Objective(losses, signal="topk", temperatures=TEMPERATURES)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = student(
                batch.rows, batch.read, batch.gold_ids, batch.target, batch.teacher.top_ids, objective.temperatures
            )
        objective.total(objective(output, batch, counts, progress=0.5)).backward()

    return step


def naive_step(student: Student, rows: list[ViewRow], bf16: bool) -> Step:
    """The same cross-entropy on [x_t, x_0] of 2 L tokens each, with logits everywhere."""
    x_0 = torch.from_numpy(np.stack([row.x_0 for row in rows])).long()
    masked = torch.from_numpy(np.stack([np.pad(r.masked, (r.prompt_tokens, 0)) for r in rows]))
    t = torch.tensor([row.t for row in rows])[:, None].expand_as(masked)
    length, vocab = x_0.shape[1], student.head_weight().shape[0]
    ids = torch.cat([torch.where(masked, vocab - 1, x_0), x_0], 1)
    position = torch.arange(length).repeat(2)[None].expand(len(rows), -1)
    mask = block_diffusion_mask(length, BLOCK)[None, None].expand(len(rows), -1, -1, -1)
    maskable = sum(len(row.masked) for row in rows)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = student.model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :length].float().transpose(1, 2), x_0, reduction="none")
        ((loss / t)[masked].sum() / maskable).backward()

    return step


def peak_bytes(step: Step) -> int:
    """Peak memory of two steps above the start, in a forked child whose peak counts from the fork on."""

    def child(result: "multiprocessing.connection.Connection") -> None:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        step()
        step()
        result.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    process = context.Process(target=child, args=(send,))
    process.start()
    peak = receive.recv()
    process.join()
    return peak


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step in every round, interleaved; a first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one variant's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not what it costs")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vocab, width, layers, samples, length = (2_000, 64, 1, 4, 96) if arguments.quick else (32_000, 512, 4, 4, 192)
    vocab, width = arguments.vocab or vocab, arguments.width or width
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    bf16 = arguments.precision == "bf16"
    student, (batch, counts, rows) = make_student(vocab, width, layers), make_batch(samples, length, vocab)
    steps = {name: recipe_step(student, losses, batch, counts, bf16) for name, losses in RECIPES.items()}
    steps["naive ce"] = naive_step(student, rows, bf16)
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = measure(steps, rounds)
    print(f"V = {vocab:,}, d = {width}, {layers} layers, {arguments.precision}, 1 thread, {rounds} rounds;")
    print(f"{samples} samples of {length} tokens, prompt 1/3; {len(batch.read)} masked, {len(batch.target)} targets")
    print(f"{'variant':<14} {'step':>9} {'against ce':>11} {'memory':>9} {'against ce':>11}")
    for name in steps:
        print(
            f"{name:<14} {statistics.median(seconds[name]) * 1e3:>6.0f} ms {ratio(seconds, name, 'ce'):>10.2f}x "
            f"{memory[name] / 2**20:>5.0f} MiB {memory[name] / memory['ce']:>10.2f}x"
        )
    print(
        f"ce against naive ce: {ratio(seconds, 'ce', 'naive ce'):.2f}x time (aim 0.5x), "
        f"{memory['ce'] / memory['naive ce']:.2f}x memory"
    )


if __name__ == "__main__":
    main()
