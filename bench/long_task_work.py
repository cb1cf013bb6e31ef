"""Counts the passes of the sampler while small models answer, and computes the work of the same passes for Dream-7B."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dream_jax.chips import CHIPS
from dream_jax.config import PRESETS
from dream_jax.flops import pass_work
from dream_jax.sampler import NoCache, PassKind, Sample, SamplerConfig, WindowCache

MODEL, CHIP = "dream-7b", "h200"
PROMPT, NEW = 512, 512
"""Number of tokens of the prompt, and of new tokens, for which the work is computed."""
BATCH = 16
"""Number of answers that are sampled together, and the larger one of the batches for which the work is computed."""


class CountedPasses(NamedTuple):
    """The passes of some batches of `BATCH` answers.

    Attributes:
      answers: number of answers.
      needed: for each kind of pass, the number of passes that the answers needed, as if each were alone.
      made: for each kind of pass, the number of passes that the programs made.
      predicted: number of masked positions whose logits were computed, over all passes and answers.
    """

    answers: int
    needed: Counter[PassKind]
    made: Counter[PassKind]
    predicted: int

    @classmethod
    def of(cls, sample: Sample) -> CountedPasses:
        """Returns the passes of a batch."""
        counts = sample.counts
        rows, made = np.asarray(counts.by_row), np.asarray(counts.by_program)
        needed, total = Counter[PassKind](), Counter[PassKind]()
        for index, kind in enumerate(counts.kinds):
            needed[kind] += int(rows[:, index].sum())
            total[kind] += int(made[index])
        return cls(len(rows), needed, total, int(np.sum(counts.predicted)))

    @classmethod
    def joined(cls, several: Iterable[CountedPasses]) -> CountedPasses:
        """Returns the passes of several groups of batches together."""
        answers, needed, made, predicted = 0, Counter[PassKind](), Counter[PassKind](), 0
        for one in several:
            answers, predicted = answers + one.answers, predicted + one.predicted
            needed.update(one.needed)
            made.update(one.made)
        return cls(answers, needed, made, predicted)

    def plain(self) -> dict[str, Any]:
        """Returns the numbers as JSON values; `read` is the inverse."""
        kinds = [[*kind, self.needed[kind], self.made[kind]] for kind in self.needed]
        return {"answers": self.answers, "predicted": self.predicted, "kinds": kinds}

    @classmethod
    def read(cls, found: dict[str, Any]) -> CountedPasses:
        """Returns the object that `plain` returned the numbers of."""
        kinds = [(PassKind(*one[:4]), one[4], one[5]) for one in found["kinds"]]
        needed = Counter({kind: count for kind, count, _ in kinds})
        return cls(found["answers"], needed, Counter({kind: count for kind, _, count in kinds}), found["predicted"])

    @property
    def passes(self) -> float:
        """The mean number of passes that an answer needed."""
        return self.needed.total() / self.answers

    @property
    def computed_tokens(self) -> float:
        """The mean number of tokens that the passes of an answer computed, padding included."""
        return sum(kind.queries * count for kind, count in self.needed.items()) / self.answers


def work_7b(config: SamplerConfig, passes: CountedPasses, prompt: int, *, batch: int) -> dict[str, float]:
    """Returns the work of one answer of 512 tokens to a prompt of 512 tokens by Dream-7B in bfloat16.

    A pass over all tokens computes 1024 tokens, and a full pass over a part of the new tokens computes the same share of
    512. A pass over a window computes as many tokens as here, and attends to 1024. The number of passes is that of the
    small model times 512 / `max_new_tokens`. If full passes do not come at regular blocks, the first of them comes once
    in every answer, and the number of the others, and of the passes that renew the text before a block, grows as the
    number of blocks after the first.

    Args:
      config: the settings of the sampler.
      passes: the passes that were counted with these settings.
      prompt: number of tokens before the new ones when they were counted, padding included.
      batch: number of answers that are sampled together, 1 or `BATCH`. With 1, the passes are those that an answer needs
        alone. With `BATCH`, full passes with a cache are made for one row at a time, passes that renew the text before a
        block for as many rows as here, and the other passes for all rows.

    Returns:
      The operations (`flops`), the bytes of memory traffic (`bytes`), and the least time on an H200 (`seconds`).
    """
    model, chip, new = PRESETS[MODEL], CHIPS[CHIP], config.max_new_tokens
    longer = NEW / new
    unembedded = passes.predicted / max(1, passes.needed.total()) * (longer if config.block_length is None else 1.0)
    alone = batch == 1
    found = {"flops": 0.0, "bytes": 0.0, "seconds": 0.0}
    later, once = _later_blocks(config), 1.0
    for kind in passes.needed:
        is_full = kind.queries == kind.keys
        grouped = is_full and not isinstance(config.cache, NoCache)
        by_row = alone or grouped
        count = passes.needed[kind] / passes.answers if by_row else passes.made[kind] / passes.answers
        if later is None or kind.name not in ("full", "renewal"):
            count *= longer
        else:
            # The first full pass of an answer is of the first kind, because it has the fewest tokens in view.
            first = min(count, once) if kind.name == "full" else 0.0
            once -= first
            count = first + (count - first) * later
        queries = keys = PROMPT + math.ceil((kind.queries - prompt) * longer)
        if not is_full:
            queries, keys = kind.queries, PROMPT + NEW
        rows = 1 if by_row else min(kind.rows, batch)
        one = pass_work(model, batch=rows, queries=queries, keys=keys, unembedded=min(round(unembedded), queries))
        for name, value in zip(found, (one.flops, one.nbytes, one.seconds(chip)), strict=True):
            found[name] += count * value
    return found


def _later_blocks(config: SamplerConfig) -> float | None:
    """Returns how many times as many blocks after the first an answer of 512 tokens has as one of `max_new_tokens`.

    It is 1 if the answer has no such block, and None if full passes come at regular blocks or if there is no cache.
    """
    cache, block = config.cache, config.block_length
    if not isinstance(cache, WindowCache) or (cache.refresh_blocks is not None and not cache.refresh_drift):
        return None
    assert block is not None, "a cache needs blocks"
    blocks = math.ceil(config.max_new_tokens / block)
    return 1.0 if blocks == 1 else (math.ceil(NEW / block) - 1) / (blocks - 1)


def total_of(batches: Sequence[dict[str, Any]]) -> CountedPasses:
    """Returns the passes of batches that were stored with `CountedPasses.plain`."""
    return CountedPasses.joined(map(CountedPasses.read, batches))


def short_repr(config: SamplerConfig) -> str:
    """Returns the settings of a sampler that are not the defaults, as text: it tells stored answers apart."""
    default = SamplerConfig()
    shown = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())
