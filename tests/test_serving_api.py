"""The web application in this process: OpenAI's forms, streams, keys, limits, errors."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from serving_client import MASK, TOKENIZER, client_of, events, expected, expected_text, maker, nano, running, until

from dream_jax.inference import canvas_end
from dream_jax.player import pages
from dream_jax.serving import app as app_module
from dream_jax.serving.engine import EngineSettings
from dream_jax.tokenizer import ByteTokenizer

CHAT = [{"role": "user", "content": "hi"}]
CHAT_IDS = TOKENIZER.chat(CHAT)


@pytest.fixture(scope="module")
def model():
    return nano()


@pytest.fixture(scope="module")
def engine(model):
    with running(model, EngineSettings(rows=4, longest=128, interval=0.02)) as started:
        yield started


@pytest.fixture
def client(engine):
    with client_of(engine) as made:
        yield made


def chat(client, **fields):
    return client.post("/v1/chat/completions", json={"model": "nano", "messages": CHAT, "max_tokens": 12} | fields)


def complete(client, **fields):
    return client.post("/v1/completions", json={"model": "nano", "prompt": "ab", "max_tokens": 12} | fields)


def refused(response, status, message, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"], error
    assert error["param"] == param


def test_chat(model, client):
    body = chat(client, seed=5).json()
    text = expected_text(model, CHAT_IDS, 12, seed=5)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    ids = np.asarray(expected(model, CHAT_IDS, 12, seed=5).tokens)[0, len(CHAT_IDS) :].tolist()
    made = canvas_end(np.array(ids), TOKENIZER)
    assert choice["finish_reason"] == ("stop" if made < 12 else "length")
    total = len(CHAT_IDS) + made
    assert body["usage"] == {"prompt_tokens": len(CHAT_IDS), "completion_tokens": made, "total_tokens": total}
    assert (body["object"], body["model"], body["dream"]["seed"]) == ("chat.completion", "nano", 5)


@pytest.mark.parametrize("preset", ["exact", pytest.param("fast", marks=pytest.mark.slow)])
def test_streams_join_to_the_whole_answer(client, preset):
    fields = {"seed": 3, "temperature": 1.0, "n": 2, "max_tokens": 20, "dream": {"preset": preset}}
    whole = chat(client, **fields).json()
    chunks = events(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in mine) == whole["choices"][index]["message"]["content"]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == [
            whole["choices"][index]["finish_reason"]
        ]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_events_of_denoising_are_the_steps_of_the_sampler(model, client):
    """The events of a stream, put together, are the canvas and the step ids that `generate` returns."""
    dream = {"preset": "fast", "denoise": True, "runner_ups": 2, "block_length": 8}
    chunks = events(complete(client, max_tokens=24, temperature=0.9, seed=4, stream=True, dream=dream))
    out = expected(model, list(b"ab"), 24, seed=4, preset="fast", temperature=0.9, block_length=8)
    told = [chunk["dream"] for chunk in chunks if chunk.get("dream", {}).get("event")]
    assert told[0] == {"index": 0, "event": "canvas", "length": 24, "seed": 4, "forced": [], "stop_at_end": True}
    tokens = [token for one in told[1:] for token in one["tokens"]]
    assert [token["step"] for token in tokens] == sorted(token["step"] for token in tokens)
    assert len({token["position"] for token in tokens}) == len(tokens)
    answer, steps = np.asarray(out.tokens)[0, 2:], np.asarray(out.commit_step)[0, 2:]
    for token in tokens:
        assert (token["token"], token["step"]) == (answer[token["position"]], steps[token["position"]])
        assert token["text"] == TOKENIZER.decode([token["token"]])
        if token["confidence"] is not None:  # tokens after the end have none
            assert 0 < token["confidence"] <= 1 and token["logprob"] <= 0
            assert len(token["runner_ups"]) == 2 and token["token"] not in [one["token"] for one in token["runner_ups"]]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == expected_text(model, list(b"ab"), 24, seed=4, preset="fast", temperature=0.9, block_length=8)
    if canvas_end(answer, TOKENIZER) == 24:
        assert len(tokens) == 24


def test_forced_tokens(model, client):
    forced = [{"position": 2, "text": "xy"}]
    chunks = events(complete(client, stream=True, dream={"denoise": True, "forced_tokens": forced}))
    assert [one["position"] for one in chunks[0]["dream"]["forced"]] == [2, 3]
    told = [token["position"] for chunk in chunks for token in chunk.get("dream", {}).get("tokens", [])]
    assert not {2, 3} & set(told)
    body = complete(client, dream={"forced_tokens": forced}).json()
    wanted = expected_text(model, list(b"ab"), 12, forced_tokens=((2, ord("x")), (3, ord("y"))))
    assert body["choices"][0]["text"] == wanted


class ToolBytes(ByteTokenizer):
    """A byte tokenizer whose chats begin with the tools, as JSON."""

    def chat(self, messages, add_generation_prompt=True, tools=()):
        return [*self.encode(json.dumps(list(tools))), *super().chat(messages, add_generation_prompt)]


def test_calls_of_tools(engine):
    """An answer with a call has it in OpenAI's form, whole or streamed, if the request has tools."""
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    end = [{"position": len(text), "token": TOKENIZER.eos_id}]
    fields = {"max_tokens": len(text) + 2, "dream": {"forced_tokens": [{"position": 0, "text": text}, *end]}}
    tools = [{"name": "f"}]
    with client_of(engine, dataclasses.replace(maker(), tokenizer=ToolBytes())) as client:
        [choice] = chat(client, tools=tools, logprobs=True, **fields).json()["choices"]
        [call] = choice["message"].pop("tool_calls")
        assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
        assert choice["finish_reason"] == "tool_calls" and len(choice["logprobs"]["content"]) == len(text)
        assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"a": 1}'})
        [plain] = chat(client, logprobs=True, **fields).json()["choices"]
        assert (plain["message"]["content"], plain["finish_reason"]) == (text, "stop")
        chunks = events(chat(client, tools=tools, logprobs=True, stream=True, **fields))
        told = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert "".join(one["delta"].get("content", "") for one in told) == ""
        [streamed] = [part for one in told for part in one["delta"].get("tool_calls", [])]
        assert (streamed["index"], streamed["function"]) == (0, call["function"])
        assert sum(len(one["logprobs"]["content"]) for one in told if one["logprobs"]) == len(text)
        assert told[-1]["finish_reason"] == "tool_calls"


def test_stop_strings(client):
    text = complete(client, max_tokens=30).json()["choices"][0]["text"]
    assert len(text) > 8  # of this model and prompt
    stop = text[3:6]
    cut = complete(client, max_tokens=30, stop=["not in it", stop]).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")
    chunks = events(complete(client, max_tokens=30, stop=stop, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut["text"]


def test_logprobs(model, client):
    """They are the log-softmax, over the tokens that may be written, at the step that wrote the token."""
    [choice] = chat(client, max_tokens=6, logprobs=True, top_logprobs=3).json()["choices"]
    out = expected(model, CHAT_IDS, 6)
    steps, tokens = np.asarray(out.commit_step)[0], np.asarray(out.tokens)
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"] or "\ufffd" in str(content)
    for offset, one in enumerate(content):
        position = len(CHAT_IDS) + offset
        canvas = np.asarray(out.canvas_at(int(steps[position]) - 1))
        logits = np.array(model(canvas)[0, position - 1], np.float64)
        logits[MASK] = logits[TOKENIZER.vocab_limit :] = -np.inf
        logprobs = logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()
        np.testing.assert_allclose(one["logprob"], logprobs[tokens[0, position]], atol=1e-4)
        best = np.sort(logprobs)[::-1][:3]
        np.testing.assert_allclose([top["logprob"] for top in one["top_logprobs"]], best, atol=1e-4)
    assert chat(client, max_tokens=6).json()["choices"][0]["logprobs"] is None
    chunks = events(chat(client, max_tokens=6, logprobs=True, top_logprobs=3, stream=True))
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content


@pytest.mark.slow
def test_logprobs_of_completions(client):
    [choice] = complete(client, logprobs=2, max_tokens=8).json()["choices"]
    found = choice["logprobs"]
    assert (
        len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) == len(found["top_logprobs"])
    )
    assert all(len(top) <= 2 for top in found["top_logprobs"]) and found["text_offset"][0] == 0


@pytest.mark.slow
def test_completions_of_several_prompts_with_echo(model, client):
    body = complete(client, prompt=["ab", "c"], n=2, temperature=1.0, seed=1, echo=True).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["text"] == "ab" + expected_text(model, list(b"ab"), 12, seed=1, temperature=1.0)
    assert body["choices"][2]["text"] == "c" + expected_text(model, list(b"c"), 12, seed=1, temperature=1.0)
    assert body["usage"]["prompt_tokens"] == 3
    by_ids = complete(client, prompt=[97, 98], temperature=1.0, seed=1).json()
    assert "ab" + by_ids["choices"][0]["text"] == body["choices"][0]["text"]


def test_suffix(model, client):
    [choice] = complete(client, prompt="ab", suffix="yz", max_tokens=5).json()["choices"]
    written = np.asarray(expected(model, [*b"ab", *[MASK] * 5, *b"yz"], 0).tokens)[0, 2:7]
    end = canvas_end(written, TOKENIZER)
    assert choice["text"] == TOKENIZER.decode(written[:end].tolist())
    assert choice["finish_reason"] == ("length" if end == 5 else "stop")


def test_infill(client):
    body = {"model": "nano", "parts": ["ab", {"length": 3}, "c", {"length": 2}, "."], "seed": 1, "temperature": 1.0}
    whole = client.post("/v1/infill", json=body).json()
    [choice] = whole["choices"]
    assert choice["text"] == "ab" + choice["gaps"][0] + "c" + choice["gaps"][1] + "."
    assert (choice["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 5)
    chunks = events(client.post("/v1/infill", json=body | {"stream": True, "dream": {"denoise": True}}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == choice["text"]
    assert chunks[0]["dream"]["gaps"] == [{"gap": 0, "length": 3}, {"gap": 1, "length": 2}]
    tokens = [token for chunk in chunks for token in chunk.get("dream", {}).get("tokens", [])]
    assert sorted((token["gap"], token["position"]) for token in tokens) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert chunks[-1]["choices"][0]["gaps"] == choice["gaps"]


def test_models_health_docs(client):
    [listed] = client.get("/v1/models").json()["data"]
    assert listed["id"] == "nano" and listed["dream"]["max_length"] == 128
    assert client.get("/v1/models/nano").json() == listed
    refused(client.get("/v1/models/other"), 404, "use 'nano'", "model")
    assert client.get("/health").json() == {"status": "ok", "model": "nano", "busy_rows": 0, "waiting": 0}
    page = client.get("/docs")
    assert "/v1/infill" in page.text and "<script" not in page.text
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]


def test_metrics(client):
    chat(client, stream=True)
    chat(client, temperature=-1)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dream_forwards_total"]) > 0 and float(values['dream_answers_total{end="finished"}']) > 0
    assert float(values['dream_requests_total{path="/v1/chat/completions",status="400"}']) == 1
    assert float(values["dream_answer_seconds_count"]) == 1
    client.get("/nothing/here")
    assert 'path="other",status="404"' in client.get("/metrics").text  # paths of strangers make no new series


def test_refusals(client):
    refused(chat(client, temperature=-1), 400, "got -1", "temperature")
    refused(chat(client, model="gpt-5"), 404, "use 'nano'", "model")
    refused(client.get("/nothing"), 404, "GET /docs lists")
    refused(client.get("/v1/completions"), 405, "Method Not Allowed")
    refused(
        client.post("/v1/completions", content="{", headers={"content-type": "application/json"}), 400, "not valid JSON"
    )
    refused(
        client.post("/v1/completions", content="{}", headers={"content-type": "text/plain"}), 415, "application/json"
    )
    zipped = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(client.post("/v1/completions", content="{}", headers=zipped), 415, "compressed")
    assert chat(client).status_code == 200


def test_bodies_are_bounded(engine):
    with client_of(engine, most_bytes=1000, body_seconds=0.2) as client:
        refused(complete(client, prompt="x" * 1000), 413, "larger than 1000 bytes")
        json_type = {"content-type": "application/json"}
        pieces = (b"x" * 600 for _ in range(3))  # without a content-length
        refused(client.post("/v1/completions", content=pieces, headers=json_type), 413, "larger than 1000 bytes")
        refused(
            client.post("/v1/completions", content="{}", headers=json_type | {"content-length": "9" * 30}),
            413,
            "larger",
        )


def test_bodies_of_all_clients_are_bounded(engine):
    with client_of(engine, most_held_bytes=1000) as client:
        for _ in range(3):  # what was answered is not held any more
            assert complete(client).status_code == 200
        response = complete(client, prompt="x" * 1000)
        refused(response, 429, "hold 1000 bytes; try again later")
        assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"null", "got None"),
        (b"[" * 10**5, "not valid JSON"),
        (b"[" * 10**6, "lists, objects and keys"),
        (b'{"a":' * 10**4, "not valid JSON"),
        (b'{"model": "nano", "prompt": "\xff\xfe"}', "not valid JSON in UTF-8"),
        (b'{"model": "nano", "prompt": "\\ud800"}', "not valid JSON"),
        (b'{"model": "nano", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
        (b'{"model": "nano", "prompt": [1' + b"0" * 5000 + b"]}", ""),
        (b'{"model": "nano", "prompt": "a", "seed": 1e400}', "seed"),
        (b'{"model": "nano", "prompt": "a", "temperature": 1e400}', "temperature"),
        (b'{"model": "nano", "prompt": "a", "model": "other"}', "'other' is not served"),
        (b'{"model": "nano", "prompt": [' + b"{}," * 9 * 10**4 + b"{}]}", "prompt"),
        (b'{"model": "nano", "prompt": [' + b"{}," * 10**6 + b"{}]}", "lists, objects and keys"),
        (b"{" + b",".join(b'"%d":0' % number for number in range(9 * 10**4)) + b"}", "fields"),
        (b'{"model": "nano", "messages": [' + b"0," * 10**6 + b"0]}", "prompt"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_hostile_bodies(client, body, message):
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500 and message in response.json()["error"]["message"], response.text
    assert len(response.text) < 1000


def test_slow_bodies(engine):
    """A body that does not arrive ends the request, and nothing else."""
    import asyncio

    with client_of(engine, body_seconds=0.05) as client:
        sent = []

        async def receive():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        asyncio.run(client.app(scope | {"asgi": {"version": "3.0"}, "root_path": ""}, receive, send))
        assert sent[0]["status"] == 408 and b"within 0.05 seconds" in sent[1]["body"]


def test_keys(engine):
    with client_of(engine, keys=("first-key-of-all", "second-key-of-all")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "second-key-of-all"}):
            response = client.get("/v1/models", headers=headers)
            refused(response, 401, "Authorization: Bearer KEY")
        for path in ("/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
        for path in ("/health", "/docs"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer second-key-of-all"}).status_code == 200


def test_hosts(engine):
    """A page of another site, whose name was made to lead to this machine, is refused."""
    with client_of(engine, hosts=("127.0.0.1", "localhost")) as client:
        refused(client.get("/v1/models", headers={"host": "evil.example:8000"}), 403, "evil.example")
        assert client.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200
        answer = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_errors_of_the_engine(model):
    with running(model, EngineSettings(rows=2, longest=128, most_waiting=1, time_limit=0.001)) as engine:
        with client_of(engine) as client:
            response = chat(client, n=2)
            refused(response, 429, "at most 1 may wait")
            assert 1 <= int(response.headers["retry-after"]) <= 60
            response = chat(client)
            refused(response, 504, "time limit of 0.001 seconds")
            assert response.headers["x-should-retry"] == "false"
            stream = chat(client, stream=True)
            last = stream.text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "time_limit"
        engine.drain(0.0)
        with client_of(engine) as client:
            refused(chat(client), 503, "stopped")
            assert client.get("/health").status_code == 503


def test_page_runs_only_its_own_scripts():
    policy = app_module.page_policy("<script>let a = 1</script><p><script type=module>b()</script>")
    assert policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    assert "script-src 'none'" in app_module.page_policy("<p>")


def test_page_is_served_with_its_policy(client):
    response = client.get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == pages.chat_page()
    assert response.headers["content-security-policy"] == app_module.page_policy(response.text)
    assert response.headers["content-security-policy"].count("'sha256-") == 2


def test_two_hundred_wrong_requests(client, engine):
    """Whatever is sent: an error that says what is wrong, and the server goes on."""
    import random

    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1e400,
        10**40,
        "",
        "x" * 500,
        "<|mask|>",
        "\x00",
        [],
        [[]],
        {},
        {"a": {}},
        [None],
        "\u202e{0}%s../../etc",
    ]
    fields = [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "stream",
        "dream",
    ]
    fields += ["stream_options", "logprobs", "suffix", "__class__", "logit_bias", "user"]
    before = threading.active_count()
    for number in range(200):
        path, base = rng.choice(
            [
                ("/v1/chat/completions", {"messages": CHAT}),
                ("/v1/completions", {"prompt": "a"}),
                ("/v1/infill", {"parts": ["a"]}),
            ]
        )
        body = {"model": "nano", "max_tokens": 0} | base | {rng.choice(fields): rng.choice(values) for _ in range(2)}
        body["unknown"] = number  # so that none of them is right by chance
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert 400 <= response.status_code < 500, (body, response.text)
        assert len(response.json()["error"]["message"]) < 500
    assert threading.active_count() <= before + 2
    until(lambda: engine.counts.busy_rows == 0)
    assert chat(client).status_code == 200
