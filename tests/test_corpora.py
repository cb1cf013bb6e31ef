"""Corpora of many files: shards in folders and patterns, compressed files, texts, and what is refused with its place."""

import argparse
import collections.abc
import errno
import gzip
import json
import os
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import write_tokenizer

from dream_jax import tokenizer
from dream_jax.data import (
    EncodeOptions,
    ReadOptions,
    TokenCache,
    TokenizedRows,
    find_cache,
    open_source,
    progress,
    shards,
)
from dream_jax.data.records import read_records
from dream_jax.data.store import StoreWriter
from dream_jax.tokenizer import ByteTokenizer, DreamTokenizer, TextToEncode, load_tokenizer

ALL = ReadOptions(held_out=0)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


def plain(content: bytes) -> bytes:
    return content


PACK: dict[str, collections.abc.Callable[[bytes], bytes]] = {"": plain, ".gz": gzip.compress, ".zst": zstd}


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content))
    return path


def texts(data: object, options: ReadOptions = ALL) -> list[str]:
    source = open_source(str(data), options=options)
    return [source[number].response for number in range(len(source))]


@pytest.mark.parametrize("end", [*PACK])
def test_shards_of_a_folder_and_of_a_pattern(tmp_path: Path, end: str) -> None:
    """They are read in the order of their names, below the folder too; files that are no data are left out."""
    put(tmp_path / "b" / f"0.jsonl{end}", lines("five"))
    put(tmp_path / f"a-1.jsonl{end}", lines("three", "four"))
    put(tmp_path / f"a-0.jsonl{end}", lines("one", "two"))
    put(tmp_path / "README.md", b"about")
    put(tmp_path / ".cache" / "other.bin", b"x")
    assert texts(tmp_path) == ["one", "two", "three", "four", "five"]
    assert texts(tmp_path / "a-*") == ["one", "two", "three", "four"]
    assert texts(tmp_path / "**" / f"*.jsonl{end}") == ["one", "two", "three", "four", "five"]
    with pytest.raises(FileNotFoundError, match=r"no file matches the pattern .*c-\*; put the pattern in quotes"):
        texts(tmp_path / "c-*")


def test_splits_of_compressed_files_and_of_folders(tmp_path: Path) -> None:
    put(tmp_path / "named" / "train-0.jsonl.zst", lines("a"))
    put(tmp_path / "named" / "train-1.jsonl.gz", lines("b"))
    put(tmp_path / "named" / "test.jsonl", lines("c"))
    put(tmp_path / "folders" / "train" / "x.txt", b"a")
    put(tmp_path / "folders" / "train" / "y.txt.gz", b"b")
    put(tmp_path / "folders" / "test" / "z.txt", b"c")
    for folder in ("named", "folders"):
        assert texts(tmp_path / folder) == ["a", "b"]
        assert open_source(tmp_path / folder, "test")[0].response == "c"
    put(tmp_path / "unclear" / "main" / "train.jsonl", lines("a"))
    put(tmp_path / "unclear" / "other" / "test.jsonl", lines("b"))
    with pytest.raises(
        ValueError, match=r"no train split, but .*seems to belong to a split; choose one with --data-split"
    ):
        texts(tmp_path / "unclear")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"\xef\xbb\xbfone\n\nline\r\n")
    put(tmp_path / "b.txt.zst", "zwei ä".encode())
    assert texts(tmp_path) == ["one\n\nline\r\n", "zwei ä"]
    put(tmp_path / "c.txt", b"x\n\xff\n")
    put(tmp_path / "d.txt", b" \n")
    with pytest.raises(ValueError, match=r"c\.txt:2: not UTF-8"):
        texts(tmp_path)
    source = open_source(tmp_path, options=ReadOptions(held_out=0, skip_bad=True))
    assert len(source) == 2 and "d.txt: no text" in source.intake.bad[1]


def test_mixed_shards_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "kinds" / "a.jsonl", lines("a"))
    put(tmp_path / "kinds" / "b.jsonl", b'{"prompt": "p", "response": "r"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .* make a chat row, but .*a\.jsonl:1 is of the kind document"):
        texts(tmp_path / "kinds")
    put(tmp_path / "formats" / "a.jsonl", lines("a"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b"]}), tmp_path / "formats" / "b.parquet")
    with pytest.raises(ValueError, match=r"shards of 2 formats \(.*a\.jsonl, .*b\.parquet\); .*pattern as --data"):
        texts(tmp_path / "formats")
    assert texts(tmp_path / "formats" / "*.parquet") == ["b"]
    put(tmp_path / "twice" / "a.jsonl", lines("a"))
    put(tmp_path / "twice" / "a.jsonl.gz", lines("a"))
    with pytest.raises(ValueError, match=r"a\.jsonl and .*a\.jsonl\.gz seem to hold the same rows"):
        texts(tmp_path / "twice")
    put(tmp_path / "strange" / "a.jsonl", lines("a"))
    put(tmp_path / "strange" / "b.jsonl.xz", b"")
    with pytest.raises(ValueError, match=r"b\.jsonl\.xz is no data file; the names of data files end in \.jsonl"):
        texts(tmp_path / "strange")


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_truncated_and_damaged_shards(tmp_path: Path, end: str) -> None:
    """The shard is named, and a line before the damage; several members one after the other are one file."""
    many = lines(*(f"{number} {number * 7919 % 10007}" for number in range(14000)))
    path = tmp_path / f"a.jsonl{end}"
    put(path, many)
    whole = path.read_bytes()
    path.write_bytes(whole + PACK[end](lines("more")))
    assert len(list(shards.read_lines(path))) == 14001
    for broken in (whole[:-3], whole[: len(whole) * 3 // 4], whole + whole[:30], whole + b"strange bytes"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"a\.jsonl\{end}: after line [1-9]\d* the compressed file is truncated"):
            list(shards.read_lines(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no rows"):
        list(read_records(path))


def test_bombs_and_endless_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(shards, "FREE_EXPANSION", 2**18)
    monkeypatch.setattr(shards, "MOST_EXPANSION", 100)
    for end in (".gz", ".zst"):
        with pytest.raises(ValueError, match=rf"a\.jsonl\{end}:\d+: .* has expanded to more than 262,144 bytes"):
            list(read_records(put(tmp_path / f"a.jsonl{end}", b"\n" * 2**19)))
        with pytest.raises(ValueError, match=rf"b\.jsonl\{end}:2: the line has more than 65,536 bytes"):
            list(read_records(put(tmp_path / f"b.jsonl{end}", lines("a") + b" " * 2**17)))
    with pytest.raises(ValueError, match=r"c\.txt:3: the text has more than 65,536 bytes; divide it"):
        list(read_records(put(tmp_path / "c.txt", (b"x" * 30000 + b"\n") * 4)))


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", lines("a", "b"))
    found = read_records(path)
    next(found)
    with path.open("ab") as file:
        file.write(lines("c"))
    with pytest.raises(ValueError, match=r"a\.jsonl:\d: the file was changed while it was read"):
        list(found)
    os.unlink(path)


# --- Progress, a full disk and Ctrl-C while tokens are written ---


def cached(tmp_path: Path, data: object, said: list[str]) -> TokenizedRows:
    cache = TokenCache(find_cache(str(tmp_path / "cache")), ByteTokenizer(), EncodeOptions(), said.append)
    return cache.open([str(data)], options=ALL)


def test_progress_is_told_in_lines_and_shown_as_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    said, times, meter = list[str](), [0.0], shards.ByteMeter()
    shown = progress.RowProgress("corpus", 4_000_000_000, meter, said.append, lambda: times[0])
    meter.finish(500_000_000)
    for seconds, position, rows in ((9, 100_000_000, 900), (20, 500_000_000, 5_000), (25, 600_000_000, 6_000)):
        times[0] = seconds
        meter.at(position)
        shown(rows)
    assert said == ["reading corpus: 5,000 rows, 250 rows/s, 25% of 4 GB, 1:00 left"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with shown.shown():
        times[0] = 60.0
        shown(7_000)
    assert len(said) == 1
    assert [progress.duration(seconds) for seconds in (5.2, 754, 3723)] == ["0:05", "12:34", "1:02:03"]


@pytest.mark.parametrize("end", [*PACK])
def test_the_bytes_of_all_files_are_counted(tmp_path: Path, end: str) -> None:
    many = lines(*(f"{number * 7919 % 10007}" for number in range(3000)))
    paths = [put(tmp_path / f"{name}.jsonl{end}", many) for name in "ab"]
    meter, seen = shards.ByteMeter(), []
    for path in paths:
        seen += [meter.bytes for _ in read_records(path, None, meter)]
    assert seen == sorted(seen) and meter.bytes == sum(path.stat().st_size for path in paths) >= seen[-1] > 0
    table = pyarrow.table({"text": ["b"] * 1000})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    meter = shards.ByteMeter()
    found = [meter.bytes for _ in read_records(tmp_path / "c.parquet", None, meter)]
    assert 0 < found[-1] < meter.bytes == (tmp_path / "c.parquet").stat().st_size


def test_too_little_space_is_refused_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = put(tmp_path / "a.jsonl", lines("some text") * 100), list[str]()
    free = [100]
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda path: argparse.Namespace(free=free[0]))
    needed = progress.needed_bytes([file], 1.0)
    assert needed == 5 * file.stat().st_size
    with pytest.raises(
        OSError, match=r"take about 1.1e-05 GB in .*cache, but only 1e-07 GB are free there: make room, or"
    ):
        cached(tmp_path, file, said)
    free[0] = needed - 1
    assert len(cached(tmp_path, file, said)) == 100
    assert said[0].startswith("warning: the tokens of ") and "if it becomes full, make room, or give another" in said[0]
    with file.open("ab") as more:
        more.write(lines("more"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(
        OSError, match=r"the disk is full: the tokens of .*a\.jsonl take about .* were free at the start"
    ):
        cached(tmp_path, file, said)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(said[1].split()[6]).name]


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.jsonl", lines("some text") * 100)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path, file, [])
    assert not list((tmp_path / "cache").iterdir())
    assert len(cached(tmp_path, file, [])) == 100


# --- Documents that are encoded in parts ---


def test_the_parts_of_a_long_text_have_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks beside spaces, other line breaks, letters that are not ASCII and marks are never divided."""
    found = load_tokenizer(write_tokenizer(tmp_path))
    assert isinstance(found, DreamTokenizer)
    draw = random.Random(0)
    ends = ["\n", "\n\n", " \n", "\r\n", "\n  ", "\n\t", "é\n", "\n\u0301", "7\n8", ".\n<|endoftext|>"]
    text = "".join(draw.choice(("a b", "cab", "ab 12", "B")) + draw.choice(ends) for _ in range(2000))
    monkeypatch.setattr(tokenizer, "_LONG_TEXT", 200)
    monkeypatch.setattr(tokenizer, "_ENCODED_TOGETHER", 500)
    parts = found._parts(text)
    assert len(parts) > 20 and "".join(parts) == text and max(map(len, parts)) < 500
    requests = [TextToEncode(text), TextToEncode("ab"), TextToEncode("x" * 1000)]
    assert found.encode_all(requests) == [found.encode(one.text) for one in requests]
    # A tokenizer whose ids depend on what stands across a line break gets the whole text.
    monkeypatch.setattr(DreamTokenizer, "encode", lambda self, text: [len(text) ** 2])
    assert found._parts(text) == [text]
