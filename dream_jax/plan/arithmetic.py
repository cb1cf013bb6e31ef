"""What a step needs, by arithmetic alone: bytes on a device, floating-point operations, bytes between devices.

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
    """What a step's cost depends on besides the model.

    Attributes:
      batch: rows of a step.
      accumulation: microbatches that they are computed in.
      length: tokens a row.
      mesh: sizes by axis.
      remat: what the backward pass recomputes.
      masked_share: share of all positions that is masked.
    """

    batch: int
    accumulation: int
    length: int
    mesh: dict[str, int]
    remat: Remat
    masked_share: float

    @property
    def groups(self) -> int:
        """How many groups of devices divide the positions of a batch among them."""
        return self.mesh["fsdp"] * self.mesh["sequence"]

    @property
    def tokens(self) -> int:
        """Positions of a microbatch on one device."""
        return self.batch // self.accumulation * self.length // self.groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """Bytes on one device; see `plan.settings.MemoryPlan`."""

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
        """Bytes of the arguments of a step, which its results replace in place."""
        return self.parameters + self.optimizer + self.batch

    @property
    def working(self) -> int:
        """Bytes besides, at the worst moment: in the loss, or at the end of the backward pass with all gradients."""
        return max(self.kept + self.loss, self.kept + self.gradients + self.layer)


def bytes_on_device(step: AbstractStep, shape: StepShape, platform: str) -> DeviceBytes:
    """The arithmetic of memory.

    What a step is given follows exactly from shapes and shardings. The rest is what the step's code asks for: gradients in
    the dtype of the weights; the input of each layer (remat "full") and the results of its products ("dots") or all it
    computes ("none"); the weights of a layer gathered, twice, since the next ones are fetched meanwhile, and what one layer
    computes; in the loss the gathered projection, its float32 gradient, the hidden states' and a chunk of logits.
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
    # Before and after each norm, also in float32; rotated and not; the gate, its sigmoid and the product.
    everything = 4 * hidden + 2 * query + 2 * key + 2 * mlp + (2 * hidden * _FLOAT32) // width
    inputs = tokens * hidden * width
    kept = {
        "none": layers * (inputs + tokens * (products + everything) * width),
        "dots": layers * (inputs + tokens * products * width),
        "full": layers * inputs,
        "offload": 2 * inputs,  # on the way to the host
    }[shape.remat]
    # One layer's weights, whole but for the tensor axis, once in use and once under way.
    weights = matrix_count(config) // layers // tensor * width
    scores = 0
    if attention_backend(step, platform) == "xla":
        rows = shape.batch // shape.accumulation // shape.mesh["fsdp"]
        scores = (
            2 * rows * (query // config.head_dim) * shape.length * (shape.length // shape.mesh["sequence"]) * _FLOAT32
        )
    layer = 2 * weights + tokens * (products + everything) * width + scores
    rows = chunk_rows(tokens, config.vocab_size, platform)
    # A frozen projection has no gradient to sum.
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
        # Under accumulation the sum so far and the gradients of the newest microbatch.
        gradients=gradients * (2 if shape.accumulation > 1 else 1),
        kept=kept,
        layer=layer,
        loss=loss,
    )


def attention_backend(step: AbstractStep, platform: str) -> str:
    """The backend that attention will take, where its dtype and the platform alone decide it."""
    asked = step.model.attention_backend
    if asked != "auto":
        return asked
    half = step.model.compute_dtype != np.float32
    return "splash" if platform == "tpu" else "cudnn" if platform == "gpu" and half else "xla"


def _resident(trees: Iterable[Any]) -> tuple[int, int]:
    """Bytes that one device holds of some trees of sharded shapes: in its own memory, and in the host's."""
    device = host = 0
    for leaf in jax.tree.leaves(list(trees)):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.sharding.memory_kind == "pinned_host":
            host += size
        else:
            device += size
    return device, host


# ----------------------------------------------------------------------------------------------- floating-point operations


def loss_chunks(shape: StepShape, vocab: int, platform: str) -> int:
    """The expected number of chunks of the loss, on the device group with the most masked positions.

    The times of a batch are strata 1/2K, 3/2K, ... in random order; each group of devices has the mean of some of them.
    """
    rows = shape.batch // shape.accumulation
    split = shape.mesh["fsdp"]
    if rows % split:
        return 1
    times = (np.arange(rows) + 0.5) / rows
    generator = np.random.default_rng(0)
    draws = [np.max(generator.permutation(times).reshape(split, -1).mean(axis=1)) for _ in range(64)]
    most = float(np.mean(draws)) * 2 * shape.masked_share * shape.tokens
    return max(1, math.ceil(most / chunk_rows(shape.tokens, vocab, platform)))


def model_flops(step: AbstractStep, shape: StepShape) -> float:
    """Of one step over all devices: products forward and backward, attention in full, the head at masked positions.

    A frozen weight has no gradient of its own: 4 a token, not 6.
    """
    config = step.model.config
    each = 4.0 if step.frozen else 6.0
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * shape.length
    head = each * config.hidden_size * config.vocab_size * shape.masked_share
    products = each * matrix_count(config) + 6.0 * _adapter_count(step)
    return shape.batch * shape.length * (products + attention + head)


def remat_flops(step: AbstractStep, shape: StepShape) -> float:
    """Of what the backward pass computes again: each layer's forward pass, or with "dots" its attention."""
    if shape.remat == "none":
        return 0.0
    config = step.model.config
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * shape.length
    products = 0.0 if shape.remat == "dots" else 2.0 * (matrix_count(config) + _adapter_count(step))
    return shape.batch * shape.length * (attention + products)


def matrix_count(config: DreamConfig) -> int:
    """Weights of all layers' matrices, however they are stored; norms and biases take no products worth counting."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def _adapter_count(step: AbstractStep) -> int:
    return parameter_count(step.state.params) if step.frozen else 0


# --------------------------------------------------------------------------------------------------------------- traffic


def collectives(step: AbstractStep, shape: StepShape) -> tuple[Collective, ...]:
    """What moves between devices where no compiler says it: weights gathered for each pass, gradients scattered.

    Left out: what tensor and context parallelism move of activations, when these split anything it is stated too low.
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
        # Two sums of a layer's activations forward, two backward, and those that are computed again.
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
    """The least that a device must read and write in its memory in a step, bytes.

    Parameters, moments and gradients once each way; the gathered weights of each pass written and read; what is kept, each
    way; in the loss the projection and its gradient for each chunk.
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
    """Sizes of the mesh by axis."""
    return {name: dict(mesh.shape).get(name, 1) for name in sharding.MESH_AXES}
