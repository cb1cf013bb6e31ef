"""The memory that a train step needs on one device, and what a rematerialisation policy costs, without a compiler.

The trainer chooses a policy with these numbers, and a plan reports them. `docs/memory.md` compares them with compiled
sizes, and a test bounds the difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dream_jax import sharding
from dream_jax.attention import two_streams
from dream_jax.batch import Batch
from dream_jax.config import DreamConfig
from dream_jax.device_memory import shortage
from dream_jax.model import Dream, parameter_count
from dream_jax.objective import chunk_rows
from dream_jax.remat import KEPT, Remat, Result
from dream_jax.shapes import ParamTree
from dream_jax.train_step import AnyStep, TrainState

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """A step with the shapes and shardings of its arguments: `step.lower(state, batch, frozen).compile()` compiles it.

    Attributes:
      model: the model with shapes instead of weights.
      step: the training step, not yet compiled.
      state: shapes of the trained parameters and of the optimizer state.
      batch: shapes of one global batch: [B, T] and [B].
      frozen: shapes of the parameters that are not trained; empty without an adapter.
    """

    model: Dream
    step: AnyStep
    state: TrainState
    batch: Batch[jax.ShapeDtypeStruct]
    frozen: ParamTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The quantities, except the model, that determine the cost of a step.

    Attributes:
      batch: number of rows of a step.
      accumulation: number of microbatches into which these rows are divided.
      length: number of tokens of a row, padding included.
      mesh: size of each mesh axis, by name.
      remat: the rematerialisation policy of the step.
      masked_share: expected number of masked positions / all positions, in [0, 1].
      block: number of tokens in a block of block diffusion, which has two streams; None for a single stream.
      forward: number of rows that are only computed forward, for each row of `batch`.
    """

    batch: int
    accumulation: int
    length: int
    mesh: dict[str, int]
    remat: Remat
    masked_share: float
    block: int | None = None
    forward: float = 0.0

    @property
    def groups(self) -> int:
        """The number of groups of devices into which the positions of a batch are divided."""
        return self.mesh["fsdp"] * self.mesh["sequence"]

    @property
    def tokens(self) -> int:
        """The number of positions of a microbatch on one device."""
        return self.batch // self.accumulation * self.length // self.groups

    @property
    def streams(self) -> int:
        """The number of copies of a row that the layers compute."""
        return 1 if self.block is None else 2

    @property
    def keys(self) -> float:
        """The mean number of keys with which the scores of a query are computed."""
        if self.block is None or self.mesh["sequence"] > 1:  # there are no chunks if the mesh divides the tokens
            return self.streams * self.length
        return two_streams.computed_keys(self.block, self.length) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """The parts of the memory that a step needs on one device, in bytes, computed by arithmetic.

    Attributes:
      parameters, optimizer, batch: the arguments of the step, from shapes and shardings. `parameters` includes the frozen
        ones.
      host: what the step keeps in the memory of the host; no other attribute includes it.
      gradients: the gradients of the trained parameters.
      kept: the activations that the forward pass saves for the backward pass.
      layer, loss: the temporary arrays of one layer, and those of the loss.
    """

    parameters: int
    optimizer: int
    batch: int
    host: int
    gradients: int
    kept: int
    layer: int
    loss: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBytes(MemoryParts):
    """The memory that a step needs on one device, computed by arithmetic: its parts, and their sums."""

    @property
    def given(self) -> int:
        """Bytes of the arguments of a step; the results of the step reuse their memory."""
        return self.parameters + self.optimizer + self.batch

    @property
    def working(self) -> int:
        """Bytes in addition to `given` when memory use is highest: in the loss, or at the end of the backward pass."""
        return max(self.kept + self.loss, self.kept + self.gradients + self.layer)


def bytes_on_device(step: AbstractStep, shape: StepShape, platform: str) -> DeviceBytes:
    """Computes the memory of a train step on one device.

    The size of the arguments follows exactly from shapes and shardings. The other numbers follow the code of the step:
    gradients have the dtype of the weights; the saved activations are those of `kept_bytes`; one layer needs all of its
    results, and twice the bytes of its gathered weights, because the weights of the next layer are gathered meanwhile;
    the loss needs the gathered projection and its float32 gradient, the gradient of the hidden states, and the logits
    of one chunk.

    Args:
      step: the step with the shapes and shardings of its arguments.
      shape: the sizes and the policy of the step.
      platform: the name of the platform in jax: "cpu", "gpu" or "tpu".
    """
    model, config = step.model, step.model.config
    width = jax.numpy.dtype(model.compute_dtype).itemsize
    tokens, computed, tensor = shape.tokens, shape.streams * shape.tokens, shape.mesh["tensor"]

    config_widths = result_widths(config, tensor)
    query, hidden = config_widths["q"], config.hidden_size
    vocab = config.vocab_size // _ways(config.vocab_size, tensor)
    layers = config.num_hidden_layers
    kernel = attention_backend(step, platform) != "xla"
    kept = layers * computed * kept_bytes(config, shape.remat, width, tensor, kernel=kernel)
    if shape.remat == "offload":
        kept = 2 * computed * hidden * width  # the inputs of two layers, which are being copied to or from the host
    # The weights of one layer are gathered over all axes except tensor.
    weights = matrix_count(config) // layers // tensor * width
    scores = 0
    if not kernel:
        rows = shape.batch // shape.accumulation // shape.mesh["fsdp"]
        entries = rows * (query // config.head_dim) * shape.length * (shape.length // shape.mesh["sequence"])
        chunked = shape.block is not None and shape.mesh["sequence"] == 1
        # The scores of a chunk are not kept. Without chunks they are those of all pairs of both streams.
        entries = entries // two_streams.MOST_CHUNKS if chunked else entries * shape.streams**2
        scores = 2 * entries * _FLOAT32
        if shape.remat == "none" and not chunked:
            # Every layer keeps its softmax in float32, and the same in the compute dtype.
            kept += layers * entries * (_FLOAT32 + (width if width != _FLOAT32 else 0))
    layer = 2 * weights + computed * _all_results(config, width, tensor) * width + scores
    rows = chunk_rows(tokens, config.vocab_size, platform)
    # A frozen projection has no gradient.
    projection = hidden * vocab * (width + (0 if step.frozen else _FLOAT32))
    loss = projection + tokens * hidden * (_FLOAT32 + width) + 2 * rows * vocab * _FLOAT32
    parameters, host = _resident([step.state.params, step.frozen])
    optimizer, optimizer_host = _resident([step.state.opt_state, step.state.step])
    gradients = _resident([step.state.params])[0]
    return DeviceBytes(
        parameters=parameters,
        optimizer=optimizer,
        batch=_resident([step.batch])[0],
        host=host + optimizer_host,
        # With accumulation there are the sum of gradients and the gradients of the present microbatch.
        gradients=gradients * (2 if shape.accumulation > 1 else 1),
        kept=kept,
        layer=layer,
        loss=loss,
    )


def kept_bytes(config: DreamConfig, remat: Remat, width: int, tensor: int = 1, *, kernel: bool = True) -> int:
    """Returns the bytes that a policy keeps for the backward pass, for each position and layer, on one device.

    With "offload" they are in the memory of the host. With "none" they are an estimate: XLA decides what it keeps.

    Args:
      config: the architecture.
      remat: the policy.
      width: bytes of an element of the activations.
      tensor: size of the mesh axis "tensor".
      kernel: whether cuDNN or splash computes the attention, whose gradients also need the statistics of the softmax.
    """
    results = result_widths(config, tensor)
    inputs = config.hidden_size * width
    if remat == "none":
        return inputs + _all_results(config, width, tensor) * width
    if remat == "dots":
        return inputs + sum(size for name, size in results.items() if name != "attention") * width
    kept = KEPT.get(remat, ())
    # The statistics are one float32 number for each query head.
    statistics = config.num_attention_heads // _ways(config.num_attention_heads, tensor) * _FLOAT32 if kernel else 0
    return inputs + sum(results[name] for name in kept) * width + ("attention" in kept) * statistics


def recomputed_products(config: DreamConfig, remat: Remat) -> float:
    """Returns the floating-point operations of the matrix products that a policy repeats, for each position and layer.

    The last product of the MLP is never repeated, because no gradient needs its result.
    """
    if remat in ("none", "dots"):
        return 0.0
    widths = result_widths(config)
    inputs = dict.fromkeys(widths, config.hidden_size) | {"o": widths["attention"]}
    repeated = widths.keys() - {"attention", *KEPT.get(remat, ())}
    return sum(2.0 * inputs[name] * widths[name] for name in repeated)


def recomputed_attention(config: DreamConfig, remat: Remat, length: float, *, kernel: bool = True) -> float:
    """Returns the floating-point operations of the attention that a policy repeats, for each position and layer.

    Args:
      config: the architecture.
      remat: the policy.
      length: number of keys of a query.
      kernel: whether cuDNN or splash computes the attention. Without such a kernel the scores are an array, which no policy
        but "none" keeps, so they are computed again even if the output of the attention is kept.
    """
    if remat == "none":
        return 0.0
    product = 2.0 * config.num_attention_heads * config.head_dim * length
    if "attention" in KEPT.get(remat, ()):
        return 0.0 if kernel else product
    return 2 * product


def result_widths(config: DreamConfig, tensor: int = 1) -> Mapping[Result, int]:
    """Returns the number of elements of each named result of a layer, for one position, on one device.

    `tensor` is the size of the mesh axis "tensor", which divides the heads and the MLP if their sizes allow it.
    """
    query = config.num_attention_heads * config.head_dim // _ways(config.num_attention_heads, tensor)
    key = config.num_key_value_heads * config.head_dim // _ways(config.num_key_value_heads, tensor)
    mlp = config.intermediate_size // _ways(config.intermediate_size, tensor)
    return {"q": query, "k": key, "v": key, "attention": query, "o": config.hidden_size, "gate": mlp, "up": mlp}


def _all_results(config: DreamConfig, width: int, tensor: int) -> int:
    """Returns the size of everything that a layer computes for one position on one device, in elements of `width` bytes."""
    results, hidden = result_widths(config, tensor), config.hidden_size
    products = sum(size for name, size in results.items() if name != "attention")
    # The values before and after each norm, also in float32; queries and keys with and without rotation; the gate, its
    # sigmoid and their product.
    others = 4 * hidden + 2 * results["q"] + 2 * results["k"] + 2 * results["up"] + (2 * hidden * _FLOAT32) // width
    return products + others


def _ways(size: int, tensor: int) -> int:
    """Returns the number of devices among which an axis of this size is divided."""
    return tensor if size % tensor == 0 else 1


def attention_backend(step: AbstractStep, platform: str) -> str:
    """Returns the attention backend of the step; "auto" is resolved from the dtype and the platform alone."""
    asked = step.model.attention_backend
    if asked != "auto":
        return asked
    half = step.model.compute_dtype != np.float32
    return "splash" if platform == "tpu" else "cudnn" if platform == "gpu" and half else "xla"


def _resident(trees: Iterable[Any]) -> tuple[int, int]:
    """Returns the bytes of trees of sharded shapes for one device: in the device's memory, and in the host's memory."""
    device = host = 0
    for leaf in jax.tree.leaves(list(trees)):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.sharding.memory_kind == "pinned_host":
            host += size
        else:
            device += size
    return device, host


def remat_flops(step: AbstractStep, shape: StepShape, platform: str) -> float:
    """Returns the floating-point operations that the backward pass of a step recomputes, over all devices."""
    config = step.model.config
    products = recomputed_products(config, shape.remat)
    # The products of an adapter are recomputed with those that they are added to, and are estimated by its weights.
    products *= 1 + adapter_count(step) / matrix_count(config)
    kernel = attention_backend(step, platform) != "xla"
    # The scores of a chunk of two streams are computed again under every policy, unless a kernel computes them.
    chunked = shape.block is not None and shape.mesh["sequence"] == 1
    remat: Remat = "attention" if chunked and shape.remat == "none" else shape.remat
    attention = recomputed_attention(config, remat, shape.keys, kernel=kernel)
    return shape.streams * shape.batch * shape.length * config.num_hidden_layers * (products + attention)


def recomputed_share(step: AbstractStep, shape: StepShape, platform: str) -> float:
    """Returns the share of the floating-point operations of the layers' forward pass that the backward pass repeats."""
    config = step.model.config
    attention = 4.0 * config.num_attention_heads * config.head_dim * shape.keys * config.num_hidden_layers
    forward = 2.0 * (matrix_count(config) + adapter_count(step)) + attention
    return remat_flops(step, shape, platform) / (shape.streams * shape.batch * shape.length * forward)


def matrix_count(config: DreamConfig) -> int:
    """Returns the number of weights in all layers' matrices, without norms and biases, which need few operations."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def adapter_count(step: AbstractStep) -> int:
    """Returns the number of weights of the adapter that the step trains; 0 without an adapter."""
    return parameter_count(step.state.params) if step.frozen else 0


def compile_step(step: AbstractStep) -> Any:
    """Compiles a step for the devices of its mesh, and returns the `jax.stages.Compiled`, or a `Shortage` of memory.

    Raises:
      JaxRuntimeError: the compiler failed for another reason than too little memory.
    """
    lowered = step.step.lower(step.state, step.batch, step.frozen)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = shortage(error)
        if found is None:
            raise
        return found


def peak_bytes(compiled: Any) -> int:
    """Returns the bytes in use on a device when the memory use of a `jax.stages.Compiled` is highest, with its code."""
    memory = compiled.memory_analysis()
    peak: int = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return peak


def mesh_sizes(mesh: sharding.AnyMesh) -> dict[str, int]:
    """Returns the size of each axis of `sharding.MESH_AXES` in a mesh; 1 for an axis that the mesh does not have."""
    return {name: dict(mesh.shape).get(name, 1) for name in sharding.MESH_AXES}
