"""Text to arrays: rows, sources of rows, their tokens, and batches of them. Imports no jax."""

from dream_jax.data.encode import EncodedRow, LengthReport, encode_row, length_report
from dream_jax.data.pipeline import Batches, make_batches
from dream_jax.data.rows import Row, RowList, Source
from dream_jax.data.sources import open_source
from dream_jax.data.sudoku import SudokuSource, is_solution

__all__ = [
    "Batches",
    "EncodedRow",
    "LengthReport",
    "Row",
    "RowList",
    "Source",
    "SudokuSource",
    "encode_row",
    "is_solution",
    "length_report",
    "make_batches",
    "open_source",
]
