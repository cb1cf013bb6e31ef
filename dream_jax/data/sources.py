"""Opens sources of rows by name or path, and divides data that has no test split."""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dream_jax import hub
from dream_jax.data import records
from dream_jax.data.chats import MESSAGE_LISTS
from dream_jax.data.fields import without_fields
from dream_jax.data.long_tasks import LONG_TASKS, LongTaskSource
from dream_jax.data.options import ReadOptions
from dream_jax.data.rows import Intake, Mixture, Row, RowList, RowSource, check_split
from dream_jax.data.schemas import Parser, RowKind, check_kind, kind_of, parse_gsm8k, parser_of
from dream_jax.data.shards import ByteMeter, folder_shards, is_pattern, matching_shards, shard_format
from dream_jax.data.streams import HubStream, stream_folder
from dream_jax.data.sudoku import SudokuSource
from dream_jax.paths import local_path

ASSETS_VARIABLE = "DREAM_JAX_ASSETS"
"""The environment variable with the path of a folder outside the project that holds data/gsm8k and data/s1k."""

SUDOKU_GIVENS = 6
"""Minimum number of shown cells. Puzzles with 4 or 5 would need a training that is too long for a demonstration."""

GeneratedSource = SudokuSource | LongTaskSource

SUPPORTED = (
    '"sudoku", "gsm8k", "s1k", "chain" or "route" (with -short or -long for other sizes), a .jsonl, .json or .parquet file '
    "(rows with messages, prompt + response, question + answer, input + output, text, or s1K's fields), a .txt file (one "
    "document), a directory with train and test files of these kinds, with shards of one kind or one saved by `datasets`, "
    'a pattern such as "corpus/*.jsonl.zst", or organisation/name on the Hugging Face hub'
)


def open_source(
    name_or_path: str | os.PathLike[str], split: str = "train", seed: int = 0, options: ReadOptions = ReadOptions()
) -> RowSource:
    """Returns the rows of one split, "train" or "test", of the data `name_or_path`, which is one of:

    "sudoku": generated puzzles with 6 to 12 givens. `seed` draws them; sources of files ignore `seed`.
    "chain", "route", and the same with "-short" or "-long": generated problems with long answers, see `long_tasks`, unless
    there is a path of that name.
    "gsm8k": the files $DREAM_JAX_ASSETS/data/gsm8k/{train,test}.jsonl.
    "s1k": the directory $DREAM_JAX_ASSETS/data/s1k, read as below, or s1k.jsonl, s1k.json or s1k.parquet beside it.
    A directory: its train or test files (.jsonl, .json, .parquet, or the shards of a hub repository), all shards in it if
    none is called train, or a data set that `datasets` saved there. A file: see `read_rows`. A pattern such as
    "corpus/*.jsonl.zst": all files that it matches, which must be of one format.
    organisation/name or organisation/name@revision, if no such path exists: a data set that is downloaded from the
    Hugging Face hub.
    A file, saved data set, shards or hub data set without a test split are divided by `hold_out`. Other names of splits,
    and the configuration, are in `options`.
    Raises: ValueError for an unknown name or split, or for a bad row unless options.skip_bad; FileNotFoundError for a
    missing file; ConnectionError if a hub data set is neither cached nor reachable.
    """
    found = find_split(name_or_path, split, seed, options)
    return found.read() if isinstance(found, DataSplit) else found


def find_split(
    name_or_path: str | os.PathLike[str], split: str = "train", seed: int = 0, options: ReadOptions = ReadOptions()
) -> "DataSplit | GeneratedSource":
    """Finds the data of `open_source` without reading their rows. Takes the same arguments and raises the same errors.

    The errors in the rows are raised when the rows are read. Generated problems have no rows to read.
    """
    check_split(split)
    name, path = str(name_or_path), local_path(name_or_path, "data")
    hub_id = None if path.exists() or is_pattern(name) or shard_format(path) is not None else hub.hub_id_of(name)
    if options.stream_rows is not None and (hub_id is None or name in ("sudoku", "gsm8k", "s1k")):
        raise ValueError(
            f"--stream-rows {options.stream_rows} streams a data set of the hub, organisation/name, but --data is {name}: "
            "leave it out"
        )
    if name in ("sudoku", "gsm8k") or (name in LONG_TASKS and not path.exists()):
        _check_no_choice(name, options)
    if name == "sudoku":
        return SudokuSource(split, seed=seed, min_givens=SUDOKU_GIVENS)
    if name in LONG_TASKS and not path.exists():
        return LONG_TASKS[name].source(split, seed=seed)
    if name == "gsm8k":
        return _lines(_asset("gsm8k", [f"gsm8k/{split}.jsonl"]), parse_gsm8k, split, options)
    if name == "s1k":
        return _open_path(_asset("s1k", ["s1k", *(f"s1k{suffix}" for suffix in records.SUFFIXES)]), split, options)
    if path.exists():
        return _open_path(path, split, options)
    if is_pattern(name):
        _check_no_choice(name, options)
        return _files(matching_shards(name), name, split, options, divided=True)
    if shard_format(path) is not None:
        raise FileNotFoundError(f"no file {path}; supported data: {SUPPORTED}")
    if hub_id is not None and options.stream_rows is not None:
        stream = HubStream(hub_id, options.config, options.stream_rows, stream_folder())
        return _streamed(stream, split, name, options)
    if hub_id is not None:
        return _one_split(records.hub_splits(hub_id, options.config), split, name, options)
    raise ValueError(
        f"data {name!r} is neither a known name nor an existing path. Supported: {SUPPORTED}{hub.why_not_asked(name)}"
    )


def open_mixture(
    names_or_paths: Sequence[str],
    weights: Sequence[float] | None = None,
    split: str = "train",
    seed: int = 0,
    options: ReadOptions = ReadOptions(),
) -> RowSource:
    """Opens several sources as a `Mixture`, or a single one as itself.

    The names of splits and the configuration in `options` are those of the first source.
    Raises: like `open_source` and `Mixture`; ValueError if no row for training has a field of `options.ignored_fields`.
    """
    found = find_splits(names_or_paths, split, seed, options)
    return mixed([part.read() if isinstance(part, DataSplit) else part for part in found], weights, split, options)


def find_splits(
    names_or_paths: Sequence[str], split: str, seed: int, options: ReadOptions
) -> "list[DataSplit | GeneratedSource]":
    """Finds the sources of a mixture without reading their rows; see `open_mixture` and `find_split`."""
    rest = dataclasses.replace(options, split=None, test_split=None, config=None, stream_rows=None)
    return [find_split(name, split, seed, rest if number else options) for number, name in enumerate(names_or_paths)]


def mixed(parts: Sequence[RowSource], weights: Sequence[float] | None, split: str, options: ReadOptions) -> RowSource:
    """Returns the sources as a `Mixture`, or a single one without weights as itself. Raises as `open_mixture`."""
    missing = sorted(set(options.ignored_fields) - {name for part in parts for name in part.intake.ignored})
    if missing and split == "train":
        raise ValueError(f"no row has the field(s) {missing} of --ignore-field; leave out what the data does not have")
    return parts[0] if len(parts) == 1 and not weights else Mixture(parts, weights)


def read_rows(path: Path, options: ReadOptions = ReadOptions()) -> RowList:
    """Returns all rows of a file, which must be of one kind, whatever their order.

    Raises: ValueError, with file and line, for a bad row unless options.skip_bad, or if no row is left;
    FileNotFoundError if the file is missing.
    """
    return _files([path], str(path), "train", options).read()


def parse_lines(path: Path, parser: Parser, options: ReadOptions = ReadOptions()) -> RowList:
    """Returns all rows of a file of JSON lines, read with `parser`. Raises like `read_json_lines` and the parser."""
    return _lines(path, parser, "train", options).read()


def _lines(path: Path, parser: Parser, split: str, options: ReadOptions) -> "DataSplit":
    return DataSplit(
        name=str(path),
        split=split,
        options=options,
        files=(path,),
        records=lambda on_bad: records.read_json_lines(path),
        parser=parser,
    )


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """One split of a data set whose rows are not read yet.

    name: the name of the data, for error messages.
    split: the split that was asked for, "train" or "test".
    options: the options for reading.
    files: the files that the records are read from. The records depend on nothing but their bytes.
    records: begins to read all records, as often as it is called; its argument is that of `read_records`.
    parser: reads each record; None: the parser of the kind that all records have.
    divided: whether the records are those of both splits, of which `hold_out` takes one.
    meter: counts the bytes of the files that have been read.
    """

    name: str
    split: str
    options: ReadOptions
    files: tuple[Path, ...]
    records: Callable[[records.OnBad], Iterator[records.Record]]
    parser: Parser | None = None
    divided: bool = False
    meter: ByteMeter = field(default_factory=ByteMeter, compare=False)

    def stream(self) -> "RowStream":
        """Returns the rows of all records, of both splits if `divided`, one after the other."""
        return RowStream(self)

    def read(self) -> RowList:
        """Returns the rows of the split in memory. Raises ValueError for a bad row, or if no row is left."""
        stream = self.stream()
        rows = RowList(list(stream), stream.intake)
        return hold_out(rows, self.split, self.name, self.options.held_out) if self.divided else rows


class RowStream:
    """Iterates over the rows of a `DataSplit`, once, and counts what is left out and what is not read.

    Iterating raises ValueError, with file and line, for a bad row unless skip_bad, and at the end if there was no row.
    """

    def __init__(self, data: DataSplit):
        self._data = data
        self._bad = list[ValueError]()
        self._left_out, self._unread, self._ignored = Counter[str](), Counter[str](), Counter[str]()
        self._ends_early = 0

    @property
    def intake(self) -> Intake:
        """The rows and fields that were left out so far; complete after the last row."""
        return Intake(
            bad=tuple(map(str, self._bad)),
            filtered=dict(self._left_out),
            unread=dict(self._unread),
            ignored=dict(self._ignored),
            ends_early=self._ends_early,
        )

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows, which must be of one kind."""
        options, parse, on_bad = self._data.options, self._data.parser, None
        if options.skip_bad:
            on_bad = self._bad.append
            if parse is None:  # Which rows are bad must not depend on the row that comes first.
                kinds = Counter[RowKind](filter(None, (kind_of(record) for record in self._records(on_bad))))
                parse = _OneKind(options, kinds.most_common(1)[0][0] if kinds else None)
                self._ignored.clear()  # The records are read once more.
                on_bad = _pass_over
        parse, count = parse or _OneKind(options), 0
        for where, record in self._found(on_bad):
            try:
                row = parse(record, where)
            except ValueError as complaint:
                if not options.skip_bad:
                    raise
                self._bad.append(complaint)
                continue
            if isinstance(row, Row):
                self._unread.update(row.unread)
                self._ends_early += row.ends_early
                count += 1
                yield row
            else:
                self._left_out[row] += 1
        if not count:
            first = f"; the first bad row: {self._bad[0]}" if self._bad else ""
            reasons = f" ({', '.join(self._left_out)})" if self._left_out else ""
            raise ValueError(
                f"{self._data.name}: no row is left; {len(self._bad)} rows are bad, {self._left_out.total()} are left out "
                f"by a filter{reasons}{first}"
            )

    def _found(self, on_bad: records.OnBad) -> Iterator[records.Record]:
        """Yields the records without the fields that are ignored, which are counted."""
        for where, record in self._data.records(on_bad):
            kept, had = without_fields(record, self._data.options.ignored_fields, MESSAGE_LISTS)
            self._ignored.update(had)
            yield where, kept

    def _records(self, on_bad: records.OnBad) -> Iterator[Mapping[str, Any]]:
        return (record for _, record in self._found(on_bad))


def _pass_over(complaint: ValueError) -> None:
    """Does nothing: the record was counted when it was first read."""


class _OneKind:
    """Parses records of one kind, and refuses a record of another kind.

    Args:
      options: the options for reading.
      kind: the kind; None: that of the first record.
    """

    def __init__(self, options: ReadOptions, kind: RowKind | None = None):
        self._options, self._kind, self._whose = options, kind, "most rows are"

    def __call__(self, record: Mapping[str, Any], where: str) -> Row | str:
        if self._kind is None:
            self._kind, self._whose = check_kind(record, where), f"{where} is"
        kind, found = self._kind, kind_of(record)
        if found not in (kind, None):
            raise ValueError(
                f"{where}: the fields {sorted(record)} make a {found} row, but {self._whose} of the kind {kind}; all "
                "rows of a file must be of one kind (docs/data.md), so give them as two files (--data and --mix)"
            )
        return parser_of(kind, self._options)(record, where)


def _files(paths: Sequence[Path], name: str, split: str, options: ReadOptions, *, divided: bool = False) -> DataSplit:
    """Returns the rows of several files with the same schema, in order."""
    meter = ByteMeter()
    return DataSplit(
        name=name,
        split=split,
        options=options,
        files=tuple(paths),
        records=lambda on_bad: chain.from_iterable(records.read_records(path, on_bad, meter) for path in paths),
        meter=meter,
        divided=divided,
    )


def _check_no_choice(name: str, options: ReadOptions) -> None:
    """Raises ValueError if a split or a configuration is chosen of data that has none."""
    given = {"--data-split": options.split, "--eval-split": options.test_split, "--data-config": options.config}
    for flag, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} has nothing to choose from with {flag} {value}, which is for directories, saved data sets and hub "
                "data sets; leave it out"
            )


def _open_path(path: Path, split: str, options: ReadOptions) -> DataSplit:
    """Finds the rows of one split of a file, of a directory with data files, or of a saved data set."""
    if not path.is_dir():
        _check_no_choice(str(path), options)
        return _files([path], str(path), split, options, divided=True)
    if options.config is not None:
        if not (path / options.config).is_dir():
            folders = sorted(one.name for one in path.iterdir() if one.is_dir())
            raise ValueError(f"{path} has no folder {options.config!r} for --data-config; its folders are {folders}")
        path = path / options.config
    if records.is_saved_dataset(path):
        return _one_split(records.saved_splits(path), split, str(path), options)
    train_name, test_name = _split_names(options)
    train = records.split_files(path, train_name)
    test = records.split_files(path, test_name) if test_name else []
    # If train.jsonl or train.json exists, a missing test file is an error. Shards often have no test split.
    alone = not test and (
        test_name is None
        or (not options.test_split and any(one.suffix == ".parquet" or one.stem != train_name for one in train))
    )
    files = test if split == "test" and not alone else train
    if not (train or test or options.split) and len(shards := folder_shards(path)) > 1:
        files, alone = shards, True  # of a single file the name is asked for, because its folder may be the wrong one
    if not files:
        missing = train_name if split == "train" or alone else test_name
        raise FileNotFoundError(
            f"no {missing}.jsonl, {missing}.json or {missing}.parquet in {path}; a data directory needs train.jsonl and "
            "test.jsonl, or other names that --data-split and --eval-split give; or give the path of one file"
        )
    return _files(files, str(path), split, options, divided=alone)


def _split_names(options: ReadOptions) -> tuple[str, str | None]:
    """Returns the names of the training split and of the test split; None if the test split is always held out."""
    return options.split or "train", options.test_split or (None if options.split else "test")


def _chosen(names: Collection[str], split: str, name: str, options: ReadOptions) -> tuple[str, bool]:
    """Returns the name of the split to read among `names`, and whether the data has a test split of its own."""
    train, test = _split_names(options)
    for wanted in (train, options.test_split):
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"{name} has the splits {sorted(names)}, and none is called {wanted}; choose one to train on with "
                "--data-split, and one for evaluation with --eval-split"
            )
    separate = test is not None and test in names
    return test if test is not None and separate and split == "test" else train, separate


def _one_split(splits: Mapping[str, records.TableRecords], split: str, name: str, options: ReadOptions) -> DataSplit:
    """Finds the rows of one split of a data set; without a test split, `hold_out` divides the train split."""
    found, separate = _chosen(splits.keys(), split, name, options)
    chosen = splits[found]
    return DataSplit(
        name=name,
        split=split,
        options=options,
        files=chosen.files,
        records=lambda on_bad: iter(chosen),
        divided=not separate,
    )


def _streamed(stream: HubStream, split: str, name: str, options: ReadOptions) -> DataSplit:
    """Finds the first rows of one split of a hub data set, which are streamed into a file if they are not in one yet."""
    found, separate = _chosen(stream.names(), split, name, options)
    return _files([stream.file(found)], name, split, options, divided=not separate)


def hold_out(rows: RowList, split: str, name: str, share: float = ReadOptions.held_out) -> RowList:
    """Returns one split, "train" or "test", of rows that have no test split.

    About `share` of the different prompts, but at least one, are the test split: those with the lowest hashes. The
    choice depends only on the prompts, not on a seed or their order. Rows with the same prompt are in the same split.
    If all rows have the same prompt, or the share is 0, all rows are for training.
    Raises: ValueError if "test" is requested then; the message names the data `name`.
    """
    hashes = np.array([prompt_hash(rows[index]) for index in range(len(rows))], np.uint64)
    chosen = np.flatnonzero(in_split(hashes, split, name, share))
    return RowList([rows[index] for index in chosen.tolist()], rows.intake)


def in_split(hashes: np.ndarray, split: str, name: str, share: float) -> np.ndarray:
    """Returns bool [n]: which rows, whose prompts have these hashes (uint64 [n]), are in a split; see `hold_out`."""
    different = np.unique(hashes)
    count = int(np.searchsorted(different, np.uint64(math.ceil(share * 2**64))))
    number = min(max(count, 1), len(different) - 1) if share else 0
    if split == "test" and not number:
        why = "has only one prompt" if share else "is used for training only (held_out=0)"
        raise ValueError(
            f"{name} {why}, so no test split can be held out; give a directory with "
            "train.jsonl and test.jsonl, or use no test rows (--eval-rows 0)"
        )
    held = hashes <= different[number - 1] if number else np.zeros(len(hashes), np.bool_)
    return held if split == "test" else ~held


def prompt_hash(row: Row) -> int:
    """Returns an integer in [0, 2**64) that depends only on the prompt, or on the text of a document."""
    if row.document:  # A document has no prompt; its text must not be in both splits.
        prompt: Any = row.response
    elif isinstance(row.prompt, str):
        prompt = row.prompt
    else:
        prompt = [[turn["role"], turn["content"], *turn.get("tool_calls", ())] for turn in row.prompt]
        if row.instruction:  # The division must not depend on the answer format.
            asked = next(turn for turn in prompt if turn[0] == "user")
            asked[1] = asked[1].removeprefix(f"{row.instruction}\n\n")
    return int.from_bytes(hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest(), "big")


def _asset(name: str, candidates: Sequence[str]) -> Path:
    """Returns the first of these paths in $DREAM_JAX_ASSETS/data that exists. Raises FileNotFoundError if none does."""
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
