"""The generated problems with long answers: what they are, how they are solved, divided, judged and opened."""

import re
from pathlib import Path

import pytest

from dream_jax.data import LONG_TASKS, ChainSource, ReadOptions, RouteSource, open_source
from dream_jax.data.long_tasks import TEST_SIZE, TRAIN_SIZE, solve_chain, solve_route
from dream_jax.judges.long_tasks import judge_chain, judge_route
from dream_jax.tokenizer import ByteTokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "long_tasks.md").read_text()
CHAIN, CHAIN_ANSWER = "a3b5\nb+a=K\na+K=c\nK+b=Z", "b5+a3=K8\na3+K8=c1\nK8+b5=Z3"
ROUTE, ROUTE_ANSWER = "b>c+4\na>b+7\ncab\na+0=5", "a>b+7=2\nb>c+4=6\nc6a5b2"

CHAIN_5 = "X9e0R6T0\nR+R=W\nW+W=w\nX+w=n\ne+X=k\nw+n=t\nn+e=L\nk+T=N\n"
ROUTE_5 = "o>V+4\nN>K+9\nV>E+3\nE>S+8\nu>o+9\nS>N+8\nouKNSVE\nu+0=1\n"


def test_the_examples_of_the_module_are_solved():
    assert solve_chain(CHAIN + "\n") == CHAIN_ANSWER
    assert solve_route(ROUTE + "\n") == ROUTE_ANSWER


@pytest.mark.parametrize("name", LONG_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_have_one_length_and_their_answers_are_right(name, split):
    task = LONG_TASKS[name]
    source = task.source(split, size=12)
    assert len(source) == 12 and source.uniform_length
    rows = [source[index] for index in range(12)]
    assert len({row.prompt for row in rows}) == 12
    assert len({(len(row.prompt), len(row.response)) for row in rows}) == 1
    tokens = len(ByteTokenizer().encode(rows[0].response)) + 1  # with the end token
    assert tokens <= task.new_tokens < tokens + 32 and task.new_tokens % 32 == 0
    judge = judge_chain if isinstance(source, ChainSource) else judge_route
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert judge(row.prompt, row.response).correct
        assert not judge(row.prompt, other.response).correct
        assert row.meta == {"lines": task.sizes["lines"]}


def test_a_chain_adds_each_name_once_from_each_side_and_reaches_far_back():
    source, distances = ChainSource("train", size=40), []
    for index in range(40):
        prompt = source[index].prompt
        first, *sums = prompt.strip().split("\n")
        found = [re.fullmatch(r"(.)\+(.)=(.)", line).groups() for line in sums]
        assert len(first) == 22 and len(sums) == 28
        for side in range(3):
            names = [one[side] for one in found]
            assert len({*names}) == 28
        defined = {one[2]: number for number, one in enumerate(found)}
        distances += [number - defined[x] for number, one in enumerate(found) for x in one[:2] if x in defined]
    # A line of an answer has nine tokens, and a block of the sampler 32.
    assert sum(distance > 4 for distance in distances) > 0.5 * len(distances)
    assert "on average about 6 lines, or 58 tokens" in PAGE
    assert abs(9 * sum(distances) / len(distances) - 58) < 4


def test_the_page_has_the_numbers_of_tokens():
    for name, task in LONG_TASKS.items():
        row, words = task.source("test", size=1)[0], ByteTokenizer()
        prompt, answer = len(words.encode(row.prompt)), len(words.encode(row.response)) + 1
        assert f"| `{name}` | {prompt} | {answer} | {task.new_tokens} |" in PAGE


def test_digits_and_the_positions_of_the_lines_are_evenly_distributed():
    source = RouteSource("train", size=300)
    results = [line[-1] for index in range(300) for line in source[index].response.split("\n")[:24]]
    assert all(600 < results.count(digit) < 840 for digit in "0123456789")
    starts = [source[index].prompt.strip().split("\n") for index in range(300)]
    assert len({next(n for n, line in enumerate(lines) if line[0] == lines[-1][0]) for lines in starts}) == 24


def test_problems_are_functions_of_split_seed_and_index():
    source, again = ChainSource("train", seed=3), ChainSource("train", seed=3, size=9)
    assert len(source) == TRAIN_SIZE and len(ChainSource("test")) == TEST_SIZE
    assert [source[n] for n in range(9)] == [again[n] for n in range(9)]
    assert source[0].prompt != ChainSource("train", seed=4)[0].prompt
    # These texts must not change: stored results of a benchmark are about them.
    assert LONG_TASKS["chain-short"].source("test")[5].prompt == CHAIN_5
    assert LONG_TASKS["route-short"].source("test")[5].prompt == ROUTE_5


def test_no_problem_is_in_both_splits():
    """With so few names there are few different problems, and without the division both splits would have many of them."""
    size = {"lines": 1, "givens": 1, "size": 4000}
    # One name with a digit is added to itself: 52 * 10 * 51 different problems.
    train = {row.prompt for row in (ChainSource("train", **size)[n] for n in range(4000))}
    test = {row.prompt for row in (ChainSource("test", seed=1, **size)[n] for n in range(4000))}
    assert len(train) > 3000 and len(test) > 1500 and not train & test


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        ("", "a line such as a3b5"),
        ("a3b5", "a line such as a3b5"),
        ("a3b5\na+b", "a line such as a3b5"),
        ("a3a5\na+a=c", "two values"),
        ("a3b5\na+d=c", r"a\+d=c must add names that are defined"),
        ("a3b5\na+b=b", "to a new name"),
    ],
)
def test_texts_that_are_no_chains(problem, why):
    with pytest.raises(ValueError, match=f"is no chain: .*{why}"):
        solve_chain(problem)
    with pytest.raises(ValueError, match="is no chain"):
        judge_chain(problem, "")


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        ("", "roads such as"),
        ("\n\n\n", "roads such as"),
        ("ab\n\n", "roads such as"),
        ("a>b+7\nab", "roads such as"),
        ("a>b+12\nab\na+0=5", "roads such as"),
        ("a>b+7\nab\na+1=5", "roads such as"),
        ("a>b+7\nc>d+1\nab\na+0=5", "all roads"),
        ("a>b+7\na\na+0=5", "list the towns"),
        ("a>b+7\nb>a+1\nab\na+0=5", "to a twice"),
        ("a>b+7\na>b+7\nab\na+0=5", "all roads"),
    ],
)
def test_texts_that_are_no_routes(problem, why):
    with pytest.raises(ValueError, match=f"is no route: .*{why}"):
        solve_route(problem)


def test_verdicts_name_the_first_wrong_line():
    assert judge_chain(CHAIN, f" {CHAIN_ANSWER}\n").correct
    wrong = judge_chain(CHAIN, CHAIN_ANSWER.replace("c1", "c2"))
    assert not wrong.correct and wrong.reason == "line 2 is 'a3+K8=c2', not 'a3+K8=c1'"
    short = judge_chain(CHAIN, CHAIN_ANSWER[:-9])
    assert not short.correct and short.reason == "the answer has 2 lines, not 3"
    assert judge_route(ROUTE, "").found is None
    assert judge_route(ROUTE, ROUTE_ANSWER + "\nx").reason == "the answer has 4 lines, not 3"


def test_sources_refuse_bad_settings():
    for bad in ({"size": 0}, {"lines": 0}, {"givens": 0}, {"lines": 42}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ChainSource("train", **bad)
    with pytest.raises(ValueError, match="52 letters"):
        RouteSource("train", lines=52)
    with pytest.raises(ValueError, match="valid"):
        RouteSource("valid")
    with pytest.raises(IndexError):
        RouteSource("train", size=3)[3]


def test_they_are_opened_by_name_unless_a_path_has_that_name(tmp_path, monkeypatch):
    assert open_source("route-short", "test", seed=2)[4] == LONG_TASKS["route-short"].source("test", seed=2)[4]
    with pytest.raises(ValueError, match="--data-config main"):
        open_source("chain", options=ReadOptions(config="main"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert open_source("chain")[0].response == "b"
