"""Rebuild what `tide demo` ships: two tokenizers that truly differ, and a small teacher.

    python examples/make_demo_assets.py tokenizers                        # seconds
    python examples/make_demo_assets.py teacher --out runs/demo-teacher   # about an hour on two cores

The teacher is trained by tide itself with recipes/demo-assets.yaml, on functions of the packages that constraints.txt
pins: it has not seen the standard library, which is what the demo distils and scores on. (A teacher that was trained
on the very functions it is asked about answers with the hard label, and a student gains nothing from it: docs/log.md.)
Run again, an interrupted training continues. Under `torchrun --nproc_per_node 2` both cores train one teacher.
Writes `recipes/demo_assets`.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

import typer
from tide.shared.errors import DataError
from tide.shared.stdlib_source import StdlibPair, module_pairs, stdlib_pairs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "recipes" / "demo_assets"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]

# The teacher keeps punctuation apart and words with the blank before them; the student cuts words at underscores and
# takes runs of punctuation together: chunks of many-to-one and one-to-many tokens both occur.
PATTERNS = {
    "teacher": r" ?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]|\s*[\r\n]+ *|\s+(?!\S)|\s+",
    "student": r" ?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+",
}
VOCABULARY = {"teacher": 1024, "student": 512}

# Both speak the demo's two-role template; the teacher's has its own tags, so prompts differ between the sides.
TEMPLATES = {
    "teacher": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n<|im_start|>{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "student": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}\n{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
}


def make_tokenizer(side: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PATTERNS[side]), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY[side] - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pair in stdlib_pairs("train") for text in (pair.prompt, pair.response)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", mask_token="<|mask|>"
    )
    fast.chat_template = TEMPLATES[side]
    return fast


def model_config(side: str, vocab_size: int) -> dict:
    """A Qwen3-shaped BD3LM: 3.4 M parameters for the teacher, 0.9 M for the student."""
    width, inter, heads = {"teacher": (256, 768, 4), "student": (128, 384, 2)}[side]
    return {
        "model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "vocab_size": vocab_size,
        "hidden_size": width, "intermediate_size": inter, "num_hidden_layers": 4, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "attention_bias": False, "initializer_range": 0.02,
    }  # fmt: skip


def package_pairs() -> Iterator[StdlibPair]:
    """Functions of the packages in constraints.txt, without repetitions and without what the standard library holds.

    A function is left out if its prompt or its response stands in the standard library, or if half of its longer lines
    do: backports and vendored copies.
    """
    standard = [*stdlib_pairs("train"), *stdlib_pairs("heldout")]
    seen = {text for pair in standard for text in (pair.prompt, pair.response)}
    standard_lines = {line for pair in standard for line in _long_lines(pair.response)}
    for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE):
        for file in sorted(importlib.metadata.files(name) or [], key=str):
            if file.suffix != ".py" or not {"tests", "test", "testing", "_vendor"}.isdisjoint(file.parts):
                continue
            try:
                pairs = module_pairs(".".join(file.with_suffix("").parts), Path(str(file.locate())))
            except DataError:  # templates and files for other Python versions
                continue
            for pair in pairs:
                lines = _long_lines(pair.response)
                copied = sum(line in standard_lines for line in lines) * 2 >= max(2, len(lines))
                if copied or pair.prompt in seen or pair.response in seen:
                    continue
                seen |= {pair.prompt, pair.response}
                yield pair


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= 25]


def train_teacher(out: Path) -> None:
    """Train the teacher from random weights and put it beside its tokenizer, in bfloat16."""
    from accelerate import PartialState
    from tide.shared.config import load_config
    from tide.shared.models import load_model
    from tide.student_train.trainer import train_student
    from tide.teacher_dump.dump import dump_teacher

    folder, start, corpus = ASSETS / "teacher", out / "start", out / "functions.jsonl"
    config_json = model_config("teacher", VOCABULARY["teacher"])
    config = load_config("demo-assets", overrides=[f"data.source={corpus}", f"student.path={start}"])
    with PartialState(cpu=True).main_process_first():
        if not (out / "corpus" / "manifest.json").exists():
            make_tokenizer("teacher").save_pretrained(start)
            (start / "config.json").write_text(json.dumps(config_json))
            rows = [json.dumps({"prompt": pair.prompt, "response": pair.response}) for pair in package_pairs()]
            corpus.parent.mkdir(parents=True, exist_ok=True)
            corpus.write_text("\n".join(rows) + "\n")
            print(f"{corpus}: {len(rows):,} functions")
            dump_teacher(config, out / "corpus")
    trained = train_student(config, str(out / "corpus"), out, report=print)
    if PartialState().is_main_process:
        load_model(trained, dtype="bfloat16").save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(config_json, indent=1) + "\n")


def main(what: str, out: Path = Path("runs/demo-teacher")) -> None:
    """Rebuild the `tokenizers` or the `teacher`."""
    if what == "teacher":
        train_teacher(out)
        return
    for side in VOCABULARY:
        folder = ASSETS / side
        tokenizer = make_tokenizer(side)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(model_config(side, len(tokenizer)), indent=1) + "\n")
        print(f"{folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    typer.run(main)
