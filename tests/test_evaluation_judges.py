"""The judges of `evaluation`, on answers written by hand: right ones, and wrong ones of every kind that models produce."""

import time
from fractions import Fraction

import pytest

from dream_jax.evaluation.probe import Expectation, parse_expectation
from dream_jax.evaluation.scored_texts import likeliest
from dream_jax.evaluation.tasks import TASKS
from dream_jax.judges.gsm8k import expected_number, final_number, judge_number, to_number
from dream_jax.judges.puzzles import judge_countdown, judge_sudoku, parse_countdown

PUZZLE = "4000\n0124\n2031\n0000"  # its only solution is SOLVED
SOLVED = "4213\n3124\n2431\n1342"
OPEN_PUZZLE = "1234\n3412\n0000\n0000"  # two solutions: both count


@pytest.mark.parametrize(
    ("puzzle", "answer", "correct"),
    [
        (PUZZLE, SOLVED, True),
        (PUZZLE, SOLVED + "\n", True),
        (PUZZLE, "\n" + SOLVED + "  \n\n", True),
        (PUZZLE + "\n", SOLVED, True),
        (OPEN_PUZZLE, "1234\n3412\n2143\n4321", True),
        (OPEN_PUZZLE, "1234\n3412\n4321\n2143", True),
        ("0000\n0000\n0000\n0000", SOLVED, True),  # nothing given: any solved grid
        ("0000\n0000\n0000\n0000", "1234\n3412\n2143\n4321", True),
        (SOLVED, SOLVED, True),
        # a changed given, in a grid that is solved in itself
        (PUZZLE, "1234\n3412\n2143\n4321", False),
        (PUZZLE, "4231\n3124\n2413\n1342", False),
        (SOLVED, "1234\n3412\n2143\n4321", False),
        # a repeated digit in a row, a column, a box
        (PUZZLE, "4211\n3124\n2431\n1342", False),
        (PUZZLE, "4213\n3124\n2431\n1343", False),
        (OPEN_PUZZLE, "1234\n3412\n1234\n3412", False),
        ("0000\n0000\n0000\n0000", "1234\n2341\n3412\n4123", False),  # rows and columns hold, boxes do not
        ("0000\n0000\n0000\n0000", "1111\n2222\n3333\n4444", False),
        # the puzzle itself, unsolved cells, digits that are none
        (PUZZLE, PUZZLE, False),
        (PUZZLE, "4213\n3124\n2431\n1340", False),
        (PUZZLE, "4213\n3124\n2431\n1345", False),
        (PUZZLE, "\u096a\u0968\u0967\u0969\n3124\n2431\n1342", False),
        # a short grid, a long one, ragged lines
        (PUZZLE, "4213\n3124\n2431", False),
        (PUZZLE, "4213\n3124\n2431\n134", False),
        (PUZZLE, "4213\n3124\n2431\n13422", False),
        (PUZZLE, SOLVED + "\n4213", False),
        (PUZZLE, "421\n33124\n2431\n1342", False),
        # text around it, other layouts
        (PUZZLE, SOLVED + " is the solution", False),
        (PUZZLE, "Solution:\n" + SOLVED, False),
        (PUZZLE, SOLVED.replace("\n", ""), False),
        (PUZZLE, SOLVED.replace("\n", "\n\n"), False),
        (PUZZLE, SOLVED.replace("\n", "\r\n"), False),
        (PUZZLE, "4 2 1 3\n3 1 2 4\n2 4 3 1\n1 3 4 2", False),
        (PUZZLE, "", False),
        (PUZZLE, "I cannot solve this.", False),
    ],
)
def test_sudoku(puzzle, answer, correct):
    verdict = judge_sudoku(puzzle, answer)
    assert verdict.correct is correct
    assert verdict.reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("1234\n3412\n2143\n4321", "the given digit in row 1, column 1 was changed"),
        ("4213\n3124\n2431\n1343", "repeated"),
        ("4213\n3124\n2431", "four lines"),
    ],
)
def test_sudoku_reasons(answer, reason):
    assert reason in judge_sudoku(PUZZLE, answer).reason


GAME = "86,28,13,31,96"
CHAIN = "86+28=114,31-13=18,114-18=96"


@pytest.mark.parametrize(
    ("problem", "answer", "correct"),
    [
        (GAME, CHAIN, True),
        (GAME, f"  {CHAIN}\n", True),
        (GAME, "28+86=114,31-13=18,114-18=96", True),  # either order
        (GAME, "31-13=18,86+28=114,114-18=96", True),
        (GAME, "86+28=114,114+13=127,127-31=96", True),  # another way
        ("3,4,12", "3*4=12", True),
        ("12,4,3", "12/4=3", True),
        ("5,5,0", "5-5=0", True),
        ("5,5,1", "5/5=1", True),
        ("7,7,7,7", "7-7=0,7+0=7", True),  # numbers that occur more than once
        ("0,5,0", "0/5=0", True),
        ("2,3,4,5,14", "2*3=6,4+5=9,9+6=15,15-1=14", False),  # a number that was not given
        (GAME, "86+28=114,31-13=18", False),  # stops early
        (GAME, "86+28=114", False),
        (GAME, "31+86=117,117-28=89,89+13=102", False),  # another number than the target
        (GAME, "86+28=114,31-13=18,114-18=96,96-0=96", False),  # a step too many
        (GAME, "86+28=114,114-18=96", False),  # 18 was never made
        (GAME, "114-18=96,86+28=114,31-13=18", False),  # used before it is made
        (GAME, "86+28=114,28-13=15,114-15=99", False),  # a number used twice
        (GAME, "86+28=114,86-13=73,114-18=96", False),
        (GAME, "86+28=115,31-13=18,115-19=96", False),  # a wrong intermediate result
        (GAME, "86+28=114,31-13=18,114-18=97", False),
        (GAME, "86+28=114,13-31=18,114-18=96", False),  # a difference the wrong way
        ("3,5,2", "3-5=-2", False),  # negative
        ("5,2,2", "5/2=2", False),  # rounded
        ("5,2,2", "5/2=2.5", False),
        ("5,0,0", "5/0=0", False),
        ("5,2,25", "5^2=25", False),
        ("5,2,25", "5**2=25", False),
        ("5,2,7", "5+2=07", False),
        ("5,2,7", "5 + 2 = 7", False),  # published without spaces
        ("5,2,7", "5+2=7.", False),
        ("5,2,7", "5+2=7,", False),
        ("5,2,7", "The answer is 5+2=7", False),
        ("1,2,3,6", "1+2+3=6", False),  # two numbers a step
        ("1,2,3,6", "(1+2)+3=6", False),
        ("5,2,7", "7", False),
        ("5,2,7", "", False),
        ("5,2,7", "\u0665+\u0662=\u0667", False),  # Arabic digits
        ("9,9,9", "9" * 50 + "+9=9", False),
    ],
)
def test_countdown(problem, answer, correct):
    verdict = judge_countdown(problem, answer)
    assert verdict.correct is correct
    assert verdict.reason


@pytest.mark.parametrize("problem", ["", "1", "1,2", "1,2,x", "1 2 3", "1,2,-3", "01,2,3", "1,,3"])
def test_countdown_problems_that_are_none(problem):
    with pytest.raises(ValueError, match="file:3: .*countdown problem"):
        parse_countdown(problem, "file:3")


@pytest.mark.parametrize(
    ("expected", "answer", "correct"),
    [
        (18, "She makes 9 * 2 = $18 every day.\n#### 18", True),
        (18, "#### 18.00", True),
        (18, "#### $18", True),
        (18, "#### 18 dollars", True),
        (18, r"So the total is \boxed{18}.", True),
        (18, r"\boxed{\$18.00}", True),
        (18, r"\boxed{x = 18}", True),
        (18, "The answer is 18.", True),
        (18, "The final answer is: **18**", True),
        (18, "Answer: 18", True),
        (18, "The answer is 9 * 2 = 18.", True),
        (18, "She has 16 eggs, eats 3 and bakes 4. Selling the rest at $2 each, she makes 18 dollars.", True),  # prose
        (18, "The answer is 18. Check: 18 / 2 = 9.", True),  # what follows the announcement does not count
        (18, "#### 17\nWait, that is wrong.\n#### 18", True),  # the last word
        (18, "Janet sells 16-3-4=9 eggs.\nShe makes 9*2=18", True),
        (70000, "He made $70,000.", True),
        (70000, "#### 70,000", True),
        (1234567, "That is 1,234,567 in all.", True),
        (70000, r"\boxed{70{,}000}", True),
        (-5, "#### -5", True),
        (-5, "The temperature is \u22125 degrees.", True),
        (-5, "He ends with -$5.", True),
        (-5, "The answer is $-5.", True),
        (Fraction(5, 2), "Each gets 2.5 apples.", True),
        (Fraction(1, 2), r"\boxed{\frac{1}{2}}", True),
        (Fraction(1, 2), "The answer is 1/2.", True),
        (Fraction(1, 2), "The answer is .5", True),
        (3, "5-2 leaves 5-2=3", True),
        (3, "The difference is 16-13 or 3", True),
        (18, "- 3 eaten\n- 18 sold", True),  # a list, not negative numbers
        (25, "It grows by 25%.", True),
        (18, "#### 19", False),
        (18, "#### -18", False),
        (18, "#### 180", False),
        (18, "#### 1.8", False),
        (18, "#### 18.5", False),
        (18, "The answer is 17. But 18 is near.", False),
        (18, "She makes 18 dollars in 2 days", False),  # prose that ends in another number
        (18, r"18 was my guess, but \boxed{20}", False),
        (70000, "He made $70.000", False),
        (70000, "He made 70", False),
        (70000, "70,00", False),
        (5, "#### -5", False),
        (-5, "10-5", False),  # a subtraction
        (18, "eighteen", False),
        (18, "", False),
        (18, "####", False),
        (18, "I do not know.", False),
        (18, "1" * 60, False),
        (18, "The answer is not 18.", False),
        (18, "She has 18 eggs. The answer isn't 20.", True),
    ],
)
def test_numbers(expected, answer, correct):
    assert judge_number(Fraction(expected), answer).correct is correct


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("&#" + "9" * 5000 + "; The answer is 18.", True),  # Python refuses to read a number of 5000 digits
        ("The answer is 18&#" + "0" * 5000, True),
        ("-" + "\u00a0" * 20_000 + "\nThe answer is unknown.", False),  # took 17 seconds
    ],
    ids=["reference", "unfinished reference", "spaces"],
)
def test_degenerate_answers_neither_raise_nor_take_long(answer, correct):
    begun = time.process_time()
    assert judge_number(Fraction(18), answer).correct is correct
    assert time.process_time() - begun < 2


def test_how_a_number_was_announced():
    assert final_number("so 3, 4\n#### 5") == (5, "after ####")
    assert final_number(r"\boxed{5} and 6") == (5, "in a box")
    assert final_number("the answer is 5, not 6") == (5, "announced as the answer")
    assert final_number("To answer this we need 3 apples, so 7") == (7, "the last number")


@pytest.mark.parametrize(
    ("text", "value"), [("1,234", 1234), (" -2.50 ", Fraction(-5, 2)), ("3/0", None), ("12 eggs", None)]
)
def test_a_text_that_is_a_number(text, value):
    assert to_number(text) == value


def test_reference_answers():
    assert expected_number("9*2=18\n#### 1,018", "f:1") == 1018
    for bad in ("18", "#### eighteen", "####"):
        with pytest.raises(ValueError, match="f:7: .*#### NUMBER"):
            expected_number(bad, "f:7")


PARIS = {"contains": "Paris"}


@pytest.mark.parametrize(
    ("row", "answer", "correct"),
    [
        (PARIS, "Paris", True),
        (PARIS, "The capital of France is paris.", True),
        (PARIS, "PARIS!", True),
        (PARIS, "It is **Paris**, on the Seine.", True),
        (PARIS, "London", False),
        (PARIS, "Par is", False),
        (PARIS, "", False),
        (PARIS, "   \n", False),
        ({"contains": ["red", "green", "blue"]}, "Blue, green and red.", True),
        ({"contains": ["red", "green", "blue"]}, "Blue and red.", False),
        ({"contains": "New York"}, "new\n  york", True),
        ({"contains": "New York"}, "newyork", False),
        ({"contains": "Straße"}, "STRASSE", True),
        ({"contains": "naïve"}, "naive", False),
        ({"any_of": ["H2O", "water"]}, "It is water.", True),
        ({"any_of": ["H2O", "water"]}, "h2o", True),
        ({"any_of": ["H2O", "water"]}, "It is ice.", False),
        ({"any_of": "one"}, "one", True),
        ({"excludes": ["as an AI"]}, "Sure.", True),
        ({"excludes": ["as an AI"]}, "As an AI, I cannot.", False),
        ({"excludes": ["as an AI"]}, "", False),
        ({"contains": "4", "excludes": "5"}, "2 + 2 = 4", True),
        ({"contains": "4", "excludes": "5"}, "4 or 5", False),
        ({"matches": r"^\d{4}$"}, "1969", True),
        ({"matches": r"^\d{4}$"}, "in 1969", False),
        ({"matches": r"(?i)\byes\b"}, "Yes, it is.", True),
        ({"matches": r"(?i)\byes\b"}, "yesterday", False),
        ({"matches": r"def \w+\("}, "def add(a, b):", True),
        ({"matches": r"def \w+\("}, "function add(a, b)", False),
        ({"contains": "x", "any_of": ["y", "z"], "matches": "z$"}, "x, z", True),
        ({"contains": "x", "any_of": ["y", "z"], "matches": "z$"}, "x, y", False),
        ({"contains": "x", "any_of": ["y", "z"], "matches": "z$"}, "x z.", False),
    ],
)
def test_probe(row, answer, correct):
    verdict = parse_expectation(row, "f:1")(answer)
    assert verdict.correct is correct
    assert verdict.reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no condition for a good answer"),
        ({"contains": []}, "'contains' must be"),
        ({"contains": ["a", " "]}, "'contains' must be"),
        ({"any_of": 3}, "'any_of' must be"),
        ({"matches": "("}, "not a valid regular expression"),
        ({"matches": 3}, "must be a regular expression"),
    ],
)
def test_probe_rows_that_say_nothing(row, message):
    with pytest.raises(ValueError, match=f"^f:9: .*{message}"):
        parse_expectation(row, "f:9")


def test_an_expectation_of_nothing_but_an_answer():
    assert Expectation()("anything").correct
    assert not Expectation()("").correct


@pytest.mark.parametrize(
    ("task", "template", "answer", "kept"),
    [
        ("sudoku", "raw", SOLVED + "\n\nInput:\n0000", SOLVED),
        ("sudoku", "raw", " " + SOLVED, SOLVED),
        ("sudoku", "chat", SOLVED + "\n\nDone.", SOLVED + "\n\nDone."),
        ("countdown", "raw", f" {CHAIN}\n\nInput: 1,2,3", CHAIN),
        ("gsm8k", "raw", " 9*2=18\n#### 18\n\nQuestion: How many 5s?", "9*2=18\n#### 18"),
        ("chat", "raw", "a\n\nb", "a\n\nb"),
    ],
)
def test_what_follows_an_answer_is_cut_off(task, template, answer, kept):
    assert TASKS[task].cut(answer, template) == kept


TWO, THREE = ("yes", "no"), ("Paris", "Lyon", "Marseille")


@pytest.mark.parametrize(
    ("nats", "choices", "answer", "correct", "correct_by_byte"),
    [
        ([1.0, 2.0], TWO, 0, True, True),
        ([1.0, 2.0], TWO, 1, False, False),
        ([2.0, 1.0], TWO, 1, True, True),
        ([2.0, 1.0], TWO, 0, False, False),
        # "yes" has three bytes and "no" two: 0.5 nats a byte each, then the first; and on both sides of that
        ([1.5, 1.0], TWO, 1, True, False),
        ([1.5, 1.0], TWO, 0, False, True),
        ([1.49, 1.0], TWO, 0, False, True),
        ([1.51, 1.0], TWO, 0, False, False),
        ([1.51, 1.0], TWO, 1, True, True),
        # equals: the first, whether or not it is right
        ([1.0, 1.0], ("ab", "cd"), 0, True, True),
        ([1.0, 1.0], ("ab", "cd"), 1, False, False),
        ([0.0, 0.0], TWO, 0, True, True),
        ([0.0, 0.0], TWO, 1, False, False),
        ([3.0, 1.0, 1.0], ("abc", "de", "fg"), 1, True, True),
        ([3.0, 1.0, 1.0], ("abc", "de", "fg"), 2, False, False),
        # three choices, of 5, 4 and 9 bytes
        ([5.0, 6.0, 7.0], THREE, 0, True, False),
        ([5.0, 6.0, 7.0], THREE, 2, False, True),
        ([5.0, 6.0, 10.0], THREE, 0, True, True),
        ([9.0, 6.0, 10.0], THREE, 1, True, False),
        ([9.0, 6.0, 30.0], THREE, 1, True, True),
        ([9.0, 8.0, 7.0], THREE, 2, True, True),
        ([9.0, 8.0, 7.0], THREE, 0, False, False),
        # a long right answer loses by nats and wins by byte, and the other way round
        ([12.0, 4.0], ("the blue whale, the largest animal", "a cat"), 0, False, True),
        ([12.0, 4.0], ("the blue whale, the largest animal", "a cat"), 1, True, False),
        ([40.0, 4.0], ("the blue whale, the largest animal", "a cat"), 1, True, True),
        # bytes, not letters: the second has two letters and six bytes
        ([2.0, 4.0], ("ab", "\u4e2d\u6587"), 0, True, False),
        ([2.0, 4.0], ("ab", "\u4e2d\u6587"), 1, False, True),
        ([2.0, 6.5], ("ab", "\u4e2d\u6587"), 1, False, False),
        # what cannot be at all
        ([float("inf"), 900.0], TWO, 1, True, True),
        ([float("inf"), 900.0], TWO, 0, False, False),
        ([float("inf"), float("inf")], TWO, 0, True, True),
        # a bound that sampling has made negative is a bound
        ([-0.1, 0.1], TWO, 0, True, True),
    ],
)
def test_choices(nats, choices, answer, correct, correct_by_byte):
    chosen, chosen_by_byte = likeliest(nats, choices)
    assert (chosen == answer, chosen_by_byte == answer) == (correct, correct_by_byte)


@pytest.mark.parametrize("nats", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], []])
def test_choices_without_a_likelihood(nats):
    with pytest.raises(ValueError, match="every choice must have a number"):
        likeliest(nats, TWO)
