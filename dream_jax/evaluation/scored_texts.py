"""The tasks that are scored by likelihood: choices, of which the likeliest is the answer, and texts, of which bits per byte
are reported.

A row of task `choice` has `question`, `choices` (texts, at least two) and `answer` (the number of the right one, from 0).
A row of task `likelihood` has `text`, and may have `before` and `after`: what stands around it, always seen and not scored.
With `after` it is the likelihood of an infilling.

lm-evaluation-harness asks both kinds of questions too, through `harness`. What it cannot do, and these tasks are for: the
Monte Carlo error of every likelihood, several seeds, resuming after a kill, and the paired comparison of two runs.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dream_jax.data import read_json_lines, text_field
from dream_jax.evaluation.likelihood import Bound, Passage
from dream_jax.evaluation.problems import check_fields, identify, line_number
from dream_jax.row_file import JsonRow
from dream_jax.tokenizer import Template, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with choices; `answer` is the number of the right one."""

    number: int
    where: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def passages(self, tokenizer: Tokenizer, template: Template) -> list[Passage]:
        """Each choice after the question, the choice scored: an assistant turn under "chat", "Answer:" under "raw"."""
        if template == "chat":
            before = tokenizer.chat([{"role": "user", "content": self.question}])
            return [passage(before, tokenizer.encode(choice), []) for choice in self.choices]
        before = tokenizer.encode(f"Question: {self.question}\nAnswer:")
        return [passage(before, tokenizer.encode(f" {choice}"), []) for choice in self.choices]

    def seeds(self, seed: int) -> list[tuple[int, ...]]:
        """What the masks of each choice are drawn from."""
        return [(seed, self.number, index) for index in range(len(self.choices))]

    def row(self, passages: Sequence[Passage], bounds: Sequence[Bound]) -> JsonRow:
        """The row of the ledger, without seed and number."""
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
    """A text, and what stands around it."""

    number: int
    where: str
    text: str
    before: str = ""
    after: str = ""

    def passages(self, tokenizer: Tokenizer, template: Template) -> list[Passage]:
        """Its tokens, under either template as they are. Where nothing stands before it, the beginning-of-text token does:
        a first token is predicted from what is before it."""
        before = tokenizer.encode(self.before) or [tokenizer.bos_id]
        return [passage(before, tokenizer.encode(self.text), tokenizer.encode(self.after))]

    def seeds(self, seed: int) -> list[tuple[int, ...]]:
        """What its masks are drawn from."""
        return [(seed, self.number)]

    def row(self, passages: Sequence[Passage], bounds: Sequence[Bound]) -> JsonRow:
        """The row of the ledger, without seed and number."""
        return {
            "identity": identify(self.text, self.before, self.after),
            **dataclasses.asdict(bounds[0]),
            "tokens": passages[0].num_scored,
            "bytes": len(self.text.encode("utf-8")),
        }


def passage(before: list[int], scored: list[int], after: list[int]) -> Passage:
    """Tokens of which those in the middle are scored. Raises ValueError when there are none of these."""
    tokens = np.array([*before, *scored, *after], np.int32)
    mask = np.zeros(len(tokens), bool)
    mask[len(before) : len(before) + len(scored)] = True
    return Passage(tokens=tokens, scored=mask)


def likeliest(nats: Sequence[float], choices: Sequence[str]) -> tuple[int, int]:
    """Which choice has the fewest nats, and which the fewest a byte (by which length is no loss); of equals the first.

    Raises:
      ValueError: nats that are no number, or not one for each choice.
    """
    if len(nats) != len(choices) or any(math.isnan(one) for one in nats):
        raise ValueError(
            f"got the likelihoods {list(nats)} for {len(choices)} choices: there must be a number for each"
        )
    by_byte = [one / len(text.encode()) for one, text in zip(nats, choices, strict=True)]
    return min(range(len(nats)), key=nats.__getitem__), min(range(len(nats)), key=by_byte.__getitem__)


def read_choices(path: pathlib.Path) -> list[Choice]:
    """All rows of a file of task `choice`. Raises: ValueError naming file and line; FileNotFoundError."""
    return [_choice(found, where) for where, found in read_json_lines(path)]


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
        raise ValueError(f"{where}: 'answer' must be the number of a choice, 0..{len(texts) - 1}, not {answer!r:.60}")
    question = text_field(found, "question", where)
    return Choice(number=line_number(where), where=where, question=question, choices=texts, answer=answer)


def read_texts(path: pathlib.Path) -> list[ScoredText]:
    """All rows of a file of task `likelihood`. Raises: ValueError naming file and line; FileNotFoundError."""
    return [_text(found, where) for where, found in read_json_lines(path)]


def _text(found: Mapping[str, Any], where: str) -> ScoredText:
    check_fields(found, ("text", "before", "after", "id", "category"), where)
    around = {name: text_field(found, name, where) for name in ("before", "after") if name in found}
    return ScoredText(number=line_number(where), where=where, text=text_field(found, "text", where), **around)
