"""The tasks whose answers are sampled: the fields of their files, their prompts and the maximum length of answers.

A prompt has one of two templates. "raw": an instruction, worked examples and the question form one text that the model
continues, as in evaluations of base models; text that it writes after its answer is cut off. "chat": the question is a
user turn after turns with the worked examples. Without examples, a raw prompt of a planning problem is the question
alone, as in the training with `train.py`.

The layout is that of Dream's evaluation (examples from the top of the file, "Input:" and "Output:"). The instructions
are not Dream's: to reproduce published numbers, pass the published instruction as `instruction`.

lm-evaluation-harness, which `harness` connects to, has a GSM8K task too, but no sudoku or countdown. The GSM8K task of
this module adds what the harness cannot do: a local file in the prompt format of the training, several seeds with one
random key for each problem, resuming after a kill with the same answers, and the paired comparison of two runs.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from dream_jax.data import (
    RowSource,
    numbered_records,
    open_source,
    read_question,
    record_number,
    text_field,
    with_instruction,
)
from dream_jax.evaluation.probe import EXPECTATIONS, parse_expectation
from dream_jax.evaluation.problems import Problem, check_fields
from dream_jax.judges.gsm8k import expected_number, judge_number
from dream_jax.judges.puzzles import check_puzzle, judge_countdown, judge_sudoku, parse_countdown
from dream_jax.judges.verdict import Verdict
from dream_jax.tokenizer import Message, Template

SampledTask = Literal["sudoku", "countdown", "gsm8k", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFormat:
    """How the rows of one task are read and written as prompts.

    Attributes:
      name: name of the task.
      read: function from one row of the file and its "FILE:LINE" to a Problem; raises ValueError for a bad row.
      instruction: default text at the beginning of a prompt.
      explains: whether the instruction explains the problem; otherwise it only says how to write the answer.
      labels: three texts of a raw prompt: before each question, before the answer of each example, and at the end of
        the prompt. The tokenizer joins a space to the word after it, but not to a digit. So the last label has no space
        at its end if answers begin with words: the tokens of the answer are then those of the examples.
      bare: text after the question of a raw prompt without examples; None if such a prompt has the labels too.
      stops: texts that end a raw answer.
      max_new_tokens: default maximum number of tokens of an answer.
      shots: default number of worked examples for each template.
    """

    name: SampledTask
    read: Callable[[Mapping[str, Any], str], Problem]
    instruction: str
    explains: bool
    labels: tuple[str, str, str]
    bare: str | None
    stops: tuple[str, ...]
    max_new_tokens: int
    shots: Mapping[Template, int]

    def prompt(
        self, problem: Problem, examples: Sequence[Problem], template: Template, instruction: str | None = None
    ) -> str | tuple[Message, ...]:
        """Returns the prompt of a problem: text for "raw"; messages for "chat", or if the question is a chat.

        Args:
          problem: the problem to be answered. The instruction comes before its first user turn if it was columns of text; a
            list of messages is asked as it is.
          examples: the worked examples before it; a question that is a chat is asked without them.
          template: "raw" or "chat"; the docstring of the module describes both.
          instruction: replaces the instruction of the task; None keeps it, and "" means no instruction.
        """
        instruction = self.instruction if instruction is None else instruction
        if not isinstance(problem.question, str):
            return with_instruction(problem.question, instruction) if problem.columns else problem.question
        if template == "chat":
            turns: list[Message] = []
            for one in examples:
                asked = one.question if isinstance(one.question, str) else one.question[-1]["content"]
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": one.answer}]
            turns.append({"role": "user", "content": problem.question})
            if instruction:
                turns[0] = {"role": "user", "content": f"{instruction}\n\n{turns[0]['content']}"}
            return tuple(turns)
        if not examples and self.bare is not None:
            return f"{problem.question}{self.bare}"
        before_question, before_answer, opening = self.labels
        parts = [instruction] if instruction else []
        parts += [f"{before_question}{one.question}{before_answer}{one.answer}" for one in examples]
        parts.append(f"{before_question}{problem.question}{opening}")
        return "\n\n".join(parts)

    def instruction_after(self, trained: str) -> str:
        """Returns the instruction for a model that was trained with the instruction `trained` before each question.

        It replaces that of the task, except where the problem could not be understood without the latter.
        """
        return f"{trained}\n\n{self.instruction}" if self.explains else trained

    def cut(self, answer: str, template: Template) -> str:
        """Returns the part of a generated text to judge: for "raw", without leading space, up to the first stop.

        A base model does not end after its answer, but continues with further text.
        """
        if template == "raw":
            answer = answer.lstrip()
            for stop in self.stops:
                answer = answer.partition(stop)[0]
        return answer


def _planning(
    check: Callable[[str, str], object], judge: Callable[[str, str], Verdict], found: Mapping[str, Any], where: str
) -> Problem:
    check_fields(found, ("input", "output"), where)
    question, solution = text_field(found, "input", where), text_field(found, "output", where).strip()
    problem = question.strip()
    check(problem, where)
    verdict = judge(problem, solution)
    if not verdict.correct:
        raise ValueError(f"{where}: 'output' is no solution of 'input': {verdict.reason}")
    return Problem(
        number=record_number(where),
        where=where,
        question=question,  # with the space around it, as in training
        answer=solution,
        judge=functools.partial(judge, problem),
    )


_sudoku = functools.partial(_planning, check_puzzle, judge_sudoku)
_countdown = functools.partial(_planning, parse_countdown, judge_countdown)


def _gsm8k(found: Mapping[str, Any], where: str) -> Problem:
    check_fields(found, ("question", "answer"), where)
    answer = text_field(found, "answer", where)
    judge = functools.partial(judge_number, expected_number(answer, where))
    question = text_field(found, "question", where)
    return Problem(
        number=record_number(where), where=where, question=question, answer=_without_notes(answer), judge=judge
    )


def _without_notes(answer: str) -> str:
    """Returns a GSM8K answer without its calculator notes: "16-3=<<16-3=13>>13" becomes "16-3=13"."""
    pieces = answer.split("<<")
    return pieces[0] + "".join(piece.partition(">>")[2] for piece in pieces[1:])


def _chat(found: Mapping[str, Any], where: str) -> Problem:
    if "question" in found and "messages" in found:
        raise ValueError(f"{where}: give either 'question' or 'messages'")
    known = ("id", "category", *EXPECTATIONS)
    chat = read_question(found, where, known=known)
    if chat.unread:
        check_fields(dict.fromkeys(chat.unread), ("question", "messages", "tools", *known), where)
    return Problem(
        number=record_number(where),
        where=where,
        question=chat.messages if chat.text is None else chat.text,
        answer="",
        judge=parse_expectation(found, where),
        tools=chat.tools,
        columns=chat.columns,
    )


TASKS: Mapping[SampledTask, TaskFormat] = {
    "sudoku": TaskFormat(
        name="sudoku",
        read=_sudoku,
        instruction=(
            "Each input is a 4x4 grid; 0 marks an empty cell. Fill the empty cells with digits from 1 to 4 so that no "
            "digit occurs twice in a row, in a column or in one of the four 2x2 boxes. The output is the whole grid."
        ),
        explains=True,
        labels=("Input:\n", "\nOutput:\n", "\nOutput:\n"),
        bare="\n",
        stops=("\n\n",),
        max_new_tokens=24,
        shots={"raw": 8, "chat": 8},
    ),
    "countdown": TaskFormat(
        name="countdown",
        read=_countdown,
        instruction=(
            "Each input is a list of numbers; the last one is the target. Reach the target with +, -, * and /, using "
            "each of the other numbers exactly once. The output is the steps, each with two numbers and its result."
        ),
        explains=True,
        labels=("Input: ", "\nOutput: ", "\nOutput: "),
        bare="\n",
        stops=("\n",),
        max_new_tokens=32,
        shots={"raw": 8, "chat": 8},
    ),
    "gsm8k": TaskFormat(
        name="gsm8k",
        read=_gsm8k,
        instruction='Solve the problem step by step. End with a line that holds "#### " and the final number alone.',
        explains=False,
        labels=("Question: ", "\nAnswer: ", "\nAnswer:"),
        bare=None,
        stops=("\n\nQuestion:", "\nQuestion:"),
        max_new_tokens=256,
        shots={"raw": 8, "chat": 0},
    ),
    "chat": TaskFormat(
        name="chat",
        read=_chat,
        instruction="",
        explains=False,
        labels=("Question: ", "\nAnswer: ", "\nAnswer:"),
        bare="\n",
        stops=(),
        max_new_tokens=256,
        shots={"raw": 0, "chat": 0},
    ),
}
assert set(TASKS) == set(get_args(SampledTask))


def read_problems(
    task: TaskFormat, path: pathlib.Path | None, ignored: Collection[str] = (), *, strict: bool = True
) -> list[Problem]:
    """Returns the problems of a file, in its order; for sudoku without a file, the generated test puzzles.

    `ignored` and `strict` are those of `numbered_records`.

    Raises:
      ValueError: a row is bad (the message has file and line), or `path` is None and the task is not sudoku.
      FileNotFoundError: there is no file at `path`.
    """
    if path is not None:
        return [task.read(found, where) for where, found in numbered_records(path, ignored, strict=strict)]
    if task.name != "sudoku":
        raise ValueError(f"task {task.name} needs --file, a .jsonl, .json or .parquet file")
    return list(_generated(open_source("sudoku", "test")))


def generated_examples(count: int) -> list[Problem]:
    """Returns `count` sudoku puzzles of the training split; no generated test puzzle has one of their solutions."""
    return [problem for problem, _ in zip(_generated(open_source("sudoku", "train")), range(count), strict=False)]


def _generated(source: RowSource) -> Iterator[Problem]:
    for index in range(len(source)):
        row = source[index]
        assert isinstance(row.prompt, str)
        found = {"input": row.prompt.removesuffix("\n"), "output": row.response}
        yield _sudoku(found, f"generated:{index + 1}")


def split_examples(
    task: TaskFormat,
    problems: Sequence[Problem],
    path: pathlib.Path | None,
    examples: pathlib.Path | None,
    shots: int,
    ignored: Collection[str] = (),
) -> tuple[list[Problem], list[Problem]]:
    """Returns the worked examples of the prompts, and the problems that remain to be answered.

    Examples are the first `shots` rows of the file `examples`. If that is None they are the first of `problems`,
    as in the published evaluation, and are not answered; if `path`, the file of the problems, is None too, they
    are generated. `ignored` is as for `read_problems`.

    Raises: ValueError if there are too few rows, if an example is one of the problems, or if the task is chat, whose
      rows have no reference answers.
    """
    if shots < 0:
        raise ValueError(f"{shots=} must not be negative")
    if shots and task.name == "chat":
        raise ValueError("the rows of task chat have no reference answers, so they cannot be examples; pass --shots 0")
    if not shots and examples is not None:
        raise ValueError(f"--examples {examples} has no effect with 0 shots; pass --shots NUMBER, or leave it out")
    if not shots:
        return [], list(problems)
    if examples is None and path is None:
        return generated_examples(shots), list(problems)
    if examples is None:
        if len(problems) <= shots:
            raise ValueError(
                f"{path} has {len(problems)} rows; with {shots} of them as examples no problem is left: pass "
                "--examples FILE or a smaller --shots"
            )
        return list(problems[:shots]), list(problems[shots:])
    found = read_problems(task, examples, ignored, strict=False)
    if len(found) < shots:
        raise ValueError(f"{examples} has {len(found)} rows, but {shots} examples are needed: pass a smaller --shots")
    shown = found[:shots]
    asked = {problem.identity for problem in problems}
    for one in shown:
        if one.identity in asked:
            raise ValueError(f"{one.where}: this example is also one of the problems; pass a file of other examples")
    return shown, list(problems)
