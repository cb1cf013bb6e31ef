"""`Stream` answers many prompts in one batch, in which each row that is done is replaced by the next prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import sharding
from dream_jax.bounds import MOST_ROWS, IntegerRange, check
from dream_jax.model import Dream
from dream_jax.sampler.config import SamplerConfig
from dream_jax.sampler.generate import UNDEFINED, check_key, check_mask, check_prompt, lay_out
from dream_jax.sampler.growth import extents, first_width, grow, wants_more
from dream_jax.sampler.loop import new_batch, resume
from dream_jax.sampler.pass_counts import PassKind, counted
from dream_jax.sampler.state import DynamicSettings, StaticSettings, active, bucket_length


class Answer(NamedTuple):
    """The result of a stream for one prompt.

    Attributes:
      prompt: index of the prompt in the list of prompts.
      tokens: int32 [P + N], the prompt and the answer.
      commit_step: int32 [P + N], as in Sample.
      passes: number of forward passes that the row took part in.
      counts: for each kind of pass, the number of passes that the row needed.
      predicted: the number of predictions of the row, as in `PassCounts`.
    """

    prompt: int
    tokens: np.ndarray
    commit_step: np.ndarray
    passes: int
    counts: dict[PassKind, int]
    predicted: int


class Stream(Iterator[Answer]):
    """An iterator over the answers, in the order in which they are finished.

    Each answer is equal to the one that `generate` gives for this prompt and key alone. Prompts are grouped by
    `bucket_length`, and the groups run one after the other, shortest first. One program is compiled for each group.

    Args:
      model: any Dream. If its parameters are on a mesh, the batch is sharded over this mesh.
      prompts: one sequence of token ids per prompt.
      config: the settings of the sampler.
      keys: one key per prompt ([len(prompts)]); required if `config.is_random`.
      batch_size: number of rows that are denoised at the same time, at least 1.

    Attributes:
      forwards: number of forward passes made so far.
      made: for each kind of pass, the number of passes made so far.

    Raises:
      ValueError: as `generate` raises, with the index of the prompt (an answer whose logits are NaN or infinite raises when
        it is finished); or batch_size or the number of keys is wrong.
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
        check("batch_size", batch_size, IntegerRange(1, MOST_ROWS))
        check_mask(model, config)
        check_key(config, keys)
        if keys is not None and keys.shape[:1] != (len(prompts),):
            raise ValueError(f"got keys of shape {keys.shape} for {len(prompts)} prompts; pass one per prompt")
        self.forwards = 0
        self.made: Counter[PassKind] = Counter()
        self._model, self._config, self._batch_size = model, config, batch_size
        rows = [np.asarray(prompt if len(prompt) else np.zeros(0, np.int32)).reshape(1, -1) for prompt in prompts]
        for index, row in enumerate(rows):
            try:
                check_prompt(model, row, np.ones(row.shape, bool), config)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        self._rows = [row.astype(np.int32) for row in rows]
        self._keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
        self._answers = self._run()

    def __next__(self) -> Answer:
        """Returns the next finished answer; the answers are not in the order of the prompts."""
        return next(self._answers)

    def _run(self) -> Iterator[Answer]:
        buckets: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            buckets.setdefault(bucket_length(row.shape[1]), []).append(index)
        for width in sorted(buckets):
            yield from self._run_bucket(width, buckets[width])

    def _num_masked(self, index: int) -> int:
        """Returns the number of masks on the canvas of a prompt before the first step."""
        prompt = self._rows[index]
        canvas, _ = lay_out(self._model, prompt, np.ones(prompt.shape, bool), self._config, padding=0)
        return int(np.sum(canvas == self._model.config.mask_token_id))

    def _run_bucket(self, width: int, waiting: list[int]) -> Iterator[Answer]:
        model, config, size = self._model, self._config, self._batch_size
        total = width + config.max_new_tokens
        masked = [self._num_masked(index) for index in waiting]
        only_new = all(not np.any(self._rows[index] == model.config.mask_token_id) for index in waiting)
        extent = list(extents(config, only_new=only_new))
        static = StaticSettings.of(config, min(bucket_length(max(masked)), total), masked)
        static = dataclasses.replace(
            static, new_tokens=extent[0], first_width=first_width(config, width, only_new=only_new)
        )
        before = self.forwards
        with sharding.mesh_context(model):
            batch = new_batch(model, size, width + extent[0], static)
            num_kinds = len(static.pass_kinds(size, width + extent[0]))
            needed_before, made_before = np.zeros((size, num_kinds), np.int32), np.zeros(num_kinds, np.int32)
            prompt_of_row: list[int | None] = [None] * size
            canvas = np.full((size, total), model.config.pad_token_id, np.int32)
            valid = np.ones((size, total), bool)
            key_index = np.zeros(size, np.int32)
            masked_B = np.zeros(size, np.int32)
            counts: list[Counter[PassKind]] = [Counter() for _ in range(size)]
            dynamic = DynamicSettings.of(config, static.steps, masked_B)
            while waiting or any(index is not None for index in prompt_of_row):
                new = np.zeros(size, bool)
                for row, index in enumerate(prompt_of_row):
                    if index is None and waiting:
                        waiting_index = prompt_of_row[row] = key_index[row] = waiting.pop(0)
                        prompt = self._rows[waiting_index]
                        one = lay_out(model, prompt, np.ones(prompt.shape, bool), config, width - prompt.shape[1])
                        canvas[row], valid[row] = one[0][0], one[1][0]
                        new[row], masked_B[row] = True, self._num_masked(waiting_index)
                        counts[row], needed_before[row] = Counter(), 0
                # While prompts wait, the program returns as soon as a quarter of the rows are done, so that new prompts
                # start soon. Otherwise it returns when all rows are done.
                idle = -(-size // 4) if waiting else size
                if np.any(new):
                    dynamic = DynamicSettings.of(config, static.steps, masked_B)
                length = width + static.new_tokens
                batch = resume(
                    model,
                    batch,
                    new,
                    canvas[:, :length],
                    valid[:, :length],
                    self._keys[key_index],
                    dynamic,
                    jnp.int32(idle),
                    static=static,
                )
                state = batch.state
                self.forwards = before + int(state.forwards)
                kinds = static.pass_kinds(size, length)
                needed, made, predicted_B = map(np.array, (state.needed_BK, state.made_K, state.predicted_B))
                for row, since in enumerate(needed - needed_before):
                    counts[row].update(counted(kinds, since))
                self.made.update(counted(kinds, made - made_before))
                needed_before, made_before = needed, made
                busy_B = active(state)
                occupied = np.array([index is not None for index in prompt_of_row])
                if len(extent) > 1:
                    full = np.asarray(wants_more(model, batch, static=static)) & occupied
                    busy_B = busy_B | full
                    if np.any(full):
                        columns = extent[1] - extent.pop(0)
                        static = dataclasses.replace(static, new_tokens=extent[0])
                        batch = grow(model, batch, occupied, columns=columns, static=static)
                found = jax.device_get(
                    (busy_B, state.canvas_BT, state.commit_step_BT, state.passes_B, state.undefined_B)
                )
                for row, (busy, tokens, commit_step, passes, undefined) in enumerate(zip(*found, strict=True)):
                    index = prompt_of_row[row]
                    if index is not None and not busy:
                        if undefined:
                            raise ValueError(f"prompt {index}: {UNDEFINED}")
                        begin, missing = width - self._rows[index].shape[1], total - length
                        tokens = np.pad(tokens[begin:], (0, missing), constant_values=model.config.pad_token_id)
                        commit_step = np.pad(commit_step[begin:], (0, missing), constant_values=passes - 1)
                        yield Answer(index, tokens, commit_step, int(passes), dict(counts[row]), int(predicted_B[row]))
                        prompt_of_row[row] = None
