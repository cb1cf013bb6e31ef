"""Dream's transformer: Qwen2.5 with the causal mask removed, in Flax NNX.

All layers are stacked along a leading axis L and run under one `jax.lax.scan`, so compile time does not grow with
depth. The model receives a mask and never chooses one. Its logits are those of the checkpoint: the right shift is not
applied.

Parameters (names as in `sharding.PARAMETER_AXES`) may be float32 master weights while the computation runs in bfloat16.
Each layer is cast inside the scan, so there is never a second copy of the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Key

from dream_jax import masks
from dream_jax.attention import Backend, KVCache, Window, attention
from dream_jax.config import DreamConfig
from dream_jax.quantisation import product
from dream_jax.shapes import Array, ParamTree
from dream_jax.sharding import constrain, mesh_context

Remat = Literal["none", "dots", "full", "offload"]

# Name under which rematerialisation saves the input of each layer.
_LAYER_INPUT = "layer_input"

# One key per row of the batch; None means no dropout.
DropoutKeys = Key[Array, "B"] | None


class Linear(nnx.Module):
    """A dense map from the axes `in_shape` to the axes `out_shape`: kernel [*in_shape, *out_shape], bias [*out_shape].

    With an adapter (`lora.attach`) it adds alpha / r times the product of lora_a [*in_shape, r] and lora_b [r,
    *out_shape]. A frozen kernel may be quantised (`lora.with_base`): then `kernel` is None and `codes` and `scales` are
    used instead.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        use_bias: bool,
        stddev: float,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.in_shape, self.out_shape = in_shape, out_shape
        kernel = jax.random.normal(rngs.params(), (*in_shape, *out_shape), jnp.float32) * stddev
        self.kernel: Any = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype)) if use_bias else None
        # nnx.data declares attributes that may hold arrays later.
        self.codes: Any = nnx.data(None)
        self.scales: Any = nnx.data(None)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_alpha, self.lora_dropout = 0.0, 0.0

    def __call__(self, x: Float[jax.Array, ...], dropout_keys: DropoutKeys = None) -> Float[jax.Array, ...]:
        """Contracts the last axes of x with the first axes of the kernel.

        Args:
          x: any leading axes; the first one is the batch when `dropout_keys` are given.
          dropout_keys: for the dropout on the adapter's input.
        """
        leading = x.shape[: x.ndim - len(self.in_shape)]
        # Written as a product of two matrices. For the gradient of a contraction over two axes (B and T) the CPU
        # backend writes a transposed copy of its operand and recomputes it, and a training step takes twice as long.
        x_RI = x.reshape(math.prod(leading), math.prod(self.in_shape))
        if self.kernel is None:
            y_RO = product(x_RI, self.codes[...], self.scales[...], self.out_shape[-1])
        else:
            y_RO = x_RI @ self.kernel[...].reshape(x_RI.shape[1], math.prod(self.out_shape))
        if self.lora_a is not None:
            y_RO = y_RO + self._adapted(x, dropout_keys).reshape(y_RO.shape)
        y = y_RO.reshape(*leading, *self.out_shape)
        return y if self.bias is None else jnp.add(y, self.bias[...])

    def _adapted(self, x: jax.Array, dropout_keys: DropoutKeys) -> jax.Array:
        """Returns the adapter's contribution to the output, [rows, outputs]."""
        if dropout_keys is not None and self.lora_dropout > 0:
            keep_rate = 1.0 - self.lora_dropout
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, keep_rate, x.shape[1:]))(dropout_keys)
            x = jnp.where(keep, x / keep_rate, jnp.zeros_like(x))
        rank = self.lora_a.shape[-1]
        x_RI = x.reshape(-1, math.prod(self.in_shape))
        hidden_Rr = x_RI @ self.lora_a[...].reshape(x_RI.shape[1], rank)
        # Scaled here because this is the smallest of the arrays.
        hidden_Rr = hidden_Rr * (self.lora_alpha / rank)
        return hidden_Rr @ self.lora_b[...].reshape(rank, -1)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale. The mean square is float32, the scaling is in the dtype of x, as in the published code."""

    def __init__(self, width: int, *, epsilon: float, dtype: jax.typing.DTypeLike):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x_BTD: Float[jax.Array, "*b d"]) -> Float[jax.Array, "*b d"]:
        """Normalises over the last axis."""
        x_f32 = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        return (x_f32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x_BTD.dtype) * self.scale[...].astype(
            x_BTD.dtype
        )


def rotary_angles(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Float[jax.Array, "B T 1 h"]:
    """Angle of each pair of channels at each position, float32 [B, T, 1, H/2] (the 1 broadcasts over heads)."""
    # float32: bfloat16 rounds position 257 to 256, and sin(257) is nothing like sin(256).
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    return jnp.asarray(positions_BT, jnp.float32)[:, :, None, None] * frequencies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the rotary angles, float32 [B, T, 1, H/2]; computed once for all layers."""

    cos: Float[jax.Array, "B T 1 h"]
    sin: Float[jax.Array, "B T 1 h"]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """The rotation of each position; see `rotary_angles`."""
    angles = rotary_angles(positions_BT, head_dim, theta)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BTNH: Float[jax.Array, "B T N H"], rotation: Rotation) -> Float[jax.Array, "B T N H"]:
    """Rotary position embedding in the half-split layout: channels i and i + H/2 form a pair. Computed in float32."""
    cos, sin = rotation.cos, rotation.sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention; q, k and v have biases, o has none."""

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        width, head = config.hidden_size, config.head_dim
        linear = functools.partial(Linear, stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.q = linear((width,), (config.num_attention_heads, head), use_bias=True)
        self.k = linear((width,), (config.num_key_value_heads, head), use_bias=True)
        self.v = linear((width,), (config.num_key_value_heads, head), use_bias=True)
        self.o = linear((config.num_attention_heads, head), (width,), use_bias=False)

    def __call__(
        self,
        x_BTD: Float[jax.Array, "B T D"],
        rotation: Rotation,
        mask: masks.Mask,
        backend: Backend,
        dropout_keys: DropoutKeys = None,
        window: Window | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Attention within each row under the mask.

        With a window, x holds the tokens of the window, the keys are those of the whole row, and the mask is for these
        queries and keys.

        Returns:
          The output, and the keys and values of the tokens in x.
        """
        keys = _split_keys(dropout_keys, 4)
        q_BTNH = constrain(rotate(self.q(x_BTD, keys[0]), rotation), "batch", "tokens", "heads", None)
        k_BSKH = constrain(rotate(self.k(x_BTD, keys[1]), rotation), "batch", None, "kv_heads", None)
        v_BSKH = constrain(self.v(x_BTD, keys[2]), "batch", None, "kv_heads", None)
        new_kv = KVCache(k_BSKH, v_BSKH)
        kv = new_kv if window is None else window.updated(new_kv)
        return self.o(attention(q_BTNH, kv.k, kv.v, mask, backend), keys[3]), new_kv


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.gate = linear((config.hidden_size,), (config.intermediate_size,))
        self.up = linear((config.hidden_size,), (config.intermediate_size,))
        self.down = linear((config.intermediate_size,), (config.hidden_size,))

    def __call__(self, x_BTD: Float[jax.Array, "B T D"], dropout_keys: DropoutKeys = None) -> Float[jax.Array, "B T D"]:
        """Applies the MLP to every position."""
        keys = _split_keys(dropout_keys, 3)
        return self.down(jax.nn.silu(self.gate(x_BTD, keys[0])) * self.up(x_BTD, keys[1]), keys[2])


def _split_keys(keys: DropoutKeys, count: int) -> list[DropoutKeys]:
    """Returns `count` sets of keys, one per draw. The keys of a row depend on that row's key only."""
    if keys is None:
        return [None] * count
    return [jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number) for number in range(count)]


class Layer(nnx.Module):
    """Pre-norm residual block. In a Dream every leaf has a leading L axis, and the scan slices out one layer at a time."""

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[jax.Array, "B T D"],
        rotation: Rotation,
        mask: masks.Mask,
        backend: Backend,
        dropout_keys: DropoutKeys = None,
        window: Window | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Applies the block; returns its output, and the keys and values of the tokens in x."""
        keys = _split_keys(dropout_keys, 2)
        with jax.named_scope("attention"):
            attended_BTD, new_kv = self.attn(self.attn_norm(x_BTD), rotation, mask, backend, keys[0], window)
            x_BTD = x_BTD + attended_BTD
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD), keys[1])
        return constrain(x_BTD, "batch", "tokens", "width"), new_kv


class Embedding(nnx.Module):
    """Token embedding table [V, D]."""

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
        self.embedding = nnx.Param((table * config.initializer_range).astype(dtype))
        self.pad_token_id = config.pad_token_id

    def __call__(self, tokens_BT: Int[jax.Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """Returns the embedding of each token.

        The embedding of the padding (end-of-text) token receives no gradient from this lookup, because the published
        model declares it as `padding_idx` of its embedding.
        """
        x_BTD = self.embedding[...][tokens_BT]
        return jnp.where((tokens_BT == self.pad_token_id)[:, :, None], jax.lax.stop_gradient(x_BTD), x_BTD)


class Dream(nnx.Module):
    """The masked-diffusion transformer.

    Attributes:
      config: the architecture.
      compute_dtype: dtype of activations, and of the weights inside a layer. The mean square of a norm, rotary angles,
        softmax and logits are always float32.
      attention_backend: passed to `attention.attention`.
      remat: what the backward pass recomputes. "none" saves every activation, "dots" saves matrix products, "full"
        saves only the input of each layer, "offload" saves that input in the pinned memory of the host.
      tokenizer_dir: directory with the tokenizer files that belong to the weights, or None. They are copied when the
        model is saved or exported.
      base_identity: for a quantised base, what `lora.identity` gave for the weights before quantisation; else None.
      trained_mask: name (`masks.parse`) of the mask that the weights were trained under. It is saved with the model,
        and the sampler and the evaluation use it by default; a direct call of the model uses only the mask it is given.
    """

    def __init__(
        self,
        config: DreamConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        compute_dtype: jax.typing.DTypeLike | None = None,
        attention_backend: Backend = "auto",
        remat: Remat = "none",
        tokenizer_dir: str | None = None,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"{remat=} is not one of {get_args(Remat)}")
        self.config = config
        self.compute_dtype = jnp.dtype(param_dtype if compute_dtype is None else compute_dtype)
        self.attention_backend = attention_backend
        self.remat = remat
        self.tokenizer_dir = tokenizer_dir
        self.base_identity: str | None = None
        self.trained_mask = "bidirectional"
        self.embed = Embedding(config, dtype=param_dtype, rngs=rngs)
        layer_keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = jax.vmap(lambda key: Layer(config, dtype=param_dtype, rngs=nnx.Rngs(key)))(layer_keys)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=param_dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                (config.hidden_size,),
                (config.vocab_size,),
                use_bias=False,
                stddev=config.initializer_range,
                dtype=param_dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | masks.Mask | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[jax.Array, "B T V"]:
        """Logits of every position.

        Args:
          tokens_BT: token ids in [0, V).
          attention_mask: [B, T], nonzero at valid tokens (other keys are hidden), or a mask value; None hides nothing.
          positions: for the rotary embedding; by default 0, 1, ... or, with a [B, T] mask, counted from the first valid
            token of each row (padding gets 1), as in the published code.

        Returns:
          float32 logits [B, T, V], not shifted: those at i predict token i + 1.

        Raises:
          ValueError: shapes that do not fit, or ids outside the vocabulary (not checked under a trace).
        """
        check_ids(tokens_BT, self.config.vocab_size)
        tokens_BT = jnp.asarray(tokens_BT)
        mask, positions_BT = mask_and_positions(tokens_BT.shape, attention_mask, positions)
        with mesh_context(self):
            return _logits(self, tokens_BT, mask, positions_BT)

    def hidden(
        self,
        tokens_BT: Int[jax.Array, "B T"],
        mask: masks.Mask,
        positions_BT: Int[jax.Array, "B T"],
        dropout_keys: DropoutKeys = None,
    ) -> Float[jax.Array, "B T D"]:
        """Hidden states after the final norm, in the compute dtype: the input of `unembed`.

        `dropout_keys` are for training adapters; see `Linear`.
        """
        return self._hidden(tokens_BT, mask, positions_BT, return_kv=False, dropout_keys=dropout_keys)[0]

    def hidden_and_kv_cache(
        self, tokens_BT: Int[jax.Array, "B T"], mask: masks.Mask, positions_BT: Int[jax.Array, "B T"]
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """As `hidden`; also returns the keys and values of all layers, which `hidden_window` needs."""
        hidden_BTD, new_kv = self._hidden(tokens_BT, mask, positions_BT, return_kv=True)
        assert new_kv is not None
        return hidden_BTD, new_kv

    def hidden_window(
        self,
        tokens_BW: Int[jax.Array, "B W"],
        mask: masks.Mask,
        positions_BW: Int[jax.Array, "B W"],
        window: Window,
    ) -> tuple[Float[jax.Array, "B W D"], KVCache]:
        """Hidden states of a few tokens of each row, which attend to the cached keys and values of the whole row.

        Args:
          tokens_BW: the W tokens of each row.
          mask: the mask for W queries and S keys.
          positions_BW: rotary positions of the tokens.
          window: the cache (from `hidden_and_kv_cache` or this method), and the positions of the tokens in it.

        Returns:
          Hidden states as from `hidden`, and the cache, updated with the keys and values of these tokens.
        """
        hidden_BWD, new_kv = self._hidden(tokens_BW, mask, positions_BW, return_kv=True, window=window)
        assert new_kv is not None
        # The cache is updated after the scan: an updated cache returned by the scan would be a second copy of it.
        return hidden_BWD, window.updated(new_kv)

    def _hidden(
        self,
        tokens_BT: Int[jax.Array, "B T"],
        mask: masks.Mask,
        positions_BT: Int[jax.Array, "B T"],
        *,
        return_kv: bool,
        dropout_keys: DropoutKeys = None,
        window: Window | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], KVCache | None]:
        config = self.config
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT).astype(self.compute_dtype)
            x_BTD = constrain(x_BTD, "batch", "tokens", "width")
            rotary = rotation(positions_BT, config.head_dim, config.rope_theta)

        def block(
            x_BTD: jax.Array, inputs: tuple[Layer, jax.Array, KVCache | None]
        ) -> tuple[jax.Array, KVCache | None]:
            x_BTD = checkpoint_name(x_BTD, _LAYER_INPUT)
            layer, layer_index, layer_cache = inputs
            layer = jax.tree_util.tree_map_with_path(functools.partial(_cast, dtype=self.compute_dtype), layer)
            keys = None
            if dropout_keys is not None:
                keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(dropout_keys, layer_index)
            layer_window = None if layer_cache is None or window is None else window.layer(layer_cache)
            x_BTD, new_kv = layer(x_BTD, rotary, mask, self.attention_backend, keys, layer_window)
            return x_BTD, new_kv if return_kv else None

        if self.remat == "full":
            block = jax.checkpoint(block)
        elif self.remat == "dots":
            block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        elif self.remat == "offload":
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
            block = jax.checkpoint(block, policy=policy)
        with jax.named_scope("layers"):
            kv_cache = None if window is None else window.kv_cache
            inputs = (self.layers, jnp.arange(config.num_hidden_layers), kv_cache)
            x_BTD, new_kv = jax.lax.scan(block, x_BTD, inputs)
        with jax.named_scope("final_norm"):
            return self.norm(x_BTD).astype(self.compute_dtype), new_kv

    def unembedding(self) -> Float[jax.Array, "D V"]:
        """The output projection [D, V] in its stored dtype; with tied embeddings, the embedding table transposed."""
        return self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def unembed(self, hidden: Float[jax.Array, "*b d"]) -> Float[jax.Array, "*b v"]:
        """float32 logits of hidden states; the inputs of the product are in the compute dtype, its sums in float32."""
        kernel_DV = self.unembedding().astype(self.compute_dtype)
        with jax.named_scope("unembed"):
            return jnp.einsum("...D,DV->...V", hidden, kernel_DV, preferred_element_type=jnp.float32)


def _cast(path: tuple[Any, ...], leaf: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts a leaf of a layer to the compute dtype, except the codes and scales of a quantised kernel."""
    if leaf.dtype == dtype or any(getattr(entry, "name", None) in ("codes", "scales") for entry in path):
        # No barrier: without one the backward pass reads the leaf from the stack of all layers and saves no copy.
        return leaf
    # The barrier keeps the cast inside the loop. XLA would move it out and hold the cast copies of all layers at once.
    return jax.lax.optimization_barrier(leaf).astype(dtype)


@jax.jit
def _logits(model: Dream, tokens_BT: jax.Array, mask: masks.Mask, positions_BT: jax.Array) -> jax.Array:
    tokens_BT = constrain(tokens_BT, "batch", "tokens")
    return constrain(model.unembed(model.hidden(tokens_BT, mask, positions_BT)), "batch", "tokens", "vocab")


def check_ids(tokens: Any, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary, for which a lookup would silently return another embedding.

    Nothing is checked under a trace, or for arrays that are partly on other hosts.
    """
    if isinstance(tokens, jax.core.Tracer) or (isinstance(tokens, jax.Array) and not tokens.is_fully_addressable):
        return
    ids = np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, got {ids.dtype} {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"token ids span {ids.min()}..{ids.max()}, outside the vocabulary 0..{vocab_size - 1}")


def mask_and_positions(
    shape: tuple[int, ...], attention_mask: Any, positions: Any
) -> tuple[masks.Mask, Int[jax.Array, "B T"]]:
    """Converts the arguments of `Dream.__call__` to a mask value and rotary positions; see there.

    Raises:
      ValueError: a shape that does not fit the tokens' [B, T].
    """
    if len(shape) != 2:
        raise ValueError(f"tokens have shape {shape}, expected [batch, tokens]")
    valid_BT = None
    if attention_mask is None:
        mask: masks.Mask = masks.Bidirectional()
    elif isinstance(attention_mask, masks.Mask):
        mask = attention_mask
    else:
        valid_BT = jnp.asarray(attention_mask).astype(bool)
        if valid_BT.shape != shape:
            raise ValueError(f"attention_mask has shape {valid_BT.shape}, but the tokens have {shape}")
        mask = masks.KeyPadding(valid_BT)
    if positions is not None:
        positions_BT = jnp.asarray(positions)
        if positions_BT.shape != shape:
            raise ValueError(f"positions have shape {positions_BT.shape}, but the tokens have {shape}")
    elif valid_BT is not None:
        positions_BT = padded_positions(valid_BT)
    else:
        positions_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return mask, positions_BT


def padded_positions(valid_BT: Bool[jax.Array, "B T"]) -> Int[jax.Array, "B T"]:
    """Positions counted from the first valid token of each row; padding gets 1, as published (its keys are hidden)."""
    return jnp.where(valid_BT, jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 1)


def abstract_model(config: DreamConfig, **options: Any) -> Dream:
    """A Dream whose parameters are shapes and dtypes without arrays; `options` as for Dream."""
    return jax.eval_shape(lambda: Dream(config, rngs=nnx.Rngs(0), **options))


def split_params(model: Dream) -> tuple[nnx.GraphDef[Dream], ParamTree]:
    """Splits a model into its static part, and its parameters as a nested dict of arrays with string keys."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge_params(graphdef: nnx.GraphDef[Dream], params: ParamTree) -> Dream:
    """The inverse of `split_params`."""
    return nnx.merge(graphdef, nnx.State(_as_params(params)))


def _as_params(tree: ParamTree) -> ParamTree:
    return {key: _as_params(value) if isinstance(value, dict) else nnx.Param(value) for key, value in tree.items()}


def parameter_count(tree: Any) -> int:
    """Number of weights in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
