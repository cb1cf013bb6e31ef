"""The two conversion commands, run as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run_script
from safetensors.numpy import load_file

from dream_jax import hf, pretrained
from dream_jax.config import DreamConfig

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
ENVIRONMENT |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # whole files of it need that path (tests/startup)


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, f"convert/{script}.py", *map(str, arguments)]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def peak_gib(output: str) -> float:
    found = re.search(r"peak memory ([\d.]+) GiB", output)
    assert found, output
    return float(found[1])


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of many layers: 0.34 GiB of float32."""
    fields = json.loads((ROOT / "tests/golden/tiny_a/hf/config.json").read_text()) | {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
    }
    directory = tmp_path / "large"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    config = DreamConfig.from_file(directory)
    shapes = {(place.rule.target, place.layer): place.shape for place in hf.destinations(config).values()}
    rng = np.random.default_rng(0)
    hf.export_from(
        lambda target, layer: rng.random(shapes[target, layer], np.float32),
        config,
        np.dtype("float32"),
        directory,
        max_shard_size=100_000_000,
    )
    yield directory
    shutil.rmtree(tmp_path)  # pytest would keep three of them


def test_there_and_back(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / "tiny_b" / "hf"
    made = run("hf_to_flax", source, tmp_path / "c", "--dtype", "bfloat16", "--mesh", "8x1")  # a process of its own
    assert (made.returncode, made.stderr) == (0, "")
    for line in (
        "dtype: bfloat16",
        "mesh: 8x1",
        "overwrite: False",
        f"checked {source}: 27 tensors, 158,544 parameters",
        f"made {tmp_path / 'c'}: 27 tensors, 158,544 parameters, 317,088 bytes of bfloat16 in",
    ):
        assert line in made.stdout
    assert re.search(r"0\.00 of 0\.00 GB, \d+ MB/s, 0 s left", made.stdout)
    back = run_script("convert/flax_to_hf.py", tmp_path / "c", tmp_path / "h", "--max-shard-size", 40_000)
    assert (back.returncode, back.stderr) == (0, "")
    expected = {n: x for path in source.glob("*.safetensors") for n, x in load_file(path).items()}
    found = {n: x for path in (tmp_path / "h").glob("*.safetensors") for n, x in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name].astype(x.dtype))

    refused = run_script("convert/flax_to_hf.py", tmp_path / "c", tmp_path / "h")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        f"error: {tmp_path / 'h'} exists; pass --overwrite (overwrite=True) to replace it, or give another name"
    ]


def test_error_is_one_line(golden_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(golden_dir / "tiny_a" / "hf", tmp_path / "source"))
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"novelty": 1}))
    content = (source / hf.SINGLE).read_bytes()
    (source / hf.SINGLE).write_bytes(content[:-4])
    refused = run_script("convert/hf_to_flax.py", source, tmp_path / "c", "--ignore-config-key", "novelty")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {source / hf.SINGLE} is not a complete safetensors file")
    assert "model.norm.weight" in line
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["convert/flax_to_hf.py", "convert/gsm8k_to_s1k.py", "convert/qwen2_to_dream.py", "study.py", "train.py"]
)
def test_scripts_start_by_themselves(script: str) -> None:
    """In processes of their own, without the paths that tests add; the others run so in the tests of what they do."""
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


@pytest.mark.slow
def test_killed_then_whole_in_little_memory(large: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    killed = subprocess.Popen(
        command("hf_to_flax", large, target), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".c.incomplete-*/weights/layer_000")):
        assert killed.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (stale,) = tmp_path.glob(".c.incomplete-*")
    for path in (target, stale):
        with pytest.raises(FileNotFoundError):
            pretrained.load(path)

    size = DreamConfig.from_file(large).num_parameters * 4 / 2**30
    made = run("hf_to_flax", large, target)
    assert made.returncode == 0, made.stderr
    assert f"removed {stale}, left by a run that was killed" in made.stderr
    assert not stale.exists()
    back = run("flax_to_hf", target, tmp_path / "h", "--max-shard-size", 100_000_000)
    assert back.returncode == 0, back.stderr
    for path in large.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "h" / path.name).read_bytes()
    # Importing jax and Orbax takes about 0.2 GiB, some layers in flight the rest.
    for output in (made.stdout, back.stdout):
        assert peak_gib(output) < 0.3 + 0.4 * size
