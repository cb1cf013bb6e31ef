"""The tasks whose answers are sampled: what their files hold, how they are asked, how long answers may be.

Prompts come in two ways. "raw": an instruction, worked examples and the question as one text that the model continues, as
base models are evaluated; what it writes after its answer is cut off. "chat": the question as a user turn, worked examples
as turns before it. Without examples, a planning problem is the bare question, as `train.py` trains on it.

The layout is Dream's own (examples from the top of the file, "Input:" and "Output:"); the instructions are in our words,
so give the published ones with `instruction` when the published numbers are to be met.

GSM8K is a task of lm-evaluation-harness as well, which `harness` gives access to. It has a task here for what the harness
cannot do: a local file in the prompts that the model was trained on, several seeds with a key for each problem, resuming
after a kill to the same answers, and the paired comparison of two runs. Sudoku and countdown it does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from dream_jax.data import RowSource, open_source, parse_messages, read_json_lines, text_field
from dream_jax.evaluation.gsm8k import expected_number, judge_number
from dream_jax.evaluation.probe import EXPECTATIONS, parse_expectation
from dream_jax.evaluation.problems import Problem, Verdict, check_fields, line_number
from dream_jax.evaluation.puzzles import check_puzzle, judge_countdown, judge_sudoku, parse_countdown
from dream_jax.tokenizer import Message, Template

SampledTask = Literal["sudoku", "countdown", "gsm8k", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFormat:
    """How one task is read and asked.

    Attributes:
      name: of the task.
      read: one row of its file.
      instruction: stands before everything else.
      labels: what stands before a question and before its answer in a raw prompt, and what the prompt ends with. Words are
        tokens with the space before them, digits are not: before words the prompt ends without one, as the examples'
        tokens have it.
      bare: what follows a question that is asked raw without examples; None to use the labels there too.
      stops: where a raw answer ends, at the latest.
      max_new_tokens: room for an answer, by default.
      shots: worked examples by default, under each template.
    """

    name: SampledTask
    read: Callable[[Mapping[str, Any], str], Problem]
    instruction: str
    labels: tuple[str, str, str]
    bare: str | None
    stops: tuple[str, ...]
    max_new_tokens: int
    shots: Mapping[Template, int]

    def prompt(
        self, problem: Problem, examples: Sequence[Problem], template: Template, instruction: str | None = None
    ) -> str | tuple[Message, ...]:
        """What the model is given: one text under "raw", messages under "chat".

        Args:
          problem: the one to be answered.
          examples: worked ones that come before it.
          template: see the module.
          instruction: instead of the task's own.
        """
        instruction = self.instruction if instruction is None else instruction
        if not isinstance(problem.question, str):
            return problem.question
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

    def cut(self, answer: str, template: Template) -> str:
        """The answer proper: under "raw" only what comes before the first stop, as a base model writes on."""
        if template == "raw":
            answer = answer.lstrip()
            for stop in self.stops:
                answer = answer.partition(stop)[0]
        return answer


def _planning(
    check: Callable[[str, str], object], judge: Callable[[str, str], Verdict], found: Mapping[str, Any], where: str
) -> Problem:
    check_fields(found, ("input", "output"), where)
    problem, solution = text_field(found, "input", where).strip(), text_field(found, "output", where).strip()
    check(problem, where)
    verdict = judge(problem, solution)
    if not verdict.correct:
        raise ValueError(f"{where}: 'output' is no solution of 'input': {verdict.reason}")
    return Problem(
        number=line_number(where),
        where=where,
        question=problem,
        answer=solution,
        judge=functools.partial(judge, problem),
    )


_sudoku = functools.partial(_planning, check_puzzle, judge_sudoku)
_countdown = functools.partial(_planning, parse_countdown, judge_countdown)


def _gsm8k(found: Mapping[str, Any], where: str) -> Problem:
    check_fields(found, ("question", "answer"), where)
    answer = text_field(found, "answer", where)
    judge = functools.partial(judge_number, expected_number(answer, where))
    question = text_field(found, "question", where).strip()
    return Problem(
        number=line_number(where), where=where, question=question, answer=_without_notes(answer), judge=judge
    )


def _without_notes(answer: str) -> str:
    """A GSM8K answer without its calculator notes: "16-3=<<16-3=13>>13" is written "16-3=13"."""
    pieces = answer.split("<<")
    return pieces[0] + "".join(piece.partition(">>")[2] for piece in pieces[1:])


def _chat(found: Mapping[str, Any], where: str) -> Problem:
    check_fields(found, ("question", "messages", "id", "category", *EXPECTATIONS), where)
    if ("question" in found) == ("messages" in found):
        raise ValueError(f"{where}: give either 'question' or 'messages'")
    question: str | tuple[Message, ...]
    if "question" in found:
        question = text_field(found, "question", where)
    else:
        question = tuple(parse_messages(found["messages"], where))
        if question[-1]["role"] != "user":
            raise ValueError(f"{where}: the last message must be the user's; it is the one that is answered")
    judge = parse_expectation(found, where)
    return Problem(number=line_number(where), where=where, question=question, answer="", judge=judge)


TASKS: Mapping[SampledTask, TaskFormat] = {
    "sudoku": TaskFormat(
        name="sudoku",
        read=_sudoku,
        instruction=(
            "Each input is a 4x4 grid; 0 marks an empty cell. Fill the empty cells with digits from 1 to 4 so that no "
            "digit occurs twice in a row, in a column or in one of the four 2x2 boxes. The output is the whole grid."
        ),
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
        labels=("Question: ", "\nAnswer: ", "\nAnswer:"),
        bare="\n",
        stops=(),
        max_new_tokens=256,
        shots={"raw": 0, "chat": 0},
    ),
}
assert set(TASKS) == set(get_args(SampledTask))


def read_problems(task: TaskFormat, path: pathlib.Path | None) -> list[Problem]:
    """The problems of a file, in its order; without a file, the generated test puzzles of sudoku.

    Raises: ValueError naming file and line for a bad row, or for a task that needs a file; FileNotFoundError.
    """
    if path is not None:
        return [task.read(found, where) for where, found in read_json_lines(path)]
    if task.name != "sudoku":
        raise ValueError(f"task {task.name} needs --file, a .jsonl file")
    return list(_generated(open_source("sudoku", "test")))


def generated_examples(count: int) -> list[Problem]:
    """Sudoku puzzles of the training split, whose solutions no generated test puzzle shares."""
    return [problem for problem, _ in zip(_generated(open_source("sudoku", "train")), range(count), strict=False)]


def _generated(source: RowSource) -> Iterator[Problem]:
    for index in range(len(source)):
        row = source[index]
        assert isinstance(row.prompt, str)
        found = {"input": row.prompt.removesuffix("\n"), "output": row.response}
        yield _sudoku(found, f"generated:{index + 1}")


def split_examples(
    task: TaskFormat, problems: Sequence[Problem], path: pathlib.Path | None, examples: pathlib.Path | None, shots: int
) -> tuple[list[Problem], list[Problem]]:
    """The worked examples of the prompt, and the problems that are left to be answered.

    Examples come from the top of the file `examples`; without one, from the top of the problems' own file, as published,
    and are then not asked.

    Raises: ValueError when there are too few, or when the task has no worked answers.
    """
    if shots < 0:
        raise ValueError(f"{shots=} must not be negative")
    if shots and task.name == "chat":
        raise ValueError("the rows of task chat have no model answers, so they make no examples; pass --shots 0")
    if not shots:
        return [], list(problems)
    if examples is None and path is None:
        return generated_examples(shots), list(problems)
    if examples is None:
        if len(problems) <= shots:
            raise ValueError(
                f"{path} has {len(problems)} rows; {shots} of them would be examples and none is left: give "
                "--examples FILE or a smaller --shots"
            )
        return list(problems[:shots]), list(problems[shots:])
    found = read_problems(task, examples)
    if len(found) < shots:
        raise ValueError(f"{examples} has {len(found)} rows, fewer than the {shots} examples that are asked for")
    shown = found[:shots]
    asked = {problem.identity for problem in problems}
    for one in shown:
        if one.identity in asked:
            raise ValueError(f"{one.where}: this example is one of the problems; give a file of others")
    return shown, list(problems)
