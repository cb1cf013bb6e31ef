"""Rematerialisation policies: which results of a layer are saved for the backward pass, and which are computed again.

Every policy saves the input of each layer. A policy may also save results that have names; the model gives them these
names with `named`. `docs/memory.md` has a table of what each policy costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal[
    "none", "products", "dots", "except-up", "except-mlp", "qkv-attention", "attention", "qkv", "full", "offload"
]

RematSetting = Literal["auto", Remat]
"""A policy, or "auto": the trainer then chooses the fastest policy with which the step fits into the memory."""

Result = Literal["q", "k", "v", "attention", "o", "gate", "up"]
"""The results of a layer that a policy can save: the queries and keys after the rotary embedding, the values, the output
of the attention before its output projection, the result of this projection, and the two inner results of the MLP. The
result of the MLP's last product is not in the list, because no gradient needs it."""

KEPT: Mapping[Remat, tuple[Result, ...]] = {
    "products": ("q", "k", "v", "attention", "o", "gate", "up"),
    "except-up": ("q", "k", "v", "attention", "o", "gate"),
    "except-mlp": ("q", "k", "v", "attention", "o"),
    "qkv-attention": ("q", "k", "v", "attention"),
    "attention": ("attention",),
    "qkv": ("q", "k", "v"),
    "full": (),
}
"""The named results that each policy saves besides the input of the layer. The policies that are not in this table are
"none", which saves everything, "dots", which saves the results of all matrix products but not the output of the attention,
and "offload", which saves only the input of each layer, in the memory of the host."""

# The name of the input of each layer, by which "offload" finds it.
LAYER_INPUT = "layer_input"

# The primitive of cuDNN's attention, whose gradient needs both of its results: the attended values and the statistics of
# the softmax. If only the attended values had a name and were saved, the kernel would run again for the statistics.
_ATTENTION_KERNEL = "dot_product_attention_fwd_wrapper"


def named(x: jax.Array, name: Result) -> jax.Array:
    """Returns x itself, marked with this name so that a policy can save it."""
    marked: jax.Array = checkpoint_name(x, name)
    return marked


def keeps_attention_kernel(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Returns whether a primitive is cuDNN's attention: the policy of `jax.checkpoint` that keeps only its results."""
    return bool(primitive.name == _ATTENTION_KERNEL)


def checkpointed(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Returns a function that computes one layer with the same results as `block`, under a policy.

    For the backward pass this function saves what the policy says, and computes everything else again.
    """
    if remat == "none":
        return block
    if remat == "full":
        return jax.checkpoint(block)
    policies = jax.checkpoint_policies
    if remat == "dots":
        return jax.checkpoint(block, policy=policies.dots_with_no_batch_dims_saveable)
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(block, policy=policy)
    results = KEPT[remat]
    is_named = policies.save_only_these_names(*results)

    def saves(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
        if "attention" in results and keeps_attention_kernel(primitive):
            return True
        return bool(is_named(primitive, *arguments, **parameters))

    return jax.checkpoint(block, policy=saves)
