"""The wheel holds the whole package, works where nothing else of the project is, and bare names are refused."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

NOT_SHIPPED = {"benchmarks", "docs", "examples", "tests"}


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Standard output of a command; its errors in the assertion."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, project_root, project_files) -> Path:
    """The wheel built from a clean copy of the tracked files."""
    copy = tmp_path_factory.mktemp("copy")
    for path in project_files:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project_root / path, copy / path)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"], copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked by pip into an empty folder."""
    target = tmp_path_factory.mktemp("target")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)], target)
    return target


def test_the_wheel_holds_every_module_recipe_and_asset_and_nothing_else(wheel, project_files):
    shipped = [path for path in project_files if path.parts[0] not in NOT_SHIPPED]
    modules = {path for path in shipped if path.suffix == ".py"}
    assert {path.parent for path in modules} == {path.parent for path in modules if path.name == "__init__.py"}
    data = {path for path in shipped if path.parts[0] == "recipes" or path.parent.name == "eval_tasks"}
    documents = {path for path in project_files if path.parent == Path("docs") and path.suffix == ".md"}
    expected = {f"tide/{path.as_posix()}" for path in modules | data | documents}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert b"Apache License" in archive.read(licence)
    assert found == expected


def test_the_wheel_declares_the_command_and_lm_evals_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {"tide": "tide.__main__:main"},
        "lm_eval.models": {"tide": "tide.student_train.lm_eval_model:TideLM"},
    }


def test_the_installed_wheel_works_alone(installed, tmp_path):
    program = (
        "import sys, pathlib, tide, tide.cli; from importlib import resources; from tide.shared.config import *\n"
        "assert callable(tide.open_cache); load_config(recipe_names()[0])\n"
        "assert resources.files('tide.recipes').joinpath('demo_assets/student/tokenizer.json').is_file()\n"
        "print(pathlib.Path(tide.__file__).parent)"
    )
    folder = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(installed)).strip()
    assert Path(folder).resolve() == (installed / "tide").resolve()
    (command,) = (installed / "bin").iterdir()
    assert "Usage: tide" in run([sys.executable, str(command), "--help"], tmp_path, PYTHONPATH=str(installed))


@pytest.mark.parametrize("name", ["shared", "teacher_dump", "student_train"])
def test_a_bare_name_is_refused(project_root, name):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: this folder is the package tide.{name}: install the project" in done.stderr
