"""Attention is a plain softmax, whatever the heads, the mask and the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dream_jax import attention as attention_module
from dream_jax import masks

attention = jax.jit(attention_module.attention, static_argnames="backend")


def reference(q_BTNH, k_BSKH, v_BSKH, allowed_BTS):
    """softmax(q k^T / sqrt(H)) v in float64, one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    batch, _, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for row in range(batch):
        for head in range(heads):
            scores = q[row, :, head] @ k[row, :, head // group].T / np.sqrt(width)
            scores = np.where(allowed_BTS[row], scores, -np.inf)
            odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[row, :, head] = odds / odds.sum(axis=-1, keepdims=True) @ v[row, :, head // group]
    return out


def inputs(batch, queries, keys, heads, kv_heads, width=8):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)
    return [jnp.asarray(rng.normal(0, 2, shape), jnp.float32) for shape in shapes]


def make_mask(kind, batch, queries, keys):
    if kind == "all":
        return masks.Bidirectional()
    if kind == "padding":  # a row without padding, rows with more and more
        return masks.KeyPadding(np.arange(keys) >= np.arange(batch)[:, None] * 2)
    if kind == "lengths":
        return masks.KeyLengths(keys - np.arange(batch) * 2)
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (batch, keys)), axis=1)
    return masks.Segments(segments[:, :queries], segments)


@pytest.mark.parametrize("kind", ["all", "padding", "lengths", "segments"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 5, 5), (3, 11, 11), (2, 4, 9)])
def test_attention_is_a_softmax(batch, queries, keys, heads, kv_heads, kind):
    q, k, v = inputs(batch, queries, keys, heads, kv_heads)
    mask = make_mask(kind, batch, queries, keys)
    allowed = np.broadcast_to(mask.dense(queries, keys), (batch, queries, keys))
    out = attention(q, k, v, mask, backend="xla")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(q, k, v, allowed), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out, attention(q, k, v, mask))  # "auto"


def test_hidden_keys_cannot_be_felt():
    q, k, v = inputs(2, 6, 6, 4, 2)
    mask = make_mask("padding", 2, 6, 6)
    changed = [x.at[1, 0].set(1e4) for x in (k, v)]
    np.testing.assert_array_equal(attention(q, k, v, mask), attention(q, *changed, mask))


def test_row_of_padding_stays_finite():
    q, k, v = inputs(2, 4, 4, 4, 2)
    mask = masks.KeyPadding(jnp.array([[False] * 4, [True] * 4]))

    def value(q, k, v):
        return jnp.sum(attention(q, k, v, mask) ** 2)

    out, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(out)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_scores_and_softmax_are_float32_under_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(2, 64, 64, 4, 2))
    out = attention(q, k, v, masks.Bidirectional())
    assert out.dtype == jnp.bfloat16
    wanted = reference(*(x.astype(jnp.float32) for x in (q, k, v)), np.ones((2, 64, 64), bool))
    # Within a rounding of the weights and one of the output; scores in bfloat16 are off ten times as far.
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=2**-7, atol=0.02)


@pytest.mark.usefixtures("unchecked")
def test_unknown_backend_raises():
    with pytest.raises(ValueError, match="flash3"):
        attention_module.attention(*inputs(1, 2, 2, 2, 2), masks.Bidirectional(), "flash3")


@pytest.mark.usefixtures("unchecked")
def test_heads_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key/value heads"):
        attention_module.attention(*inputs(1, 4, 4, 4, 3), masks.Bidirectional())
