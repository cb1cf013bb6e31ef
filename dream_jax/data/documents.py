"""Whole documents: `{"text"}` rows, every token of which is learned, as in pre-training.

Knows no tokenizer: what a document begins with is decided where rows become tokens.
"""

from collections.abc import Mapping
from typing import Any

from dream_jax.data.jsonl import text_field
from dream_jax.data.rows import Row

FIELDS = {"text"}


def parse_document(found: Mapping[str, Any], where: str) -> Row:
    """One row: the text is the response, and there is no prompt. Other fields are ignored.

    Raises: ValueError, opening with `where`, for a text that is missing, empty or no string.
    """
    return Row(prompt="", response=text_field(found, "text", where), document=True, meta={"where": where})
