# ruff: noqa: E501  (a program is a line)
"""A hundred programs that try to do harm, as a table; bounded stand-ins, nearly harmless where nothing stops them.

`PID` is a bystander of the same user, `PLANTED` a file of the user, `HOME` the folder it lies in, `PORT` where the user
listens, `FREE` a port nobody listens at, `ABSTRACT` a name of a Unix socket, `REPO` the project's folder. What is
written outside is called `tide-hostile`.
"""

_C = "import ctypes, os, signal\nC = ctypes.CDLL(None, use_errno=True)\n"
_X86 = _C + "import platform\nassert platform.machine() == 'x86_64'\n"
_CHILD = "import os, time\n"

PROCESSES = {
    "kill": "import os\nos.kill(PID, 9)",
    "terminate": "import os\nos.kill(PID, 15)",
    "stop": "import os, signal\nos.kill(PID, signal.SIGSTOP)",
    "kill all of the user": "import os\nos.kill(-1, 9)",
    "kill its group": "import os\nos.killpg(os.getpgid(PID), 9)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the first process": "import os\nos.kill(1, 9)",
    "kill every number": "import os\nfor p in range(2, 70000):\n    try: os.kill(p, 9) if p != os.getpid() else 0\n"
    "    except OSError: pass",
    "pidfd_send_signal": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(PID), 9)",
    "tgkill": _X86 + "assert C.syscall(234, PID, PID, 9) == 0",
    "tkill": _X86 + "assert C.syscall(200, PID, 9) == 0",
    "sigqueue": _C + "assert C.sigqueue(PID, 9, ctypes.c_void_p(0)) == 0",
    "prlimit cpu": "import resource\nresource.prlimit(PID, resource.RLIMIT_CPU, (0, 0))",
    "prlimit files": "import resource\nresource.prlimit(PID, resource.RLIMIT_NOFILE, (3, 3))",
    "prlimit memory": "import resource\nresource.prlimit(PID, resource.RLIMIT_AS, (1, 1))",
    "setpriority of a process": "import os\nos.setpriority(os.PRIO_PROCESS, PID, 19)",
    "setpriority of the user": "import os\nos.setpriority(os.PRIO_USER, 0, 19)\nos.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "setpriority of a group": "import os\nos.setpriority(os.PRIO_PGRP, PID, 19)",
    "sched_setaffinity": "import os\nos.sched_setaffinity(PID, {min(os.sched_getaffinity(0))})",
    "sched_setscheduler": "import os\nos.sched_setscheduler(PID, os.SCHED_IDLE, os.sched_param(0))",
    "ioprio_set": _X86 + "assert C.syscall(251, 1, PID, 3 << 13) == 0",
    "ioprio_set of the user": _X86 + "assert C.syscall(251, 3, os.getuid(), 3 << 13) == 0",
    "F_SETOWN and F_SETSIG": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, PID)\nfcntl.fcntl(r, 10, 9)\n"
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    "a signal when the parent dies": _C + "assert C.prctl(1, 9) == 0\nos.setpgid(0, os.getpgid(PID))",
    "ptrace attach": _C + "assert C.ptrace(16, PID, 0, 0) == 0",
    "ptrace seize": _C + "assert C.ptrace(0x4206, PID, 0, 0) == 0",
    "memory file": "open('/proc/PID/mem', 'r+b')",
    "process_vm_writev": _X86 + "b = ctypes.create_string_buffer(8)\nclass V(ctypes.Structure):\n"
    "    _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nv = V(ctypes.addressof(b), 8)\n"
    "assert C.process_vm_writev(PID, ctypes.byref(v), 1, ctypes.byref(v), 1, 0) > 0",
    "pidfd_getfd": _X86 + "assert C.syscall(438, os.pidfd_open(PID), 0, 0) >= 0",
    "its oom score": "open('/proc/PID/oom_score_adj', 'w').write('1000')",
    "its core filter": "open('/proc/PID/coredump_filter', 'w').write('0x7f')",
    "its root": "import os\nos.listdir('/proc/PID/root/')",
    "its environment": "print(open('/proc/PID/environ').read())",
    "migrate_pages": _X86 + "assert C.syscall(256, PID, 8, 0, 0) >= 0",
    "setpgid": "import os\nos.setpgid(PID, 0)",
    "kcmp": _X86 + "assert C.syscall(312, os.getpid(), PID, 0, 0, 0) >= 0",
    "setns": _X86 + "fd = os.pidfd_open(PID)\nassert C.syscall(308, fd, 0x20000) == 0",
}
FILES = {
    "remove": "import os\nos.remove('PLANTED')",
    "empty": "open('PLANTED', 'w')",
    "truncate": "import os\nos.truncate('PLANTED', 0)",
    "append": "open('PLANTED', 'a').write('x')",
    "rename": "import os\nos.rename('PLANTED', 'PLANTED-tide-hostile')",
    "chmod": "import os\nos.chmod('PLANTED', 0)",
    "chown": "import os\nos.chown('PLANTED', 12345, 12345)",
    "utime": "import os\nos.utime('PLANTED', (0, 0))",
    "setxattr": "import os\nos.setxattr('PLANTED', 'user.tide', b'x')",
    "new file": "open('HOME/tide-hostile', 'w').write('x')",
    "new folder": "import os\nos.makedirs('HOME/tide-hostile/a')",
    "remove the home": "import shutil\nshutil.rmtree('HOME')",
    "remove everything": "import shutil\nfor f in ('HOME', 'REPO/docs'):\n    shutil.rmtree(f, ignore_errors=True)",
    "hard link out": "import os\nos.link('PLANTED', 'mine')\nopen('mine', 'w').write('x')",
    "hard link in": "import os\nopen('mine', 'w')\nos.link('mine', 'HOME/tide-hostile')",
    "symbolic link": "import os\nos.symlink('PLANTED', 'mine')\nopen('mine', 'w').write('x')",
    "link in its place": "import os\nos.symlink('/', 'HOME/tide-hostile')",
    "through /proc/self/root": "open('/proc/self/root' + 'PLANTED', 'w').write('x')",
    "through /proc/1/root": "open('/proc/1/root' + 'PLANTED', 'w').write('x')",
    "through the parent's folder": "import os\nopen(f'/proc/{os.getppid()}/cwd/tide-hostile', 'w')",
    "shared memory": "open('/dev/shm/tide-hostile', 'w').write('x')",
    "temporary folder": "open('/tmp/tide-hostile', 'w').write('x')",
    "var": "open('/var/tmp/tide-hostile', 'w').write('x')",
    "etc": "open('/etc/tide-hostile', 'w').write('x')",
    "root folder": "open('/tide-hostile', 'w').write('x')",
    "the project": "open('REPO/tide-hostile', 'w').write('x')",
    "the interpreter": "import os, sys\nopen(os.path.join(os.path.dirname(os.__file__), 'tide-hostile.py'), 'w').write('x')",
    "the packages": "import sys\nfor p in sys.path:\n    if p.endswith('packages'): open(p + '/tide-hostile.pth', 'w')",
    "a program for the shell": "open('/usr/bin/tide-hostile', 'w')",
    "setuid": "import os\nopen('HOME/tide-hostile', 'w')\nos.chmod('HOME/tide-hostile', 0o4755)",
    "device": "import os, stat\nos.mknod('tide-hostile', stat.S_IFBLK | 0o666, os.makedev(8, 0))\nopen('tide-hostile', 'rb').read(1)",
    "raw memory": "open('/dev/mem', 'rb').read(1)",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'r+').write('|/tmp/tide-hostile')",
    "reboot by a key": "open('/proc/sysrq-trigger', 'w').write('h')",
    "a message to the kernel's log": "open('/dev/kmsg', 'w').write('tide-hostile')",
    "core dump": "import os, resource\nresource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))\nos.abort()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "open_by_handle_at": _X86 + "b = ctypes.create_string_buffer(160)\nb[0] = 128\nm = ctypes.c_int()\n"
    "assert C.syscall(303, -100, b'/', b, ctypes.byref(m), 0) == 0\nassert C.syscall(304, 3, b, 2) >= 0",
}
SECRETS = {
    "token in the environment": "import os\nassert os.environ['HF_TOKEN']",
    "environment of the parent": "import os\nassert b'HF_TOKEN' in open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "environment of the first": "assert b'HF_TOKEN' in open('/proc/1/environ', 'rb').read()",
    "ssh key": "print(open('HOME/.ssh/id_ed25519').read())",
    "token of the Hub": "print(open('HOME/.cache/huggingface/token').read())",
    "home of the user": "import os\nassert os.listdir('HOME')",
    "password hashes": "print(open('/etc/shadow').read())",
    "keyring": _X86
    + "assert C.syscall(248, b'user', b'tide-hostile', b'x', 1, -4) > 0\nassert C.syscall(250, 11, -4, 0, 0) < 0",
    "kernel's symbols": "assert int(open('/proc/kallsyms').readline().split()[0], 16)",
    "kernel's log": _C + "b = ctypes.create_string_buffer(9)\nassert C.klogctl(3, b, 9) >= 0",
}
NETWORK = {
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "TCP over IPv6": "import socket\nsocket.create_connection(('::1', PORT), 1)",
    "UDP": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "abstract Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0ABSTRACT')",
    "Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('HOME/socket')",
    "names": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "listening": "import os, socket, time\ns = socket.create_server(('0.0.0.0', FREE))\nif os.fork() == 0:\n    os.setsid()\n"
    "    time.sleep(30)",
    "raw packets": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket\ns = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)\ns.bind((0, 1))",
    "vsock": "import socket\nsocket.socket(socket.AF_VSOCK).connect((2, 1))",
}
KERNEL = {
    "user namespace": "import ctypes, os\nC = ctypes.CDLL(None)\nassert C.unshare(0x10000000) == 0",
    "user and mount namespace": _C
    + "assert C.unshare(0x10020000) == 0\nassert C.mount(b't', b'/tmp', b'tmpfs', 0, 0) == 0",
    "the program unshare": "import subprocess\nsubprocess.run(['unshare', '-Urm', 'true'], check=True)",
    "bubblewrap itself": "import subprocess\nsubprocess.run(['bwrap', '--bind', '/', '/', 'true'], check=True)",
    "clone with a user namespace": _X86
    + "p = C.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\nif p == 0: os._exit(0)\nassert p > 0",
    "mount": _C + "assert C.mount(b'none', b'/usr', b'tmpfs', 0, 0) == 0",
    "remount for writing": _C + "assert C.mount(b'none', b'/', None, 32 | 4096, 0) == 0",
    "unmount": _C + "assert C.umount2(b'/proc', 2) == 0",
    "pivot_root": _X86 + "assert C.syscall(155, b'/tmp', b'/tmp') == 0",
    "chroot": "import os\nos.chroot('/tmp')",
    "become root": "import os\nos.setuid(0)",
    "su": "import subprocess\nsubprocess.run(['su', '-c', 'true'], stdin=subprocess.DEVNULL, check=True)",
    "capabilities": _C + "assert C.prctl(23, 21, 0, 0, 0) == 1",
    "bpf": _X86 + "b = ctypes.create_string_buffer(128)\nassert C.syscall(321, 0, b, 128) >= 0",
    "perf_event_open": _X86 + "b = ctypes.create_string_buffer(128)\nassert C.syscall(298, b, PID, -1, -1, 0) >= 0",
    "io_uring": _X86
    + "b = ctypes.create_string_buffer(256)\nfd = C.syscall(425, 8, b)\nassert fd >= 0\nopen('HOME/tide-hostile', 'w')",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())",
    "host name": "import socket\nsocket.sethostname('tide-hostile')",
    "kernel module": _X86 + "assert C.syscall(175, b'', 0, b'') == 0",
    "swap": _X86 + "assert C.syscall(168, b'/tmp') == 0",
    "system V memory": _C + "i = C.shmget(0x7454, 4096, 0o1666)\nassert i >= 0",
    "system V messages": _C + "i = C.msgget(0x7454, 0o1666)\nassert i >= 0",
    "POSIX messages": "import ctypes\nC = ctypes.CDLL('librt.so.1')\nassert C.mq_open(b'/tide-hostile', 0o102, 0o600, None) >= 0",
    "input to the terminal": "import fcntl, os, termios\nfd = os.open('/dev/tty', os.O_RDWR)\nfcntl.ioctl(fd, termios.TIOCSTI, b'x')",
    "colours of the terminal": "import os\nfor fd in range(3): os.write(fd, b'\\x1b[2J')",
}
AMOUNTS = {
    "fork bomb": _CHILD + "for _ in range(9):\n    os.fork()\ntime.sleep(1)",
    "chain of forks": _CHILD + "for _ in range(400):\n    if os.fork(): time.sleep(1); os._exit(0)",
    "threads": "import threading, time\nfor _ in range(400): threading.Thread(target=time.sleep, args=(1,)).start()",
    "memory": "x = bytearray(2 << 30)",
    "memory of many": _CHILD
    + "for _ in range(12):\n    if os.fork() == 0:\n        x = bytearray(90 << 20)\n        time.sleep(2)\n"
    "        os._exit(0)\ntime.sleep(2)",
    "large file": "f = open('large', 'wb')\nfor _ in range(80): f.write(bytes(1 << 20))",
    "many files": "for i in range(160): open(f'f{i}', 'wb').write(bytes(1 << 20))",
    "filled shared memory": "for i in range(160): open(f'/dev/shm/f{i}', 'wb').write(bytes(1 << 20))",
    "filled root folder": "import os\nos.mkdir('/dev/full-of')\nopen('/dev/full-of/x', 'wb').write(bytes(1 << 20))",
    "open files": "import os\nfor _ in range(5000): os.dup(0)",
    "output": "import os\nfor _ in range(2000): os.write(1, bytes(1 << 16)), os.write(2, bytes(1 << 16))",
    "a reason without end": "raise ValueError('x' * (64 << 20))",
    "endless loop": "while True: pass",
    "deaf to signals": "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "a daemon": _CHILD
    + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(30)\n    os._exit(0)",
    "a stopped daemon": "import os, signal\nif os.fork() == 0:\n    os.setsid()\n    os.kill(os.getpid(), signal.SIGSTOP)",
    "a stopped supervisor": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
}
KINDS = {
    "processes": PROCESSES, "files": FILES, "secrets": SECRETS, "network": NETWORK, "kernel": KERNEL, "amounts": AMOUNTS,
}  # fmt: skip

FORGERIES = {
    "exit": "raise SystemExit(0)",
    "exit without clean-up": "import os\nos._exit(0)",
    "exit of the shell": "import ctypes\nctypes.CDLL(None).exit(0)",
    "says passed": "import os\nprint('passed')\nos._exit(0)",
    "another program in its place": "import os\nos.execv('/bin/true', ['true'])",
    "writes everywhere": "import os\nfor fd in range(300):\n    for said in (b'passed', b'.', bytes(32)):\n"
    "        try: os.write(fd, said)\n        except OSError: pass\nos._exit(0)",
    "closes everything": "import os\nos.closerange(0, 300)\nassert False",
    "another assert": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\nassert False",
    "another exception": "import builtins\nbuiltins.BaseException = builtins.Exception = ()\nassert False",
    "another way out": "import os\nos._exit = os.write = lambda *a: 0\nassert False",
    "nothing raises": "import sys\nsys.excepthook = lambda *a: None\nassert False",
    "words of the frames": "import gc, inspect, os\nfound = []\nfor frame in inspect.stack():\n"
    "    for kept in (*frame.frame.f_locals.values(), *frame.frame.f_globals.values()):\n"
    "        if isinstance(kept, str | bytes): found.append(kept.encode() if isinstance(kept, str) else kept)\n"
    "for fd in range(3, 300):\n    for said in (b'.', *found):\n        try: os.write(fd, said)\n        except OSError: pass\n"
    "os._exit(0)",
    "objects of the collector": "import gc, os\nfor fd in range(3, 300):\n    for kept in gc.get_objects():\n"
    "        if isinstance(kept, dict):\n            for said in list(kept.values()):\n"
    "                if isinstance(said, bytes) and len(said) < 99:\n                    try: os.write(fd, said)\n"
    "                    except OSError: break\nos._exit(0)",
    "echo": "import os, select, threading\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b'.')\n"
    "        os.write(fd, os.read(fd, 64))\n    except OSError: pass\nos._exit(0)",
    "a child that passes": "import os\nif os.fork():\n    os.wait()\n    assert False",
    "a child that stays": "import os\nif os.fork():\n    os._exit(0)",
    "a thread that ends it": "import os, threading\nthreading.Timer(0.1, os._exit, (0,)).start()\nimport time\ntime.sleep(5)",
    "at the end": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "an alarm": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.alarm(1)\nwhile True: pass",
    "a loop without end": "try:\n    while True: pass\nexcept BaseException: pass",
}
"""Programs that do not come to their end and claim it."""
