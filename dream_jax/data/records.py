"""Reads records (objects with named fields) from JSON lines, JSON, parquet, text, a saved `datasets` directory, or the hub.

Every record comes with its location, "FILE:LINE" or "FILE:row N". `datasets` and pyarrow are imported only when needed.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dream_jax import hub
from dream_jax.data.shards import ByteMeter, check_shards, folder_shards, read_lines, read_text, shard_format
from dream_jax.hub import HubId
from dream_jax.side_files import DEEPEST, object_of

Record = tuple[str, dict[str, Any]]
"""A pair: the location where the record was found, and its fields."""

OnBad = Callable[[ValueError], None] | None
"""Called with the ValueError of a record that cannot be read; reading then continues. None: the error is raised."""

SUFFIXES = (".jsonl", ".json", ".parquet")

_BATCH = 256  # rows of a file with columns that are converted together

_SAVED = ("dataset_info.json", "dataset_dict.json")  # `save_to_disk` writes one of these into a directory


def read_records(path: Path, on_bad: OnBad = None, meter: ByteMeter | None = None) -> Iterator[Record]:
    """Returns the records of one file, in order. The end of its name decides the format; .json is a list or JSON lines.

    A file .txt is one record, whose field "text" has the whole text. JSON lines and texts may be compressed (.gz, .zst).

    Fields with the value null are left out. A file with columns has every field in every row, and every object in it has
    the fields of all others, so there nulls are left out of objects at every depth, but not out of lists, and not out of
    JSON text or values of the type JSON. In JSON files nulls inside a field stay.
    Raises: FileNotFoundError if the file is missing; ValueError, with file and line, for a record that cannot be read
    if on_bad is None, and always for a truncated list or parquet file, because its other records cannot be found.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found_format = shard_format(path)
    if found_format == "parquet":
        return _read_parquet(path, meter)
    if found_format == "text":
        return _read_text_file(path, on_bad, meter)
    if path.suffix == ".json":
        with path.open("rb") as file:
            begin = file.read(4096)
        if begin.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return _read_json_list(path, on_bad)
    return ((where, _without_nulls(found)) for where, found in read_json_lines(path, on_bad, meter))


def read_json_lines(path: Path, on_bad: OnBad = None, meter: ByteMeter | None = None) -> Iterator[Record]:
    """Yields the JSON object of every line of a UTF-8 file, which may be compressed; blank lines are skipped.

    Raises: FileNotFoundError if the file is missing; ValueError, with file and line, for bytes that are not UTF-8, a
    line that is not a JSON object, or a file without any line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; it should hold one JSON object a line")
    empty = True
    # The file is read as bytes, so that lines end only at \n and an encoding error can name its line.
    for number, raw in read_lines(path, meter):
        if not raw.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None):
            continue
        empty, where = False, f"{path}:{number}"
        try:
            found = _parse_line(raw, where, first=number == 1)
        except ValueError as complaint:
            if on_bad is None:
                raise
            on_bad(complaint)
        else:
            yield where, found
    if empty:
        raise ValueError(f"{path}: no rows; it should hold one JSON object a line")


def parse_json(text: str) -> Any:
    """Returns what a text of JSON stands for.

    Raises: ValueError for a text that is not JSON, is nested too deeply, or has an object with a name twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from error
    _check_depth(found, text)
    return found


def _check_depth(found: object, text: str) -> None:
    """Raises ValueError if more than `DEEPEST` lists and objects lie inside one another in a value of JSON.

    A text with fewer brackets has fewer of them, and most texts need no other check.
    """
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    level = [found]
    for _ in range(DEEPEST):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = list(chain.from_iterable(inside))
    if any(isinstance(one, dict | list) for one in level):
        raise ValueError(f"nested too deeply: more than {DEEPEST} lists or objects inside one another")


def text_field(found: Mapping[str, Any], name: str, where: str) -> str:
    """Returns the string `found[name]` of a record.

    Raises: ValueError, beginning with `where`, if it is missing, not a string, blank, or not encodable as UTF-8.
    """
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; the record has the fields {sorted(found)}")
    value = found[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, not {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    try:
        if not value.isascii():
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} has half of a surrogate pair ({error}), which is not text; repair the row"
        ) from error
    return value


def split_files(directory: Path, split: str) -> list[Path]:
    """Returns the data files of a split: SPLIT.jsonl, SPLIT.json, SPLIT.parquet or the shards SPLIT-*.parquet; or [].

    They are in the directory or in its folder `data`, as in a copy of a hub repository. Without such files they are
    SPLIT.jsonl.zst, SPLIT.txt and so on, shards SPLIT-* of one of these formats, or all shards in a folder SPLIT.
    Raises: ValueError if one folder has the split in two formats.
    """
    for folder in (directory, directory / "data"):
        whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        found = whole + shards
        if not found:
            named = sorted((*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*")))
            found = check_shards([path for path in named if path.is_file() and shard_format(path)], str(folder))
            whole = [path for path in found if path.name.startswith(f"{split}.")]
            shards = found[len(whole) :]
        if len(whole) > 1 or (whole and shards):
            raise ValueError(
                f"{folder} has {', '.join(path.name for path in found)}, but only one can be the {split} split; "
                "give the path of one of them"
            )
        if not found and (folder / split).is_dir():
            found = folder_shards(folder / split)
        if found:
            return found
    return []


def is_saved_dataset(directory: Path) -> bool:
    """Returns whether the directory was written by `save_to_disk` of `datasets`."""
    return any((directory / name).is_file() for name in _SAVED)


def saved_splits(directory: Path) -> "dict[str, TableRecords]":
    """Returns split -> records of a directory that `datasets` saved. Without splits, all records are in "train".

    Raises: ValueError for files that cannot be read.
    """
    import datasets

    try:
        return _by_split(datasets.load_from_disk(str(directory)), str(directory))
    except Exception as error:  # The library also raises the exceptions of pyarrow and json.
        raise ValueError(f"{directory} cannot be read as a saved dataset: {_first_line(error)}") from error


def hub_splits(hub_id: HubId, config: str | None = None) -> "dict[str, TableRecords]":
    """Returns split -> records of a data set on the Hugging Face hub, which is downloaded into the cache of the hub.

    config: the name of its configuration; None: it has only one.
    Raises: ConnectionError if it does not exist, or is neither cached nor reachable; ValueError if it has several
    configurations and none is chosen, or not the one that is chosen.
    """
    import datasets

    hub.ask(hub_id, "dataset")
    try:
        return _by_split(datasets.load_dataset(hub_id.name, config, revision=hub_id.revision), str(hub_id))
    except Exception as error:  # The library has no common exception class for errors of hub, network and files.
        if isinstance(error, ValueError) and "config" in str(error).casefold():
            raise ValueError(
                f"{hub_id}: {' '.join(str(error).split()):.400}; choose a configuration with --data-config"
            ) from error
        raise ConnectionError(
            f"there is no local file or directory {hub_id}, and no data set of this name could be loaded from the "
            f"Hugging Face hub: {_first_line(error)}; download it elsewhere and give the path"
        ) from error


def _by_split(found: Any, name: str) -> "dict[str, TableRecords]":
    """Returns split -> records of a data set or a dict of data sets; a single data set is the split "train"."""
    splits = found if isinstance(found, Mapping) else {"train": found}
    return {str(split): TableRecords(rows, f"{name}, {split}") for split, rows in splits.items()}


class TableRecords:
    """The records of a data set of `datasets`, which may be read several times.

    The data set is read as Arrow tables, which tell padding from values.
    """

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name

    @property
    def files(self) -> tuple[Path, ...]:
        """The Arrow files that the records are read from."""
        return tuple(Path(one["filename"]) for one in self._rows.cache_files)

    def __iter__(self) -> Iterator[Record]:
        """Yields the records in order. Raises ValueError if a file cannot be read."""
        import pyarrow

        start = 1
        try:
            for table in self._rows.with_format("arrow").iter(batch_size=_BATCH):
                yield from _table_records(table, self._name, start)
                start += table.num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self._name}: cannot be read ({_first_line(error)}); get the data again") from error


def _table_records(table: Any, name: str, start: int) -> Iterator[Record]:
    """Yields the rows of an Arrow table as records with the locations "NAME:row N", from N = start on."""
    columns = [(field.name, field.type) for field in table.schema]
    twice = [field for field, count in Counter(field for field, _ in columns).items() if count > 1]
    if twice:
        raise ValueError(f"{name}: the columns {twice} occur twice; rename one of each")
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: a text after row {start - 1} is not UTF-8 ({error}); save the texts as UTF-8"
        ) from error
    except (OverflowError, ValueError) as error:  # for example of a date that Python cannot represent
        raise ValueError(
            f"{name}: a value after row {start - 1} cannot be read ({error}); remove its column, or save it as text"
        ) from error
    for number, row in enumerate(rows, start=start):
        where = f"{name}:row {number}"
        try:
            found = {field: _without_padding(row[field], kind) for field, kind in columns if row[field] is not None}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield where, found


def _without_padding(value: Any, kind: Any) -> Any:
    """Returns a value of the Arrow type `kind` without the nulls with which Arrow fills up objects."""
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        try:
            return parse_json(value)
        except ValueError as error:
            raise ValueError(f"not JSON ({error}): {value!r:.60}") from error
    if pyarrow.types.is_struct(kind):
        return {
            field.name: _without_padding(value[field.name], field.type)
            for field in kind
            if value[field.name] is not None
        }
    if pyarrow.types.is_map(kind):  # Every entry of a map is its own; nothing is filled up.
        return object_of([(name, _without_padding(inside, kind.item_type)) for name, inside in value])
    if isinstance(value, list):
        return [_without_padding(inside, kind.value_type) for inside in value]
    return value


def _without_nulls(found: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in found.items() if value is not None}


def _parse_line(raw: bytes, where: str, *, first: bool) -> dict[str, Any]:
    """Returns the JSON object of one line; only the first line of a file may begin with a byte order mark."""
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error}); save the file as UTF-8 text, one JSON object a line"
        ) from error
    try:
        found = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a {type(found).__name__}, but each line must be one JSON object")
    return found


def _read_parquet(path: Path, meter: ByteMeter | None = None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        start = 1
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from _table_records(batch, str(path), start)
                start += batch.num_rows
                if meter is not None:
                    meter.at(path.stat().st_size * (start - 1) / file.metadata.num_rows)
        if meter is not None:
            meter.finish(path.stat().st_size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({_first_line(error)}); get the file again") from error
    if start == 1:
        raise ValueError(f"{path}: no rows; the parquet file is empty")


def _read_text_file(path: Path, on_bad: OnBad, meter: ByteMeter | None = None) -> Iterator[Record]:
    """Yields one record with the whole text of a file."""
    try:
        text = read_text(path, meter)
        if not text.strip():
            raise ValueError(f"{path}: no text; a .txt file should hold one document")
    except ValueError as complaint:
        if on_bad is None:
            raise
        on_bad(complaint)
    else:
        yield f"{path}:1", {"text": text}


def _read_json_list(path: Path, on_bad: OnBad) -> Iterator[Record]:
    """Reads a JSON list entry by entry instead of at once, so that an error can name its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save the file as UTF-8 text") from error
    decoder, space = json.JSONDecoder(object_pairs_hook=object_of), re.compile(r"\s*")

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    position, line, counted, rows = skip(skip(0) + 1), 1, 0, 0
    while text[position : position + 1] != "]" or rows == 0:
        if text[position : position + 1] == "]":
            raise ValueError(f"{path}: no rows; the list is empty")
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            found, after = decoder.raw_decode(text, position)
            _check_depth(found, text[position:after])
            position = after
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); the file must be one list of objects") from error
        rows += 1
        if isinstance(found, dict):
            yield where, _without_nulls(found)
        else:
            complaint = ValueError(f"{where}: a {type(found).__name__}, but each entry must be one JSON object")
            if on_bad is None:
                raise complaint
            on_bad(complaint)
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{where}: neither ',' nor ']' after the entry; the file is truncated or is not a list")
    if (end := skip(position + 1)) < len(text):
        line += text.count("\n", counted, end)
        raise ValueError(
            f"{path}:{line}: after the end of the list comes {text[end : end + 40]!r}; the file must be one list, or have "
            "one JSON object a line"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
