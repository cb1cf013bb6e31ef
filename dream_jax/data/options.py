"""Defines the options for reading text, tokenising it and laying it out in batches; all are validated."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from dream_jax.bounds import MOST_TOKENS, SHARE, FloatRange, IntegerRange, check_numbers

AnswerFormat = Literal["s1", "d1", "s1-0.1", "d1-0.1"]
"""The format of rows with a trace and an answer; see `dream_jax.data.answer_formats`."""

LengthPolicy = Literal["filter", "right", "middle", "answer_only", "split"]
"""What happens to a row of more than max_length tokens.

filter: the row is dropped. right: tokens are cut off at the right end of the row; the end token is cut first. middle:
the last tokens of the trace are cut out, and prompt, answer and end token stay complete; the row is dropped if these do
not fit, or if it has no trace. answer_only: the trace of every row is left out, whatever its length, and a row that
still does not fit is dropped. split: a document goes on in further rows, which needs `BatchOptions.pack`; any other row is
dropped.
"""

PackBy = Literal["fit", "cut"]
"""How texts are put into packed rows.

fit: each text goes whole into the row in which it leaves the least space. cut: documents follow one after the other, and
are cut where a row ends; the rest begins another row.
"""

LearnedTurns = Literal["last", "all"]
"""Which assistant turns of a chat the model learns: only the last one, or all."""


_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading rows from files.

    answer_format: the format of rows with a reasoning trace.
    only_correct: keep only rows with deepseek_grade "Yes" (s1K-1.1); a row without this field raises ValueError.
    skip_bad: leave out rows that cannot be read and list them in `Intake`, instead of raising ValueError.
    held_out: share of the prompts, in [0, 1), that becomes the test split if the data has none; 0: all rows are train.
    ignored_fields: names of fields of rows and of messages that are left out, as if the file did not have them.
    split: the name of the split that is read for training; None: "train".
    test_split: the name of the test split; None: "test", or without such a split, and always if `split` is given, a
      share of the prompts of the training split is held out.
    config: the configuration of a hub data set, or the folder of a data directory that is read; None: there is only one.
    stream_rows: the number of first rows of a hub data set that are streamed, at least 1; None: all of it is downloaded.
    """

    answer_format: AnswerFormat = "s1"
    only_correct: bool = False
    skip_bad: bool = False
    held_out: float = 0.05
    ignored_fields: tuple[str, ...] = ()
    split: str | None = None
    test_split: str | None = None
    config: str | None = None
    stream_rows: int | None = None

    def __post_init__(self) -> None:
        for name, flag in (("split", "--data-split"), ("test_split", "--eval-split"), ("config", "--data-config")):
            value = getattr(self, name)
            if value is not None and not _NAME.fullmatch(value):
                raise ValueError(
                    f"{name}={value!r} ({flag}) is not a name: give letters, digits, '_', '-' and '.', such as train_sft"
                )
        if self.test_split is not None and self.test_split == (self.split or "train"):
            raise ValueError(
                f"test_split={self.test_split!r} is the split that is trained on; give another one, or none"
            )
        check_numbers(
            self,
            held_out=FloatRange(0.0, 1.0, open_high=True, note="it is a share of the prompts"),
            stream_rows=IntegerRange(1, note="leave it out to download all rows"),
        )
        _check_choice("answer_format", self.answer_format, get_args(AnswerFormat))


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options for turning rows of text into tokens.

    length_policy: what happens to a row of more than max_length tokens.
    learned_turns: which assistant turns of a chat the model learns.
    """

    length_policy: LengthPolicy = "filter"
    learned_turns: LearnedTurns = "last"

    def __post_init__(self) -> None:
        _check_choice("length_policy", self.length_policy, get_args(LengthPolicy))
        _check_choice("learned_turns", self.learned_turns, get_args(LearnedTurns))


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options for laying out rows in a batch.

    eos_tail: maximum number of end-of-text tokens after the end token of a row, 0 or more. They are attended to,
      maskable and learned, like the padding of the published code. None: they fill the row.
    cut_responses: Dream's `random_with_input_pad`. For each batch one of its rows is drawn at random, and all rows get
      the response length of that row, without its end token, as in the published code. Longer responses lose their
      ends; shorter ones are padded to this length.
    tail_cut: Dream's `resp_cutoff_ratio`, in [0, 1]: the probability that a random number of tokens is cut off at the
      right end of a batch, the same number in every row. Each response keeps at least one position.
    width_step: pad a batch to the smallest multiple of this number of tokens that holds its longest row, instead of to
      max_length, and put rows of similar length into the same batch (not with cut_responses, which needs rows of
      different lengths). The train step is compiled once for each width that occurs. None: all batches have the
      width max_length.
    pack: put several texts into each row, one after the other, each followed by its end-of-text tokens; see
      `dream_jax.data.packing`. This needs eos_tail, the number of these tokens, and excludes cut_responses and tail_cut,
      which give all responses of a batch one length.
    pack_by: how texts are put into packed rows. "cut" needs the length policy "split" and an eos_tail of 0.
    """

    eos_tail: int | None = None
    cut_responses: bool = False
    tail_cut: float = 0.0
    width_step: int | None = None
    # Not shown by repr, because checkpoints of earlier versions contain the options as text, without this one.
    pack: bool = field(default=False, repr=False)
    pack_by: PackBy = field(default="fit", repr=False)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            eos_tail=IntegerRange(0, note="pass None for no limit"),
            tail_cut=SHARE,
            width_step=IntegerRange(1, MOST_TOKENS, "pass None for one width"),
        )
        _check_choice("pack_by", self.pack_by, get_args(PackBy))
        if not self.pack:
            if self.pack_by == "cut":
                raise ValueError("pack_by='cut' (--pack-by cut) is a way to pack texts: give --pack as well")
            return
        if self.cut_responses or self.tail_cut:
            given = (
                "cut_responses (--cut-responses)" if self.cut_responses else f"tail_cut={self.tail_cut} (--tail-cut)"
            )
            raise ValueError(
                f"pack=True (--pack) puts texts of different lengths into one row, but {given} gives all responses of a "
                "batch one length: leave one of them out"
            )
        if self.eos_tail is None:
            raise ValueError(
                "pack=True (--pack) needs eos_tail, the number of end-of-text tokens after each text: give --eos-tail, "
                "for example --eos-tail 16"
            )
        if self.pack_by == "cut" and self.eos_tail:
            raise ValueError(
                f"pack_by='cut' (--pack-by cut) puts the next document right after the end token of the one before, but "
                f"eos_tail={self.eos_tail}: give --eos-tail 0"
            )

    def check_policy(self, policy: LengthPolicy) -> None:
        """Raises ValueError if rows cannot be laid out like this under a length policy."""
        if policy == "split" and not self.pack:
            raise ValueError(
                "length_policy='split' (--length-policy split) divides documents among rows that hold several texts: give "
                "--pack --eos-tail 0 as well"
            )
        if self.pack_by == "cut" and policy != "split":
            raise ValueError(
                f"pack_by='cut' (--pack-by cut) divides documents, but length_policy={policy!r}: give --length-policy split"
            )

    @property
    def hides(self) -> bool:
        """Whether rows may be shorter than the width of their batch, so that a batch needs `valid_BT`.

        Rows with several texts do not need it, because the batch has the lengths of the texts.
        """
        return not self.pack and (self.eos_tail is not None or self.cut_responses or self.tail_cut > 0)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
