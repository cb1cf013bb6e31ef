"""A few held-out prompts, answered before the first step and after the last with the same seed, for people to read."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import jax
import msgspec
from jax.sharding import Mesh

from dream_jax.data import TokenizedRows
from dream_jax.files import read_json, typed, write_json
from dream_jax.inference import answer, make_sampler
from dream_jax.model import Dream
from dream_jax.sampler import bucket_length
from dream_jax.trainer.settings import TrainSettings

FILE = "samples.json"
When = Literal["before", "after"]

# A little randomness, because answers at temperature 0 do not show how confident a model is.
_TEMPERATURE = 0.2


def take_samples(
    model: Dream,
    held_out: TokenizedRows,
    settings: TrainSettings,
    max_length: int,
    mesh: Mesh,
    when: When,
) -> None:
    """Answers the first held-out prompts, and writes the answers to `samples.json`; all processes must call this.

    Args:
      model: the model with its present weights.
      held_out, settings, max_length, mesh: those of the run, as in `PreparedRun`.
      when: key of the answers in the file. Answers under the same key, or to other prompts, are replaced.
    """
    tokenizer = held_out.tokenizer
    longest = model.config.max_position_embeddings - settings.evaluation.sample_tokens
    found = []
    room = 1
    for row, one in held_out.first(settings.evaluation.samples, max_length):
        if one.prompt_length <= longest:
            found.append((row, one.tokens[: one.prompt_length].tolist()))
            room = max(room, one.length - one.prompt_length)
    if not found:
        return
    # A longer answer than the longest held-out one would only add end-of-text tokens.
    room = min(settings.evaluation.sample_tokens, bucket_length(room))
    shards = dict(mesh.shape)["fsdp"]
    config = make_sampler(tokenizer, room, trained_mask=model.trained_mask, temperature=_TEMPERATURE)
    prompts, names = [prompt for _, prompt in found], [(settings.run.seed, number) for number in range(len(found))]
    answered = answer(model, tokenizer, prompts, names, config, -(-len(found) // shards) * shards)
    if jax.process_index():
        return
    asked = {
        "prompts": [tokenizer.decode(prompt) for prompt in prompts],
        "expected": [row.response for row, _ in found],
        "tokens": room,
        "temperature": _TEMPERATURE,
        "seed": settings.run.seed,
    }
    kept = read_samples(settings.run.out) if when == "after" else {}
    if any(kept.get(name) != value for name, value in asked.items()):
        kept = {}  # the answers are to other prompts: the run was resumed with other --samples or held-out rows
    write_json(settings.run.out / FILE, kept | asked | {when: [one.text for one in answered]})


def read_samples(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of `samples.json`; an empty dict if there is no such file. Raises ValueError if damaged."""
    path = folder / FILE
    if not path.is_file():
        return {}
    remedy = "move it away: the samples are then missing in the report"
    found = read_json(path, remedy)
    checked = typed(found, _SamplesFile, path, remedy)
    answers = [checked.expected, *(one for one in (checked.before, checked.after) if isinstance(one, list))]
    if any(len(texts) != len(checked.prompts) for texts in answers):
        raise ValueError(f"{path} does not have one answer for each of its {len(checked.prompts)} prompts; {remedy}")
    return found


class _SamplesFile(msgspec.Struct):
    """The entries of `samples.json`, with their types."""

    prompts: list[str]
    expected: list[str]
    tokens: int
    temperature: float
    seed: int
    before: list[str] | msgspec.UnsetType = msgspec.UNSET
    after: list[str] | msgspec.UnsetType = msgspec.UNSET
