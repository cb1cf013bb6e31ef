"""From gradients to updates: AdamW and Adafactor, the precision of their state, and the sharding of it.

AdamW keeps two moments per weight. In float32 they take twice the memory of the model; here they can also be stored as
bfloat16 or as 8-bit codes in blocks, and in the memory of the host. Adafactor keeps row and column averages in place of
the second moment, and no first moment. Clipping, warm-up, cosine decay and weight decay by name are the same for all.

| state, bytes a weight | mu | nu | both, relative to float32 |
|---|---|---|---|
| float32 | 4 | 4 | 100 % |
| bfloat16 | 2 | 2 | 50 % |
| int8 | 1 + 4/32 | 1 + 4/32 | 28 % (last axis 32 or longer) |
| Adafactor | 0 | 4/rows + 4/columns | under 1 % |

`config` has the settings and builds the optax transformation, `adam` is AdamW's direction with small moments, `codes` the
8-bit codes, `skipping` leaves out unusable updates, and `shardings` says which device holds which part of the state.
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
