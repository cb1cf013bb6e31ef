"""What is asked of the Hugging Face hub, and when: never for a path, always within a deadline, with a line before."""

import contextlib
import pathlib
import socket
import threading
import time

import huggingface_hub
import huggingface_hub.constants
import pytest
from commands import run_script

from dream_jax import hub, pretrained
from dream_jax.data import open_source
from dream_jax.hub import HubId


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a/b", HubId("a/b")),
        ("a/b@v1.0", HubId("a/b", "v1.0")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("a", None),
        ("./a", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("../a", None),
        ("a/b@", None),
        ("a/b@-x", None),
    ],
)
def test_hub_ids(text, found):
    assert hub.parse_hub_id(text) == found
    assert found is None or str(found) == text


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Collects what is asked of the hub, in an empty folder; everything asked ends in a ConnectionError."""
    asked = []

    def ask(hub_id, kind):
        asked.append((str(hub_id), kind))
        raise ConnectionError("asked")

    monkeypatch.setattr(hub, "ask", ask)
    monkeypatch.chdir(tmp_path)
    return asked


def test_paths_are_not_asked_of_the_hub(asked, tmp_path):
    """A slip of the pen in an existing folder, and paths that cannot be hub ids."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "runs").write_text("a file")
    for name in ("weights/nothere", "runs/demo", "./org/name", str(tmp_path / "a"), "../org", "org", "a/b/c", "nanoo"):
        for look in (pretrained.load, pretrained.describe, pretrained.fingerprint, open_source):
            with pytest.raises((FileNotFoundError, ValueError), match=name.rpartition("/")[2]):
                look(name)
    for name, kind in (("weights/nothere", "folder weights"), ("runs/demo", "file runs")):
        with pytest.raises(FileNotFoundError, match=f"the hub was not asked, because there is a {kind} here"):
            pretrained.load(name)
    with pytest.raises(ValueError, match="is an address.*give the hub id alone, org/name"):
        pretrained.load("hf://org/name")
    with pytest.raises(FileNotFoundError, match="org.name does not exist"):
        pretrained.describe_adapter("org/name")
    assert asked == []


def test_hub_ids_are_asked_of_the_hub(asked):
    for look, kind in ((pretrained.describe, "model"), (open_source, "dataset")):
        for name in ("org/name", "org/name@v1"):
            with pytest.raises(ConnectionError):
                look(name)
            assert asked.pop() == (name, kind)


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py", "train.py"])
def test_a_revision_is_pinned(asked, script):
    more = {"sample.py": ("--prompt", "x"), "evaluate.py": (), "train.py": ("--out", "new")}[script]
    ended = run_script(script, "--model", "org/name", "--revision", "v1", *more)
    assert asked == [("org/name@v1", "model")] and "error: asked" in ended.stderr
    ended = run_script(script, "--model", "nano", "--revision", "v1", *more)
    assert ended.returncode and "revision=v1 is for a hub id" in " ".join((ended.stderr + ended.stdout).split())
    assert len(asked) == 1


def test_conversions_pin_a_revision_too(asked):
    for script in ("hf_to_flax", "flax_to_hf", "qwen2_to_dream"):
        ended = run_script(f"convert/{script}.py", "org/name", "new", "--revision", "v1")
        assert asked.pop() == ("org/name@v1", "model") and "error: asked" in ended.stderr, ended
    ended = run_script("convert/ar_to_dream.py", "new", "--from", "org/name", "--revision", "v1")
    assert asked.pop() == ("org/name@v1", "model") and "error: asked" in ended.stderr, ended


def test_a_revision_contradicts_another(asked):
    assert hub.pinned("org/name@v1", "v1") == "org/name@v1" and hub.pinned("org/name", None) == "org/name"
    for name, revision in (("org/name@v1", "v2"), ("weights", "v1"), ("org/name", "a b"), ("org/name", "-x")):
        with pytest.raises(ValueError, match="revision="):
            hub.pinned(name, revision)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@contextlib.contextmanager
def server(answer):
    """Accepts connections on a port, which is yielded, and calls `answer` for each; an answer of None says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    kept.append(connection)
                    if answer is not None:
                        threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)  # ends `accept`
        thread.join()
        for connection in kept:
            connection.close()


def trickle(connection):
    """Sends a byte of a header every now and then, so that the connection is never silent for long."""
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)


@pytest.mark.parametrize("answer", [None, trickle])
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_ends_in_an_error(online, monkeypatch, capsys, answer, kind):
    monkeypatch.setenv(hub.TIMEOUT_VARIABLE, "0.4")
    with server(answer) as port:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.4 s; .*DREAM_JAX_HUB_TIMEOUT"):
            hub.ask(HubId("org/name", "v1"), kind)
        assert time.monotonic() - begun < 2
    what = {"model": "model", "dataset": "data set"}[kind]
    assert (
        f"asking the Hugging Face hub, http://127.0.0.1:{port}, for the {what} org/name@v1" in capsys.readouterr().err
    )


def test_a_proxy_that_does_not_answer_ends_in_an_error(online, monkeypatch):
    monkeypatch.setenv(hub.TIMEOUT_VARIABLE, "0.4")
    monkeypatch.delenv("NO_PROXY")
    with server(None) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
        huggingface_hub.close_session()
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.4 s"):
            pretrained.describe("org/name")
        assert time.monotonic() - begun < 2


def test_requests_without_a_timeout_get_one(online, monkeypatch):
    """huggingface_hub gives most of its requests no timeout at all."""
    with server(None) as port:
        session = huggingface_hub.get_session()
        hub._limit_silence(session, 0.2)
        hub._limit_silence(session, 0.2)
        begun = time.monotonic()
        with pytest.raises(Exception, match="timed out"):
            session.get(f"http://127.0.0.1:{port}", timeout=None)
        assert 0.1 < time.monotonic() - begun < 2
        assert len(session.event_hooks["request"]) == 2  # that of the library, and ours once


def test_a_hub_that_cannot_be_reached_leaves_the_cache(online, monkeypatch, capsys):
    with server(None) as port:
        pass  # nobody listens any more
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    given = {}

    def snapshot_download(name, **options):
        given.update(options, name=name)
        return "in/the/cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.download(HubId("org/name", "v1"), ["*.json"]) == pathlib.Path("in/the/cache")
    assert given == {"name": "org/name", "revision": "v1", "allow_patterns": ["*.json"], "local_files_only": True}
    assert "cannot be reached" in capsys.readouterr().err


def test_a_repository_that_does_not_exist(online, monkeypatch):
    def answer(connection):
        connection.recv(1 << 16)
        head = b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(head)
        connection.close()

    with server(answer) as port:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(ConnectionError, match="the Hugging Face hub has no such model"):
            hub.ask(HubId("org/name"), "model")


def test_a_question_is_asked_once(online, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "_answered", set())
    for _ in range(2):
        assert hub.ask(HubId("org/name"), "model") is True
    assert capsys.readouterr().err.count("asking") == 1


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    assert hub.timeout() == 30
    monkeypatch.setenv(hub.TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"DREAM_JAX_HUB_TIMEOUT={text} is not"):
        hub.timeout()


def test_offline_asks_nothing(capsys):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # conftest.py sets it
    assert hub.ask(HubId("org/name"), "model") is False
    assert capsys.readouterr().err == ""
