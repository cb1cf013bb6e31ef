"""Judges of `evaluation` on text as models write it: judged by hand, without any sense, very long, or in any script.

`gsm8k_answers.jsonl` holds answers to problems of GSM8K's test split. A person judged each of them before any program
did: "right", "wrong", or "unclear" if a person cannot tell what the author means. `why` says what is special about it.
"""

import collections
import functools
import json
import pathlib
import random
import time
from fractions import Fraction

import pytest
from marking import slow

from dream_jax.evaluation.likelihood import Bound
from dream_jax.evaluation.probe import parse_expectation, search
from dream_jax.evaluation.report import check_rows, summarize
from dream_jax.evaluation.scored_texts import Choice, ScoredText, likeliest
from dream_jax.evaluation.tasks import TASKS, read_problems
from dream_jax.judges.gsm8k import expected_number, judge_number
from dream_jax.judges.numerals import numerals, plain, spelt_numbers
from dream_jax.judges.puzzles import judge_countdown, judge_sudoku, parse_countdown

ANSWERS = pathlib.Path(__file__).parent / "gsm8k_answers.jsonl"


@functools.cache
def answers():
    return [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]


def said(verdict):
    return "right" if verdict.correct else "wrong" if verdict.decided else "undecided"


def test_answers_that_a_person_has_judged():
    assert len(answers()) >= 200
    counted: collections.Counter[tuple[str, str]] = collections.Counter()
    mistakes = []
    for row in answers():
        verdict = judge_number(expected_number(f"#### {row['expected']}", "f:1"), row["answer"])
        counted[row["verdict"], said(verdict)] += 1
        if said(verdict) not in (row["verdict"], "undecided") and (row["verdict"], said(verdict)) != (
            "unclear",
            "wrong",
        ):
            mistakes.append((row["answer"], row["verdict"], verdict))
    assert not mistakes
    # How often the judge is not sure where a person is. A change that makes these numbers larger makes the judge worse.
    assert (counted["right", "undecided"], counted["wrong", "undecided"]) == (8, 4), counted
    persons = collections.Counter(row["verdict"] for row in answers())
    page = (ANSWERS.parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert f"Of {len(answers())} answers that a person judged" in page
    assert f"undecided for 8 of {persons['right']} right ones and 4 of {persons['wrong']} wrong ones" in " ".join(
        page.split()
    )


def test_the_problems_of_these_answers(assets):
    lines = (assets / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for row in answers():
        assert json.loads(lines[row["problem"] - 1])["answer"].endswith(f"#### {row['expected']}")


@pytest.mark.parametrize(("split", "count"), [("test", 1319), slow("train", 7473)])
def test_every_reference_answer_is_right(assets, split, count):
    lines = (assets / "data" / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    prose: collections.Counter[str] = collections.Counter()
    for number, line in enumerate(lines):
        answer = json.loads(line)["answer"]
        expected = expected_number(answer, "f:1")
        assert judge_number(expected, answer).correct, answer
        if number % 4 == 0:  # The solution without its last line is prose that a judge must understand by itself.
            prose[said(judge_number(expected, answer.rpartition("####")[0]))] += 1
    assert len(lines) == count
    assert prose["right"] > 0.97 * sum(prose.values()), prose


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("1,234.5", Fraction(2469, 2)),
        ("1.234,5", Fraction(2469, 2)),
        ("1 234 567", 1234567),
        ("1\u00a0234,50", Fraction(2469, 2)),
        ("1'234", 1234),
        ("1_000", 1000),
        ("1,00,000", 100000),
        ("0,5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("1.5E+3", 1500),
        ("2 \u00d7 10\u00b3", 2000),
        (r"2 \times 10^{3}", 2000),
        ("10\u00b2", 100),
        ("2 1/2", Fraction(5, 2)),
        ("2\u00bd", Fraction(5, 2)),
        ("2 and 1/2", Fraction(5, 2)),
        ("2 and a half", Fraction(5, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        ("\u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("minus 5", -5),
        ("\uff11\uff18", 18),
        ("\u0661\u0668", 18),
        ("\u0661\u0668\u066b\u0665", Fraction(37, 2)),
        ("\U0001d7cf\U0001d7d6", 18),
        ("5 thousand", 5000),
        ("2.5 million", 2500000),
        ("$5k", 5000),
        ("5 dollars and 25 cents", Fraction(21, 4)),
        ("18%", 18),
        ("USD18", 18),
        ("5:00 PM", 5),
        ("Rs.18", 18),
        ("_18_", 18),
        ("1&nbsp;000", 1000),
        # no single value: another reader would read it differently, or nobody can say
        ("12:30", None),
        ("7:11", None),
        ("1/2/2020", None),
        ("12,50", None),
        ("200 300", None),
        ("5k", None),
        ("\u20135", None),
        ("1/0", None),
        ("1e99", None),
        ("1e99999999999999", None),
        ("2^9999999", None),
        ("9" * 400 + ".5", None),
    ],
)
def test_numbers_in_many_forms(text, value):
    (found,) = numerals(plain(text))
    assert found.value == value


def test_digits_that_are_no_numbers():
    assert not list(numerals(plain("H2O, 8x m2, CO\u2082, m\u00b2, x_1, \u2460")))[1:]
    assert [one.value for one in spelt_numbers("twenty-five, two thousand and six, one two, a hundred")] == [
        25,
        2006,
        None,
        100,
    ]


# Pieces of text, from which answers without sense are made.
PIECES = (
    *(
        "The answer is ",
        "#### ",
        "\\boxed{",
        "\\boxed{1} ",
        "Answer: ",
        "Answer: 1 ",
        '"answer": ',
        "Wait 1, ",
        "check 1. ",
    ),
    *(
        "\nQuestion: ",
        "<|im_end|>",
        "</think>",
        "<a ",
        "<<",
        "{",
        "}",
        "(",
        "1(",
        "\\frac{",
        "\\frac{1}",
        "\\text{",
        "\\",
    ),
    *(
        "9",
        "1,",
        "1.",
        "1 ",
        "000 ",
        "1'",
        "1/",
        "1 1/2 ",
        "1e",
        "e1",
        "^",
        "1^",
        "1%",
        "1k ",
        "1:",
        "1=",
        "1+",
        "-",
        "x1",
    ),
    *(
        "\u202f1",
        "\u00bd",
        "\u00b2",
        "\u0661",
        "\uff11",
        "\u2212",
        "\u2013",
        "\u20ac",
        "\u2460",
        "\u4e09",
        "\U0001d7d6",
    ),
    *(
        "\x00",
        "\ud800",
        "\udfff",
        "\ufffd",
        "\ufeff",
        "\u202e",
        "\t",
        "\n",
        "  ",
        "\r",
        "\u2028",
        ". ",
        "? ",
        "**",
        "~",
        "|",
    ),
    *(
        "twenty ",
        "hundred ",
        "one and ",
        " dozen",
        "1 to ",
        "between 1 and ",
        "not 1 ",
        "or 1 ",
        "$1 dollars and 5 ",
        "so 1 = ",
    ),
    *("1234\n", "0", "86+28=114,", "31-13=18,", "/0=", "4213\n3124\n2431\n1342", "Paris"),
)
JUDGES = {
    "gsm8k": functools.partial(judge_number, Fraction(18)),
    "sudoku": functools.partial(judge_sudoku, "4000\n0124\n2031\n0000"),
    "countdown": functools.partial(judge_countdown, "86,28,13,31,96"),
    "chat": parse_expectation({"contains": "Paris", "any_of": ["a", "1"], "excludes": "zzz"}, "f:1"),
}


def nonsense(number):
    draw = random.Random(number)
    if number % 10 == 0:
        return draw.choice(PIECES) * draw.randint(1, 3000)
    if number % 10 == 1:
        return "".join(chr(draw.randrange(0x110000)) for _ in range(200))
    if number % 10 < 6:  # an answer that a person might read, with some characters exchanged
        text = list(draw.choice(answers())["answer"] or " ")
        for _ in range(draw.randint(1, 8)):
            text[draw.randrange(len(text))] = draw.choice(PIECES)
        return "".join(text)
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 60)))


@pytest.mark.parametrize("task", JUDGES)
def test_a_judge_never_raises(task):
    for number in range(400):
        text = nonsense(number)
        verdict = JUDGES[task](text)
        assert isinstance(verdict.correct, bool) and verdict.reason
        assert not verdict.correct or verdict.decided
        json.dumps(verdict.found)


@pytest.mark.parametrize("task", JUDGES)
def test_a_million_characters(task):
    begun = time.process_time()
    for piece in ("9", "The answer is ", "86+28=114,", "1234\n", " ", "\\boxed{", "Paris ", "\x00"):
        JUDGES[task]((piece * 1_000_000)[:1_000_000])
    assert time.process_time() - begun < 8


def test_the_time_is_linear_in_the_length():
    """Ten times the text takes about ten times as long; quadratic code takes a hundred times as long."""
    slow = []
    for piece in PIECES[:27] + PIECES[27::3]:  # those that begin something, and some of the others
        seconds = []
        for length in (2_000, 20_000):
            text = (piece * length)[:length]
            begun = time.process_time()
            JUDGES["gsm8k"](text)
            seconds.append(time.process_time() - begun)
        if seconds[1] > 0.2 and seconds[1] > 40 * seconds[0]:
            slow.append((piece, seconds))
    assert not slow


def test_numbers_that_are_too_long_are_wrong():
    """9 repeated 400 times with a decimal: its value as a float was an OverflowError."""
    for text in ("The answer is " + "9" * 400 + ".5", "9" * 5000, "1e400", "1/" + "9" * 5000, r"\boxed{" + "9" * 4300):
        assert said(judge_number(Fraction(18), text)) == "wrong"
    with pytest.raises(ValueError, match="^f:3: .*#### NUMBER"):
        expected_number("#### " + "9" * 5000, "f:3")
    with pytest.raises(ValueError, match="^f:3: .*at most 30 digits"):
        parse_countdown("1,2," + "9" * 5000, "f:3")


def test_a_search_that_takes_years_is_stopped():
    pattern = "^(([0-9\n]|[0-9\n]|[0-9\n]|[0-9\n])+)+X"
    begun = time.monotonic()
    verdict = parse_expectation({"matches": pattern}, "f:1")("0012\n0000\n0000\n0003\n" * 3)
    assert time.monotonic() - begun < 13
    assert said(verdict) == "undecided" and "was stopped" in verdict.reason


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("(?i)\\byes\\b", "Yes!", True),
        ("a.c", "a\nc", False),
        ("\u00e9$", "caf\u00e9", True),
        ("\x00", "\x00", True),
        ("\ud800", "\ud800", True),
        ("[[a]", "[", True),
        ("(?:a{65535}){65535}", "aaa", False),
    ],
)
def test_searches(pattern, text, found):
    assert search(pattern, text) is found


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "a{99999999999999999999}",
            "x{4294967296}",
            "(" * 5000,
            "(" * 4000 + ")" * 4000,
            "[",
            "*",
            "\\8",
            "(?P<a>x)(?P<a>y)",
        ),
        *("(?La)", "(?iu)(?a)x", "(?<=a+)b", "(?(1)a|b)", "\\N{NO SUCH}", "[z-a]", "(?i", "\\", "(?P=x)", "a" * 20000),
    ],
)
def test_patterns_that_cannot_be_compiled_name_their_line(tmp_path, pattern):
    path = tmp_path / "probe.jsonl"
    rows = [{"question": "q", "contains": "a"}, {"question": "q", "matches": pattern}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"probe\.jsonl:2: 'matches' (is not a valid|has 20000 characters)"):
        read_problems(TASKS["chat"], path)


def test_likelihoods_that_are_no_numbers_name_their_row():
    choice = Choice(number=3, where="f:3", question="q", choices=("a", "b"), answer=0)
    text = ScoredText(number=4, where="f:4", text="a")
    good = Bound(nats=1.0, variance=0.0, freedom=0.0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        bound = Bound(nats=bad, variance=0.0, freedom=0.0)
        with pytest.raises(ValueError, match=r"^f:3: the likelihood .* NaN or infinite"):
            choice.row([], [good, bound])
        with pytest.raises(ValueError, match=r"^f:4: the likelihood .* NaN or infinite"):
            text.row([], [bound])
    draw = random.Random(0)
    for _ in range(100):
        nats = [draw.choice([0.0, -0.0, 1e308, -1e308, 5e-324, float("inf"), draw.random()]) for _ in range(3)]
        assert likeliest(nats, ("a", "b\ufffd", "c" * 1000))[0] == nats.index(min(nats))


def sampled(number, correct, decided):
    row = {
        "seed": 0,
        "number": number,
        "identity": f"i{number}",
        "correct": correct,
        "found": "18",
        "reason": "a | b\nc",
    }
    return row | {"decided": decided, "answer": "x", "tokens_to_end": 1, "room": 8, "forwards": 7}


SECONDS = [{"rows": 3, "seconds": 1.0, "compiled": False}]


def test_the_report_counts_verdicts_that_are_undecided():
    rows = [sampled(1, True, True), sampled(2, False, False), sampled(3, False, True)]
    summary = summarize("gsm8k", rows, SECONDS)
    assert summary.numbers["undecided_answers"] == 1
    assert summary.numbers["accuracy"].value == pytest.approx(1 / 3)
    table = summary.to_markdown("m")
    assert "| undecided answers | 1 |" in table and "| undecided reasons | 1 x a \\| b c |" in table
    for row in rows:  # rows of earlier versions do not say
        del row["decided"]
    older = summarize("gsm8k", rows, SECONDS).numbers
    assert older["undecided_answers"] == 0 and "undecided_reasons" not in older


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": "yes"}, r"items\.jsonl:2: correct is 'yes', which is not of type bool"),
        ({"answer": 3}, r"items\.jsonl:2: answer is 3"),
        ({"tokens_to_end": 1.5}, r"items\.jsonl:2: tokens_to_end is 1\.5"),
        ({"seed": [0]}, r"items\.jsonl:2: seed is \[0\]"),
        ({"room": None}, r"items\.jsonl:2: room is None"),
        ({"identity": None}, r"items\.jsonl:2: identity is None"),
    ],
)
def test_damaged_rows_are_named(tmp_path, change, message):
    rows = [sampled(1, True, True), sampled(2, True, True) | change]
    with pytest.raises(ValueError, match=message):
        check_rows(tmp_path, "gsm8k", rows, SECONDS)
    del rows[1]["answer"]
    with pytest.raises(ValueError, match=r"items\.jsonl:2: "):
        check_rows(tmp_path, "gsm8k", rows, SECONDS)
    with pytest.raises(ValueError, match=r"seconds\.jsonl:1: seconds is nan"):
        check_rows(tmp_path, "gsm8k", rows[:1], [SECONDS[0] | {"seconds": float("nan")}])
