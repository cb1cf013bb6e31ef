"""The examples run: each script in this process, the notebook in a kernel, both with a few training steps."""

import importlib.util
import re
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def standard_promotion():
    """As outside the tests: optax raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_scripts(tmp_path, capsys, standard_promotion):
    load("finetune").main(tmp_path / "model", steps=2)
    told = capsys.readouterr().out
    assert "after 2 steps" in told and "of 10 sentences are correct" in told
    load("denoise").main(str(tmp_path / "model"), new_tokens=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " -1  dark is not ░░░░" and lines[-1].startswith("step that wrote each new token: [")
    assert len(lines) == 6 and "░" not in lines[-2]
    load("infill").main(str(tmp_path / "model"))
    before, after = capsys.readouterr().out.splitlines()
    assert before == "before: h__ is not col_" and re.fullmatch(r"after:  h.* is not col.*", after)


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "denoise.py", "finetune.py", "infill.py", "tour.ipynb",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
def test_notebook():
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    (steps,) = (cell for cell in notebook.cells if cell.source == "STEPS = 400")
    steps.source = "STEPS = 2"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3


@pytest.mark.slow
def test_ten_sentences_are_learned(tmp_path, capsys, standard_promotion):
    load("finetune").main(tmp_path / "model")
    right = int(re.search(r"(\d+) of 10 sentences are correct", capsys.readouterr().out)[1])
    assert right >= 8
