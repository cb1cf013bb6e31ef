"""The adapter to lm-evaluation-harness, on local task files. Skipped where the extra `eval` is not installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval (lm-eval)")

ROOT = pathlib.Path(__file__).parent.parent

GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generation.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def tasks(tmp_path):
    data = {
        "generation": [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(3)],
        # Under random weights every byte costs about ln 261 nats: the shortest choice is the likeliest.
        "choice": [
            {"question": "a?", "choices": ["long answer", "b"], "answer": 1},
            {"question": "b?", "choices": ["c", "another one"], "answer": 0},
        ],
        "rolling": [{"text": "some text of forty-odd bytes, in two windows"}],
    }
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"generation": GENERATION, "choice": CHOICE, "rolling": ROLLING}.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return tmp_path


def harness(folder, model_args, *arguments):
    command = [sys.executable, "-m", "dream_jax.evaluation.harness", "run", "--model", "dream_jax"]
    command += ["--model_args", model_args, "--include_path", folder, "--output_path", folder / "out", *arguments]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
    }
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
def test_local_tasks_end_to_end_without_network(tasks):
    done = harness(
        tasks,
        "pretrained=nano,preset=instruct,samples=16,max_length=32",
        "--tasks",
        "local_generation,local_choice,local_rolling",
        "--batch_size",
        "4",
        "--log_samples",
        "--apply_chat_template",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tasks / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    assert found["local_choice"]["acc,none"] == 1.0
    assert found["local_generation"]["exact_match,none"] == 0.0
    # ln 261 nats a byte are log2(261) bits.
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(8.03, rel=0.1)
    (samples,) = (tasks / "out").rglob("samples_local_generation_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3 and all(isinstance(row["resps"][0][0], str) for row in rows)
    assert "<|im_start|>user\n0+0=<|im_end|>" in json.loads(json.dumps(rows[0]))["arguments"]["gen_args_0"]["arg_0"]


def test_arguments_that_cannot_be():
    from dream_jax.evaluation.harness import DreamHarness

    with pytest.raises(ValueError, match="preset='fastest' is not one of"):
        DreamHarness("nano", preset="fastest")
    with pytest.raises(ValueError, match="batch_size='auto' must be a positive integer"):
        DreamHarness("nano", batch_size="auto")
    with pytest.raises(ValueError, match="max_length=1 is outside"):
        DreamHarness("nano", max_length=1)


def test_the_command_says_what_is_wrong(monkeypatch):
    from dream_jax.evaluation import harness

    def refuse():
        raise ValueError("no such preset")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit, match="error: no such preset"):
        harness.main()


def test_the_sampler_of_a_request():
    """The model's arguments come before the preset, and the preset before what a task asks for."""
    from dream_jax.evaluation.harness import DreamHarness, _stops

    lm = DreamHarness("nano", preset="instruct", top_p=0.5, samples=16, greedy=True)
    config = lm._request_config(
        {"until": ["x"], "do_sample": False, "temperature": 0.0, "top_k": 7, "max_gen_toks": 12}
    )
    assert (config.temperature, config.top_p, config.top_k) == (0.1, 0.5, 7)
    assert (config.max_new_tokens, config.steps) == (12, None)
    plain = DreamHarness("nano", samples=16)
    assert plain._request_config({"do_sample": False}).temperature == 0
    assert plain._request_config({}).max_new_tokens == 256
    assert plain._request_config({"temperature": 0.7}).temperature == 0.7
    assert _stops({"until": "b"}) == ["b"] and _stops({"until": ["a", "b"]}) == ["a", "b"] and _stops({}) == []
    assert plain._names(["a", "b", "a"])[::2] == [plain._names(["a"])[0], plain._names(["a", "a"])[1]]
    ids = plain._tokenizer.encode("ab")
    assert plain._fit(list(range(3000)), 48) == list(range(3000 - 2000, 3000))
    assert plain._fit([], 1) == [plain.prefix_token_id]
    text = plain.apply_chat_template([{"role": "user", "content": "<|mask|>"}])
    assert plain._tokenizer.mask_id not in plain.tok_encode(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert plain.apply_chat_template(turns, False).endswith("assistant\nb")
    logits = np.asarray(lm._model(np.array([[*ids, lm._tokenizer.mask_id]])))[0, len(ids) - 1]
    best, nats = int(logits[:260].argmax()), np.log(np.exp(np.float64(logits)).sum()) - logits
    for token, expected in ((best, True), ((best + 1) % 256, False)):
        ((value, greedy),) = lm._loglikelihood_tokens([(None, ids, [token])])
        assert greedy == expected and abs(value + nats[token]) < 1e-4
