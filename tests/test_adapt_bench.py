"""bench/adapt.py: the carried weights are those of the package, in small files, and the command runs with few packages."""

import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import ROOT, run_script
from test_llama import write_gguf

import dream_jax
from dream_jax.pretrained import adapt_llama


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("adapt")


@pytest.fixture
def texts(tmp_path):
    lines = [{"prompt": f"what is {n} and {n + 1}", "response": f"it is {2 * n + 1}, the sum"} for n in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "texts.jsonl"


def test_carried_weights_are_those_of_the_file(bench, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PART_BYTES", 2**20 + 8000)  # so that there are several parts, and the table is divided
    path, _, _ = write_gguf(tmp_path / "tiny.gguf", kinds=("Q4_1", "Q8_0"))
    bench.prepare(tmp_path / "parts", path, str(texts))
    files = sorted(one.name for one in (tmp_path / "parts").iterdir())
    assert len(files) > 5 and {"index.json", "tokens.npz", "weights-00.npz"} <= set(files)
    adapt_llama(path, tmp_path / "dream")
    wanted = jax.tree.leaves(dream_jax.load(tmp_path / "dream", layers="stacked"))
    found = jax.tree.leaves(bench.start(tmp_path / "parts", "float32"))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    with np.load(tmp_path / "parts" / "tokens.npz") as tokens:
        assert tokens["train"].shape[1] == 256 and tokens["train"][0, 0] == 0 and tokens["train"].max() < 100
    (tmp_path / "parts" / "weights-01.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"the parts \[1\] of its weights"):
        bench.start(tmp_path / "parts", "float32")
    with pytest.raises(FileNotFoundError, match="make it with --prepare"):
        bench.start(tmp_path / "none", "float32")
    with pytest.raises(ValueError, match="kind 'Q2_K'"):
        bench.decoded("Q2_K", np.zeros((1, 8), np.uint8))


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--only", "bidirectionl"), 1, "--only 'bidirectionl' is not one of: bidirectional; annealed"),
        (("--small", "--steps", "9"), 2, "--small has its own steps and batch"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, status, message, tmp_path):
    ended = run_script("bench/adapt.py", tmp_path / "parts", "--out", tmp_path / "out", *flags)
    assert ended.returncode == status and message in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_command_runs_where_few_packages_are(bench, texts, tmp_path):
    path, _, _ = write_gguf(tmp_path / "tiny.gguf", kinds=("Q4_1", "Q8_0"))
    bench.prepare(tmp_path / "parts", path, str(texts))
    # Packages that a bare image may lack are hidden.
    hidden = ["msgspec", "scipy", "tyro", "matplotlib", "transformers", "tokenizers", "datasets", "grain"]
    hidden += ["safetensors", "orbax", "gguf", "pyarrow"]
    code = "\n".join(
        (
            f"import runpy, sys\nfor name in {hidden}: sys.modules[name] = None",
            "sys.argv = sys.argv[1:]",
            "runpy.run_path(sys.argv[0], run_name='__main__')",
        )
    )
    script = [ROOT / "bench" / "adapt.py", tmp_path / "parts", "--out", tmp_path / "out", "--small"]
    script += ["--only", "bidirectional"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert [(run["arm"], run["rate"]) for run in found["runs"]] == [("bidirectional", 3e-4), ("bidirectional", 1e-4)]
    curve = found["runs"][0]["curve"]
    assert [one["step"] for one in curve] == [0, 1, 2, 3] and set(curve[0]["nats"]) == {
        "0.1",
        "0.3",
        "0.5",
        "0.7",
        "0.9",
    }
    assert found["settings"]["width"] == 24 and found["autoregressive"]["nats"] > 0
    later = run_script(*map(str, script), "--minutes", "0.01")
    assert later.returncode == 0 and len(json.loads((tmp_path / "out" / "adapt.json").read_text())["skipped"]) == 2
