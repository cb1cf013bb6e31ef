"""A handful of held-out prompts, answered before the first step and after the last with the same seed.

Knows rows, the sampler and one file of the run's folder. Judges nothing: a person reads them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dream_jax.data import Source, encode_row, first_rows
from dream_jax.model import Dream
from dream_jax.sampler import SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import Tokenizer
from dream_jax.trainer.folder import write_json
from dream_jax.trainer.scoring import answer_text, left_padded
from dream_jax.trainer.settings import TrainSettings

FILE = "samples.json"
When = Literal["before", "after"]

# Some randomness: answers at temperature 0 hide how sure a model is.
_TEMPERATURE = 0.2


def take_samples(
    model: Dream,
    tokenizer: Tokenizer,
    held_out: Source,
    settings: TrainSettings,
    max_length: int,
    mesh: Mesh,
    when: When,
) -> None:
    """Answers the prompts, and adds the answers to `samples.json` at once; with several processes all must call.

    Args:
      model: as it is now.
      tokenizer, held_out, settings, max_length, mesh: of the run.
      when: under which name the answers are kept; earlier ones of that name, or to other questions, are replaced.
    """
    rows = first_rows(held_out, settings.evaluation.samples)
    encoding = settings.rows.encode_options()
    longest = model.config.max_position_embeddings - settings.evaluation.sample_tokens
    found = []
    room = 1
    for row in rows:
        one = encode_row(row, tokenizer, max_length, encoding)
        if one is not None and one.prompt_length <= longest:
            found.append((row, one.tokens[: one.prompt_length].tolist()))
            room = max(room, one.length - one.prompt_length)
    if not found:
        return
    # More than the held-out answers take would be end-of-text at best.
    room = min(settings.evaluation.sample_tokens, bucket_length(room))
    shards = dict(mesh.shape)["fsdp"]
    tokens, mask = left_padded([prompt for _, prompt in found], -(-len(found) // shards) * shards, tokenizer.pad_id)
    config = SamplerConfig(
        max_new_tokens=room,
        steps=room,
        alg="entropy",
        temperature=_TEMPERATURE,
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
    )
    out = generate(model, tokens, config, jax.random.key(settings.run.seed), prompt_mask=mask)
    answers = np.asarray(out.tokens)[:, tokens.shape[1] :]
    if jax.process_index():
        return
    asked = {
        "prompts": [tokenizer.decode(prompt) for _, prompt in found],
        "expected": [row.response for row, _ in found],
        "tokens": room,
        "temperature": _TEMPERATURE,
        "seed": settings.run.seed,
    }
    kept = read_samples(settings.run.out) if when == "after" else {}
    if any(kept.get(name) != value for name, value in asked.items()):
        kept = {}  # answers to something else: the run went on with other --samples, or other held-out rows
    answered = [answer_text(tokenizer, answer) for answer in answers[: len(found)]]
    write_json(settings.run.out / FILE, kept | asked | {when: answered})


def read_samples(folder: pathlib.Path) -> dict[str, Any]:
    """What `samples.json` holds; empty when there is none."""
    path = folder / FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
