"""Clients of a server in a process of their own: `server.py` starts it, so that they do not share a lock with the server.

The process reads a job from its input and writes the answers to its output, as JSON. It needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_TIMEOUT = 900.0  # seconds; the server itself ends a request after 600


@dataclasses.dataclass(frozen=True)
class Reception:
    """The answer to one request as a client has received it.

    Attributes:
      text: the text of the answer.
      first: seconds from the request to the first text of a stream; None for an answer without text or in one piece.
      last: seconds from the request to the end of the answer.
    """

    text: str
    first: float | None
    last: float


def ask(port: int, bodies: Sequence[Mapping[str, Any]], clients: int) -> tuple[float, list[Reception]]:
    """Sends requests to `/v1/completions` of a server on this machine, in a new process.

    Each client sends its next request when it has received the answer to the last one.

    Args:
      port: the port of the server.
      bodies: the bodies of the requests, in the order in which the clients take them.
      clients: number of clients.

    Returns:
      The seconds from the first request to the last answer, and the answers in the order of the requests.

    Raises:
      RuntimeError: the server refused a request, or a connection broke.
    """
    job = json.dumps({"port": port, "bodies": list(bodies), "clients": clients})
    command = [sys.executable, str(pathlib.Path(__file__).resolve())]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients of the server have failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found["seconds"], [Reception(**one) for one in found["receptions"]]


def main() -> int:
    """Does the job that the input describes."""
    job = json.load(sys.stdin)
    local = threading.local()

    def send(body: Mapping[str, Any]) -> Reception:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", job["port"], timeout=_TIMEOUT)
        return receive(local.connection, body)

    begun = time.perf_counter()
    with ThreadPoolExecutor(job["clients"]) as pool:
        receptions = list(pool.map(send, job["bodies"]))
    seconds = time.perf_counter() - begun
    json.dump({"seconds": seconds, "receptions": [dataclasses.asdict(one) for one in receptions]}, sys.stdout)
    return 0


def receive(connection: http.client.HTTPConnection, body: Mapping[str, Any]) -> Reception:
    """Sends one request and returns its answer. Raises RuntimeError if the server refuses it."""
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()[:500]!r}")
    if not body.get("stream"):
        text = json.loads(response.read())["choices"][0]["text"]
        return Reception(text, None, time.perf_counter() - begun)
    text, first = "", None
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise RuntimeError(f"the stream ended with {chunk['error']}")
        text += "".join(choice["text"] for choice in chunk["choices"])
        if text and first is None:
            first = time.perf_counter() - begun
    return Reception(text, first, time.perf_counter() - begun)


if __name__ == "__main__":
    sys.exit(main())
