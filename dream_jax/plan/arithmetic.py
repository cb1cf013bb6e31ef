"""Computes the floating-point operations and the network traffic of a train step, without a compiler."""

from __future__ import annotations

import math

import jax
import numpy as np

from dream_jax.flops import streams_run
from dream_jax.objective import chunk_rows
from dream_jax.plan.hlo import Collective
from dream_jax.remat import KEPT
from dream_jax.step_memory import AbstractStep, DeviceBytes, StepShape, adapter_count, matrix_count, recomputed_products

_FLOAT32 = 4


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
    positions, and the output head at masked positions only. With two streams they are those that the mask needs: attention
    of a block to itself and to the blocks before it. In the last layer nothing of the clean stream is counted but its
    keys and values. Rows that are only computed forward count with their forward pass.
    """
    config = step.model.config
    each, runs = 4.0 if step.frozen else 6.0, streams_run(config.num_hidden_layers, shape.block)
    keys = shape.length if shape.block is None else (shape.length + min(shape.block, shape.length)) / 2
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys * runs
    head = each * config.hidden_size * config.vocab_size * shape.masked_share
    products = runs * (each * matrix_count(config) + 6.0 * adapter_count(step))
    if shape.block is not None:
        products += each * 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    # The forward pass is 2 operations for each weight, and a third of the operations of the attention.
    only = 2.0 * (matrix_count(config) + adapter_count(step)) * runs + attention / 3 + 2.0 / each * head
    return shape.batch * shape.length * (products + attention + head + shape.forward * only)


# -------------------------------------------------------------------------------------------------------------- traffic


def collectives(step: AbstractStep, shape: StepShape) -> tuple[Collective, ...]:
    """Estimates the collectives of one step, for use without a compiler.

    They are all-gathers of weights and reduce-scatters of gradients, with tensor parallelism all-reduces of
    activations, and with context parallelism all-gathers of keys and values. With the last two it is too low.
    """
    # The weights are gathered for the forward pass, and once more for the recomputation and the backward pass together.
    ways, passes = shape.groups, 2 * shape.accumulation
    config, tensor = step.model.config, shape.mesh["tensor"]
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    found = []
    share = (ways - 1) / ways
    if ways > 1:
        layers, head = matrix_count(config) // tensor, config.hidden_size * config.vocab_size // tensor
        trained, summed = (adapter_count(step) // tensor, 0) if step.frozen else (layers, head)
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
        # Each layer sums its activations twice forward and twice backward, and once more if the result of the output
        # projection is recomputed; the last product of the MLP is never recomputed.
        repeats = shape.remat not in ("none", "dots") and "o" not in KEPT.get(shape.remat, ())
        sums = shape.accumulation * config.num_hidden_layers * (4 + repeats)
        sent = 2 * (tensor - 1) / tensor * shape.streams * shape.tokens * config.hidden_size * width
        found.append(Collective(kind="all-reduce", count=sums, sent=sums * sent))
    if shape.mesh["sequence"] > 1:
        split = shape.mesh["sequence"]
        keys = 2 * config.num_key_value_heads * config.head_dim // tensor * width * shape.streams * shape.tokens * split
        times = shape.accumulation * config.num_hidden_layers * 3
        found.append(Collective(kind="all-gather", count=2 * times, sent=times * (split - 1) / split * keys))
    return tuple(found)


def memory_traffic(step: AbstractStep, shape: StepShape, found: DeviceBytes, chunks: int) -> float:
    """Returns the minimum number of bytes that a device must read and write in its memory in one step.

    Parameters, moments, gradients and saved activations are read once and written once; gathered weights are written
    and read in the forward and in the backward pass, and in proportion to what is recomputed; for each chunk of the
    loss, the projection and its gradient are read and written.
    """
    config, tensor = step.model.config, shape.mesh["tensor"]
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    layer = 2.0 * matrix_count(config) / config.num_hidden_layers
    passes = shape.accumulation * (2 + recomputed_products(config, shape.remat) / layer)
    weights = 2 * passes * matrix_count(config) / tensor * width
    head = shape.accumulation * chunks * config.hidden_size * config.vocab_size // tensor * (2 * width + 2 * _FLOAT32)
    return (
        2.0 * (found.parameters + found.optimizer + found.gradients)
        + weights
        + 2.0 * shape.accumulation * found.kept
        + head
    )


def host_traffic(step: AbstractStep, shape: StepShape, found: DeviceBytes) -> float:
    """Returns the bytes that a device copies to and from the memory of the host in one step.

    These are the optimizer's moments that are stored there, and with remat "offload" the inputs of all layers; both are
    copied once in each direction.
    """
    config = step.model.config
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    inputs = config.num_hidden_layers * shape.streams * shape.tokens * config.hidden_size * width * shape.accumulation
    return 2.0 * (found.host + (inputs if shape.remat == "offload" else 0))
