"""Codes mean the nearest level, weigh what they claim, and their product is that of the numbers they mean."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dream_jax.quantisation import (
    BLOCK,
    MOST_FUSED_ROWS,
    NF4_LEVELS,
    QuantisedKernel,
    dequantise,
    fusing,
    is_fused,
    joined_product,
    product,
    quantise,
    quantised_kernels,
)
from dream_jax.target import target_platform

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


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((96, 3, 64), 96), ((2, 48, 128), 96), ((96, 128), 96)],
    ids=["heads out", "heads in", "matrix"],
)
def test_few_rows_on_a_gpu_are_multiplied_with_the_codes(shape, inputs):
    """The product that a GPU compiles into one kernel, run here: that of the dequantised kernel, up to bfloat16."""
    quantised = quantise(jnp.asarray(normal(*shape)), "int8")
    meant = np.asarray(dequantise(quantised, shape[-1])).reshape(inputs, -1)
    x = jnp.asarray(normal(5, inputs, seed=1), jnp.bfloat16)
    wanted = np.asarray(x, np.float32) @ meant
    with target_platform("gpu"), fusing():
        assert is_fused(x, quantised.codes, shape[-1])
        found = product(x, *quantised, shape[-1])
        short = product(x, quantised.codes, quantised.scales.astype(jnp.bfloat16), shape[-1])
        # The outputs must be rounded once, from sums in float32; the scales are rounded too.
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0, atol=0.006 * np.abs(wanted).max())
        np.testing.assert_array_equal(found, short)
        _, pull = jax.vjp(lambda x: product(x, *quantised, shape[-1]), x)
        gradient = pull(jnp.ones(found.shape, jnp.bfloat16))[0]
    assert found.dtype == jnp.bfloat16 and found.shape == (5, meant.shape[1])
    wanted = np.broadcast_to(meant.sum(axis=1), gradient.shape)
    np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=0, atol=0.01 * np.abs(wanted).max())


def test_joined_kernels_keep_their_axes():
    """One product of two kernels is the two products, fused or not, and its kernels are not flattened."""
    one, other = (quantise(jnp.asarray(normal(96, 128, seed=seed)), "int8") for seed in (0, 3))
    joined = [jnp.stack(leaves, axis=1) for leaves in zip(one, other, strict=True)]
    x = jnp.asarray(normal(5, 96, seed=1), jnp.bfloat16)
    for platform in ("cpu", "gpu"):
        with target_platform(platform), fusing():
            found = joined_product(x, *joined)
            assert found.shape == (5, 2, 128)
            for number, kernel in enumerate((one, other)):
                np.testing.assert_array_equal(found[:, number], product(x, *kernel, 128))


def test_what_is_not_multiplied_with_its_codes():
    """More rows, other dtypes and kinds, blocks that are not whole, other platforms and other programs dequantise first."""
    codes = {kind: quantise(jnp.asarray(normal(8, 128)), kind).codes for kind in ("int8", "nf4")}
    x = jnp.zeros((MOST_FUSED_ROWS, 8), jnp.bfloat16)
    with target_platform("gpu"):
        assert not is_fused(x, codes["int8"], 128)
    with target_platform("gpu"), fusing():
        assert is_fused(x, codes["int8"], 128)
        assert not is_fused(jnp.zeros((MOST_FUSED_ROWS + 1, 8), jnp.bfloat16), codes["int8"], 128)
        assert not is_fused(x.astype(jnp.float32), codes["int8"], 128)
        assert not is_fused(x, codes["nf4"], 128)
        assert not is_fused(x, quantise(jnp.asarray(normal(8, 96)), "int8").codes, 96)
    for platform in ("cpu", "tpu"):
        with target_platform(platform), fusing():
            assert not is_fused(x, codes["int8"], 128)
