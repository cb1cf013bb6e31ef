"""Records: objects with named fields, from JSON lines, JSON, parquet, a directory that `datasets` saved, or the hub.

Every record comes with where it was found, "FILE:LINE" or "FILE:row N". `datasets` and pyarrow are imported only when
they are needed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = tuple[str, dict[str, Any]]
"""Where it was found, and its fields."""

OnBad = Callable[[ValueError], None] | None
"""Is given the complaint about a record that cannot be read, and reading continues; None raises the complaint."""

SUFFIXES = (".jsonl", ".json", ".parquet")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves in a directory


def read_records(path: Path, on_bad: OnBad = None) -> Iterator[Record]:
    """The records of one file, in order, in the format that its name ends in; .json may hold a list or lines.

    Fields that hold null are left out: a parquet file has every column in every row.
    Raises: FileNotFoundError; ValueError naming file and line. A file that breaks off always raises, since what follows
    the break cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".json" and path.read_bytes()[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_json_list(path, on_bad)
    return ((where, _without_nulls(found)) for where, found in read_json_lines(path, on_bad))


def read_json_lines(path: Path, on_bad: OnBad = None) -> Iterator[Record]:
    """The object of every line of a UTF-8 file that is not blank.

    Raises: FileNotFoundError; ValueError naming file and line for bytes that are not UTF-8, for a line that is not JSON
    or no object, and for a file without any line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; it should hold one JSON object a line")
    empty = True
    with path.open("rb") as file:
        # As bytes, so that lines end at \n only and a complaint about the encoding knows its line.
        for number, raw in enumerate(file, start=1):
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


def text_field(found: Mapping[str, Any], name: str, where: str) -> str:
    """The string `found[name]`.

    Raises: ValueError, beginning with `where`, if it is missing, no string, blank, or not encodable.
    """
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; it has {sorted(found)}")
    value = found[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, not {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} has half of a surrogate pair ({error}), which is no text; repair the row"
        ) from error
    return value


def split_files(directory: Path, split: str) -> list[Path]:
    """The data files of a split in a directory: SPLIT.jsonl, .json or .parquet, or its parquet shards; [] for none.

    They may also be in its folder `data`, as in a copy of a hub repository. Raises ValueError for two formats.
    """
    for folder in (directory, directory / "data"):
        whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        found = whole + shards
        if len(whole) > 1 or (whole and shards):
            raise ValueError(
                f"{folder} has {', '.join(path.name for path in found)}: which is the {split} split? "
                "Give one of them as the file"
            )
        if found:
            return found
    return []


def is_saved_dataset(directory: Path) -> bool:
    """Whether `datasets` saved something there with `save_to_disk`."""
    return any((directory / name).is_file() for name in _SAVED)


def saved_splits(directory: Path) -> dict[str, Iterable[Record]]:
    """Split -> records of a directory that `datasets` saved; one without splits is all "train".

    Raises: ValueError for files that cannot be read.
    """
    import datasets

    try:
        return _by_split(datasets.load_from_disk(str(directory)), str(directory))
    except Exception as error:  # the library lets through what pyarrow and json raise
        raise ValueError(f"{directory} cannot be read as a saved dataset: {_first_line(error)}") from error


def hub_splits(hub_id: str) -> dict[str, Iterable[Record]]:
    """Split -> records of a data set on the Hugging Face hub, downloaded into its cache.

    Raises: ConnectionError when it is neither cached nor reachable, or is not there.
    """
    import datasets

    try:
        return _by_split(datasets.load_dataset(hub_id), hub_id)
    except Exception as error:  # the library has no one class for what the hub, the network and the files do
        raise ConnectionError(
            f"there is no local file or directory {hub_id}, and no data set of this name could be had from the "
            f"Hugging Face hub: {_first_line(error)}; download it elsewhere and give the path"
        ) from error


def _by_split(found: Any, name: str) -> dict[str, Iterable[Record]]:
    splits = found if isinstance(found, Mapping) else {"train": found}
    return {str(split): _numbered(rows, f"{name}, {split}") for split, rows in splits.items()}


def _numbered(rows: Iterable[Mapping[str, Any]], name: str, start: int = 1) -> Iterator[Record]:
    return ((f"{name}:row {number}", _without_nulls(row)) for number, row in enumerate(rows, start=start))


def _without_nulls(found: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in found.items() if value is not None}


def _parse_line(raw: bytes, where: str, *, first: bool) -> dict[str, Any]:
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error}); save the file as UTF-8 text, one JSON object a line"
        ) from error
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a {type(found).__name__}, but each line must be one JSON object")
    return found


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        start = 1
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from _numbered(batch.to_pylist(), str(path), start)
                start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({_first_line(error)}); get the file again") from error
    if start == 1:
        raise ValueError(f"{path}: no rows")


def _read_json_list(path: Path, on_bad: OnBad) -> Iterator[Record]:
    """Entry by entry rather than as a whole, so that a complaint knows its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save the file as UTF-8 text") from error
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

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
            found, position = decoder.raw_decode(text, position)
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
            raise ValueError(f"{where}: neither ',' nor ']' after the entry; the file breaks off or is no list")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
