"""GSM8K rows: `{"question", "answer"}`, one JSON object a line. The answer ends with "#### NUMBER".

Knows no scoring.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dream_jax.data.jsonl import read_json_lines, text_field
from dream_jax.data.rows import Row, RowList


def read_gsm8k(path: Path) -> RowList:
    """All rows of a file, in order. Raises as `read_json_lines` and `parse_gsm8k` do."""
    return RowList([parse_gsm8k(found, where) for where, found in read_json_lines(path)])


def parse_gsm8k(found: Mapping[str, Any], where: str) -> Row:
    """One row: the question is a user turn, the answer the response.

    Raises: ValueError, opening with `where`, for a field missing or bad.
    """
    question = {"role": "user", "content": text_field(found, "question", where)}
    return Row(prompt=(question,), response=text_field(found, "answer", where), meta={"where": where})
