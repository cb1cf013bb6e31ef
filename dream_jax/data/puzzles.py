"""Dream's planning format: `{"input", "output"}` rows (sudoku, countdown), used without a chat template.

Knows the format, not the games.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dream_jax.data.jsonl import read_json_lines, text_field
from dream_jax.data.rows import Row, RowList


def planning_row(question: str, answer: str, meta: Mapping[str, Any]) -> Row:
    """The row of one problem: the raw prompt is the question and a newline, the response is the answer."""
    return Row(prompt=question + "\n", response=answer, meta=meta)


def read_planning(path: Path) -> RowList:
    """All rows of a file, in order. Raises as `read_json_lines` and `parse_planning` do."""
    return RowList([parse_planning(found, where) for where, found in read_json_lines(path)])


def parse_planning(found: Mapping[str, Any], where: str) -> Row:
    """One row. Raises ValueError, opening with `where`, for a field missing or bad."""
    return planning_row(text_field(found, "input", where), text_field(found, "output", where), {"where": where})
