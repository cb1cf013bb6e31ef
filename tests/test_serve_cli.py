"""`serve.py` and the server on a port: the package openai, clients that go away, signals."""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import openai
import pytest
from commands import ROOT, run_script, start_script
from serving_client import TOKENIZER, expected_text, maker, nano, running, until

import dream_jax
from dream_jax import inference
from dream_jax.serving import connections, server
from dream_jax.serving.app import AppSettings, make_app
from dream_jax.serving.engine import EngineSettings


@pytest.fixture(scope="module")
def model():
    return nano()


@pytest.fixture(scope="module")
def served(model):
    """The address of a server in this process, and its engine."""
    with running(model, EngineSettings(rows=4, longest=128, interval=0.02)) as engine:
        bound = server.bind("127.0.0.1", 0)
        settings = AppSettings(model="nano", trained_mask="bidirectional", hosts=("127.0.0.1",))
        app = make_app(engine, maker(), settings, 0.0)
        ready, ends = threading.Event(), []
        # The server ends with its engine.
        thread = threading.Thread(target=lambda: ends.append(server.run(app, bound, engine, ready.set, 1.0)))
        thread.start()
        assert ready.wait(60)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", engine
        engine.drain(0.0)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "user", "content": "hi"}]


def test_openai_client(model, client):
    assert [one.id for one in client.models.list()] == ["nano"]
    wanted = expected_text(model, TOKENIZER.chat(MESSAGES), 20, seed=2, temperature=0.8)
    options = {"model": "nano", "messages": MESSAGES, "max_tokens": 20, "seed": 2, "temperature": 0.8}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == wanted and answer.usage.prompt_tokens == len(TOKENIZER.chat(MESSAGES))
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].usage == answer.usage
    text = client.completions.create(model="nano", prompt="ab", max_tokens=5, n=2, temperature=1.0, seed=1)
    assert len(text.choices) == 2 and text.choices[0].text == expected_text(model, b"ab", 5, seed=1, temperature=1.0)
    filled = client.completions.create(
        model="nano", prompt="ab", suffix="c", max_tokens=5, extra_body={"dream": {"steps": 2}}
    )
    assert filled.choices[0].finish_reason in ("stop", "length")
    denoised = client.chat.completions.create(**options, stream=True, extra_body={"dream": {"denoise": True}})
    assert any(chunk.dream["event"] == "written" for chunk in denoised if getattr(chunk, "dream", {}).get("event"))


def test_openai_errors(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens") as error:
        client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=0)
    assert error.value.param == "max_tokens" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="use 'nano'"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)


def test_clients_that_go_away_free_their_rows(served, client):
    address, engine = served
    until(lambda: engine.counts.busy_rows == engine.counts.waiting == 0)
    before = engine.counts.cancelled
    body = json.dumps({"model": "nano", "prompt": "x", "max_tokens": 120, "dream": {"alg": "origin"}}).encode()
    for stream in (b"false", b"true"):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            asked = body[:-1] + b', "stream": ' + stream + b"}"
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
            until(lambda: engine.counts.busy_rows > 0)
        until(lambda: engine.counts.busy_rows == engine.counts.waiting == 0)
    assert engine.counts.cancelled == before + 2
    assert client.completions.create(model="nano", prompt="x", max_tokens=2).choices


def test_slow_or_broken_connections_harm_nobody(served, client):
    port = int(served[0].rpartition(":")[2])
    lines = [
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        b"x" * 100_000,
    ]
    open_ones = []
    for line in lines:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(line)
        open_ones.append(connection)
    assert client.completions.create(model="nano", prompt="x", max_tokens=2).choices
    for connection in open_ones:
        connection.close()


def test_connections_that_neither_ask_nor_read_are_closed(served, client, monkeypatch):
    """A head that does not arrive, answers that nobody reads, and too many connections."""
    port = int(served[0].rpartition(":")[2])
    monkeypatch.setattr(connections, "_HEAD_SECONDS", 0.2)
    monkeypatch.setattr(connections, "_STALL_SECONDS", 0.2)
    for begun in (b"", b"GET / HTTP/1.1\r\nHost: 127.0", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGE"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(begun)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(10_000):
                    pass
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"x")  # of a body that never ends, after the answer
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(10_000):
                pass
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        asked = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with pytest.raises(OSError):
            while True:  # the server stops reading when nobody reads, and then closes the connection
                connection.sendall(asked * 100)
    assert client.completions.create(model="nano", prompt="x", max_tokens=2).choices
    monkeypatch.setattr(connections.BoundedConnection, "most", 0)
    refused = socket.create_connection(("127.0.0.1", port), timeout=30)
    with refused, contextlib.suppress(ConnectionResetError):
        assert refused.recv(10) == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "pass --api-key-file FILE, or --open-to-network"),
        (("--port", "70000"), "port=70000 is too large: the largest value is 65535"),
        (("--rows", "0"), "rows=0 must be at least 1"),
        (("--interval", "0"), "interval=0.0 must be a positive number"),
        (("--model", "no/such/model"), "no/such/model"),
        (("--model", "nano", "--max-length", "99999"), "more than the 2048 tokens"),
        (("--model", "nano", "--api-key-file", "missing.txt"), "missing.txt"),
        (("--model", "nano", "--host", "192.0.2.1", "--open-to-network"), "cannot serve at 192.0.2.1"),
    ],
)
def test_refusals(arguments, message):
    done = run_script("serve.py", *arguments)
    assert done.returncode in (1, 2) and message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"), [("", "no key"), ("# only this\n", "no key"), ("short\n", "keys.txt:1: ")]
)
def test_bad_key_files(tmp_path, text, message):
    path = tmp_path / "keys.txt"
    path.write_text(text)
    done = run_script("serve.py", "--model", "nano", "--api-key-file", path)
    assert done.returncode == 1 and message in done.stderr


def test_the_instruction_and_the_note_of_a_model(monkeypatch):
    """The server asks with the instruction of the training, and prints the note about the adapter before it starts."""
    prepare, made = inference.prepare, []

    def prepared(settings):
        return dataclasses.replace(prepare(settings), template="chat", instruction="Think.", note="a hint")

    def compile_programs(engine, maker, lengths):
        made.append(maker)
        raise ValueError("asked")

    monkeypatch.setattr(inference, "prepare", prepared)
    monkeypatch.setattr(server, "compile_programs", compile_programs)
    done = run_script("serve.py", "--model", "nano", "--port", 0)
    assert done.stderr == "error: asked\n" and "a hint" in done.stdout
    assert (made[0].template, made[0].instruction) == ("chat", "Think.")


def test_port_in_use():
    with server.bind("127.0.0.1", 0) as bound:
        bound.listen()
        done = run_script("serve.py", "--model", "nano", "--port", bound.getsockname()[1])
    assert done.returncode == 1 and "pass another --host or --port" in done.stderr


def test_clients_of_the_benchmark(model, served, monkeypatch):
    """Clients in a process of their own, with answers in one piece and streamed; a refusal is an error."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import http_clients

    port = int(served[0].rpartition(":")[2])
    body = {"model": "nano", "max_tokens": 5, "seed": 1}
    bodies = [body | {"prompt": text, "stream": stream} for text in ("ab", "cd") for stream in (False, True)]
    seconds, receptions = http_clients.ask(port, bodies, 2)
    wanted = [expected_text(model, text, 5, seed=1) for text in (b"ab", b"ab", b"cd", b"cd")]
    assert [one.text for one in receptions] == wanted and seconds >= max(one.last for one in receptions)
    for body, one in zip(bodies, receptions, strict=True):
        assert (one.first is not None) == (body["stream"] and one.text != "")
        assert one.first is None or 0 < one.first <= one.last
    with pytest.raises(RuntimeError, match="status 400.*max_tokens"):
        http_clients.ask(port, [body | {"max_tokens": 0}], 1)


@pytest.mark.slow
def test_benchmark(tmp_path):
    given = ("--num-prompts", 4, "--max-new-tokens", 8, "--rows", 2, "--clients", 1, 3, "--repeats", 1)
    given = (*given, "--larger-prompts", 2)
    out = tmp_path / "server.json"
    words = ("bench/server.py", "--model", "nano", *given, "--presets", "exact", "--allow-busy", "--out", out)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    row, other = found["throughput"]
    assert (other["model"], other["answers"]) == ("larger, random weights", 2)
    assert (row["answers"], row["clients"], len(row["all_ratios"])) == (4, 4, 1) and row["http_over_stream"] > 0
    assert [(row["clients"], row["answers"]) for row in found["load"]] == [(1, 4), (3, 6)]
    assert found["settings"]["model"] == "nano" and found["hardware"]["cores"] > 0


@pytest.mark.slow
def test_signals(tmp_path, monkeypatch):
    """After kill -9 in the middle of an answer a new server serves; SIGTERM finishes what runs and refuses the new."""
    # The second server takes the compiled programs of the first one.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    (tmp_path / "tokenizer").mkdir()
    TOKENIZER.save(tmp_path / "tokenizer")
    dream_jax.save(nano(), tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    with server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    started = []

    def start():
        process = start_script("serve.py", "--model", tmp_path / "model", "--port", port, "--name", "nano")
        started.append(process)
        for line in process.stdout:
            if line.startswith("serving"):
                return process
        raise AssertionError("the server ended")

    def ask(tokens=250):
        body = json.dumps({"model": "nano", "prompt": "x", "max_tokens": tokens, "dream": {"preset": "exact"}}).encode()
        headers = {"content-type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
        ) as got:
            return json.load(got)["choices"][0]["text"]

    def refuses(process):
        try:
            ask(1)
        except OSError:
            return True
        assert process.poll() is None
        return False

    def interrupted(process, number):
        """What a client gets whose answer is being made when the server gets the signal: its text or an error."""
        found = []

        def client():
            try:
                found.append(ask())
            except OSError as error:
                found.append(error)

        def busy():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as got:
                return json.load(got)["busy_rows"] == 1

        thread = threading.Thread(target=client)
        thread.start()
        until(busy)
        process.send_signal(number)
        if number == signal.SIGTERM:
            until(lambda: refuses(process))
        thread.join(120)
        return found[0]

    try:
        first = start()
        text = ask()
        assert isinstance(interrupted(first, signal.SIGKILL), OSError)
        first.wait(60)
        second = start()
        assert interrupted(second, signal.SIGTERM) == text
        assert second.wait(60) in (0, -signal.SIGTERM)
    finally:
        for process in started:
            process.kill()
            process.wait(60)
            process.stdout.close()
