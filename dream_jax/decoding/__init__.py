"""From logits to decisions: which token each position would take, how sure that is, and which positions are written.

Knows rows of logits and confidences. Knows nothing of canvases, models or the clock. Nothing here sorts the vocabulary:
top_p and top_k keep what lies above a threshold, which is searched for.
"""

from dream_jax.decoding.choosing import Alg, choose_tokens
from dream_jax.decoding.order import commit, most_confident_first

__all__ = ["Alg", "choose_tokens", "commit", "most_confident_first"]
