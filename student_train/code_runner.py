"""The inner half of code_sandbox.py: a process that runs one program and says whether it came to its end.

Started as `python -I -c TEXT FD`, it knows the standard library alone and is shut in already. FD is a socket: in comes
a request (length, JSON), out goes "!" and a reason, or "." for an end; an end is asked for proof, which is the HMAC of
random bytes that did not exist while the program ran.
"""

import hmac
import json
import os
import resource
import sys

_MAX_REASON = 500


def limit_resources(limits: dict[str, int]) -> None:
    """Bounds of this process, and of what it starts, that cannot be raised again. `limits`: by the name of RLIMIT_*."""
    for name, bound in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None and name == "MSGQUEUE":
            kind = 12  # Linux has it, and this module no name for it
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            resource.setrlimit(kind, (bound, bound))


def main() -> None:
    """Read what to run, run it as the official metric does, and say what became of it."""
    channel = int(sys.argv[1])
    asked = json.loads(_received(channel, int.from_bytes(_received(channel, 8), "big")))
    os.set_inheritable(channel, False)
    limit_resources(asked["limits"])
    sys.path.extend(asked["paths"])
    sys.argv = [""]
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    os.close(silence)
    _run(asked.pop("source"), channel, bytes.fromhex(asked.pop("key")))


def _received(channel: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = os.read(channel, size - len(found))
        if not more:
            os._exit(2)
        found += more
    return found


def _run(source: str, channel: int, key: bytes) -> None:
    """Names are bound before the program can change what they mean; a fork that comes back here says nothing."""
    write, read, leave, whose, prove = os.write, os.read, os._exit, os.getpid, hmac.digest
    this = whose()
    try:
        exec(source, {})
    except BaseException as error:
        if whose() == this:
            try:
                write(channel, f"!{type(error).__name__}: {error}".encode(errors="replace")[:_MAX_REASON])
            except BaseException:
                leave(3)
        leave(1)
    if whose() == this:
        write(channel, b".")
        write(channel, prove(key, read(channel, 32), "sha256"))
    leave(0)


if __name__ == "__main__":
    main()
