"""Text is sent only when it can change no more: whole characters with every position before them written."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_client import MASK, TOKENIZER

from dream_jax.inference import canvas_text
from dream_jax.sampler import SamplerConfig
from dream_jax.serving.reader import AnswerReader, first_stop, held_back
from dream_jax.serving.tasks import Gap, RowView, Task

END = TOKENIZER.eos_id


def task(length, pieces=None, prompt=(), **options):
    config = SamplerConfig(max_new_tokens=length, alg="entropy")
    pieces = (Gap(start=len(prompt), length=length),) if pieces is None else pieces
    return Task(prompt=prompt, config=config, seed=0, sample=0, pieces=pieces, streams=True, **options)


def view(tokens, commit_step=None):
    tokens = np.asarray(tokens)
    steps = np.where(tokens == MASK, -1, 0) if commit_step is None else np.asarray(commit_step)
    return RowView(tokens, steps, 1, False, np.full(tokens.shape, 0.5, np.float32), False)


def read_in_order(tokens, order, wanted):
    """The updates when positions are written in this order, one after the other."""
    reader, row, step, updates = (
        AnswerReader(wanted, TOKENIZER),
        np.full(len(tokens), MASK),
        np.full(len(tokens), -1),
        [],
    )
    for number, position in enumerate(order):
        row[position], step[position] = tokens[position], number
        updates.append(reader.read(view(row.copy(), step.copy())))
        if updates[-1].finish is not None:
            break
    return updates


def final_text(tokens, stop=()):
    text = canvas_text(np.asarray(tokens), TOKENIZER)
    found = first_stop(text, stop)
    return text if found is None else text[: found[0]]


TOKENS = st.one_of(
    st.text(st.sampled_from("abc é你😀"), max_size=8).map(lambda text: list(text.encode())),
    st.lists(
        st.sampled_from([97, 98, 99, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, TOKENIZER.im_start_id, TOKENIZER.im_end_id, END]),
        max_size=12,
    ),
)


@settings(max_examples=300, deadline=None)
@given(tokens=TOKENS.filter(len), data=st.data(), stop=st.lists(st.text("abc你", min_size=1, max_size=3), max_size=3))
def test_any_order_of_writing_gives_the_same_text(tokens, data, stop):
    order = data.draw(st.permutations(range(len(tokens))))
    updates = read_in_order(tokens, order, task(len(tokens), stop=tuple(stop), tells_tokens=True))
    assert "".join(update.text for update in updates) == final_text(tokens, stop)
    assert updates[-1].finish is not None and all(update.finish is None for update in updates[:-1])
    told = [note.position for update in updates for note in update.written]
    assert told == list(order[: len(told)])  # each position once, in the order of writing


def test_finish_reasons():
    assert read_in_order([97, 98], (0, 1), task(2))[-1].finish == "length"
    [first, last] = read_in_order([97, END, 98], (1, 0, 2), task(3))  # the last position is not waited for
    assert (first.text, first.finish) == ("", None)
    assert (last.text, last.finish, last.num_tokens) == ("a", "stop", 1)


def test_stop_string_across_tokens():
    updates = read_in_order(list(b"one STOP two"), range(12), task(12, stop=("STOP",)))
    assert [update.text for update in updates if update.text] == ["o", "n", "e", " "]
    assert updates[-1].finish == "stop" and updates[-1].num_tokens == 8


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("xabcd", ["abcd", "bc"], (2, 4)),  # the string that is complete first, however much text follows
        ("xabc", ["bc", "abc"], (1, 4)),  # of two that end together, the one that starts first
        ("xab", ["abc"], None),
        ("abab", ["ab"], (0, 2)),
    ],
)
def test_first_stop(text, stops, found):
    assert first_stop(text, stops) == found


def test_held_back():
    assert held_back("xaab", ["aabc", "bb"]) == 3
    assert held_back("x", ["aabc"]) == 0
    assert held_back("", ["a"]) == 0


def test_several_gaps():
    """A later gap is sent only after the earlier one; texts between gaps follow as soon as they can."""
    prompt = (MASK, MASK, *b"-", MASK, MASK, *b"!")
    wanted = task(0, (Gap(start=0, length=2), "-", Gap(start=3, length=2), "!"), prompt)
    reader = AnswerReader(wanted, TOKENIZER)
    update = reader.read(view([MASK, MASK, 45, 99, END, 33]))
    assert (update.text, update.finish) == ("", None)
    update = reader.read(view([97, MASK, 45, 99, END, 33]))
    assert (update.text, update.finish) == ("a", None)
    update = reader.read(view([97, 98, 45, 99, END, 33]))
    assert (update.text, update.finish, update.gap_texts) == ("b-c!", "stop", ("ab", "c"))


def test_logprobs_go_with_their_text():
    tokens = list("a你b".encode())
    wanted = task(5, has_logprobs=True, records_logprobs=True)
    reader, row = AnswerReader(wanted, TOKENIZER), np.full(5, MASK)
    told = []
    for count in range(1, 6):
        row[:count] = tokens[:count]
        state = dataclasses.replace(
            view(row.copy()),
            logprob=np.arange(5.0),
            top_token=np.full((5, 2), 97),
            top_logprob=np.array([[-1.0, -np.inf]] * 5),
        )
        update = reader.read(state)
        told.append((update.text, [note.logprob for note in update.tokens]))
        assert all(len(note.top) == 1 for note in update.tokens)  # tokens that must not be written are left out
    assert [text for text, _ in told] == ["a", "", "", "你", "b"]
    assert [logprob for _, notes in told for logprob in notes] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert told[0][1] == [0.0] and told[-1][1] == [4.0]
