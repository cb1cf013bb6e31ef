"""Options of how text is read, tokenised and laid out in batches: frozen, checked, and all with a default."""

from dataclasses import dataclass
from typing import Literal, get_args

AnswerFormat = Literal["s1", "d1"]
"""How a trace and an answer become one response; see `dream_jax.data.schemas.reasoning`."""

LengthPolicy = Literal["filter", "right", "middle", "answer_only"]
"""What is done with a row of more than max_length tokens.

filter: it is dropped. right: its end is cut off, the end token first. middle: the end of its trace is cut out, so that
prompt, answer and end token stay whole; the row is dropped if these alone do not fit, or if it has no trace. answer_only:
every row, long or short, loses its trace, and a row that still does not fit is dropped.
"""

LearnedTurns = Literal["last", "all"]
"""Which assistant turns of a chat are learned: the last, or all of them."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files become rows.

    answer_format: of rows with a reasoning trace.
    only_correct: keep only rows that say deepseek_grade "Yes" (s1K-1.1); a file without the field is refused.
    skip_bad: rows that cannot be read are left out and listed, rather than fatal.
    held_out: share of the prompts that makes the test split of data that has none; with 0 all of it is for training.
    """

    answer_format: AnswerFormat = "s1"
    only_correct: bool = False
    skip_bad: bool = False
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out={self.held_out} is outside [0, 1): it is a share of the prompts")
        _check_choice("answer_format", self.answer_format, get_args(AnswerFormat))


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How a row becomes tokens."""

    length_policy: LengthPolicy = "filter"
    learned_turns: LearnedTurns = "last"

    def __post_init__(self) -> None:
        _check_choice("length_policy", self.length_policy, get_args(LengthPolicy))
        _check_choice("learned_turns", self.learned_turns, get_args(LearnedTurns))


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How rows are laid out in a batch.

    eos_tail: the largest number of end-of-text tokens after a row's own end token; None fills the row with them. They
      are attended to, maskable and learned like the published padding; the row ends where they end.
    cut_responses: Dream's `random_with_input_pad`: all rows of a batch get the response length of one of its rows, which
      is drawn anew for each batch (without the end token, which the published count leaves out). Longer responses lose
      their ends, shorter ones are padded to this length.
    tail_cut: Dream's `resp_cutoff_ratio`: probability that a batch loses a random tail, the same number of tokens in
      every row, that leaves each at least one token to learn.
    width_step: pad a batch to the next multiple of this that holds its longest row, rather than to max_length, and put
      rows of like length together (not under cut_responses, which needs rows of different lengths). Every width that
      occurs is compiled once.
    """

    eos_tail: int | None = None
    cut_responses: bool = False
    tail_cut: float = 0.0
    width_step: int | None = None

    def __post_init__(self) -> None:
        if self.eos_tail is not None and self.eos_tail < 0:
            raise ValueError(f"eos_tail={self.eos_tail} must not be negative; pass None for no limit")
        if not 0.0 <= self.tail_cut <= 1.0:
            raise ValueError(f"tail_cut={self.tail_cut} is outside [0, 1]: it is a probability")
        if self.width_step is not None and self.width_step < 1:
            raise ValueError(f"width_step={self.width_step} must be at least 1; pass None for one width")

    @property
    def hides(self) -> bool:
        """Whether rows may be shorter than their batch, so that a batch says which of its positions are valid."""
        return self.eos_tail is not None or self.cut_responses or self.tail_cut > 0


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
