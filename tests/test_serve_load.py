"""Many clients at once over HTTP: each gets the answer of `sample.py`, whatever the others do; memory stays steady."""

import contextlib
import functools
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from commands import run_script, start_script
from serving_client import TOKENIZER, expected_text, maker, nano, running, until

import dream_jax
from dream_jax.serving import server
from dream_jax.serving.app import AppSettings, make_app
from dream_jax.serving.engine import Engine, EngineSettings

MIX: tuple[dict[str, Any], ...] = (
    {"preset": "exact"},
    {"preset": "exact", "temperature": 0.8},
    {"preset": "balanced", "temperature": 0.7},
)
SHAPES = ((1, 40), (17, 24))  # few, because `generate`, with which answers are compared, compiles a program for each


@pytest.fixture(scope="module")
def model() -> dream_jax.Dream:
    return nano()


@pytest.fixture(scope="module")
def served(model: dream_jax.Dream) -> Iterator[tuple[int, Engine]]:
    """The port of a server in this process, and its engine."""
    with running(model, EngineSettings(rows=8, longest=128, interval=0.02, most_waiting=64)) as engine:
        bound, ready = server.bind("127.0.0.1", 0), threading.Event()
        app = make_app(engine, maker(), AppSettings(model="nano", trained_mask="bidirectional"), 0.0)
        thread = threading.Thread(target=server.run, args=(app, bound, engine, ready.set, 1.0))
        thread.start()
        assert ready.wait(60)
        yield bound.getsockname()[1], engine
        engine.drain(0.0)
        thread.join(60)
        assert not thread.is_alive()


def body_of(options: dict[str, Any], prompt: str, new_tokens: int, seed: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "nano", "prompt": prompt, "max_tokens": new_tokens, "seed": seed, **fields}
    dream = {name: value for name, value in options.items() if name != "temperature"}
    return body | {name: value for name, value in options.items() if name == "temperature"} | {"dream": dream}


def read(response: http.client.HTTPResponse, stream: bool) -> str:
    """The text of an answer, whole or streamed."""
    assert response.status == 200, response.read()
    if not stream:
        return str(json.load(response)["choices"][0]["text"])
    chunks = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line.startswith(b"data: ")]
    assert chunks.pop() == b"[DONE]"
    return "".join(choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"])


def at_once(count: int, client: Callable[[int], None]) -> None:
    """Runs a function in threads, and raises the first error of one of them."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            client(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(scope="module")
def wanted(model: dream_jax.Dream) -> Callable[..., str]:
    """Returns the text of `sample.py` for a mix, a prompt, a number of new tokens and a seed; each is computed once."""
    return functools.cache(
        lambda mix, prompt, tokens, seed: expected_text(model, prompt.encode(), tokens, seed=seed, **MIX[mix])
    )


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 8, 64])
def test_answers_are_those_of_sample_py(wanted: Callable[..., str], served: tuple[int, Engine], clients: int) -> None:
    """Mixed lengths, seeds and settings, streamed or not; every fourth client goes away at a random time."""
    port, engine = served
    before, asked = (engine.counts.finished, engine.counts.cancelled), threading.Semaphore(0)
    found: list[tuple[tuple[int, str, int, int], str]] = []

    def client(number: int) -> None:
        rng = random.Random(clients * 100 + number)
        for turn in range(max(3, 16 // clients)):
            mix, (length, tokens), seed = rng.randrange(len(MIX)), rng.choice(SHAPES), rng.randrange(4)
            prompt, stream = "x" * length, rng.random() < 0.5
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
                body = body_of(MIX[mix], prompt, tokens, seed, stream=stream)
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                asked.release()
                if (number + turn) % 4 == 3:
                    time.sleep(rng.random() * 0.3)  # the connection is closed, whatever has come
                    continue
                found.append(((mix, prompt, tokens, seed), read(connection.getresponse(), stream)))

    at_once(clients, client)
    until(lambda: engine.counts.busy_rows == engine.counts.waiting == engine.counts.batches == 0)
    for given, text in found:
        assert text == wanted(*given), given
    finished, cancelled = engine.counts.finished - before[0], engine.counts.cancelled - before[1]
    # The server may not have seen a request whose client went away at once; every other one ended in one way.
    assert len(found) <= finished + cancelled <= asked._value and finished >= len(found)
    assert engine.counts.failed == 0


@pytest.mark.slow
def test_the_command_itself(model: dream_jax.Dream, served: tuple[int, Engine], tmp_path: Any) -> None:
    """The text that `python sample.py` prints is that of the server, for a saved model."""
    directory = save(model, tmp_path)
    for options, (length, tokens) in zip(MIX[1:], SHAPES, strict=True):
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        words = ("--model", directory, "--template", "raw", "--max-new-tokens", tokens, "--seed", 3, *flags)
        done = run_script("sample.py", "--prompt", "x" * length, *words)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.split("--- answer\n")[1].rpartition("\n--- ")[0]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served[0], timeout=300)) as connection:
            body = body_of(options, "x" * length, tokens, 3)
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            assert read(connection.getresponse(), False) == printed


def save(model: dream_jax.Dream, folder: Any) -> Any:
    """Saves a model with its tokenizer, and returns its directory."""
    (folder / "tokenizer").mkdir()
    TOKENIZER.save(folder / "tokenizer")
    dream_jax.save(model, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.mark.slow
def test_memory_is_steady(model: dream_jax.Dream, tmp_path: Any) -> None:
    """After a start, further requests, whole, streamed, refused or left by their clients, need no more memory."""
    options = ("--port", 0, "--preset", "exact", "--name", "nano", "--compile-lengths", 64)
    process = start_script("serve.py", "--model", save(model, tmp_path), *options)
    try:
        for line in process.stdout or ():
            if line.startswith("serving"):
                port = int(line.split("http://127.0.0.1:")[1].split()[0])
                break
        headers = {"content-type": "application/json"}

        def client(number: int, count: int) -> None:
            rng = random.Random(number)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            for turn in range(count):
                stream = bool(turn % 2)
                body = body_of({"preset": "exact", "temperature": 0.5}, "x" * rng.randrange(30), 4, turn, stream=stream)
                kind = turn % 8
                if kind == 5:
                    body["dream"] |= {"denoise": True}
                if kind == 6:
                    body["max_tokens"] = 0
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                if kind == 7:
                    connection.close()
                    continue
                response = connection.getresponse()
                if kind == 6:
                    assert (response.status, response.read()[:9]) == (400, b'{"error":')
                else:
                    read(response, stream)
            connection.close()

        used = []
        for _ in range(4):
            at_once(8, lambda number: client(number, 64))
            used.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        # The C library takes memory for its threads in steps of some MiB during the first thousand requests. After
        # them, 4000 more were seen to need 3 MiB.
        assert used[-1] - used[1] < 6, f"MiB after each 512 requests: {used}"
    finally:
        process.kill()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
