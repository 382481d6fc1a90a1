"""A real S3 server on the loopback interface: moto's, with requests counted, delayed or refused on demand.

    python tests/s3_server.py           prints its URL and serves until its standard input is closed

In a thread of a test, or as a program of its own for what is measured. boto3 is imported here and nowhere in tide.
"""

import logging
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEY, SECRET = "AKIATESTTESTTESTTEST", "secretSECRETsecretSECRETsecretSECRET0000"
_ERROR = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_HEADERS = [("Content-Type", "application/xml"), ("Content-Length", str(len(_ERROR)))]


@dataclass
class Fault:
    """What happens to requests ("METHOD path") that match, `times` times.

    Args: act: called before the request is served; True: answer 503 SlowDown instead of serving it.
    """

    pattern: str
    act: Callable[[], bool]
    times: int = 1 << 30


@dataclass
class S3Server:
    """The server; `requests` are all that came, as "METHOD /bucket/key?query"."""

    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Serve no more: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a client needs to talk to this server and to nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip

    def make_bucket(self, name: str) -> str:
        """A new bucket; its URL."""
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        return f"s3://{name}"

    @contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """While the block runs, moto checks keys and signatures, and knows nobody."""
        self._check_after("0")
        try:
            yield
        finally:
            self._check_after("inf")

    def _check_after(self, num_requests: str) -> None:
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", num_requests.encode(), kind, method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def asked(self, pattern: str) -> list[str]:
        """Requests that match."""
        return [request for request in list(self.requests) if re.search(pattern, request)]

    @contextmanager
    def failing(self, pattern: str, act: Callable[[], bool] = lambda: True, times: int = 1 << 30) -> Iterator[Fault]:
        """While the block runs, requests that match fail."""
        fault = Fault(pattern, act, times)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" + (f"?{query}" if query else "")
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.times and re.search(f.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.act():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", _HEADERS)
            return [_ERROR]
        return self._app(environ, start_response)


if __name__ == "__main__":
    server = S3Server()
    print(server.url, flush=True)
    sys.stdin.read()
    server.close()
