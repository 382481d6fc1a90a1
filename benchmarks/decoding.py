"""What block-wise decoding costs: forwards, token-forwards and time, against the paper's schedule and against no cache.

One random student with the proportions of Qwen3 writes the same 256 tokens in three ways, in one run:

    tide       student_train/sampling.py: finished blocks once, in place, together with the next block's first step
    paper      the schedule of the paper's released sampler: before each block the prompt and all blocks again, with
               their logits; in each step a copy of the cache, the block's tokens and logits at all its positions
    no cache   the prompt and all blocks in every step, logits at the block

Token-forwards by hand, for P prompt tokens at a block boundary, B blocks of b tokens, s steps a block (S = B s):
    tide       P + S b + (B - 1) b
    paper      S b + sum over blocks i of (P + i b) = S b + B P + b B (B - 1) / 2
    no cache   s * sum over blocks i of (P + (i + 1) b)
Variants are interleaved, round after round; ratios are medians of the rounds' own ratios of CPU time. EOS is barred, so
all write to the end; tokens are compared. --steps 64 shows the schedule of four tokens a step.

Run: python benchmarks/decoding.py [--quick] [--tokens 256] [--steps N] [--prompt 96] [--batch 1]. Minutes on one core.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from tide.shared.config import DecodingConfig
from tide.shared.models.a2d import A2DQwen3Config, A2DQwen3LMHeadModel
from tide.student_train.answer_text import AnswerReader
from tide.student_train.sampling import Decoder, Request
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

BLOCK = 32


@dataclass
class Work:
    """What one way of decoding did."""

    forwards: int = 0
    token_forwards: int = 0
    head_tokens: int = 0
    ids: list[tuple[int, ...]] = field(default_factory=list)


def make_decoder(vocab: int, width: int, layers: int) -> Decoder:
    """Random weights, sharp enough that no two candidates tie; the last two ids are EOS, barred, and the mask."""
    config = A2DQwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64,
        tie_word_embeddings=True, max_position_embeddings=4096, attn_implementation="sdpa", pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = A2DQwen3LMHeadModel(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    spelt = [b"x"] * (vocab - 2) + [b"", b"<mask>"]
    return Decoder(model, AnswerReader(spelt, frozenset(), eos_id=vocab - 2, mask_id=vocab - 1), BLOCK)


def tide(decoder: Decoder, requests: list[Request], settings: DecodingConfig) -> Work:
    """The decoder as it is."""
    before = copy.copy(decoder.counts)
    results = decoder.generate(requests, settings, batch_size=len(requests))
    forwards = decoder.counts.forwards - before.forwards
    read = len(requests) * sum(  # logits at masked positions only
        size * steps - sum((steps - 1 - step) * quota for step, quota in enumerate(block_quotas(size, steps)))
        for size, steps in [(BLOCK, block_steps(settings))] * (settings.max_new_tokens // BLOCK)
    )  # fmt: skip
    return Work(forwards, decoder.counts.token_forwards - before.token_forwards, read, [g.ids for g in results])


def block_steps(settings: DecodingConfig) -> int:
    """Steps of each block."""
    return -(-(settings.steps or settings.max_new_tokens) // (settings.max_new_tokens // BLOCK))


def block_quotas(size: int, steps: int) -> list[int]:
    """Tokens that each step fixes."""
    return [size // steps + (step < size % steps) for step in range(steps)]


@torch.inference_mode()
def recomputing(decoder: Decoder, requests: list[Request], settings: DecodingConfig, *, cached: bool) -> Work:
    """The paper's schedule (`cached`), or none; prompts of one length that ends at a block boundary."""
    model, work, mask_id = decoder.model, Work(), decoder.reader.mask_id
    ids = torch.tensor([request.prompt_ids for request in requests])
    for _ in range(settings.max_new_tokens // BLOCK):
        length = ids.shape[1]
        ids = torch.cat([ids, torch.full((len(ids), BLOCK), mask_id)], 1)
        total = ids.shape[1]
        block = torch.arange(total) // BLOCK
        mask = (block[None] <= block[:, None]).expand(len(ids), 1, -1, -1)
        cache = DynamicCache(config=model.config)
        if cached:
            forward(model, work, ids[:, :length], 0, mask[:, :, :length, :length], cache, logits=length)
        for quota in block_quotas(BLOCK, block_steps(settings)):
            if cached:
                past = copy.deepcopy(cache)
                logits = forward(model, work, ids[:, length:], length, mask[:, :, length:], past, logits=BLOCK)
            else:
                logits = forward(model, work, ids, 0, mask, None, logits=BLOCK)
            logits[:, :, ~decoder.allowed] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            best = best.masked_fill(ids[:, length:] != mask_id, -1)
            for row in range(len(ids)):
                surest = best[row].sort(descending=True, stable=True).indices[:quota]
                ids[row, length + surest] = token[row, surest]
    work.ids = [tuple(row[len(r.prompt_ids) :].tolist()) for row, r in zip(ids, requests, strict=True)]
    return work


def forward(
    model: PreTrainedModel, work: Work, ids: Tensor, start: int, mask: Tensor, past: DynamicCache | None, *, logits: int
) -> Tensor:
    """One plain transformers forward; logits of the last positions."""
    work.forwards += 1
    work.token_forwards += ids.numel()
    work.head_tokens += len(ids) * logits
    position = torch.arange(start, start + ids.shape[1])[None].expand(len(ids), -1)
    return model(
        input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=past, use_cache=past is not None,
        logits_to_keep=logits,
    ).logits  # fmt: skip


def measure(ways: dict[str, Callable[[], Work]], rounds: int) -> tuple[dict[str, Work], dict[str, list[float]]]:
    """Work and CPU seconds of every way in every round, interleaved."""
    work: dict[str, Work] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            work[name] = way()
            seconds[name].append(time.process_time() - start)
    return work, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not what it costs")
    parser.add_argument("--tokens", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prompt", type=int, default=96, help="tokens; a multiple of 32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=8_000)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vocab, width, layers = (500, 128, 2) if arguments.quick else (arguments.vocab, arguments.width, arguments.layers)
    decoder = make_decoder(vocab, width, layers)
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, vocab - 2, arguments.prompt).tolist()) for _ in range(arguments.batch)]
    settings = DecodingConfig(max_new_tokens=arguments.tokens, steps=arguments.steps)
    ways: dict[str, Callable[[], Work]] = {
        "tide": lambda: tide(decoder, requests, settings),
        "paper": lambda: recomputing(decoder, requests, settings, cached=True),
        "no cache": lambda: recomputing(decoder, requests, settings, cached=False),
    }
    work, seconds = measure(ways, 1 if arguments.quick else arguments.rounds)
    written = arguments.tokens * arguments.batch
    print(
        f"V = {vocab:,}, d = {width}, {layers} layers, float32, 1 thread; {arguments.batch} x {arguments.tokens} tokens"
    )
    print(f"in {block_steps(settings)} steps a block of {BLOCK}, prompt {arguments.prompt}; per written token:")
    print(f"{'way':<10} {'forwards':>9} {'tokens':>8} {'at the head':>12} {'time':>9} {'tide is':>9}  same tokens")
    for name, one in work.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["tide"], strict=True))
        same = sum(a == b for a, b in zip(one.ids, work["tide"].ids, strict=True))
        print(
            f"{name:<10} {one.forwards / written:>9.3f} {one.token_forwards / written:>8.1f} "
            f"{one.head_tokens / written:>12.1f} {statistics.median(seconds[name]) / written * 1e3:>6.1f} ms "
            f"{ratio:>8.2f}x  {same} of {len(one.ids)}"
        )


if __name__ == "__main__":
    main()
