"""bench/data.py: the data that it makes, and one start of each kind, in this process with bytes as tokens."""

import dataclasses
import json
import statistics

import pytest
from commands import ROOT, run_script

from dream_jax import tokenizer

ROWS = [
    {"question": "How many? " + "q" * (50 + 7 * n), "answer": "a" * (40 + 11 * n) + f" #### {n}"} for n in range(30)
]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; imports are found beside it, as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import data

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path: tokenizer.ByteTokenizer())
    return data


def test_the_data_are_as_long_as_they_say_and_the_same_every_time(bench, tmp_path):
    chats = list(bench.chats(ROWS, 40))
    assert chats == list(bench.chats(ROWS, 40)) and len({json.dumps(chat) for chat in chats}) == 40
    sizes = [sum(len(turn["content"]) for turn in chat["messages"]) for chat in chats]
    assert all(bench.CHARACTERS_OF_A_CHAT <= size < bench.CHARACTERS_OF_A_CHAT + 700 for size in sizes)
    assert {turn["role"] for turn in chats[0]["messages"]} == {"user", "assistant"}
    texts = [row["text"] for row in bench.texts(ROWS, 50_000)]
    assert 50_000 <= sum(map(len, texts)) < 80_000 and statistics.stdev(map(len, texts)) > 1000


@pytest.mark.parametrize("documents", [False, True])
def test_a_start_takes_batches_and_a_later_one_the_same(bench, tmp_path, documents):
    rows = (
        bench.texts(ROWS, 60_000)
        if documents
        else iter([{"messages": chat["messages"][:2]} for chat in bench.chats(ROWS, 60)])
    )
    file = bench.write(tmp_path / "rows.jsonl", rows)
    few = bench.first_lines(file, 3)
    assert len(few.read_text().splitlines()) == 3
    settings = bench.DataBenchSettings(
        assets=tmp_path, start=file, cache=str(tmp_path / "cache"), documents=documents, batches=1
    )
    first, later = bench.make_start(settings), bench.make_start(settings)
    same = ("rows", "tokens_of_the_batches", "digest")
    assert [first[name] for name in same] == [later[name] for name in same] and first["tokens_of_the_batches"] > 4000
    assert first["rows"] > bench.make_start(dataclasses.replace(settings, start=few))["rows"] == 3


def test_assets_are_asked_for(monkeypatch):
    monkeypatch.delenv("DREAM_JAX_ASSETS", raising=False)
    ended = run_script("bench/data.py")
    assert ended.returncode == 1 and "error: give --assets, the folder that holds data/gsm8k" in ended.stderr
