"""The cross entropy of each masked position, and its gradient with any cotangents, against plain logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.objective import token_losses


def test_values_and_gradients_are_those_of_plain_logits() -> None:
    model = Dream(PRESETS["nano"], rngs=nnx.Rngs(0))
    graphdef, params = split_params(model)
    generator = np.random.default_rng(0)
    tokens_BT = generator.integers(0, 256, (3, 12)).astype(np.int32)
    masked_BT = generator.random((3, 12)) < 0.5
    masked_BT[0, :2] = True  # both are predicted from the first hidden state
    valid_BT = np.ones((3, 12), bool)
    valid_BT[1, :3] = masked_BT[1, :3] = False
    factor_BT = generator.normal(size=(3, 12)).astype(np.float32)

    def plain(params: object) -> jax.Array:
        model = merge_params(graphdef, params)
        noisy_BT = jnp.where(masked_BT, model.config.mask_token_id, tokens_BT)
        logits_BTV = model(noisy_BT, attention_mask=valid_BT)
        logits_BTV = jnp.concatenate([logits_BTV[:, :1], logits_BTV[:, :-1]], axis=1)
        nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[..., None], -1)[..., 0]
        return jnp.where(masked_BT, nll_BT, 0.0)

    def chunked(params: object) -> jax.Array:
        return token_losses(merge_params(graphdef, params), tokens_BT, masked_BT, valid_BT)[0]

    def loss(function: object) -> object:  # no sum with constant weights
        return lambda params: jnp.sum(jax.nn.sigmoid(jnp.sum(factor_BT * function(params), 1)))  # type: ignore[operator]

    np.testing.assert_allclose(chunked(params), plain(params), atol=1e-5)
    found, wanted = (jax.grad(loss(one))(params) for one in (chunked, plain))  # type: ignore[arg-type]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-4), found, wanted)


def test_packed_rows_are_refused() -> None:
    model = Dream(PRESETS["nano"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="each row must be one text"):
        token_losses(model, np.zeros((1, 4), np.int32), np.zeros((1, 4), bool), masks.Packed(np.array([[2, 2]])))
