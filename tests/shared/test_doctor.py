"""`tide doctor` on machines that lack something, made up one at a time."""

import importlib.metadata
import json
import os
import sys
import warnings

import pytest
import torch
from dump_checks import without_links_and_folder_fsync
from tide import cli
from tide.shared import devices, doctor

NOTHING = {"devices": [], "memory_bytes": None}


@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    """No token, no offline switch, no matter who runs the tests."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


def levels(findings) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in findings]


def test_this_machine_is_fine_and_nothing_is_left_behind(tmp_path):
    health = doctor.examine(tmp_path)
    assert health["ok"], health["findings"]
    assert {"python", "tide", "torch", "transformers", "accelerate", "datasets", "pyarrow"} <= set(health["versions"])
    assert health["machine"]["cpu_cores"] >= 1
    assert health["disk"]["write_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    json.dumps(health, allow_nan=False)
    text = doctor.report(health).plain
    assert "everything tide needs is here" in text
    assert "hub login" in text


def test_ranges_come_from_the_installed_metadata(monkeypatch):
    installed = {"torch": "1.0", "transformers": "6.1", "numpy": "2.0"}
    required = ["torch>=2.9", "transformers>=5.0,<6", "numpy>=1.26", "pyarrow>=21", "ruff>=0.9; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    monkeypatch.setattr(doctor, "_version", installed.get)
    assert levels(doctor._package_findings()) == [
        ("error", "torch 1.0 is outside the supported range"),
        ("error", "transformers 6.1 is outside the supported range"),
        ("error", "pyarrow is not installed"),
    ]


def test_the_real_metadata_names_torch_and_transformers():
    assert {"torch", "transformers", "pyarrow"} <= {requirement.name for requirement in doctor._requirements()}


@pytest.mark.parametrize(("files", "expected"), [(["__init__.py", "tokenkit.py"], 1), (["__init__.py", "align.py"], 0)])
def test_the_wrong_tokenkit_is_recognised(monkeypatch, tmp_path, files, expected):
    (tmp_path / "tokenkit").mkdir()
    for name in files:
        (tmp_path / "tokenkit" / name).write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1.3")
    findings = list(doctor._tokenkit_findings())
    assert len(findings) == expected
    assert all(f.level == "warning" and "pip uninstall tokenkit" in f.fix for f in findings)
    assert "tokenkit" not in sys.modules


def test_without_tokenkit_nothing_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert list(doctor._tokenkit_findings()) == []


def test_arrays_that_do_not_fit_are_an_error(monkeypatch):
    def fail(name: str):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    (finding,) = doctor._array_findings()
    assert finding.level == "error"
    assert "do not work together: ImportError: numpy.core" in finding.what


def test_machines_are_judged():
    assert levels(doctor._machine_findings(NOTHING)) == [("hint", "no accelerator: torch sees the CPU alone")]
    old = {"devices": [{"name": "cuda:0 V100", "memory_bytes": 1, "bf16": False}], "memory_bytes": 2 * 10**9}
    assert levels(doctor._machine_findings(old)) == [
        ("warning", "cuda:0 V100: no native bfloat16"), ("warning", "2.0 GB of memory"),
    ]  # fmt: skip


def test_a_build_that_does_not_fit_the_machine_is_a_warning_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    build = {"built_for": "cuda", "said": "The NVIDIA driver on your system is too old (found version 11040)."}
    (finding,) = doctor._machine_findings({**NOTHING, "torch": build})
    assert finding.level == "warning"
    assert "this torch is built for cuda, and no such device can be used" in finding.what
    assert "torch says: The NVIDIA driver on your system is too old" in finding.why
    assert "CUDA_VISIBLE_DEVICES (which is '3')" in finding.fix
    (finding,) = doctor._machine_findings({**NOTHING, "torch": {"built_for": None, "driver": True}})
    assert finding.level == "warning"
    assert "an NVIDIA driver is here, and this torch is a build without CUDA" in finding.what
    monkeypatch.setattr(doctor, "_build", lambda: build)
    assert doctor.report(doctor.examine(tmp_path)).plain.endswith("everything tide needs is here; mind the warnings")


def test_what_torch_says_while_it_looks_is_kept(monkeypatch):
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.accelerator, "is_available", is_available)
    assert "driver on your system is too old" in doctor._build()["said"]


def test_a_device_whose_driver_fails_is_an_error_and_no_traceback(monkeypatch):
    def fail(index: int):
        warnings.warn("it is not compatible with the current PyTorch installation", stacklevel=2)
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    machine = {**NOTHING, "devices": doctor._devices()}
    ((level, what),) = levels(doctor._machine_findings(machine))
    assert level == "error"
    assert "cuda:0: cannot compute: RuntimeError: CUDA error: no kernel image" in what
    assert "torch says: it is not compatible with the current PyTorch installation" in what


def test_a_cpu_that_does_not_compute_is_an_error():
    found = levels(doctor._machine_findings({**NOTHING, "torch": {"cpu_error": "RuntimeError: x"}}))
    assert ("error", "the CPU: cannot compute: RuntimeError: x") in found


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    disk = doctor._disk(tmp_path / "nowhere")
    (finding,) = doctor._disk_findings(disk)
    assert finding.level == "error"
    assert "cannot be written: No such file or directory" in finding.what


def test_a_folder_that_is_not_there_yet_is_looked_at_where_it_will_be(tmp_path):
    disk = doctor.examine(tmp_path / "new" / "cache")["disk"]
    assert (disk["folder"], disk["error"], disk["lacks"]) == (str(tmp_path), None, [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_system_lacks_is_said_and_no_error(tmp_path, monkeypatch):
    without_links_and_folder_fsync(monkeypatch)
    health = doctor.examine(tmp_path)
    assert health["ok"]
    assert health["disk"]["lacks"] == ["hard links", "fsync of folders"]
    assert f"{tmp_path}: a file system without hard links and fsync of folders" in doctor.report(health).plain
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_a_warning():
    disk = {"folder": "/x", "free_bytes": 10**9, "error": None, "write_bytes_per_s": 1, "lacks": []}
    assert levels(doctor._disk_findings(disk)) == [("warning", "/x: 1.0 GB free")]


def test_the_environment_is_read(without_hub):
    environment = {"VLLM_TRUST_REMOTE_CODE": "1", "HF_HUB_OFFLINE": "yes", "HF_TOKEN": "hf_x"}
    assert levels(doctor._environment_findings(environment)) == [
        ("hint", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"), ("warning", "VLLM_TRUST_REMOTE_CODE is set"),
    ]  # fmt: skip
    assert levels(doctor._environment_findings({"TRUST_REMOTE_CODE": "0"})) == [("hint", "not logged in to the Hub")]


def test_the_login_is_seen_and_the_token_never_shown(without_hub, monkeypatch, tmp_path, capsys):
    assert not doctor._is_logged_in(os.environ)
    (tmp_path / "token").write_text("hf_secret_of_a_file")
    assert doctor._is_logged_in({})
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["tide", "doctor", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        out, err = capsys.readouterr()
        assert "secret" not in out + err
    assert json.loads(out)["hub"] == {"logged_in": True, "offline": False}


def test_a_missing_essential_ends_with_69(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("a cache cannot lie below a file")
    monkeypatch.setattr(sys, "argv", ["tide", "doctor", "--out", str(tmp_path / "file" / "cache")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 69
    assert "something tide needs is missing" in capsys.readouterr().out


def test_doctor_says_whether_bubblewrap_works(monkeypatch, tmp_path):
    for problem in (None, "bubblewrap is not installed: apt-get install bubblewrap"):
        monkeypatch.setattr(doctor, "trouble", lambda problem=problem: problem)
        health = doctor.examine(tmp_path)
        named = [f for f in health["findings"] if "bubblewrap is not installed" in f["what"]]
        assert health["ok"], "it is needed for HumanEval and MBPP alone"
        assert health["sandbox"]["bubblewrap"] == (not named) == (problem is None)
        assert all(f["fix"] == "apt-get install bubblewrap" for f in named)
        (line,) = [line for line in doctor.report(health).plain.splitlines() if line.startswith("code sandbox")]
        assert line.split()[-1] == ("none" if problem else "bubblewrap")
