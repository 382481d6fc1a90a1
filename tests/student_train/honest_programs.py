# ruff: noqa: E501  (a program is a line)
"""Programs as benchmarks hold them, a third of which fail: each must score as under a plain `exec(program, {})`."""

HONEST = {
    "nothing": "",
    "arithmetic": "import math\nassert math.gcd(12, 18) == 6",
    "main guard": "if __name__ == '__main__':\n    print(int(input()))",
    "name": "assert __name__ == 'builtins'",
    "no file": "try:\n    __file__\nexcept NameError:\n    pass\nelse:\n    assert 0",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 1\nassert asyncio.run(f()) == 1",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor as P\n"
    "with P(8) as p:\n    assert list(p.map(abs, [-1])) == [1]",
    "pool of processes": "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p:\n"
    "    assert p.map(abs, [-1, 2]) == [1, 2]",
    "queue between processes": "import multiprocessing as m\nc = m.get_context('fork')\nq = c.Queue()\n"
    "p = c.Process(target=q.put, args=(7,))\np.start()\nassert q.get() == 7\np.join()",
    "shared memory": "import mmap\nm = mmap.mmap(-1, 64)\nm[0] = 1\nassert m[0] == 1",
    "subprocess": "import subprocess\nassert subprocess.run(['echo', '1'], capture_output=True).stdout == b'1\\n'",
    "python again": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)",
    "shell": "import os\nassert os.system('true') == 0",
    "null": "open('/dev/null', 'w').write('x' * 9999)",
    "random": "assert len(open('/dev/urandom', 'rb').read(8)) == 8",
    "secrets": "import secrets, uuid\nassert secrets.token_hex(2) and uuid.uuid4()",
    "temporary file": "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n"
    "    f.write('x'); f.seek(0)\n    assert f.read() == 'x'",
    "temporary folder": "import os, tempfile\nwith tempfile.TemporaryDirectory() as d:\n"
    "    open(os.path.join(d, 'a'), 'w').close()\n    assert os.listdir(d) == ['a']",
    "file here": "import os\nopen('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\nos.remove('a.txt')",
    "pickle": "import pickle\nassert pickle.loads(pickle.dumps({1: (2, 3)})) == {1: (2, 3)}",
    "data class": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
    "named tuple": "from collections import namedtuple\nassert namedtuple('A', 'x')(1).x == 1",
    "recursion": "def f(n): return n and f(n - 1)\nassert f(900) == 0",
    "alarm": "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
    "signal.setitimer(signal.ITIMER_REAL, .01)\ntime.sleep(.05)",
    "own signal": "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\nos.kill(os.getpid(), signal.SIGUSR1)",
    "time": "import datetime, time\nassert datetime.datetime.now().year > 2000 and time.localtime().tm_year > 2000",
    "text": "assert 'ä'.encode() == b'\\xc3\\xa4'\nprint('ä')",
    "database": "import sqlite3\nassert sqlite3.connect(':memory:').execute('select 1').fetchone() == (1,)",
    "packages": "import numpy\nassert numpy.eye(2).sum() == 2",
    "local server": "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
    "socket.create_connection(s.getsockname(), 1)",
    "pair of sockets": "import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'",
    "doctest": "import doctest\ndef f():\n    '''\n    >>> 1 + 1\n    2\n    '''\n"
    "doctest.run_docstring_examples(f, {})",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
    "r = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\nassert r.wasSuccessful()",
    "daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "annotations": "from __future__ import annotations\nfrom typing import List\ndef f(x: List[int]) -> Unknown: return x\nf([])",
}
DISHONEST = {
    "wrong": "assert 1 == 2",
    "syntax": "def f(:",
    "null byte": "x = '\0'",
    "exit": "import sys\nsys.exit(0)",
    "quit": "quit()",
    "interrupt": "raise KeyboardInterrupt",
    "input": "input()",
    "end of input": "import sys\nassert sys.stdin.readline() == 'x'",
    "pickle of an own class": "import pickle\nclass A: pass\npickle.dumps(A())",
    "source of a function": "import inspect\ndef f(): pass\ninspect.getsource(f)",
    "too deep recursion": "def f(): f()\nf()",
    "missing module": "import no_such_module_of_anyone",
    "group of exceptions": "raise ExceptionGroup('x', [ValueError()])",
    "an error that cannot be shown": "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
}
"""Programs that fail officially."""
