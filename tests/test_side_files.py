"""Side files are read within bounds, and each error names the file, the place and the remedy."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from dream_jax import files, side_files

DEEP = 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', r"x\.json is not valid JSON in UTF-8 \(.*line 1 column 9.*\); save it"),
        (b'{"a":\n\xff}', "not valid JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "not valid JSON in UTF-8"),
        (b"\0" * 64, "not valid JSON in UTF-8"),
        (b"[" * DEEP, "more than 100 lists or objects inside one another; save it"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "more than 100 lists or objects inside one another"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "more than 100 lists or objects inside one another"),
        (b'{"b": {"a": 1, "a": 2}}', "the name 'a' occurs twice in one object"),
        (b'{"s": "NaN \\" Infinity",\n\n"a": NaN}', "NaN is not a number of JSON: line 3"),
        (b'{"a": -Infinity}', "-Infinity is not a number of JSON: line 1"),
        (b'{"b": [1, 1e999]}', "1 is inf, but must be a finite number"),
        (b'{"size": ' + b"9" * 400 + b"}", "size is an integer of 1329 bits: too large"),
        (b'{"size": ' + b"9" * 5000 + b"}", "not valid JSON in UTF-8"),
        (b"[]", r"x\.json holds a list, not an object; save it"),
        (b'"text"', "holds a str, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_json_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        side_files.read_json(path, "save it again")
    assert str(raised.value).startswith(str(path)) and str(raised.value).endswith("; save it again")
    assert "\n" not in str(raised.value)


def test_json_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"": [[1, -2.5e300, 10**30, None, True]], "a": "NaN \ud83d \ue000"}
    for _ in range(side_files.DEEPEST - 3):
        value = {"deeper": value}
    path.write_text(json.dumps(value))
    assert side_files.read_json(path) == value
    path.write_text(" [1] ")
    assert side_files.read_json_value(path) == [1]
    assert str(side_files.parse_json(b"[NaN, 1e999]", "row", nan=True)) == "[nan, inf]"


@pytest.mark.timeout(20)
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        side_files.read_json(tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    for path in (tmp_path, tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="is not a regular file; save it"):
            side_files.read_json(path, "save it again")
    (tmp_path / "x.json").write_text('{"a": "' + "x" * 100 + '"}')
    monkeypatch.setattr(side_files, "LARGEST", 50)
    with pytest.raises(ValueError, match=r"x\.json has more than 50 bytes"):
        side_files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * DEEP + b"]" * DEEP, "more than 100 lists or objects inside one another"),
        (b"a = " + b"[" * 200 + b"]" * 200, "more than 100 lists or objects inside one another"),
        (b"a = 1\nb = 2 3", r"not TOML \(.*line 2.*\); save it"),
        (b"a = 1\na = 2", "not TOML"),
        (b"a = \xff", "not TOML"),
        (b"a = inf", "a is inf, but must be a finite number"),
        (b"a = " + b"9" * 400, "a is an integer of 1329 bits"),
    ],
)
def test_toml_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        side_files.read_toml(tmp_path / "x.toml", "save it again")
    assert "x.toml" in str(raised.value)


def test_csv_is_read_without_lines_that_were_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'step,loss\r\n1,0.5\r\n2\r\n3,0.25\r\n4,"a\nb"\r\n5,0.12')
    rows = side_files.read_csv(path, ("step", "loss"))
    assert rows == [{"step": "1", "loss": "0.5"}, {"step": "3", "loss": "0.25"}, {"step": "4", "loss": "a\nb"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage\n1\n", r"x\.csv:1 is 'garbage', which has no column step; save it"),
        (b"", "has no column step"),
        (b"\xef\xbb\xbfstep,loss\n1,2\n", r"'\\ufeffstep,loss', which has no column step"),
        (b"step,loss,loss\n1,2,3\n", "has a column twice"),
        (b"step,loss\n1,\xff\n", r"x\.csv:2 is not UTF-8"),
        (b"step,loss\n1," + b"9" * 200_000 + b"\n", r"x\.csv:2 is not a line of a table \(field larger"),
    ],
)
def test_csv_of_another_form_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        side_files.read_csv(tmp_path / "x.csv", ("step",), "save it again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    x: int
    names: tuple[str, ...] = ()


def test_typed_values_name_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"x": 1, "names": ["a"], "unknown": {}}]')
    assert files.read_typed(path, list[Point]) == [Point(x=1, names=("a",))]
    for content, message in {
        '[{"x": "1"}]': r"x\.json: \[0\]\.x: Expected `int`, got `str`; save it again",
        '[{"x": 1, "names": [3]}]': r"\[0\]\.names\[0\]: Expected `str`",
        '[{"names": []}]': r"\[0\]: Object missing required field `x`",
        "[4]": r"\[0\]: Expected `object`, got `int`",
        "{}": r"x\.json: Expected `array`, got `object`",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            files.read_typed(path, list[Point], "save it again")
