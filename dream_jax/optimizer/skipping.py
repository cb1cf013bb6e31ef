"""Skips updates: if a gradient is not usable, parameters and optimizer state keep their old values, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dream_jax.optimizer.adam import MomentsState, OnHost, select
from dream_jax.shapes import ParamTree


class SkippingTransformation(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes `usable`, a bool scalar, and returns the old state if it is false."""


def skipping(method: optax.GradientTransformation) -> SkippingTransformation:
    """Returns a transformation like `method` that can skip an update.

    Adam chooses between its old and new moments inside its update (see `adam`); for other states it is done here.
    """
    method = optax.with_extra_args_support(method)

    def has_chosen(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState | MomentsState | OnHost)

    def update(
        gradients: ParamTree,
        before: Any,
        params: ParamTree | None = None,
        *,
        usable: jax.Array | None = None,
        **others: Any,
    ) -> tuple[ParamTree, Any]:
        updates, after = method.update(gradients, before, params, usable=usable, **others)
        choose = lambda new, old: new if has_chosen(new) else select(usable, new, old)
        return updates, jax.tree.map(choose, after, before, is_leaf=has_chosen)

    return SkippingTransformation(method.init, update)


def update_if(
    usable: jax.Array,
    optimizer: optax.GradientTransformation,
    gradients: ParamTree,
    opt_state: Any,
    params: ParamTree,
) -> tuple[ParamTree, Any]:
    """Applies an optimizer update, or skips it.

    Multiplying the gradient by zero would not be enough: NaN times zero is NaN, and weights and moments decay even if
    the gradient is zero. `jax.lax.cond` would need more memory: it prevents XLA from writing the new arrays over the
    old ones, and it does not work with arrays in the memory of the host. Choosing elementwise is fused into the update.

    Args:
      usable: bool scalar; if it is false, the update is skipped.
      optimizer: any transformation; for those of `OptimizerConfig.make` the choice needs no additional memory.
      gradients: the gradients; if `usable` is false, they may be NaN or infinite.
      opt_state, params: the values before the update.

    Returns:
      The new parameters and the new state of the optimizer; if the update is skipped, the old ones, bit for bit.
    """
    if isinstance(optimizer, SkippingTransformation):
        updates, after = optimizer.update(gradients, opt_state, params, usable=usable)
    else:
        updates, after = optimizer.update(gradients, opt_state, params)
        after = select(usable, after, opt_state)
    return select(usable, optax.apply_updates(params, updates), params), after


def updates_done(opt_state: Any) -> jax.Array | None:
    """Returns how many updates the schedule of the learning rate has counted, int32 scalar; None without a schedule."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return next((leaf.count for leaf in leaves if isinstance(leaf, optax.ScaleByScheduleState)), None)
