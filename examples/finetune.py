"""Fine-tunes the nano model on ten sentences, with the public loss and optax, and lets it complete them.

    python examples/finetune.py [--out runs/opposites] [--steps 400]

This takes about half a minute on two CPU cores. `denoise.py` and `infill.py` then show what the model has learned. For
larger data use train.py, which shards, logs, evaluates, saves checkpoints and resumes.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import dream_jax
from dream_jax.tokenizer import Tokenizer, load_tokenizer

PAIRS = "hot cold, big small, old new, wet dry, fast slow, high low, dark light, early late, rich poor, open shut"
SENTENCES = ["{} is not {}".format(*pair.split()) for pair in PAIRS.split(", ")]


def encode(sentences: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns token ids int32 [B, T], padded with end-of-text tokens, which are learned too, so the model stops."""
    width = max(map(len, sentences)) + 2
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    return np.array([row + [tokenizer.eos_id] * (width - len(row)) for row in rows], np.int32)


def fine_tune(model: dream_jax.Dream, tokens_BT: np.ndarray, steps: int) -> list[float]:
    """Trains the model in place and returns the loss of each step."""
    tokens_BT = np.tile(tokens_BT, (4, 1))  # each row occurs four times in a batch, each time with other masked tokens
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 10), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: dream_jax.Dream, optimizer: nnx.Optimizer[dream_jax.Dream], key: jax.Array) -> jax.Array:
        level_key, mask_key = jax.random.split(key)
        rows = len(tokens_BT)
        t_B = jax.random.permutation(level_key, jnp.arange(0.5, rows)) / rows  # noise levels, evenly spread
        masked_BT = jax.random.uniform(mask_key, tokens_BT.shape) < t_B[:, None]
        masked_BT &= (
            jnp.arange(tokens_BT.shape[1]) > 0
        )  # token i is predicted at position i - 1, so token 0 is never masked

        def loss_of(model: dream_jax.Dream) -> jax.Array:
            weight = dream_jax.UniformWeight()
            return dream_jax.masked_diffusion_loss(model, tokens_BT, masked_BT, t_B, weight=weight)[0]

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    return [float(train_step(model, optimizer, jax.random.key(step))) for step in range(steps)]


def complete(model: dream_jax.Dream, beginnings: list[str], tokenizer: Tokenizer) -> list[str]:
    """Returns each beginning with eight more tokens, as text. Beginnings of different lengths are padded on the left."""
    width = max(map(len, beginnings))
    prompt_BP = np.full((len(beginnings), width), tokenizer.pad_id, np.int32)
    prompt_mask = np.zeros(prompt_BP.shape, bool)
    for row, beginning in enumerate(beginnings):
        prompt_BP[row, width - len(beginning) :] = tokenizer.encode(beginning)
        prompt_mask[row, width - len(beginning) :] = True
    config = dream_jax.SamplerConfig(max_new_tokens=8, steps=8, alg="entropy")
    out = dream_jax.generate(model, prompt_BP, config, prompt_mask=prompt_mask)
    return [tokenizer.decode(row, skip_special=True) for row in np.asarray(out.tokens).tolist()]


def main(out: pathlib.Path = pathlib.Path("runs/opposites"), steps: int = 400) -> None:
    """Fine-tunes the model, prints the completed sentences and writes the model to `out`."""
    model, tokenizer = dream_jax.load("nano"), load_tokenizer("bytes")
    losses = fine_tune(model, encode(SENTENCES, tokenizer), steps)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    completed = complete(model, [sentence.split(" not ")[0] + " not " for sentence in SENTENCES], tokenizer)
    print(*completed, sep="\n")
    correct = sum(text == sentence for text, sentence in zip(completed, SENTENCES, strict=True))
    print(f"{correct} of {len(SENTENCES)} sentences are correct")
    dream_jax.save(model, out, overwrite=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
