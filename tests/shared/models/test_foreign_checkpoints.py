"""What a stranger's checkpoint may steer: its files below the folder, known fields with sane values, no more."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tide import cli
from tide.shared.errors import DataError, printable
from tide.shared.models import load_model, read_config
from tide.shared.models.weight_files import weight_files
from tide.shared.shown_text import printable_logs
from tide.shared.tokens import load_tokenizer
from tide.teacher_dump.weights_record import weight_fingerprint
from tiny_runs import write_model

HUGE = 10**8


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("made") / "model", "student", seed=4)


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | changes))


def split(folder: Path, **named: object) -> dict[str, str]:
    """Store the weights in two files under a weight map; returns the map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_map(folder, where | named)
    return where


def write_map(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_weights_in_several_files_are_those_in_one(checkpoint):
    before = load_model(checkpoint).state_dict()
    split(checkpoint)
    after = load_model(checkpoint).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(weight_files(checkpoint)) == 2


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(checkpoint, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, blobs / f"b-{file.name}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"b-{file.name}")
    assert torch.equal(load_model(snapshot).lm_head.weight, load_model(checkpoint).lm_head.weight)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_refused_with_the_cure(checkpoint, name):
    (checkpoint / name).write_text("{}")
    for read in (load_model, read_config):
        with pytest.raises(DataError, match=r"holds an adapter .*merge_and_unload"):
            read(checkpoint)


def test_transformers_is_told_of_no_folder_so_it_finds_nothing_beside_the_weights(checkpoint, monkeypatch):
    """An adapter that appears after the check changes nothing, whatever packages are installed."""
    from tide.shared.models import a2d

    asked = []
    original = a2d.A2DQwen3LMHeadModel.from_pretrained.__func__
    monkeypatch.setattr(
        a2d.A2DQwen3LMHeadModel, "from_pretrained",
        classmethod(lambda cls, path, *a, **k: asked.append(path) or original(cls, path, *a, **k)),
    )  # fmt: skip
    load_model(checkpoint)
    assert asked == [None]


def test_another_safetensors_file_is_no_weight(checkpoint):
    before, fingerprint = load_model(checkpoint).state_dict(), weight_fingerprint(checkpoint)
    save_file({"model.norm.weight": torch.zeros(32)}, checkpoint / "optimizer-muon.safetensors")
    assert all(torch.equal(before[name], value) for name, value in load_model(checkpoint).state_dict().items())
    assert weight_fingerprint(checkpoint) == fingerprint


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (5, "weight_map: expected names"),
        ({}, "weight_map: expected names"),
        ({"lm_head.weight": 7}, "weight_map: expected names"),
        ({"lm_head.weight": "../elsewhere.safetensors"}, "plain name of a"),
        ({"lm_head.weight": "/etc/passwd"}, "plain name of a"),
        ({"lm_head.weight": "sub/a.safetensors"}, "plain name of a"),
        ({"lm_head.weight": "model.bin"}, "plain name of a"),
        ({"lm_head.weight": "absent.safetensors"}, "absent.safetensors: missing"),
        ({"lm_head.weight": "\x1b[2J"}, r"\\x1b\[2J: expected the plain name"),
    ],
)
def test_a_weight_map_that_cannot_be_meant_is_refused(checkpoint, weight_map, message):
    split(checkpoint)
    write_map(checkpoint, weight_map)
    with pytest.raises(DataError, match=message):
        load_model(checkpoint)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"weight_map": NaN}', "\xff"])
def test_a_weight_map_that_is_no_json_object_is_refused(checkpoint, text):
    split(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json: "):
        load_model(checkpoint)


def test_a_weight_map_and_files_that_contradict_each_other_are_refused(checkpoint):
    where = split(checkpoint)
    name, file = next(iter(where.items()))
    other = next(f for f in where.values() if f != file)
    write_map(checkpoint, where | {name: other})
    with pytest.raises(DataError, match=f"says of {re.escape(name)} another file"):
        load_model(checkpoint)
    write_map(checkpoint, {n: f for n, f in where.items() if n != name})
    with pytest.raises(DataError, match="another file than the one that holds it"):
        load_model(checkpoint)
    weights = load_file(checkpoint / other)
    save_file(weights | load_file(checkpoint / file), checkpoint / other, metadata={"format": "pt"})
    write_map(checkpoint, where)
    with pytest.raises(DataError, match="is stored twice"):
        load_model(checkpoint)


def test_weights_behind_a_link_that_leads_out_are_refused(checkpoint, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (checkpoint / "model.safetensors").rename(outside)
    (checkpoint / "model.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match="a link that leads out of the folder"):
        load_model(checkpoint)
    outside.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: missing"):
        load_model(checkpoint)


def test_two_sets_of_weights_are_refused(checkpoint, tmp_path):
    single = shutil.copy(checkpoint / "model.safetensors", tmp_path / "kept")
    split(checkpoint)
    shutil.copy(single, checkpoint / "model.safetensors")
    with pytest.raises(DataError, match="two sets of weights"):
        load_model(checkpoint)


def test_integers_are_no_weights(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    save_file(weights | {name: weights[name].to(torch.int8)}, checkpoint / "model.safetensors")
    with pytest.raises(DataError, match="weights stored as I8: expected floating-point"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_labels", HUGE), ("num_hidden_layers", 3_000_000), ("num_hidden_layers", 1000), ("hidden_size", 10**7),
        ("hidden_size", 34), ("vocab_size", 10**9), ("vocab_size", 5), ("intermediate_size", 4_000_000),
        ("num_attention_heads", 10**4), ("num_attention_heads", -2), ("num_attention_heads", 0),
        ("num_attention_heads", None), ("num_key_value_heads", 0), ("num_key_value_heads", 3), ("head_dim", 10**9),
        ("head_dim", 3), ("hidden_size", 0), ("vocab_size", -1), ("num_hidden_layers", "2"), ("head_dim", 16.5),
        ("intermediate_size", [64]), ("max_position_embeddings", 10**30), ("num_hidden_layers", True),
    ],
)  # fmt: skip
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(checkpoint, monkeypatch, field, value):
    change_config(checkpoint, **{field: value})
    monkeypatch.setattr(
        "tide.shared.models.a2d.A2DQwen3LMHeadModel.from_pretrained", lambda *_, **__: pytest.fail("it was built")
    )
    with pytest.raises(DataError, match=r"config\.json") as caught:
        load_model(checkpoint)
    assert field in str(caught.value) or "sizes" in str(caught.value)


def test_a_model_without_weights_is_no_larger_than_the_memory(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    change_config(checkpoint, hidden_size=1 << 18, intermediate_size=1 << 22, num_hidden_layers=64)
    with pytest.raises(DataError, match="there are none to read; random ones would take"):
        load_model(checkpoint, random_seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}), ("quantization_config", {"x": "y"}),
        ("compression_config", {"format": "pack"}), ("hidden_act", "nonsense"), ("hidden_act", 3), ("hidden_act", None),
        ("rope_scaling", {"rope_type": "evil"}), ("rope_scaling", {"type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear"}), ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": "four"}), ("rope_scaling", "linear"), ("rope_scaling", [1]),
        ("rope_scaling", {"full_attention": {"rope_type": "default"}}), ("rope_theta", -1.0), ("rope_theta", "x"),
        ("rope_parameters", {"rope_type": {"a": {"b": []}}}), ("pad_token_id", 10**9), ("pad_token_id", -7),
        ("pad_token_id", "x"), ("rms_norm_eps", -1.0), ("rms_norm_eps", "tiny"), ("attention_dropout", 7),
        ("layer_types", ["full_attention", "sliding_attention"]), ("layer_types", ["x", "y"]), ("layer_types", [[]]),
        ("eos_token_id", {"a": 1}), ("vocab_size", {"a": [1]}), ("attn_logit_softcapping", 50.0), ("logit_scale", 0.1),
        ("residual_multiplier", 0.2), ("clip_qkv", 8.0), ("tie_word_embeddings", "perhaps"),
        ("initializer_range", [0.02]),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_followed_is_one_message_that_names_the_file(checkpoint, field, value):
    change_config(checkpoint, **{field: value})
    with pytest.raises(DataError, match=r"config\.json") as caught:
        load_model(checkpoint)
    assert field.split("_")[0] in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(checkpoint, value):
    text = (checkpoint / "config.json").read_text().rstrip().removesuffix("}")
    (checkpoint / "config.json").write_text(f'{text}, "rms_norm_eps": {value}}}')
    with pytest.raises(DataError, match="is not JSON"):
        load_model(checkpoint)


def test_a_window_is_followed_where_no_layer_has_one_and_refused_where_one_has(checkpoint):
    before = load_model(checkpoint).state_dict()
    change_config(checkpoint, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert all(torch.equal(before[name], value) for name, value in load_model(checkpoint).state_dict().items())
    change_config(checkpoint, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(DataError, match=r"use_sliding_window = 8: some layers would see a window alone"):
        load_model(checkpoint)


def test_fields_that_steer_transformers_do_not_reach_it_and_notes_are_kept(checkpoint, tmp_path):
    change_config(
        checkpoint, transformers_weights="../x.safetensors", fusion_config={"a": 1}, to_dict=5, _private=1,
        torchscript=True, experts_implementation="x", attn_implementation="eager", my_note="made by me", embd_pdrop=0.0,
    )  # fmt: skip
    model = load_model(checkpoint)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["my_note"], saved["embd_pdrop"]) == ("made by me", 0.0)
    assert not {"transformers_weights", "fusion_config", "to_dict", "_private", "experts_implementation"} & saved.keys()


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"watermarking_config": {"x": 1}}', '{"cache_implementation": 5, "num_beams": "x"}', "NaN"]
)
def test_a_broken_generation_config_is_one_message(checkpoint, text):
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(DataError, match=r"generation_config\.json"):
        load_model(checkpoint)


def test_a_head_of_its_own_under_tied_embeddings_is_refused(checkpoint):
    change_config(checkpoint, tie_word_embeddings=True)
    weights = load_file(checkpoint / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": table.clone()}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_file(weights | {"lm_head.weight": table + 1}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="a head that differs from the embedding"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(checkpoint, name, kind, monkeypatch):
    (checkpoint / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(checkpoint / name)
    elif kind == "device":
        (checkpoint / name).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(checkpoint)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
    for read in (load_model, read_config, load_tokenizer):
        with pytest.raises(DataError, match=f"{re.escape(name)}: is a .*; expected a regular file"):
            read(checkpoint)


@pytest.mark.parametrize("name", ["\x1b]0;PWNED\x07\x1b[2Jx", "a\nDataError: b", "\u202eevil", "\x9b2J"])
def test_names_of_weights_do_not_act_on_the_terminal(checkpoint, name, capfd):
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {name: torch.zeros(1)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="unexpected weights: ") as caught:
        load_model(checkpoint)
    shown = f"{caught.value}{''.join(capfd.readouterr())}"
    assert name not in shown
    assert printable(name).replace("\n", "\\n") in shown
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: change_config(folder, hidden_act="\x1b[2Jnonsense"),
        lambda folder: change_config(folder, model_type="\x1b]0;PWNED\x07"),
        lambda folder: save_file(
            load_file(folder / "model.safetensors") | {"\x1b[2Jx": torch.zeros(1)}, folder / "model.safetensors"
        ),
    ],
)
def test_the_commands_end_with_65_and_one_message_that_cannot_act(checkpoint, monkeypatch, capfd, spoil):
    spoil(checkpoint)
    monkeypatch.setattr(sys, "argv", ["tide", "generate", "--student", str(checkpoint), "--max-new-tokens", "8", "Hi"])
    monkeypatch.setattr("logging._logRecordFactory", logging.getLogRecordFactory())  # put back afterwards
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code == DataError.exit_code
    assert said.startswith("DataError: ")
    assert "\x1b" not in said


def test_loggers_of_libraries_and_warnings_cannot_act_either(monkeypatch):
    monkeypatch.setattr("logging._logRecordFactory", logging.getLogRecordFactory())
    printable_logs()
    record = logging.getLogger("transformers").makeRecord("a", logging.WARNING, "f", 1, "%s", ("\x1b[2Jx",), None)
    assert record.getMessage() == "\\x1b[2Jx"


def test_the_fingerprint_covers_every_byte(tmp_path):
    """Files larger than any set of samples: each single changed byte is another fingerprint."""
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a": torch.zeros(3 << 20)}, folder / "model.safetensors")
    seen = {weight_fingerprint(folder)}
    size = (folder / "model.safetensors").stat().st_size
    for offset in (100_000, size // 2 + 12_345, size - 1):
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(offset)
            file.write(b"\x01")
        seen.add(weight_fingerprint(folder))
    assert len(seen) == 4


IMPORTS = {
    "tide first": "import tide; from transformers import AutoModelForCausalLM as A",
    "transformers first": "from transformers import AutoModelForCausalLM as A; import tide",
    "only begun": "import transformers; import tide; A = transformers.AutoModelForCausalLM",
    "a tokenizer before": (
        "import tide; from transformers import AutoTokenizer as T, AutoModelForCausalLM as A; "
        "T.from_pretrained(sys.argv[1])"
    ),
}


@pytest.mark.parametrize("order", IMPORTS)
def test_after_import_tide_the_auto_classes_open_a_student(made, order):
    program = f"import sys; {IMPORTS[order]}; print(type(A.from_pretrained(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", program, made], capture_output=True, text=True)
    assert done.stdout.split() == ["A2DQwen3LMHeadModel"], done.stderr


def test_import_tide_imports_neither_torch_nor_transformers():
    program = (
        "import sys, tide; print([n for n in ('torch', 'transformers', 'numpy', 'safetensors') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
