"""Makes pairs of a better and a worse answer from the sampled and judged answers of an evaluation.

    python evaluate.py --model MODEL --task sudoku --file train.jsonl --seeds 8 --temperature 1 --out runs/samples
    python convert/pairs.py runs/samples pairs.jsonl --file train.jsonl
    python train.py --model MODEL --objective vrpo --data pairs.jsonl

The file of problems must not be the one that the trained model will be evaluated on.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import tyro
from _console import errors_end_the_command

from dream_jax.bounds import MOST_ROWS, IntegerRange, check_numbers
from dream_jax.evaluation import report
from dream_jax.evaluation.ledger import ITEMS, SECONDS, SETTINGS
from dream_jax.evaluation.tasks import TASKS, read_problems, split_examples
from dream_jax.files import write_file
from dream_jax.paths import check_file, check_local
from dream_jax.row_file import RowFile
from dream_jax.side_files import read_json

PairRule = Literal["best-worst", "short-right", "long-right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Source, target and rules of the pairs."""

    src: tyro.conf.Positional[pathlib.Path]
    """The folder of a finished evaluation with several answers to each problem (evaluate.py --seeds)."""
    dst: tyro.conf.Positional[pathlib.Path]
    """The .jsonl file to write; statistics are written beside it."""
    file: pathlib.Path
    """The file of problems of the evaluation."""
    rules: tuple[PairRule, ...] = ("best-worst",)
    """How pairs are made of the answers to a problem. best-worst: a right answer against a wrong one. short-right: the
    shortest right answer against the longest right one, where answers should be short. long-right: the longest right
    answer against the shortest wrong one, where problems are hard. With several rules each makes its pairs."""
    most: int = 1
    """The largest number of pairs that a rule makes of one problem; only best-worst makes more than one."""

    def __post_init__(self) -> None:
        check_numbers(self, most=IntegerRange(1, MOST_ROWS))
        check_local(self)
        unknown = [rule for rule in self.rules if rule not in get_args(PairRule)]
        if unknown or not self.rules:
            raise ValueError(f"rules={self.rules} must name at least one of {', '.join(get_args(PairRule))}")


class JudgedAnswer(NamedTuple):
    """One sampled answer: its text as it was judged, its length in tokens, whether it is right, and the judge's reason.

    `ended` says whether it has an end token; without one the length is that of the space for the answer.
    """

    text: str
    tokens: int
    right: bool
    reason: str
    ended: bool


class MadePair(NamedTuple):
    """Two answers to one problem, the better one first, and the rule that made the pair."""

    chosen: JudgedAnswer
    rejected: JudgedAnswer
    rule: PairRule


def make_pairs(answers: Sequence[JudgedAnswer], rule: PairRule, most: int) -> Iterator[MadePair]:
    """Yields the pairs that a rule makes of the answers to one problem, which are in the order of their seeds.

    An answer without an end token is never chosen, because the model would learn to stop where it did not. Pairs of equal
    texts are left out.
    """
    right = [one for one in answers if one.right and one.ended]
    wrong = [one for one in answers if not one.right]
    if rule == "best-worst":
        # Each text counts once, so that an answer that is sampled often does not fill all pairs.
        found = zip(
            *(dict((one.text, one) for one in reversed(some)).values() for some in (right, wrong)), strict=False
        )
        for number, (chosen, rejected) in enumerate(found):
            if number < most:
                yield MadePair(chosen, rejected, rule)
        return
    short_to_long = sorted(right, key=lambda one: one.tokens)
    if rule == "short-right" and short_to_long and short_to_long[0].tokens < short_to_long[-1].tokens:
        yield MadePair(short_to_long[0], short_to_long[-1], rule)
    if rule == "long-right" and right and wrong:
        yield MadePair(short_to_long[-1], min(wrong, key=lambda one: one.tokens), rule)


def record_of(prompt: str | tuple[Any, ...], tools: Sequence[Mapping[str, Any]], pair: MadePair) -> dict[str, Any]:
    """Returns the row of a pair, in a form that `train.py --objective vrpo` reads.

    Raises:
      ValueError: the prompt is raw text that does not end with a line break.
    """
    more: dict[str, Any] = {
        "rule": pair.rule,
        "chosen_tokens": pair.chosen.tokens,
        "rejected_tokens": pair.rejected.tokens,
    }
    more |= {"rejected_because": pair.rejected.reason}
    if isinstance(prompt, str):
        if not prompt.endswith("\n"):
            raise ValueError(
                f"a raw prompt ends with {prompt[-20:]!r} and not with a line break, so no kind of row has it: evaluate "
                "with evaluate.py --template chat"
            )
        return {"input": prompt[:-1], "chosen": pair.chosen.text, "rejected": pair.rejected.text, **more}
    found: dict[str, Any] = {"prompt": [dict(turn) for turn in prompt]}
    for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        found[name] = [{"role": "assistant", "content": one.text}]
    return found | ({"tools": list(map(dict, tools))} if tools else {}) | more


def mean_of(values: Sequence[float]) -> float | None:
    """Returns the mean, rounded to two digits; None if there is no value."""
    return round(statistics.fmean(values), 2) if values else None


def statistics_of(pairs: Sequence[MadePair], problems: Mapping[str, int]) -> dict[str, Any]:
    """Returns the statistics of the pairs: by rule the number and the mean lengths, and why answers were rejected."""
    by_rule = {}
    for rule in get_args(PairRule):
        some = [pair for pair in pairs if pair.rule == rule]
        if some:
            longer = sum(pair.chosen.tokens > pair.rejected.tokens for pair in some)
            by_rule[rule] = {
                "pairs": len(some),
                "tokens_chosen": mean_of([pair.chosen.tokens for pair in some]),
                "tokens_rejected": mean_of([pair.rejected.tokens for pair in some]),
                "chosen_is_longer": round(longer / len(some), 3),
            }
    reasons = collections.Counter(pair.rejected.reason for pair in pairs if not pair.rejected.right)
    return {"problems": dict(problems), "rules": by_rule, "rejected_because": dict(reasons.most_common())}


class SampledProblem(NamedTuple):
    """A problem with the prompt that was asked and the answers to it, in the order of their seeds."""

    prompt: str | tuple[Any, ...]
    tools: Sequence[Mapping[str, Any]]
    answers: list[JudgedAnswer]


def read_samples(folder: pathlib.Path, file: pathlib.Path) -> list[SampledProblem]:
    """Returns the problems of an evaluation with their answers.

    Args:
      folder: the folder of the evaluation.
      file: the file of its problems.

    Raises:
      ValueError: the evaluation has no sampled answers, or is one of other problems.
    """
    recipe = read_json(folder / SETTINGS, "give the folder of an evaluation")
    task = TASKS.get(recipe.get("task", ""))
    if task is None:
        raise ValueError(
            f"{folder}: the task {recipe.get('task')!r} has no sampled answers; SRC needs one of {', '.join(TASKS)}"
        )
    if recipe["file"] != hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest():
        of = "another file, or of this one before a change"
        if recipe["file"] is None:
            of = "the generated test puzzles, on which no model should be trained: give --file to evaluate.py too"
        raise ValueError(f"--file {file} does not hold the problems of {folder}, which are those of {of}")
    rows = RowFile(folder / ITEMS).rows
    report.check_rows(folder, task.name, rows, RowFile(folder / SECONDS).rows)
    template, ignored = recipe["template"], recipe.get("ignore_field", ())
    problems = read_problems(task, file, ignored)
    examples, problems = split_examples(task, problems, file, None, recipe["shots"], ignored)
    if [one.identity for one in examples] != recipe["examples"]:
        raise ValueError(
            f"{folder} was asked with worked examples of another file, which cannot be put before the prompts here: "
            "leave out evaluate.py --examples"
        )
    answers = collections.defaultdict[str, list[JudgedAnswer]](list)
    for row in rows:
        text, whole = task.cut(row["answer"], template), row["tokens_to_end"] is not None
        answers[row["identity"]].append(
            JudgedAnswer(
                text=text,
                tokens=row["tokens_to_end"] if whole else row["room"],
                right=row["correct"],
                reason=row["reason"],
                # What a base model writes after its answer is cut off, and so the answer has an end.
                ended=whole or text.strip() != row["answer"].strip(),
            )
        )
    return [
        SampledProblem(task.prompt(one, examples, template, recipe["instruction"]), one.tools, answers[one.identity])
        for one in problems
    ]


def outcome_of(answers: Sequence[JudgedAnswer]) -> str:
    """Returns how the answers to a problem are divided, for the statistics."""
    right = sum(one.right for one in answers)
    if not answers:
        return "no answers"
    return "all wrong" if not right else "all right" if right == len(answers) else "mixed"


def main(settings: PairSettings) -> None:
    """Writes the pairs and their statistics.

    Raises:
      FileExistsError: DST exists.
      ValueError: SRC is no evaluation with sampled answers to the problems of the file, or no pair can be made.
    """
    check_file(settings.dst)
    beside = settings.dst.with_name(f"{settings.dst.stem}.statistics.json")
    for path in (settings.dst, beside):
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it, or give another DST")
    pairs, lines, counts = list[MadePair](), list[str](), collections.Counter[str]()
    for problem in read_samples(settings.src, settings.file):
        answers = [one for one in problem.answers if one.text.strip()]
        counts["empty answers"] += len(problem.answers) - len(answers)
        counts[outcome_of(answers)] += 1
        known = set[tuple[str, str]]()
        for pair in (pair for rule in settings.rules for pair in make_pairs(answers, rule, settings.most)):
            texts = pair.chosen.text, pair.rejected.text
            if texts[0] != texts[1] and texts not in known:
                known.add(texts)
                pairs.append(pair)
                lines.append(json.dumps(record_of(problem.prompt, problem.tools, pair), ensure_ascii=False))
    shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
    if not pairs:
        raise ValueError(
            f"no pair can be made of the answers ({shown}): sample more answers to each problem (evaluate.py --seeds 8 "
            "--temperature 1), or take other rules with convert/pairs.py --rules"
        )
    found = statistics_of(pairs, counts)
    settings.dst.parent.mkdir(parents=True, exist_ok=True)
    write_file(settings.dst, "".join(f"{line}\n" for line in lines))
    write_file(beside, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"problems by their answers: {shown}")
    for rule, values in found["rules"].items():
        print(f"{rule}: {', '.join(f'{name} {value}' for name, value in values.items())}")
    for reason, count in list(found["rejected_because"].items())[:10]:
        print(f"rejected {count} times: {reason}")
    print(f"wrote {len(pairs)} pairs to {settings.dst}, and statistics to {beside}")


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(PairSettings, description=__doc__))
