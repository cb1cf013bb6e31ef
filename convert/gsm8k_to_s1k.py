"""Writes GSM8K in the schema of s1K or s1K-1.1, one JSON object per line, as a substitute for s1K with short answers.

    python convert/gsm8k_to_s1k.py data/gsm8k/train.jsonl gsm8k-as-s1k.jsonl [--schema s1k-1.1]

The worked solution becomes the reasoning trace; its last line, `#### NUMBER`, becomes the answer in a box.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

import tyro
from _console import errors_end_the_command

from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.data.schemas import parse_gsm8k
from dream_jax.data.sources import parse_lines
from dream_jax.files import write_file
from dream_jax.paths import check_file, check_local


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrangeSettings:
    """Source, target and schema of the rows."""

    src: tyro.conf.Positional[pathlib.Path]
    """The train.jsonl or test.jsonl of GSM8K, or the directory with its train.jsonl."""
    dst: tyro.conf.Positional[pathlib.Path]
    """The file to write."""
    schema: Literal["s1k", "s1k-1.1"] = "s1k"
    """The field names to write; the rows of s1k-1.1 also have grades."""
    rows: int | None = None
    """The number of rows to write, from the start; all by default."""

    def __post_init__(self) -> None:
        check_numbers(self, rows=IntegerRange(1))


def arranged(question: str, solution: str, schema: str) -> dict[str, Any]:
    """Returns the fields of one row. Raises ValueError if the solution does not end with a line `#### NUMBER`."""
    found = re.fullmatch(r"(.*\S)\s*\n#### *(\S.*)", solution.strip(), re.DOTALL)
    if not found:
        raise ValueError(f"the solution {solution!r:.80} does not end with a line '#### NUMBER'")
    trace, result = found.groups()
    attempt = f"The answer is \\boxed{{{result}}}."
    common = {"question": question, "solution": result, "cot_type": "math", "source_type": "gsm8k", "metadata": "{}"}
    if schema == "s1k":
        return {**common, "attempt": attempt, "thinking_trajectories": [trace], "cot": None}
    graded = {"grade": "Yes", "grade_reason": "the worked solution of the data set"}
    both = {"thinking_trajectory": trace, "attempt": attempt, **graded}
    return common | {f"{who}_{name}": value for who in ("gemini", "deepseek") for name, value in both.items()}


def main(settings: ArrangeSettings) -> None:
    """Writes the rows. Raises FileExistsError if DST exists, ValueError for a row that is not as expected."""
    check_local(settings)
    check_file(settings.dst)
    source = settings.src / "train.jsonl" if settings.src.is_dir() else settings.src
    if settings.dst.exists():
        raise FileExistsError(f"{settings.dst} exists; remove it, or give another DST")
    rows = parse_lines(source, parse_gsm8k)
    count = len(rows) if settings.rows is None else min(settings.rows, len(rows))
    lines = []
    for row in map(rows.__getitem__, range(count)):
        assert not isinstance(row.prompt, str)
        try:
            lines.append(
                json.dumps(arranged(row.prompt[0]["content"], row.response, settings.schema), ensure_ascii=False)
            )
        except ValueError as error:
            raise ValueError(f"{row.meta['where']}: {error}") from error
    settings.dst.parent.mkdir(parents=True, exist_ok=True)
    write_file(settings.dst, "".join(f"{line}\n" for line in lines))
    print(f"wrote {count} rows in the schema of {settings.schema} to {settings.dst}")


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(ArrangeSettings, description=__doc__))
