"""Computes updates from gradients with AdamW or Adafactor, and defines the precision and sharding of their state.

AdamW stores two moments per weight, mu and nu. In float32 they take twice the memory of the float32 weights; here they
can also be stored as bfloat16 or as 8-bit codes, and in the memory of the host. Adafactor stores averages of rows and
columns instead of the second moment, and no first moment. Clipping, warm-up, cosine decay and weight decay are the same
for both.

| moments stored as | bytes per weight, mu | bytes per weight, nu | mu and nu, relative to float32 |
|---|---|---|---|
| float32 | 4 | 4 | 100 % |
| bfloat16 | 2 | 2 | 50 % |
| int8 | 1 + 4/32 | 1 + 4/32 | 28 % (last axis 32 or longer) |
| Adafactor | 0 | 4/rows + 4/columns | under 1 % |

The module `config` has the settings and builds the optax transformation, `adam` computes the direction of AdamW,
`codes` has the 8-bit codes, `skipping` skips updates whose gradient is not finite, and `shardings` has the sharding of
the state.
"""

from dream_jax.optimizer.config import Moments, OptimizerConfig, OptimizerKind
from dream_jax.optimizer.shardings import opt_state_shardings, state_bytes
from dream_jax.optimizer.skipping import update_if, updates_done

__all__ = [
    "Moments",
    "OptimizerConfig",
    "OptimizerKind",
    "opt_state_shardings",
    "state_bytes",
    "update_if",
    "updates_done",
]
