"""The transformer of Dream in Flax NNX: Qwen2.5 without the causal mask.

A model holds its layers in one of two forms, which compute the same. In the form "stacked" the parameters of all layers
are stacked along a leading axis L, and one `jax.lax.scan` runs the layers, so compile time does not depend on the number
of layers. In the form "apart" every layer has arrays of its own, and the compiled program contains the layers one after
the other. Then no weights are copied out of a stack; on a GPU this copying takes a quarter of the time of a forward pass.
`layer_forms` converts between the two forms; files contain the stacked form.

The caller gives the attention mask. The logits are not shifted: those at position i predict token i + 1, as in the
published checkpoint.

The parameters (named as in `sharding.PARAMETER_AXES`) may be float32 while the computation runs in bfloat16. One layer
is cast at a time, so the whole model never exists in both dtypes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Key

from dream_jax import masks
from dream_jax.attention import Backend, KVCache, Sources, Window, attention
from dream_jax.config import DreamConfig
from dream_jax.float8 import matrix_product
from dream_jax.quantisation import joined_product, product
from dream_jax.remat import LAYER_INPUT, Remat, checkpointed, named
from dream_jax.shapes import Array, ParamTree
from dream_jax.sharding import constrain, mesh_context
from dream_jax.target import current_target

LayerForm = Literal["stacked", "apart"]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

# One random key per row of the batch, for the dropout of an adapter; None means no dropout.
DropoutKeys = Key[Array, "B"] | None


class Linear(nnx.Module):
    """A dense layer that maps axes of the sizes `in_shape` to axes of the sizes `out_shape`.

    The kernel has the shape [*in_shape, *out_shape], and the bias has the shape [*out_shape]. With a LoRA adapter
    (`lora.attach`) the layer adds alpha / r * x lora_a lora_b, with lora_a [*in_shape, r] and lora_b [r, *out_shape]. A
    frozen kernel may be quantised (`lora.with_base`). Then `kernel` is None, and `codes` and `scales` replace it.
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
        self.bias: Any = nnx.Param(jnp.zeros(out_shape, dtype)) if use_bias else None
        # nnx.data tells Flax that these attributes, which are None now, may hold arrays later.
        self.codes: Any = nnx.data(None)
        self.scales: Any = nnx.data(None)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_alpha, self.lora_dropout = 0.0, 0.0

    def __call__(self, x: Float[jax.Array, ...], dropout_keys: DropoutKeys = None) -> Float[jax.Array, ...]:
        """Contracts the last axes of x with the first axes of the kernel, and adds the adapter and the bias.

        Args:
          x: [..., *in_shape]. With `dropout_keys` the first axis is the batch.
          dropout_keys: one random key per row, for the dropout on the input of the adapter; None means no dropout.

        Returns:
          The outputs, [..., *out_shape].
        """
        leading = x.shape[: x.ndim - len(self.in_shape)]
        # x and the kernel are flattened to matrices [R, I] and [I, O], because the gradient of the unflattened product
        # sums over two axes (B and T). For such a sum the CPU backend copies its operand and computes it again, and a
        # training step takes twice as long.
        x_RI = x.reshape(math.prod(leading), math.prod(self.in_shape))
        if self.kernel is None:
            y_RO = product(x_RI, self.codes[...], self.scales[...], self.out_shape[-1])
        else:
            y_RO = matrix_product(x_RI, self.kernel[...].reshape(x_RI.shape[1], math.prod(self.out_shape)))
        if self.lora_a is not None:
            y_RO = y_RO + self._adapted(x, dropout_keys).reshape(y_RO.shape)
        y = y_RO.reshape(*leading, *self.out_shape)
        return y if self.bias is None else jnp.add(y, self.bias[...])

    def _adapted(self, x: jax.Array, dropout_keys: DropoutKeys) -> jax.Array:
        """Returns what the adapter adds to the output, [rows, outputs] with flattened rows and outputs."""
        if dropout_keys is not None and self.lora_dropout > 0:
            keep_rate = 1.0 - self.lora_dropout
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, keep_rate, x.shape[1:]))(dropout_keys)
            x = jnp.where(keep, x / keep_rate, jnp.zeros_like(x))
        rank = self.lora_a.shape[-1]
        x_RI = x.reshape(-1, math.prod(self.in_shape))
        hidden_Rr = x_RI @ self.lora_a[...].reshape(x_RI.shape[1], rank)
        # The factor alpha / r is applied to this array because it is the smallest one.
        hidden_Rr = hidden_Rr * (self.lora_alpha / rank)
        return hidden_Rr @ self.lora_b[...].reshape(rank, -1)


class JoinedLinear(nnx.Module):
    """Several dense layers with the same input, which one matrix product computes together.

    XLA joins such products by itself on GPUs, but then it copies their kernels into one array in every forward pass.
    `layer_forms.join` makes this layer from the separate ones. It has no adapter.

    Attributes:
      kernel: the kernel, [D, *out_shape], or None if it is quantised. One axis of out_shape distinguishes the layers;
        `Attention` and `MLP` say which one.
      bias: the bias, [*out_shape], or None.
      codes, scales: the kernel in int8, see `quantisation.QuantisedKernel`; None if it is not quantised.
    """

    def __init__(
        self,
        kernel: jax.Array | None = None,
        bias: jax.Array | None = None,
        codes: jax.Array | None = None,
        scales: jax.Array | None = None,
    ):
        self.kernel: Any = None if kernel is None else nnx.Param(kernel)
        self.bias: Any = None if bias is None else nnx.Param(bias)
        self.codes: Any = None if codes is None else nnx.Param(codes)
        self.scales: Any = None if scales is None else nnx.Param(scales)

    def __call__(self, x_BTD: Float[jax.Array, "*b d"]) -> Float[jax.Array, "..."]:
        """Returns the outputs of all layers, [B, T, *out_shape]."""
        # The kernel is not reshaped to a matrix as in `Linear`: its last axis may be sharded, and then the reshaped
        # kernel would need all of it on every device.
        if self.kernel is None:
            y_R = joined_product(x_BTD.reshape(-1, x_BTD.shape[-1]), self.codes[...], self.scales[...])
            y = y_R.reshape(*x_BTD.shape[:-1], *y_R.shape[1:])
        else:
            y = jax.lax.dot_general(x_BTD, self.kernel[...], (((x_BTD.ndim - 1,), (0,)), ((), ())))
        return y if self.bias is None else jnp.add(y, self.bias[...])


class RMSNorm(nnx.Module):
    """Normalises the last axis by its root mean square: x / rms(x) * scale.

    As in the published code, the mean square is computed in float32, and the product with `scale` in the dtype of x.
    """

    def __init__(self, width: int, *, epsilon: float, dtype: jax.typing.DTypeLike):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x_BTD: Float[jax.Array, "*b d"]) -> Float[jax.Array, "*b d"]:
        """Returns x normalised over its last axis, in the dtype of x."""
        x_f32 = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
        return (x_f32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x_BTD.dtype) * self.scale[...].astype(
            x_BTD.dtype
        )


def rotary_angles(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Float[jax.Array, "B T 1 h"]:
    """Returns the rotary angle of each pair of channels at each position, in radians.

    The result is float32 [B, T, 1, H/2]; the axis of size 1 broadcasts over the heads.
    """
    # float32 is needed: bfloat16 rounds position 257 to 256, and sin(257) is far from sin(256).
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    return jnp.asarray(positions_BT, jnp.float32)[:, :, None, None] * frequencies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, each float32 [B, T, 1, H/2]. All layers share them."""

    cos: Float[jax.Array, "B T 1 h"]
    sin: Float[jax.Array, "B T 1 h"]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """Returns the cosines and sines of the angles that `rotary_angles` returns for the same arguments."""
    angles = rotary_angles(positions_BT, head_dim, theta)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BTNH: Float[jax.Array, "B T N H"], rotation: Rotation) -> Float[jax.Array, "B T N H"]:
    """Returns x with the rotary position embedding applied, in the dtype of x.

    Channels i and i + H/2 of a head form a pair (the "half-split" layout). The rotation is computed in float32.
    """
    cos, sin = rotation.cos, rotation.sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSources:
    """Which state of two streams predicts each token: the right shift of block diffusion.

    A token is predicted from the state at the position before it: of the clean stream if it is the first token of a block,
    otherwise of the noised stream. The first token of a text without a prompt is predicted from its own noised position.

    Attributes:
      block_starts_BT: true at the first token of each block of an answer.
      text_starts_BT: true at the first token of each text.
    """

    block_starts_BT: Bool[jax.Array, "B T"]
    text_starts_BT: Bool[jax.Array, "B T"]

    def of(self, x: jax.Array) -> jax.Array:
        """Returns the elements [B, T, ...] at the sources of the tokens, from an array [B, 2T, ...] of both streams."""
        noised, clean = jnp.split(x, 2, axis=1)
        block_starts, text_starts = (
            starts_BT.reshape(*starts_BT.shape, *[1] * (x.ndim - 2))
            for starts_BT in (self.block_starts_BT, self.text_starts_BT)
        )
        # The choice is made before the shift, so that a mesh that divides the tokens sends one state a row.
        before = jnp.roll(jnp.where(jnp.roll(block_starts, -1, axis=1), clean, noised), 1, axis=1)
        return jnp.where(text_starts, noised, before)

    def indices(self) -> Int[jax.Array, "B T"]:
        """Returns the index of the source of each token among the 2T tokens of both streams, int32."""
        rows, num_tokens = self.text_starts_BT.shape
        return self.of(jnp.broadcast_to(jnp.arange(2 * num_tokens, dtype=jnp.int32), (rows, 2 * num_tokens)))


class Attention(nnx.Module):
    """Grouped-query self-attention, with biases in the projections q, k and v, and none in the output projection o.

    After `layer_forms.join`, q, k and v are None, and `qkv` replaces them. Its outputs have the axes [K, G + 2, H]: for
    each key/value head its G query heads, the key and the value.
    """

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        width, head = config.hidden_size, config.head_dim
        linear = functools.partial(Linear, stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.q: Any = linear((width,), (config.num_attention_heads, head), use_bias=True)
        self.k: Any = linear((width,), (config.num_key_value_heads, head), use_bias=True)
        self.v: Any = linear((width,), (config.num_key_value_heads, head), use_bias=True)
        self.qkv: Any = nnx.data(None)
        self.o = linear((config.num_attention_heads, head), (width,), use_bias=False)

    def __call__(
        self,
        x_BTD: Float[jax.Array, "B T D"],
        rotation: Rotation,
        mask: masks.Mask,
        backend: Backend,
        dropout_keys: DropoutKeys = None,
        window: Window | None = None,
        sources: TokenSources | None = None,
    ) -> tuple[Float[jax.Array, "B t D"], KVCache]:
        """Computes the attention of each row under the mask.

        With a window, x holds the W tokens of the window, which are the queries. The keys are the S tokens of the
        cached row, and `mask` is the mask of W queries and S keys. With `sources`, x holds the tokens of both streams,
        and only the states that predict tokens are queries.

        Returns:
          The output [B, t, D] for t queries, and the keys and values of the tokens in x.
        """
        keys = _split_keys(dropout_keys, 4)
        if self.qkv is None:
            queries_BTD = x_BTD if sources is None else sources.of(x_BTD)
            q_BTNH, k_BSKH, v_BSKH = self.q(queries_BTD, keys[0]), self.k(x_BTD, keys[1]), self.v(x_BTD, keys[2])
        else:
            q_BTNH, k_BSKH, v_BSKH = split_qkv(self.qkv(x_BTD))
            q_BTNH = q_BTNH if sources is None else sources.of(q_BTNH)
        query_rotation = rotation
        if sources is not None:
            query_rotation = jax.tree.map(sources.of, rotation)
            mask = Sources(mask, sources.indices())
        q_BTNH = constrain(rotate(q_BTNH, query_rotation), "batch", "tokens", "heads", None)
        k_BSKH = constrain(rotate(k_BSKH, rotation), "batch", None, "kv_heads", None)
        v_BSKH = constrain(v_BSKH, "batch", None, "kv_heads", None)
        q_BTNH, k_BSKH, v_BSKH = named(q_BTNH, "q"), named(k_BSKH, "k"), named(v_BSKH, "v")
        new_kv = KVCache(k_BSKH, v_BSKH)
        kv = new_kv if window is None else window.updated(new_kv)
        # The attention backends name their output themselves, because the gradients of their kernels need more results.
        return named(self.o(attention(q_BTNH, kv.k, kv.v, mask, backend), keys[3]), "o"), new_kv


def joined_qkv(q: Any, k: Any, v: Any) -> Any:
    """Returns kernels or biases of q, k and v as one array [..., K, G + 2, H].

    Args:
      q: [..., N, H]; query head n belongs to key/value head n // G, where G is N / K.
      k, v: [..., K, H], with the same leading axes as q.
    """
    q_KGH = q.reshape(*k.shape[:-1], -1, q.shape[-1])
    return jnp.concatenate([q_KGH, k[..., None, :], v[..., None, :]], axis=-2)


def split_qkv(qkv: Any) -> tuple[Any, Any, Any]:
    """Returns q [..., N, H], k and v [..., K, H] from an array [..., K, G + 2, H]: the inverse of `joined_qkv`."""
    *leading, num_kv_heads, parts, head_dim = qkv.shape
    q = qkv[..., : parts - 2, :].reshape(*leading, num_kv_heads * (parts - 2), head_dim)
    return q, qkv[..., parts - 2, :], qkv[..., parts - 1, :]


class MLP(nnx.Module):
    """The SwiGLU block down(silu(gate(x)) * up(x)), without biases.

    After `layer_forms.join`, gate and up are None, and `gate_up` replaces them. Its outputs have the axes [2, F].
    """

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.gate: Any = linear((config.hidden_size,), (config.intermediate_size,))
        self.up: Any = linear((config.hidden_size,), (config.intermediate_size,))
        self.gate_up: Any = nnx.data(None)
        self.down = linear((config.intermediate_size,), (config.hidden_size,))

    def __call__(self, x_BTD: Float[jax.Array, "B T D"], dropout_keys: DropoutKeys = None) -> Float[jax.Array, "B T D"]:
        """Applies the MLP to every position of x separately."""
        keys = _split_keys(dropout_keys, 3)
        if self.gate_up is None:
            gate_BTF, up_BTF = self.gate(x_BTD, keys[0]), self.up(x_BTD, keys[1])
        else:
            gate_up = self.gate_up(x_BTD)
            gate_BTF, up_BTF = gate_up[..., 0, :], gate_up[..., 1, :]
        gate_BTF, up_BTF = named(gate_BTF, "gate"), named(up_BTF, "up")
        return self.down(jax.nn.silu(gate_BTF) * up_BTF, keys[2])


def _split_keys(keys: DropoutKeys, count: int) -> list[DropoutKeys]:
    """Returns `count` arrays of keys [B], one for each dropout. The keys of a row depend on that row's key only."""
    if keys is None:
        return [None] * count
    return [jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number) for number in range(count)]


class Layer(nnx.Module):
    """A pre-norm residual block: attention, then the MLP.

    In a `Dream` with stacked layers all layers are one `Layer` whose arrays have a leading axis L, and the scan takes one
    layer at a time.
    """

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
        sources: TokenSources | None = None,
    ) -> tuple[Float[jax.Array, "B t D"], KVCache]:
        """Returns the output of the block [B, t, D], and the keys and values of the tokens in x.

        With `sources`, x holds the tokens of both streams, and the output is that of the states that predict tokens.
        """
        keys = _split_keys(dropout_keys, 2)
        with jax.named_scope("attention"):
            attended_BTD, new_kv = self.attn(self.attn_norm(x_BTD), rotation, mask, backend, keys[0], window, sources)
            x_BTD = (x_BTD if sources is None else sources.of(x_BTD)) + attended_BTD
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD), keys[1])
        return constrain(x_BTD, "batch", "tokens", "width"), new_kv


def _has_dropout(layer: Layer) -> bool:
    """Returns whether a linear map of the layer has an adapter with dropout."""
    return any(
        isinstance(node, Linear) and node.lora_a is not None and node.lora_dropout > 0
        for _, node in nnx.iter_graph(layer)
    )


def draw_layer(config: DreamConfig, key: jax.Array, number: int | jax.Array, dtype: jax.typing.DTypeLike) -> Layer:
    """Returns the layer with this number of `Dream(config, rngs=nnx.Rngs(key), param_dtype=dtype)`, without the others."""
    rngs = nnx.Rngs(key)
    rngs.params()  # the key of the embedding, which `Dream` draws first
    layer_keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    return Layer(config, dtype=dtype, rngs=nnx.Rngs(layer_keys[number]))


class Embedding(nnx.Module):
    """The table of token embeddings, [V, D]."""

    def __init__(self, config: DreamConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
        self.embedding = nnx.Param((table * config.initializer_range).astype(dtype))
        self.pad_token_id = config.pad_token_id

    def __call__(self, tokens_BT: Int[jax.Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """Returns the embedding of each token, in the dtype of the table.

        The embedding of the padding token (which is also end-of-text) receives no gradient from this lookup, because
        the published model declares this token as the `padding_idx` of its embedding.
        """
        x_BTD = self.embedding[...][tokens_BT]
        return jnp.where((tokens_BT == self.pad_token_id)[:, :, None], jax.lax.stop_gradient(x_BTD), x_BTD)


class Dream(nnx.Module):
    """The masked-diffusion transformer, from token ids to logits.

    Attributes:
      config: the architecture.
      compute_dtype: dtype of the activations, and of the weights inside a layer; `param_dtype`, the dtype of the
        parameters, by default. The mean square of a norm, rotary angles, softmax and logits are always float32.
      attention_backend: name of the attention backend, see `attention.attention`.
      layers: one `Layer` with stacked parameters, or a list of `Layer`s, see `is_apart`.
      remat: which activations are saved for the backward pass; the others are recomputed. "none" saves all of them,
        "full" only the input of each layer, and "offload" only this input, in pinned host memory. `remat.KEPT` lists
        what the policies between "none" and "full" save.
      tokenizer_dir: directory with the tokenizer files that belong to the weights, or None. These files are copied when
        the model is saved or exported.
      base_identity: the result of `lora.identity` for the weights before quantisation; None if they are not quantised.
      trained_mask: name of the mask that the weights were trained under, see `masks.parse`. It is saved with the model
        and is the default mask of the sampler and the evaluation. A direct call of the model does not use it.

    Raises:
      ValueError: `remat` or `layers` has an unknown value.
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
        layers: LayerForm = "stacked",
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"{remat=} is not one of {get_args(Remat)}")
        if layers not in get_args(LayerForm):
            raise ValueError(f"{layers=} is not one of {get_args(LayerForm)}")
        self.config = config
        self.compute_dtype = jnp.dtype(param_dtype if compute_dtype is None else compute_dtype)
        self.attention_backend = attention_backend
        self.remat = remat
        self.tokenizer_dir = tokenizer_dir
        self.base_identity: str | None = None
        self.trained_mask = "bidirectional"
        self.embed = Embedding(config, dtype=param_dtype, rngs=rngs)
        layer_keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        make_layer = lambda key: Layer(config, dtype=param_dtype, rngs=nnx.Rngs(key))
        self.layers: Any
        if layers == "stacked":
            self.layers = jax.vmap(make_layer)(layer_keys)
        else:
            self.layers = nnx.List([make_layer(key) for key in layer_keys])
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

    @property
    def is_apart(self) -> bool:
        """Whether every layer has arrays of its own; otherwise the parameters of all layers are stacked."""
        return not isinstance(self.layers, Layer)

    def layer_modules(self) -> tuple[Layer, ...]:
        """Returns the layers if they are apart; otherwise the one layer that holds the stacked parameters of all."""
        return tuple(self.layers) if self.is_apart else (self.layers,)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | masks.Mask | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[jax.Array, "B T V"]:
        """Returns the logits of every position.

        Args:
          tokens_BT: token ids in [0, V).
          attention_mask: an array [B, T] that is nonzero at valid tokens (the other keys are hidden), or a
            `masks.Mask`. None hides no key.
          positions: positions for the rotary embedding. The default is 0, 1, ..., T - 1. With an array as
            `attention_mask` it is the published rule: 0 at the first valid token of each row, 1 at padding. With a mask
            for rows of several texts the positions of each text begin at 0.

        Returns:
          The logits, float32 [B, T, V]. They are not shifted: the logits at position i predict token i + 1.

        Raises:
          ValueError: a shape does not match the tokens, or an id is outside the vocabulary (ids are not checked when
            jax traces the call).
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
        """Returns the hidden states after the final norm, in the compute dtype. `unembed` turns them into logits.

        The token ids are not checked. `dropout_keys` are random keys for the dropout of an adapter, see `Linear`.
        """
        return self._hidden(tokens_BT, mask, positions_BT, return_kv=False, dropout_keys=dropout_keys)[0]

    def hidden_two_streams(
        self,
        noised_BT: Int[jax.Array, "B T"],
        clean_BT: Int[jax.Array, "B T"],
        mask: masks.Mask,
        positions_BT: Int[jax.Array, "B T"],
        dropout_keys: DropoutKeys = None,
    ) -> Float[jax.Array, "B T D"]:
        """Returns the hidden states that predict the tokens of noised texts under block diffusion.

        A token of the noised text sees the noised tokens of its block, and the clean tokens of earlier blocks.

        Args:
          noised_BT: the tokens, with mask tokens in answers. The prompts must be clean.
          clean_BT: the same tokens without mask tokens.
          mask: the mask of one of the two streams, as `masks.two_streams` accepts it: `masks.BlockDiffusion` for rows, also
            with `masks.KeyPadding`, or for texts with `masks.Packed`.
          positions_BT: positions for the rotary embedding, the same for both streams.
          dropout_keys: random keys for the dropout of an adapter, see `Linear`.

        Returns:
          For each token the hidden state that predicts it, after the final norm, [B, T, D] in the compute dtype. They are
          already shifted: this is the state at the position before the token, of the clean stream for the first token of
          a block, otherwise of the noised stream. The first token of a text without a prompt is predicted from its own
          noised position. The states of prompt tokens and of padding are not used.

        Raises:
          ValueError: the mask is not one that `masks.two_streams` accepts.
        """
        num_tokens = noised_BT.shape[1]
        tokens_BS = jnp.concatenate([noised_BT, clean_BT], axis=1)
        sources = TokenSources(
            *(
                jnp.broadcast_to(starts(mask, num_tokens), noised_BT.shape)
                for starts in (masks.starts_of_blocks, masks.starts_of_texts)
            )
        )
        arrays = (tokens_BS, masks.two_streams(mask), jnp.tile(positions_BT, (1, 2)))
        return self._hidden(*arrays, return_kv=False, dropout_keys=dropout_keys, sources=sources)[0]

    def hidden_and_kv_cache(
        self, tokens_BT: Int[jax.Array, "B T"], mask: masks.Mask, positions_BT: Int[jax.Array, "B T"]
    ) -> tuple[Float[jax.Array, "B T D"], KVCache]:
        """Returns the result of `hidden`, and the cache with the keys and values of all layers for `hidden_window`."""
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
        """Computes the hidden states of W tokens of each row, which attend to the cached keys and values of the row.

        Args:
          tokens_BW: ids of the W tokens of each row.
          mask: the attention mask of W queries and S keys.
          positions_BW: positions of these tokens for the rotary embedding.
          window: the cache (from `hidden_and_kv_cache` or from this method), and the positions of the tokens in it.

        Returns:
          The hidden states [B, W, D] as from `hidden`, and the cache with the new keys and values of these tokens.
        """
        hidden_BWD, new_kv = self._hidden(tokens_BW, mask, positions_BW, return_kv=True, window=window)
        assert new_kv is not None
        # The cache is updated after all layers: if the scan returned the updated cache, there would be two copies of it.
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
        sources: TokenSources | None = None,
    ) -> tuple[Float[jax.Array, "B t D"], KVCache | None]:
        """Returns the hidden states, and with `return_kv` the keys and values [L, B, T, K, H] of these tokens.

        With `sources` the tokens are those of both streams, and the hidden states are those that predict tokens.
        """
        config = self.config
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT).astype(self.compute_dtype)
            x_BTD = constrain(x_BTD, "batch", "tokens", "width")
            rotary = rotation(positions_BT, config.head_dim, config.rope_theta)

        def block(
            x_BTD: jax.Array, inputs: tuple[Layer, jax.Array, KVCache | None], sources: TokenSources | None = None
        ) -> tuple[jax.Array, KVCache | None]:
            x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
            layer, layer_index, layer_cache = inputs
            cast = functools.partial(_cast, dtype=self.compute_dtype, is_apart=self.is_apart)
            layer = jax.tree_util.tree_map_with_path(cast, layer)
            keys = None
            if dropout_keys is not None:
                keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(dropout_keys, layer_index)
            layer_window = None if layer_cache is None or window is None else window.layer(layer_cache)
            x_BTD, new_kv = layer(x_BTD, rotary, mask, self.attention_backend, keys, layer_window, sources)
            return x_BTD, new_kv if return_kv else None

        block = checkpointed(block, self.remat)
        with jax.named_scope("layers"):
            kv_cache = None if window is None else window.kv_cache
            if self.is_apart and sources is not None and not _has_dropout(self.layer_modules()[-1]):
                # Of the last layer only the states that predict tokens are read, so only these are computed. A loop
                # cannot do this, because all of its layers compute the same shapes. With the dropout of an adapter all
                # tokens are computed, because the dropout is drawn for all of them.
                *before, last = self.layer_modules()
                x_BTD, _ = _unrolled(block, x_BTD, before, kv_cache)
                x_BTD, new_kv = block(x_BTD, (last, jnp.int32(len(before)), None), sources)
                sources = None
            elif self.is_apart:
                x_BTD, new_kv = _unrolled(block, x_BTD, self.layer_modules(), kv_cache)
            else:
                inputs = (self.layers, jnp.arange(config.num_hidden_layers), kv_cache)
                x_BTD, new_kv = jax.lax.scan(block, x_BTD, inputs)
            if sources is not None:
                x_BTD = constrain(sources.of(x_BTD), "batch", "tokens", "width")
        with jax.named_scope("final_norm"):
            return self.norm(x_BTD).astype(self.compute_dtype), new_kv

    def unembedding(self) -> Float[jax.Array, "D V"]:
        """Returns the output projection [D, V] in its stored dtype: with tied embeddings the transposed embeddings."""
        return self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def unembed(self, hidden: Float[jax.Array, "*b d"]) -> Float[jax.Array, "*b v"]:
        """Returns the float32 logits of hidden states; the inputs of the matrix product are in the compute dtype."""
        kernel_DV = self.unembedding().astype(self.compute_dtype)
        with jax.named_scope("unembed"):
            return jnp.einsum("...D,DV->...V", hidden, kernel_DV, preferred_element_type=jnp.float32)


def _unrolled(
    block: Callable[..., tuple[jax.Array, KVCache | None]],
    x_BTD: jax.Array,
    layers: Sequence[Layer],
    kv_cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs layers that are apart; returns what `jax.lax.scan` returns for the same layers in the stacked form."""
    block = jax.jit(block)  # so that jax traces it once, and not once for each layer
    found = []
    for index, layer in enumerate(layers):
        layer_cache = jax.tree.map(lambda leaf, index=index: leaf[index], kv_cache)
        x_BTD, new_kv = block(x_BTD, (layer, jnp.int32(index), layer_cache))
        found.append(new_kv)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _cast(path: tuple[Any, ...], leaf: jax.Array, dtype: np.dtype, is_apart: bool) -> jax.Array:
    """Casts a leaf of a layer to the compute dtype, except the codes and scales of a quantised kernel."""
    if leaf.dtype == dtype or any(getattr(entry, "name", None) in ("codes", "scales") for entry in path):
        # There is no barrier here, so the backward pass reads the leaf from the stacked parameters and saves no copy.
        return leaf
    if current_target().platform == "gpu" and not is_apart:
        # XLA for GPUs keeps this cast inside the loop over layers. One kernel reads the leaf out of the stack and casts it,
        # and another one casts the gradient and writes it into the stack. A barrier would divide both into two kernels.
        return leaf.astype(dtype)
    # The barrier keeps the cast inside the loop. Otherwise XLA would cast all layers before the loop and store them.
    return jax.lax.optimization_barrier(leaf).astype(dtype)


@jax.jit
def _logits(model: Dream, tokens_BT: jax.Array, mask: masks.Mask, positions_BT: jax.Array) -> jax.Array:
    """Returns the logits of every position, float32 [B, T, V], for checked arguments."""
    tokens_BT = constrain(tokens_BT, "batch", "tokens")
    return constrain(model.unembed(model.hidden(tokens_BT, mask, positions_BT)), "batch", "tokens", "vocab")


def check_ids(tokens: Any, vocab_size: int) -> None:
    """Checks that the token ids are integers in [0, vocab_size), and raises ValueError if not.

    Without this check, an embedding lookup would silently return the embedding of another token. The check is skipped
    when jax traces the call, and for arrays that are partly on other hosts, because their values are not available.
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
    """Converts the last two arguments of `Dream.__call__` to a mask, and the positions for the rotary embedding.

    Raises:
      ValueError: `shape`, the shape of the tokens, is not [B, T], or one of the arrays has another shape.
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
        positions_BT = jnp.broadcast_to(mask.positions(shape[1]), shape)
    return mask, positions_BT


def padded_positions(valid_BT: Bool[jax.Array, "B T"]) -> Int[jax.Array, "B T"]:
    """Returns positions that count the valid tokens of each row from 0; padding gets 1, as in the published code."""
    return jnp.where(valid_BT, jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 1)


def abstract_model(config: DreamConfig, **options: Any) -> Dream:
    """Returns a Dream with shapes and dtypes instead of arrays. `options` are keyword arguments of `Dream`."""
    return jax.eval_shape(lambda: Dream(config, rngs=nnx.Rngs(0), **options))


def split_params(model: ModuleT) -> tuple[nnx.GraphDef[ModuleT], ParamTree]:
    """Returns the static part of a model or of a part of it, and its parameters as a nested dict of arrays.

    The keys are strings; if the layers are apart, the keys of the layers are their numbers, from 0.
    """
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge_params(graphdef: nnx.GraphDef[ModuleT], params: ParamTree) -> ModuleT:
    """Returns the model with this static part and these parameters; this is the inverse of `split_params`."""
    return nnx.merge(graphdef, nnx.State(_as_params(params)))


def _as_params(tree: ParamTree) -> ParamTree:
    """Returns the tree with every array as an `nnx.Param`."""
    return {key: _as_params(value) if isinstance(value, dict) else nnx.Param(value) for key, value in tree.items()}


def parameter_count(tree: Any) -> int:
    """Returns the number of weights (array elements) in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
