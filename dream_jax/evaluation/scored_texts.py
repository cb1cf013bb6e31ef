"""The tasks that are scored by likelihood: `choice` takes the most likely of several choices as the answer, and
`likelihood` reports the bits per byte of texts.

A row of task `choice` has `question`, `choices` (a list of at least two texts) and `answer` (the index of the correct
choice, from 0). A row of task `likelihood` has `text`, and may have `before` and `after`: the texts around it, which
the model always sees and which are not scored. With `after`, the result is the likelihood of an infilling.

lm-evaluation-harness has both kinds of tasks too, through `harness`. These tasks add what the harness cannot do: the
Monte Carlo error of each likelihood, several seeds, resuming after a kill, and the paired comparison of two runs.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dream_jax.data import numbered_records, record_number, text_field
from dream_jax.evaluation.likelihood import Bound, Passage
from dream_jax.evaluation.problems import check_fields, identify
from dream_jax.row_file import JsonRow
from dream_jax.tokenizer import Template, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One row of task `choice`.

    Attributes:
      number: its line in the file, from 1.
      where: "FILE:LINE", with which error messages begin.
      question, choices: the question and its possible answers.
      answer: index of the correct choice, from 0.
    """

    number: int
    where: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def passages(self, tokenizer: Tokenizer, template: Template, instruction: str = "") -> list[Passage]:
        """Returns a passage for each choice, which is scored: an assistant turn ("chat") or after "Answer:" ("raw").

        `instruction` and an empty line come before the question; "" is no instruction.
        """
        before_question = f"{instruction}\n\n" if instruction else ""
        if template == "chat":
            before = tokenizer.chat([{"role": "user", "content": before_question + self.question}])
            return [passage(before, tokenizer.encode(choice), []) for choice in self.choices]
        before = tokenizer.encode(f"{before_question}Question: {self.question}\nAnswer:")
        return [passage(before, tokenizer.encode(f" {choice}"), []) for choice in self.choices]

    def seeds(self, seed: int) -> list[tuple[int, ...]]:
        """Returns the seed for the masks of each choice, as `likelihood.draw_masks` takes it."""
        return [(seed, self.number, index) for index in range(len(self.choices))]

    def row(self, passages: Sequence[Passage], bounds: Sequence[Bound]) -> JsonRow:
        """Returns the row of items.jsonl, without seed and number; the arguments have one entry for each choice.

        Raises: ValueError, which begins with `where`, if a likelihood is NaN or infinite.
        """
        _check_bounds(self.where, bounds)
        nats = [bound.nats for bound in bounds]
        chosen, chosen_by_byte = likeliest(nats, self.choices)
        return {
            "identity": identify(self.question, self.choices, self.answer),
            "correct": chosen == self.answer,
            "correct_by_byte": chosen_by_byte == self.answer,
            "chosen": chosen,
            "nats": [round(value, 6) for value in nats],
            "standard_errors": [round(bound.variance**0.5, 6) for bound in bounds],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredText:
    """One row of task `likelihood`: a text that is scored, and the texts `before` and `after` it, which are not."""

    number: int
    where: str
    text: str
    before: str = ""
    after: str = ""

    def passages(self, tokenizer: Tokenizer, template: Template, instruction: str = "") -> list[Passage]:
        """Returns the one passage of this text, which is the same for both templates and has no instruction.

        If `before` is empty, the beginning-of-text token comes first, because a token is predicted from the one
        before it.
        """
        before = tokenizer.encode(self.before) or [tokenizer.bos_id]
        return [passage(before, tokenizer.encode(self.text), tokenizer.encode(self.after))]

    def seeds(self, seed: int) -> list[tuple[int, ...]]:
        """Returns the seed for the masks of the text, in a list of length 1."""
        return [(seed, self.number)]

    def row(self, passages: Sequence[Passage], bounds: Sequence[Bound]) -> JsonRow:
        """Returns the row of items.jsonl, without seed and number; the arguments have the one entry of this text.

        Raises: ValueError, which begins with `where`, if the likelihood is NaN or infinite.
        """
        _check_bounds(self.where, bounds)
        return {
            "identity": identify(self.text, self.before, self.after),
            **dataclasses.asdict(bounds[0]),
            "tokens": passages[0].num_scored,
            "bytes": len(self.text.encode("utf-8")),
        }


def passage(before: list[int], scored: list[int], after: list[int]) -> Passage:
    """Returns the passage of three lists of token ids; the middle one is scored. Raises ValueError if that is empty."""
    tokens = np.array([*before, *scored, *after], np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[len(before) : len(before) + len(scored)] = True
    return Passage(tokens=tokens, scored=mask)


def _check_bounds(where: str, bounds: Sequence[Bound]) -> None:
    for bound in bounds:
        if not (math.isfinite(bound.nats) and math.isfinite(bound.variance)):
            raise ValueError(
                f"{where}: the likelihood of this row is {bound.nats} nats (variance {bound.variance}), because logits "
                "of the model are NaN or infinite; check the weights, or pass --dtype float32"
            )


def likeliest(nats: Sequence[float], choices: Sequence[str]) -> tuple[int, int]:
    """Returns the index of the choice with the fewest nats, and of that with the fewest nats per byte.

    The second is fair to long choices, which have more nats. Of equal choices the first one is returned.

    Raises:
      ValueError: a likelihood is NaN, or their number is not that of the choices.
    """
    if len(nats) != len(choices) or any(math.isnan(one) for one in nats):
        raise ValueError(
            f"got the likelihoods {list(nats)} for {len(choices)} choices: every choice must have a number"
        )
    by_byte = [one / len(text.encode()) for one, text in zip(nats, choices, strict=True)]
    return min(range(len(nats)), key=nats.__getitem__), min(range(len(nats)), key=by_byte.__getitem__)


def read_choices(path: pathlib.Path, ignored: Collection[str] = ()) -> list[Choice]:
    """Returns all rows of a file of task `choice`, without their fields whose names are in `ignored`.

    Raises ValueError with file and line, or FileNotFoundError.
    """
    return [_choice(found, where) for where, found in numbered_records(path, ignored)]


def _choice(found: Mapping[str, Any], where: str) -> Choice:
    check_fields(found, ("question", "choices", "answer", "id", "category"), where)
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: 'choices' must be a list of at least two texts, not {choices!r:.60}")
    texts = tuple(text_field({"choices": choice}, "choices", where) for choice in choices)
    if len(set(texts)) < len(texts):
        raise ValueError(f"{where}: two of the choices are the same")
    answer = found.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise ValueError(f"{where}: 'answer' must be the index of a choice, 0..{len(texts) - 1}, not {answer!r:.60}")
    question = text_field(found, "question", where)
    return Choice(number=record_number(where), where=where, question=question, choices=texts, answer=answer)


def read_texts(path: pathlib.Path, ignored: Collection[str] = ()) -> list[ScoredText]:
    """Returns all rows of a file of task `likelihood`, without their fields whose names are in `ignored`.

    Raises ValueError with file and line, or FileNotFoundError.
    """
    return [_text(found, where) for where, found in numbered_records(path, ignored)]


def _text(found: Mapping[str, Any], where: str) -> ScoredText:
    check_fields(found, ("text", "before", "after", "id", "category"), where)
    around = {name: text_field(found, name, where) for name in ("before", "after") if name in found}
    return ScoredText(number=record_number(where), where=where, text=text_field(found, "text", where), **around)
