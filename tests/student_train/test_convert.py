"""`tide convert`: the weights stay, a mask gets an embedding, and the result trains and loads elsewhere."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import CONFIGS
from safetensors.torch import load_file
from tide import cli
from tide.shared.errors import ConfigError, DataError
from tide.shared.models import load_model
from tide.shared.tokens import load_tokenizer
from tide.student_train.convert import convert_checkpoint
from tiny_runs import ASSETS, make_cache, tiny_config
from transformers import Qwen3ForCausalLM

SIZES = {k: v for k, v in CONFIGS["bd3lm"].items() if k not in ("model_type", "block_size")}


def write_autoregressive(folder: Path, model_type: str, *, vocab_size: int = 512, **more: Any) -> Path:
    """A random checkpoint of an autoregressive architecture with the demo's student tokenizer, mask token removed."""
    folder.mkdir(parents=True)
    for file in (ASSETS / "student").iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("mask_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = SIZES | {"model_type": model_type, "vocab_size": vocab_size} | more
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder, random_seed=0).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"model_type": model_type}))
    return folder


@pytest.mark.parametrize(("model_type", "name"), [("qwen3", "Qwen3"), ("qwen2", "Qwen2"), ("llama", "Llama")])
def test_weights_stay_and_the_names_are_those_of_dllm(tmp_path, model_type, name):
    source = write_autoregressive(tmp_path / "ar", model_type, vocab_size=576)
    made = convert_checkpoint(
        str(source), tmp_path / "student", block_size=16, mask_token="<|new mask|>", dtype="float32"
    )
    config = json.loads((made.folder / "config.json").read_text())
    assert config["model_type"] == f"a2d-{model_type}"
    assert config["architectures"] == [f"A2D{name}LMHeadModel"]
    assert config["block_size"] == 16
    assert config["mask_token_id"] == made.mask_id == 512  # the first id behind the tokenizer, in a padded row
    assert made.new_rows == 0
    before, after = (load_file(place / "model.safetensors") for place in (source, made.folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    tokenizer = load_tokenizer(made.folder)
    assert tokenizer.mask_token_id == 512
    assert "untrained" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_without_room_gets_rows_of_the_mean(tmp_path, tied):
    source = write_autoregressive(tmp_path / "ar", "qwen3", tie_word_embeddings=tied)
    made = convert_checkpoint(str(source), tmp_path / "student", mask_token="<|new mask|>", dtype="float32")
    assert (made.mask_id, made.new_rows) == (512, 64)
    before, after = (load_file(place / "model.safetensors") for place in (source, made.folder))
    for key in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert torch.equal(after[key][:512], before[key])
        torch.testing.assert_close(after[key][512:], before[key].mean(0).expand(64, -1))
    assert json.loads((made.folder / "config.json").read_text())["vocab_size"] == 576


def test_a_tokenizer_with_a_mask_keeps_it(tmp_path):
    source = write_autoregressive(tmp_path / "ar", "qwen3")
    made = convert_checkpoint(str(source), tmp_path / "student")
    assert made.mask_id == load_tokenizer(ASSETS / "student").mask_token_id == 511  # <|mask|> is in the vocabulary
    assert made.new_rows == 0


def test_the_result_trains_with_recipe_ce_and_loads_in_plain_transformers(tmp_path, tiny_root, monkeypatch, capsys):
    source = write_autoregressive(tmp_path / "ar", "qwen3")
    arguments = ["tide", "convert", str(source), "--out", str(tmp_path / "student"), "--block-size", "8", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = json.loads(capsys.readouterr().out)
    assert said["model_type"] == "a2d-qwen3"
    config = tiny_config(tiny_root, "ce", student__path=str(tmp_path / "student"), teacher__path="", train__steps=2)
    cache = make_cache(tmp_path, "cache", config)
    from tide.student_train.trainer import train_student

    trained = train_student(config, str(cache), tmp_path / "run")
    ours, plain = load_model(trained), Qwen3ForCausalLM.from_pretrained(trained)
    ids = torch.arange(16)[None]
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, attention_mask=everything).logits for model in (ours, plain)]
    assert torch.equal(*logits)


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path):
    source = write_autoregressive(tmp_path / "ar", "qwen3")
    out = tmp_path / "student"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "a2d-qwen3"}))
    with pytest.raises(DataError, match="model_type 'a2d-qwen3': expected an autoregressive checkpoint"):
        convert_checkpoint(str(source), out)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="already used by a token of the text"):
        convert_checkpoint(str(source), out, mask_token="e")
    with pytest.raises(DataError, match="--chat-template .*absent: cannot be read"):
        convert_checkpoint(str(source), out, chat_template=tmp_path / "absent")
    (source / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        convert_checkpoint(str(source), out)
    assert not out.exists()
    convert_checkpoint(str(source), out, chat_template=ASSETS / "student" / "chat_template.jinja")
    assert load_tokenizer(out).chat_template
    with pytest.raises(ConfigError, match="exists already"):
        convert_checkpoint(str(source), out)
