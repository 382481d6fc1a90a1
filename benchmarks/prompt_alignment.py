"""Does it matter where blocks begin at decoding time? And does the company in a batch? On the students of a demo.

In training, blocks count from a sample's first token, so a response begins inside one; the paper's sampler pads prompts
on the left until the answer begins a block. Both on the same held-out documents and the same students:

    bits per byte    of the clean document at t = 0.1 ... 0.9, same masks, blocks counted from either place (heldout.py)
    answers          greedy, against the document: exact matches, and the longest-match ratio of difflib
    --company        answers that differ between batches of 1 and 16, by precision; and between fp32 and bf16

Differences are paired by document; +- is their standard error over documents.

Run: python benchmarks/prompt_alignment.py demo [--documents 160] [--arms ce kl ...] [--company]; demo: of `tide demo`
"""

import argparse
import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tide.shared.attention import CLEAN, Labels, attention_mask
from tide.shared.cache import Cache, ViewRow, open_cache
from tide.shared.config import load_config
from tide.shared.noising import keyed_generator
from tide.shared.sliced_head import top_logits
from tide.student_train.heldout import T_GRID
from tide.student_train.open_answer import block_numbers
from tide.student_train.open_decoder import Writer, open_writer
from tide.student_train.open_student import vocabulary_weights
from tide.student_train.sampling import Request

ALIGNMENTS = ("training", "boundary")


@dataclass
class Answers:
    """Of one student in one alignment, by document."""

    bits: np.ndarray
    exact: np.ndarray
    ratio: np.ndarray
    ids: list[tuple[int, ...]]


def documents_of(cache: Cache, num: int) -> list[ViewRow]:
    """The first documents whose prompt ends inside a block: for the others both alignments are one."""
    rows = cache.rows(np.arange(0, len(cache), cache.manifest.noise["views"]))
    return [row for row in rows if row.prompt_tokens % cache.manifest.block_size][:num]


@torch.inference_mode()
def bits_per_byte(writer: Writer, document: ViewRow, num_bytes: np.ndarray) -> float:
    """Mean over t of bits per byte of masked tokens that spell text; NaN if none was masked."""
    x_0, length = document.x_0.astype(np.int64), len(document.x_0)
    block = block_numbers(document.prompt_tokens, writer.settings, writer.decoder.block_size, length)
    labels = Labels(
        torch.arange(2).flip(0).repeat_interleave(length)[None] + CLEAN,
        torch.from_numpy(np.tile(block, 2))[None], torch.arange(length).repeat(2)[None],
    )  # fmt: skip
    values = []
    for t in T_GRID:
        masked = keyed_generator(0, document.sample_id, "alignment", repr(t)).random(length) < t
        masked[: document.prompt_tokens] = False
        read = np.flatnonzero(masked & (x_0 != writer.decoder.reader.eos_id))
        if not len(read):
            continue
        x_t = np.where(masked, writer.decoder.reader.mask_id, x_0)
        hidden = writer.decoder.model.get_decoder()(
            input_ids=torch.from_numpy(np.concatenate([x_t, x_0]))[None], position_ids=labels.rank,
            attention_mask=attention_mask(labels, labels), use_cache=False,
        ).last_hidden_state[0, read]  # fmt: skip
        gold = torch.from_numpy(x_0[read])
        gold_logp = top_logits(hidden, vocabulary_weights(writer.decoder.model)[1], gold, k=0).gold_logp
        values.append(-float(gold_logp.double().sum()) / math.log(2) / num_bytes[x_0[read]].sum())
    return float(np.mean(values)) if values else math.nan


def measure(writer: Writer, documents: list[ViewRow], num_bytes: np.ndarray) -> Answers:
    """Everything of one student in one alignment."""
    reader = writer.decoder.reader
    generations = writer.decoder.generate(requests(documents), writer.settings, batch_size=16)
    wanted = [reader.text([i for i in row.x_0[row.prompt_tokens :] if i != reader.eos_id]) for row in documents]
    pairs = [(g.text, text) for g, text in zip(generations, wanted, strict=True)]
    return Answers(
        np.array([bits_per_byte(writer, row, num_bytes) for row in documents]),
        np.array([a == b for a, b in pairs], float),
        np.array([difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs]),
        [g.ids for g in generations],
    )


def requests(documents: list[ViewRow]) -> list[Request]:
    """The documents' prompts."""
    return [Request(row.x_0[: row.prompt_tokens].tolist()) for row in documents]


def company(writer: Writer, documents: list[ViewRow]) -> str:
    """How many answers depend on the batch, and on the precision."""
    answers = {}
    for precision in ("fp32", "bf16"):
        for size in (1, 16):
            settings = replace(writer.settings, precision=precision)
            done = writer.decoder.generate(requests(documents), settings, batch_size=size)
            answers[precision, size] = [g.ids for g in done]
    pairs = [(("fp32", 1), ("fp32", 16)), (("bf16", 1), ("bf16", 16)), (("fp32", 1), ("bf16", 1))]
    counts = [sum(a != b for a, b in zip(answers[x], answers[y], strict=True)) for x, y in pairs]
    return f"fp32 {counts[0]}, bf16 {counts[1]}, fp32 against bf16 {counts[2]} of {len(documents)} answers"


def shown(difference: np.ndarray) -> str:
    """Mean and standard error."""
    known = difference[~np.isnan(difference)]
    return f"{known.mean():+.4f} +- {known.std(ddof=1) / math.sqrt(len(known)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--arms", nargs="*", default=["ce", "kl", "tide-hybrid"])
    parser.add_argument("--company", action="store_true", help="also compare batches and precisions; takes longest")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = open_cache(arguments.demo / "heldout")
    documents = documents_of(cache, arguments.documents)
    num_bytes = np.array([len(token) for token in cache.vocabulary().token_bytes])
    runs = sorted(path.parent for path in (arguments.demo / "runs").glob("*/student"))
    runs = [run for run in runs if run.name.rsplit("-", 1)[0] in arguments.arms]
    print(f"{len(documents)} documents whose prompt ends inside a block of {cache.manifest.block_size}")
    print("student         alignment  bits/byte  exact  ratio   boundary - training: bits/byte, ratio")
    for run in runs:
        found = {}
        for alignment in ALIGNMENTS:
            config = load_config(None, None, [
                f"student.path={run / 'student'}", f"decoding.block_size={cache.manifest.block_size}",
                f"decoding.max_new_tokens={arguments.tokens}", f"decoding.prompt_alignment={alignment}",
            ])  # fmt: skip
            writer = open_writer(config)
            writer.decoder.block_size = cache.manifest.block_size
            found[alignment] = one = measure(writer, documents, num_bytes)
            more = ""
            if alignment == "boundary":
                first = found["training"]
                more = f"   {shown(one.bits - first.bits)}, {shown(one.ratio - first.ratio)}"
            print(
                f"{run.name:<15} {alignment:<10} {np.nanmean(one.bits):>9.3f} {int(one.exact.sum()):>6} "
                f"{one.ratio.mean():>6.3f}{more}", flush=True,
            )  # fmt: skip
        if arguments.company:
            print(f"{'':<15} batch 1 and 16 differ in: {company(writer, documents)}", flush=True)


if __name__ == "__main__":
    main()
