"""Updates that are left out: after an unusable gradient the parameters and the state stay as they were, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dream_jax.optimizer.adam import MomentsState, OnHost, select
from dream_jax.shapes import ParamTree


class SkippingTransformation(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes the argument `usable` and returns its old state when that is false."""


def skipping(method: optax.GradientTransformation) -> SkippingTransformation:
    """Wraps a transformation so that it can skip an update.

    A state of Adam makes the choice between old and new in its own update, see `adam`; for all others it is made here.
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
    """Applies an update if it is usable.

    Scaling the gradient by zero would not be enough: NaN times zero is NaN, and weights and moments decay without a
    gradient too. `jax.lax.cond` would cost memory: the choice between two arrays is one more operation in the fusion that
    writes the new array over the old one, whereas a branch prevents updates in place and arrays in the memory of the host.

    Args:
      usable: bool scalar.
      optimizer: any transformation; those of `OptimizerConfig.make` need no additional memory for the choice.
      gradients: may hold anything, NaN included, when the update is not usable.
      opt_state, params: the values before the update.

    Returns:
      The parameters and the state of the optimizer; if the update is not usable, the old ones bit for bit.
    """
    if isinstance(optimizer, SkippingTransformation):
        updates, after = optimizer.update(gradients, opt_state, params, usable=usable)
    else:
        updates, after = optimizer.update(gradients, opt_state, params)
        after = select(usable, after, opt_state)
    return select(usable, optax.apply_updates(params, updates), params), after


def updates_done(opt_state: Any) -> jax.Array | None:
    """The number of updates that the learning rate's schedule has counted, an int32 scalar; None without a schedule."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return next((leaf.count for leaf in leaves if isinstance(leaf, optax.ScaleByScheduleState)), None)
