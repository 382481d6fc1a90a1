"""Runs hostile programs (hostile_programs.py) beside a user's processes and files: -> what they changed, as JSON.

`python hostile_scene.py FOLDER [unsafe]` runs all; with `unsafe`, without bubblewrap, those that the tests name.
It is a program of its own, so that it can run as another user than the tests. Whatever a program orphans outside its
namespaces becomes a child of this process, and is found.
"""

import ctypes
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hostile_programs import KINDS
from tide.student_train import code_sandbox
from tide.student_train.code_sandbox import descendants, protection, run_program

REPO = Path(code_sandbox.__file__).parents[1]
BITES_UNSAFE = ("append", "new file", "setpriority of a process", "sched_setaffinity", "prlimit files", "TCP")
"""Without bubblewrap these must be noticed, or the scene is blind; each undoes nothing that cannot be undone."""
_LIMITS = (
    resource.RLIMIT_CPU,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_AS,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NPROC,
)
_SLEEPER = "import signal, time\nprint('here', flush=True)\nwhile True: time.sleep(1000)"
_OUTSIDE = ("/tmp", "/var/tmp", "/dev/shm", "/etc", "/", "/usr/bin", str(REPO), os.path.dirname(os.__file__))


class Scene:
    """A bystander, a home with secrets, and servers on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        for name in (".ssh/id_ed25519", ".cache/huggingface/token", "planted"):
            file = self.home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"secret {name}")
        os.environ["HF_TOKEN"] = "hf_hostile_scene"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.free = unused.getsockname()[1]
        self.abstract = f"tide-scene-{os.getpid()}"
        self.unix, self.named = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind("\0" + self.abstract)
        self.named.bind(str(self.home / "socket"))
        for server in (self.unix, self.named):
            server.listen()
        for server in (self.tcp, self.unix, self.named):
            server.setblocking(False)
        self.bystander = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        started = subprocess.Popen(
            [sys.executable, "-I", "-c", _SLEEPER], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert started.stdout is not None
        started.stdout.readline()
        return started

    def source(self, program: str) -> str:
        """The program, aimed at this scene."""
        places = {
            "PLANTED": self.home / "planted", "HOME": self.home, "REPO": REPO, "ABSTRACT": self.abstract,
            "PORT": self.tcp.getsockname()[1], "FREE": self.free,
        }  # fmt: skip
        for name, place in places.items():
            program = program.replace(name if name != "PORT" else "PORT)", str(place) + (")" if name == "PORT" else ""))
        return program.replace("PID", str(self.bystander.pid))

    def state(self) -> dict[str, object]:
        """All that a program must not change."""
        pid = self.bystander.pid
        state: dict[str, object] = {"bystander": self.bystander.poll()}
        if self.bystander.poll() is None:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{pid}/status").read_text()
            state["stopped"] = fields[0] in "Tt"
            state["group, session"] = fields[2:4]
            state["limits"] = [resource.prlimit(pid, kind) for kind in _LIMITS]
            state["priority"] = os.getpriority(os.PRIO_PROCESS, pid)
            state["affinity"] = sorted(os.sched_getaffinity(pid))
            state["policy"] = os.sched_getscheduler(pid)
            state["io priority"] = ctypes.CDLL(None).syscall(252, 1, pid) if os.uname().machine == "x86_64" else 0
            state["oom score"] = Path(f"/proc/{pid}/oom_score_adj").read_text()
            state["traced, pending"] = [
                v for v in status.splitlines() if v.startswith(("TracerPid", "SigPnd", "ShdPnd"))
            ]
        state["home"] = {str(file): _seen(file) for file in sorted([self.home, *self.home.rglob("*")])}
        state["outside"] = [f"{p}/{n}" for p in _OUTSIDE for n in os.listdir(p) if n.startswith("tide-hostile")]
        state["docs"] = len(os.listdir(REPO / "docs"))
        state["processes"] = sorted(process.pid for process in descendants(os.getpid()))
        state["limits of this"] = [resource.getrlimit(kind) for kind in _LIMITS]
        state["priority of this"] = os.getpriority(os.PRIO_PROCESS, 0)
        state["host name"] = socket.gethostname()
        state["ipc"] = [Path(f"/proc/sysvipc/{kind}").read_text().count("29780") for kind in ("shm", "msg", "sem")]
        connected = []
        for name, server in (("TCP", self.tcp), ("abstract", self.unix), ("named", self.named)):
            try:
                server.accept()[0].close()
                connected.append(name)
            except BlockingIOError:
                pass
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", self.free)) == 0:
                connected.append("a listener")
        state["connected"] = connected
        return state

    def end(self) -> None:
        """Nothing stays."""
        self.bystander.kill()
        self.bystander.wait()
        for server in (self.tcp, self.unix, self.named):
            server.close()


def _seen(file: Path) -> tuple[object, ...]:
    status = file.lstat()
    content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    extra = sorted(os.listxattr(file, follow_symlinks=False))
    return status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_nlink, content, extra


def run_all(folder: Path, *, unsafe: bool) -> dict[str, object]:
    """How many ran, and by program: what it changed, and what was said of it."""
    protection(unsafe=unsafe)  # its trials leave orphans for the system
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
    changed, said = {}, {}
    scene = Scene(folder)
    before = scene.state()
    for kind, programs in KINDS.items():
        for name, program in programs.items():
            if unsafe and name not in BITES_UNSAFE:
                continue
            start = time.monotonic()
            outcome = run_program(scene.source(program), time_s=3.0, memory_mb=512, unsafe=unsafe)
            said[f"{kind}: {name}"] = [outcome.passed, outcome.reason[:80], round(time.monotonic() - start, 2)]
            after = scene.state()
            if after != before:
                changed[name] = [what for what in before if after.get(what) != before[what]]
                scene.end()
                (scene.home / "planted").write_text("secret planted")
                (scene.home / "tide-hostile").unlink(missing_ok=True)
                (scene.home / "socket").unlink()
                scene = Scene(folder)
                before = scene.state()
    scene.end()
    return {"user": os.geteuid(), "ran": len(said), "changed": changed, "said": said}


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), unsafe="unsafe" in sys.argv[2:])))
