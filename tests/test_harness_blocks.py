"""The adapter to lm-evaluation-harness with a model of block diffusion; lm_eval itself is replaced if it is missing."""

import dataclasses
import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax import masks
from dream_jax.inference import canvas_text, make_sampler
from dream_jax.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()


class _TemplateLM:
    """What the adapter uses of `lm_eval.api.model.TemplateLM`."""

    def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture
def harness(monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        replaced = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.utils", "lm_eval.api")}
        replaced["lm_eval.api.model"] = types.SimpleNamespace(TemplateLM=_TemplateLM)
        replaced["lm_eval.api.registry"] = types.SimpleNamespace(register_model=lambda *_: lambda kind: kind)
        replaced["lm_eval"].utils = replaced["lm_eval.utils"]
        for name, module in replaced.items():
            monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("dream_jax.evaluation.harness")
    if isinstance(
        sys.modules.get("lm_eval.api.model"), types.SimpleNamespace
    ):  # not the module of an installed lm_eval
        del sys.modules["dream_jax.evaluation.harness"]


@pytest.mark.slow
def test_blocks_of_one_token_are_scored_exactly_and_written_with_the_exact_cache(harness, tmp_path):
    config = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1)
    model = dream_jax.Dream(config, rngs=nnx.Rngs(0))
    model.trained_mask = "block-diffusion:1"
    WORDS.save(tmp_path)
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=tmp_path)
    adapter = harness.DreamHarness(
        str(tmp_path / "model"), samples=10, max_length=32, batch_size=2, greedy=True, first_token_first=True
    )
    # The answer of generation is that of `generate`, in blocks of one token.
    request = types.SimpleNamespace(args=("ab", {"max_gen_toks": 5, "do_sample": False}))
    (text,) = adapter.generate_until([request])
    sampler = make_sampler(WORDS, 5, trained_mask="block-diffusion:1", first_token_first=True)
    tokens = np.asarray(dream_jax.generate(model, np.array([WORDS.encode("ab")]), sampler).tokens)[0]
    assert text == canvas_text(tokens[2:], WORDS) and adapter._request_config({"max_gen_toks": 5}) == sampler
    # A log-likelihood is the sum of the autoregressive ones, without Monte Carlo error.
    context, answers = WORDS.encode("ab"), (tokens[2:].tolist(), WORDS.encode("xyz"))
    scored = adapter._loglikelihood_tokens([(None, context, answer) for answer in answers])
    for (found, is_greedy), answer in zip(scored, answers, strict=True):
        row = np.array([[*context, *answer]], np.int32)
        mask = masks.BlockDiffusion(1).for_rows(np.ones(row.shape, bool), np.arange(row.shape[1])[None] >= 2)
        logprobs = jax.nn.log_softmax(jnp.asarray(model(row, mask))[0])
        assert found == pytest.approx(sum(float(logprobs[1 + n, token]) for n, token in enumerate(answer)), rel=1e-5)
        assert is_greedy == (answer == answers[0])
