"""The lines of Python that the documentation promises to users, executed on the nano model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import dream_jax


@pytest.fixture(scope="module")
def nano():
    return dream_jax.load("nano", dtype="float32", mesh=None)


def test_everything_that_is_exported_exists():
    for name in dream_jax.__all__:
        assert getattr(dream_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dream_jax.nothing


def test_logits(nano):
    tokens = np.arange(12).reshape(2, 6)
    logits = nano(tokens, attention_mask=None, positions=None)
    assert logits.shape == (2, 6, nano.config.vocab_size) and logits.dtype == np.float32
    padded = nano(tokens, attention_mask=np.array([[0, 1, 1, 1, 1, 1], [1] * 6]))
    assert not np.allclose(padded[0, 1:], logits[0, 1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        nano.config.vocab_size = 1


@pytest.mark.parametrize(
    "options",
    [
        {"alg": "entropy", "temperature": 0.2, "top_p": 0.95},
        {"alg": "maskgit_plus", "commit": dream_jax.Threshold(0.9)},
        {"alg": "maskgit_plus", "commit": dream_jax.Factor(1.0), "cache": dream_jax.NoCache()},
        {"alg": "entropy", "commit": dream_jax.EntropyBound(0.1)},
        {"alg": "entropy", "commit": dream_jax.Count(), "cache": dream_jax.WindowCache(), "block_length": 4},
    ],
    ids=["published", "threshold", "factor", "entropy-bound", "window-cache"],
)
def test_generate(nano, options):
    prompt = np.arange(10).reshape(2, 5)
    config = dream_jax.SamplerConfig(max_new_tokens=8, steps=8, **options)
    out = dream_jax.generate(nano, prompt, config, key=jax.random.key(0), prompt_mask=None)
    assert out.tokens.shape == out.commit_step.shape == (2, 13)
    np.testing.assert_array_equal(out.tokens[:, :5], prompt)
    assert int(out.forwards) >= 1
    np.testing.assert_array_equal(out.canvas_at(-1)[:, 5:], nano.config.mask_token_id)
    np.testing.assert_array_equal(out.canvas_at(int(np.max(out.commit_step))), out.tokens)


@pytest.mark.parametrize(
    "weight",
    [
        dream_jax.CartWeight(0.1),
        dream_jax.InverseTimeWeight(),
        dream_jax.LinearWeight(),
        dream_jax.UniformWeight(),
    ],
)
def test_masked_diffusion_loss(nano, weight):
    masked = np.array([[False, True, True, False], [True, False, False, True]])
    loss, aux = dream_jax.masked_diffusion_loss(
        nano, np.arange(8).reshape(2, 4), masked, np.array([0.5, 0.25]), weight=weight, attention_mask=None
    )
    assert np.isfinite(loss) and loss > 0
    assert float(aux["num_masked"]) == 4.0


def test_save_and_load(nano, tmp_path):
    tokens = np.arange(6)[None]
    dream_jax.save(nano, tmp_path / "converted")
    dream_jax.export_hf(nano, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "Dream"
    for directory in ("converted", "exported"):
        again = dream_jax.load(tmp_path / directory, dtype="float32")
        np.testing.assert_array_equal(again(tokens), nano(tokens))
