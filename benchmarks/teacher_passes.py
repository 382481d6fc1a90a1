"""What a sample costs the teacher: shared prefill and skipped blocks against one [x_t, x_0] forward per pass.

Ten views with CompDemo are up to 20 passes over a sample of L tokens. Naively each pass reads [x_t, x_0]: 40 L
token-forwards, with logits at all 2 L positions, as the paper's code does. Here x_0 is read once, a pass runs the
blocks that hold a masked token, and the head runs at the answers: L + the masked blocks. Random LLaDA2 (mixture of
experts) and WeDLM (causal by rank) models in float32; all ways answer the same passes, and the answers are compared.

    tokens    through the network, padding left out; counted, so they hold for a model of any size
    time      CPU time of one sample, medians of interleaved rounds, so that a busy machine slows both sides
    of head   against naive forwards with the head at the answers alone: what sharing and skipping save by themselves

Run: python benchmarks/teacher_passes.py [--quick]. Minutes on one core; --quick takes seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tide.shared.attention import AttentionPattern, attention_mask
from tide.shared.config import NoiseConfig
from tide.shared.models.llada2 import LLaDA2Config, LLaDA2MoeModelLM
from tide.shared.models.qwen_teachers import WeDLMConfig, WeDLMForCausalLM
from tide.shared.models.specs import TeacherSpec
from tide.shared.noising import draw_masks, masking_units, timesteps
from tide.shared.rows import clean_piece, join, noised_piece, stack
from tide.teacher_dump.teacher import Pass, Teacher
from tide.teacher_dump.views import passes
from torch import Tensor

BLOCK, VIEWS, TOP_K, TEMPERATURES = 32, 10, 16, (1.0, 2.0)
Way = Callable[[], Tensor]


def make_teacher(name: str, vocab: int, width: int, layers: int) -> Teacher:
    """A random model with the shape of the family: query groups, and for LLaDA2 a dense layer before the experts."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 64, "head_dim": 32,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "attn_implementation": "sdpa",
    }  # fmt: skip
    experts = {
        "num_experts": 64, "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": width // 4,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "LLaDA2":
        model = LLaDA2MoeModelLM(LLaDA2Config(**sizes, **experts))
    else:
        model = WeDLMForCausalLM(WeDLMConfig(**sizes))
    pattern = AttentionPattern(causal=name == "WeDLM")
    return Teacher(model, TeacherSpec(name, vocab, vocab - 1, vocab - 2, BLOCK, pattern))


def make_passes(length: int, vocab: int) -> tuple[np.ndarray, list[Pass]]:
    """One sample, a quarter of it prompt, and the CompDemo passes over its views; every token is a chunk."""
    x_0 = np.random.default_rng(0).integers(0, vocab - 2, length).astype(np.int32)
    starts = np.arange(length // 4, length)
    chunks = np.stack([starts, starts + 1, starts, starts + 1], axis=1)
    units = masking_units(chunks, length, length // 4, length, length // 4)
    noise, asked = NoiseConfig(views=VIEWS), []
    for view, t in enumerate(timesteps(0, "sample", noise)):
        for masked, _ in passes(draw_masks(units, float(t), "sample", view, noise), chunks):
            asked.append(Pass(0, masked, masked, masked))
    return x_0, asked


def shared(teacher: Teacher, x_0: np.ndarray, asked: list[Pass], per_forward: int) -> Way:
    """Prefill once, then the passes."""

    def run() -> Tensor:
        context = teacher.prefill([x_0], [max(teacher.last_block(one.masked) for one in asked)])
        parts = [asked[i : i + per_forward] for i in range(0, len(asked), per_forward)]
        answers = [teacher.score(context, part, k=TOP_K, temperatures=TEMPERATURES) for part in parts]
        return torch.cat([answer.gold_logp for answer in answers])

    return run


def naive(teacher: Teacher, x_0: np.ndarray, asked: list[Pass], per_forward: int, *, full_head: bool) -> Way:
    """[x_t, x_0] of every pass, all blocks, through the same mask factory."""
    spec, whole = teacher.spec, clean_piece(x_0, len(x_0), BLOCK)
    full = noised_piece(x_0, np.ones((1, len(x_0)), bool), mask_id=spec.mask_id, block_size=BLOCK).piece

    def rank(masked: np.ndarray) -> np.ndarray:
        order = np.lexsort((np.arange(len(masked)), masked, np.arange(len(masked)) // BLOCK))
        return np.argsort(order)

    @torch.inference_mode()
    def run() -> Tensor:
        kept = []
        for first in range(0, len(asked), per_forward):
            part = asked[first : first + per_forward]
            pieces = [
                full._replace(ids=np.where(one.masked, spec.mask_id, x_0).astype(np.int64), rank=rank(one.masked))
                for one in part
            ]
            rows = stack([join(piece, whole) for piece in pieces])
            mask = attention_mask(rows.labels, rows.labels, spec.attention)
            answered = torch.from_numpy(np.stack([one.answered for one in part]))
            hidden = teacher.model.get_decoder()(
                input_ids=rows.ids, position_ids=rows.position, attention_mask=mask, use_cache=False
            ).last_hidden_state
            if full_head:
                logits = (hidden @ teacher.head_weight.T)[:, : len(x_0)][answered]
            else:
                logits = hidden[:, : len(x_0)][answered] @ teacher.head_weight.T
            logp = logits.log_softmax(dim=1)
            logp.topk(TOP_K)
            for temperature in TEMPERATURES:
                (logp / temperature).logsumexp(dim=1)
            clean = torch.from_numpy(np.concatenate([x_0[one.answered] for one in part]).astype(np.int64))
            kept.append(logp.gather(1, clean[:, None])[:, 0])
        return torch.cat(kept)

    return run


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every way in every round, interleaved; the first round warms up and checks the answers."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        answers = {}
        for name, run in ways.items():
            start = time.process_time()
            answers[name] = run()
            if number:
                seconds[name].append(time.process_time() - start)
        for answer in answers.values():
            torch.testing.assert_close(answer, answers["naive"], atol=1e-4, rtol=0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it runs, not what it costs")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vocab, width, layers, length = (1_000, 64, 2, 128) if arguments.quick else (32_000, 256, 4, 512)
    rounds, per_forward = arguments.rounds or (1 if arguments.quick else 3), 4
    x_0, asked = make_passes(length, vocab)
    print(f"V = {vocab:,}, d = {width}, {layers} layers, float32, 1 thread, {rounds} rounds;")
    print(f"L = {length}, prompt L / 4, blocks of {BLOCK}, {VIEWS} views with CompDemo: {len(asked)} passes")
    print("teacher    tokens    naive   ratio    in L      time  of naive   of head")
    for name in ("LLaDA2", "WeDLM"):
        teacher = make_teacher(name, vocab, width, layers)
        ours = shared(teacher, x_0, asked, per_forward)
        ways = {
            "naive": naive(teacher, x_0, asked, per_forward, full_head=True),
            "head": naive(teacher, x_0, asked, per_forward, full_head=False),
            "ours": ours,
        }
        ours()
        tokens, all_tokens = teacher.num_token_forwards, 2 * length * len(asked)
        seconds = measure(ways, rounds)
        ratios = [
            statistics.median(a / b for a, b in zip(seconds["ours"], seconds[base], strict=True))
            for base in ("naive", "head")
        ]
        print(
            f"{name:<8} {tokens:>8,} {all_tokens:>8,} {tokens / all_tokens:>6.3f}x {tokens / length:>5.1f} L "
            f"{statistics.median(seconds['ours']):>7.2f} s {ratios[0]:>8.3f}x {ratios[1]:>8.3f}x"
        )


if __name__ == "__main__":
    main()
