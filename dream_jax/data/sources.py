"""Names and paths to sources of rows, and how data without a test split is divided."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dream_jax.data import records
from dream_jax.data.options import ReadOptions
from dream_jax.data.rows import Intake, Mixture, Row, RowList, RowSource, check_split
from dream_jax.data.schemas import Parser, find_parser, parse_gsm8k
from dream_jax.data.sudoku import SudokuSource

ASSETS_VARIABLE = "DREAM_JAX_ASSETS"
"""Environment variable naming the folder of files that stay outside the project; it holds data/gsm8k and data/s1k."""

SUDOKU_GIVENS = 6
"""Fewest cells shown: with 4 or 5 the nano model would need more than the minutes that a demonstration has."""

SUPPORTED = (
    '"sudoku", "gsm8k", "s1k", a .jsonl, .json or .parquet file (rows with messages, prompt + response, question + '
    "answer, input + output, text, or s1K's fields), a directory with train and test files of these kinds or one saved by "
    "`datasets`, or organisation/name on the Hugging Face hub"
)


def open_source(
    name_or_path: str | os.PathLike[str], split: str = "train", seed: int = 0, options: ReadOptions = ReadOptions()
) -> RowSource:
    """The rows of one split.

    "sudoku": generated puzzles with 6 to 12 givens, drawn from the seed, which no other source reads; the split is fixed.
    "gsm8k": $DREAM_JAX_ASSETS/data/gsm8k/{train,test}.jsonl.
    "s1k": $DREAM_JAX_ASSETS/data/s1k, a directory as below, or s1k.jsonl, .json or .parquet there. Nothing is
    downloaded for this name.
    A directory: its train or test files (.jsonl, .json, .parquet, or the parquet shards of a hub repository), or what
    `datasets` saved there. A file: see `read_rows`.
    organisation/name, where no such path exists: downloaded from the Hugging Face hub.
    Of a file, a saved data set, shards or a hub data set without a test split, see `hold_out`.
    Raises: ValueError for a name that is not known, an unknown split, or a bad row (unless the options skip it);
    FileNotFoundError; ConnectionError.
    """
    check_split(split)
    name, path = str(name_or_path), Path(name_or_path)
    if name == "sudoku":
        return SudokuSource(split, seed=seed, min_givens=SUDOKU_GIVENS)
    if name == "gsm8k":
        return parse_lines(_asset("gsm8k", [f"gsm8k/{split}.jsonl"]), parse_gsm8k)
    if name == "s1k":
        return _open_path(_asset("s1k", ["s1k", *(f"s1k{suffix}" for suffix in records.SUFFIXES)]), split, options)
    if path.exists():
        return _open_path(path, split, options)
    if path.suffix in records.SUFFIXES:
        raise FileNotFoundError(f"no file {path}; supported data: {SUPPORTED}")
    # Where a folder has the name of the organisation, a path was mistyped, and nothing is to be downloaded for it.
    if records.HUB_ID.fullmatch(name) and not path.parent.exists():
        return _one_split(records.hub_splits(name), split, name, options)
    raise ValueError(f"data {name!r} is neither a known name nor an existing path. Supported: {SUPPORTED}")


def open_mixture(
    names_or_paths: Sequence[str],
    weights: Sequence[float] | None = None,
    split: str = "train",
    seed: int = 0,
    options: ReadOptions = ReadOptions(),
) -> RowSource:
    """Several sources as one, or the only one; weights: see `Mixture`. Raises as `open_source` and `Mixture` do."""
    parts = [open_source(name, split, seed, options) for name in names_or_paths]
    return parts[0] if len(parts) == 1 and not weights else Mixture(parts, weights)


def read_rows(path: Path, options: ReadOptions = ReadOptions()) -> RowList:
    """All rows of a file; the fields of the first that has those of a known schema choose it, for all of them.

    Raises: ValueError naming file and line for a bad row, unless the options skip it, or where none is left;
    FileNotFoundError.
    """
    return _read_files([path], options, str(path))


def parse_lines(path: Path, parser: Callable[[Mapping[str, Any], str], Row]) -> RowList:
    """All rows of a file of JSON lines that have one schema. Raises as `read_json_lines` and the parser do."""
    return RowList([parser(found, where) for where, found in records.read_json_lines(path)])


def _rows(
    found: Iterable[records.Record], options: ReadOptions, name: str, bad: list[ValueError] | None = None
) -> RowList:
    """The records as rows; the fields of the first that has those of a known schema choose it, for all of them.

    bad: the complaints about records that could not be read, which grows while `found` is read.
    """
    rows, left_out, bad = list[Row](), Counter[str](), [] if bad is None else bad
    parse: Parser | None = None
    for where, record in found:
        try:
            parse = parse or find_parser(record, where, options)
            row = parse(record, where)
        except ValueError as complaint:
            if not options.skip_bad:
                raise
            bad.append(complaint)
            continue
        if isinstance(row, Row):
            rows.append(row)
        else:
            left_out[row] += 1
    if not rows:
        first = f"; the first bad row: {bad[0]}" if bad else ""
        raise ValueError(
            f"{name}: no row is left, {len(bad)} are bad, {left_out.total()} are left out by a filter{first}"
        )
    return RowList(rows, Intake(bad=tuple(map(str, bad)), filtered=dict(left_out)))


def _read_files(paths: Sequence[Path], options: ReadOptions, name: str) -> RowList:
    """The rows of files that have one schema, in order."""
    bad = list[ValueError]()
    on_bad = bad.append if options.skip_bad else None
    return _rows(chain.from_iterable(records.read_records(path, on_bad) for path in paths), options, name, bad)


def _open_path(path: Path, split: str, options: ReadOptions) -> RowList:
    if not path.is_dir():
        return hold_out(read_rows(path, options), split, str(path), options.held_out)
    if records.is_saved_dataset(path):
        return _one_split(records.saved_splits(path), split, str(path), options)
    files = records.split_files(path, split)
    train = records.split_files(path, "train")
    # Where there are files of lines, a missing test file is an error; published shards often come without one.
    sharded = [file for file in train if file.suffix == ".parquet"]
    if not files and not sharded:
        raise FileNotFoundError(
            f"no {split}.jsonl in {path}, nor .json or .parquet; a data directory has train.jsonl and test.jsonl, "
            "or give one file"
        )
    rows = _read_files(files or train, options, str(path))
    alone = bool(sharded) and not records.split_files(path, "test")
    return hold_out(rows, split, str(path), options.held_out) if alone else rows


def _one_split(splits: Mapping[str, Iterable[records.Record]], split: str, name: str, options: ReadOptions) -> RowList:
    if "train" not in splits:
        raise ValueError(f"{name} has the splits {sorted(splits)}, and none is called train")
    rows = _rows(splits[split if "test" in splits else "train"], options, name)
    return rows if "test" in splits else hold_out(rows, split, name, options.held_out)


def hold_out(rows: RowList, split: str, name: str, share: float = ReadOptions.held_out) -> RowList:
    """One split of rows that come without a test split. Prompts (at least one) with a hash in the lowest `share` are test.

    The choice depends on the prompts alone, not on a seed or on their order, and rows with one prompt stay together:
    nothing seen in training is tested on. If all rows have one prompt, or the share is 0, all are for training.
    Raises: ValueError when the test split of such rows is asked for; `name` is what the message calls them.
    """
    by_prompt = [_prompt_hash(rows[index]) for index in range(len(rows))]
    hashes = sorted(set(by_prompt))
    count = sum(value < share * 2**64 for value in hashes)
    held = set(hashes[: min(max(count, 1), len(hashes) - 1)]) if share else set[int]()
    if split == "test" and not held:
        why = "has one prompt only" if share else "is all for training (held_out=0)"
        raise ValueError(
            f"{name} {why}, so no test split can be held out; give a directory with "
            "train.jsonl and test.jsonl, or evaluate on no rows"
        )
    side = [rows[index] for index, value in enumerate(by_prompt) if (value in held) == (split == "test")]
    return RowList(side, rows.intake)


def _prompt_hash(row: Row) -> int:
    """A number in [0, 2**64) that depends on the prompt alone."""
    if row.document:  # a document has no prompt, and its text must not be seen in training
        prompt: Any = row.response
    elif isinstance(row.prompt, str):
        prompt = row.prompt
    else:
        prompt = [[turn["role"], turn["content"], *turn.get("tool_calls", ())] for turn in row.prompt]
    return int.from_bytes(hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest(), "big")


def _asset(name: str, candidates: Sequence[str]) -> Path:
    """The first of these paths that is there, under the folder of files that stay outside the project."""
    assets = os.environ.get(ASSETS_VARIABLE)
    remedy = f"set {ASSETS_VARIABLE} to the folder that holds data/{name}, or give the data as a path"
    if name == "s1k":
        remedy += ", or name a hub data set, simplescaling/s1K-1.1, to have it downloaded"
    if not assets:
        raise FileNotFoundError(f"{name} needs its files: {remedy}")
    paths = [Path(assets) / "data" / candidate for candidate in candidates]
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"no {', '.join(map(str, paths))}: {remedy}")
