"""Arranges GSM8K in the schema of s1K or s1K-1.1, one JSON object a line: practice for s1K without its length.

    python convert/gsm8k_to_s1k.py data/gsm8k/train.jsonl gsm8k-as-s1k.jsonl [--schema s1k-1.1]

The worked solution becomes the reasoning trace, and its last line, `#### NUMBER`, the answer in a box.
"""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any, Literal

import tyro

from dream_jax.data.schemas import parse_gsm8k
from dream_jax.data.sources import parse_lines
from dream_jax.files import write_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """From where to where, and in which schema."""

    src: tyro.conf.Positional[pathlib.Path]
    """GSM8K's train.jsonl or test.jsonl, or their directory, whose train.jsonl is taken."""
    dst: tyro.conf.Positional[pathlib.Path]
    """File to make."""
    schema: Literal["s1k", "s1k-1.1"] = "s1k"
    """Whose field names; s1k-1.1 has grades as well."""
    rows: int | None = None
    """Only the first so many."""


def arranged(question: str, solution: str, schema: str) -> dict[str, Any]:
    """One row. Raises ValueError for a solution that does not end with #### and the result."""
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


def main(settings: Settings) -> None:
    source = settings.src / "train.jsonl" if settings.src.is_dir() else settings.src
    if settings.dst.exists():
        raise FileExistsError(f"{settings.dst} exists; remove it, or give another name")
    rows = parse_lines(source, parse_gsm8k)
    count = len(rows) if settings.rows is None else min(settings.rows, len(rows))
    lines = []
    for row in map(rows.__getitem__, range(count)):
        try:
            lines.append(
                json.dumps(arranged(row.prompt[0]["content"], row.response, settings.schema), ensure_ascii=False)
            )
        except ValueError as error:
            raise ValueError(f"{row.meta['where']}: {error}") from error
    write_file(settings.dst, "".join(f"{line}\n" for line in lines))
    print(f"wrote {count} rows in the schema of {settings.schema} to {settings.dst}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
