"""The paper's two pairs at their real vocabularies: every recipe from GSM8K through dump and inspect to a student.

A LLaDA2 mixture of experts (157k tokens, own chat template) and a WeDLM (151k tokens, the student's own) in their
official layouts, two layers wide enough to run. The recipes keep their published token names, so the published ids are
checked; only the models, the data and the sizes differ from a real run.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from official_models import CONFIGS, naive_logits, spec_of, write_official
from tide import open_cache
from tide.shared.cache.inspect import describe_cache
from tide.shared.config import RunConfig, load_config, recipe_names
from tide.shared.errors import ConfigError
from tide.shared.models import load_model
from tide.student_train.trainer import train_student
from tide.teacher_dump.pairing import open_pairing
from tide.teacher_dump.plan import make_plan, planned_settings
from tiny_runs import make_cache, metrics

SHARED = Path(__file__).resolve().parents[2] / "shared"
GSM8K, TOKENIZERS = SHARED / "data" / "gsm8k_train.jsonl", SHARED / "tokenizers"
NEEDED = [GSM8K, TOKENIZERS / "llada2-shaped", TOKENIZERS / "qwen3"]
ABSENT = [str(path) for path in NEEDED if not path.exists()]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not part of the project, absent here: {', '.join(ABSENT)}")

FIRST = ("tide-cross",)
"""The others take as long each (loading tokenizers, mostly) and run with the slow tests."""
RECIPES = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
    for name in recipe_names() if not name.startswith("demo")
]  # fmt: skip
FLOAT16 = 2.0**-11
"""Relative rounding of the log-probabilities in a cache (signal.logp_dtype of the recipes)."""
TRAINED_T = {"noise.t_min": 0.3, "noise.t_max": 0.8}
"""Diffusion times that LLaDA2 was trained on; a plan warns of others."""
LLADA2, WEDLM, STUDENT = "LLaDA2.0-mini", "WeDLM-8B-Instruct", "Qwen3-0.6B-diffusion-bd3lm-v0.1"
"""Folders named as the recipes' own models, whose settings therefore hold."""
TEACHERS = {  # architecture, vocabulary, tokenizer
    LLADA2: ("llada2", 157_184, "llada2-shaped"),
    WEDLM: ("wedlm-8b", 151_936, "qwen3"),
}


def add_tokenizer(folder: Path, name: str) -> Path:
    for file in (TOKENIZERS / name).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both teachers, a student without weights and four problems."""
    root = tmp_path_factory.mktemp("real")
    for family, (architecture, vocab_size, tokenizer) in TEACHERS.items():
        folder = add_tokenizer(write_official(root / family, architecture, vocab_size=vocab_size), tokenizer)
        config = json.loads((folder / "config.json").read_text())
        del config["block_size"]  # the official files name none: both were trained with 32
        (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))  # so WeDLM's reads
    student = root / STUDENT
    student.mkdir()
    (student / "config.json").write_text(json.dumps({**CONFIGS["bd3lm"], "vocab_size": 151_936, "block_size": 32}))
    add_tokenizer(student, "qwen3")
    (root / "gsm8k.jsonl").write_text("".join(GSM8K.read_text().splitlines(keepends=True)[:4]))
    return root


def of_recipe(root: Path, name: str, **more: object) -> RunConfig:
    """A recipe with the models and data below `root`, and nothing else but sizes changed."""
    published = load_config(name).teacher.path
    family = next((family for family in TEACHERS if family in published), None)
    values = {
        "data.source": str(root / "gsm8k.jsonl"), "data.max_length": 256, "student.path": str(root / STUDENT),
        "noise.views": 2, "train.batch_size": 4, "train.steps": 2, "train.log_every": 1, "train.precision": "fp32",
        **({"teacher.path": str(root / family), "teacher.dtype": "float32"} if family else {}),
        **(TRAINED_T if family == LLADA2 else {}), **more,
    }  # fmt: skip
    return load_config(name, overrides=[f"{name}={json.dumps(value)}" for name, value in values.items()])


def cache_of(root: Path, config: RunConfig) -> Path:
    """The cache that a recipe makes; recipes that ask for the same one share it."""
    planned = json.dumps(planned_settings(config), sort_keys=True)
    return make_cache(root, hashlib.sha256(planned.encode()).hexdigest()[:16], config)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_at_the_real_vocabularies(root: Path, tmp_path: Path, name: str) -> None:
    config = of_recipe(root, name)
    cache = cache_of(root, config)
    described = describe_cache(cache)
    assert described["size"]["rows"] == 8
    assert any(name in json.dumps(described["sample"]) for name in ("Natalia", "Weng", "Betty", "Julie"))
    if config.teacher.path:
        spec = described["teacher"]["spec"]
        family = Path(config.teacher.path).name
        assert spec["block_size"] == 32
        assert (spec["mask_id"], spec["causal"]) == {
            LLADA2: (156895, False),
            WEDLM: (151665, True),
        }[family]
    train_student(config, str(cache), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 5 < line["ce"] < 200  # random logits over 151k tokens; w = 1/t
        assert all(np.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0


@pytest.mark.slow
def test_a_shared_vocabulary_cache_holds_what_one_naive_forward_says(root: Path) -> None:
    """WeDLM as trained: x_0 causal, x_t causal by rank; the recipe `kl` asks in one pass per view, here in the
    student's own ids."""
    cache = open_cache(cache_of(root, of_recipe(root, "kl", **{"teacher.see": "student"})))
    folder = root / WEDLM
    spec, model = spec_of(folder, "native", mask_id=151665, eos_id=151645), load_model(folder)
    assert spec.block_size == 32
    assert spec.attention.causal
    compared = 0
    for row in cache:
        masked = np.concatenate([np.zeros(row.prompt_tokens, bool), row.masked])
        logp = naive_logits(model, spec, row.x_0, masked).log_softmax(dim=1).numpy()
        expected = logp[row.target_position, row.x_0[row.target_position]]
        np.testing.assert_allclose(row.gold_logp, expected, atol=1e-4, rtol=FLOAT16)
        first = np.cumsum(row.num_top) - row.num_top
        kept = row.num_top > 0
        best = logp[row.target_position[kept], :151_646].max(axis=1)
        np.testing.assert_allclose(row.top_logp[first[kept]], best, atol=1 / 32 + 1e-4, rtol=0)  # signal.logp_step
        compared += len(expected)
    assert compared > 200


@pytest.mark.slow
@pytest.mark.parametrize("family", TEACHERS)
def test_asking_as_the_paper_does_is_another_cache(root: Path, family: str) -> None:
    """LLaDA2 without blocks, WeDLM bidirectional inside blocks: both differ from what the model was trained on."""
    name = {LLADA2: "tide-cross", WEDLM: "kl"}[family]
    native, paper = (
        open_cache(cache_of(root, of_recipe(root, name, **{"teacher.attention": attention})))
        for attention in ("native", "paper")
    )
    spec = paper.manifest.teacher.spec if paper.manifest.teacher else {}
    assert (spec["block_size"], spec["causal"]) == {LLADA2: (None, False), WEDLM: (32, False)}[family]
    for one, other in zip(native, paper, strict=True):
        assert np.array_equal(one.masked, other.masked)
        assert np.array_equal(one.chunk_start, other.chunk_start)
    first, second = (np.concatenate([row.chunk_logp for row in cache]) for cache in (native, paper))
    assert len(first) > 100
    assert (np.abs(first - second) > 0.01).mean() > 0.5


def test_wedlm_without_a_mask_token_takes_the_published_one(root: Path) -> None:
    """config.json says null and the tokenizer names none."""
    assert open_pairing(of_recipe(root, "kl", **{"teacher.mask_token": None})).spec.mask_id == 151665


def test_a_tokenizer_with_another_mask_id_is_refused(root: Path, tmp_path: Path) -> None:
    for file in (root / LLADA2).iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).symlink_to(file)
    described = json.loads((root / LLADA2 / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described | {"mask_token": "<|role_end|>"}))
    config = of_recipe(root, "tide-cross", **{"teacher.path": str(tmp_path), "teacher.mask_token": None})
    with pytest.raises(ConfigError, match=r"mask id is \d+, published llada2_moe checkpoints have 156895"):
        open_pairing(config)


def test_times_that_llada2_was_not_trained_on_are_warned_of(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"llada2_moe was trained on diffusion times in \[0\.3, 0\.8\]"):
        make_plan(of_recipe(root, "tide-cross", **{"noise.t_min": 0.001, "noise.t_max": 1.0}))


def test_edit_controls_of_a_tokenizer_are_dropped_before_caching(root: Path, tmp_path: Path) -> None:
    """LLaDA2.2 may answer "delete"; here that is the id of one of the tokenizer's unused special tokens."""
    for file in (root / LLADA2).iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    tokenizer = json.loads((root / LLADA2 / "tokenizer.json").read_text())
    control = next(token for token in tokenizer["added_tokens"] if "reserved" in token["content"])
    unused = control["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer).replace(json.dumps(unused), '"<|delete|>"'))
    plain, edits = (
        open_pairing(of_recipe(root, "tide-cross", **{"teacher.path": str(folder)}))
        for folder in (root / LLADA2, tmp_path)
    )
    assert plain.spec.drop_ids == ()
    assert edits.spec.drop_ids == (control["id"],)
    assert edits.teacher_facts()["spec"]["drop_ids"] == [control["id"]]
