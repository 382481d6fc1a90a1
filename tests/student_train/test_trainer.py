"""The training loop: gradients of one step, what a run writes and leaves alone, what it refuses."""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tide.shared.cache import open_cache
from tide.shared.config import LossConfig, RunConfig, TrainConfig
from tide.shared.errors import CacheMismatch, ConfigError, OutputError, TideError, TryAgain, Unavailable
from tide.student_train import processes
from tide.student_train.processes import own_accelerator_state
from tide.student_train.trainer import Run
from tiny_runs import make_cache, tiny_config

STEP = 3


def gradient(config: RunConfig, cache: Path, *, items: list | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradient of one global batch."""
    with own_accelerator_state():
        run = Run(config, open_cache(cache), cache / "unused")
        if items is not None:
            run.order.items = lambda step: items
        run.student.train()
        values = run.gradient(STEP, *run.build(STEP))
    return {**values, **{n: p.grad for n, p in run.student.named_parameters() if p.grad is not None}}


def assert_same_gradient(found: dict, expected: dict, tolerance: float) -> None:
    """Losses and gradient, each relative to the norm of the whole."""
    assert found.keys() == expected.keys()
    difference = math.sqrt(sum(float((found[n] - expected[n]).square().sum()) for n in found))
    assert difference <= tolerance * math.sqrt(sum(float(g.square().sum()) for g in expected.values()))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_one_batch(tiny: SimpleNamespace, micro_batch_size: int) -> None:
    whole = gradient(tiny.config(), tiny.cache)
    parts = gradient(tiny.config(train__micro_batch_size=micro_batch_size), tiny.cache)
    assert_same_gradient(parts, whole, 1e-6)  # float32, other order of sums


def test_buckets_give_one_gradient_however_a_batch_is_cut(tiny: SimpleNamespace) -> None:
    kept = {"signal__tail_buckets": [40, 150], "signal__top_k": 4}
    cache = make_cache(tiny.root, "tails", tiny.config(**kept))
    whole = gradient(tiny.config(), cache)
    assert float(whole["kl"]) != 0
    in_parts = gradient(tiny.config(train__micro_batch_size=1), cache)
    assert_same_gradient(in_parts, whole, 1e-6)  # float32, other order of sums
    reverse = tiny.config(losses__1__reverse=True)
    assert float(gradient(reverse, cache)["reverse_kl"]) > 0
    with pytest.raises(ConfigError, match=r"max_top_k = 2: this cache's tails are cut"):
        gradient(tiny.config(train__max_top_k=2), cache)


def test_many_buckets_come_nearer_to_the_dense_gradient_than_one_bucket(tiny: SimpleNamespace) -> None:
    """The dense gradient is that of a cache which keeps every token of the loss support."""
    support = int((open_cache(tiny.cache).vocabulary().teacher_id >= 0).sum())
    kinds = {
        "dense": {"signal__top_k": support}, "bucket": {"signal__top_k": 2},
        "buckets": {"signal__top_k": 2, "signal__tail_buckets": list(range(2, 500, 2))},
    }  # fmt: skip
    only_kl = [LossConfig("kl", temperature=2.0)]
    found = {}
    for name, kept in kinds.items():
        cache = make_cache(tiny.root, f"tail-{name}", tiny.config(**kept))
        values = gradient(replace(tiny.config(), losses=tuple(only_kl)), cache)
        parameters = [value.flatten() for key, value in values.items() if value.dim() > 0]
        found[name] = torch.cat(parameters)
    errors = {name: float((g - found["dense"]).norm() / found["dense"].norm()) for name, g in found.items()}
    assert errors["buckets"] < 0.7 * errors["bucket"]  # pairs of ids: within one, the student's own share counts


def test_views_that_share_a_row_give_the_gradient_of_rows_of_their_own(tiny: SimpleNamespace) -> None:
    config = tiny.config(train__views_per_row=3)
    together = Run(config, open_cache(tiny.cache), tiny.out).order.items(STEP)
    assert all(len(item.views) == 3 for item in together)
    apart = [item._replace(views=(view,)) for item in together for view in item.views]
    assert_same_gradient(gradient(config, tiny.cache), gradient(config, tiny.cache, items=apart), 1e-6)


def test_gradient_checkpointing_changes_no_gradient(tiny: SimpleNamespace) -> None:
    plain = gradient(tiny.config(), tiny.cache)
    assert_same_gradient(gradient(tiny.config(train__gradient_checkpointing=True), tiny.cache), plain, 1e-7)


def test_bf16_is_near_fp32_and_keeps_float32_weights(tiny: SimpleNamespace) -> None:
    full = gradient(tiny.config(train__precision="fp32"), tiny.cache)
    half = gradient(tiny.config(train__precision="bf16"), tiny.cache)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert_same_gradient(half, full, 5e-2)  # bf16 has 8 bits
    assert not torch.equal(half["loss"], full["loss"])


def test_a_view_without_a_mask_trains(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(noise__t_min=1e-6, noise__t_max=1e-6, noise__views=1)
    cache = make_cache(tiny.root, "unmasked", config)
    assert all(not row.masked.any() for row in open_cache(cache))
    tiny.train(replace(config, train=replace(config.train, steps=2)), cache=cache)
    assert [line["loss"] for line in tiny.metrics(tiny.out)] == [0.0]


def test_the_gradient_is_clipped_and_its_norm_logged_before(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []

    def record(self: torch.optim.AdamW) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    tiny.train(tiny.config(train__grad_clip=0.25, train__log_every=1, train__steps=2))
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)
    assert all(line["grad_norm"] > 0.5 for line in tiny.metrics(tiny.out))


def test_the_learning_rate_is_transformers_cosine_with_warm_up(tiny: SimpleNamespace) -> None:
    tiny.train(tiny.config(train__log_every=1, train__lr=0.1, train__warmup_ratio=1 / 3, train__optimizer="muon"))
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]  # 2 of 6 steps warm up
    assert [line["lr"] for line in tiny.metrics(tiny.out)] == pytest.approx([0.0, 0.05, *(0.1 * c for c in cosine)])


def test_training_never_opens_the_teacher(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Once with every opened path recorded, once with the teacher's files deleted, in a process of its own."""
    script = f"""
import shutil, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tiny_runs import make_cache, tiny_config
root = Path({str(tmp_path)!r})
config = tiny_config(root, "tide-hybrid", train__steps=2)
opened, events = [], ("open", "os.listdir", "os.scandir")
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in events else None)
cache = make_cache(root, "cache", config)
touched = [path for path in opened if "/teacher" in path.removeprefix(str(root))]
assert any("/teacher/" in path for path in touched), "the hook works"
opened.clear()
from tide.student_train.trainer import train_student
train_student(config, str(cache), root / "first")
assert any("/student/" in path for path in opened)
touched = [path for path in opened if str(root / "teacher") in path]
assert not touched, touched
shutil.rmtree(root / "teacher")
train_student(config, str(cache), root / "second")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert (tmp_path / "first/student/model.safetensors").read_bytes() == (
        tmp_path / "second/student/model.safetensors"
    ).read_bytes()


def test_two_trainings_in_one_process_share_no_state(tiny: SimpleNamespace, tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    mine = Accelerator(mixed_precision="no")
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    tiny.train(tiny.config(train__precision="bf16"), tmp_path / "half")
    tiny.train(tiny.config(train__precision="fp32"), tmp_path / "full")
    tiny.train(tiny.config(train__precision="bf16"), tmp_path / "again")
    tiny.assert_same_run(tmp_path / "half", tmp_path / "again")
    assert mine.mixed_precision == "no"
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGTERM) == handler
    AcceleratorState._reset_state()


def test_a_line_of_metrics_holds_every_loss_by_name_as_the_mean_of_its_window(tiny: SimpleNamespace) -> None:
    seen = []
    tiny.train(tiny.config(), report=seen.append)
    lines = tiny.metrics(tiny.out)
    assert lines == seen
    assert [(line["step"], line["epoch"]) for line in lines] == [(4, 2.0), (6, 3.0)]
    assert set(lines[0]) == {"step", "epoch", "ce", "kl", "calm", "loss", "grad_norm", "lr", "tokens_per_s"}
    tiny.train(tiny.config(train__log_every=1), tiny.out.with_name("fine"))
    fine = tiny.metrics(tiny.out.with_name("fine"))
    for name in ("ce", "kl", "calm", "loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(sum(line[name] for line in fine[:4]) / 4)
    assert all(line["loss"] == pytest.approx(line["ce"] + line["kl"] + line["calm"]) for line in fine)


def test_tensorboard_shows_the_same_numbers(tiny: SimpleNamespace) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tiny.train(tiny.config(train__report_to=["tensorboard"]))
    events = reader.EventAccumulator(str(tiny.out / "tide"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [
        (line["step"], pytest.approx(line["kl"])) for line in tiny.metrics(tiny.out)
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_an_error_with_the_command_that_installs_it(
    tiny: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tide.student_train.metrics.importlib.util.find_spec", lambda package: None)
    with pytest.raises(Unavailable, match=f"pip install {name}"):
        tiny.train(tiny.config(train__report_to=[name]))


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_is_overwritten(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.losses

    def losses(self: Run, batch: object, counts: object, step: int) -> dict:
        values = original(self, batch, counts, step)
        return {name: value * math.nan if step == 4 else value for name, value in values.items()}

    monkeypatch.setattr(Run, "losses", losses)
    with pytest.raises(TideError, match=r"diverged: .*loss.*lower train.lr"):
        tiny.train(tiny.config())
    assert sorted(path.name for path in (tiny.out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_student_in_the_run_folder_is_not_overwritten(tiny: SimpleNamespace) -> None:
    own = tiny.out / "student"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="was not written by tide train-student"):
        tiny.train(tiny.config())
    with pytest.raises(ConfigError, match="lie in each other"):
        tiny.train(tiny.config(student__path=own))
    assert (own / "config.json").read_text() == "{}"


def test_a_run_folder_that_cannot_be_written_is_an_output_error(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        tiny.train(tiny.config(), tmp_path / "file" / "run")


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match=r"train.batch_size = 4 is not a multiple of the 3 processes"):
        tiny.train(tiny.config())


def test_a_model_without_room_for_the_mask_id_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from tiny_runs import write_model

    small = write_model(tmp_path / "small", "student", vocab_size=511)
    with pytest.raises(ConfigError, match="has 511 embeddings.*mask id 511"):
        tiny.train(tiny.config(student__path=small))


def test_pickled_weights_are_not_taken_for_none(tiny: SimpleNamespace, tmp_path: Path) -> None:
    from tide.shared.errors import DataError
    from tiny_runs import write_model

    pickled = write_model(tmp_path / "pickled", "student", seed=None)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no .*safetensors"):
        tiny.train(tiny.config(student__path=pickled))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"student__path": ""}, ConfigError, "student.path is empty"),
        ({"student__block_size": 4}, CacheMismatch, "block_size 8, student.block_size gives 4"),
        ({"student__eos_token": "<|endoftext|>"}, CacheMismatch, "eos_token"),
        ({"losses": [{"name": "kl", "temperature": 4.0}]}, ConfigError, "losses.kl.temperature = 4.0.*1.0, 2.0"),
        ({"losses": []}, ConfigError, "at least one loss"),
    ],
)
def test_settings_that_do_not_fit_the_cache_are_refused(
    tiny: SimpleNamespace, changed: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.train(tiny.config(**changed))
    assert not tiny.out.exists()


def test_a_cache_for_another_tokenizer_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(CacheMismatch, match="was dumped for student tokenizer"):
        tiny.train(tiny.config(student__path=tiny.root / "teacher"))


def test_losses_that_the_cache_cannot_serve_are_refused(tiny: SimpleNamespace) -> None:
    chunk = make_cache(tiny.root, "chunk", tiny_config(tiny.root, "tide-cross"))
    clean = make_cache(tiny.root, "clean", tiny_config(tiny.root, "ce", teacher__path=""))
    with pytest.raises(ConfigError, match="losses.kl needs token-level targets.*signal.kind=topk"):
        tiny.train(tiny.config(), cache=chunk)
    with pytest.raises(ConfigError, match="losses.calm needs the teacher's chunks"):
        tiny.train(tiny.config(losses=[{"name": "calm"}]), cache=clean)


def test_an_incomplete_or_damaged_cache_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    import shutil

    from tide.shared.errors import CacheError

    copy = shutil.copytree(tiny.cache, tmp_path / "cache")
    shard = next((copy / "data").iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(CacheError, match=shard.name):
        tiny.train(tiny.config(), cache=copy)
    shard.unlink()
    with pytest.raises(CacheError, match=f"{shard.name}.*missing"):
        tiny.train(tiny.config(), cache=copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is incomplete"):
        tiny.train(tiny.config(), cache=copy)
    with pytest.raises(CacheError, match="no such folder"):
        tiny.train(tiny.config(), cache=tmp_path / "nowhere")
    assert not tiny.out.exists()


@pytest.mark.parametrize(
    ("said", "kind"), [("Gloo connectFullMesh failed: timed out", TryAgain), ("a bug", RuntimeError)]
)
def test_processes_that_do_not_meet_can_be_tried_again(tmp_path: Path, monkeypatch, said: str, kind: type) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(processes, "Accelerator", fail)
    with pytest.raises(kind, match=said.split(":")[0]):
        processes.join_processes(TrainConfig(), tmp_path)
