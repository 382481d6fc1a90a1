"""Saved students open elsewhere, a run's folder is as good as its student, prompts that are no text are messages."""

import io
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from tide import cli
from tide.shared.config import load_config
from tide.shared.errors import ConfigError, DataError
from tide.shared.models import load_model
from tide.shared.tokenizer_setup import save_tokenizer, tokenizer_fingerprint
from tide.shared.tokens import TextEncoder, load_tokenizer
from tide.student_train.open_answer import rounded_quotas
from tide.student_train.open_decoder import open_writer
from tide.student_train.prompts import read_prompts
from tide.student_train.trainer import train_student
from tiny_runs import ASSETS, make_cache, tiny_config

NOT_TEXT = ["half \ud83d of a pair", b"a stray \xff byte".decode(errors="surrogateescape")]


@pytest.fixture(scope="module")
def run(tiny_root, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    config = tiny_config(tiny_root, "tide-hybrid", train__steps=2, train__save_every=1)
    out = tmp_path_factory.mktemp("run") / "run"
    train_student(config, str(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))), out)
    return out


def test_saved_tokenizers_have_no_field_that_transformers_4_refuses(run, tmp_path):
    described = json.loads((run / "student" / "tokenizer_config.json").read_text())
    assert not {"backend", "is_local", "local_files_only"} & described.keys()
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    shared = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "qwen3"
    for folder in [ASSETS / "student", *([shared] if shared.is_dir() else [])]:
        tokenizer = load_tokenizer(folder)
        out = tmp_path / folder.name
        save_tokenizer(tokenizer, out)
        again = load_tokenizer(out)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        assert sorted(again.all_special_tokens) == sorted(tokenizer.all_special_tokens)
        described = json.loads((out / "tokenizer_config.json").read_text())
        assert not isinstance(described.get("extra_special_tokens"), list)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transformers_4_57_reads_tokenizer_and_weights_of_a_finished_student(run, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pinned = ["torch==2.13.0", "transformers==4.57.6", "jinja2"]
    made = subprocess.run([python, "-m", "pip", "install", "-q", *pinned], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no registry answers here: {made.stderr[-300:]}")
    program = (
        "import sys, json, torch\n"
        "from transformers import AutoTokenizer, Qwen3ForCausalLM\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = Qwen3ForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = t('def area(width, height):')['input_ids']\n"
        "text = t.apply_chat_template(\n"
        "    [{'role': 'user', 'content': 'Hi'}], tokenize=False, add_generation_prompt=True)\n"
        "mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)\n"
        "logits = m(input_ids=torch.tensor([ids]), attention_mask=mask).logits\n"
        "print(json.dumps([ids, text, t.mask_token_id, logits[0].double().sum(1).tolist()]))\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", program, run / "student"], capture_output=True, text=True, env=clean
    )
    assert done.returncode == 0, done.stderr
    ids, text, mask_id, sums = json.loads(done.stdout.splitlines()[-1])
    tokenizer, model = load_tokenizer(run / "student"), load_model(run / "student")
    assert ids == tokenizer("def area(width, height):")["input_ids"]
    assert (text, mask_id) == (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True),
        tokenizer.mask_token_id,
    )
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0].double().sum(1)
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), expected, rtol=1e-4, atol=1e-2)


def test_load_model_takes_torchs_dtypes(run):
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_model(run / "student", dtype=dtype).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype = 'float64'"):
        load_model(run / "student", dtype=torch.float64)


def test_a_runs_folder_is_as_good_as_its_student(run):
    own, of_run = (open_writer(load_config(overrides=[f"student.path={path}"])) for path in (run / "student", run))
    assert own.encoder.fingerprint == of_run.encoder.fingerprint
    assert own.settings == of_run.settings


def test_an_unfinished_run_is_named_with_its_newest_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "half" / "checkpoints")
    with pytest.raises(DataError, match=r"not finished: .*step-00000002"):
        open_writer(load_config(overrides=[f"student.path={tmp_path / 'half'}"]))


@pytest.mark.parametrize("text", NOT_TEXT)
def test_prompts_that_are_no_text_are_refused_by_name(text):
    encoder = TextEncoder(load_tokenizer(ASSETS / "student"), block_size=8, max_length=64)
    for read in (encoder.encode_text, lambda t: encoder.encode_prompt([{"role": "user", "content": t}])):
        with pytest.raises(DataError, match="the prompt is not Unicode text at character"):
            read(text)


def test_bytes_that_are_no_text_on_standard_input_are_refused():
    stdin = io.TextIOWrapper(io.BytesIO(b"a \xff byte"), encoding="utf-8")
    with pytest.raises(DataError, match="standard input: cannot be read as text"):
        read_prompts([], None, stdin, seed=0)


@pytest.mark.parametrize("text", NOT_TEXT)
def test_the_command_ends_with_a_message(run, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["tide", "generate", "--student", str(run), "--max-new-tokens", "8", text])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == DataError.exit_code
    assert "not Unicode" in capsys.readouterr().err


def test_a_chat_goes_on_after_a_line_that_is_no_text(run):
    from tide.student_train.chat import Chat

    lines = iter([*NOT_TEXT, "Hi", "/quit"])
    notes: list[str] = []
    written: list[str] = []
    config = load_config(overrides=[f"student.path={run}", "decoding.max_new_tokens=8"])
    Chat(open_writer(config), ask=lambda: next(lines), write=written.append, note=notes.append).run()
    assert sum("not Unicode text" in note for note in notes) == 2
    assert written


def test_steps_fix_as_many_tokens_as_the_papers_code():
    """By hand: of 8 in 3 steps, round(8/3) = 3, round(5/2) = 2 (ties to even), 3."""
    assert rounded_quotas(8, 3) == (3, 2, 3)
    assert rounded_quotas(32, 32) == (1,) * 32
    assert rounded_quotas(10, 4) == (2, 3, 2, 3)
    for tokens in range(1, 40):
        for steps in range(1, tokens + 1):
            assert sum(rounded_quotas(tokens, steps)) == tokens
