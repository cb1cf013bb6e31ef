"""Whole documents as training data: every token is learned, and what is held out has not been read."""

import json

import numpy as np
import pytest

from dream_jax.data import (
    BatchOptions,
    EncodeOptions,
    ReadOptions,
    Row,
    TokenizedRows,
    encode_row,
    first_prompted,
    make_batches,
    open_mixture,
    open_source,
)
from dream_jax.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def documents(path, texts):
    path.write_text("".join(json.dumps({"text": text, "source": "made"}) + "\n" for text in texts))
    return path


def test_every_token_of_a_document_is_learned(tmp_path):
    file = documents(tmp_path / "texts.jsonl", ["abc", "de"])
    source = open_source(file, "train")
    (row,) = [source[index] for index in range(len(source))]
    encoded = encode_row(row, BYTES, 8)
    assert encoded.tokens.tolist() == [BYTES.bos_id, *row.response.encode(), BYTES.eos_id]
    # The first token has the left neighbour that it is predicted from, and nothing else is given.
    assert encoded.maskable.tolist() == [False] + [True] * (len(row.response) + 1)
    (held_out,) = [one.response for one in open_source(file, "test")]
    assert {held_out, row.response} == {"abc", "de"}


def test_documents_are_held_out_by_their_text(tmp_path):
    """They all have the same prompt, none: by that, no document could be held out."""
    texts = [f"text {number % 90}" for number in range(180)]
    file = documents(tmp_path / "texts.jsonl", texts)
    train, test = (open_source(file, split) for split in ("train", "test"))
    seen = {train[index].response for index in range(len(train))}
    kept = {test[index].response for index in range(len(test))}
    assert not seen & kept and seen | kept == set(texts)
    assert 2 <= len(kept) <= 9


def test_long_documents_are_cut_or_dropped(tmp_path):
    file = documents(tmp_path / "texts.jsonl", ["a" * 30, "b" * 4, "c" * 5])
    long = open_source(file, options=ReadOptions(held_out=0))[0]
    assert encode_row(long, BYTES, 16) is None
    cut = encode_row(long, BYTES, 16, EncodeOptions(length_policy="right"))
    assert cut.tokens.tolist() == [BYTES.bos_id] + [ord("a")] * 15


def test_batches_of_documents_hide_what_no_document_fills(tmp_path):
    file = documents(tmp_path / "texts.jsonl", [f"{number:03}" * (1 + number % 3) for number in range(40)])
    options = BatchOptions(eos_tail=0)
    rows = TokenizedRows(open_source(file), BYTES)
    with make_batches(rows, batch_size=8, max_length=16, seed=0, options=options) as batches:
        batch = next(batches)
    assert batch.valid_BT is not None
    lengths = batch.valid_BT.sum(axis=1)
    assert set(lengths.tolist()) <= {5, 8, 11}  # <|beginoftext|>, three bytes once to three times, end-of-text
    np.testing.assert_array_equal(batch.maskable_BT.sum(axis=1), lengths - 1)
    first = batch.tokens_BT[np.arange(8), 16 - lengths]
    assert (first == BYTES.bos_id).all()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": 3}, "'text' must be a string, not int 3"),
        ({"txet": "a"}, r"fields \['txet'\] match no known schema; .*'text' \(a whole document\)"),
    ],
)
def test_bad_documents(tmp_path, line, complaint):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=f"texts.jsonl:1: {complaint}"):
        open_source(file)


def test_a_row_with_a_text_beside_prompt_and_response_is_no_document(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"both p{n} and r", "prompt": f"p{n}", "response": "r"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_source(file)[0].response == "r"


def test_a_document_has_no_prompt():
    with pytest.raises(ValueError, match="a document must have an empty prompt, but this one has 'p'"):
        Row(prompt="p", response="r", document=True)


def test_a_mixture_is_asked_as_its_first_source_with_prompts(tmp_path):
    documents, chats = tmp_path / "documents.jsonl", tmp_path / "chats.jsonl"
    documents.write_text('{"text": "a text"}\n{"text": "another"}\n')
    chats.write_text('{"prompt": "1+1", "response": "2"}\n{"prompt": "1+2", "response": "3"}\n')
    for mixed, kind in (([documents, chats], tuple), ([documents, documents], str), (["sudoku", chats], str)):
        first = first_prompted(open_mixture([str(one) for one in mixed]))
        assert isinstance(first.prompt, kind) and first.document == (mixed == [documents, documents])
