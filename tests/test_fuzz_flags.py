"""Changes the command lines of all commands in many ways: each must run, or name the flag that it refuses.

Flags and positional arguments are those of the parser of each script. The changes are drawn with a fixed seed. Whatever
would train, convert, load weights or listen is replaced by a function that ends the command.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest
from commands import ROOT, run_script
from test_flags import parser_of

import dream_jax
import dream_jax.trainer
from dream_jax import files, inference, lora, pretrained
from dream_jax.evaluation import ledger, report
from dream_jax.files import new_directory
from dream_jax.pretrained import adapter, autoregressive, conversion, llama, models
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.folder import check_folder

CHANGES = {"train.py": 16}
"""Number of changes to the command line of each script, if it is not `USUAL`."""
USUAL = 9
SEED = 15


class Reached(BaseException):
    """Raised where a command with these flags would begin its work."""


def stop(*_: Any, **__: Any) -> NoReturn:
    raise Reached


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    (folder / "countdown.jsonl").write_text('{"input": "86,28,13,31,96", "output": "86+28=114,31-13=18,114-18=96"}\n')
    (folder / "gsm8k.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    (folder / "directory").mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    shutil.copytree(golden_dir / "tiny_a" / "hf", folder / "qwen2")
    config = json.loads((folder / "qwen2" / "config.json").read_text())
    config = {
        name: value for name, value in config.items() if name not in ("mask_token_id", "pad_token_id", "auto_map")
    }
    (folder / "qwen2" / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    model = pretrained.load(golden_dir / "tiny_a" / "hf")
    dream_jax.save(model, folder / "converted")
    tuned = lora.attach(model, lora.LoraConfig(rank=1, alpha=1.0, targets=("q",)), jax.random.key(0))
    dream_jax.save_adapter(tuned, folder / "adapter")
    (folder / "samples").mkdir()
    problems = hashlib.blake2b((folder / "countdown.jsonl").read_bytes(), digest_size=16).hexdigest()
    (folder / "samples" / ledger.SETTINGS).write_text(json.dumps({"task": "countdown", "file": problems}))
    return folder


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Replaces the work of the commands, after the checks that they make before it."""

    def train(settings: TrainSettings, *_: Any) -> NoReturn:
        check_folder(settings)
        raise Reached

    @contextlib.contextmanager
    def directory(path: Any, *, needed_bytes: int = 0, **options: Any) -> Any:
        files.check_new_directory(path, **{"overwrite": False} | options)
        raise Reached
        yield

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(dream_jax.trainer, "train", train)
    monkeypatch.setattr(inference.PreparedModel, "load", stop)
    monkeypatch.setattr(pretrained, "load", lambda path, **_: (models.describe(path), stop()))
    monkeypatch.setattr(files, "write_file", stop)
    monkeypatch.setattr(report, "check_rows", stop)  # convert/pairs.py, after it has checked the evaluation
    monkeypatch.setattr(subprocess, "Popen", stop)  # the workers of study.py
    for module in (adapter, autoregressive, conversion, llama):
        assert module.new_directory is new_directory
        monkeypatch.setattr(module, "new_directory", directory)


def valid(script: str, folder: Path, golden: Path) -> list[str]:
    """Returns arguments with which the script reaches its work."""
    hf, out = str(golden / "tiny_a" / "hf"), "out"
    return {
        "sample.py": ["--model", "nano", "--prompts", "rows.jsonl", "--out", "answers.jsonl"],
        "train.py": ["--data", "rows.jsonl", "--out", out],
        "evaluate.py": ["--model", "nano", "--task", "countdown", "--file", "countdown.jsonl", "--shots", "0"],
        "serve.py": ["--model", "nano", "--port", "0"],
        "study.py": ["--out", out, "--processes", "1"],
        "convert/hf_to_flax.py": [hf, out],
        "convert/flax_to_hf.py": ["converted", out],
        "convert/qwen2_to_dream.py": ["qwen2", out, "--mask-token-id", "120", "--pad-token-id", "121"],
        "convert/ar_to_dream.py": [out, "--from", "qwen2", "--mask-token-id", "120", "--pad-token-id", "121"],
        "convert/pairs.py": ["samples", "pairs.jsonl", "--file", "countdown.jsonl"],
        "convert/gsm8k_to_s1k.py": ["gsm8k.jsonl", out],
        "convert/adapter_to_peft.py": ["adapter", out],
    }[script]


def values(folder: Path) -> list[str]:
    """Returns values that most flags cannot have."""
    numbers = [
        "-1",
        "0",
        "1e400",
        "-inf",
        "nan",
        "9" * 400,
        "9" * 5000,
        str(2**31),
        str(2**63),
        "1e-46",
        "0x10",
        "²",
        "٣",
    ]
    texts = [
        "",
        " ",
        "x",
        "é" * 30,
        "日本語",
        "%s{}",
        "[/b]",
        ":100:",
        "a\nb",
        "x" * 300,
        "null",
        "-",
        "1x1x1x1",
        "a,b",
    ]
    broken = ["\udcff", "a\ud83d", "a\0b"]  # bytes that are not UTF-8 in the command line, and what no path may have
    paths = [
        "nope/nothere.jsonl",
        str(folder / "directory"),
        str(folder / "picture.png"),
        "picture.png/below",
        "/",
        "..",
    ]
    addresses = ["gs://bucket/x", "https://huggingface.co/a/b", "hf://a/b", "~nobody-here/x", "org/name@../../x"]
    return [*numbers, *texts, *broken, *paths, *addresses]


def changed(
    script: str, given: list[str], actions: list[argparse.Action], value: str, draw: random.Random
) -> list[str]:
    """Returns the arguments with this value for a flag or a positional argument that is drawn."""
    action = draw.choice(actions)
    if not action.option_strings:
        place = [one for one in actions if not one.option_strings].index(action)
        return [value if number == place else one for number, one in enumerate(given)]
    flag = max((one for one in action.option_strings if one.startswith("--")), key=len)
    count = action.nargs if isinstance(action.nargs, int) else 1
    return [*given, f"{flag}={value}"] if count == 1 and action.nargs is None else [*given, flag, *[value] * count]


def squeezed(text: str) -> str:
    """Returns a text without the white space and the frames with which it is broken over lines."""
    return re.sub(r"[\s│┃|]", "", text)


def complaint(script: str, arguments: list[str], value: str) -> str | None:
    """Runs a command. Returns what is wrong with its end; None if it has reached its work or named the flag or value."""
    try:
        ended = run_script(script, *arguments)
    except Reached:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if ended.returncode not in (0, 1, 2):
        return f"exit status {ended.returncode}"
    said = squeezed(ended.stderr)
    flag = next((one for one in reversed(arguments) if one.startswith("--")), "")
    name = flag.partition("=")[0].removeprefix("--")
    paths = [os.path.normpath(value), os.path.abspath(value)]
    named = [name.rstrip("s"), name.replace("-", "_").rstrip("s"), value, repr(value)[1:-1], *paths, "the text"]
    if ended.returncode and not any(one and squeezed(one) in said for one in named):
        return f"names neither the flag nor the value: {ended.stderr[-400:]}"
    return None


SCRIPTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *ROOT.glob("convert/[!_]*.py"))]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_changed_flags(script: str, folder: Path, golden_dir: Path, without_work: None) -> None:
    draw = random.Random(f"{SEED} {script}")
    given = valid(script, folder, golden_dir)
    with pytest.raises(Reached):
        run_script(script, *given)
    actions = [one for one in parser_of(script)._actions if one.nargs != 0 and one.dest != "help"]
    every = values(folder)
    wrong = []
    for _ in range(CHANGES.get(script, USUAL)):
        value = draw.choice(every)
        arguments = changed(script, given, actions, value, draw)
        if (found := complaint(script, arguments, value)) is not None:
            wrong.append(f"{script} {arguments!r:.300}\n    {found:.600}")
    assert not wrong, "\n".join(wrong)
