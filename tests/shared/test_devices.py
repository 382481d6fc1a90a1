"""Where things run: what is asked for, what is there, and a torch that is built for devices this machine lacks."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tide.shared import devices
from tide.shared.config import load_config
from tide.shared.devices import accelerators, process_device, process_devices
from tide.shared.errors import ConfigError
from tide.student_train import arms
from tide.student_train.audit import describe_audit
from tide.student_train.open_decoder import open_writer
from tide.student_train.processes import join, own_device
from tide.student_train.trainer import Run, run_identity, train_student
from tide.teacher_dump.dump import dump_teacher
from tide.teacher_dump.portable import planned_settings
from tiny_runs import make_cache, metrics, tiny_config

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int) -> None:
    """torch as it answers where it is built for `kind` and finds so many of them."""
    accelerator = None if kind is None else torch.device(kind)

    def current(check_available: bool = False) -> torch.device | None:
        return accelerator if count or not check_available else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    for name in (*devices.LOCAL_RANKS, *devices.LOCAL_SIZES, "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cuda_build(monkeypatch):
    """PyPI's torch for Linux on a machine without a GPU: it names `cuda`, and there is none."""
    pretend(monkeypatch, "cuda", 0)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


def test_a_cuda_build_without_a_gpu_runs_on_the_cpu(cuda_build, tiny_root, tmp_path):
    assert accelerators() == []
    assert process_device("auto", "train.device") == CPU
    config = tiny_config(tiny_root, "tide-hybrid", train__steps=2, train__log_every=1)
    threads = torch.get_num_threads()
    dump_teacher(config, tmp_path / "cache")
    torch.set_num_threads(threads)
    student = train_student(config, str(tmp_path / "cache"), tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2
    writer = open_writer(load_config(overrides=[f"student.path={student}"]))
    assert writer.decoder.model.device == CPU


def test_a_cuda_build_without_a_gpu_gives_the_same_cache(cuda_build, tiny_root, tmp_path):
    config = tiny_config(tiny_root, "tide-hybrid")
    threads = torch.get_num_threads()
    found = dump_teacher(config, tmp_path / "cache")
    torch.set_num_threads(threads)
    expected = make_cache(tiny_root, "of-this-machine", config) / "manifest.json"
    assert found.hash == dump_teacher(config, expected.parent).hash


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_ranks_take_devices_in_turn(monkeypatch, wanted):
    pretend(monkeypatch, "cuda", 3)
    for rank in range(7):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert process_device(wanted, "train.device") == torch.device("cuda", rank % 3)


def test_the_cpu_and_a_numbered_device_are_taken_where_there_are_others(monkeypatch):
    pretend(monkeypatch, "cuda", 3)
    assert process_device("cpu", "train.device") == CPU
    assert process_device("cuda:2", "train.device") == torch.device("cuda", 2)
    pretend(monkeypatch, "mps", 1)
    assert process_device("auto", "train.device") == torch.device("mps", 0)


@pytest.mark.parametrize(
    ("kind", "count", "wanted", "said"),
    [
        ("cuda", 0, "cuda", "teacher.device = 'cuda': this machine has cpu"),
        (None, 0, "mps", "teacher.device = 'mps': this machine has cpu"),
        ("cuda", 2, "cuda:2", "this machine has cpu, cuda:0, cuda:1"),
        ("cuda", 2, "mps", "this machine has cpu, cuda:0, cuda:1"),
        ("mps", 1, "cuda", "this machine has cpu, mps:0"),
    ],
)
def test_what_is_asked_for_and_absent_is_an_error_that_says_what_is_there(monkeypatch, kind, count, wanted, said):
    pretend(monkeypatch, kind, count)
    with pytest.raises(ConfigError, match=said):
        process_device(wanted, "teacher.device")


def test_hidden_gpus_are_explained(monkeypatch):
    pretend(monkeypatch, "cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES = '7' decides"):
        process_device("cuda", "train.device")


def test_several_devices_are_taken_side_by_side_and_a_number_names_one(monkeypatch):
    pretend(monkeypatch, "cuda", 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_devices("cuda", "teacher.device", count=2) == [torch.device("cuda", 2), torch.device("cuda", 3)]
    with pytest.raises(ConfigError, match="names one device, and 2 are asked for"):
        process_devices("cuda:1", "teacher.device", count=2)
    with pytest.raises(ConfigError, match="the CPU is one"):
        process_devices("cpu", "teacher.device", count=2)


def test_one_numbered_device_for_several_processes_is_refused(tiny_root, tmp_path, monkeypatch):
    config = tiny_config(tiny_root, "tide-hybrid", teacher__device="cuda:1", train__device="cuda:1")
    with pytest.raises(ConfigError, match=r"teacher.device = 'cuda:1' names one device, and 2 processes"):
        dump_teacher(config, tmp_path / "cache", num_workers=2)
    cache = make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"train.device = 'cuda:1' names one device, and 2 processes"):
        train_student(config, str(cache), tmp_path / "run")


@pytest.mark.parametrize(
    ("variable", "value"), [("LOCAL_RANK", "1"), ("SLURM_LOCALID", "1"), ("LOCAL_WORLD_SIZE", "2")]
)
def test_a_rank_beside_others_is_refused_a_numbered_device(monkeypatch, variable, value):
    pretend(monkeypatch, "cuda", 2)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"teacher.device = 'cuda:1' names one device, and 2 processes"):
        process_device("cuda:1", "teacher.device")


def test_a_launcher_that_was_told_the_cpu_is_obeyed_or_contradicted_aloud(monkeypatch):
    pretend(monkeypatch, "cuda", 2)
    assert own_device("auto", "train.device") == torch.device("cuda", 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device("auto", "train.device") == CPU
    with pytest.raises(ConfigError, match=r"train.device = 'cuda', and accelerate was told to use the CPU"):
        own_device("cuda", "train.device")


def test_several_processes_on_mps_are_refused_instead_of_training_apart(monkeypatch):
    pretend(monkeypatch, "mps", 1)
    assert own_device("auto", "train.device") == torch.device("mps", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert own_device("cpu", "train.device") == CPU
    with pytest.raises(ConfigError, match=r"2 processes cannot exchange tensors on mps"):
        own_device("auto", "train.device")


@pytest.fixture
def accelerate_state():
    """accelerate keeps the first device of a process; the test leaves it as it was."""
    state: Any = PartialState._shared_state
    saved = dict(state)
    yield state
    state.clear()
    state.update(saved)


def test_a_run_computes_where_its_setting_says_whatever_accelerate_chose_before(
    tiny_root, tmp_path, accelerate_state, monkeypatch
):
    """`meta` stands for a GPU that an earlier call of the same process used."""
    there = torch.device("meta")
    assert join(there).device == there
    seen = []
    original = Run.step
    monkeypatch.setattr(Run, "step", lambda run, *rest: (seen.append(run.device), original(run, *rest))[1])
    config = tiny_config(tiny_root, "tide-hybrid", train__steps=1, train__device="cpu")
    cache = make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid"))
    student = train_student(config, str(cache), tmp_path / "run")
    assert seen == [CPU]
    assert PartialState().device == there, "the caller's is back"
    overrides = [f"student.path={student}", "decoding.device=cpu"]
    assert open_writer(load_config(overrides=overrides)).decoder.model.device == CPU
    assert PartialState().device == CPU


def test_processes_that_have_met_keep_their_device(accelerate_state, monkeypatch):
    join(CPU)
    accelerate_state["distributed_type"] = DistributedType.MULTI_CPU
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert join(CPU).device == CPU
    with pytest.raises(ConfigError, match="exchanges tensors on cpu, and cuda:1 is asked for"):
        join(torch.device("cuda", 1))


def test_workers_of_a_comparison_see_one_gpu_each_before_cuda_looks(monkeypatch):
    """CUDA reads the variable once: whoever asks what is available first leaves all of them on the first GPU."""
    asked, seen = [], []
    monkeypatch.delattr(os, "setsid", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: asked.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(arms, "run_job", lambda job, out: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    threads = torch.get_num_threads()
    for wanted, expected in (("auto", "7"), ("cuda", "7"), ("cpu", "4,7"), ("cuda:1", "4,7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        job: Any = SimpleNamespace(config=load_config(overrides=[f"train.device={wanted}"]))
        arms._run(job, "out", 1, cast(Any, None))
        assert seen.pop() == expected
    torch.set_num_threads(threads)
    assert asked == []


def test_an_audit_asks_its_student_where_it_is_told(tiny_root):
    cache = make_cache(tiny_root, "audited-kl", tiny_config(tiny_root, "kl", shared=True, signal__audit_share=0.3))
    with pytest.raises(ConfigError, match=r"decoding.device = 'mps': this machine has cpu"):
        describe_audit(cache, student=str(tiny_root / "student"), device="mps")


@pytest.mark.parametrize("setting", ["train.device", "teacher.device", "decoding.device"])
@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", ""])
def test_what_is_no_device_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError, match=rf"{setting} = '{value}'"):
        load_config(overrides=[f'{setting}="{value}"'])


def test_a_device_decides_no_byte_of_a_plan_and_no_identity_of_a_run(tiny_root):
    here, there = (
        tiny_config(tiny_root, "tide-hybrid", teacher__device=device, train__device=device, decoding__device=device)
        for device in ("auto", "cpu")
    )
    assert planned_settings(here) == planned_settings(there)
    assert "device" not in planned_settings(here)["teacher"], "plans of earlier builds stay what they are"
    from tide import open_cache

    cache = open_cache(make_cache(tiny_root, "hybrid", tiny_config(tiny_root, "tide-hybrid")))
    assert run_identity(here, cache) == run_identity(there, cache)


def test_nothing_else_asks_torch_for_a_device(project_root, project_files):
    """Whoever asks elsewhere forgets that a build may name what this machine lacks."""
    asked = ("current_accelerator", "cuda.is_available", "accelerator.is_available", "accelerator.device_count")
    allowed = {Path("shared/devices.py"), Path("shared/doctor.py")}  # the doctor tells what torch says
    sources = [file for file in project_files if file.suffix == ".py" and file.parts[0] != "tests"]
    texts = {file: (project_root / file).read_text() for file in sources if file not in allowed}
    assert [f"{file}: {word}" for file, text in texts.items() for word in asked if word in text] == []


def test_the_doctor_says_what_torch_is_built_for_and_tries_every_device(monkeypatch):
    from tide.shared import doctor

    pretend(monkeypatch, "cuda", 0)
    (finding, *_) = doctor._machine_findings(doctor._machine())
    assert "this torch is built for cuda, and no such device can be used" in finding.what
    assert doctor._tried(torch, CPU) is None
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("meta")])
    (device,) = doctor._devices()
    assert device["error"]
    machine = {"devices": [device], "memory_bytes": None}
    assert [one.level for one in doctor._machine_findings(machine)] == ["error"]


@pytest.mark.slow
def test_the_demo_runs_under_a_cuda_build_without_a_gpu(tmp_path):
    """In a process of its own, with its workers and trainings; they inherit the pretence by sitecustomize."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'torch.accelerator': return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import importlib.util\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        load = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            load(module)\n"
        "            import torch\n"
        "            module.current_accelerator = lambda check_available=False: None if check_available else "
        "torch.device('cuda')\n"
        "            module.is_available = lambda: False\n"
        "            module.device_count = lambda: 0\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.accelerator.current_accelerator())"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "cuda"
    done = subprocess.run(
        [sys.executable, "-m", "tide", "demo", "--ci", "--out", str(tmp_path / "demo")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
