"""A Hub on the loopback interface, in memory: as much of the protocol as the real client needs to push and pull.

    with LoopbackHub() as hub:
        hub.add_fault(Fault("POST", "/commit/", status=429, headers={"Retry-After": "1"}))
        ... run clients with HF_ENDPOINT=hub.url HF_HUB_DISABLE_XET=1 ...
        hub.requests            # what they asked, in order

Large files go through the LFS endpoints and are known by SHA-256; small text is part of a commit, known by git's SHA-1.
A commit is a tree {path: File}; branches and tags are names of commits.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".parquet", ".safetensors")
MAX_SMALL_BYTES = 1 << 20
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """A file of a commit; `sha256` is set for large ones."""

    data: bytes
    sha256: str | None = None

    @property
    def git_oid(self) -> str:
        """Of the content, or of the pointer that git holds in place of a large file."""
        data = self.data
        if self.sha256:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As `tree` and `paths-info` show it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.data)}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass
class Commit:
    """One state of a repository; `paths` are those it changed."""

    oid: str
    title: str
    tree: dict[str, File]
    paths: list[str]


@dataclass
class Repository:
    """A repository of a data set or of a model; nothing tells which."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, tree: dict[str, File], paths: list[str], branch: str = "main") -> Commit:
        """Append a state to a branch."""
        name = json.dumps([title, len(self.commits), {path: file.git_oid for path, file in tree.items()}])
        made = Commit(hashlib.sha1(name.encode()).hexdigest(), title, tree, paths)
        self.commits.append(made)
        self.branches[branch] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, tag or hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def head(self) -> Commit:
        """The newest commit of main."""
        found = self.at("main")
        assert found
        return found


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path matches `path`: the first `skip` pass, then `times` fail.

    Args:
        status, headers, message: the answer in place of the real one.
        cut_after: answer, but close the connection after so many bytes of the body.
        stall: answer nothing until `LoopbackHub.close`; `LoopbackHub.stalled` is set.
    """

    method: str
    path: str
    times: int = 10**9
    skip: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    cut_after: int | None = None
    stall: bool = False

    def strikes(self, method: str, path: str) -> bool:
        """Count a request; does it fail?"""
        if method != self.method or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class LoopbackHub:
    """The server; use it as a context manager. Everything it holds may be looked at and changed by tests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.stalled, self.closing, self.lock = threading.Event(), threading.Event(), threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_fault(self, fault: Fault) -> None:
        """The first fault that strikes a request decides."""
        self.faults.append(fault)

    def asked(self, pattern: str) -> list[str]:
        """Requests, as "METHOD path", that match."""
        return [request for request in list(self.requests) if re.search(pattern, request)]

    def environment(self, home: object, token: str | None = "hf_" + "s" * 34) -> dict[str, str]:
        """What a client process needs to talk to this Hub and to nothing else."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "XDG_CACHE_HOME": f"{home}/xdg",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        self.cut_after: int | None = None
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, path)), None)
        if fault and fault.stall:
            self.hub.stalled.set()
            self.hub.closing.wait(60)
            self.close_connection = True
        elif fault and fault.status:
            self.refuse(fault.status, fault.message, **fault.headers)
        else:
            self.cut_after = fault.cut_after if fault else None
            self._route(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _route(self, path: str) -> None:
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                with self.hub.lock:
                    reply = answer(self, *match.groups())
                if reply is not None:
                    self.reply(200, json.dumps(reply).encode(), **{"Content-Type": "application/json"})
                return
        self.refuse(404, f"no route {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if self.cut_after is None else body[: self.cut_after])
        if self.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status: int, message: str, code: str = "", **headers: str) -> None:
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message, "Content-Type": "application/json"}
        self.reply(status, json.dumps({"error": message}).encode(), **headers)

    def repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self.refuse(404, "Repository not found", code="RepoNotFound")
        return found

    def state(self, name: str, revision: str) -> Commit | None:
        repository = self.repository(name)
        found = repository and repository.at(unquote(revision))
        if repository and not found:
            self.refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return found or None

    def create(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        folder = "" if asked.get("type", "model") == "model" else "datasets/"
        url = f"{self.hub.url}/{folder}{name}"
        if name in self.hub.repositories:
            return self.reply(409, json.dumps({"error": "You already created this dataset repo", "url": url}).encode())
        repository = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        repository.commit("initial commit", {}, [])
        return {"url": url, "name": name, "id": name}

    def info(self, name: str, revision: str | None) -> Any:
        commit = self.state(name, revision or "main")
        return commit and {
            "_id": "0" * 24, "id": name, "author": name.split("/")[0], "sha": commit.oid, "gated": False,
            "private": self.hub.repositories[name].private, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "createdAt": DATE, "lastModified": DATE, "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }  # fmt: skip

    def tree(self, name: str, revision: str, folder: str | None) -> Any:
        commit = self.state(name, revision)
        if commit is None:
            return None
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in sorted(commit.tree.items()) if path.startswith(prefix)}
        if folder and not inside:
            return self.refuse(404, f"{folder} does not exist", code="EntryNotFound")
        recursive = "recursive=true" in self.path.lower()
        folders = {prefix + "/".join(parts[:n]) for path in inside
                   for parts in [path.removeprefix(prefix).split("/")] for n in range(1, len(parts))}  # fmt: skip
        shown = [path for path in folders if recursive or "/" not in path.removeprefix(prefix)]
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(shown)]
        return entries + [f.entry(p) for p, f in inside.items() if recursive or "/" not in p.removeprefix(prefix)]

    def paths_info(self, name: str, revision: str) -> Any:
        commit = self.state(name, revision)
        form = self.headers["Content-Type"].startswith("application/json")
        paths = json.loads(self.body)["paths"] if form else parse_qs(self.body.decode()).get("paths", [])
        return commit and [commit.tree[path].entry(path) for path in paths if path in commit.tree]

    def preupload(self, name: str, revision: str) -> Any:
        commit = self.state(name, revision)
        answers = []
        for asked in json.loads(self.body)["files"] if commit else []:
            base64.b64decode(asked["sample"])
            large = asked["path"].endswith(LARGE_SUFFIXES) or asked["size"] > MAX_SMALL_BYTES
            there = commit and commit.tree.get(asked["path"])
            oid = (there.sha256 or there.git_oid) if there else None
            mode = "lfs" if large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return commit and {"files": answers, "commitOid": commit.oid}

    def lfs_batch(self, name: str) -> Any:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
            objects.append(asked if asked["oid"] in self.hub.large else {**asked, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "SHA-256 differs")
        self.hub.large[oid] = self.body
        return {}

    def make_commit(self, name: str, branch: str) -> Any:
        before = self.state(name, branch)
        if before is None:
            return None
        tree, paths, title = dict(before.tree), [], ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, before.oid):
                    return self.refuse(412, "A commit has happened since")
                continue
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.large:
                return self.refuse(400, "large file is missing")
            large = line["key"] == "lfsFile"
            data = self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
            tree[value["path"]] = File(data, value["oid"] if large else None)
            paths.append(value["path"])
        made = self.hub.repositories[name].commit(title, tree, paths, branch)
        folder = "datasets/" if self.path.startswith("/api/datasets/") else ""
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{folder}{name}/commit/{made.oid}",
        }

    def refs(self, name: str) -> Any:
        repository = self.repository(name)
        if repository is None:
            return None
        names = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        return {
            kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]
            for kind, (folder, refs) in names.items()
        } | {"converts": []}

    def tag(self, name: str, revision: str) -> Any:
        commit, tag = self.state(name, revision), json.loads(self.body)["tag"]
        if commit and tag in self.hub.repositories[name].tags:
            return self.refuse(409, "Tag reference exists already")
        if commit:
            self.hub.repositories[name].tags[tag] = commit.oid
        return commit and {}

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.state(name, revision)
        file = commit and commit.tree.get(path)
        if commit and not file:
            self.refuse(404, "Entry not found", code="EntryNotFound", **{"X-Repo-Commit": commit.oid})
        if not commit or not file:
            return
        etag = f'"{file.sha256 or file.git_oid}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.data))}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.reply(200, file.data, **headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(file.data) - 1), len(file.data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(file.data)}"
        self.reply(206, file.data[start : end + 1], **headers)


_NAME, _REST = r"([^/]+/[^/]+)", r"(.+)"
_ROUTES: list[tuple[str, Any]] = [
    (r"/api/whoami-v2", lambda _: {"type": "user", "name": "tester", "orgs": [], "auth": {}}),
    (r"/api/validate-yaml", lambda _: {"errors": [], "warnings": []}),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/(?:datasets|models)/{_NAME}(?:/revision/{_REST})?", _Handler.info),
    (rf"/api/(?:datasets|models)/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (rf"/api/(?:datasets|models)/{_NAME}/paths-info/{_REST}", _Handler.paths_info),
    (rf"/api/(?:datasets|models)/{_NAME}/preupload/{_REST}", _Handler.preupload),
    (rf"/api/(?:datasets|models)/{_NAME}/commit/{_REST}", _Handler.make_commit),
    (rf"/api/(?:datasets|models)/{_NAME}/refs", _Handler.refs),
    (rf"/api/(?:datasets|models)/{_NAME}/tag/{_REST}", _Handler.tag),
    (rf"(?:/datasets)?/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (rf"(?:/datasets)?/{_NAME}/resolve/([^/]+)/{_REST}", _Handler.resolve),
]
