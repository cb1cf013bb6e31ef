"""The order of the axes of kernels in memory. Here a CPU takes the place of a TPU, whose orders it can store as well."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax import inference, layer_forms, layouts, sharding
from dream_jax.model import Dream, split_params

CONFIG = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=2, intermediate_size=64)


@pytest.fixture
def like_a_tpu(monkeypatch):
    monkeypatch.setattr(layouts, "_PLATFORMS", ("cpu",))


def made(form="stacked", mesh="1x1"):
    model = Dream(CONFIG, rngs=nnx.Rngs(0), layers=form)
    params = split_params(model)[1]
    shardings = sharding.parameter_shardings(params, sharding.make_mesh(mesh))
    nnx.update(model, jax.device_put(params, shardings))
    return model


def order_of(array):
    return array.format.layout.major_to_minor


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.attn.q.kernel", (0, 2, 3, 1)),  # [L, D, N, H]
        ("layers.3.attn.v.kernel", (1, 2, 0)),
        ("layers.3.attn.qkv.kernel", (1, 2, 3, 0)),  # [D, K, G + 2, H]
        ("layers.3.mlp.gate_up.kernel", (1, 2, 0)),  # [D, 2, F]
        ("layers.attn.o.kernel", (0, 1, 2, 3)),
        ("layers.mlp.gate.kernel", (0, 1, 2)),
        ("lm_head.kernel", (0, 1)),
        ("layers.attn.q.bias", None),
        ("embed.embedding", None),
    ],
)
def test_order(path, expected):
    assert layouts.order(path.split(".")) == expected


def test_kernels_are_stored_in_their_order_and_answers_are_equal(like_a_tpu):
    model = made(mesh="1x2")
    tokens = np.arange(10).reshape(2, 5)
    before, values = model(tokens), jax.tree.map(np.asarray, split_params(model)[1])
    layouts.lay_out(model)
    params = split_params(model)[1]
    jax.tree.map(np.testing.assert_array_equal, params, values)
    np.testing.assert_allclose(model(tokens), before, atol=1e-5)
    assert order_of(params["layers"]["attn"]["q"]["kernel"]) == (0, 2, 3, 1)
    assert order_of(params["layers"]["mlp"]["up"]["kernel"]) == (0, 1, 2)
    formats = layouts.parameter_formats(params, sharding.make_mesh("1x2"))
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(formats), strict=True):
        if isinstance(expected, jax.sharding.Sharding):
            assert leaf.sharding == expected
        else:
            assert (order_of(leaf), leaf.sharding) == (expected.layout.major_to_minor, expected.sharding)


def test_joined_kernels_of_layers_that_are_apart(like_a_tpu):
    model = made("apart")
    layer_forms.join(model)
    before = np.asarray(model.layers[1].attn.qkv.kernel[...])
    layouts.lay_out(model)
    after = model.layers[1].attn.qkv.kernel[...]
    assert order_of(after) == (1, 2, 3, 0)
    np.testing.assert_array_equal(after, before)


def test_compiled_functions_take_kernels_as_they_are_stored(like_a_tpu):
    """So the program need not convert a kernel first: its own order of the argument is the stored one."""
    model = made()
    layouts.lay_out(model)
    program = jax.jit(lambda kernel, x: x @ kernel[0, :, 0, :]).lower(
        model.layers.attn.q.kernel[...], jax.ShapeDtypeStruct((3, CONFIG.hidden_size), jnp.float32)
    )
    assert program.compile().input_formats[0][0].layout.major_to_minor == (0, 2, 3, 1)


def test_other_devices_keep_the_default_order():
    model = made()
    before = split_params(model)[1]
    layouts.lay_out(model)
    assert jax.tree.all(jax.tree.map(lambda one, other: one is other, before, split_params(model)[1]))
    formats = layouts.parameter_formats(before, sharding.make_mesh("1x1"))
    assert all(isinstance(one, jax.sharding.Sharding) for one in jax.tree.leaves(formats))


def test_commands_lay_out_what_they_load(like_a_tpu, monkeypatch):
    prepared = inference.prepare(inference.ModelSettings(model="nano", tokenizer="bytes"))
    monkeypatch.setattr(inference.pretrained, "load", lambda *_, **__: made())
    assert order_of(prepared.load().layers.attn.k.kernel[...]) == (0, 2, 3, 1)
