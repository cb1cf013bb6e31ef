"""Names and paths to sources of rows.

Knows where data lies, what its first line says about its schema, and how a single file is split. Does not
tokenise.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from dream_jax.data.chat import read_chat
from dream_jax.data.gsm8k import read_gsm8k
from dream_jax.data.jsonl import read_json_lines
from dream_jax.data.planning import read_planning
from dream_jax.data.rows import Row, RowList, Source, check_split
from dream_jax.data.sudoku import SudokuSource

ASSETS_VARIABLE = "DREAM_JAX_ASSETS"
"""Environment variable naming the folder of files that stay outside the project; it holds data/gsm8k."""

SUDOKU_GIVENS = 6
"""Fewest cells shown: with 4 or 5 the nano model would need more than the minutes that a demonstration has."""

HELD_OUT = 0.05
"""Share of a single file's prompts that makes its test split."""

SUPPORTED = (
    '"sudoku", "gsm8k", a .jsonl file (rows with messages, prompt + response, question + answer, '
    "or input + output), or a directory with train.jsonl and test.jsonl"
)


def open_source(name_or_path: str | os.PathLike[str], split: str = "train", seed: int = 0) -> Source:
    """The rows of one split.

    "sudoku": generated puzzles with 6 to 12 givens; seed draws them (only this source reads it), the split is
    fixed.
    "gsm8k": $DREAM_JAX_ASSETS/data/gsm8k/{train,test}.jsonl.
    A directory: its train.jsonl or test.jsonl. A .jsonl file: see `read_rows` and `hold_out`.
    Raises: ValueError for a name that is not known or not built yet (s1k, hub ids), an unknown split, or a
    bad row; FileNotFoundError.
    """
    check_split(split)
    name, path = str(name_or_path), Path(name_or_path)
    if name == "sudoku":
        return SudokuSource(split, seed=seed, min_givens=SUDOKU_GIVENS)
    if name == "gsm8k":
        return _open_gsm8k(split)
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            raise FileNotFoundError(
                f"no {split}.jsonl in {path}; a data directory has train.jsonl and test.jsonl, or give one .jsonl file"
            )
        return read_rows(file)
    if path.is_file():
        return hold_out(read_rows(path), split, name)
    if path.suffix in (".jsonl", ".json"):
        raise FileNotFoundError(f"no file {path}; supported data: {SUPPORTED}")
    raise ValueError(
        f"data {name!r} is neither a known name nor an existing path; s1k and hub ids are not built yet. "
        f"Supported: {SUPPORTED}"
    )


def read_rows(path: Path) -> RowList:
    """All rows of a .jsonl file; the fields of its first object choose the schema, for all lines.

    Raises: ValueError naming file and line, FileNotFoundError.
    """
    where, first = next(read_json_lines(path))
    readers: list[tuple[set[str], Callable[[Path], RowList]]] = [
        ({"messages"}, read_chat),
        ({"prompt", "response"}, read_chat),
        ({"question", "answer"}, read_gsm8k),
        ({"input", "output"}, read_planning),
    ]
    for fields, reader in readers:
        if fields <= first.keys():
            return reader(path)
    raise ValueError(
        f"{where}: fields {sorted(first)} are no known schema; a row has 'messages', "
        "'prompt' and 'response', 'question' and 'answer', or 'input' and 'output'"
    )


def hold_out(rows: RowList, split: str, name: str) -> RowList:
    """One side of a single file: its test split is the prompts (at least one) with a hash in the lowest 5 %.

    The choice depends on the prompts alone, not on a seed or on their order, and rows with one prompt stay
    together: nothing seen in training is tested on. A file with one prompt only is all train.
    Raises: ValueError when the test split of such a file is asked for; `name` is what the message calls it.
    """
    by_prompt = [_prompt_hash(rows[index]) for index in range(len(rows))]
    hashes = sorted(set(by_prompt))
    count = sum(value < HELD_OUT * 2**64 for value in hashes)
    held = set(hashes[: min(max(count, 1), len(hashes) - 1)])
    if split == "test" and not held:
        raise ValueError(
            f"{name} has one prompt only, so no test split can be held out; give a directory with "
            "train.jsonl and test.jsonl"
        )
    return RowList([rows[index] for index, value in enumerate(by_prompt) if (value in held) == (split == "test")])


def _prompt_hash(row: Row) -> int:
    prompt = row.prompt if isinstance(row.prompt, str) else [[turn["role"], turn["content"]] for turn in row.prompt]
    return int.from_bytes(hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest(), "big")


def _open_gsm8k(split: str) -> RowList:
    assets = os.environ.get(ASSETS_VARIABLE)
    remedy = (
        f"set {ASSETS_VARIABLE} to the folder that holds data/gsm8k, "
        "or give the directory with train.jsonl and test.jsonl as a path"
    )
    if not assets:
        raise FileNotFoundError(f"gsm8k needs its files: {remedy}")
    path = Path(assets) / "data" / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {remedy}")
    return read_gsm8k(path)
