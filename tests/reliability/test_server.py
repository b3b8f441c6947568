"""A server under malformed requests, clients that break off, and kills: no crash, no wrong answer, no slot lost.

`--fuzz` says how many malformed requests there are, `--kills` how many clients break off, and `--seed` which.
"""

import concurrent.futures
import contextlib
import copy
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import print_table
from tests.test_serve import CHAT, TEXT, home, post, read, wait_until

__all__ = ["home"]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, -(2**70), 0.5, 1e308, -0.0, "", " ", "x", "é\U0001f600", "\0"),
    *("<|end|>", "red " * 3000, [], [[]], [None], {}, {"a": []}, [{}], ["x"] * 40, [1, 2, 3], [[1], "x"]),
    *([{"role": "user", "content": "hi"}] * 3, [{"role": "assistant"}], [{"role": "user", "content": ["a", {}]}]),
)

FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "tools", "tool_choice", "logit_bias", "unknown"),
)


def malformed(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body: a valid request with random changes, or random bytes."""
    content = copy.deepcopy(draw.choice((CHAT, TEXT))) | {"max_tokens": 3, "temperature": 0}
    path = "/v1/completions" if "prompt" in content else "/v1/chat/completions"
    path = draw.choice([path] * 9 + ["/v1/chat/completions", "/v1", "/v1/models/x", "/%ff", "/../x"])
    for _ in range(draw.randint(1, 3)):
        field = draw.choice(FIELDS)
        if draw.random() < 0.2:
            content.pop(field, None)
        else:
            content[field] = draw.choice(VALUES)
    body = json.dumps(content).encode()
    if draw.random() < 0.25:
        cut = draw.randrange(len(body))
        body = body[:cut] + bytes(draw.randrange(256) for _ in range(draw.randint(0, 4))) + body[cut + 1 :]
    return path, body


def break_off(address: str, draw: random.Random) -> None:
    """Send a part of a request, or all of it, read a part of the response, and close or reset the connection."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(CHAT | {"stream": draw.random() < 0.7, "max_tokens": 50, "temperature": 2.0}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request += f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(request[: draw.choice((draw.randrange(len(request)), len(request), len(request)))])
        with contextlib.suppress(TimeoutError):
            client.settimeout(draw.random() * 0.2 + 0.001)
            client.recv(draw.choice((1, 100, 10_000)))
        if draw.random() < 0.5:
            linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # closed by a reset


@contextlib.contextmanager
def server(home: Path, log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "jaxstages", "serve", f"--workdir={home}/work", "--port=0", "--slots=3", *flags]
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_until(lambda: "Ctrl-C ends" in log.read_text() or process.poll() is not None, 120)
        match = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert match, log.read_text()
        yield process, match[0]
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> list[str]:
    """Greedy answers of both stages."""
    texts = []
    for path, content in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        status, body = post(address, path, json.dumps(content | {"temperature": 0, "max_tokens": 12}).encode())
        assert status == 200, body
        choice = json.loads(body)["choices"][0]
        texts.append(choice["text"] if "text" in choice else choice["message"]["content"])
    return texts


def resident_megabytes(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+)", status)
    assert match is not None
    return int(match[1]) / 1000


def test_malformed_requests_and_clients_that_break_off(
    home: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, breaks = request.config.getoption("--fuzz"), 10 * request.config.getoption("--kills")
    draw = random.Random(request.config.getoption("--seed"))
    log = tmp_path / "log"
    with server(home, log) as (process, address):
        expected = answers(address)
        for _ in range(20):  # what is allocated by the first requests
            post(address, *malformed(random.Random(1)))
        memory = resident_megabytes(process)
        statuses: Counter[int] = Counter()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            requests = [malformed(draw) for _ in range(count)]
            for (path, body), result in zip(
                requests, pool.map(lambda each: post(address, *each), requests), strict=True
            ):
                status, content = result
                statuses[status] += 1
                assert status < 500, (path, body, content)
                assert status == 200 or "error" in json.loads(content), (path, body, content)
            [*pool.map(lambda seed: break_off(address, random.Random(seed)), range(breaks))]

        wait_until(lambda: json.loads(read(address, "/health"))["answers"] == 0, 60)
        assert answers(address) == expected
        growth = resident_megabytes(process) - memory
        assert growth < 60, f"{growth} MB"
        assert "Traceback" not in log.read_text(), log.read_text()
    figures = {"by status": dict(sorted(statuses.items())), "broken off": breaks, "memory MB": round(growth)}
    print_table(f"a server, {count} malformed requests", figures)


def test_a_killed_server_starts_again_with_the_same_answers(home: Path, tmp_path: Path) -> None:
    with server(home, tmp_path / "log") as (process, address):
        expected = answers(address)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            body = json.dumps(CHAT | {"n": 16, "max_tokens": 50, "temperature": 2.0}).encode()
            requests = [pool.submit(post, address, "/v1/chat/completions", body) for _ in range(3)]
            wait_until(lambda: json.loads(read(address, "/health"))["answers"])
            process.send_signal(signal.SIGKILL)
            for each in requests:
                with pytest.raises(OSError):
                    each.result()
    started = time.monotonic()
    with server(home, tmp_path / "log") as (_, address):
        assert answers(address) == expected
    assert time.monotonic() - started < 120
