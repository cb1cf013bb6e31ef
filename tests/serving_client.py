"""What the tests of the server share: a nano model, an engine, and an application that runs in this process."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from starlette.testclient import TestClient

import dream_jax
from dream_jax.inference import canvas_text, make_sampler
from dream_jax.serving.app import AppSettings, make_app
from dream_jax.serving.engine import Engine, EngineSettings
from dream_jax.serving.requests import Limits, TaskMaker
from dream_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
MASK = TOKENIZER.mask_id
LONGEST = 128


def nano() -> dream_jax.Dream:
    """A nano model with random weights, whose answers are random bytes that depend on everything before and after.

    Its weights are larger than those of an untrained model. Otherwise all tokens would be almost equally probable, and
    rounding, which depends on the shape of a batch, would decide about the order of positions.
    """
    model = dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(1))
    weights = nnx.state(model, nnx.Param)
    vocab = model.config.vocab_size
    nnx.update(model, jax.tree.map(lambda x: x * 5 if x.ndim == 2 and vocab in x.shape else x * 2, weights))
    return model


def maker(template: Any = "raw", **limits: Any) -> TaskMaker:
    """Makes tasks of requests with the byte tokenizer."""
    options = {"longest": LONGEST, "default_tokens": 12, "most_choices": 8} | limits
    return TaskMaker(tokenizer=TOKENIZER, template=template, preset="exact", limits=Limits(**options))


@contextlib.contextmanager
def running(model: dream_jax.Dream, settings: EngineSettings) -> Iterator[Engine]:
    """An engine that is stopped at the end."""
    engine = Engine(model, TOKENIZER, settings)
    try:
        yield engine
    finally:
        engine.drain(0.0)
        assert not engine._thread.is_alive()


@contextlib.contextmanager
def client_of(engine: Engine, make: TaskMaker | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of an application in this process."""
    options = {"model": "nano", "trained_mask": "bidirectional"} | settings
    app = make_app(engine, maker() if make is None else make, AppSettings(**options), 0.0)
    # Without a `with` block, the application is not ended, and so the engine lives on.
    yield TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)


def expected(
    model: dream_jax.Dream, ids: Sequence[int], new_tokens: int, *, seed: int = 0, preset: Any = "exact", **options: Any
) -> dream_jax.Sample:
    """What `sample.py --prompt TEXT --seed SEED` makes of a prompt."""
    config = make_sampler(TOKENIZER, new_tokens, preset, **options)
    return dream_jax.generate(model, np.array(list(ids), np.int32).reshape(1, -1), config, jax.random.key(seed))


def expected_text(model: dream_jax.Dream, ids: Sequence[int], new_tokens: int, **options: Any) -> str:
    """The text that `sample.py` prints for a prompt without gaps."""
    return canvas_text(np.asarray(expected(model, ids, new_tokens, **options).tokens)[0, len(ids) :], TOKENIZER)


def events(response: Any) -> list[dict[str, Any]]:
    """The chunks of a stream; it must end with [DONE]."""
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def until(condition: Any, seconds: float = 60.0) -> None:
    """Waits until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition has not become true"
        time.sleep(0.01)
