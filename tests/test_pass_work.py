"""The formula of the work of a forward pass, against compiled programs and against the weights of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dream_jax import masks
from dream_jax.attention import KVCache, Window
from dream_jax.chips import CHIPS
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.flops import PassWork, pass_work
from dream_jax.model import Dream, abstract_model, merge_params, split_params

# The products are so wide that the other operations, such as those of the softmax, are a few percent.
CONFIG = DreamConfig(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    mask_token_id=1,
    pad_token_id=0,
)


def compiled_costs(config, batch, queries, keys, unembedded):
    """Returns XLA's cost analysis of a pass, whose layers are apart because XLA counts the body of a loop once."""
    graphdef, params = split_params(abstract_model(config, param_dtype=jnp.float32, layers="apart"))
    cache = (config.num_hidden_layers, batch, keys, config.num_key_value_heads, config.head_dim)
    stored = jax.ShapeDtypeStruct(cache, jnp.float32)

    def forward(params, tokens_BT, k, v):
        model: Dream = merge_params(graphdef, params)
        positions_BT = jnp.broadcast_to(jnp.arange(keys - queries, keys), tokens_BT.shape)
        if queries == keys:
            hidden_BTD, kv_cache = model.hidden_and_kv_cache(tokens_BT, masks.Bidirectional(), positions_BT)
        else:
            mask = masks.Bidirectional().at(positions_BT)
            hidden_BTD, kv_cache = model.hidden_window(
                tokens_BT, mask, positions_BT, Window(KVCache(k, v), positions_BT)
            )
        return model.unembed(hidden_BTD[:, :unembedded]) if unembedded else hidden_BTD, kv_cache

    tokens = jax.ShapeDtypeStruct((batch, queries), jnp.int32)
    found = jax.jit(forward, donate_argnums=(2, 3)).lower(params, tokens, stored, stored).compile().cost_analysis()
    return found[0] if isinstance(found, list) else found  # a list in older versions of jax


@pytest.mark.parametrize(
    ("shape", "tied"),
    [((1, 256, 256, 32), False), ((3, 33, 256, 32), False), ((2, 64, 256, 0), True)],
    ids=["full", "window", "window of a tied model"],
)
def test_the_formula_agrees_with_compiled_programs(shape, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    batch, queries, keys, unembedded = shape
    costs = compiled_costs(config, *shape)
    work = pass_work(config, batch=batch, queries=queries, keys=keys, unembedded=unembedded, itemsize=4)
    # XLA also counts the operations that are no products.
    assert work.flops < costs["flops"] < 1.06 * work.flops
    # The bytes are a lower bound: the program moves activations as well.
    assert 0.1 * costs["bytes accessed"] < work.nbytes < costs["bytes accessed"]


def test_the_bytes_are_weights_and_keys_and_values():
    params = split_params(abstract_model(CONFIG, param_dtype=jnp.float32))[1]
    weights = sum(leaf.size for leaf in jax.tree.leaves(params)) - CONFIG.vocab_size * CONFIG.hidden_size
    head = CONFIG.vocab_size * CONFIG.hidden_size
    shape = {"batch": 5, "queries": 7, "keys": 100}
    # Two layers, keys and values, two heads of 64 numbers.
    numbers = weights + 5 * 7 * CONFIG.hidden_size + 2 * 2 * 2 * 64 * 5 * (100 + 7)
    assert pass_work(CONFIG, **shape, unembedded=1).nbytes == 2 * numbers
    assert pass_work(CONFIG, **shape, unembedded=0, itemsize=4).nbytes == 4 * (numbers - head)


def test_the_work_of_a_pass_of_dream_7b():
    config, h200 = PRESETS["dream-7b"], CHIPS["h200"]
    # bench/sampler.py counts 14.06 TFLOP for a full pass over 512 + 512 tokens, half of whose new tokens are masked.
    full = pass_work(config, batch=1, queries=1024, keys=1024, unembedded=256)
    assert full.flops == pytest.approx(14.06e12, rel=0.001)
    # A pass over a short window reads 13.05 GB of weights in the layers and 1.09 GB of the output projection.
    window = pass_work(config, batch=1, queries=33, keys=1024, unembedded=32)
    assert window.nbytes == pytest.approx(13.05e9 + 1.09e9, rel=0.01)
    assert full.seconds(h200) == full.flops / h200.peak_flops
    assert window.seconds(h200) == window.nbytes / h200.memory_bandwidth
    assert PassWork(2.0, 0.0).seconds(h200) == 2.0 / h200.peak_flops
