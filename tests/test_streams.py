"""Streaming the first rows of a hub data set: only by name, into a file, within the time limit, whole or not at all."""

import time
from pathlib import Path

import datasets
import pytest

from dream_jax import hub
from dream_jax.data import ReadOptions, open_source
from dream_jax.data.streams import HubStream
from dream_jax.hub import HubId
from dream_jax.trainer import TrainSettings

NAME = "somebody/corpus"
STREAM = ReadOptions(stream_rows=7, held_out=0)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Makes the hub a stand-in that has 20 rows of "train" and 3 of "validation"; returns what it was asked for."""
    found = []

    def rows(name, count):
        return datasets.Dataset.from_list(
            [{"text": f"{name} {n}", "score": n} for n in range(count)]
        ).to_iterable_dataset()

    def load_dataset(*names, revision, streaming):
        assert streaming
        found.append((*names, revision))
        return datasets.IterableDatasetDict({"train": rows("train", 20), "validation": rows("validation", 3)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "ask", lambda hub_id, kind: True)
    monkeypatch.setenv("DREAM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return found


def texts(options=STREAM, split="train", name=NAME):
    source = open_source(name, split, options=options)
    return [source[number].response for number in range(len(source))]


def test_the_first_rows_are_streamed_once(asked, tmp_path, monkeypatch, capsys):
    wanted = [f"train {n}" for n in range(7)]
    stream = HubStream(HubId(NAME, None), None, 7, tmp_path / "cache" / "streams")
    left = stream._path("train").with_name(f".{stream._path('train').name}.incomplete-1")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a process that was killed")
    assert texts() == wanted and asked == [(NAME, None, None)]
    assert f"streamed 7 rows of {NAME}, train, into" in capsys.readouterr().err
    monkeypatch.setattr(hub, "ask", lambda *_: pytest.fail("the hub was asked again"))
    assert texts() == wanted and len(asked) == 1
    assert open_source(NAME, options=STREAM).intake.unread == {"score": 7}
    assert not left.exists()
    assert {path.suffix for path in (tmp_path / "cache" / "streams").iterdir()} == {".json", ".parquet"}


def test_splits_revisions_and_configurations(asked):
    both = ReadOptions(stream_rows=7, test_split="validation", config="small")
    assert texts(both, "test", f"{NAME}@v1") == [f"validation {n}" for n in range(3)]
    assert len(texts(both, "train", f"{NAME}@v1")) == 7 and set(asked) == {(NAME, "small", "v1")}
    held_out = ReadOptions(stream_rows=7)
    assert len(texts(held_out)) == 6 and len(texts(held_out, "test")) == 1
    with pytest.raises(ValueError, match=r"has the splits \['train', 'validation'\], and none is called other"):
        texts(ReadOptions(stream_rows=7, split="other"))


def test_a_split_that_the_hub_no_longer_has_is_named(asked, tmp_path, monkeypatch):
    assert len(texts()) == 7

    def load_dataset(*names, revision, streaming):
        return datasets.IterableDatasetDict(
            {"train": datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    remedy = r"had the split 'validation' when .*\.json was written, and has only \['train'\] now; remove this file"
    with pytest.raises(ValueError, match=remedy):
        texts(ReadOptions(stream_rows=7, split="validation"))
    assert texts() == [f"train {n}" for n in range(7)]


def test_a_hub_that_falls_silent_or_fails_leaves_nothing(asked, tmp_path, monkeypatch):
    def endless(*names, revision, streaming):
        def rows():
            yield from ({"text": str(n)} for n in range(300))
            time.sleep(5)
            yield {"text": "late"}

        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows)})

    monkeypatch.setattr(datasets, "load_dataset", endless)
    monkeypatch.setenv(hub.TIMEOUT_VARIABLE, "1.5")
    with pytest.raises(
        ConnectionError, match=r"sent no rows of somebody/corpus within 1.5 s; check the network, or set"
    ):
        texts(ReadOptions(stream_rows=1000))

    def broken(*names, revision, streaming):
        raise RuntimeError("the server is\nbroken")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(
        ConnectionError, match=r"could not be streamed from the Hugging Face hub: the server is broken; leave"
    ):
        texts(ReadOptions(stream_rows=1001))
    monkeypatch.setattr(hub, "ask", lambda *_: False)
    with pytest.raises(
        ConnectionError, match=r"rows of somebody/corpus are not in .*streams, and the hub cannot be reached"
    ):
        texts(ReadOptions(stream_rows=1002))
    assert not list((tmp_path / "cache" / "streams").glob("*.parquet")) + list(
        (tmp_path / "cache").rglob("*incomplete*")
    )


def test_only_the_hub_is_streamed(asked, tmp_path):
    Path("a.jsonl").write_text('{"text": "a"}\n')
    for name in ("a.jsonl", "sudoku", str(tmp_path), "*.jsonl", "s1k"):
        with pytest.raises(
            ValueError, match="--stream-rows 7 streams a data set of the hub, organisation/name, but --data is"
        ):
            open_source(name, options=STREAM)
    with pytest.raises(ValueError, match="stream_rows=0 must be at least 1"):
        TrainSettings.flat(stream_rows=0)
    assert not asked
