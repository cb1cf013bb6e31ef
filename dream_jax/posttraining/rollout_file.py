"""The file `rollouts.jsonl` in the folder of a run: some of the answers that were sampled, with their rewards."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import msgspec
import numpy as np

from dream_jax.files import replacing
from dream_jax.posttraining.rewards import SampledAnswer

FILE = "rollouts.jsonl"
_GROUPS = 2  # number of groups of a rollout that are written


class RolloutRecord(msgspec.Struct):
    """One line of the file: one prompt of one step, and its answers.

    Attributes:
      step: number of the step, from 1.
      prompt: the question.
      reference: the response of the row.
      answers: the sampled answers.
      rewards: for each answer the value of each reward, without weights.
      tokens: for each answer its number of tokens before its end.
    """

    step: int
    prompt: str
    reference: str
    answers: list[str]
    rewards: list[list[float]]
    tokens: list[int]


class RolloutFile:
    """Writes `rollouts.jsonl`; for process 0 only."""

    def __init__(self, folder: pathlib.Path):
        self._path = folder / FILE

    def cut(self, done: int) -> None:
        """Removes the lines of steps after `done`, and a line that was cut short."""
        if not self._path.is_file():
            return
        kept = [one for one in _lines(self._path) if one.step <= done]
        with replacing(self._path) as temporary:
            temporary.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))

    def add(self, step: int, answers: Sequence[SampledAnswer], values_RF: np.ndarray, group_size: int) -> None:
        """Appends the first groups of a rollout.

        Args:
          step: number of the step, from 1.
          answers: all answers of the rollout, those to the same prompt next to each other.
          values_RF: the values of the rewards.
          group_size: number of answers to each prompt.
        """
        with self._path.open("a", encoding="utf-8") as file:
            for start in range(0, min(len(answers), _GROUPS * group_size), group_size):
                group = answers[start : start + group_size]
                record = RolloutRecord(
                    step=step,
                    prompt=group[0].question,
                    reference=group[0].reference,
                    answers=[one.text for one in group],
                    rewards=values_RF[start : start + group_size].tolist(),
                    tokens=[one.length for one in group],
                )
                file.write(json.dumps(msgspec.to_builtins(record), ensure_ascii=False) + "\n")


def read_rollouts(folder: pathlib.Path) -> list[RolloutRecord]:
    """Returns the lines of `rollouts.jsonl`; an empty list if there is no such file.

    A last line that was cut short is left out.

    Raises:
      ValueError: another line is damaged.
    """
    path = folder / FILE
    return _lines(path) if path.is_file() else []


def _lines(path: pathlib.Path) -> list[RolloutRecord]:
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found.append(msgspec.json.decode(line, type=RolloutRecord))
        except msgspec.DecodeError as error:
            if number == len(lines):
                break  # the run was killed while it wrote this line
            raise ValueError(
                f"{path}:{number}: {error}; restore the file from a copy, or move it away: the samples are then missing in "
                "the report"
            ) from error
    return found
