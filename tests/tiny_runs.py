"""Small caches and students for tests: real tokenizers, random models of two layers, the real dump."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tide.shared.config import RunConfig, load_config
from tide.shared.models.loading import load_model
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.plan import read_plan, require_same_settings

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "demo_assets"
BLOCK = 8

PAIRS = [
    ("def area(width, height): compute the area", "    return width * height\n"),
    ("How many clips did she sell?", "48 / 2 = 24 clips, so 48 + 24 = 72 altogether."),
    ("import os: does the path exist?", "    try:\n        os.stat(path)\n    except OSError:\n        return False\n"),
    ("Say yes.", "yes"),
    ("class Queue: put an item", "    def put(self, item_value):\n        self.queue.append(item_value)\n"),
    ("Strip the prefix __init__", "    if name.startswith('__init__'):\n        return name[8:]\n    return name\n"),
    ("Grüße auf Deutsch?", "Schöne Grüße — bis später!"),
    ("def clamp(x, low, high)", "    return max(low, min(x, high))\n"),
]


def write_pairs(file: Path, num: int = len(PAIRS)) -> Path:
    """A JSONL data source of prompt/response pairs."""
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS[:num]))
    return file


def write_model(
    folder: Path, side: str, *, seed: int | None = 0, sharpness: float = 16.0, vocab_size: int | None = None
) -> Path:
    """A checkpoint folder with the tokenizer of one side of the demo.

    Args:
        seed: of random weights; None: config.json and tokenizer alone.
        sharpness: factor on the embedding (and head), so that distributions are far from uniform.
    """
    folder.mkdir(parents=True)
    for file in (ASSETS / side).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((ASSETS / side / "config.json").read_text())
    config |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": vocab_size or config["vocab_size"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if seed is not None:
        model = load_model(folder, random_seed=seed)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(sharpness)
        model.save_pretrained(folder)
    return folder


def settings(root: Path, *, shared: bool = False, **more: object) -> list[str]:
    """`--set` strings for the models and data below `root` (made on first use), on top of any recipe.

    Args: shared: the teacher has the student's tokenizer and reads the student's ids.
    """
    teacher, student, data = root / ("twin" if shared else "teacher"), root / "student", root / "pairs.jsonl"
    if not teacher.exists():
        write_model(teacher, "student" if shared else "teacher", seed=1)
    if not student.exists():
        write_model(student, "student", seed=2)
    if not data.exists():
        write_pairs(data)
    values = {
        "data.source": data, "data.columns": {}, "data.max_length": 64, "data.teacher_max_length": 96,
        "teacher.path": teacher, "teacher.dtype": "float32", "teacher.see": "student" if shared else "own",
        "teacher.mask_token": None, "teacher.eos_token": None,
        "student.path": student, "student.block_size": BLOCK, "student.mask_token": None, "student.eos_token": None,
        "signal.logp_dtype": "float32", "signal.logp_step": None, "signal.support": "shared",
        "train.precision": "fp32", "noise.views": 3, "train.batch_size": 4,
        **{name.replace("__", "."): value for name, value in more.items()},
    }  # fmt: skip
    return [f"{name}={json.dumps(str(v) if isinstance(v, Path) else v)}" for name, v in values.items()]


def make_cache(root: Path, name: str, config: RunConfig) -> Path:
    """Dump `root / name` in this process, once; torch's threads stay as they are."""
    if (root / name / "manifest.json").exists():
        require_same_settings(read_plan(root / name), config, root / name)  # another test's cache of the same name
    else:
        threads = torch.get_num_threads()
        dump_teacher(config, root / name)
        torch.set_num_threads(threads)
    return root / name


def tiny_config(root: Path, recipe: str | None = None, *, shared: bool = False, **more: object) -> RunConfig:
    """The configuration of `recipe` with the tiny models and data below `root`."""
    return load_config(recipe, overrides=settings(root, shared=shared, **more))


def hybrid(root: Path, **more: object) -> RunConfig:
    """tide-hybrid for six steps over two epochs; lines every 4 steps, a checkpoint every 2."""
    values = {"train__steps": 6, "train__log_every": 4, "train__save_every": 2}
    return tiny_config(root, "tide-hybrid", **{**values, "train__lr": 1e-2, "train__muon_lr": 1e-2, **more})


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(found: Path, expected: Path, tolerance: float) -> None:
    """Two runs agree in every number of every line of metrics, and in the student."""
    for line, other in zip(metrics(found), metrics(expected), strict=True):
        line.pop("tokens_per_s", None), other.pop("tokens_per_s", None)
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)
    tensors, others = (load_file(run / "student" / "model.safetensors") for run in (found, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=tolerance)
