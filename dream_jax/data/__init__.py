"""Text to arrays: rows, sources of rows, their tokens, and batches of them. Imports no jax."""

from dream_jax.data.encode import EncodedRow, LengthReport, encode_row, length_report
from dream_jax.data.layout import Outlook
from dream_jax.data.options import (
    AnswerFormat,
    BatchOptions,
    EncodeOptions,
    LearnedTurns,
    LengthPolicy,
    ReadOptions,
)
from dream_jax.data.pipeline import Batches, make_batches
from dream_jax.data.rows import Intake, Mixture, Piece, Row, RowList, Source, first_rows
from dream_jax.data.sources import open_mixture, open_source
from dream_jax.data.sudoku import SudokuSource, is_solution

__all__ = [
    "AnswerFormat",
    "BatchOptions",
    "Batches",
    "EncodeOptions",
    "EncodedRow",
    "Intake",
    "LearnedTurns",
    "LengthPolicy",
    "LengthReport",
    "Mixture",
    "Outlook",
    "Piece",
    "ReadOptions",
    "Row",
    "RowList",
    "Source",
    "SudokuSource",
    "encode_row",
    "first_rows",
    "is_solution",
    "length_report",
    "make_batches",
    "open_mixture",
    "open_source",
]
