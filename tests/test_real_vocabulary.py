"""The real vocabularies, 157k and 151k tokens, from GSM8K to a trained student, with memory bounded by the slice.

Models are random and small (32 wide, 2 layers), so whatever is large here is large because of the vocabulary. Every
tensor that an operation of the dump or of a training step makes is recorded: none is as large as [n, V].
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENIZERS = SHARED / "tokenizers"
NEEDED = [SHARED / "data" / "gsm8k_train.jsonl", TOKENIZERS / "llada2-shaped", TOKENIZERS / "qwen3"]
ABSENT = [str(path) for path in NEEDED if not path.exists()]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not part of the project, absent here: {', '.join(ABSENT)}")

TEACHER_VOCABULARY, STUDENT_VOCABULARY = 157_184, 151_936
SLICE_BYTES = 8 << 20

SCRIPT = f"""
import inspect, json, resource, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tide import open_cache
from tide.shared import sliced_head
from tide.shared.config import load_config
from tide.student_train.trainer import train_student
from tide.teacher_dump.dump import dump_teacher

for head in (sliced_head.top_logits, sliced_head.gather_at_targets):
    inspect.unwrap(head).__kwdefaults__["max_slice_bytes"] = {SLICE_BYTES}


class Largest(TorchDispatchMode):
    "Records the largest tensor with a vocabulary axis that is not the weight: its shape and bytes."

    def __init__(self):
        super().__init__()
        self.logits, self.slices = (0, ()), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {{}}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1:
                v = leaf.shape[-1]
                is_weight = leaf.numel() == 32 * v  # turned
                if v in ({TEACHER_VOCABULARY}, {STUDENT_VOCABULARY}) and not is_weight:
                    self.slices += 1
                    self.logits = max(self.logits, (leaf.numel() * leaf.element_size(), tuple(leaf.shape)))
        return out


root, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
report = {{}}
config = load_config("tide-hybrid", overrides=settings)
with Largest() as dump:
    dump_teacher(config, root / "cache")
cache = open_cache(root / "cache", verify="full")
totals = cache.manifest.totals
row = max(cache, key=lambda row: row.masked.sum())
text = cache.vocabulary().decode(row.x_0)
with Largest() as train:
    train_student(config, str(root / "cache"), root / "run")
print(json.dumps({{
    "masked": totals.masked_positions, "rows": totals.rows, "text": text,
    "targets": int(cache.index().num_targets.sum()), "chunks": int(cache.index().num_chunks.sum()),
    "vocab_size": cache.manifest.student.vocab_size, "support": cache.manifest.signal.support,
    "most_masked": max(int(row.masked.sum()) for row in cache),
    "dump": dump.logits, "train": train.logits, "slices": [dump.slices, train.slices],
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}}))
"""


def write_model(folder: Path, tokenizer: str, vocab_size: int) -> Path:
    """A folder with config.json and a real tokenizer; weights are random."""
    folder.mkdir()
    for file in (SHARED / "tokenizers" / tokenizer).iterdir():
        (folder / file.name).symlink_to(file)
    config = {
        "model_type": "a2d-qwen3", "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_random_weights(folder: Path) -> None:
    """A teacher needs weights: a dump never invents them."""
    from tide.shared.models.loading import load_model

    load_model(folder, random_seed=0).save_pretrained(folder)


def test_gsm8k_goes_through_dump_inspect_and_training_with_memory_bounded_by_the_slice(tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", "llada2-shaped", TEACHER_VOCABULARY)
    student = write_model(tmp_path / "student", "qwen3", STUDENT_VOCABULARY)
    save_random_weights(teacher)
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join((NEEDED[0]).read_text().splitlines(keepends=True)[:4]))
    settings = {
        "data.source": str(data), "data.max_length": 256, "teacher.path": str(teacher), "teacher.dtype": "float32",
        "student.path": str(student), "noise.views": 2, "noise.t_min": 0.5, "train.batch_size": 4, "train.steps": 2,
        "train.precision": "bf16",
    }  # fmt: skip
    strings = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(strings)], capture_output=True, text=True, timeout=220
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print({name: value for name, value in report.items() if name != "text"})

    assert report["rows"] == 8
    assert report["vocab_size"] == 151_670  # 151,669 entries and <|mask|>
    assert any(name in report["text"] for name in ("Natalia", "Weng", "Betty", "Julie"))
    assert 0.7 * report["chunks"] < report["targets"] < report["chunks"]  # mostly, not always, one token on each side
    # float32 logits of all masked positions of a batch would be this large; the bound is the slice
    whole = 4 * STUDENT_VOCABULARY * report["masked"] / 2
    assert whole > 10 * SLICE_BYTES
    assert report["slices"][0] > 10
    assert report["slices"][1] > 10
    for side in ("dump", "train"):
        num_bytes, shape = report[side]
        assert 0 < num_bytes <= SLICE_BYTES, f"{side}: a tensor {shape}"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["ce"] > 5
    assert {"kl", "calm"} <= set(lines[0])

    command = [sys.executable, "-m", "tide", "inspect-cache", str(tmp_path / "cache"), "--json"]
    inspected = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert inspected.returncode == 0, inspected.stderr
    json.loads(inspected.stdout)
