"""Fills gaps in a text: mask tokens may be anywhere in the prompt, and the model sees both sides of a gap.

    python examples/infill.py [--model runs/opposites] [--text "h__ is not col_"]

The default model is the one that examples/finetune.py writes; "nano" has random weights, so its text is random.
"""

import numpy as np
import tyro

import dream_jax
from dream_jax.inference import find_tokenizer


def main(model: str = "runs/opposites", text: str = "h__ is not col_", gap: str = "_") -> None:
    """Prints the text before and after. Every occurrence of `gap` in the text is replaced by one mask token."""
    loaded = dream_jax.load(model)
    tokenizer = find_tokenizer("bytes" if loaded.tokenizer_dir is None else None, model, loaded)
    pieces = [tokenizer.encode(piece) for piece in text.split(gap)]
    tokens = pieces[0] + [token for piece in pieces[1:] for token in (tokenizer.mask_id, *piece)]
    config = dream_jax.SamplerConfig(
        max_new_tokens=0,  # nothing is appended: only the gaps are written
        steps=None,  # one step for each gap
        alg="entropy",
        forbidden_tokens=(tokenizer.mask_id, tokenizer.eos_id),
    )
    out = dream_jax.generate(loaded, np.array([tokens], np.int32), config)
    print(f"before: {text}")
    print(f"after:  {tokenizer.decode(np.asarray(out.tokens)[0].tolist(), skip_special=True)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
