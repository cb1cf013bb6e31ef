"""Addresses, overlaps, links, kinds of files and claims: what is checked before a path is written or read."""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from dream_jax import files, paths
from dream_jax.row_file import RowFile

ADDRESSES = [
    "gs://bucket/a",
    "gs:/bucket/a",
    "s3://bucket/a",
    "S3://bucket/a",
    "http://host/a",
    "https://huggingface.co/org/name",
    "file:///disk/a",
    "hf://org/name",
    "abfss://x@y/z",
    " gs://bucket",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address):
    for path in (address, pathlib.Path(address)):  # pathlib makes gs:/bucket of gs://bucket
        with pytest.raises(ValueError, match="is an address"):
            paths.local_path(path)


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("hf://org/name", "give the hub id alone, org/name"),
        ("https://huggingface.co/org/name", "give the hub id alone, org/name"),
        ("file:///a/b", "give the path alone, /a/b"),
        ("gs://bucket", "local (or mounted)"),
    ],
)
def test_the_remedy_fits_the_address(address, remedy):
    with pytest.raises(ValueError) as raised:
        paths.local_path(address, "out")
    assert str(raised.value).startswith(f"out={address} is an address") and remedy in str(raised.value)


def test_paths_that_are_no_addresses():
    for path in ("a/b", "/a/b", "../a", "a:b", "c:/x", "1:/x", "a b/c:d/e", "org/name@v1"):
        assert paths.local_path(path) == pathlib.Path(path)
    assert paths.local_path("~/x") == pathlib.Path.home() / "x"
    with pytest.raises(ValueError, match="NUL"):
        paths.local_path("a\0b")
    with pytest.raises(ValueError, match="model is empty"):
        paths.local_path("", "model")
    with pytest.raises(ValueError, match="out=~nobody-here/x begins with ~nobody-here, which is no home directory"):
        paths.local_path("~nobody-here/x", "out")


def test_all_paths_of_settings_are_checked():
    @dataclasses.dataclass
    class Some:
        out: pathlib.Path | None = None
        both: tuple[pathlib.Path, ...] = ()
        model: str = ""
        text: str = "gs://not/a/path"

    paths.check_local(Some(pathlib.Path("a"), (pathlib.Path("b"),), "c"), "model")
    for change in ({"out": pathlib.Path("gs://b")}, {"both": (pathlib.Path("a"), pathlib.Path("gs://b"))}):
        with pytest.raises(ValueError, match=rf"{next(iter(change))}=gs:/b is an address"):
            paths.check_local(Some(**change), "model")
    with pytest.raises(ValueError, match="model=hf://o/n is an address"):
        paths.check_local(Some(model="hf://o/n"), "model")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """home/source with a file and a link to elsewhere/far; home/link leads to source."""
    (tmp_path / "home" / "source").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far").write_text("far")
    (tmp_path / "home" / "source" / "near").write_text("near")
    (tmp_path / "home" / "source" / "far").symlink_to(tmp_path / "elsewhere" / "far")
    (tmp_path / "home" / "link").symlink_to(tmp_path / "home" / "source")
    (tmp_path / "home" / "source" / "inside").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "read", "how"),
    [
        ("home/source", "home/source", "is the source itself"),
        ("home/link", "home/source", "is the source itself"),
        ("home/../home/source/.", "home/source", "is the source itself"),
        ("home", "home/source", "contains"),
        (".", "home/source/near", "contains"),
        ("home/source/../..", "home/link", "contains"),
        ("elsewhere", "home/source", "contains"),  # through a link in the source
        ("home", "home/link", "contains"),
        ("home/source/inside", "home/link", "lies in"),
        ("home/source/near", "home/source/near", "is the source itself"),
    ],
)
def test_what_is_read_is_not_replaced(tree, target, read, how):
    for named in (target, tree / target):
        with pytest.raises(ValueError, match=how):
            paths.check_apart(named, [None, "nowhere", read])


def test_another_name_of_the_same_directory(tree, monkeypatch):
    """A second mount, or other capitals on a file system that ignores them: the same inode under another path."""
    stat = pathlib.Path.stat

    def as_source(self, **options):
        return stat(tree / "home" / "source" if self == tree / "other" else self, **options)

    monkeypatch.setattr(pathlib.Path, "stat", as_source)
    with pytest.raises(ValueError, match="is the source itself"):
        paths.check_apart(tree / "other", ["home/source"])


def test_paths_that_have_nothing_in_common(tree):
    paths.check_apart("other", ["home/source", "home", None, "gone"])
    paths.check_apart("other/new", ["other", "home"])  # nothing is there that could be replaced
    paths.check_apart("home/source/inside", ["home/source"], lies_in=False)


def test_a_link_out_of_a_checkpoint_is_not_copied(tree):
    source = tree / "home" / "source"
    (source / "beside").symlink_to("near")
    paths.copy_companion(source / "near", tree / "copy")
    paths.copy_companion(source / "beside", tree / "copy")
    paths.copy_companion(tree / "home" / "link" / "near", tree / "copy")
    with pytest.raises(ValueError, match=r"far is a link to .*elsewhere.far, out of its directory"):
        paths.copy_companion(source / "far", tree / "new")
    assert not (tree / "new").exists()


def test_links_of_the_hub_cache_are_copied(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text("vocabulary")
    (snapshot / "vocab.json").symlink_to("../../blobs/123")
    paths.copy_companion(snapshot / "vocab.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "vocabulary"
    (tmp_path / "secret").write_text("")
    (snapshot / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="out of its directory"):
        paths.copy_companion(snapshot / "merges.txt", tmp_path / "copy")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"mine\n", "text that begins with 'mine'"),
        (b'{"a": 1}', "a JSON object with the keys a"),
        (b"[1]", "JSON, a list"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xff\xfe", "binary data"),
        (b"[" * 100_000, "text that begins with"),
    ],
)
def test_a_file_of_another_kind_is_kept(tmp_path, content, found):
    path = tmp_path / "plan.json"
    is_plan = paths.is_json_object("hardware")
    paths.check_replaceable(path, "a plan", is_plan)
    path.write_bytes(b"")
    paths.check_replaceable(path, "a plan", is_plan)
    path.write_text(json.dumps({"hardware": 1, "more": 2}))
    paths.check_replaceable(path, "a plan", is_plan)
    path.write_bytes(content)
    with pytest.raises(FileExistsError, match="is not a plan, but") as raised:
        paths.check_replaceable(path, "a plan", is_plan)
    assert found in str(raised.value)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory; give the name of a file"):
        paths.check_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file and not a folder"):
        paths.check_file(tmp_path / "file" / "below" / "x")
    os.mkfifo(tmp_path / "pipe")
    assert paths.check_file(tmp_path / "pipe") == tmp_path / "pipe"
    with pytest.raises(ValueError, match="is a pipe or a device"):  # reading it would wait for ever
        RowFile(tmp_path / "pipe")


HOLD = """
import pathlib, sys, time, types
# Without dream_jax/__init__.py, which imports jax: that takes seconds.
package = sys.modules["dream_jax"] = types.ModuleType("dream_jax")
package.__path__ = [sys.argv[2] + "/dream_jax"]
from dream_jax import paths
with paths.claimed(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_claim_names_the_process_and_ends_with_it(tmp_path, kind):
    path = tmp_path / kind
    path.touch() if kind == "file" else path.mkdir()
    root = str(pathlib.Path(__file__).parent.parent)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), root], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        number = f", {other.pid}," if os.path.exists("/proc/locks") else ""
        refused = pytest.raises(BlockingIOError, match=rf"^another process{number} is writing .*{kind}; wait")
        with refused, paths.claimed(path):
            pass
        other.send_signal(signal.SIGKILL)
    with paths.claimed(path):  # a dead process has no claim
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == [path]  # and a claim leaves no file


def test_shared_claims(tmp_path):
    both = paths.claimed(tmp_path, shared=True), paths.claimed(tmp_path, shared=True)
    with both[0], both[1], pytest.raises(BlockingIOError), paths.claimed(tmp_path):
        pass
    with paths.claimed(tmp_path):
        pass


def test_every_writer_refuses_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/x.json", pathlib.Path("gs://bucket/x.json")):
        with pytest.raises(ValueError, match="is an address"):
            files.write_json(address, {})
        with pytest.raises(ValueError, match="is an address"), files.new_directory(address):
            pass
    assert list(tmp_path.iterdir()) == []


def known(_: pathlib.Path) -> tuple[str, ...]:
    return ("config.json", "part-*.bin")


def test_a_directory_with_a_strange_file_is_kept(tmp_path):
    target = tmp_path / "model"

    def write(**options):
        with files.new_directory(target, known=known, **options) as folder:
            (folder / "config.json").write_text("{}")
            (folder / "part-1.bin").write_text("1")
            (folder / "deep").mkdir()
            (folder / "deep" / "part").write_text("2")
            files.write_checksums(folder, leave_out=(".lock",))

    write()
    write(overwrite=True)
    for name in ("notes.txt", "part-2.bin", "deep/part-2.bin", "part-1.bin.bak", "new/notes"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"holds {name}, not written by this program"):
            write(overwrite=True)
        assert (target / name).read_text() == "mine"
        (target / name).unlink()
    (target / "link").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="holds link,"):
        write(overwrite=True)
    (target / "link").unlink()
    # An earlier version wrote no checksums: then names decide.
    (target / files.CHECKSUMS).unlink()
    with pytest.raises(FileExistsError, match="holds deep/part,"):
        write(overwrite=True)
    (target / "deep" / "part").unlink()
    write(overwrite=True)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    refused = pytest.raises(FileExistsError, match="holds notes.txt")
    with refused, files.new_directory(target, overwrite=True, known=known) as folder:
        (folder / "config.json").write_text("new")
        (target / "notes.txt").write_text("mine")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "notes.txt"]
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_of_the_user_beside_a_target_are_left_alone(tmp_path):
    (tmp_path / ".model.replaced-by-me").mkdir()
    (tmp_path / ".model.incomplete-draft").mkdir()
    with files.new_directory(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert len(list(tmp_path.iterdir())) == 3


def test_links_that_lead_to_themselves(tree):
    (tree / "loop").symlink_to("loop")
    (tree / "home" / "source" / "loop").symlink_to("loop")
    for given in (tree / "loop", tree / "loop" / "x"):
        with pytest.raises(ValueError, match="has a symbolic link that leads to itself"):
            paths.local_path(given)
    paths.check_apart("other", ["home/source"])


def test_two_processes_that_replace_one_directory(tmp_path, monkeypatch):
    """Without a lock, one removes or restores what the other is just renaming, and both end with errors.

    The processes are threads here, each with its own number, because a process of its own takes seconds to start.
    """
    monkeypatch.setattr(os, "getpid", threading.get_ident)

    def write(_):
        for _ in range(60):
            with files.new_directory(tmp_path / "model", overwrite=True) as directory:
                (directory / "config.json").write_text("{}")
                files.write_checksums(directory, leave_out=(".lock",))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert files.find_damage(tmp_path / "model") is None


def test_a_directory_that_another_process_is_creating_is_not_removed(tmp_path, monkeypatch):
    """It appears just after this process has looked for directories of killed runs, and is not locked yet."""
    look = files._stale

    def first_look(target, kind):
        found = look(target, kind)
        if kind == "incomplete" and not (tmp_path / ".model.incomplete-1").exists():
            (tmp_path / ".model.incomplete-1").mkdir()
            (tmp_path / ".model.incomplete-1" / ".lock").touch()
        return found

    monkeypatch.setattr(files, "_stale", first_look)
    with files.new_directory(tmp_path / "model") as directory:
        (directory / "config.json").write_text("{}")
    assert (tmp_path / ".model.incomplete-1" / ".lock").is_file()


def test_a_stopped_process_does_not_keep_others_waiting(tmp_path, monkeypatch):
    """Its lock is held by an open file here, which never lets go of it."""
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0.1)
    with open(tmp_path / ".model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with files.new_directory(tmp_path / "model") as directory:
            (directory / "config.json").write_text("{}")
        assert (tmp_path / ".model.lock").exists()  # it is not removed while another process holds it
    with files.new_directory(tmp_path / "model", overwrite=True) as directory:
        (directory / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
