"""Turns logits into decisions: the token and the confidence of each position, and the positions to write.

The vocabulary is never sorted: top_p and top_k keep the tokens above a threshold, and a search finds this threshold.
"""

from dream_jax.decoding.choosing import Alg, choose_tokens, commit, most_confident_first

__all__ = ["Alg", "choose_tokens", "commit", "most_confident_first"]
