"""Denoises one canvas and prints it after every step.

    python examples/denoise.py [--model runs/opposites] [--prompt "dark is not "]

The default model is the one that examples/finetune.py writes. Any model with a byte-level or the Dream tokenizer works;
"nano" has random weights, so its text is random.
"""

import numpy as np
import tyro

import dream_jax
from dream_jax.inference import canvas_text, find_tokenizer


def main(model: str = "runs/opposites", prompt: str = "dark is not ", new_tokens: int = 8) -> None:
    """Prints the canvas before the first step and after each step, and the step that wrote each new token."""
    loaded = dream_jax.load(model)
    tokenizer = find_tokenizer("bytes" if loaded.tokenizer_dir is None else None, model, loaded)
    prompt_BP = np.array([tokenizer.encode(prompt)], np.int32)
    config = dream_jax.SamplerConfig(
        max_new_tokens=new_tokens,
        steps=new_tokens,
        alg="entropy",  # the most confident position first, by the entropy of its distribution
        forbidden_tokens=(tokenizer.mask_id,),
    )
    out = dream_jax.generate(loaded, prompt_BP, config)
    for step_id in range(-1, new_tokens):  # -1 is the canvas before the first step
        canvas_T = np.asarray(out.canvas_at(step_id))[0]
        print(f"{step_id:3d}  {canvas_text(canvas_T, tokenizer)}")
    print("step that wrote each new token:", np.asarray(out.commit_step)[0, prompt_BP.shape[1] :].tolist())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
