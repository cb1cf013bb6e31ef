"""Files that are replaced as a whole, and JSON that is read with a clear error."""

import os
from pathlib import Path

import pytest

from dream_jax import files


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    files.write_file(path, "before ü\n")
    assert path.read_bytes() == "before ü\n".encode()
    with pytest.raises(RuntimeError, match="halfway"), files.replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path  # the same file system: else the renaming is no single operation
        assert path.read_text(encoding="utf-8") == "before ü\n"
        raise RuntimeError("halfway")
    assert path.read_text(encoding="utf-8") == "before ü\n"
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"after")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_readably_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": [1, 2.5, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"x\.json is not valid JSON in UTF-8 \(.*\); save it"),
        (b"\xff", "not valid JSON in UTF-8"),
        (b"[]", "holds a list, not"),
    ],
)
def test_json_of_another_form_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "x.json", "save it again")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        files.read_json(tmp_path / "x.json")


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("before")
    link.symlink_to(target)
    files.write_file(link, "after")
    assert link.is_symlink() and target.read_text() == "after"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_file(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_an_unfinished_file_does_not_stop_a_new_directory(tmp_path: Path) -> None:
    (tmp_path / ".made.incomplete-1").write_text("")
    with files.new_directory(tmp_path / "made") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "made" / "config.json").is_file()


def test_a_file_with_the_longest_name_is_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127):
        files.write_file(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 2
