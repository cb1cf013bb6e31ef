"""Tokens in a store on the disk: the same batches as from memory, whole or not at all, and never of other data."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import batch_digests
import generated_chats
import pytest
import tiny_tokenizer
from batch_digests import SETTINGS, SHORT, WHOLE, digests, open_rows
from commands import run_script

import dream_jax.tokenizer
from dream_jax.data import (
    CacheChoice,
    EncodeOptions,
    Intake,
    ReadOptions,
    Row,
    StoredRows,
    StoreWriter,
    TokenCache,
    TokenizedRows,
    find_cache,
    length_report,
    open_source,
    open_store,
    store,
    token_cache,
    token_row,
)
from dream_jax.data.encode import TokenRow, token_rows
from dream_jax.data.store import DamagedStore, TokenStore, digest_of
from dream_jax.data.token_cache import encoded
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer
from dream_jax.trainer import TrainSettings

BYTES = ByteTokenizer()
RECORDED = json.loads(batch_digests.RECORDED.read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `batch_digests`, and the folder "cache" of their stores."""
    folder = tmp_path_factory.mktemp("digests")
    batch_digests.write_data(folder)
    return folder


# ------------------------------------------------------------------------------------------------ the same as from memory


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_from_a_store_are_those_of_earlier_versions(name: str, written: Path) -> None:
    rows = open_rows(SETTINGS[name], written, str(written / "cache"))
    processes = {"one width": 1, "packed": 4}.get(name, 2)
    assert digests(SETTINGS[name], rows, SHORT, processes, resume_at=SHORT // 2) == {SHORT: RECORDED[name][str(SHORT)]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_500_batches_are_those_of_earlier_versions_from_memory_and_from_a_store(name: str, written: Path) -> None:
    recorded = {int(count): digest for count, digest in RECORDED[name].items()}
    assert digests(SETTINGS[name], open_rows(SETTINGS[name], written), WHOLE) == recorded
    rows = open_rows(SETTINGS[name], written, str(written / "cache"))
    assert digests(SETTINGS[name], rows, WHOLE, processes=4, resume_at=WHOLE // 3) == recorded


@pytest.mark.parametrize("name", ["middle", "answers only", "right, all turns"])
def test_reports_and_held_out_rows_are_those_from_memory(name: str, written: Path) -> None:
    setting = SETTINGS[name]
    for split in ("train", "test"):
        kept, stored = (open_rows(setting, written, cache, split) for cache in ("off", str(written / "cache")))
        assert isinstance(stored.source, StoredRows) and not isinstance(kept.source, StoredRows)
        assert length_report(kept, setting.max_length).plain() == length_report(stored, setting.max_length).plain()
        assert (
            length_report(kept, setting.max_length, 7).plain() == length_report(stored, setting.max_length, 7).plain()
        )
        first = kept.first(5, setting.max_length)
        for (row, tokens), (again, others) in zip(first, stored.first(5, setting.max_length), strict=True):
            assert row == again and same(tokens, others)


def same(one: TokenRow, other: TokenRow) -> bool:
    return one.pieces == other.pieces and one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize("form", generated_chats.FORMS)
def test_rows_of_every_form_are_stored_as_they_are_read(form: str, tmp_path: Path) -> None:
    rows = [row for seed in range(3) for row in generated_chats.training_rows(form, seed)]
    rows[3]["unknown"] = 1
    with generated_chats.write("jsonl", tmp_path, rows).open("a") as file:
        file.write("[1]\n" + json.dumps({"text": "of another kind"}) + "\n{\n")
    options = ReadOptions(skip_bad=True, held_out=0.4)
    for split in ("train", "test"):
        source = open_source(tmp_path / "rows.jsonl", split, options=options)
        cache = TokenCache(CacheChoice(folder=tmp_path / "cache", smallest=0), BYTES, EncodeOptions())
        stored = cache.open([str(tmp_path / "rows.jsonl")], None, split, 0, options)
        assert isinstance(stored.source, StoredRows) and stored.source.intake == source.intake
        assert len(source.intake.bad) == 3 and source.intake.unread
        assert [stored.source[index] for index in range(len(source))] == [source[index] for index in range(len(source))]
        assert all(same(stored[index], token_row(source[index], BYTES)) for index in range(len(source)))


def test_rows_are_encoded_together_as_each_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer.write_tokenizer(tmp_path))
    rows = [Row(prompt="a <|im_end|>", response="b"), Row(prompt="", response="text", document=True)]
    for tools in (False, True):
        found = generated_chats.training_rows("messages", 0, 12, tools=tools)
        source = open_source(generated_chats.write("jsonl", tmp_path, found), options=ReadOptions(held_out=0.0))
        rows += [source[index] for index in range(len(source))]
        assert any(row.tools for row in rows) == tools
        for options in (
            EncodeOptions(),
            EncodeOptions(learned_turns="all"),
            EncodeOptions(length_policy="answer_only"),
        ):
            if tools and options.learned_turns == "all":  # the template writes the tools after the turns
                continue
            together = token_rows(rows, tokenizer, options)
            assert all(same(one, token_row(row, tokenizer, options)) for one, row in zip(together, rows, strict=True))
    with pytest.raises(ValueError, match=r"x:7: message 0 has role 'nobody'"):
        bad = Row(prompt=({"role": "nobody", "content": "a"},), response="b", meta={"where": "x:7"})
        token_rows([*rows, bad], tokenizer)


# --------------------------------------------------------------------------------------------------- whole or not at all


def fill_with(count: int, offset: int = 0) -> Callable[[StoreWriter], Intake]:
    def fill(writer: StoreWriter) -> Intake:
        for number in range(count):
            writer.add(token_row(Row(prompt=f"{number + offset}?", response="yes"), BYTES))
        return Intake(bad=("a.jsonl:3: not JSON",), unread={"id": 2})

    return fill


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("threshold", [700, 0, 1_000_000])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("asked", [None, "true"])
def test_building_a_store_leaves_the_settings_of_the_process_as_they_were(
    asked: str | None, frozen: bool, threshold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error; and what the program or the user has chosen holds while rows are encoded."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if asked is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", asked)
    seen = list[tuple[str | None, int, bool]]()

    def encoded(*_: object) -> Iterator[object]:
        seen.append((os.environ.get("TOKENIZERS_PARALLELISM"), gc.get_threshold()[0], gc.get_freeze_count() > 0))
        raise RuntimeError("no rows")
        yield

    monkeypatch.setattr(token_cache, "encoded", encoded)
    path = generated_chats.write("jsonl", tmp_path, generated_chats.training_rows("messages", 0, 3))
    before, frozen_before = gc.get_threshold(), gc.get_freeze_count() > 0
    (gc.freeze if frozen else gc.unfreeze)()
    gc.set_threshold(threshold, 10, 10)
    try:
        with pytest.raises(RuntimeError, match="no rows"):
            TokenCache(find_cache(str(tmp_path / "cache")), BYTES, EncodeOptions()).open([path])
        assert seen == [(asked or "false", 100_000 if threshold == 700 else threshold, True)]
        assert (os.environ.get("TOKENIZERS_PARALLELISM"), gc.get_threshold()) == (asked, (threshold, 10, 10))
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.set_threshold(*before)
        (gc.freeze if frozen_before else gc.unfreeze)()


@pytest.mark.parametrize(("length", "held"), [(10, 9), (2**16, 9), (2**21, 3)])
def test_rows_are_encoded_in_order_and_few_are_held(length: int, held: int) -> None:
    """With eight threads nine groups of rows wait, but of long documents three."""
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for number in range(12):
            read += 1
            yield Row(prompt="", response=f"{number:02}" + "x" * length, document=True)

    class Quick(ByteTokenizer):
        def encode_all(self, requests: Any) -> list[list[int]]:
            return [[ord(letter) for letter in one.text[:2]] for one in requests]

    found = list[str]()
    ahead = 0
    for row, tokens in encoded(rows(), Quick(), EncodeOptions(), threads=8):
        assert chr(tokens.tokens[1]) + chr(tokens.tokens[2]) == row.response[:2]
        found.append(row.response[:2])
        ahead = max(ahead, read - len(found) + 1)
    assert found == [f"{number:02}" for number in range(12)]
    assert ahead <= held or length < 2**16  # short rows are in one group
    assert ahead > 1


def test_parts_of_a_long_text_are_encoded_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer.write_tokenizer(tmp_path))
    text = "".join(f"line {number} of a text\n" for number in range(20_000))
    row = Row(prompt="", response=text, document=True)
    alone = token_row(row, tokenizer)
    monkeypatch.setattr(dream_jax.tokenizer, "_ENCODED_TOGETHER", 70_000)
    names = set[str]()
    ids_of = type(tokenizer)._ids_of

    def spied(self: Any, texts: list[str]) -> dict[str, list[int]]:
        names.add(threading.current_thread().name)
        return ids_of(self, texts)

    monkeypatch.setattr(type(tokenizer), "_ids_of", spied)
    assert same(token_rows([row], tokenizer)[0], alone)
    assert names and all("ThreadPool" in name for name in names)


def test_a_second_start_finds_the_store_and_says_so(tmp_path: Path) -> None:
    said = list[str]()
    progress = list[int]()
    built = open_store(tmp_path / "new" / "cache", {"a": 1}, fill_with(300), say=said.append, progress=progress.append)
    found = open_store(tmp_path / "new" / "cache", {"a": 1}, fill_with(0), say=said.append)
    assert [line.split(" in ")[0] for line in said] == ["tokens of 300 rows built", "tokens of 300 rows found"]
    assert progress == [256, 300]
    assert len(found) == 300 and found.intake == Intake(bad=("a.jsonl:3: not JSON",), unread={"id": 2})
    assert found.lengths.tolist() == [found.row(index).length for index in range(300)] == built.lengths.tolist()
    assert not found.row(0).tokens.flags.writeable and found.total_tokens == found.lengths.sum()
    with pytest.raises(ValueError, match="has no text of row 3"):
        found.text(3)
    for wrong in (-1, 300):
        with pytest.raises(IndexError):
            found.row(wrong)
    assert entries(tmp_path / "new" / "cache") == [found.folder.name]
    assert len(open_store(tmp_path / "new" / "cache", {"a": 2}, fill_with(0))) == 0


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("bad row"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
)
def test_an_error_while_a_store_is_built_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fill(writer: StoreWriter) -> Intake:
        fill_with(3)(writer)
        raise error

    with pytest.raises(type(error), match="the disk is full" if isinstance(error, OSError) else None):
        open_store(tmp_path / "cache", {}, fill)
    assert entries(tmp_path / "cache") == []


def test_what_a_killed_process_leaves_is_never_used_and_is_removed(tmp_path: Path) -> None:
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from dream_jax.data.store import open_store
        from dream_jax.data.encode import TokenRow, TokenPiece
        import numpy as np
        row = TokenRow(tokens=np.arange(2**20, dtype=np.int32), pieces=(TokenPiece("prompt", 2**20), TokenPiece("end", 0)))
        def fill(writer):
            for _ in range(3):
                writer.add(row)
            os.kill(os.getpid(), signal.SIGKILL)
        open_store(Path(sys.argv[1]), {"a": 1}, fill)
    """
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent.parent, check=False)
    assert ended.returncode == -9
    left = entries(tmp_path)
    assert len(left) == 2 and left[0].startswith(".") and (tmp_path / left[0] / "tokens").stat().st_size > 2**20
    found = open_store(tmp_path, {"other": 1}, fill_with(2))
    assert entries(tmp_path) == [found.folder.name]
    assert len(open_store(tmp_path, {"a": 1}, fill_with(5))) == 5


def test_only_what_no_process_builds_any_more_is_removed(tmp_path: Path) -> None:
    """Another start of the same rows removes what was left of them; a store that is being built stays, whatever its pid."""
    kept = [tmp_path / f".{digest_of({'a': 2})}.incomplete-{os.getpid()}", tmp_path / ".model.incomplete-1"]
    for folder in (tmp_path / f".{digest_of({'a': 1})}.incomplete-1", *kept):
        folder.mkdir()
    with store._locked(tmp_path / f"{digest_of({'a': 2})}.lock", print):
        found = open_store(tmp_path, {"a": 1}, fill_with(2))
        assert entries(tmp_path) == sorted(
            [*(folder.name for folder in kept), f"{digest_of({'a': 2})}.lock", found.folder.name]
        )


def test_of_two_starts_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    begun, waits = threading.Event(), threading.Event()
    said, stores = list[str](), list[TokenStore]()

    def slowly(writer: StoreWriter) -> Intake:
        begun.set()
        assert waits.wait(60)
        return fill_with(4)(writer)

    def hear(text: str) -> None:
        said.append(text)
        if "waiting" in text:
            waits.set()

    first = threading.Thread(target=lambda: stores.append(open_store(tmp_path, {}, slowly)))
    first.start()
    assert begun.wait(60)
    stores.append(open_store(tmp_path, {}, fill_with(9), say=hear))
    first.join()
    assert [len(one) for one in stores] == [4, 4] and "waiting" in said[0] and "found" in said[1]
    assert entries(tmp_path) == [stores[0].folder.name]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[-1]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("name", ["tokens", "lengths", "piece_kinds", "texts", "store.json"])
def test_a_damaged_store_is_built_again(name: str, how: str, tmp_path: Path) -> None:
    def fill(writer: StoreWriter) -> Intake:
        for number in range(20):
            row = Row(prompt=f"{number}?", response="yes")
            writer.add(token_row(row, BYTES), row)
        return Intake()

    folder = open_store(tmp_path, {}, fill).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name, how)
    said = list[str]()
    open_store(tmp_path, {}, fill, say=said.append)
    assert "damaged" in said[0] and "built again" in said[0] and "built in" in said[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert entries(tmp_path) == [folder.name]


def test_a_large_store_is_compared_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BLOCK", 64)
    monkeypatch.setattr(store, "_VERIFIED_AT_ONCE", 0)
    monkeypatch.setattr(store, "_MAPPED", 200)  # pages are given back after every few rows
    folder = open_store(tmp_path, {}, fill_with(40)).folder
    damage(folder / "tokens", "flipped")
    found, refused = open_store(tmp_path, {}, fill_with(0)), 0
    for number in (*range(40), *range(40)):
        expected = token_row(Row(prompt=f"{number}?", response="yes"), BYTES)
        try:
            assert same(found.row(number), expected)
        except DamagedStore as error:
            assert str(folder) in str(error) and "remove the folder" in str(error)
            refused += 1
    assert 2 <= refused <= 16 and refused % 2 == 0


# ------------------------------------------------------------------------------------------------- never of other data


def rows_of(path: Path, cache: Path, encode: EncodeOptions = EncodeOptions(), **options: Any) -> TokenizedRows:
    tokenizer = options.pop("tokenizer", BYTES)
    opened = TokenCache(CacheChoice(folder=cache, smallest=0), tokenizer, encode)
    return opened.open([str(path)], None, "train", 0, ReadOptions(held_out=0.0, **options))


def write_rows(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps({"question": "What?", "answer": answer, "id": 1}) + "\n" for answer in answers))
    return path


def test_a_changed_source_has_another_store_even_with_its_old_size_and_time(tmp_path: Path) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", "one", "two"), tmp_path / "cache"
    assert bytes(rows_of(path, cache)[1].tokens[-4:-1].tolist()) == b"two"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_rows(path, "one", "six")
    os.utime(path, ns=times)
    assert bytes(rows_of(path, cache)[1].tokens[-4:-1].tolist()) == b"six"
    assert len(entries(cache)) == 2


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "one", "two")
    before = token_cache.content_of

    def then_changed(files: Any) -> str:
        found = before(files)
        write_rows(path, "one", "two", "three")
        return found

    monkeypatch.setattr(token_cache, "content_of", then_changed)
    with pytest.raises(ValueError, match=r"rows\.jsonl was changed while it was read; start again"):
        rows_of(path, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_every_option_that_changes_tokens_is_in_the_key_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", "one", "two"), tmp_path / "cache"
    tiny = tiny_tokenizer.write_tokenizer(tmp_path / "tiny")
    other = tiny_tokenizer.write_tokenizer(
        tmp_path / "other", template=tiny_tokenizer.TEMPLATE.replace("role", "role ")
    )
    keys = [
        lambda: rows_of(path, cache),
        lambda: rows_of(path, cache, EncodeOptions(learned_turns="all")),
        lambda: rows_of(path, cache, EncodeOptions(length_policy="answer_only")),
        lambda: rows_of(path, cache, answer_format="d1"),
        lambda: rows_of(path, cache, skip_bad=True),
        lambda: rows_of(path, cache, ignored_fields=("id",)),
        lambda: rows_of(path, cache, tokenizer=load_tokenizer(tiny)),
        lambda: rows_of(path, cache, tokenizer=load_tokenizer(other)),
        lambda: rows_of(Path(shutil.copy(path, tmp_path / "copy.jsonl")), cache),  # its name is in messages
    ]
    for number, one in enumerate(keys, start=1):
        one()
        assert len(entries(cache)) == number
    for encode in (EncodeOptions(length_policy="right"), EncodeOptions(length_policy="middle")):
        rows_of(path, cache, encode)
    assert len(entries(cache)) == len(keys)
    monkeypatch.setattr(token_cache, "_code_digest", lambda: "another version")
    rows_of(path, cache)
    assert len(entries(cache)) == len(keys) + 1


# ------------------------------------------------------------------------------------------------------ choice of the cache


def test_small_data_and_data_without_files_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_JAX_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "rows.jsonl", "one", "two")
    for setting in ("auto", "off"):
        rows = TokenCache(find_cache(setting), BYTES, EncodeOptions()).open([str(path), "sudoku"])
        assert len(rows) > 10**6 and not (tmp_path / "cache").exists()
    assert find_cache("auto").folder == tmp_path / "cache" and find_cache("off").folder is None
    monkeypatch.setattr(token_cache, "SMALLEST", 10)
    rows = TokenCache(CacheChoice(folder=tmp_path / "cache", smallest=10), BYTES, EncodeOptions()).open([str(path)])
    assert isinstance(rows.source, StoredRows)
    monkeypatch.delenv("DREAM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    chosen = find_cache("auto").folder
    assert chosen is not None and chosen.parts[-2:] == ("dream_jax", "tokens")
    with pytest.raises(ValueError, match="data_cache=gs://a/b is an address"):
        TrainSettings.flat(data_cache="gs://a/b")


def test_a_cache_that_cannot_be_written_is_refused_if_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", "one", "two"), tmp_path / "cache"

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    stored, make = rows_of(path, cache), Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert isinstance(rows_of(path, cache).source, StoredRows)  # a store that exists is read
    monkeypatch.setattr(Path, "mkdir", make)
    shutil.rmtree(cache)
    monkeypatch.setattr(Path, "mkdir", refuse)
    said = list[str]()
    chosen = CacheChoice(folder=cache, smallest=0)
    rows = TokenCache(chosen, BYTES, EncodeOptions(), said.append).open([str(path)], options=ReadOptions(held_out=0.0))
    assert not isinstance(rows.source, StoredRows) and len(rows) == len(stored) == 2
    assert len(said) == 1 and "kept in memory" in said[0] and str(cache) in said[0]
    with pytest.raises(PermissionError, match="give another --data-cache, or --data-cache off"):
        TokenCache(find_cache(str(cache)), BYTES, EncodeOptions()).open([str(path)])


@pytest.mark.parametrize("why", ["a file", "no locks", "not readable"])
def test_a_cache_that_cannot_be_used_is_refused_only_if_it_was_asked_for(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path / "rows.jsonl", "one", "two"), tmp_path / "cache"

    def refuse(number: int, *where: str) -> Callable[..., None]:
        def refused(*args: Any) -> None:
            raise OSError(number, os.strerror(number), *where)

        return refused

    if why == "a file":
        cache.touch()
    elif why == "no locks":
        monkeypatch.setattr(store.fcntl, "flock", refuse(errno.ENOLCK))
    else:
        monkeypatch.setattr(store, "TokenStore", refuse(errno.EACCES, str(cache / "store.json")))
    said = list[str]()
    rows = TokenCache(CacheChoice(folder=cache, smallest=0), BYTES, EncodeOptions(), said.append).open([str(path)])
    assert not isinstance(rows.source, StoredRows) and len(said) == 1 and "kept in memory" in said[0]
    with pytest.raises(PermissionError, match="give another --data-cache, or --data-cache off"):
        TokenCache(find_cache(str(cache)), BYTES, EncodeOptions()).open([str(path)])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file .*rows\.jsonl"):
        rows_of(tmp_path / "rows.jsonl", tmp_path / "cache")


def test_a_chat_template_in_a_further_file_is_in_the_key(tmp_path: Path) -> None:
    folder = tiny_tokenizer.write_tokenizer(tmp_path / "tiny")
    (folder / "additional_chat_templates").mkdir()
    found = set[str]()
    for text in ("a", "b"):
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(f"<|im_start|>{text}")
        found.add(load_tokenizer(folder).fingerprint())
    assert len(found) == 2


# ------------------------------------------------------------------------------------------------------------- the command


def test_a_data_report_is_printed_and_written_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", *(f"answer {number}" for number in range(30)))
    report = tmp_path / "a" / "r.json"
    flags = ["--data", path, "--held-out", "0", "--eval-rows", "0", "--batch-size", "4", "--steps", "10"]
    flags += ["--max-length", "50", "--data-cache", tmp_path / "cache"]
    ended = run_script("train.py", *flags, "--data-report", report)
    assert ended.returncode == 0, ended.stderr
    for line in (
        "tokens of 30 rows built in",
        "data: 30 rows kept, 0 dropped (30 in all) at max_length 50",
        "data: fields of the files that are not read: id (30 rows)",
        "data: 10 steps, 1.33 epochs",
    ):
        assert line in ended.stdout
    found = json.loads(report.read_text())
    assert found["rows"]["kept"] == 30 and found["batches"]["steps"] == 10 and found["max_length"] == 50
    assert entries(tmp_path) == ["a", "cache", "rows.jsonl"]
    planned = run_script("train.py", *flags, "--data-report", report, "--plan")
    assert planned.returncode == 1 and "give one of them" in planned.stderr
    wrong = run_script("train.py", *flags, "--data-report", path)
    assert wrong.returncode == 1 and "is not a data report" in wrong.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """The rows of a store of 400 MB are all read at random; one of 4 MB is the measure."""
    script = """if True:
        import resource, sys
        from pathlib import Path
        import numpy as np
        from dream_jax.data.encode import TokenPiece, TokenRow
        from dream_jax.data.rows import Intake
        from dream_jax.data.store import StoredRows, open_store
        def fill(writer):
            for number in range(int(sys.argv[2])):
                tokens = np.full(1000, number, np.int32)
                writer.add(TokenRow(tokens=tokens, pieces=(TokenPiece("prompt", 999), TokenPiece("end", 1))))
            return Intake()
        store = open_store(Path(sys.argv[1]), {"rows": sys.argv[2]}, fill)
        assert sum(framed.nbytes for framed in StoredRows(store).framed()) == 4008 * len(store)
        for number in np.random.default_rng(0).permutation(len(store)).tolist():
            assert int(store.row(number).tokens[500]) == number
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    sizes = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path), str(rows)],
                cwd=Path(__file__).parent.parent,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for rows in (1000, 100_000)
    ]
    assert sizes[1] - sizes[0] < 150_000, sizes  # kilobytes
