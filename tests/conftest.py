"""Fixtures of all tests, and array shapes in signatures checked in every run: jaxtyping's import hook with beartype.

The hook must be installed before the modules are first imported, so nothing above may import tide. It takes the modules
whose signatures speak of arrays, not all of `tide`: beartype cannot check every annotation elsewhere (a protocol that
is not runtime-checkable, names imported for type checkers alone).
"""

import importlib.metadata
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest

if TYPE_CHECKING:
    from s3_server import S3Server

sys.path.insert(0, str(Path(__file__).parent))  # tiny_runs.py, which test modules of every folder share
sys.path.insert(0, str(Path(__file__).parent / "shared" / "cache"))  # parquet_by_hand.py
sys.path.insert(0, str(Path(__file__).parent / "student_train"))  # hostile_programs.py

SHAPE_CHECKED = (
    "tide.shared.attention",
    "tide.shared.noising",
    "tide.shared.rows",
    "tide.shared.sliced_head",
    "tide.shared.sparse_logits",
    "tide.student_train.batches",
    "tide.student_train.block_cache",
    "tide.student_train.likelihood",
    "tide.student_train.losses",
    "tide.student_train.objective",
    "tide.student_train.student",
    "tide.student_train.token_choice",
)
jaxtyping.install_import_hook(SHAPE_CHECKED, "shape_checks.checked")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: children would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_notes(tmp_path_factory) -> Iterator[None]:
    """Which caches were checked before is noted in the user's folder: not in that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("notes")))
        yield


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Without shape checks, to see the error that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The repository's root, which is the package `tide`."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_files(project_root: Path) -> list[Path]:
    """Files of the project relative to its root: what git tracks, or would track after `git add`; skips without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return sorted(path for path in map(Path, set(listed.split("\0")) - {""}) if (project_root / path).is_file())


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the models and data of tiny_runs.py, made once for all tests."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """An S3 server of this test process."""
    from s3_server import S3Server

    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "S3Server":
    """The server as all clients of this test know it; nothing fails yet, and no request was counted."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    s3_server.faults.clear()
    s3_server.requests.clear()
    return s3_server


@pytest.fixture
def bucket(s3: "S3Server") -> str:
    """The URL of a bucket of this test alone."""
    return s3.make_bucket(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def golden() -> Path:
    """Folder of the checkpoints that the official classes wrote; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it does not ship with the project")
    return folder


@pytest.fixture
def install_tokenkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """install_tokenkit() -> align.py of the stand-in, now on the path. `code` is added to it; None: there is none."""
    stand_in, site = Path(__file__).parent / "stand_ins" / "tokenkit", tmp_path / "site"
    version_of = importlib.metadata.version

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tokenkit"]:
            del sys.modules[name]

    def install(code: str | None = "", version: str = "0.0.1") -> Path:
        forget()
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(stand_in, site / "tokenkit", ignore=shutil.ignore_patterns("__pycache__"))
        file = site / "tokenkit" / "align.py"
        if code is None:
            file.unlink()
        else:
            file.write_text(f"{file.read_text()}\n{code}\n")
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == "tokenkit" else version_of(name)
        )
        monkeypatch.syspath_prepend(str(site))
        return file

    yield install
    forget()
