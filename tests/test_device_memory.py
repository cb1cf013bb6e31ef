"""The share of a GPU, the memory of a device, and errors about too little memory as users meet them."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from commands import ROOT, run_script

from dream_jax import device_memory
from dream_jax.device_memory import explained, memory_of_device, share_in_force, shortage, take_memory
from dream_jax.plan import remedies
from dream_jax.trainer import TrainSettings

GIB = 2**30
OLD, NEW = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("environment", "share", "set_to"),
    [
        ({}, 0.95, {OLD: "0.95"}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.95, {OLD: "0.95"}),
        ({OLD: ".5"}, 0.5, {}),
        ({NEW: "0.8"}, 0.8, {}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, 1.0, {}),
    ],
)
def test_share_is_that_of_the_user_or_of_the_commands(environment, share, set_to):
    assert share_in_force(environment).share == share
    changed = dict(environment)
    take_memory(changed)
    assert changed == environment | set_to
    assert share_in_force(changed).share == share


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({OLD: "half"}, "'half' is not a share"),
        ({OLD: "0"}, "'0' is not a share"),
        ({NEW: "nan"}, "'nan' is not a share"),
        ({OLD: "0.9", NEW: "0.9"}, "are both set"),
    ],
)
def test_share_that_jax_would_refuse_is_named(environment, message):
    with pytest.raises(ValueError, match=message):
        take_memory(environment)


COMMANDS = [
    ("train.py", "dream_jax.trainer.train", ["--out", "unused"]),
    ("sample.py", "dream_jax.inference.prepare", ["--prompt", "a"]),
    ("evaluate.py", "dream_jax.evaluation.evaluate", []),
    ("serve.py", "dream_jax.inference.prepare", []),
]


@pytest.mark.parametrize(("script", "begins", "arguments"), COMMANDS)
def test_each_command_takes_its_share(script, begins, arguments, monkeypatch):
    if script == "serve.py":
        pytest.importorskip("fastapi", reason="fastapi is not installed; the extra `serve` brings it")
    found = []

    def stop(*_, **__):
        found.append(os.environ.get(OLD))
        raise ValueError("stopped by the test")

    monkeypatch.delenv(OLD, raising=False)
    monkeypatch.setattr(begins, stop)
    assert run_script(script, *arguments).returncode == 1
    assert found == ["0.95"]
    assert OLD not in os.environ  # the plans of other tests in this process have the default share


@pytest.mark.slow
def test_share_is_taken_before_jax_looks_for_devices():
    program = f"""
        import os, runpy, sys
        from jax._src import xla_bridge
        def looked(*_, **__):
            print("share", os.environ.get("{OLD}"), flush=True)
            os._exit(0)
        xla_bridge.backends = looked
        sys.argv = ["train.py"]
        runpy.run_path("train.py", run_name="__main__")
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "share 0.95" in done.stdout, done.stderr


def test_memory_of_this_machine(tmp_path):
    whole, eighth = memory_of_device(jax.local_devices()[:1]), memory_of_device(jax.local_devices())
    assert GIB // 4 < eighth < whole
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4096 kB\n")
    assert device_memory._available_here(tmp_path) == 4096 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1024\n")
    (group / "memory.stat").write_text("anon 900\ninactive_file 100\n")
    for limit, left in (("max", 4096 * 1024), ("2048", 1124), ("512", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert device_memory._available_here(tmp_path) == left
    assert device_memory._available_here(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("message", "asked", "has"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment",
            4770354232,
            None,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 26.63GiB.", int(26.63 * GIB), None),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 6.27GiB (6727663616B) on device ordinal 0",
            6727663616,
            None,
        ),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.39G. That was not possible. "
            "There are 2.30G free.; (0x0x0_HBM0)",
            int(4.39 * GIB),
            int(2.3 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 5.64G at the bottom of memory. That was not "
            "possible. There are 3.20G free, 0B reserved, and 3.20G reservable.",
            int(5.64 * GIB),
            int(3.2 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.25G of "
            "15.75G hbm. Exceeded hbm capacity by 2.50G.",
            int(18.25 * GIB),
            int(15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.42G) exceeds "
            "available HBM (15.75G).",
            int(16.42 * GIB),
            int(15.75 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: something new", None, None),
    ],
)
def test_forms_of_messages(message, asked, has):
    found = shortage(message)
    assert (found.asked, found.has) == (asked, has)
    assert found.words in message and "\n" not in found.words and "RESOURCE" not in found.words
    text = explained(jax.errors.JaxRuntimeError(message), lambda: ["--remat full", "--accumulation 4"])
    assert "too little memory" in text and "Try --remat full, or --accumulation 4" in text
    assert asked is None or f"{asked / GIB:,.2f} GiB were asked for" in text
    assert has is None or f"there are {has / GIB:,.2f} GiB" in text


def test_real_message_of_a_cpu():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros((2**44, 8), jnp.int8).block_until_ready()
    assert shortage(caught.value).asked == 2**47


def test_other_errors_are_raised_as_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    assert shortage(error) is None and shortage(ValueError("RESOURCE_EXHAUSTED: no")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        explained(error, list)


def test_remedies_of_a_run_are_flags_that_it_does_not_have(tmp_path):
    def found(**options):
        return remedies(TrainSettings.flat(out=tmp_path, batch_size=8, **options))

    assert found() == ["--accumulation 2", "--moments int8"]  # auto has already taken the smallest policy
    assert found(remat="products") == ["--remat full", "--accumulation 2"]
    assert found(remat="full", accumulation=8) == ["--moments int8", "--lora-rank 32"]
    assert len(found(remat="full", accumulation=8, lora_rank=4)) == 2


def fail(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 26.63GiB.")


@pytest.mark.parametrize(
    ("script", "broken", "arguments", "flags"),
    [
        (
            "train.py",
            "dream_jax.trainer.train",
            ["--out", "unused", "--remat", "none"],
            "--remat full, or --accumulation 2",
        ),
        ("sample.py", "dream_jax.inference.prepare", ["--prompt", "a"], "--base int8, or --base nf4"),
        ("evaluate.py", "dream_jax.evaluation.evaluate", [], "--batch-size 4, or --base int8"),
    ],
)
def test_commands_end_with_one_line(script, broken, arguments, flags, monkeypatch):
    monkeypatch.setattr(broken, fail)
    done = run_script(script, *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("error: there is too little memory: 26.63 GiB were asked for") and flags in done.stderr
    )
