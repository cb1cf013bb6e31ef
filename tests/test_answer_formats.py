"""A model that was trained in d1's format is asked in it, by every program; runs of version 0.1 keep their format."""

import dataclasses
import json
import runpy
from fractions import Fraction

import pytest
from commands import ROOT, run_script
from flax import nnx
from rich.console import Console

import dream_jax
from dream_jax import inference, sharding
from dream_jax.data import RowList, has_traces, token_row
from dream_jax.data.answer_formats import instruction_of
from dream_jax.data.schemas import parse_s1k
from dream_jax.evaluation import EvaluateSettings, evaluate
from dream_jax.evaluation.scored_texts import Choice
from dream_jax.evaluation.tasks import TASKS, read_problems
from dream_jax.inference import ModelSettings
from dream_jax.judges.gsm8k import judge_number
from dream_jax.tokenizer import ByteTokenizer, read_instruction, read_template, write_template
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.folder import check_answer_format, check_folder, save_tokenizer
from dream_jax.trainer.prepared import prepare

BYTES = ByteTokenizer()
D1 = instruction_of("d1")
QUESTION = "What is 2+2?"


def record(number=0):
    return {"question": f"{QUESTION}{number or ''}", "thinking_trajectories": ["Two and two."], "attempt": "4"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "s1k.jsonl"
    file.write_text("".join(json.dumps(record(number)) + "\n" for number in range(12)))
    return file


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A model directory with the note that a run in d1's format leaves."""
    folder = tmp_path_factory.mktemp("trained")
    settings = TrainSettings.flat(
        **{"out": folder, "model": "nano", "data": str(data), "answer_format": "d1", "batch_size": 8, "eval_rows": 2}
    )
    run = prepare(settings, sharding.make_mesh("1x1"))
    run.batches.close()
    source = save_tokenizer(settings, BYTES, None, run.template, run.instruction)
    model = dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(3))
    dream_jax.save(model, folder / "model", tokenizer_dir=source)
    return folder / "model"


def prompt_of_training(found=None):
    row = token_row(parse_s1k(found or record(), "here:1", "d1"), BYTES)
    return row.tokens[: row.prompt_length].tolist()


def test_the_note_of_a_run(trained):
    assert json.loads((trained / "prompt_format.json").read_text()) == {"template": "chat", "instruction": D1}
    prepared = inference.prepare(ModelSettings(model=str(trained)))
    assert (prepared.template, prepared.instruction) == ("chat", D1)
    ids = inference.encode_prompt(QUESTION, prepared.template, BYTES, instruction=prepared.instruction)
    assert ids == prompt_of_training()
    raw = inference.prepare(ModelSettings(model=str(trained), template="raw"))
    assert raw.instruction == ""
    messages = [{"role": "user", "content": QUESTION}]
    assert inference.encode_prompt(messages, "chat", BYTES, instruction=D1) == BYTES.chat(messages)


def test_sample_asks_so(trained, tmp_path, monkeypatch):
    """--prompt, --prompts and the first turn of --chat."""
    asked = []

    def generate(model, prompt, *arguments, **options):
        asked.append(prompt[0].tolist())
        raise ValueError("asked")

    monkeypatch.setattr(dream_jax, "generate", generate)
    given = ("--model", trained, "--max-new-tokens", 2)
    assert run_script("sample.py", *given, "--prompt", QUESTION).stderr == "error: asked\n"
    monkeypatch.setattr("sys.stdin.readline", lambda: QUESTION + "\n", raising=False)
    assert run_script("sample.py", *given, "--chat").stderr == "error: asked\n"
    assert asked == [prompt_of_training()] * 2
    (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    done = run_script("sample.py", *given, "--prompts", tmp_path / "ask.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["instruction"] == D1


def test_evaluate_asks_so(trained, tmp_path):
    """The instruction of the training takes the place of that of the task, unless that explains the problem."""
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "2+2=4\n#### 4"}) + "\n")
    settings = EvaluateSettings(
        model=str(trained), task="gsm8k", file=tmp_path / "gsm8k.jsonl", out=tmp_path / "out", max_new_tokens=2, shots=0
    )
    with open(tmp_path / "console", "w") as file:
        evaluate(settings, Console(file=file, width=1000))
    assert (
        f"prompts of {len(prompt_of_training())}..{len(prompt_of_training())} tokens"
        in (tmp_path / "console").read_text()
    )
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["instruction"] == D1
    assert TASKS["sudoku"].instruction_after(D1) == f"{D1}\n\n{TASKS['sudoku'].instruction}"
    assert TASKS["chat"].instruction_after(D1) == D1


@pytest.mark.parametrize(
    "more", [{"system": "Be kind."}, {"context": "c"}, {"choices": ["3", "4"]}, {"history": [["a", "b"]]}]
)
def test_questions_of_several_columns_are_asked_so(tmp_path, more):
    """The instruction comes before the first user turn, as in training; a list of messages is asked as it is."""
    sample = runpy.run_path(str(ROOT / "sample.py"))
    row = {"question": QUESTION, **more}
    assert sample["read_question_of"](row, "here", "chat", BYTES, D1).ids == prompt_of_training(record() | more)
    listed = {"messages": [{"role": "user", "content": QUESTION}]}
    for found, ids in ((row, prompt_of_training(record() | more)), (listed, BYTES.chat(listed["messages"]))):
        (tmp_path / "ask.jsonl").write_text(json.dumps(found | {"contains": "4"}) + "\n")
        (problem,) = read_problems(TASKS["chat"], tmp_path / "ask.jsonl")
        prompt = TASKS["chat"].prompt(problem, [], "chat", TASKS["chat"].instruction_after(D1))
        assert inference.encode_prompt(prompt, "chat", BYTES) == ids


def test_the_choices_are_scored_after_the_question_of_the_training(trained):
    choice = Choice(number=1, where="x:1", question=QUESTION, choices=("4", "5"), answer=0)
    (first, _) = choice.passages(BYTES, "chat", D1)
    assert first.tokens.tolist() == [*prompt_of_training(), *b"4"]
    assert BYTES.decode(choice.passages(BYTES, "raw", "Choose.")[0].tokens).startswith("Choose.\n\nQuestion: What")


def test_the_harness_asks_so(trained):
    harness = pytest.importorskip("dream_jax.evaluation.harness")
    chat = [{"role": "user", "content": QUESTION}]
    asks = harness.DreamHarness(str(trained))
    assert asks.tok_encode(asks.apply_chat_template(chat)) == prompt_of_training()
    asks = harness.DreamHarness(str(trained), instruction="")
    assert asks.tok_encode(asks.apply_chat_template(chat)) == BYTES.chat(chat)


@pytest.mark.parametrize(
    "answer",
    [
        "<reasoning>The answer is 20? \\boxed{20}? No.</reasoning>\n<answer>18</answer>",
        "<reasoning>the answer is 20.</reasoning>\n<answer>She has \\boxed{18}.</answer>",
        "<|im_start|>think\nThe answer is 20. \\boxed{20}\n<|im_start|>answer\nAnswer: 9 + 9 = 18, so \\boxed{18}.",
        "<|im_start|>think\nthe answer is 20\n<|im_start|>answer\nAnswer: She has 18 eggs left.",
        "<|im_start|>think\nThe answer is 18.\n<|im_start|>answer\nThat is it.",
    ],
)
def test_the_answer_is_judged_and_not_the_reasoning_before_it(answer):
    found = judge_number(Fraction(18), answer)
    assert found.correct, found
    assert not judge_number(Fraction(20), answer).correct


def test_what_version_0_1_noted_is_asked_without_an_instruction(tmp_path):
    (tmp_path / "prompt_format.json").write_text('{"template": "chat"}\n')
    assert (read_template(tmp_path), read_instruction(tmp_path)) == ("chat", "")
    write_template(tmp_path, "raw")
    assert (tmp_path / "prompt_format.json").read_text() == '{"template": "raw"}\n'
    for text in ('{"template": "chat", "instruction": 3}', '{"template": "chat", "more": 1}', '{"instruction": "x"}'):
        (tmp_path / "prompt_format.json").write_text(text)
        with pytest.raises(ValueError, match=r"prompt_format.json"):
            read_instruction(tmp_path)


@pytest.fixture
def begun(data, tmp_path):
    """The folder of an unfinished run of version 0.1, as far as resuming reads it, and the settings of a command."""

    def make(**changes):
        settings = TrainSettings.flat(**{"out": tmp_path / "run", "data": str(data), **changes})
        (tmp_path / "run").mkdir(exist_ok=True)
        plain = settings.plain() | {"answer_format": settings.rows.answer_format.removesuffix("-0.1")}
        (tmp_path / "run" / "settings.json").write_text(json.dumps(plain))
        (tmp_path / "run" / "data.json").write_text('{"rows": {}}')
        return settings

    return make


@pytest.mark.parametrize("name", ["s1", "d1"])
def test_a_run_of_version_0_1_keeps_its_format(begun, name):
    settings = begun(answer_format=name)
    assert check_folder(settings)
    with pytest.raises(ValueError, match=f"begun by version 0.1.* pass --answer-format {name}-0.1 to resume"):
        check_answer_format(settings, settings.source("train"))
    old = settings.replaced(answer_format=f"{name}-0.1")
    assert check_folder(old)
    check_answer_format(old, old.source("train"))
    # The command may end after it has written its settings.
    (settings.run.out / "settings.json").write_text(json.dumps(old.plain()))
    assert check_folder(old)
    # Where no row has a trace the format does not matter.
    sudoku = begun(answer_format=name, data="sudoku")
    check_answer_format(sudoku, sudoku.source("train"))
    # A run of this version has the number of its formats, and the names are different settings.
    (settings.run.out / "data.json").write_text('{"rows": {}, "answer_formats": 2}')
    check_answer_format(settings, settings.source("train"))
    with pytest.raises(FileExistsError, match=f"answer_format was '{name}', now '{name}-0.1'"):
        check_folder(sudoku.replaced(answer_format=f"{name}-0.1"))


def test_a_run_of_version_0_1_may_name_the_fields_that_it_left_out(begun):
    settings = begun()
    assert check_folder(settings.replaced(ignore_field=("context",)))
    (settings.run.out / "data.json").write_text('{"rows": {}, "answer_formats": 2}')
    with pytest.raises(FileExistsError, match="ignore_field was"):
        check_folder(settings.replaced(ignore_field=("context",)))


def test_traces_are_found_in_mixtures(data):
    settings = TrainSettings.flat(data="sudoku", mix=(str(data),))
    assert has_traces(settings.source("train")) and not has_traces(TrainSettings.flat().source("train"))
    assert not has_traces(RowList([dataclasses.replace(parse_s1k(record(), "x:1"), pieces=())]))
