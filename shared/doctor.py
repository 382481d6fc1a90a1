"""`tide doctor`: what this machine has, and what is known to go wrong with it.

Looks at installed packages, the hardware, one folder and the environment; changes nothing and needs no network. The
version ranges come from the installed distribution's own metadata, so they stand in pyproject.toml alone.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from .. import __version__
from .bubblewrap import trouble
from .cache.files import file_system_lacks

DISTRIBUTION = "tide-distill"
WRITE_TEST_BYTES = 8 << 20
LOW_DISK_BYTES = 10 * 10**9
LOW_MEMORY_BYTES = 4 * 10**9
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_TRUE = {"1", "on", "yes", "true"}


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing.

    Args:
        level: "error": tide cannot work; "warning": something will go wrong; "hint": good to know.
        what, why, fix: what was found, why it matters, what to do about it.
    """

    level: Literal["error", "warning", "hint"]
    what: str
    why: str
    fix: str


def examine(folder: str | Path) -> dict[str, Any]:
    """Look at everything.

    Args:
        folder: where caches and checkpoints would go, there or not yet; the nearest folder that is there is tried: its
            free space, and what its file system can do.
    Returns: plain JSON: ok (no finding is an error), versions, machine, disk, hub, sandbox, findings.
    """
    folder = Path(folder).expanduser().absolute()
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    machine, disk, sandbox = _machine(), _disk(folder), trouble()
    findings = [
        *_package_findings(), *_tokenkit_findings(), *_array_findings(), *_machine_findings(machine),
        *_disk_findings(disk), *_environment_findings(os.environ),
    ]  # fmt: skip
    if sandbox is not None:
        what, _, fix = sandbox.partition(": ")
        why = "tide eval --allow-code-execution (HumanEval, MBPP) runs a model's code in bubblewrap alone"
        findings.append(Finding("hint", what, why, fix or "see docs/evaluation.md"))
    names = sorted({requirement.name for requirement in _requirements()}, key=str.lower)
    return {
        "ok": not any(finding.level == "error" for finding in findings),
        "versions": {"python": platform.python_version(), "tide": __version__, **{n: _version(n) for n in names}},
        "machine": machine,
        "disk": disk,
        "hub": {"logged_in": _is_logged_in(os.environ), "offline": _is_offline(os.environ)},
        "sandbox": {"bubblewrap": sandbox is None},
        "findings": [asdict(finding) for finding in findings],
    }


def report(health: Mapping[str, Any]) -> Text:
    """The answer of `examine` as lines for a terminal, findings last."""
    machine, disk, hub = health["machine"], health["disk"], health["hub"]
    devices = [f"{d['name']}{_gigabytes(d['memory_bytes'], ', ')}" for d in machine["devices"]]
    built_for = machine["torch"].get("built_for")
    torch_build = f"for {built_for}" if built_for else "for the CPU alone"
    free_memory = _gigabytes(machine["memory_available_bytes"], ", available ")
    speed = disk["write_bytes_per_s"]
    rows = [(name, version or "not installed") for name, version in health["versions"].items()]
    rows += [
        ("system", machine["system"]),
        ("CPU cores", str(machine["cpu_cores"])),
        ("memory", (_gigabytes(machine["memory_bytes"]) or "unknown") + free_memory),
        ("torch build", torch_build),
        ("devices", "; ".join(devices) or "CPU only"),
        ("disk", f"{disk['folder']}{_gigabytes(disk['free_bytes'], ', free ')}"),
        ("write test", disk["error"] or f"ok, {speed / 1e6:,.0f} MB/s"),
        ("file system", f"no {' and no '.join(disk['lacks'])}" if disk["lacks"] else "ok"),
        ("hub login", ("yes" if hub["logged_in"] else "no") + (", offline" if hub["offline"] else "")),
        ("code sandbox", "bubblewrap" if health["sandbox"]["bubblewrap"] else "none"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [Text(f"{name:{width}}  ", "dim").append(value) for name, value in rows]
    styles = {"error": "bold red", "warning": "bold yellow", "hint": "bold"}
    for finding in health["findings"]:
        lines += [
            Text(),
            Text(f"{finding['level']}: ", styles[finding["level"]]).append(finding["what"]),
            Text("  why  ", "dim").append(finding["why"]),
            Text("  do   ", "dim").append(finding["fix"]),
        ]
    verdict = "everything tide needs is here" if health["ok"] else "something tide needs is missing: see the errors"
    if health["ok"] and any(finding["level"] == "warning" for finding in health["findings"]):
        verdict += "; mind the warnings"
    return Text("\n").join([*lines, Text(), Text(verdict, "bold")])


def _gigabytes(count: int | None, before: str = "") -> str:
    return "" if count is None else f"{before}{count / 1e9:,.1f} GB"


def _requirements() -> list[Any]:
    """The runtime requirements of the installed tide, as `packaging` objects."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in texts]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_findings() -> Iterator[Finding]:
    """Every runtime requirement is there, in a version the project's metadata allows."""
    if importlib.util.find_spec("packaging") is None:
        yield Finding(
            "error", "the package packaging is not installed", "versions cannot be compared without it",
            "install tide's requirements: pip install tide-distill",
        )  # fmt: skip
        return
    requirements = _requirements()
    if not requirements:
        yield Finding(
            "hint", f"{DISTRIBUTION} runs from a folder, not installed", "required versions are not known then",
            "pip install -e . in the project's folder",
        )  # fmt: skip
    for requirement in requirements:
        found = _version(requirement.name)
        if found is None:
            yield Finding(
                "error", f"{requirement.name} is not installed", f"tide needs {requirement}",
                f"pip install '{requirement}'",
            )  # fmt: skip
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                "error", f"{requirement.name} {found} is outside the supported range",
                f"tide is written for {requirement}; other versions lack what it calls, or answer differently",
                f"pip install '{requirement}'",
            )  # fmt: skip


def _tokenkit_findings() -> Iterator[Finding]:
    """PyPI's tokenkit is another package than the paper's; only the latter has an `align` module."""
    found = _version("tokenkit")
    spec = importlib.util.find_spec("tokenkit") if found else None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if found and not any((folder / "align.py").exists() or (folder / "align").is_dir() for folder in folders):
        yield Finding(
            "warning", f"tokenkit {found} is installed, and is not the alignment library of the paper",
            "PyPI's tokenkit only shares the name: it counts tokens. tide needs no tokenkit, but refuses "
            "data.alignment=tokenkit with this one",
            "pip uninstall tokenkit; docs/data.md says how to install the real one",
        )  # fmt: skip


def _array_findings() -> Iterator[Finding]:
    """numpy, pyarrow and torch were built for each other: a few values make the round."""
    try:
        numpy, pyarrow = importlib.import_module("numpy"), importlib.import_module("pyarrow")
        values = pyarrow.array(numpy.arange(3.0)).to_numpy()
        torch = importlib.import_module("torch")
        if torch.from_numpy(numpy.array(values)).sum().item() != 3.0:
            raise RuntimeError("values changed on the way")
    except (ImportError, AttributeError, RuntimeError, TypeError, OSError) as error:
        versions = ", ".join(f"{name} {_version(name)}" for name in ("numpy", "pyarrow", "torch"))
        yield Finding(
            "error", f"{versions} do not work together: {type(error).__name__}: {error}"[:500],
            "caches are read by pyarrow into numpy and go to torch from there",
            "install the tested versions again: pip install -c constraints.txt --force-reinstall numpy pyarrow torch",
        )  # fmt: skip


def _machine() -> dict[str, Any]:
    """Cores, memory (of the machine or the container, and what of it is free; None where nothing tells), devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = available = None
    with contextlib.suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" for none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total = min(total or limit, limit)
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        available = int(text.split("MemAvailable:")[1].split()[0]) * 1024
        available = min(available, total or available)
    build = _build()  # before the devices: a driver that is too old is told once
    return {
        "system": platform.platform(), "cpu_cores": cores, "memory_bytes": total, "memory_available_bytes": available,
        "torch": build, "devices": _devices(),
    }  # fmt: skip


def _devices() -> list[dict[str, Any]]:
    """Accelerators that torch can use, each tried by one product; [] for CPU only or without torch."""
    try:
        torch = importlib.import_module("torch")
        usable = importlib.import_module("tide.shared.devices").accelerators()
    except (ImportError, OSError):
        return []
    return [_described(torch, one) for one in usable]


def _described(torch: Any, device: Any) -> dict[str, Any]:
    """Name, memory and bfloat16, as far as CUDA and ROCm say, and what is wrong with the device."""
    described = {"name": str(device), "memory_bytes": None, "bf16": True}
    with warnings.catch_warnings(record=True) as said:  # of a GPU that this build has no code for
        warnings.simplefilter("always")
        try:
            if device.type == "cuda":
                info = torch.cuda.get_device_properties(device.index)
                bf16 = torch.cuda.get_device_capability(device.index) >= (8, 0) or torch.version.hip is not None
                described |= {"name": f"{device} {info.name}", "memory_bytes": info.total_memory, "bf16": bf16}
            error = _tried(torch, device)
        except Exception as met:  # drivers raise whatever they raise
            error = f"{type(met).__name__}: {met}"[:300]
    words = " ".join(str(one.message) for one in said)[:400]
    return {**described, "error": f"{error}. torch says: {words}" if error and words else error}


def _tried(torch: Any, device: Any) -> str | None:
    """Why a product of two small matrices cannot be computed on a device, or is wrong; None: it is right."""
    try:
        one = torch.arange(64.0).reshape(8, 8)
        found = (one.to(device) @ one.to(device)).cpu()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None if torch.allclose(found, one @ one, rtol=1e-2) else "the product of two matrices is wrong"


def _build() -> dict[str, Any]:
    """What torch was built for, what it says when it is asked for a device, and whether the CPU computes; {} without.

    `driver`: the system has NVIDIA's loaded.
    """
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):
        return {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.accelerator.is_available()
    kind = torch.accelerator.current_accelerator()
    return {
        "built_for": None if kind is None else kind.type, "said": " ".join(str(one.message) for one in said)[:400],
        "version": torch.__version__, "driver": NVIDIA_DRIVER.exists(), "cpu_error": _tried(torch, torch.device("cpu")),
    }  # fmt: skip


def _machine_findings(machine: Mapping[str, Any]) -> Iterator[Finding]:
    build = machine.get("torch", {})
    if not machine["devices"]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        kind = build.get("built_for")
        builds = f"; this torch is built for {kind}, and no such device can be used" if kind else ""
        unused = not kind and build.get("driver")
        builds += "; an NVIDIA driver is here, and this torch is a build without CUDA" if unused else ""
        yield Finding(
            "warning" if kind or unused else "hint", "no accelerator: torch sees the CPU alone" + builds,
            "enough for the demo, tests, plans and inspecting caches; a teacher of billions of parameters needs a GPU"
            + (f". torch says: {build['said']}" if build.get("said") else ""),
            "nothing if there is no GPU. If there is one: " + (
                "update its driver (nvidia-smi shows it) or install the torch build for that driver, and look at "
                f"CUDA_VISIBLE_DEVICES (which is {'not set' if visible is None else repr(visible)})" if kind
                else "install the torch build for it, and check CUDA_VISIBLE_DEVICES"
            ),
        )  # fmt: skip
    if build.get("cpu_error"):
        yield Finding(
            "error", f"the CPU: cannot compute: {build['cpu_error']}", "torch does not work on this machine",
            "install the tested torch again: pip install -c constraints.txt --force-reinstall torch",
        )  # fmt: skip
    for device in machine["devices"]:
        if device.get("error"):
            yield Finding(
                "error", f"{device['name']}: cannot compute: {device['error']}",
                "tide takes an accelerator where torch reports one, and every dump and training on it would fail",
                "mend its driver, hide it with CUDA_VISIBLE_DEVICES, or --set teacher.device=cpu, train.device=cpu and "
                "decoding.device=cpu",
            )  # fmt: skip
    old = [device["name"] for device in machine["devices"] if not device["bf16"]]
    if old:
        yield Finding(
            "warning", f"{', '.join(old)}: no native bfloat16",
            "teachers run and students train in bfloat16 unless told otherwise; here it would be emulated and slow",
            "--set teacher.dtype=float16, and --set train.precision=fp32",
        )  # fmt: skip
    memory = machine["memory_bytes"]
    if memory is not None and memory < LOW_MEMORY_BYTES:
        yield Finding(
            "warning", f"{memory / 1e9:.1f} GB of memory", "checking a cache alone may take 2 GB",
            "use a larger machine, or one worker only",
        )  # fmt: skip


def _disk(folder: Path) -> dict[str, Any]:
    """Free space of a folder, and whether a file can be written there, fsynced, renamed and read back."""
    result: dict[str, Any] = {"folder": str(folder.absolute()), "lacks": []}
    result |= dict.fromkeys(("free_bytes", "write_bytes_per_s", "error"))
    data = os.urandom(WRITE_TEST_BYTES)
    try:
        result["free_bytes"] = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(prefix=".tide-doctor-", dir=folder) as inside:
            start, path = time.perf_counter(), Path(inside) / "written"
            with open(path.with_suffix(".tmp"), "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".tmp"), path)
            result["write_bytes_per_s"] = round(len(data) / (time.perf_counter() - start))
            if path.read_bytes() != data:
                result["error"] = "what was read back differs from what was written"
            result["lacks"] = file_system_lacks(Path(inside))
    except OSError as error:
        result["error"] = error.strerror or str(error)
    return result


def _disk_findings(disk: Mapping[str, Any]) -> Iterator[Finding]:
    if disk["error"]:
        yield Finding(
            "error", f"{disk['folder']}: cannot be written: {disk['error']}", "caches and checkpoints need a folder",
            "choose another folder with --out, or free space and check its permissions",
        )  # fmt: skip
        return
    if disk["lacks"]:
        yield Finding(
            "hint", f"{disk['folder']}: a file system without {' and '.join(disk['lacks'])}",
            "tide does without them: names are taken by exclusive creation and a rename; after a power cut, the newest "
            "shard may have to be made again",
            "nothing, or put caches and runs on a local disk or NFS with --out",
        )  # fmt: skip
    if disk["free_bytes"] < LOW_DISK_BYTES:
        yield Finding(
            "warning", f"{disk['folder']}: {disk['free_bytes'] / 1e9:.1f} GB free",
            "a cache takes 50 to 100 bytes per masked position, so tens of GB for a million conversations (tide plan "
            "estimates it); a checkpoint takes three times the student's weights",
            "put caches and runs on a larger disk with --out",
        )  # fmt: skip


def _is_logged_in(environment: Mapping[str, str]) -> bool:
    """Is there a token for the Hub? Looks where huggingface_hub does, without reading, refreshing or trying it."""
    if any(environment.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")):
        return True
    try:
        path = Path(importlib.import_module("huggingface_hub.constants").HF_TOKEN_PATH)
        return path.stat().st_size > 0
    except (ImportError, OSError):
        return False


def _is_offline(environment: Mapping[str, str]) -> bool:
    return any(environment.get(n, "").lower() in _TRUE for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _environment_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    if _is_offline(environment):
        yield Finding(
            "hint", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            "hub ids work only for what was downloaded before; local folders and the demo need no network",
            "unset it to download models, data or caches",
        )  # fmt: skip
    for name, value in sorted(environment.items()):
        if "TRUST_REMOTE_CODE" in name.upper() and value.lower() in _TRUE:
            yield Finding(
                "warning", f"{name} is set",
                "it lets other programs run code from checkpoints and data sets. tide never does: its models are "
                "classes of its own, and other architectures are refused whatever this says",
                f"unset {name} unless another program needs it",
            )  # fmt: skip
    if not _is_logged_in(environment):
        yield Finding(
            "hint", "not logged in to the Hub", "needed for gated models, private data and push-cache; nothing else",
            "hf auth login",
        )  # fmt: skip
