"""How rows are laid out in batches: widths, hidden positions, Dream's variants, mixtures, learned turns, shares by hand."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dream_jax.batch import Batch
from dream_jax.data import (
    Batches,
    BatchOptions,
    EncodeOptions,
    Mixture,
    Row,
    RowList,
    SudokuSource,
    TokenizedRows,
    encode_row,
    first_numbers,
    length_report,
    longest_row,
    make_batches,
    open_mixture,
)
from dream_jax.data.layout import WINDOW
from dream_jax.data.schemas import parse_chat
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer, turn_text

BYTES = ByteTokenizer()
PAD = BYTES.pad_id


def uneven(count: int = 60, first: int = 1) -> RowList:
    """Row n: a prompt of n % 3 + 1 tokens that begins with its number, a response of 3 n % 10 + 1 tokens and its end."""
    return RowList(
        [
            Row(prompt=chr(first + n) + "p" * (n % 3), response="".join(chr(97 + i) for i in range(3 * n % 10 + 1)))
            for n in range(count)
        ]
    )


def batches_of(source: Any, encoding: EncodeOptions = EncodeOptions(), **changes: Any) -> Batches:
    settings: dict[str, Any] = {"batch_size": 5, "max_length": 16, "seed": 0, "num_threads": 0, **changes}
    return make_batches(TokenizedRows(source, BYTES, encoding), **settings)


def take(source: Any, steps: int, **changes: Any) -> list[Batch[np.ndarray]]:
    with batches_of(source, **changes) as batches:
        return [next(batches) for _ in range(steps)]


def canvas(tokens: np.ndarray, valid: np.ndarray) -> tuple[int, str, int]:
    """(number of the row, its response as far as there is room, pads after it) of the valid positions of a row."""
    ids = tokens[valid].tolist()
    prompt = 1 + (ids[0] - 1) % 3
    response = [one for one in ids[prompt:] if one != PAD]
    pads = len(ids) - prompt - len(response)
    assert ids[prompt:] == response + [PAD] * pads
    return ids[0] - 1, bytes(response).decode(), pads


def responses_of(batch: Batch[np.ndarray]) -> list[tuple[int, str, int]]:
    """`canvas` of each row; also checks that what is hidden lies on the left and that all else fits together."""
    found = []
    assert batch.valid_BT is not None
    for tokens, maskable, valid in zip(batch.tokens_BT, batch.maskable_BT, batch.valid_BT, strict=True):
        start = int(valid.argmax())
        assert valid.tolist() == [False] * start + [True] * (len(valid) - start)
        number, text, pads = canvas(tokens, valid)
        assert tokens[:start].tolist() == [PAD] * start
        assert maskable.tolist() == [False] * (start + number % 3 + 1) + [True] * (len(text) + pads)
        found.append((number, text, pads))
    return found


def ids(row: Row) -> list[int]:
    """The tokens of a row of `uneven`."""
    assert isinstance(row.prompt, str)
    return [*row.prompt.encode(), *row.response.encode(), BYTES.eos_id]


def fits(row: Row, length: int) -> bool:
    return len(ids(row)) <= length


def full_text(number: int) -> str:
    return "".join(chr(97 + i) for i in range(3 * number % 10 + 1))


# --- the end-of-text tail ---


def test_eos_tail() -> None:
    for batch in take(uneven(), 4, options=BatchOptions(eos_tail=2)):
        assert batch.tokens_BT.shape == (5, 16)
        for number, text, pads in responses_of(batch):
            room = 16 - (number % 3 + 1) - len(text)
            assert text == full_text(number) and pads == min(3, room)  # its own end and two more
    for batch in take(uneven(), 4, options=BatchOptions(eos_tail=0)):
        assert all(pads == 1 for _, _, pads in responses_of(batch))


def test_a_tail_as_long_as_the_row_changes_nothing_but_says_so() -> None:
    for plain, limited in zip(take(uneven(), 4), take(uneven(), 4, options=BatchOptions(eos_tail=99)), strict=True):
        assert limited.valid_BT is not None and limited.valid_BT.all() and plain.valid_BT is None
        for name in ("tokens_BT", "maskable_BT", "row_B"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(limited, name))


# --- Dream's variants ---


def test_cut_responses_gives_a_batch_the_length_of_one_of_its_rows() -> None:
    drawn = Counter()
    for batch in take(uneven(), 40, options=BatchOptions(cut_responses=True)):
        rows = responses_of(batch)
        (region,) = {len(text) + pads for _, text, pads in rows}  # one length for all: 16 tokens hold any
        assert region in {len(full_text(number)) for number, _, _ in rows}
        drawn[[len(full_text(number)) for number, _, _ in rows].index(region)] += 1
        for number, text, pads in rows:
            assert text == full_text(number)[:region] and pads == max(region - len(full_text(number)), 0)
    assert len(drawn) == 5  # any row of a batch may be the one
    first, again, other = (take(uneven(), 9, seed=seed, options=BatchOptions(cut_responses=True)) for seed in (3, 3, 4))
    widths = [[int(batch.valid_BT.sum()) for batch in run] for run in (first, again, other)]
    assert widths[0] == widths[1] != widths[2]


def test_a_long_prompt_limits_its_own_row_only() -> None:
    rows = RowList([Row(prompt="p" * 10, response="r"), Row(prompt="p", response="s" * 12)])
    for batch in take(rows, 20, batch_size=2, options=BatchOptions(cut_responses=True)):
        regions = sorted(batch.maskable_BT.sum(axis=1).tolist())
        assert regions in ([1, 1], [6, 12])


def test_tail_cut_takes_the_same_from_every_row() -> None:
    cuts = []
    for plain, cut in zip(take(uneven(), 60), take(uneven(), 60, options=BatchOptions(tail_cut=0.5)), strict=True):
        lost = plain.maskable_BT.sum(axis=1) - cut.maskable_BT.sum(axis=1)
        assert len(set(lost.tolist())) == 1 and (cut.maskable_BT.sum(axis=1) >= 1).all()
        cuts.append(int(lost[0]))
        for tokens, (number, text, pads) in zip(plain.tokens_BT, responses_of(cut), strict=True):
            before = tokens[number % 3 + 1 :].tolist()
            assert [*text.encode(), *[PAD] * pads] == before[: len(before) - cuts[-1]]
    assert 15 <= cuts.count(0) <= 45 and max(cuts) > 8  # 4 standard deviations
    assert all(
        int(batch.valid_BT.all()) for batch in take(uneven(), 5, options=BatchOptions(tail_cut=0.0, eos_tail=99))
    )
    assert not any(batch.valid_BT.all() for batch in take(uneven(), 5, options=BatchOptions(tail_cut=1.0)))


# --- widths ---


def test_width_step_pads_to_a_multiple_and_keeps_every_row() -> None:
    steps = 2 * WINDOW
    taken = take(uneven(10), steps, options=BatchOptions(width_step=4))
    seen: Counter[int] = Counter()
    for batch in taken:
        width = batch.tokens_BT.shape[1]
        assert batch.valid_BT is None and width in (4, 8, 12, 16)
        rows = [canvas(tokens, np.ones(width, dtype=bool)) for tokens in batch.tokens_BT]
        assert all(text == full_text(number) and pads >= 1 for number, text, pads in rows)
        assert width - 4 < max(number % 3 + 1 + len(text) + 1 for number, text, _ in rows)
        seen.update(number for number, _, _ in rows)
    assert set(seen.values()) == {steps * 5 // 10}
    widths = [batch.tokens_BT.shape[1] for batch in taken]
    assert len(set(widths)) > 2 and widths != sorted(widths)  # of like length, but not in their order
    assert np.mean(widths) < 12  # the longest row, 14 tokens, no longer sets the width of all


ALL = BatchOptions(eos_tail=1, cut_responses=True, tail_cut=0.5, width_step=4)


@pytest.mark.parametrize("options", [ALL, BatchOptions(width_step=4), BatchOptions(eos_tail=2)], ids=str)
def test_variants_do_not_depend_on_processes_and_resume_exactly(options: BatchOptions) -> None:
    settings: dict[str, Any] = {"batch_size": 6, "options": options}
    whole = take(uneven(), 20, **settings)
    parts = [take(uneven(), 20, process_index=p, process_count=3, num_threads=2, **settings) for p in range(3)]
    for step, batch in enumerate(whole):
        order = np.argsort(np.concatenate([part[step].row_B for part in parts]))
        for name, array in vars(batch).items():
            local = [getattr(part[step], name) for part in parts]
            together = None if array is None else np.concatenate(local)[order]
            np.testing.assert_array_equal(together, array)
    with batches_of(uneven(), **settings) as batches:
        for _ in range(7):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
    with batches_of(uneven(), process_index=2, process_count=3, **settings) as batches:
        batches.set_state(state)
        for step in range(7, 20):
            found = next(batches)
            assert all(np.array_equal(array, getattr(parts[2][step], name)) for name, array in vars(found).items())
    with batches_of(uneven(), batch_size=6) as other, pytest.raises(ValueError, match="layout was BatchOptions"):
        other.set_state(state)


HELD = {
    "plain": (uneven(), {}, "0a2b3f820c7d7a0d"),
    "all": (uneven(), {"options": ALL, "seed": 5}, "f1361a1f73909e49"),
    "wide": (uneven(), {"options": BatchOptions(width_step=4), "batch_size": 4}, "e1d4b37ae0a4e6fa"),
    "mixture": (
        Mixture([uneven(10), SudokuSource("train")], [1, 2]),
        {"max_length": 40, "seed": 7},
        "c0b0dbb64f44bbd0",
    ),
}


@pytest.mark.parametrize(("source", "changes", "held"), HELD.values(), ids=HELD)
def test_batches_are_those_of_earlier_versions(source: Any, changes: dict[str, Any], held: str) -> None:
    """A run that began under an earlier version resumes with the batches that it would have seen."""
    digest = hashlib.sha256()
    for batch in take(source, 20, **changes):
        for array in (batch.tokens_BT, batch.maskable_BT, batch.row_B, batch.valid_BT):
            digest.update(b"" if array is None else array.tobytes())
    assert digest.hexdigest()[:16] == held


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"eos_tail": -1}, "eos_tail=-1 must not be negative"),
        ({"tail_cut": 1.5}, r"tail_cut=1.5 is outside \[0, 1\]"),
        ({"width_step": 0}, "width_step=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BatchOptions(**change)


# --- shares, counted by hand ---

# Prompts of one token, responses of 1, 2, ... 10: with their end 3, 4, ... 12 tokens, 75 in all (10 prompt, 55 text).
HAND = RowList([Row(prompt="p", response="r" * (n + 1)) for n in range(10)])


def outlook_of(options: BatchOptions, **changes: Any) -> Any:
    with batches_of(HAND, **{"options": options, **changes}) as batches:
        return batches.outlook(2)


def test_shares_of_ten_rows_by_hand() -> None:
    found = outlook_of(BatchOptions())  # 160 positions
    assert (found.epochs, found.batches, found.supervised, found.widths) == (1.0, 2, 150, {"16": 2})
    np.testing.assert_allclose(found.eos_share, (150 - 55) / 150)
    np.testing.assert_allclose(found.padding_share, (160 - 75) / 160)
    assert found.hidden_share == 0 and found.whole_share == 1
    assert any("--eos-tail limits it" in line for line in found.lines())
    found = outlook_of(BatchOptions(eos_tail=3))
    # Of 15 positions beside the prompt the responses want 5, 6, ... 14: 95 in all, and 65 positions belong to no row.
    assert (found.supervised, found.whole_share) == (95, 1)
    np.testing.assert_allclose(found.eos_share, 40 / 95)
    np.testing.assert_allclose(found.padding_share, (160 - 75) / 160)
    np.testing.assert_allclose(found.hidden_share, (160 - 10 - 95) / 160)
    found = outlook_of(BatchOptions(), max_length=8, encoding=EncodeOptions(length_policy="right"))
    # 80 positions: texts of 1 to 6 are whole with their end, those of 7 to 10 are cut to 7 and have none.
    assert found.supervised == 70 and found.whole_share == 0.6
    np.testing.assert_allclose(found.eos_share, (70 - 21 - 28) / 70)
    found = outlook_of(BatchOptions(cut_responses=True))
    taken = take(HAND, 2, options=BatchOptions(cut_responses=True))
    supervised = [int(batch.maskable_BT.sum()) for batch in taken]
    ends = [int((batch.maskable_BT & (batch.tokens_BT == PAD)).sum()) for batch in taken]
    assert found.supervised == sum(supervised)
    np.testing.assert_allclose(found.eos_share, sum(ends) / sum(supervised))
    np.testing.assert_allclose(found.hidden_share, 1 - np.mean([batch.valid_BT for batch in taken]))


def test_an_outlook_looks_at_part_of_a_long_run() -> None:
    with batches_of(HAND) as batches:
        found = batches.outlook(1000)
    assert found.batches == 8 and found.lines()[0] == "1000 steps, 500.00 epochs, over the first 8 steps:"


# --- tokens ---


class CountingTokenizer(ByteTokenizer):
    """Counts how often each text is tokenised."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def encode(self, text: str, *options: Any) -> list[int]:
        self.asked[text] += 1
        return super().encode(text, *options)


@pytest.mark.parametrize("policy", ["filter", "right"])
def test_rows_are_tokenised_once(policy: Any) -> None:
    """However often they are measured and read; the rows of a source of one length when they are read."""
    texts = [Row(prompt=f"p{n}", response=f"r{n}" * (1 + n % 5)) for n in range(20)]
    counting = CountingTokenizer()
    rows = TokenizedRows(RowList(texts), counting, EncodeOptions(length_policy=policy))
    assert longest_row(rows) == length_report(rows, 9).longest == 19
    assert length_report(rows, 9, limit=3).measured == 3
    for _ in range(2):
        with make_batches(rows, batch_size=4, max_length=9, seed=0, options=BatchOptions(width_step=4)) as batches:
            for _ in range(15):
                next(batches)
        assert len(rows.first(7, 9)) == (7 if policy == "right" else 5)
    assert len(counting.asked) == 40 and set(counting.asked.values()) == {1}
    generated = TokenizedRows(SudokuSource("train"), CountingTokenizer())
    with make_batches(generated, batch_size=8, max_length=40, seed=0, num_threads=0) as batches:
        for _ in range(3):
            next(batches)
    assert generated.tokenizer.asked.total() == 2 * (1 + 3 * 8)  # the first row is measured


# --- mixtures ---


def test_a_mixture_keeps_its_weights_and_the_epochs_of_each_part() -> None:
    few, many = uneven(4), uneven(30, first=11)
    mixture = Mixture([few, many], [1.0, 3.0])
    assert len(mixture) == 34 and mixture[3] == few[3] and mixture[4] == many[0] and mixture[33] == many[29]
    firsts = [int(tokens[0]) for batch in take(mixture, 24) for tokens in batch.tokens_BT]
    assert len(firsts) == 120
    of_few, of_many = [one for one in firsts if one < 11], [one for one in firsts if one >= 11]
    assert len(of_few) == 30 and len(of_many) == 90
    assert all(sorted(of_few[start : start + 4]) == [1, 2, 3, 4] for start in range(0, 28, 4))
    assert all(sorted(of_many[start : start + 30]) == list(range(11, 41)) for start in (0, 30, 60))
    by_size = [int(tokens[0]) < 11 for batch in take(Mixture([few, many]), 68) for tokens in batch.tokens_BT]
    assert abs(sum(by_size) - 40) <= 1  # 4 of 34


def test_a_mixture_drops_by_length_in_each_part_and_measures_a_uniform_part_once() -> None:
    mixture = Mixture([uneven(10), SudokuSource("train")], [1, 1])
    with batches_of(mixture, max_length=40, batch_size=8) as batches:
        report = batches.report
        assert (report.measured, report.kept, report.dropped) == (11, 1_000_010, 0)
        prompts = [tokens[0] for _ in range(4) for tokens in next(batches).tokens_BT]
    assert sum(int(token) < 11 for token in prompts) == 16
    long = RowList([Row(prompt="p", response="r" * n) for n in (50, 3, 60, 2)])
    report = length_report(TokenizedRows(Mixture([long, uneven(3)]), BYTES), 16)
    assert (report.kept, report.dropped, report.shortest, report.longest) == (5, 2, 3, 62)
    seen = {BYTES.decode(tokens) for batch in take(Mixture([long, uneven(3)]), 9) for tokens in batch.tokens_BT}
    assert len(seen) == 5
    with pytest.raises(ValueError, match="no row of source 2 of the mixture fits"):
        batches_of(Mixture([uneven(3), RowList([long[0]])]))


def test_the_first_rows_are_of_every_part() -> None:
    few, many = uneven(4), uneven(30, first=11)
    assert first_numbers(many, 3) == [0, 1, 2] and first_numbers(few, 9) == [0, 1, 2, 3]
    mixture = Mixture([few, many])
    assert first_numbers(mixture, 12) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]
    assert first_numbers(mixture, 1) == [0] and first_numbers(mixture, 99) == list(range(34))
    first = TokenizedRows(mixture, BYTES).first(12, 10)  # of those with 3 to 14 tokens
    assert [row for row, _ in first] == [mixture[n] for n in first_numbers(mixture, 12) if fits(mixture[n], 10)]
    assert 0 < len(first) < 12 and all(found.tolist() == ids(row) for row, found in ((r, t.tokens) for r, t in first))


def test_refused_mixtures(tmp_path: Path) -> None:
    for weights, complaint in (
        ([1.0], "1 weights"),
        ([1.0, 0.0], "must be positive"),
        ([1.0, float("nan")], "must be positive"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Mixture([uneven(), uneven()], weights)
    with pytest.raises(ValueError, match="each source of a mixture needs rows"):
        Mixture([uneven(), RowList([])])
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{name}{n}", "response": "r"}) + "\n" for n in range(5))
        )
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len(open_mixture(names)) == 8 and len(open_mixture(names[:1])) == 4
    assert len(open_mixture(names, split="test")) == 2


# --- turns ---

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def test_all_assistant_turns_or_the_last() -> None:
    row = parse_chat({"messages": TURNS}, "here:1")
    last, every = (encode_row(row, BYTES, 128, EncodeOptions(learned_turns=turns)) for turns in ("last", "all"))
    assert last is not None and every is not None
    np.testing.assert_array_equal(last.tokens, every.tokens)  # with bytes no token could straddle anything
    assert last.prompt_length == every.prompt_length
    assert BYTES.decode(every.tokens[every.maskable]) == "firstsecond<|endoftext|>"
    assert BYTES.decode(last.tokens[last.maskable]) == "second<|endoftext|>"
    encoding = EncodeOptions(learned_turns="all")
    with batches_of(RowList([row]), encoding, batch_size=1, max_length=128) as batches:
        found = batches.outlook(1)
        maskable = next(batches).maskable_BT[0]
    assert maskable.tolist() == [*every.maskable.tolist(), *[True] * (128 - every.length)]
    assert found.supervised == maskable.sum()


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int<|mask|>"}}}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}],
}
WITH_TOOLS = [
    {"role": "user", "content": "add"},
    CALL,
    {"role": "tool", "content": "3<|im_end|>"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "7"},
]


def test_tools_as_the_published_template_has_them(assets: Path) -> None:
    dream = load_tokenizer(assets / "dream-v0-instruct-7b")
    row = parse_chat({"messages": WITH_TOOLS, "tools": TOOLS}, "here:1")
    encoded = encode_row(row, dream, 400, EncodeOptions(learned_turns="all"))
    assert encoded is not None
    text = dream.decode(encoded.tokens)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": {"a": "int<|mask|>"}}}\n' in text
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\n3<|im_end|>\n" in text
    assert "\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n7<|end" in text
    assert dream.decode(encoded.tokens[encoded.maskable]) == f"{call}7<|endoftext|>"
    # The mark inside a tool's answer is text, and the only mask token's name is spelled out as well.
    assert dream.mask_id not in encoded.tokens
    assert (encoded.tokens == dream.im_end_id).sum() == 4  # system, user, call and answers
    # A call that is learned as the last turn reads as the template would have written it.
    asked = parse_chat({"messages": WITH_TOOLS[:2], "tools": TOOLS}, "here:1")
    closed = dream.chat([*asked.prompt, row.prompt[1]], add_generation_prompt=False, tools=TOOLS)
    ours = [*dream.chat(asked.prompt, tools=TOOLS), *dream.encode(asked.response)]
    assert dream.decode(ours) + "<|im_end|>\n" == dream.decode(closed)


def test_turns_that_cannot_be_read() -> None:
    assert turn_text({"role": "assistant", "content": "so", "tool_calls": [{"name": "f", "arguments": {}}]}) == (
        'so\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )
    question = {"role": "user", "content": "q"}
    for calls, complaint in (
        ("f", "must be a list"),
        (["f"], "must have 'name' and 'arguments'"),
        ([{"name": "f", "arguments": "{"}], "are not JSON"),
        ([{"name": "f", "arguments": "[1]"}], "must be an object"),
        ([{"name": "", "arguments": {}}], "'name' is empty"),
    ):
        with pytest.raises(ValueError, match=f"here:1: message 1: .*{complaint}"):
            parse_chat({"messages": [question, {"role": "assistant", "content": "", "tool_calls": calls}]}, "here:1")
    with pytest.raises(ValueError, match="here:1: 'tools' must be a list of objects"):
        parse_chat({"messages": [question, {"role": "assistant", "content": "a"}], "tools": "f"}, "here:1")
    row = parse_chat({"messages": WITH_TOOLS}, "here:1")
    with pytest.raises(ValueError, match="here:1: the byte tokenizer does not support tools"):
        encode_row(row, BYTES, 400)
