"""Whole documents as training data: every token is learned, and what is held out has not been read."""

import json
from collections import Counter

import numpy as np
import pytest

from dream_jax.data import (
    BatchOptions,
    EncodeOptions,
    ReadOptions,
    Row,
    RowList,
    TokenCache,
    TokenizedRows,
    encode_row,
    find_cache,
    first_prompted,
    make_batches,
    open_mixture,
    open_source,
)
from dream_jax.data.documents import cut, split
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import TrainSettings

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


# --- Documents that are longer than a row ---

CUT = BatchOptions(pack=True, eos_tail=0, pack_by="cut")
FIT = BatchOptions(pack=True, eos_tail=0)
SPLIT = EncodeOptions(length_policy="split")


def lengthy(count, seed=0):
    """Returns documents of 3 to about 90 tokens, no two of which have a byte in the same place in common."""
    sizes = np.random.default_rng(seed).integers(1, 90, count)
    return RowList(
        [Row(prompt="", response=chr(33 + n % 90) * int(size), document=True) for n, size in enumerate(sizes)]
    )


def epoch_of(source, options, width, batch_size, count, **shares):
    with make_batches(
        TokenizedRows(source, BYTES, SPLIT),
        batch_size=batch_size,
        max_length=width,
        seed=3,
        options=options,
        num_threads=0,
        **shares,
    ) as batches:
        return [next(batches) for _ in range(count)]


def parts_of(batch):
    """Yields the tokens and what may be masked of every text of a batch, and the index of the text."""
    for row, texts in enumerate(batch.length_BM):
        ends = np.cumsum(texts)
        for size, end, number in zip(texts, ends, batch.text_BM[row], strict=True):
            if size:
                chosen = slice(end - size, end)
                yield batch.tokens_BT[row, chosen].tolist(), batch.maskable_BT[row, chosen].tolist(), int(number)


@pytest.mark.parametrize("options", [CUT, FIT, BatchOptions(pack=True, eos_tail=2)], ids=["cut", "fit", "tail"])
@pytest.mark.parametrize("width", [4, 16, 200])
def test_an_epoch_has_every_token_of_every_document_once(options, width):
    """The first token of each part is given, all others are learned, and no part has fewer than two tokens."""
    source = lengthy(60)
    found, count = [], 0
    batches = epoch_of(source, options, width, 1, 3000 // width + 900 // width)
    wanted = sorted([BYTES.bos_id, *source[n].response.encode(), BYTES.eos_id] for n in range(60))
    total = sum(map(len, wanted))
    for batch in batches:
        assert batch.tokens_BT.shape == (1, width)
        for tokens, maskable, _ in parts_of(batch):
            assert len(tokens) >= 2 and maskable == [False] + [True] * (len(tokens) - 1)
            while options.eos_tail and tokens[-2:] == [BYTES.eos_id] * 2:
                tokens = tokens[:-1]
            found.append(tokens)
            count += len(tokens)
        if count >= total:
            break
    assert count == total
    begins = Counter(tokens[1] for tokens in found if tokens[0] == BYTES.bos_id)
    assert begins == Counter(tokens[1] for tokens in wanted)
    assert Counter(t for tokens in found for t in tokens) == Counter(t for tokens in wanted for t in tokens)


@pytest.mark.parametrize("width", [4, 5, 7, 64])
def test_parts_cover_their_documents(width):
    sizes = np.random.default_rng(width).integers(3, 5 * width, 300).tolist()
    for rows in ([[part] for part in split(sizes, width)], cut(sizes, width, 3), cut(sizes, width, 64)):
        reached = [0] * len(sizes)
        for row in rows:
            assert len(row) >= 1 and sum(part.size for part in row) <= width
            for part in row:
                assert part.start == reached[part.document] and part.size >= 2
                reached[part.document] += part.size
        assert reached == sizes
    # Nothing but positions for which there is no part of two tokens stays empty, except after the last document.
    filled = [sum(part.size for part in row) for row in cut(sizes, width, 64)]
    assert min(filled[:-1]) >= width - 2 and sum(filled[:-1]) > (width - 1) * (len(filled) - 1)


@pytest.mark.parametrize("options", [CUT, FIT], ids=["cut", "fit"])
def test_divided_documents_resume_and_are_shared_among_processes(options):
    source, width = lengthy(300), 32
    whole = epoch_of(source, options, width, 8, 12)
    shares = [epoch_of(source, options, width, 8, 12, process_index=index, process_count=2) for index in (0, 1)]
    for batch, *halves in zip(whole, *shares, strict=True):
        for index, half in enumerate(halves):
            for name in ("tokens_BT", "maskable_BT", "length_BM", "text_BM", "row_B"):
                np.testing.assert_array_equal(getattr(batch, name)[index::2], getattr(half, name))
        numbers = [number for _, _, number in parts_of(batch)]
        assert numbers == list(range(len(numbers)))  # the noise of a text depends on this number
    rows = TokenizedRows(source, BYTES, SPLIT)
    with make_batches(rows, batch_size=8, max_length=width, seed=3, options=options) as first:
        for _ in range(5):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        share = first.outlook(4)
    with make_batches(rows, batch_size=8, max_length=width, seed=3, options=options) as second:
        second.set_state(state)
        np.testing.assert_array_equal(next(second).tokens_BT, whole[5].tokens_BT)
    other = CUT if options is FIT else FIT
    with (
        make_batches(rows, batch_size=8, max_length=width, seed=3, options=other) as third,
        pytest.raises(ValueError, match="packing was (cut|best fit), now (cut|best fit)"),
    ):
        third.set_state(state)
    assert share.padding_share < (0.005 if options is CUT else 0.05) and 0 < share.eos_share < 0.05
    positions = sum(len(source[n].response) + 2 for n in range(300))
    assert share.epochs == pytest.approx(4 * 8 * width * (1 - share.padding_share) / positions)


def test_what_divides_no_documents(tmp_path):
    with pytest.raises(ValueError, match="length_policy='split' .* give --pack --eos-tail 0 as well"):
        TrainSettings.flat(length_policy="split", max_length=64)
    with pytest.raises(ValueError, match="--pack-by cut.* but length_policy='filter': give --length-policy split"):
        TrainSettings.flat(pack=True, eos_tail=0, pack_by="cut", max_length=64)
    with pytest.raises(ValueError, match="is a way to pack texts: give --pack as well"):
        BatchOptions(pack_by="cut")
    with pytest.raises(ValueError, match=r"eos_tail=3: give --eos-tail 0"):
        BatchOptions(pack=True, pack_by="cut", eos_tail=3)
    rows = [
        Row(prompt="", response="a" * 50, document=True),
        Row(prompt="pq", response="r" * 9),
        Row(prompt="pq", response="r" * 99),
    ]
    mixed = TokenizedRows(RowList(rows), BYTES, SPLIT)
    with pytest.raises(ValueError, match=r"is for documents only, but row 1 has a prompt: leave --pack-by out"):
        make_batches(mixed, batch_size=1, max_length=16, seed=0, options=CUT)
    with make_batches(mixed, batch_size=1, max_length=16, seed=0, options=FIT, num_threads=0) as batches:
        assert batches.report.reasons == {"longer than max_length": 1} and batches.report.kept == 2
        texts = [tokens for _ in range(4) for tokens, _, _ in parts_of(next(batches))]
    assert sorted(map(len, texts)) == [4, 12, 16, 16, 16] and [*b"pqrrrrrrrrr", BYTES.eos_id] in texts
    # What is held out is evaluated in rows of its own: of a long document, its beginning.
    (_, row), _ = mixed.first(2, 16)
    assert row.length == 16 and row.tokens[0] == BYTES.bos_id and not row.whole
    with pytest.raises(ValueError, match="max_length=3 is too small to divide documents; give at least 4"):
        make_batches(mixed, batch_size=1, max_length=3, seed=0, options=FIT)


@pytest.mark.parametrize("options", [CUT, FIT], ids=["cut", "fit"])
def test_divided_documents_from_a_store(tmp_path, options):
    file = documents(tmp_path / "texts.jsonl", [f"{n} " * int(n % 37 + 1) for n in range(80)])
    found = []
    for setting in ("off", str(tmp_path / "cache")):
        rows = TokenCache(find_cache(setting), BYTES, SPLIT).open([str(file)])
        with make_batches(rows, batch_size=4, max_length=24, seed=1, options=options, num_threads=0) as batches:
            found.append(([next(batches) for _ in range(6)], batches.report))
    (memory, report), (stored, same) = found
    assert report == same and report.longest > 24 and report.cut == report.dropped == 0
    for one, other in zip(memory, stored, strict=True):
        np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)
        np.testing.assert_array_equal(one.length_BM, other.length_BM)
