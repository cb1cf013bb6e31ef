"""Masks are values: each one looks like its drawing, travels through jit, and composes with the others."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from dream_jax import masks

# What each docstring says it draws.
DRAWN = [
    masks.Bidirectional(),
    masks.KeyPadding(np.array([[False, True, True]])),
    masks.KeyLengths(np.array([2])),
    masks.Segments(np.array([[1, 1, 2]]), np.array([[1, 1, 2]])),
    masks.Packed(np.array([[2, 1]])),
    masks.Causal(),
    masks.Ordered(np.array([[0, 1, 0]]), np.array([[0, 1, 0]])),
    masks.Prefix(np.array([2])),
    masks.BlockCausal(2),
    masks.SlidingWindow(1, 0),
    masks.BlockDiffusion(2, np.array([1])),
    masks.TwoStream(2, np.array([1])),
    masks.OrderedBlocks(np.array([[0, 1, 1]]), np.array([[0, 1, 1]]), 2),
    masks.OrderedStreams(np.array([[0, 1]]), 1),
    masks.Annealed(np.array([[False, False, False], [True, True, True], [False, False, True]])),
    masks.Causal() & masks.SlidingWindow(1, 1),
    masks.Causal() | masks.KeyLengths(np.array([2])),
    ~masks.Causal(),
    masks.Causal().at(np.array([[2, 0, 0]])),
    masks.Causal().only(np.array([[0, 2, 1]]), 3),
]


def test_only_some_tokens_of_each_row():
    """Every mask of some tokens is that of all tokens, without the other lines and columns."""
    position = np.array([[4, 0, 2], [1, 1, 3]])
    for mask in (
        masks.Bidirectional(),
        masks.Causal() & masks.KeyPadding(np.array([[True] * 5, [False, *[True] * 4]])),
        masks.SlidingWindow(1, 1) | masks.Prefix(np.array([1, 2])),
        ~masks.BlockDiffusion(2, np.array([1, 0])),
    ):
        whole = np.broadcast_to(mask.dense(5, 5), (2, 5, 5))
        wanted = np.stack([rows[at][:, at] for rows, at in zip(whole, position, strict=True)])
        np.testing.assert_array_equal(np.broadcast_to(mask.only(position, 5).dense(3, 3), (2, 3, 3)), wanted)
    assert isinstance(masks.Bidirectional().only(position, 5), masks.Bidirectional)
    with pytest.raises(ValueError, match="is for 3 tokens of each row, but there are 4 keys"):
        masks.Causal().only(position, 5).dense(4, 4)


def named(mask):
    return type(mask).__name__


def test_every_mask_is_drawn():
    kinds = {kind for _, kind in inspect.getmembers(masks, inspect.isclass) if issubclass(kind, masks.Mask)}
    assert kinds - {masks.Mask} == {type(mask) for mask in DRAWN}


@pytest.mark.parametrize("mask", DRAWN, ids=named)
def test_mask_looks_like_its_drawing(mask):
    drawing = re.findall(r"^ *([#.]+)$", inspect.getdoc(type(mask)), re.MULTILINE)
    assert len(drawing) >= 3
    assert mask.draw(len(drawing)) == "\n".join(drawing)


@pytest.mark.parametrize("mask", DRAWN, ids=named)
def test_mask_is_a_pytree(mask):
    length = 4 if isinstance(mask, masks.TwoStream | masks.OrderedStreams) else 3
    leaves, structure = jax.tree.flatten(mask)
    assert type(jax.tree.unflatten(structure, leaves)) is type(mask)
    dense = jax.jit(lambda mask: mask.dense(length, length))(mask)
    assert dense.dtype == bool
    np.testing.assert_array_equal(dense, mask.dense(length, length))
    assert dense.shape[-1] == length


def test_bidirectional_is_all_true_for_any_shape():
    assert np.all(masks.Bidirectional().dense(4, 7))
    assert masks.Bidirectional().draw(2, 5) == "#####\n#####"


def test_key_padding_hides_keys_of_its_row_only():
    valid = np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool)
    dense = np.broadcast_to(masks.KeyPadding(valid).dense(3, 4), (2, 3, 4))
    for row in range(2):
        for query in range(3):
            np.testing.assert_array_equal(dense[row, query], valid[row])
    assert masks.KeyPadding(valid).draw(2, 4, row=1) == "..##\n..##"


def test_key_lengths_hide_what_lies_past_the_end():
    lengths = np.array([0, 2, 4, 9])
    dense = np.broadcast_to(masks.KeyLengths(lengths).dense(3, 4), (4, 3, 4))
    for row, query, key in np.ndindex(4, 3, 4):
        assert dense[row, query, key] == (key < lengths[row])
    np.testing.assert_array_equal(
        masks.KeyLengths(lengths).dense(3, 4), masks.KeyPadding(np.arange(4) < lengths[:, None]).dense(3, 4)
    )
    # A narrow dtype does not count keys in it.
    np.testing.assert_array_equal(masks.KeyLengths(np.array([100], np.int8)).dense(1, 300)[0, 0], np.arange(300) < 100)


def test_segments_see_themselves():
    query, key = np.array([[1, 1, 2, 0], [3, 1, 1, 3]]), np.array([[1, 2, 2, 0], [3, 3, 1, 0]])
    dense = masks.Segments(query, key).dense(4, 4)
    assert dense.shape == (2, 4, 4)
    for row, i, j in np.ndindex(2, 4, 4):
        assert dense[row, i, j] == (query[row, i] == key[row, j])
    # Ids for queries and keys need not be equally many.
    assert masks.Segments(query[:, :2], key).draw(2, 4) == "#...\n#..."


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "message"),
    [
        (masks.KeyPadding(jnp.ones((1, 3), bool)), 3, 4, "is for 3 keys, but there are 4 keys"),
        (
            masks.Segments(jnp.ones((1, 3), int), jnp.ones((1, 3), int)),
            3,
            4,
            "for 3 queries and 3 keys, but there are",
        ),
        (masks.Segments(jnp.ones((1, 3), int), jnp.ones((1, 3), int)), 2, 3, "2 queries and 3 keys$"),
    ],
)
def test_mask_of_another_length_raises(mask, queries, keys, message):
    with pytest.raises((ValueError, TypeCheckError), match=message):
        mask.dense(queries, keys)


def test_causal_needs_its_own_keys():
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        masks.Causal().dense(2, 3)


def test_annealing_goes_from_causal_to_bidirectional():
    causal = np.asarray(masks.Causal().dense(64, 64))
    for share in (0.0, 0.25, 1.0):
        drawn = masks.anneal(jax.random.key(0), share, 64)
        dense = np.asarray(masks.Annealed(drawn).dense(64, 64))
        assert dense[causal].all()
        assert dense[~causal].mean() == pytest.approx(share, abs=0.03)
    with pytest.raises(ValueError, match=r"has shape \(64, 64\), but there are 32 tokens"):
        masks.Annealed(drawn).dense(32, 32)


# --- the family, against its definition in words

ROWS, LENGTH = 2, 8


def block(token, row, size, start):
    """The number of the block of a token of block diffusion, counted one block at a time."""
    number, end = -1, 0 if start is None else start[row]
    while token >= end:
        number, end = number + 1, end + size
    return number


def sees(mask, row, query, key, length=LENGTH):
    """Whether a query may attend to a key, told one pair at a time."""
    match mask:
        case masks.And(left, right):
            return sees(left, row, query, key) and sees(right, row, query, key)
        case masks.Or(left, right):
            return sees(left, row, query, key) or sees(right, row, query, key)
        case masks.Not(inner):
            return not sees(inner, row, query, key)
        case masks.Bidirectional():
            return True
        case masks.KeyPadding(valid):
            return bool(valid[row, key])
        case masks.KeyLengths(lengths):
            return key < lengths[row]
        case masks.Segments(ids, _):
            return ids[row, query] == ids[row, key]
        case masks.Causal():
            return key <= query
        case masks.Prefix(end):
            return key <= query or key < end[row]
        case masks.BlockCausal(size, start):
            begin = 0 if start is None else start[row]
            # The last position of the query's block.
            last = next(at for at in range(query, query + size) if (at + 1 - begin) % size == 0)
            return key <= last
        case masks.SlidingWindow(left, right):
            return query - left <= key <= query + right
        case masks.BlockDiffusion(size, start):
            return block(key, row, size, start) <= block(query, row, size, start)
        case masks.TwoStream(size, start):
            half = length // 2
            (noised_q, q), (noised_k, k) = ((at < half, block(at % half, row, size, start)) for at in (query, key))
            if noised_q:
                return q == k if noised_k else k < q
            return not noised_k and k <= q
    raise AssertionError(mask)


def arrays(elements, *shape):
    count = int(np.prod(shape))
    return st.lists(elements, min_size=count, max_size=count).map(lambda found: np.array(found).reshape(shape))


small = st.integers(0, LENGTH)
ids = arrays(st.integers(0, 2), ROWS, LENGTH)
of_rows = st.one_of(
    arrays(st.booleans(), ROWS, LENGTH).map(masks.KeyPadding),
    arrays(small, ROWS).map(masks.KeyLengths),
    ids.map(lambda found: masks.Segments(found, found)),
    arrays(small, ROWS).map(masks.Prefix),
    st.builds(masks.BlockCausal, st.integers(1, LENGTH), arrays(small, ROWS)),
    st.builds(masks.BlockDiffusion, st.integers(1, LENGTH), arrays(small, ROWS)),
    st.builds(masks.TwoStream, st.integers(1, LENGTH), arrays(small, ROWS)),
)
fixed = st.one_of(
    st.just(masks.Bidirectional()),
    st.just(masks.Causal()),
    st.builds(masks.BlockCausal, st.integers(1, LENGTH)),
    st.builds(masks.SlidingWindow, small, small),
    st.builds(masks.BlockDiffusion, st.integers(1, LENGTH)),
    st.builds(masks.TwoStream, st.integers(1, LENGTH)),
)
composed = st.recursive(
    fixed | of_rows,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=4,
)


def table(mask):
    return np.array(
        [[[sees(mask, row, i, j) for j in range(LENGTH)] for i in range(LENGTH)] for row in range(ROWS)], bool
    )


@settings(max_examples=60, deadline=None)
@given(mask=composed, positions=arrays(st.integers(0, LENGTH - 1), ROWS, 3))
def test_drawing_array_and_definition_are_one(mask, positions):
    wanted = table(mask)
    dense = np.broadcast_to(mask.dense(LENGTH, LENGTH), wanted.shape)
    np.testing.assert_array_equal(dense, wanted)
    for row in range(ROWS if dense.shape == mask.dense(LENGTH, LENGTH).shape else 1):
        drawing = "\n".join("".join(".#"[seen] for seen in line) for line in wanted[row].astype(int))
        assert mask.draw(LENGTH, row=row) == drawing
    # And for some of the tokens as queries.
    some = np.broadcast_to(mask.at(positions).dense(3, LENGTH), (ROWS, 3, LENGTH))
    np.testing.assert_array_equal(some, np.take_along_axis(wanted, positions[:, :, None], axis=1))
    conjunction = np.ones_like(wanted)
    for part in masks.conjuncts(mask):
        conjunction &= np.broadcast_to(part.dense(LENGTH, LENGTH), wanted.shape)
    np.testing.assert_array_equal(conjunction, wanted)


def test_masks_that_add_nothing_leave_the_others_as_they_are():
    every, causal = masks.Bidirectional(), masks.Causal()
    assert every & causal is causal
    assert causal & every is causal
    assert every | causal == causal | every == every
    assert ~~causal is causal
    assert masks.conjuncts(every) == ()
    assert masks.conjuncts(causal & masks.SlidingWindow(1, 0) & causal) == (causal, masks.SlidingWindow(1, 0), causal)
    padding = masks.KeyPadding(np.ones((1, 2), bool))
    assert padding.at(np.zeros((1, 1), int)) is padding
    assert masks.is_fixed(causal & ~masks.BlockCausal(2))
    assert not masks.is_fixed(causal & padding)


PLACED = [masks.Bidirectional(), masks.Causal(), masks.Prefix(), masks.BlockCausal(3), masks.SlidingWindow(2, 1)]
PLACED += [masks.Prefix() & masks.SlidingWindow(4, 4), masks.BlockCausal(3) | masks.Prefix(), ~masks.BlockCausal(3)]
PLACED += [masks.BlockDiffusion(2)]


@pytest.mark.parametrize("mask", PLACED, ids=named)
def test_mask_counts_from_the_first_real_token(mask):
    """Padding on either side moves a row's mask with the row."""
    length, prompt = 7, 3
    alone = mask.for_rows(np.ones((1, length), bool), np.arange(length)[None] >= prompt)
    wanted = np.broadcast_to(alone.dense(length, length), (1, length, length))[0]
    if isinstance(mask, masks.Prefix):
        assert wanted[0].sum() == prompt
    for left, right in [(0, 2), (1, 1), (2, 0), (5, 3)]:
        total = left + length + right
        valid = (np.arange(total) >= left) & (np.arange(total) < left + length)
        answer = np.arange(total) >= left + prompt
        whole = mask.for_rows(valid[None], answer[None]) & masks.KeyPadding(valid[None])
        found = np.broadcast_to(whole.dense(total, total), (1, total, total))[0]
        np.testing.assert_array_equal(found[left : left + length, left : left + length], wanted)
        assert not found[:, ~valid].any()


def test_row_without_an_answer_is_all_prompt():
    mask = masks.Prefix().for_rows(np.ones((2, 3), bool), np.array([[False] * 3, [True] * 3]))
    assert mask.draw(3, row=0) == "###\n###\n###"
    assert mask.draw(3, row=1) == masks.Causal().draw(3)
    with pytest.raises(ValueError, match="needs the ends of the prompts"):
        masks.Prefix().dense(3, 3)


def test_block_sizes_go_from_causal_to_bidirectional():
    assert masks.BlockCausal(1).draw(5) == masks.Causal().draw(5)
    assert masks.BlockDiffusion(1, np.array([2])).draw(5) == masks.Prefix(np.array([2])).draw(5)
    assert masks.BlockDiffusion(2).draw(5) == masks.BlockCausal(2).draw(5)
    assert masks.BlockCausal(5).draw(5) == masks.Bidirectional().draw(5)
    assert masks.SlidingWindow(5, 5).draw(5) == masks.Bidirectional().draw(5)


def test_two_streams_see_what_decoding_block_by_block_sees():
    """A noised block sees itself, and as clean tokens what a block-causal row sees before it."""
    half, size = 6, 2
    dense = np.asarray(masks.TwoStream(size).dense(2 * half, 2 * half))[0]
    blocks = np.asarray(masks.BlockCausal(size).dense(half, half))[0]
    own = blocks & blocks.T
    np.testing.assert_array_equal(dense[:half, :half], own)
    np.testing.assert_array_equal(dense[:half, half:], blocks & ~own)
    np.testing.assert_array_equal(dense[half:, half:], blocks)
    assert not dense[half:, :half].any()


def test_two_streams_of_rows_and_of_packed_texts():
    """The mask of both halves is the one that BlockDiffusion, padding and texts say, block by block."""
    size, lengths, prompts = 2, [5, 4], [2, 0]
    total = sum(lengths) + 1
    position = np.concatenate([np.arange(length) for length in (*lengths, 1)])[None]
    answer = np.concatenate([np.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)] + [[False]])[None]
    packed = masks.BlockDiffusion(size).for_texts(position, answer) & masks.Packed(np.array([lengths]))
    starts, firsts = masks.starts_of_texts(packed, total), masks.starts_of_blocks(packed, total)
    np.testing.assert_array_equal(np.flatnonzero(starts[0]), [0, 5, 9])
    np.testing.assert_array_equal(np.flatnonzero(firsts[0]), [2, 4, 5, 7])
    seen = np.asarray(masks.two_streams(packed).dense(2 * total, 2 * total))[0].reshape(2, total, 2, total)
    single = np.asarray(packed.dense(total, total))[0]
    at = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        valid = np.arange(7) >= 7 - length  # the same text in a row of its own, after padding
        alone = masks.BlockDiffusion(size).for_rows(valid[None], (np.arange(7) >= 7 - length + prompt)[None])
        alone &= masks.KeyPadding(valid[None])
        wanted = np.asarray(masks.two_streams(alone).dense(14, 14))[0].reshape(2, 7, 2, 7)
        assert not wanted[:, :, :, ~valid].any()
        here, there = slice(at, at + length), slice(7 - length, 7)
        np.testing.assert_array_equal(seen[:, here, :, here], wanted[:, there, :, there])
        np.testing.assert_array_equal(single[here, here], np.asarray(alone.dense(7, 7))[0][there, there])
        assert not seen[:, here, :, : here.start].any()
        assert not seen[:, here, :, here.stop :].any()
        for marks, of_row in [(starts, masks.starts_of_texts), (firsts, masks.starts_of_blocks)]:
            np.testing.assert_array_equal(marks[0, here], np.asarray(of_row(alone, 7))[0, there])
        at += length
    np.testing.assert_array_equal(seen[1, :, 1], single)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.BlockCausal(0), "size=0 must be at least 1"),
        (lambda: masks.BlockDiffusion(0), "size=0 must be at least 1"),
        (lambda: masks.two_streams(masks.Bidirectional()), "need one mask BlockDiffusion.*; got Bidirectional"),
        (lambda: masks.two_streams(masks.BlockCausal(2) & masks.Causal()), "got BlockCausal & Causal"),
        (
            lambda: masks.OrderedStreams(np.zeros((1, 2), int), 2).dense(6, 6),
            "blocks are of 2 tokens, but each half has 3",
        ),
        (lambda: masks.TwoStream(0), "size=0 must be at least 1"),
        (lambda: masks.SlidingWindow(-1, 0), "left=-1 must not be negative"),
        (lambda: masks.TwoStream(2).dense(5, 5), "5 keys cannot be a noised and a clean half"),
        (lambda: masks.Causal().at(np.zeros((1, 2), int)).dense(3, 5), "positions of 2 queries, but there are 3"),
        (lambda: (masks.Causal() & masks.KeyLengths(np.array([1]))).dense(2, 3), "2 queries and 3 keys"),
    ],
)
def test_masks_that_cannot_be_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- names


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("bidirectional", masks.Bidirectional()),
        ("causal", masks.Causal()),
        ("prefix", masks.Prefix()),
        ("block-causal:8", masks.BlockCausal(8)),
        ("block-diffusion:8", masks.BlockDiffusion(8)),
        ("window:16", masks.SlidingWindow(16, 16)),
        ("window:16:0", masks.SlidingWindow(16, 0)),
    ],
)
def test_names_and_masks_are_each_others_inverse(name, mask):
    assert masks.parse(name) == mask
    assert masks.name_of(mask) == name
    assert hash(masks.parse(name)) == hash(mask)  # a key of compiled programs


@pytest.mark.parametrize(
    "name",
    (
        *("", "casual", "Causal", "causal:1", "prefix:3", "two-stream:8"),
        *("block-causal", "block-causal:0", "block-causal:-8", "block-causal:8:8"),
        *("block-diffusion", "block-diffusion:0", "block-diffusion:4:8"),
        *("window", "window:", "window:1:2:3", "window:1_6", "window: 16", "window:x"),
    ),
)
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match=r"is not one of bidirectional, causal|must be at least 1"):
        masks.parse(name)


@pytest.mark.parametrize(
    "mask",
    [
        masks.Prefix(np.array([1])),
        masks.BlockDiffusion(2, np.array([1])),
        masks.BlockCausal(2, np.array([1])),
        ~masks.Causal(),
        masks.TwoStream(2),
    ],
    ids=named,
)
def test_masks_without_a_name_raise(mask):
    with pytest.raises(ValueError, match=f"{named(mask)} mask has no name; masks with names are bidirectional"):
        masks.name_of(mask)
