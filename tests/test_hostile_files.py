"""The kinds of broken files and rows that people have: the command refuses each with place and reason, and leaves nothing.

The readers' own tests are in test_data.py and test_s1k.py; this is the list of what a user may count on.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dream_jax.trainer import TrainSettings, train

GOOD = {"prompt": "Name a colour.", "response": "Red."}
S1K = {"question": "q", "thinking_trajectories": ["t"], "attempt": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def lines(*rows: object, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    """A file with one of these a line; bytes as they are, the rest as JSON."""

    def write(folder: Path) -> Path:
        raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / name).write_bytes(b"".join(row + b"\n" for row in raw))
        return folder / name

    return write


def after_good(row: object) -> Callable[[Path], Path]:
    return lines(GOOD, row)


def content(data: bytes, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def parquet(rows: int, cut: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]).slice(0, rows), path)
        path.write_bytes(path.read_bytes()[: -cut or None])
        return path

    return write


def directory(*names: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "data").mkdir()
        for name in names:
            lines(GOOD, name=name)(folder / "data")
        return folder / "data"

    return write


AT_2 = r"rows\.jsonl:2: "
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    # files
    "no such file": (lambda folder: folder / "gone.jsonl", r"no file .*gone\.jsonl; supported data: "),
    "no such name": (lambda folder: Path("sudokus"), "neither a known name nor an existing path. Supported: "),
    "empty file": (content(b"", "rows.jsonl"), r"rows\.jsonl: no rows; it should hold one JSON object a line"),
    "only blank lines": (content(b"\n \n\xef\xbb\xbf\n", "rows.jsonl"), r"rows\.jsonl:3: not JSON"),
    "compressed": (content(gzip.compress(json.dumps(GOOD).encode()), "rows.jsonl"), r"rows\.jsonl:1: not UTF-8"),
    "UTF-16": (
        content(json.dumps(GOOD).encode("utf-16"), "rows.jsonl"),
        r"rows\.jsonl:1: not UTF-8 .* save the file as UTF-8",
    ),
    "CSV": (
        content(b"prompt,response\nq,a\n", "rows.csv"),
        r"rows\.csv:1: not JSON .* each line must be one JSON object",
    ),
    "parquet cut short": (parquet(1, 10), r"rows\.parquet: cannot be read as parquet .*; get the file again"),
    "parquet without rows": (parquet(0, 0), r"rows\.parquet: no rows"),
    "text called parquet": (content(b"PAR1 not", "rows.parquet"), r"rows\.parquet: cannot be read as parquet"),
    "JSON list cut short": (content(json.dumps([GOOD, GOOD])[:-20].encode(), "rows.json"), r"rows\.json:1: not JSON"),
    "JSON list without a comma": (
        content(b"[%b\n%b]" % ((json.dumps(GOOD).encode(),) * 2), "rows.json"),
        r"rows\.json:1: neither ',' nor '\]'",
    ),
    "empty JSON list": (content(b"[]", "rows.json"), r"rows\.json: no rows; the list is empty"),
    "directory without a train file": (
        directory("all.jsonl"),
        r"no train\.jsonl, train\.json or train\.parquet in .*data; ",
    ),
    "directory without a test file": (
        directory("train.jsonl"),
        r"no test\.jsonl, .* in .*data; .* or give the path of one file",
    ),
    "two train files": (
        directory("train.jsonl", "train.json"),
        "only one can be the train split; give the path of one of them",
    ),
    "broken saved data set": (
        lambda folder: content(b"{}", "dataset_info.json")(folder).parent,
        "cannot be read as a saved dataset",
    ),
    # lines
    "last line cut short": (after_good(json.dumps(GOOD)[:-9].encode()), AT_2 + "not JSON"),
    "Latin-1": (after_good(b'{"prompt": "caf\xe9", "response": "a"}'), AT_2 + "not UTF-8"),
    "zero bytes": (after_good(b"\x00" * 64), AT_2 + "not JSON"),
    "Python instead of JSON": (after_good(b"{'prompt': 'q', 'response': 'a'}"), AT_2 + "not JSON"),
    "nested beyond reason": (after_good(b"[" * 100_000), AT_2 + "not JSON"),
    "a list, not an object": (after_good([GOOD]), AT_2 + "a list, but each line must be one JSON object"),
    # rows
    "unknown fields": (lines({"story": "x"}), r"rows\.jsonl:1: fields \['story'\] match no known schema; a row needs "),
    "another schema half-way": (
        after_good(S1K),
        AT_2 + r".* make a reasoning row, but .*rows\.jsonl:1 is of the kind chat",
    ),
    "field missing": (
        after_good({"prompt": "q"}),
        AT_2 + r"(no field 'response'|a chat record needs .* fields \['prompt'\])",
    ),
    "field null": (
        after_good(GOOD | {"response": None}),
        AT_2 + r"(no field 'response'|a chat record needs .* fields \['prompt'\])",
    ),
    "field a number": (after_good(GOOD | {"response": 3}), AT_2 + "'response' must be a string, not int 3"),
    "empty answer": (after_good(GOOD | {"response": " \n"}), AT_2 + "'response' is empty"),
    "empty prompt": (after_good(GOOD | {"prompt": ""}), AT_2 + "'prompt' is empty"),
    "half a surrogate pair": (
        after_good(b'{"prompt": "q", "response": "\\ud800"}'),
        AT_2 + "'response' has half of a surr",
    ),
    "chat that the user ends": (lines(CHAT, {"messages": CHAT["messages"][:1]}), AT_2 + ".*last message is the user's"),
    "unknown role": (
        lines(CHAT, {"messages": [{"role": "critic", "content": "x"}]}),
        AT_2 + ".*role 'critic' must be one of",
    ),
    "trace that is no list": (
        lines(S1K, S1K | {"thinking_trajectories": "t"}),
        AT_2 + ".*must be a list with at least one",
    ),
    "every row too long": (
        lines(*({"prompt": f"{n}" * 60, "response": "a"} for n in range(9))),
        "no row fits into max_length=32",
    ),
    "one prompt, nothing to hold out": (lines(GOOD, GOOD), r"rows\.jsonl has only one prompt, so no test split"),
}


@pytest.mark.parametrize(("write", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_input_is_refused_with_its_place(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    assert len(HOSTILE) >= 20
    (tmp_path / "given").mkdir()
    data, out = write(tmp_path / "given"), tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message):
        train(TrainSettings.flat(mesh="1x1", data=str(data), max_length=32, batch_size=2, steps=1, out=out))
    assert not out.exists()
