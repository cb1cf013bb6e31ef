"""Counts the FLOPs of a training step, their share of the peak rate of the hardware (MFU), and the work of a pass.

The count of a training step includes the matrix products of the forward and backward pass, attention over all pairs of
tokens of a text, and the output projection at masked positions only. It does not include recomputation. For block
diffusion it includes both streams, and attention over the pairs that the mask of two streams allows. Of the clean stream
of the last layer it includes only the keys and values, because nothing else is needed.
"""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from dream_jax import lora
from dream_jax.chips import Chip, chip_of
from dream_jax.config import DreamConfig
from dream_jax.model import Dream, parameter_count, split_params


def streams_run(layers: int, block: int | None) -> float:
    """Returns how many copies of a token a layer computes, on average over the layers.

    This is 1 for a single stream. With two streams it is 2, except in the last layer, which computes only the states
    that predict tokens, one for each token.

    Args:
      layers: number of layers.
      block: number of tokens in a block of block diffusion; None for a single stream.
    """
    return 1.0 if block is None else (2 * layers - 1) / layers


class FlopCounter:
    """Counts the FLOPs of training steps of one model, whose rows all have `length` tokens.

    The parameters of the model may be arrays or shapes. If the model has an adapter, only the adapter is trained. `block`
    is the number of tokens in a block of block diffusion; None for other objectives.
    """

    def __init__(self, model: Dream, length: int, block: int | None = None):
        config = model.config
        adapter = parameter_count(lora.split(split_params(model)[1])[0])
        embeddings = config.hidden_size * config.vocab_size
        layers = config.num_parameters - embeddings * (1 if config.tie_word_embeddings else 2)
        # FLOPs per weight and token: 2 in the forward pass, 2 for the gradient of the input, and 2 for the gradient of
        # the weight, which a frozen weight does not need.
        each = 4 if adapter else 6
        self._head = each * embeddings  # only at masked positions
        depth, runs = config.num_hidden_layers, streams_run(config.num_hidden_layers, block)
        matrices = each * layers + 6 * adapter
        self._length, self._block, self._token = length, block, runs * matrices
        if block is not None:
            keys_and_values = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
            self._token += each * keys_and_values  # of the last layer's clean stream
        # FLOPs of the attention of one query and one key, in all layers, for both copies of a token if there are two
        # streams. A copy sees (length + block) / 2 keys on average, so the 2 is divided by here; `step` adds the block.
        self._pair = 12 * depth * config.hidden_size * runs / (1 if block is None else 2)

    def step(self, tokens: float, masked: float, span: float | None = None) -> float:
        """Returns the FLOPs of a step over all devices.

        `tokens` is the number of computed tokens, padding included, and `masked` the number of masked positions. `span`
        is the mean number of tokens of a text, to all of which a token attends; None means that each row is one text.
        """
        keys = self._length if span is None else span
        keys += min(self._block or 0, keys)  # a block may be longer than the text
        return (self._token + self._pair * keys) * tokens + self._head * masked

    def mfu(self, tokens: int, masked: float, seconds: float, mesh: Mesh, span: float | None = None) -> float | None:
        """Returns the share of the peak rate of all devices that a step reached, in [0, 1]; None for unknown devices.

        The numbers of computed tokens and masked positions are those of all devices of the mesh; `span` is as in `step`.
        """
        chip = chip_of(mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        return self.step(tokens, masked, span) / seconds / (chip.peak_flops * mesh.devices.size)


class PassWork(NamedTuple):
    """The least work of forward passes.

    Attributes:
      flops: floating-point operations of all products, attention included.
      nbytes: bytes of memory traffic.
    """

    flops: float
    nbytes: float

    def seconds(self, chip: Chip) -> float:
        """Returns the time that a chip needs at least if this is the work of one pass."""
        return max(self.flops / chip.peak_flops, self.nbytes / chip.memory_bandwidth)


def pass_work(
    config: DreamConfig, *, batch: int, queries: int, keys: int, unembedded: int, itemsize: int = 2
) -> PassWork:
    """Returns the least work of one forward pass of the sampler.

    The operations are those of the matrix products: of the layers for all queries, of attention between all queries and
    keys of a row, and of the output projection. The bytes are those that must be moved whatever the compiler does: each
    weight is read once, and of the embeddings the rows of the tokens; each layer reads the keys and values that its
    queries attend to, and writes those of the queries. Activations are left out.

    Args:
      config: the architecture.
      batch: number of rows.
      queries: number of tokens that the pass computes of each row.
      keys: number of tokens of each row that the queries attend to, computed or from a KV cache.
      unembedded: number of positions of each row whose logits are computed.
      itemsize: number of bytes of a weight, and of an element of a key or value; 2 for bfloat16.
    """
    width, head = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = width * (2 * query + 2 * key_value) + 3 * width * config.intermediate_size
    table = config.vocab_size * width
    tokens, layers = batch * queries, config.num_hidden_layers
    flops = 2.0 * layers * tokens * (matrices + 2 * query * keys) + 2.0 * batch * unembedded * table
    # `num_parameters` counts the table of embeddings, and the output projection unless it is the same table.
    in_layers = config.num_parameters - table * (1 if config.tie_word_embeddings else 2)
    elements = in_layers + (table if unembedded else 0) + tokens * width
    elements += 2 * layers * key_value * batch * (keys + queries)
    return PassWork(flops, float(itemsize * elements))
