"""Codes mean the nearest level, weigh what they claim, and their product is that of the numbers they mean."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dream_jax.quantisation import BLOCK, NF4_LEVELS, QuantisedKernel, dequantise, product, quantise, quantised_kernels

INT8_LEVELS = np.arange(-127, 128) / 127


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def test_levels_are_quantiles_of_a_normal_distribution():
    """As the QLoRA paper derives them: from 1/2 to an offset, 9 quantiles above and 8 below, scaled to end at 1."""
    inverse = statistics.NormalDist().inv_cdf
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = [inverse(p) for p in np.linspace(0.5, offset, 9)]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    wanted = np.array([*below, *above]) / inverse(offset)
    np.testing.assert_allclose(NF4_LEVELS, wanted, atol=1e-6)


@pytest.mark.parametrize(("kind", "levels"), [("int8", INT8_LEVELS), ("nf4", np.array(NF4_LEVELS))])
@pytest.mark.parametrize("size", [BLOCK, 4 * BLOCK, 96, 16, 7, 65])
def test_every_element_becomes_its_nearest_level(kind, levels, size):
    x = normal(3, 5, size)
    quantised = jax.jit(quantise, static_argnums=1)(x, kind)
    found = np.asarray(dequantise(quantised, size))
    assert found.dtype == np.float32 and found.shape == x.shape
    for start in range(0, size, BLOCK):
        part = x[..., start : start + BLOCK]
        scale = np.abs(part).max(axis=-1, keepdims=True)
        nearest = np.abs(part[..., None] - scale[..., None] * levels).min(axis=-1)
        np.testing.assert_allclose(np.abs(found[..., start : start + BLOCK] - part), nearest, atol=2e-7 * scale.max())
        # What the module's docstring promises.
        assert np.all(nearest <= scale * {"int8": 0.004, "nf4": 0.1521}[kind])


def test_bytes_are_what_they_claim():
    x = normal(2, 8, 4 * BLOCK)
    scales = x.size // BLOCK * 4
    for kind, codes in (("int8", x.size), ("nf4", x.size // 2)):
        quantised = quantise(jnp.asarray(x), kind)
        assert quantised.codes.nbytes == codes and quantised.scales.nbytes == scales, kind
    assert (quantised.codes.dtype, quantised.codes.shape) == (np.uint8, (2, 8, 2 * BLOCK))


def test_packing_is_as_documented():
    """Byte j of a block holds element j in its low half and element j + 32 in its high half."""
    code = np.random.default_rng(0).integers(0, 16, (2, BLOCK))
    code[:, 0] = 15  # so that the scale is 1
    codes = quantise(jnp.asarray(np.array(NF4_LEVELS, np.float32)[code]), "nf4").codes
    np.testing.assert_array_equal(codes, code[:, : BLOCK // 2] + 16 * code[:, BLOCK // 2 :])


def test_zeros_and_maxima_are_exact():
    x = normal(4, 2 * BLOCK)
    x[0] = 0.0
    x[1, ::2] = 0.0
    for kind in ("int8", "nf4"):
        found = np.asarray(dequantise(quantise(jnp.asarray(x), kind), x.shape[-1]))
        assert np.all(found[x == 0] == 0), kind
        largest = np.abs(x).reshape(8, BLOCK).argmax(axis=1)
        rows = np.arange(8)
        wanted, got = (a.reshape(8, BLOCK)[rows, largest] for a in (x, found))
        np.testing.assert_allclose(got, wanted, rtol=2e-7)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_product_and_its_gradient(kind):
    """Those of the numbers that the codes mean; no gradient goes to codes or scales."""
    kernel, x, pull = normal(24, 4, 32), normal(6, 24, seed=1), normal(6, 128, seed=2)
    quantised = quantise(jnp.asarray(kernel), kind)
    meant = np.asarray(dequantise(quantised, 32)).reshape(24, 128)
    found, gradient = jax.vjp(lambda x: product(x, *quantised, 32), jnp.asarray(x))
    np.testing.assert_allclose(found, x @ meant, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient(jnp.asarray(pull))[0], pull @ meant.T, rtol=1e-5, atol=1e-7)
    half = product(jnp.asarray(x, jnp.bfloat16), *quantised, 32)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), x @ meant, rtol=0, atol=0.02 * np.abs(x @ meant).max())
    scales = jax.grad(lambda scales: jnp.sum(product(jnp.asarray(x), quantised.codes, scales, 32)))(quantised.scales)
    assert not np.any(scales)


def test_trees():
    tree = {"a": {"kernel": jnp.asarray(normal(8, 64)), "bias": jnp.ones(64)}, "scale": jnp.ones(3)}
    found = quantised_kernels(tree, "nf4", lambda leaf: leaf.astype(jnp.bfloat16))
    assert jax.tree.map(lambda leaf: str(leaf.dtype), found) == {
        "a": {"codes": "uint8", "scales": "float32", "bias": "bfloat16"},
        "scale": "bfloat16",
    }
    np.testing.assert_array_equal(found["a"]["codes"], quantise(tree["a"]["kernel"], "nf4").codes)


def test_unknown_kinds_raise():
    with pytest.raises((ValueError, TypeCheckError), match="int4"):
        quantise(jnp.ones((2, 64)), "int4")
    assert QuantisedKernel._fields == ("codes", "scales")  # the names that the sharding tables know
