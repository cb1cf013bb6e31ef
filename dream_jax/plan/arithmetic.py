"""Computes the bytes on a device, floating-point operations and network traffic of a train step, without a compiler.

`docs/memory.md` compares these numbers with compiled sizes, and a test bounds the difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dream_jax import sharding
from dream_jax.config import DreamConfig
from dream_jax.model import Remat, parameter_count
from dream_jax.objective import chunk_rows
from dream_jax.plan.hlo import Collective
from dream_jax.trainer.build import AbstractStep

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """The quantities, except the model, that determine the cost of a step.

    Attributes:
      batch: number of rows of a step.
      accumulation: number of microbatches into which these rows are divided.
      length: number of tokens of a row, padding included.
      mesh: size of each mesh axis, by name.
      remat: which results the backward pass recomputes.
      masked_share: expected number of masked positions / all positions, in [0, 1].
    """

    batch: int
    accumulation: int
    length: int
    mesh: dict[str, int]
    remat: Remat
    masked_share: float

    @property
    def groups(self) -> int:
        """The number of groups of devices into which the positions of a batch are divided."""
        return self.mesh["fsdp"] * self.mesh["sequence"]

    @property
    def tokens(self) -> int:
        """The number of positions of a microbatch on one device."""
        return self.batch // self.accumulation * self.length // self.groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """Bytes on one device by arithmetic; `plan.settings.MemoryPlan` explains the attributes."""

    parameters: int
    optimizer: int
    batch: int
    host: int
    gradients: int
    kept: int
    layer: int
    loss: int

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
    gradients have the dtype of the weights; saved activations are the input of each layer (remat "full"), with the
    results of its matrix products ("dots") or all its results ("none"); one layer needs its gathered weights twice,
    because those of the next layer are gathered meanwhile, and its results; the loss needs the gathered projection and
    its float32 gradient, the gradient of the hidden states, and the logits of one chunk.
    """
    model, config = step.model, step.model.config
    width = jax.numpy.dtype(model.compute_dtype).itemsize
    tokens, tensor = shape.tokens, shape.mesh["tensor"]

    def ways(size: int) -> int:
        return tensor if size % tensor == 0 else 1

    query = config.num_attention_heads * config.head_dim // ways(config.num_attention_heads)
    key = config.num_key_value_heads * config.head_dim // ways(config.num_key_value_heads)
    mlp, hidden = config.intermediate_size // ways(config.intermediate_size), config.hidden_size
    vocab = config.vocab_size // ways(config.vocab_size)
    layers = config.num_hidden_layers

    products = query + 2 * key + hidden + 2 * mlp
    # The values before and after each norm, also in float32; queries and keys with and without rotation; the gate, its
    # sigmoid and their product.
    everything = 4 * hidden + 2 * query + 2 * key + 2 * mlp + (2 * hidden * _FLOAT32) // width
    inputs = tokens * hidden * width
    kept = {
        "none": layers * (inputs + tokens * (products + everything) * width),
        "dots": layers * (inputs + tokens * products * width),
        "full": layers * inputs,
        "offload": 2 * inputs,  # the inputs of two layers, which are being copied to or from the host
    }[shape.remat]
    # The weights of one layer are gathered over all axes except tensor.
    weights = matrix_count(config) // layers // tensor * width
    scores = 0
    if attention_backend(step, platform) == "xla":
        rows = shape.batch // shape.accumulation // shape.mesh["fsdp"]
        scores = (
            2 * rows * (query // config.head_dim) * shape.length * (shape.length // shape.mesh["sequence"]) * _FLOAT32
        )
    layer = 2 * weights + tokens * (products + everything) * width + scores
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


# ------------------------------------------------------------------------------------------- floating-point operations


def loss_chunks(shape: StepShape, vocab: int, platform: str) -> int:
    """Returns the expected number of chunks of the loss, on the device group with the most masked positions.

    The noise levels of the K rows of a microbatch are 1/2K, 3/2K, ... in random order, and are divided among the groups
    of devices. The expected maximum of the mean level of a group is estimated from 64 random orders.
    """
    rows = shape.batch // shape.accumulation
    split = shape.mesh["fsdp"]
    if rows % split:
        return 1
    times = (np.arange(rows) + 0.5) / rows
    generator = np.random.default_rng(0)
    draws = [np.max(generator.permutation(times).reshape(split, -1).mean(axis=1)) for _ in range(64)]
    max_masked = float(np.mean(draws)) * 2 * shape.masked_share * shape.tokens
    return max(1, math.ceil(max_masked / chunk_rows(shape.tokens, vocab, platform)))


def model_flops(step: AbstractStep, shape: StepShape) -> float:
    """Returns the floating-point operations of one step over all devices, without recomputation.

    They are 6 for each weight and token (4 for a frozen weight, which has no gradient), attention between all pairs of
    positions, and the output head at masked positions only.
    """
    config = step.model.config
    each = 4.0 if step.frozen else 6.0
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * shape.length
    head = each * config.hidden_size * config.vocab_size * shape.masked_share
    products = each * matrix_count(config) + 6.0 * _adapter_count(step)
    return shape.batch * shape.length * (products + attention + head)


def remat_flops(step: AbstractStep, shape: StepShape) -> float:
    """Returns the floating-point operations that the backward pass recomputes, over all devices.

    It recomputes the forward pass of each layer, only the attention with remat "dots", and nothing with "none".
    """
    if shape.remat == "none":
        return 0.0
    config = step.model.config
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * shape.length
    products = 0.0 if shape.remat == "dots" else 2.0 * (matrix_count(config) + _adapter_count(step))
    return shape.batch * shape.length * (attention + products)


def matrix_count(config: DreamConfig) -> int:
    """Returns the number of weights in all layers' matrices, without norms and biases, which need few operations."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def _adapter_count(step: AbstractStep) -> int:
    return parameter_count(step.state.params) if step.frozen else 0


# -------------------------------------------------------------------------------------------------------------- traffic


def collectives(step: AbstractStep, shape: StepShape) -> tuple[Collective, ...]:
    """Estimates the collectives of one step, for use without a compiler.

    They are all-gathers of weights and reduce-scatters of gradients, with tensor parallelism all-reduces of
    activations, and with context parallelism all-gathers of keys and values. With the last two it is too low.
    """
    ways, passes = shape.groups, shape.accumulation * (2 if shape.remat in ("none", "dots") else 3)
    config, tensor = step.model.config, shape.mesh["tensor"]
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    found = []
    share = (ways - 1) / ways
    if ways > 1:
        layers, head = matrix_count(config) // tensor, config.hidden_size * config.vocab_size // tensor
        trained, summed = (_adapter_count(step) // tensor, 0) if step.frozen else (layers, head)
        matrices = 7  # q, k, v, o, gate, up, down
        found += [
            Collective(
                kind="all-gather",
                count=passes * config.num_hidden_layers * matrices + shape.accumulation,
                sent=share * width * (passes * layers + shape.accumulation * head),
            ),
            Collective(
                kind="reduce-scatter",
                count=shape.accumulation * (config.num_hidden_layers * matrices + bool(summed)),
                sent=share * shape.accumulation * (width * trained + _FLOAT32 * summed),
            ),
        ]
    if tensor > 1:
        # Each layer sums its activations twice forward, twice backward, and with remat "full" twice in recomputation.
        sums = shape.accumulation * config.num_hidden_layers * (6 if shape.remat == "full" else 4)
        sent = 2 * (tensor - 1) / tensor * shape.tokens * config.hidden_size * width
        found.append(Collective(kind="all-reduce", count=sums, sent=sums * sent))
    if shape.mesh["sequence"] > 1:
        split = shape.mesh["sequence"]
        keys = 2 * config.num_key_value_heads * config.head_dim // tensor * width * shape.tokens * split
        times = shape.accumulation * config.num_hidden_layers * 3
        found.append(Collective(kind="all-gather", count=2 * times, sent=times * (split - 1) / split * keys))
    return tuple(found)


def memory_traffic(step: AbstractStep, shape: StepShape, found: DeviceBytes, chunks: int) -> float:
    """Returns the minimum number of bytes that a device must read and write in its memory in one step.

    Parameters, moments, gradients and saved activations are read once and written once; gathered weights are written
    and read in each pass; for each chunk of the loss, the projection and its gradient are read and written.
    """
    config, tensor = step.model.config, shape.mesh["tensor"]
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    passes = shape.accumulation * (2 if shape.remat in ("none", "dots") else 3)
    weights = 2 * passes * matrix_count(config) // tensor * width
    head = shape.accumulation * chunks * config.hidden_size * config.vocab_size // tensor * (2 * width + 2 * _FLOAT32)
    return (
        2.0 * (found.parameters + found.optimizer + found.gradients)
        + weights
        + 2.0 * shape.accumulation * found.kept
        + head
    )


def mesh_sizes(mesh: sharding.AnyMesh) -> dict[str, int]:
    """Returns the size of each axis of `sharding.MESH_AXES` in a mesh; 1 for an axis that the mesh does not have."""
    return {name: dict(mesh.shape).get(name, 1) for name in sharding.MESH_AXES}
