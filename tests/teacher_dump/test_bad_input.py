"""Bad input through the command line: one clear message, the exit code of shared/errors.py, nothing written or lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dump_checks import file_hashes, require_sound_files
from safetensors.torch import load_file, save_file
from tide import cli
from tide.shared.cache import read_manifest
from tide.shared.errors import OutputError
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.shard_task import ShardTask
from tide.teacher_dump.worker_records import read_records
from tiny_runs import settings, tiny_config

Tide = Callable[..., tuple[int, str, str]]
USAGE, BAD_DATA, IO = 2, 65, 74


@pytest.fixture
def tide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tide:
    """tide("plan", ...) -> exit code, stdout, stderr with its lines joined."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, re.sub(r"\s+", " ", err)

    return run


def options(root: Path, **more: object) -> list[str]:
    """Options of a small dump from the models and data below `root`."""
    chosen = settings(root, shards__samples_per_shard=2, noise__views=1, **more)
    return [text for item in chosen for text in ("--set", item)]


def refused(tide: Tide, root: Path, code: int, *message: str, **more: object) -> None:
    """dump-teacher and plan end with `code` and a message that holds every part; no file appears."""
    for command in ("dump-teacher", "plan"):
        out = root / f"refused by {command}"
        got, stdout, stderr = tide(command, *options(root, **more), "--out", out)
        missing = [part for part in message if part not in stderr]
        assert not missing, f"{missing} not in {stderr}"
        assert (got, stdout) == (code, "")
        assert "Traceback" not in stderr
        assert not out.exists()


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- data


def test_empty_data(tide, mine):
    (mine / "pairs.jsonl").write_text("")
    refused(tide, mine, BAD_DATA, "pairs.jsonl")


def test_missing_column(tide, mine):
    (mine / "pairs.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    refused(tide, mine, BAD_DATA, "pairs.jsonl", "text", "data.columns")


def test_column_that_the_configuration_names_wrongly(tide, mine):
    columns = {"prompt": "instruction", "response": "response"}
    refused(tide, mine, BAD_DATA, "data.columns", "instruction", **{"data.columns": columns})


def test_row_without_an_assistant_turn(tide, mine):
    """An error that names the row; with data.skip_bad it is left out and counted."""
    rows = [
        {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day to you"}]},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
    ]
    (mine / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(tide, mine, BAD_DATA, "pairs.jsonl", "line 2", "assistant", "data.skip_bad=true")
    code, out, _ = tide("dump-teacher", *options(mine, data__skip_bad=True), "--out", mine / "cache", "--json")
    assert code == 0
    assert json.loads(out)["samples"] == 1
    assert read_manifest(mine / "cache").dropped == {"no answer": 1}


def test_every_prompt_longer_than_the_maximum_length(tide, mine):
    more = {"data.max_length": 8, "data.teacher_max_length": 8}
    refused(tide, mine, BAD_DATA, "prompt longer than max length: 8", "data.max_length = 8", **more)


def test_data_that_do_not_exist(tide, mine):
    refused(tide, mine, BAD_DATA, "no such file or folder", "nowhere.jsonl", data__source=str(mine / "nowhere.jsonl"))


# --- tokenizers


def test_tokenizer_without_chat_template(tide, mine):
    (mine / "student" / "chat_template.jinja").unlink()
    refused(tide, mine, BAD_DATA, str(mine / "student"), "no chat template", "tokenizer_config.json")


def test_mask_that_is_a_token_of_the_text(tide, mine):
    refused(tide, mine, USAGE, "mask id", "already used by a token of the text", student__mask_token="a")


def test_tokenizer_without_mask_token(tide, mine):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = mine / "student" / name
        file.write_text(file.read_text().replace("<|mask|>", "<|other|>"))
    rewrite(mine / "student" / "tokenizer_config.json", mask_token=None)
    refused(tide, mine, USAGE, "gets id 512", "embeddings for 512 tokens", "tide convert")


def test_tokenizer_of_another_teacher(tide, mine):
    rewrite(mine / "teacher" / "config.json", vocab_size=900)
    refused(tide, mine, BAD_DATA, "vocabulary of 900 tokens")


# --- settings


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("student.block_size", 24, ["data.max_length = 64", "a multiple of student.block_size = 24"]),
        ("signal.top_k", 100_000, ["signal.top_k = 100000", "tokens of the loss support"]),
        ("signal.temperatures", [0.0, 1.0], ["signal.temperatures", "temperatures > 0"]),
        ("signal.temperatures", [-1.0], ["signal.temperatures", "temperatures > 0"]),
        ("noise.vews", 3, ["unknown setting 'noise.vews'", "did you mean 'views'"]),
        ("signal.kind", "topq", ["signal.kind = 'topq'", "'topk'"]),
        ("teacher.dtype", "bf16", ["teacher.dtype = 'bf16'", "bfloat16"]),
        ("noise.t_min", 0.0, ["noise.t_min", "0 < t_min"]),
    ],
)
def test_setting(tide, mine, setting, value, message):
    refused(tide, mine, USAGE, *message, **{setting: value})


def test_unknown_recipe(tide, mine):
    code, out, err = tide("dump-teacher", "--recipe", "tide-cros", *options(mine), "--out", mine / "cache")
    assert (code, out) == (USAGE, "")
    assert "did you mean 'tide-cross'" in err
    assert not (mine / "cache").exists()


# --- checkpoints


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_checkpoint_that_does_not_exist(tide, mine, side):
    missing = mine / "nowhere"
    refused(tide, mine, BAD_DATA, str(missing), "no such folder", **{f"{side}.path": str(missing)})


def test_teacher_of_unknown_architecture(tide, mine):
    rewrite(mine / "teacher" / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    refused(tide, mine, BAD_DATA, "model_type 'mamba' has no native class", "known: Dream, Fast_dLLM_Qwen", "specs.py")


def test_teacher_without_config(tide, mine):
    (mine / "teacher" / "config.json").unlink()
    refused(tide, mine, BAD_DATA, "no config.json")


def fails_at_the_weights(tide: Tide, root: Path, *message: str) -> None:
    """The plan needs no weights; dump-teacher names what is wrong with them, and no shard appears."""
    code, out, err = tide("dump-teacher", *options(root), "--out", root / "cache")
    missing = [part for part in message if part not in err]
    assert not missing, f"{missing} not in {err}"
    assert (code, out) == (BAD_DATA, "")
    files = {name for name, kind in file_hashes(root / "cache").items() if kind != "folder"}
    assert {name for name in files if not name.startswith("workers/")} == {"plan.json"}
    (record,) = read_records(root / "cache")  # `tide status` tells what happened
    assert all(part in (record[0].error or "") for part in message)


def test_missing_weights(tide, mine):
    file = mine / "teacher" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    fails_at_the_weights(tide, mine, "missing weights: model.layers.1.mlp.up_proj.weight")


def test_truncated_weights(tide, mine):
    file = mine / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails_at_the_weights(tide, mine, str(mine / "teacher"), "cannot be loaded", "fetch the checkpoint again")


def test_no_weights(tide, mine):
    (mine / "teacher" / "model.safetensors").rename(mine / "teacher" / "pytorch_model.bin")
    fails_at_the_weights(tide, mine, "no *.safetensors weights", "pickled weights are not read")


@pytest.mark.parametrize("model_type", ["a2d-qwen3", "llada2_moe_of_a_stranger"])
def test_code_in_a_checkpoint_is_never_executed(tide, mine, model_type):
    """auto_map in config.json and tokenizer_config.json names modules that would leave a file behind."""
    trap = mine / "trap"
    for side in ("teacher", "student"):
        for module in ("configuration_trap", "modeling_trap", "tokenization_trap"):
            (mine / side / f"{module}.py").write_text(f"open({str(trap)!r}, 'w').close()\nTrap = None\n")
        rewrite(
            mine / side / "config.json",
            auto_map={"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"},
            model_type=model_type if side == "teacher" else "a2d-qwen3",
        )
    code, _, err = tide("dump-teacher", *options(mine), "--out", mine / "cache")
    assert code == (0 if model_type == "a2d-qwen3" else BAD_DATA), err
    rewrite(mine / "student" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_trap.Trap"]})
    tide("dump-teacher", *options(mine), "--out", mine / "other")
    assert not trap.exists()


# --- the output folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk("size=1m") mounts a small file system; skips where this is not permitted."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(tide, mine, disk):
    """Exit code 74 at whatever file the space ends; what is finished stays; with more space the bytes are the same."""
    dump_teacher(tiny_config(mine, shards__samples_per_shard=2, noise__views=1), mine / "expected")
    expected = file_hashes(mine / "expected")
    size_kib = sum(p.stat().st_size for p in (mine / "expected").rglob("*")) // 1024
    folder, seen = disk("size=1m"), set()
    for free_kib in range(0, 4 * size_kib, 4):
        ballast = folder / "ballast"
        ballast.write_bytes(b"")
        with ballast.open("wb", buffering=0) as file:  # everything but `free_kib`
            space = os.statvfs(folder).f_bavail * 4096 - free_kib * 1024
            file.write(b"\0" * max(0, space))
        code, _, err = tide("dump-teacher", *options(mine), "--out", folder / "cache")
        done = require_sound_files(folder / "cache") if (folder / "cache").exists() else 0
        if code == 0:
            break
        assert code == IO, err
        assert "the disk is full" in err
        assert "same command" in err
        seen.add(done)
    assert code == 0
    assert len(seen) > 2, f"the space ended at the same point each time: {seen}"
    assert file_hashes(folder / "cache") == expected


def test_read_only_file_system(tide, mine, disk):
    folder = disk("ro")
    code, out, err = tide("dump-teacher", *options(mine), "--out", folder / "cache")
    assert (code, out) == (IO, "")
    assert "read-only; give a folder that can be written" in err


def test_file_system_that_becomes_read_only(tide, mine, monkeypatch):
    """In the middle of a dump; also where mounting is not permitted."""
    run, link, replace = ShardTask.run, os.link, os.replace

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    def stop_writing(self, root, shard, progress=lambda tokens: None):
        if shard == 2:
            monkeypatch.setattr(os, "replace", refuse)
        return run(self, root, shard, progress)

    monkeypatch.setattr(ShardTask, "run", stop_writing)
    code, _, err = tide("dump-teacher", *options(mine), "--out", mine / "cache")
    assert code == OutputError.exit_code
    assert "the file system is read-only" in err
    assert require_sound_files(mine / "cache") == 2
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(ShardTask, "run", run)
    assert link is os.link
    assert tide("dump-teacher", *options(mine), "--out", mine / "cache")[0] == 0
    dump_teacher(tiny_config(mine, shards__samples_per_shard=2, noise__views=1), mine / "expected")
    assert file_hashes(mine / "cache") == file_hashes(mine / "expected")
