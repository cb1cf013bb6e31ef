"""`Stream`: many prompts through one batch, in which a row that is done makes room for the next prompt.

Knows prompts, buckets and rows that come and go. Knows nothing of files or text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import sharding
from dream_jax.model import Dream
from dream_jax.sampler.config import SamplerConfig
from dream_jax.sampler.generate import bucket_length, check_key, check_prompt, lay_out
from dream_jax.sampler.loop import idle_batch, resume
from dream_jax.sampler.state import DynamicSettings, StaticSettings, active


class Answer(NamedTuple):
    """What one prompt became.

    Attributes:
      prompt: which one, by its number.
      tokens: int32 [P + N], the prompt and the answer.
      commit_step: int32 [P + N], as in Sample.
      passes: forward passes that the row took part in.
    """

    prompt: int
    tokens: np.ndarray
    commit_step: np.ndarray
    passes: int


class Stream(Iterator[Answer]):
    """Answers as they come, each what `generate` makes of its prompt alone with its key.

    Prompts of one bucket of lengths run together; buckets follow each other, shortest first. A bucket compiles one
    program, whatever the number of prompts.

    Args:
      model: any Dream. Where its parameters lie on a mesh, the batch is spread over it.
      prompts: token ids, one sequence a prompt.
      config: see SamplerConfig.
      keys: one key a prompt ([len(prompts)]), required when anything is random.
      batch_size: rows that are under way at a time.

    Attributes:
      forwards: forward passes made so far.

    Raises:
      ValueError: as `generate` raises, naming the prompt.
    """

    def __init__(
        self,
        model: Dream,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        keys: jax.Array | None = None,
        *,
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        check_key(config, keys)
        if keys is not None and keys.shape[:1] != (len(prompts),):
            raise ValueError(f"got keys of shape {keys.shape} for {len(prompts)} prompts; pass one a prompt")
        self.forwards = 0
        self._model, self._config, self._batch_size = model, config, batch_size
        self._rows = [np.asarray(prompt, np.int32).reshape(1, -1) for prompt in prompts]
        for index, row in enumerate(self._rows):
            try:
                check_prompt(model, row, np.ones(row.shape, bool), config)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        self._keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
        self._answers = self._run()

    def __next__(self) -> Answer:
        """The next answer; not in the order of the prompts."""
        return next(self._answers)

    def _run(self) -> Iterator[Answer]:
        buckets: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            buckets.setdefault(bucket_length(row.shape[1]), []).append(index)
        for width in sorted(buckets):
            yield from self._run_bucket(width, buckets[width])

    def _run_bucket(self, width: int, waiting: list[int]) -> Iterator[Answer]:
        model, config, size = self._model, self._config, self._batch_size
        total = width + config.max_new_tokens
        masked = max(int(np.sum(self._rows[index] == model.config.mask_token_id)) for index in waiting)
        static = StaticSettings.of(config, min(bucket_length(masked + config.max_new_tokens), total))
        dynamic = DynamicSettings.of(config)
        before = self.forwards
        with sharding.mesh_context(model):
            batch = _idle_batch(model, size, total, static)
            under_way: list[int | None] = [None] * size
            canvas = np.full((size, total), model.config.pad_token_id, np.int32)
            valid = np.ones((size, total), bool)
            which = np.zeros(size, np.int32)
            while waiting or any(index is not None for index in under_way):
                new = np.zeros(size, bool)
                for place, index in enumerate(under_way):
                    if index is None and waiting:
                        under_way[place] = which[place] = waiting.pop(0)
                        row = self._rows[which[place]]
                        one = lay_out(model, row, np.ones(row.shape, bool), config, width - row.shape[1])
                        canvas[place], valid[place] = one[0][0], one[1][0]
                        new[place] = True
                # Nobody waits for long: a quarter of the rows done, and the host looks. At the end, all of them.
                idle = -(-size // 4) if waiting else size
                batch = resume(
                    model, batch, new, canvas, valid, self._keys[which], dynamic, jnp.int32(idle), static=static
                )
                state = batch.state
                self.forwards = before + int(state.forwards)
                found = jax.device_get((active(state), state.canvas_BT, state.commit_step_BT, state.passes_B))
                for place, (busy, tokens, commit_step, passes) in enumerate(zip(*found, strict=True)):
                    index = under_way[place]
                    if index is not None and not busy:
                        begin = width - self._rows[index].shape[1]
                        yield Answer(index, tokens[begin:], commit_step[begin:], int(passes))
                        under_way[place] = None


_idle_batch = functools.partial(jax.jit, static_argnames=("rows", "length", "static"))(idle_batch)
