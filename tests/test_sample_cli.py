"""`sample.py` as a user meets it. Called in this process: a child that imports jax takes many seconds."""

import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax.player import pages
from dream_jax.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
assert _spec is not None and _spec.loader is not None
script = sys.modules["sample"] = importlib.util.module_from_spec(_spec)  # tyro looks its types up there
_spec.loader.exec_module(script)


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    model = dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(1))
    dream_jax.save(model, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.fixture
def sample(monkeypatch, capsys):
    """Runs `sample.py` with arguments, and text as its input."""

    def call(*arguments, typed=""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        try:
            code = script.main()
        except SystemExit as refused:  # by tyro, while it reads the command line
            code = refused.code
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


def test_one_prompt_with_frames(weights, sample):
    done = sample("--model", weights, "--prompt", "1+1=", "--max-new-tokens", 6, "--watch")
    assert done.returncode == 0, done.stderr
    assert "░░░░░░" in done.stdout  # the canvas before the first step
    assert "--- answer" in done.stdout
    assert "5 forward passes" in done.stdout  # of 6 steps, the first writes nothing


def test_replay_of_an_answer(weights, tmp_path, sample):
    path = tmp_path / "new" / "answer.html"
    arguments = ("--model", weights, "--prompt", "<!--", "--max-new-tokens", 6, "--replay", path)
    done = sample(*arguments, "--runner-ups", 2)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}" in done.stdout
    page = path.read_text(encoding="utf-8")
    record = pages.record_of(page)
    assert record["prompt"] == "<!--" and record["parts"] == [{"length": 6}] and record["forwards"] == 5
    assert sorted(entry["position"] for entry in record["tokens"]) == list(range(6))
    assert done.stdout.split("--- answer\n")[1].startswith(record["text"])
    for entry in record["tokens"]:
        assert entry["confidence"] < 0 and entry["logprob"] < 0 and len(entry["runner_ups"]) == 2
    assert record["settings"]["seed"] == 0 and str(tmp_path) not in page

    for more in (("--runner-ups", 20), ("--runner-ups", -1)):
        assert "must be 0 to 19" in sample(*arguments, *more).stderr
    refused = sample(*arguments)
    assert refused.returncode == 1 and f"{path} is there already" in refused.stderr
    assert "--- answer" not in refused.stdout  # the file is found before the answer is computed
    assert path.read_text(encoding="utf-8") == page


def test_filling_in(weights, sample):
    done = sample("--model", weights, "--prompt", "a<|mask|>b", "--max-new-tokens", 0)
    assert done.returncode == 0, done.stderr
    answer = done.stdout.split("--- answer\n")[1].splitlines()[0]
    assert answer.startswith("a") and "░" not in answer


def test_texts_and_paths_are_printed_as_they_are(weights, tmp_path, sample):
    text = "x[:100:2]\t:fire: [b]a[/b] [/c]"  # rich would make emoji, spaces and bold letters of it, or raise an error
    path = tmp_path / "a[/b]:100:.html"
    done = sample("--model", weights, "--prompt", f"{text}<|mask|>", "--max-new-tokens", 0, "--replay", path)
    assert done.returncode == 0, done.stderr
    assert f"--- answer\n{text}" in done.stdout and f"wrote {path}" in done.stdout


def test_more_answers_than_can_be_planned(weights, tmp_path, sample):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n' * 65)
    done = sample("--model", weights, "--prompts", prompts, "--out", tmp_path / "answers.jsonl", "--samples", 65536)
    assert done.returncode == 1 and "samples=65536 for each of 65 prompts makes 4,259,840 answers" in done.stderr
    assert not (tmp_path / "answers.jsonl").exists()


def test_filling_in_takes_a_step_for_each_mask(weights, sample):
    for prompt, new in (("1+1=" + "<|mask|>" * 6, 0), ("1+1=<|mask|><|mask|>", 4)):
        done = sample("--model", weights, "--prompt", prompt, "--max-new-tokens", new)
        assert "5 forward passes" in done.stdout, done.stderr  # as with six new tokens


def test_a_file_of_prompts_resumes_where_it_stopped(weights, tmp_path, sample):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "x" * length} for length in (1, 30, 3)] + [{"messages": [{"role": "user", "content": "hi"}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", weights, "--prompts", prompts, "--out", answers, "--max-new-tokens", 4)
    arguments += ("--temperature", 0.8, "--batch-size", 2)
    assert sample(*arguments).returncode == 0
    whole = answers.read_bytes()
    assert sorted(json.loads(line)["line"] for line in whole.splitlines()) == [1, 2, 3, 4]

    # Killed while the last answer was being written: it alone is computed again, to the same text.
    lines = whole.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:-1]) + lines[-1][:7])
    done = sample(*arguments)
    assert "4 prompts, 3 answered already" in done.stdout
    assert answers.read_bytes() == whole

    # Nor are answers made in two ways mixed in one file.
    done = sample(*arguments[:-2], "--batch-size", 1, "--seed", 5)
    assert done.returncode == 1 and "seed was 0, now 5" in done.stderr and "temperature" not in done.stderr
    assert answers.read_bytes() == whole

    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "y"}\n')
    done = sample(*[other if one is prompts else one for one in arguments])
    assert done.returncode == 1 and "not an answer to a prompt of" in done.stderr
    assert answers.read_bytes() == whole


@pytest.mark.slow
def test_two_hundred_prompts_and_a_kill(weights, tmp_path, sample):
    prompts = tmp_path / "prompts.jsonl"
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    prompts.write_text("".join(json.dumps({"prompt": "x" * int(length)}) + "\n" for length in lengths))

    def arguments(out):
        files = ("--model", weights, "--prompts", prompts, "--out", out)
        return [*map(str, files), "--max-new-tokens", "8", "--temperature", "0.8", "--batch-size", "4"]

    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    with subprocess.Popen(
        [sys.executable, "sample.py", *arguments(killed)], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 240
        while not killed.exists() or killed.read_bytes().count(b"\n") < 40:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        run.kill()
    found = killed.read_bytes().count(b"\n")
    assert 40 <= found < 200
    done = sample(*arguments(killed))
    assert f"200 prompts, {found} answered already" in done.stdout, done.stderr
    assert sample(*arguments(whole)).returncode == 0
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (killed, whole)]
    assert sorted(row["line"] for row in rows[0]) == list(range(1, 201))
    by_line = [sorted(answers, key=lambda row: row["line"]) for answers in rows]
    assert by_line[0] == by_line[1]


def test_chat(weights, sample):
    arguments = ("--model", weights, "--chat", "--max-new-tokens", 4, "--preset", "fast")
    done = sample(*arguments, typed="hi\nand then?\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you: ") == 3 and done.stdout.count("you: model: ") == 2


def test_a_chat_begins_with_the_system_turn(weights, sample):
    done = sample("--model", weights, "--chat", "--system", "Be short.", "--max-new-tokens", 4, "--preset", "fast")
    assert done.returncode == 0, done.stderr
    done = sample("--model", weights, "--prompt", "hi", "--system", "x" * 3000, "--max-new-tokens", 2)
    assert done.returncode == 1 and "--prompt: a prompt of 3" in done.stderr  # the system turn is in the prompt


def test_tools_are_read_from_a_file(weights, tmp_path, sample):
    path = tmp_path / "tools.json"
    for text, message in (
        ('[{"type": "function", "function": {"name": "f"}}]', "the byte tokenizer does not support tools"),
        ("{", "not JSON"),
        ("[3]", "tools.json: 'tools' must be a list of objects"),
        ("[]", "tools.json has no functions"),
    ):
        path.write_text(text)
        for asking in (("--prompt", "hi"), ("--chat",)):
            done = sample("--model", weights, *asking, "--tools", path)
            assert done.returncode == 1 and message in done.stderr, done.stderr


def test_fields_that_are_no_part_of_a_prompt_are_counted(weights, tmp_path, sample):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a", "note": 1}\n{"instruction": "Reverse.", "input": "ab", "output": "ba"}\n')
    arguments = ("--model", weights, "--prompts", prompts, "--out", out, "--max-new-tokens", 2)
    done = sample(*arguments)
    assert done.returncode == 0, done.stderr
    assert "fields that are no part of a prompt, and were not read: 'note' in 1, 'output' in 1 of 2 rows" in done.stdout
    by_line = {row["line"]: row["prompt"] for row in map(json.loads, out.read_text().splitlines())}
    assert by_line == {1: "a", 2: [{"role": "user", "content": "Reverse.\nab"}]}
    assert "0 new answers" in sample(*arguments).stdout
    done = sample(*arguments, "--ignore-field", "note")
    assert done.returncode == 1 and "ignore_field was None, now ['note']" in done.stderr
    done = sample(*arguments, "--ignore-field", "nothing")
    assert done.returncode == 1 and "no row has the field(s) ['nothing'] of --ignore-field" in done.stderr


def test_rows_that_are_no_answers_are_refused(weights, tmp_path, sample):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    out = tmp_path / "o.jsonl"
    arguments = ("--model", weights, "--prompts", tmp_path / "a.jsonl", "--out", out, "--max-new-tokens", 1)
    assert sample(*arguments).returncode == 0
    for change in ({"answer": None}, {"line": True}, {"sample": 1}, {"prompt": "b"}):
        row = json.dumps({"line": 1, "prompt": "a", "answer": "x"} | change) + "\n"
        out.write_text(row)
        done = sample(*arguments)
        assert done.returncode == 1 and "o.jsonl:1: not an answer to a prompt of" in done.stderr
        assert out.read_text() == row


def test_answers_need_a_file(tmp_path, sample):
    """Opening a pipe for reading would wait for ever."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    os.mkfifo(tmp_path / "pipe")
    done = sample("--model", "nano", "--prompts", tmp_path / "a.jsonl", "--out", tmp_path / "pipe")
    assert done.returncode == 1 and "pipe is a pipe or a device" in done.stderr


@pytest.mark.slow
def test_several_answers_to_each_prompt(weights, tmp_path, sample):
    """Other samples are other answers; the first is the one that is drawn without them."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"prompt": "yy"}\n')
    found = {}
    for samples in (1, 3):
        out = tmp_path / f"{samples}.jsonl"
        arguments = ("--model", weights, "--prompts", prompts, "--out", out, "--max-new-tokens", 12)
        done = sample(*arguments, "--temperature", 1.5, "--samples", samples, "--preset", "balanced")
        assert done.returncode == 0, done.stderr
        assert "per token before the end" in done.stdout
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        found[samples] = {(row["line"], row.get("sample", 0)): row["answer"] for row in rows}
    assert sorted(found[3]) == [(line, sample) for line in (1, 2) for sample in range(3)]
    assert found[1].items() <= found[3].items()
    assert len(set(found[3].values())) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x", "--samples", 2), "is for --prompts"),
        (("--prompt", "x", "--ignore-field", "a"), "--ignore-field is for --prompts FILE"),
        (("--prompts", "a", "--out", "b", "--system", "c"), "--system and --tools are for --prompt and --chat"),
        (("--prompt", "x", "--system", " "), "--system is blank"),
        (("--prompt", "x", "--preset", "fast", "--steps", 4), "has no effect with"),
        ((), "exactly one of --prompt TEXT, --prompts FILE and --chat"),
        (("--prompt", "x", "--model", "no/such/model"), "no/such/model"),
        (("--prompt", "x", "--model", "small"), "no tokenizer files"),
        (("--prompt", "x", "--model", "nano", "--top-p", "1.5"), "outside"),
        (("--prompts", "missing.jsonl", "--out", "x.jsonl", "--model", "nano"), "missing.jsonl"),
    ],
)
def test_refusals(arguments, message, sample):
    done = sample(*arguments)
    assert done.returncode in (1, 2)  # 2: refused while reading the command line, in a box
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "not json\n",
        '{"text": "x"}\n',
        "[1]\n",
        '{"messages": [{"role": "critic", "content": "x"}]}\n',
        json.dumps({"prompt": "x" * 2050}) + "\n",
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, content, sample):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + content)
    done = sample("--model", "nano", "--prompts", path, "--out", tmp_path / "answers.jsonl")
    assert done.returncode == 1
    assert "prompts.jsonl:2: " in done.stderr
