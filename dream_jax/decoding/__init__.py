"""From logits to decisions: the token and confidence of each position, and the positions that are written.

Nothing here sorts the vocabulary: top_p and top_k keep the tokens above a threshold, which is found by a search.
"""

from dream_jax.decoding.choosing import Alg, choose_tokens, commit, most_confident_first

__all__ = ["Alg", "choose_tokens", "commit", "most_confident_first"]
