"""Reads text as rows, turns rows into tokens, and lays tokens out in batches. This package does not import jax."""

from dream_jax.data.answer_formats import with_instruction
from dream_jax.data.chats import Chat, read_chat, read_question
from dream_jax.data.encode import TokenRow, encode_row, lay_out, token_row
from dream_jax.data.layout import Outlook
from dream_jax.data.lengths import LengthReport, TokenizedRows, length_report, longest_row
from dream_jax.data.long_tasks import LONG_TASKS, ChainSource, LongTask, LongTaskSource, RouteSource
from dream_jax.data.messages import parse_messages
from dream_jax.data.options import (
    AnswerFormat,
    BatchOptions,
    EncodeOptions,
    LearnedTurns,
    LengthPolicy,
    PackBy,
    ReadOptions,
)
from dream_jax.data.packing import MOST_TEXTS
from dream_jax.data.pair_batches import PairRows, TokenPair, kept_pairs, lay_out_pairs, make_pair_batches
from dream_jax.data.pairs import check_no_pairs, check_pairs
from dream_jax.data.pipeline import Batches, make_batches
from dream_jax.data.questions import numbered_records, record_number
from dream_jax.data.records import read_json_lines, text_field
from dream_jax.data.rows import (
    Intake,
    Mixture,
    Piece,
    Row,
    RowList,
    RowSource,
    first_numbers,
    first_prompted,
    has_traces,
)
from dream_jax.data.sources import open_mixture, open_source
from dream_jax.data.store import StoredRows, StoreWriter, TokenStore, open_store
from dream_jax.data.sudoku import SudokuSource, is_solution
from dream_jax.data.token_cache import CacheChoice, TokenCache, find_cache

__all__ = [
    "LONG_TASKS",
    "MOST_TEXTS",
    "AnswerFormat",
    "BatchOptions",
    "Batches",
    "CacheChoice",
    "ChainSource",
    "Chat",
    "EncodeOptions",
    "Intake",
    "LearnedTurns",
    "LengthPolicy",
    "LengthReport",
    "LongTask",
    "LongTaskSource",
    "Mixture",
    "Outlook",
    "PackBy",
    "PairRows",
    "Piece",
    "ReadOptions",
    "RouteSource",
    "Row",
    "RowList",
    "RowSource",
    "StoreWriter",
    "StoredRows",
    "SudokuSource",
    "TokenCache",
    "TokenPair",
    "TokenRow",
    "TokenStore",
    "TokenizedRows",
    "check_no_pairs",
    "check_pairs",
    "encode_row",
    "find_cache",
    "first_numbers",
    "first_prompted",
    "has_traces",
    "is_solution",
    "kept_pairs",
    "lay_out",
    "lay_out_pairs",
    "length_report",
    "longest_row",
    "make_batches",
    "make_pair_batches",
    "numbered_records",
    "open_mixture",
    "open_source",
    "open_store",
    "parse_messages",
    "read_chat",
    "read_json_lines",
    "read_question",
    "record_number",
    "text_field",
    "token_row",
    "with_instruction",
]
