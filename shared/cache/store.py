"""Where a cache lies: a folder, or a prefix of an object store (object_store.py). The same few verbs for both.

What workers and readers ask of the place: names below a folder (one listing), whole small files, files that only the
first writer makes, and files that are whole once they have their final name. `folder` is where code that writes with
ordinary file operations does so; `publish` makes the result appear at the place. For a folder both are the same.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..addresses import is_url, local_path, require_folder
from ..config import STORE_PATIENCE_S
from ..errors import CacheError, ConfigError, OutputError
from . import own_entries
from .files import (
    atomic_write,
    create_once,
    file_inside,
    is_written,
    output_errors,
    read_bounded,
    sha256_file,
)

OWN_NAME = r"[A-Za-z0-9._-]+\.json|\.[A-Za-z0-9._-]+\.json\.[A-Za-z0-9-]+-\d+-[0-9a-f]{8}\.tmp"
"""Names of the files in `claims/` and `workers/`, and of those on their way there."""


class Entry(NamedTuple):
    """A file at the place.

    Args:
        version: another one whenever the file was written or touched; identity: whenever it was replaced by another
            file, as far as the place tells.
        modified: seconds since the epoch, by the clock of whoever keeps the file.
    """

    bytes: int
    version: tuple[object, ...]
    identity: tuple[object, ...]
    modified: float


class Store(ABC):
    """A place for one cache; names are relative, with forward slashes. `str()` is what the user called it."""

    is_folder: bool
    """Do files stay below `folder`? Then others may write there, too, and finished shards are looked at again before
    the manifest is written; elsewhere each upload was compared already."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Local folder below which files are written."""

    def path(self, name: str) -> str:
        """A file's full name, for messages."""
        return f"{self}/{name}"

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Is there such a file now?"""

    @abstractmethod
    def names(self, folder: str = "") -> set[str]:
        """Names directly below `folder`, hidden ones included; none if it is not there."""

    @abstractmethod
    def entries(self, folder: str) -> dict[str, Entry]:
        """The files directly below `folder`, by name."""

    @abstractmethod
    def entry(self, name: str) -> Entry | None:
        """One file; None: it is not there."""

    @abstractmethod
    def num_bytes(self, name: str) -> int | None:
        """Size of a file whose name a stranger chose; None: missing. Raises: CacheError: it leads elsewhere."""

    @abstractmethod
    def read(self, name: str, *, max_bytes: int, inside: bool = False) -> bytes:
        """A small file; of a larger one, a byte more than `max_bytes`.

        Args: inside: refuse a link in its place that leads elsewhere.
        Raises: FileNotFoundError. CacheError: such a link.
        """

    @abstractmethod
    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Replace a small file at once; `durable`: it survives a power cut. Raises: OutputError."""

    @abstractmethod
    def write_once(self, name: str, data: bytes) -> None:
        """Write a small file unless it is there: of several writers one wins. Raises: OutputError."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Make a file that others may make at the same time; False: another was faster. Raises: OutputError."""

    @abstractmethod
    def renew(self, name: str, data: bytes) -> None:
        """Give a file of this worker's another version; `data`: its content. Raises: OSError, TideError."""

    @abstractmethod
    def remove(self, *names: str) -> None:
        """Remove files, as far as they are there. Raises: OSError, TideError."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Remove the files that tide made directly below `folder`, and it if nothing else is there."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """SHA-256 of a whole file, read from the place. Raises: CacheError: it is missing."""

    @abstractmethod
    def publish(self, names: Sequence[str]) -> None:
        """Make files that were written below `folder` appear at the place, in this order."""

    @abstractmethod
    def require_own(self, *folders: str) -> None:
        """Find out whether these folders, as far as they are there, are the place's own.

        Raises: OutputError: one of them leads elsewhere.
        """

    @abstractmethod
    def require_usable(self, expected: Sequence[str]) -> None:
        """Find out whether a dump could begin here. Raises: ConfigError, OutputError, Unavailable.

        Args: expected: names that may be there already.
        """


class FolderStore(Store):
    """A folder of a local or shared file system."""

    is_folder = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self.root

    def exists(self, name: str) -> bool:
        """As `Store.exists`; a file that is still empty is not there yet."""
        return is_written(self.root / name)

    def names(self, folder: str = "") -> set[str]:
        """As `Store.names`. Raises: OutputError: the folder is a link."""
        return own_entries.names(self.root, folder)

    def entries(self, folder: str) -> dict[str, Entry]:
        """As `Store.entries`: one listing, and one look at each file."""
        found = {name: self.entry(f"{folder}/{name}") for name in self.names(folder)}
        return {name: entry for name, entry in found.items() if entry is not None}

    def entry(self, name: str) -> Entry | None:
        """As `Store.entry`."""
        status = own_entries.status(self.root, name)
        if status is None:
            return None
        identity = (status.st_ino, status.st_size)
        return Entry(status.st_size, (status.st_mtime_ns, *identity), identity, status.st_mtime)

    def num_bytes(self, name: str) -> int | None:
        """As `Store.num_bytes`."""
        try:
            return self._inside(name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str, *, max_bytes: int, inside: bool = False) -> bytes:
        """As `Store.read`."""
        return read_bounded(self._inside(name) if inside else self.root / name, max_bytes=max_bytes)

    def _inside(self, name: str) -> Path:
        """Raises: FileNotFoundError: there is nothing. CacheError: a link that leads out of the folder."""
        try:
            return file_inside(self.root, name)
        except CacheError as error:
            if os.path.lexists(self.root / name):
                raise
            raise FileNotFoundError(self.root / name) from error

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """As `Store.write`."""
        self._make_folder_of(name)
        atomic_write(self.root / name, data, durable=durable)

    def write_once(self, name: str, data: bytes) -> None:
        """As `Store.write_once`."""
        self._make_folder_of(name)
        create_once(self.root / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """As `Store.create`, by O_EXCL."""
        path = self.root / name
        self._make_folder_of(name)
        with output_errors(path):
            try:
                file = open(path, "xb")  # noqa: SIM115 - closed below; only its creation may say that another was faster
            except FileExistsError:
                return False
            try:
                with file:
                    file.write(data)
            except OSError:  # disk full: an empty file would keep others waiting
                path.unlink()
                raise
        return True

    def renew(self, name: str, data: bytes) -> None:
        """Touch the file."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / name, follow_symlinks=False)

    def remove(self, *names: str) -> None:
        """As `Store.remove`."""
        for name in names:
            own_entries.remove(self.root, name)

    def remove_folder(self, folder: str) -> None:
        """As `Store.remove_folder`, as far as it may be written. Raises: OutputError: it is a link."""
        with contextlib.suppress(OSError):
            own_entries.remove_all(self.root, folder, OWN_NAME)

    def require_own(self, *folders: str) -> None:
        """As `Store.require_own`: none is a link."""
        own_entries.require_own_folders(self.root, *folders)

    def _make_folder_of(self, name: str) -> None:
        """The folder of a file that is about to be written. Raises: OutputError: it is a link, or cannot be made."""
        with output_errors(self.root / name), own_entries.opened(self.root, name.rpartition("/")[0], create=True):
            pass

    def sha256(self, name: str) -> str:
        """As `Store.sha256`."""
        return sha256_file(file_inside(self.root, name))

    def publish(self, names: Sequence[str]) -> None:
        """Nothing to do: each file got its final name by itself."""

    def require_usable(self, expected: Sequence[str]) -> None:
        """As `Store.require_usable`."""
        root = self.root
        others = [path for path in root.iterdir() if path.name[0] != "."] if root.is_dir() else []
        # An empty file is one of a writer that was killed where there are no hard links.
        if any(path.name not in expected and (path.is_dir() or is_written(path)) for path in others):
            raise ConfigError(
                f"--out {root}: the folder holds other files and no plan.json; give a new or empty folder"
            )
        nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise OutputError(f"--out {root}: {nearest} is a file; give the path of a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"--out {root}: {nearest} is read-only; give a folder that can be written")


def open_store(
    root: "str | Path | Store", *, patience_s: float = STORE_PATIENCE_S, scratch: str | None = None
) -> Store:
    """The place that a user named.

    Args:
        root: a folder, a URL that fsspec understands, or an open store, which is given back.
        patience_s: of an object store that is busy or out of reach: how long to try again.
        scratch: folder for files on their way to an object store; None: the system's temporary folder.
    Raises: ConfigError: no such kind of address. Unavailable: what it needs is not installed.
    """
    if isinstance(root, Store):
        return root
    if is_url(root):
        from .object_store import ObjectStore

        return ObjectStore(str(root), patience_s=patience_s, scratch=scratch)
    if isinstance(root, Path):
        require_folder(root, "this call with a pathlib.Path")
    return FolderStore(local_path(root))
