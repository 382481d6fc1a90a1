"""The inner half of code_sandbox.py: a process that gives up every right it does not need, then runs one program.

Started as `python -I code_runner.py`, it knows the standard library alone. Standard input is one JSON object; the word
that says "ran to its end" goes to the file `result`, which is opened before anything is given up. Everything here is
one way: no call of the program can take it back.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CLONE_THREAD = 0x10000
_NEW_USER, _NEW_MOUNTS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000, 0x40000000, 0x8000000
_MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 0x4000, 1 << 18, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_READ_ONLY, _ATTR_NO_SUID, _ATTR_NO_DEVICES = 1, 2, 4
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_LANDLOCK_WITH_TRUNCATE = 3
"""First version of Landlock that guards against cutting files short."""
_READ_RIGHTS = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, read a folder: left alone
_ALL_RIGHTS = (1 << 15) - 1
_SCRATCH_BYTES = 16 << 20

_REFUSED = {
    # name: number on x86-64, number on 64-bit Arm; None: does not exist there
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41),
    "chroot": (161, 51), "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
"""Column of the table, the kernel's name of the architecture, and the number of `clone`."""
_CLONE3 = 435


class _Refused(Exception):
    """The kernel would not do something."""


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise _Refused(f"{what}: {os.strerror(code)}")
    return result


def hide_the_world(scratch: str) -> str | None:
    """Own user, mount, network and IPC namespaces: everything read-only but a small `scratch` in memory.

    Returns: why not, or None. Some containers forbid namespaces; Landlock and the filter of system calls remain.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _check(_LIBC.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_NETWORK | _NEW_IPC), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _check(_LIBC.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount /")
        size = f"size={_SCRATCH_BYTES},nr_inodes=1024,mode=0700".encode()
        _check(_LIBC.mount(b"tmpfs", scratch.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, size), "mount scratch")
        _set_attributes(b"/", _ATTR_READ_ONLY | _ATTR_NO_SUID | _ATTR_NO_DEVICES, 0)
        _set_attributes(scratch.encode(), 0, _ATTR_READ_ONLY)
    except (_Refused, OSError) as error:
        return str(error)
    return None


def _set_attributes(path: bytes, wanted: int, unwanted: int) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", wanted, unwanted, 0, 0))
    size = ctypes.c_size_t(32)
    _check(_LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, attributes, size), "mount_setattr")


def write_nowhere_but(scratch: str) -> str | None:
    """Landlock: this process may create, change and remove files in `scratch` alone. Returns: why not, or None."""
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < _LANDLOCK_WITH_TRUNCATE:
        return f"Landlock version {max(version, 0)}, and {_LANDLOCK_WITH_TRUNCATE} is needed"
    try:
        handled = ctypes.create_string_buffer(struct.pack("Q", _ALL_RIGHTS & ~_READ_RIGHTS))
        rules = _check(_LIBC.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(8), 0), "landlock_create_ruleset")
        folder = os.open(scratch, os.O_PATH | os.O_DIRECTORY)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", _ALL_RIGHTS & ~_READ_RIGHTS, folder))
        _check(_LIBC.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "landlock_add_rule")
        _check(_LIBC.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
        os.close(folder)
        os.close(rules)
    except (_Refused, OSError) as error:
        return str(error)
    return None


def filter_system_calls() -> None:
    """No sockets, no further processes, no signals, no other owner or mode of a file: EPERM from now on.

    Threads stay possible; `clone3` is reported missing, so that the C library asks for them by `clone`, whose flags
    a filter can read.
    """
    column, architecture, clone = _MACHINES[platform.machine()]
    load, equal, greater, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, missing = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
    numbers = sorted(n for row in _REFUSED.values() if (n := row[column]) is not None)
    program = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill),
        (load, 0, 0, 0), (greater, 0, 1, 0x40000000), (answer, 0, 0, refuse),  # x32 has numbers of its own
        (equal, 0, 1, _CLONE3), (answer, 0, 0, missing),
        (equal, 0, 4, clone), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD), (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]  # fmt: skip
    for number in numbers:
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def limit_resources(time_s: float, memory_mb: int) -> None:
    """Bounds of this process that cannot be raised again."""
    seconds = int(time_s) + 1
    for name, bound in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_FSIZE, _SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(name, (bound, bound))


def drop_capabilities() -> None:
    """What root may do beyond others."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    _check(_LIBC.capset(header, ctypes.create_string_buffer(24)), "capset")


def main() -> None:
    """Read what to run, give up rights, run it, and say whether its last line was reached."""
    asked = json.load(sys.stdin)
    result = os.open(asked["result"], os.O_WRONLY)
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    no_namespaces = hide_the_world(asked["scratch"])
    no_landlock = write_nowhere_but(asked["scratch"])
    if no_namespaces is not None and no_landlock is not None:
        os.write(result, f"unprotected: {no_namespaces}; {no_landlock}".encode())
        os._exit(1)
    os.chdir(asked["scratch"])
    limit_resources(asked["time_s"], asked["memory_mb"])
    drop_capabilities()
    filter_system_calls()
    if asked["source"] is None:
        os.write(result, f"namespaces: {no_namespaces or 'yes'}; Landlock: {no_landlock or 'yes'}".encode())
        os._exit(0)
    _run(asked.pop("source"), result, asked["word"].encode())


def _run(source: str, result: int, word: bytes) -> None:
    """The program, as a module of its own; an early exit of whatever kind does not reach the word."""
    try:
        exec(compile(source, "completion.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(result, f"{type(error).__name__}: {error}".encode(errors="replace")[:500])
        os._exit(1)
    os.write(result, word)
    os._exit(0)


if __name__ == "__main__":
    main()
