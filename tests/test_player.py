"""The record of an answer, and the pages that show it: complete, small, and with every text as data."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_script

from dream_jax.player import pages
from dream_jax.player.record import Probable, answer_record
from dream_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
MASK, END = TOKENIZER.mask_id, TOKENIZER.eos_id


def record(prompt: list[int], tokens: list[int], commit_step: list[int], **options: Any) -> dict[str, Any]:
    words = {"model": "nano", "prompt_text": "2+2=", "text": "4", "forwards": 3, "settings": {"seed": 0}}
    return answer_record(TOKENIZER, prompt, np.array(tokens), np.array(commit_step), **(words | options))


def written(made: dict[str, Any]) -> list[tuple[int, str, int]]:
    return [(entry["position"], entry["text"], entry["step"]) for entry in made["tokens"]]


def scripts(page: str) -> list[str]:
    return re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)


def test_record_of_a_prompt() -> None:
    prompt = [*b"2+2="]
    made = record(prompt, [*prompt, *b"4\n", END], [-1] * 4 + [2, 0, 0])
    assert made["prompt"] == "2+2=" and made["parts"] == [{"length": 3}] and made["forced"] == []
    assert written(made) == [(1, "\n", 0), (2, "<|endoftext|>", 0), (0, "4", 2)]


def test_record_of_a_text_with_gaps() -> None:
    """The given text is part of the canvas; positions count the tokens of all gaps."""
    prompt = [*b"a", MASK, MASK, *b"bc", MASK]
    made = record(prompt, [*b"aXYbcZW"], [-1, 1, 0, -1, -1, 3, 2])
    assert made["prompt"] == "" and made["parts"] == ["a", {"length": 2}, "bc", {"length": 2}]
    assert written(made) == [(1, "Y", 0), (0, "X", 1), (3, "W", 2), (2, "Z", 3)]


def test_record_without_prompt_and_with_forced_and_unwritten_tokens() -> None:
    made = record([], [*b"ab", MASK], [0, -1, -1])
    assert made["parts"] == [{"length": 3}]
    assert written(made) == [(0, "a", 0)]
    assert [(entry["position"], entry["text"]) for entry in made["forced"]] == [(1, "b")]


def test_record_of_confidences_and_runner_ups() -> None:
    probable = Probable(
        2,
        logprob=np.log([0.5, 1.0, np.nan]),
        tokens=np.array([[*b"xyz"], [*b"bxy"], [*b"xyz"]]),
        logprobs=np.array([[-1.0, -2.0, -3.0], [0.0, -np.inf, -np.inf], [np.nan] * 3]),
    )
    tokens, steps = [*b"yb", END], [0, 1, 1]
    made = record([], tokens, steps, confidence=np.array([0.123456, 1.0, np.nan]), probable=probable)
    first, second, third = made["tokens"]
    assert first["confidence"] == 0.1235 and first["logprob"] == -0.6931
    # The token itself is no runner-up, whatever its rank.
    others = [{"token": 120, "text": "x", "logprob": -1.0}, {"token": 122, "text": "z", "logprob": -3.0}]
    assert first["runner_ups"] == others
    assert second["runner_ups"] == [] and second["logprob"] == 0.0  # forbidden tokens have no probability
    assert third["confidence"] is None and third["logprob"] is None and third["runner_ups"] == []
    assert pages.record_of(pages.replay_page(made)) == made


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>&lt;&amp;",
    "\u2028\u2029\x00\r\n\\\"'`${1}",
    "{{player.js}}{{record}}",
    "\ud800 half a pair",
    "你好 🌻",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_data_of_the_page(text: str) -> None:
    made = record([], [*b"a"], [0], model=text, prompt_text=text, text=text, settings={text: text})
    made["tokens"][0]["text"] = text
    page = pages.replay_page(made)
    page.encode()
    assert pages.record_of(page) == made
    assert len(scripts(page)) == 3  # the record, the player, the page around it
    assert scripts(page)[1:] == scripts(pages.replay_page(record([], [*b"a"], [0])))[1:]


@pytest.mark.parametrize(
    "page", [pages.chat_page(), pages.replay_page(record([], [*b"a"], [0]))], ids=["chat", "replay"]
)
def test_pages_need_nothing_from_elsewhere(page: str) -> None:
    assert "{{" not in page
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\son\w+=", markup), "an inline handler, which the policy of the server forbids"
    assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(|\bimport\b|\beval\(|new Function", page)
    assert re.findall(r'href="([^"]*)"', markup) == ["data:,"]
    # The only ways in which a text becomes a node of the page.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc", page)


def test_the_policy_of_a_replay_allows_its_own_scripts_only() -> None:
    page = pages.replay_page(record([], [*b"a"], [0]))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts(page)[1:]]
    assert "default-src 'none'" in policy and "connect-src" not in policy
    assert re.findall(r"'sha256-([^']*)'", policy) == sums


def test_512_tokens_with_runner_ups_are_less_than_300_kb() -> None:
    made = record([], [0x41] * 512, list(range(512)))
    others = [{"token": 150_000 + number, "text": " 你好" * 2, "logprob": -12.345} for number in range(5)]
    for entry in made["tokens"]:
        entry |= {"confidence": -1.2345, "logprob": -0.1234, "runner_ups": others}
    assert len(pages.replay_page(made).encode()) < 300_000


def test_numbers_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        pages.replay_page(record([], [*b"a"], [0], settings={"eps": float("nan")}))


def test_a_replay_replaces_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answer.html"
    pages.write_replay(path, record([], [*b"a"], [0]))
    first = path.read_bytes()
    assert pages.record_of(first.decode())["tokens"][0]["text"] == "a"
    with pytest.raises(FileExistsError, match="answer.html is there already; remove it"):
        pages.write_replay(path, record([], [*b"b"], [0]))
    assert path.read_bytes() == first
    dangling = tmp_path / "link.html"
    dangling.symlink_to(tmp_path / "elsewhere.html")
    with pytest.raises(FileExistsError):
        pages.check_replay_file(dangling)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        pages.check_replay_file(tmp_path / "file" / "answer.html")


@pytest.mark.parametrize("source", [("--chat",), ("--prompts", "p.jsonl", "--out", "o.jsonl")])
def test_a_replay_is_of_one_prompt(source: tuple[str, ...]) -> None:
    refused = run_script("sample.py", "--model", "nano", *source, "--replay", "new.html")
    assert refused.returncode == 2 and "--replay new.html is for the answer" in refused.stderr


REPLAYS = sorted((Path(__file__).parent.parent / "docs" / "replays").glob("*.html"))


def test_replays_of_the_docs_have_the_player_as_it_is() -> None:
    assert {path.stem for path in REPLAYS} == {"sudoku", "text"}
    for path in REPLAYS:
        page = path.read_text(encoding="utf-8")
        assert pages.replay_page(pages.record_of(page)) == page, f"{path.name} is old: run python docs/write_replays.py"


def test_a_page_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="no record of an answer"):
        pages.record_of(pages.chat_page())
