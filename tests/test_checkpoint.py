"""Converted directories, directories made whole or not at all, and the checkpoints of a run."""

import dataclasses
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from marking import slow
from safetensors.numpy import load_file, save_file

from dream_jax import checkpoint, files, hf, pretrained
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import merge_params, split_params
from dream_jax.pretrained import conversion
from dream_jax.sharding import make_mesh, parameter_shardings


@pytest.fixture
def tiny(golden_dir: Path) -> Path:
    return golden_dir / "tiny_a" / "hf"


@pytest.fixture
def converted(tiny: Path, tmp_path: Path) -> Path:
    pretrained.convert_from_hf(tiny, tmp_path / "converted")
    return tmp_path / "converted"


def bits(model: Any) -> dict[str, bytes]:
    return {name: np.asarray(x).tobytes() for name, x in hf.flat(split_params(model)[1]).items()}


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


# There and back


@pytest.mark.parametrize(
    ("name", "dtype", "mesh"),
    [("tiny_a", "bfloat16", None), ("tiny_b", "bfloat16", "4x2"), ("tiny_b", "float32", None)],
)
def test_hf_to_converted_to_hf_keeps_every_bit(
    golden_dir: Path, tmp_path: Path, name: str, dtype: str, mesh: str | None
) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden_dir / name / "hf", source)
    if dtype == "bfloat16":
        # Random bits of all finite numbers: also the largest, subnormal ones and both zeros.
        rng = np.random.default_rng(0)
        finite = np.array([bits for bits in range(2**16) if bits & 0x7F80 != 0x7F80], np.uint16).view(jnp.bfloat16)
        for path in source.glob("*.safetensors"):
            tensors = {key: rng.choice(finite, x.shape) for key, x in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
    made = pretrained.convert_from_hf(source, tmp_path / "converted", mesh=mesh)
    assert made.dtype == jnp.dtype(dtype)
    size = 60_000 if name == "tiny_b" else hf.MAX_SHARD_SIZE
    pretrained.convert_to_hf(tmp_path / "converted", tmp_path / "back", max_shard_size=size)
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert (x.dtype, x.shape, x.tobytes()) == (
            after[key].dtype,
            after[key].shape,
            after[key].tobytes(),
        ), key
    # Loaded, they are the same arrays, and so they are when these are saved and exported.
    model = pretrained.load(source, dtype, mesh)
    pretrained.save(model, tmp_path / "saved")
    pretrained.export_hf(model, tmp_path / "exported")
    for made_from in ("converted", "saved", "exported"):
        assert bits(pretrained.load(tmp_path / made_from, dtype)) == bits(model)


@pytest.mark.parametrize("mesh", [slow("8x1"), "4x2", slow("2x4")])
def test_converted_loads_on_any_mesh(tiny: Path, tmp_path: Path, mesh: str) -> None:
    pretrained.convert_from_hf(tiny, tmp_path / "converted", mesh="8x1")
    divided = split_params(pretrained.load(tmp_path / "converted", mesh=mesh))[1]
    whole = split_params(pretrained.load(tiny))[1]
    wanted = parameter_shardings(whole, make_mesh(mesh))
    for name, x in hf.flat(divided).items():
        assert x.sharding.is_equivalent_to(hf.flat(wanted)[name], x.ndim), name
        np.testing.assert_array_equal(x, hf.flat(whole)[name])
        if name.endswith("kernel"):
            assert x.addressable_shards[0].data.size < x.size, name


def test_one_chunk_for_each_shard(tiny: Path, tmp_path: Path) -> None:
    pretrained.convert_from_hf(tiny, tmp_path / "c", mesh="4x2")
    chunks = [p for p in (tmp_path / "c/weights/layer_001/layers.mlp.gate.kernel").iterdir() if p.name[0] != "."]
    assert len(chunks) == 8
    assert {path.stat().st_size for path in chunks} == {64 * 160 * 4 // 8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_converted_loads_in_any_dtype(converted: Path, tiny: Path, dtype: str) -> None:
    assert bits(pretrained.load(converted, dtype)) == bits(pretrained.load(tiny, dtype))


def test_conversion_casts(tiny: Path, tmp_path: Path) -> None:
    pretrained.convert_from_hf(tiny, tmp_path / "c", dtype="bfloat16")
    assert json.loads((tmp_path / "c/dream_jax.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "c/config.json").read_text())["dtype"] == "bfloat16"
    assert bits(pretrained.load(tmp_path / "c", "bfloat16")) == bits(pretrained.load(tiny, "bfloat16"))
    pretrained.convert_to_hf(tmp_path / "c", tmp_path / "h", dtype="float32")
    assert bits(pretrained.load(tmp_path / "h")) == bits(pretrained.load(tmp_path / "c"))


def test_tied_model_saves_and_loads(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    tensors = load_file(source / hf.SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, source / hf.SINGLE)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    pretrained.save(pretrained.load(source), tmp_path / "tied")
    again = pretrained.load(tmp_path / "tied")
    assert again.lm_head is None
    assert bits(again) == bits(pretrained.load(source))


def test_save_refuses_what_is_no_dream(tiny: Path, tmp_path: Path) -> None:
    model = pretrained.load(tiny)
    graphdef, params = split_params(model)
    half = params | {"norm": jax.tree.map(lambda x: x.astype("bfloat16"), params["norm"])}
    with pytest.raises(ValueError, match="bfloat16 and float32"):
        pretrained.save(merge_params(graphdef, half), tmp_path / "x")
    with pytest.raises(ValueError, match=r"adapter\.scale is not expected"):
        checkpoint.save_params(tmp_path, params | {"adapter": params["norm"]}, model.config)
    unit = checkpoint.units(model.config, "float32")[0]
    with pytest.raises(ValueError, match=r"embed cannot be written: embed\.embedding is missing"):
        checkpoint.write_unit(tmp_path, unit, {})
    assert list(tmp_path.iterdir()) == []


# Presets and options


def test_preset_is_random_and_divided() -> None:
    model = pretrained.load("nano", mesh="4x2")
    assert model.config == PRESETS["nano"]
    kernel = model.layers.mlp.gate.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (4, 32, 192)
    np.testing.assert_allclose(float(jnp.std(kernel)), PRESETS["nano"].initializer_range, rtol=0.02)


@pytest.mark.slow
def test_preset_depends_on_the_seed_and_not_on_the_mesh() -> None:
    first = bits(pretrained.load("nano", mesh="2x4"))
    assert bits(pretrained.load("nano")) == first
    other = bits(pretrained.load("nano", seed=1))
    assert sum(x != first[name] for name, x in other.items()) == 9  # all but biases and norms


def test_options_reach_the_model(tiny: Path, converted: Path) -> None:
    for path in (tiny, converted):
        model = pretrained.load(path, "bfloat16", compute_dtype="float32", remat="full", attention_backend="xla")
        assert model.compute_dtype == jnp.float32
        assert model.norm.scale[...].dtype == jnp.bfloat16
        assert (model.remat, model.attention_backend) == ("full", "xla")
        assert model.tokenizer_dir is None


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", "fp8"])
def test_unknown_dtype(tiny: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is not one of float32, bfloat16, float16"):
        pretrained.load(tiny, dtype)


def test_dtype_as_jax_spells_it(tiny: Path) -> None:
    assert pretrained.load(tiny, jnp.bfloat16).norm.scale[...].dtype == jnp.bfloat16


def test_path_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing is neither a directory nor a preset.*nano, small"):
        pretrained.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is a file"):
        pretrained.load(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        pretrained.load(tmp_path)


def test_unknown_key_is_refused_or_ignored(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"novelty": 1}))
    for act in (pretrained.load, lambda path, **kw: pretrained.convert_from_hf(path, tmp_path / "c", **kw)):
        with pytest.raises(ValueError, match="novelty"):
            act(source)
        act(source, ignore_config_keys=["novelty"])
    pretrained.load(tmp_path / "c")  # the key did not travel


# What travels along


@pytest.fixture
def furnished(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint with tokenizer files and the code that published ones carry."""
    directory = Path(shutil.copytree(tiny, tmp_path / "furnished"))
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        (directory / name).write_text(f"{name}: \N{SNOWMAN}\r\n", encoding="utf-8")
    for name in ("modeling_dream.py", "configuration_dream.py"):
        (directory / name).write_text("raise SystemExit('executed')\n")
    (directory / "unrelated.bin").write_text("")
    fields = json.loads((directory / "config.json").read_text())
    del fields["dtype"]
    fields |= {
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "torch_dtype": "float32",
        "bos_token_id": 99,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_companions_travel_byte_for_byte(furnished: Path, tmp_path: Path) -> None:
    pretrained.convert_from_hf(furnished, tmp_path / "converted")
    pretrained.convert_to_hf(tmp_path / "converted", tmp_path / "back")
    model = pretrained.load(furnished)
    assert model.tokenizer_dir == str(furnished)
    pretrained.save(model, tmp_path / "saved")
    pretrained.export_hf(pretrained.load(tmp_path / "saved"), tmp_path / "exported")
    names = {p.name for p in furnished.iterdir()} - {"config.json", "model.safetensors", "unrelated.bin"}
    assert "generation_config.json" in names
    for made in ("converted", "back", "saved", "exported"):
        for name in names:
            assert (tmp_path / made / name).read_bytes() == (furnished / name).read_bytes(), (made, name)
        assert not (tmp_path / made / "unrelated.bin").exists()
        fields = json.loads((tmp_path / made / "config.json").read_text())
        assert fields["auto_map"]["AutoModel"] == "modeling_dream.DreamModel"
        assert fields["torch_dtype"] == "float32"
        assert fields["bos_token_id"] == 99
        assert DreamConfig.from_file(tmp_path / made) == model.config


def test_auto_map_stays_behind_without_its_code(furnished: Path, tmp_path: Path) -> None:
    (furnished / "modeling_dream.py").unlink()
    pretrained.export_hf(pretrained.load(furnished), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_tokenizer_dir_can_be_another(furnished: Path, tiny: Path, tmp_path: Path) -> None:
    pretrained.save(pretrained.load(tiny), tmp_path / "out", tokenizer_dir=furnished)
    assert (tmp_path / "out/merges.txt").read_bytes() == (furnished / "merges.txt").read_bytes()
    assert pretrained.load(tmp_path / "out").tokenizer_dir == str(tmp_path / "out")


# Refusals of converted directories


def test_format_of_another_version(converted: Path) -> None:
    path = converted / "dream_jax.json"
    (converted / files.CHECKSUMS).unlink()
    fields = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, "has format 2, but this version reads format 1"),
        ({"parameters": 3}, "describes 3 parameters"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            pretrained.load(converted)
    path.write_text(json.dumps({"format": 1, "dtype": "float32"}))
    with pytest.raises(ValueError, match="lacks parameters, files"):
        pretrained.load(converted)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        pretrained.load(converted)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        pretrained.load(converted)


def test_damaged_weights_are_named(converted: Path) -> None:
    # Orbax would read a missing chunk as zeros.
    chunk = converted / "weights/layer_001/layers.mlp.up.kernel/0.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"layer_001/layers\.mlp\.up\.kernel/0\.0 has \d+ bytes, but \d+"):
        pretrained.load(converted)
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match=r"layer_001/layers\.mlp\.up\.kernel/0\.0 is missing"):
        pretrained.load(converted)


def test_weights_of_another_shape_are_named(converted: Path) -> None:
    config = DreamConfig.from_file(converted)
    other = dataclasses.replace(config, num_attention_heads=2, num_key_value_heads=1)
    unit = checkpoint.units(other, "float32")[1]
    with pytest.raises(ValueError, match=r"layers\.attn\.q\.kernel has shape \[64, 4, 16\], expected \[64, 2, 32\]"):
        checkpoint.read_unit(converted, unit)


def test_converting_the_wrong_kind(tiny: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is already a converted directory"):
        pretrained.convert_from_hf(converted, tmp_path / "x")
    with pytest.raises(ValueError, match=r"not a converted directory: it has no dream_jax\.json"):
        pretrained.convert_to_hf(tiny, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_before_the_source_is_checked(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    path = source / hf.SINGLE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        pretrained.convert_from_hf(source, tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_units_must_be_asked_for_in_order(converted: Path) -> None:
    config = DreamConfig.from_file(converted)
    read = functools.partial(conversion._read_named, converted)
    with conversion.ThreadPoolExecutor(1) as pool:
        fetch = conversion._fetch_ahead(read, checkpoint.units(config, "float32"), pool)
        fetch("norm.scale", None)
        with pytest.raises(ValueError, match=r"layers\.mlp\.up\.kernel of layer 7 was requested out of the order"):
            fetch("layers.mlp.up.kernel", 7)


# Whole or not at all


def test_existing_target_is_kept_or_replaced(tiny: Path, converted: Path, tmp_path: Path) -> None:
    for act in (
        lambda **kw: pretrained.convert_from_hf(tiny, converted, **kw),
        lambda **kw: pretrained.convert_to_hf(converted, tmp_path / "hf", **kw),
        lambda **kw: pretrained.save(pretrained.load(tiny), converted, **kw),
        lambda **kw: pretrained.export_hf(pretrained.load(tiny), tmp_path / "hf", **kw),
    ):
        act(overwrite=True)
        with pytest.raises(FileExistsError, match="exists; pass --overwrite"):
            act()
    assert leftovers(tmp_path) == []
    assert bits(pretrained.load(converted)) == bits(pretrained.load(tiny))


def test_model_can_replace_the_directory_it_came_from(furnished: Path) -> None:
    before = bits(pretrained.load(furnished))
    with pytest.raises(FileExistsError, match=r"holds unrelated\.bin, not written by this program"):
        pretrained.save(pretrained.load(furnished), furnished, overwrite=True)
    (furnished / "unrelated.bin").unlink()
    pretrained.save(pretrained.load(furnished), furnished, overwrite=True)
    assert checkpoint.is_converted(furnished)
    assert bits(pretrained.load(furnished)) == before
    assert (furnished / "merges.txt").is_file()


def test_source_is_not_replaced_by_its_conversion(tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    with pytest.raises(ValueError, match="is the source itself"):
        pretrained.convert_from_hf(source, source, overwrite=True)


def test_target_that_appears_meanwhile_is_kept(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"), files.new_directory(tmp_path / "c"):
        shutil.copytree(converted, tmp_path / "c")
    assert checkpoint.is_converted(tmp_path / "c")
    assert leftovers(tmp_path) == []


def test_other_folders_are_never_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "note").write_text("")
    for name in ("home", "note"):
        with pytest.raises(FileExistsError, match="is not a checkpoint directory"):
            pretrained.convert_from_hf(tiny, tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_failure_keeps_the_old_one_and_leaves_nothing(
    tiny: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(pretrained.load(converted))
    monkeypatch.setattr(checkpoint, "write_description", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrained.convert_from_hf(tiny, converted, overwrite=True, dtype="bfloat16")
    assert bits(pretrained.load(converted)) == before
    assert leftovers(tmp_path) == []


def test_too_little_space_is_said_before_starting(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 100_000))
    with pytest.raises(OSError, match=r"c needs 584960 bytes .* has only 100000") as raised:
        pretrained.convert_from_hf(tiny, tmp_path / "c")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: No space left on device"),
    ],
)
def test_full_disk_while_orbax_writes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def save(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    with pytest.raises(OSError, match=r"the disk is full: .*c needs 584960 bytes") as raised:
        pretrained.convert_from_hf(tiny, tmp_path / "c")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_orbax_pass(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object, **__: object) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    with pytest.raises(ValueError, match="something else"):
        pretrained.save(pretrained.load(tiny), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_exporting(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = pretrained.load(tiny)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"the disk is full: .*h needs 584960 bytes"):
        pretrained.export_hf(model, tmp_path / "h")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from dream_jax.files import new_directory
with new_directory(sys.argv[1], overwrite=True) as directory:
    (directory / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_leaves_no_checkpoint_and_is_tidied_up(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "c"
    run = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not target.exists()
    (stale,) = leftovers(tmp_path)
    with pytest.raises(FileNotFoundError):
        pretrained.load(target)
    # Another run that is alive is left in peace.
    with files.new_directory(target) as alive, caplog.at_level(logging.WARNING):
        assert not (tmp_path / stale).exists()
        os.rename(alive, tmp_path / ".c.incomplete-0")
        pretrained.convert_from_hf(tiny, target)
        assert f"another run is writing {tmp_path / '.c.incomplete-0'}" in caplog.text
        shutil.rmtree(target)
        os.rename(tmp_path / ".c.incomplete-0", alive)
    (tmp_path / ".c.incomplete-1").mkdir()  # killed before it had a lock
    with caplog.at_level(logging.WARNING), files.new_directory(target, overwrite=True):
        assert "c.incomplete-1 was left by another run" in caplog.text


def test_killed_between_the_two_renames(tiny: Path, converted: Path, tmp_path: Path) -> None:
    before = bits(pretrained.load(converted))
    converted.rename(tmp_path / ".converted.replaced-1")
    with pytest.raises(FileExistsError):
        pretrained.convert_from_hf(tiny, converted)
    assert bits(pretrained.load(converted)) == before
    shutil.copytree(converted, tmp_path / ".converted.replaced-2")  # or after the second
    pretrained.convert_from_hf(tiny, converted, overwrite=True)
    assert leftovers(tmp_path) == []


# The checkpoints of a run


def make_state(mesh: str, scale: float = 1.0) -> dict[str, Any]:
    place = NamedSharding(make_mesh(mesh), PartitionSpec("fsdp", "tensor"))
    params = {
        "kernel": jax.device_put(scale * jnp.arange(64.0).reshape(8, 8), place),
        "half": jax.device_put(jnp.full((8, 8), scale, jnp.bfloat16), place),
    }
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.int32(3)}


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    state = make_state("4x2")
    with RunCheckpoints(tmp_path / "run") as run:
        assert run.latest_step() is None
        run.save(7, state, {"data": [1, 2], "seed": None})
        run.wait()
        assert run.latest_step() == 7
    target = abstract(make_state("2x4"))
    with RunCheckpoints(tmp_path / "run") as run:
        again, meta = run.restore(target)
    assert_equal(again, state)
    assert meta == {"data": [1, 2], "seed": None}
    assert again["params"]["kernel"].sharding == target["params"]["kernel"].sharding


def test_last_few_are_kept_and_any_can_be_chosen(tmp_path: Path) -> None:
    with RunCheckpoints(tmp_path, keep=2) as run:
        for step in (1, 2, 5):
            run.save(step, make_state("8x1", step), {"step": step})
        run.wait()
        assert run.steps() == [2, 5]
        state, meta = run.restore(abstract(make_state("8x1")), step=2)
        assert_equal(state, make_state("8x1", 2))
        assert meta == {"step": 2}
        with pytest.raises(ValueError, match="already holds step 5"):
            run.save(5, state, {})
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1, only of \[2, 5\]"):
            run.restore(abstract(state), step=1)
        with pytest.raises(TypeError, match="JSON"):
            run.save(6, state, {"bad": object()})
    with pytest.raises(ValueError, match="keep=0"):
        RunCheckpoints(tmp_path, keep=0)


def test_arrays_may_be_donated_while_they_are_written(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"big": jnp.ones((1024, 1024)), "small": jnp.ones(3)}
    with RunCheckpoints(tmp_path) as run:
        run.save(1, state, {})
        jax.block_until_ready(overwrite(state))
        again, _ = run.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert np.asarray(again["big"]).min() == 1
    assert np.asarray(again["small"]).min() == 1


def test_state_that_differs_is_named(tmp_path: Path) -> None:
    state = make_state("8x1")
    with RunCheckpoints(tmp_path) as run:
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            run.restore(abstract(state))
        run.save(1, state, {})
        other = abstract(state)
        other["params"]["extra"] = other["params"].pop("half")
        other["params"]["kernel"] = jax.ShapeDtypeStruct((4, 4), jnp.float32)
        with pytest.raises(ValueError) as raised:
            run.restore(other)
    for line in (
        "params.extra is missing",
        "params.half is not expected",
        "params.kernel has shape [8, 8], expected [4, 4]",
    ):
        assert line in str(raised.value)


def test_half_written_step_does_not_count(tmp_path: Path) -> None:
    with RunCheckpoints(tmp_path) as run:
        run.save(1, make_state("8x1"), {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with RunCheckpoints(tmp_path) as run:
        assert run.latest_step() == 1
        run.restore(abstract(make_state("8x1")))


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    scores = {1: 0.9, 2: 0.4, 3: float("nan"), 4: 0.4, 5: None, 6: 0.7}
    with RunCheckpoints(tmp_path, keep=2) as run:
        assert run.best_step() is None
        for step, score in scores.items():
            run.save(step, make_state("8x1", step), {}, score)
        run.wait()
        assert run.steps() == [2, 5, 6]  # of equals the first
    with RunCheckpoints(tmp_path, keep=2) as run:  # as a new process finds them
        assert (run.best_step(), run.score(2), run.score(5)) == (2, 0.4, None)
        run.save(7, make_state("8x1"), {}, 0.1)
        run.save(8, make_state("8x1"), {}, 0.2)
        run.save(9, make_state("8x1"), {}, 0.3)
        run.wait()
        assert (run.steps(), run.best_step()) == ([7, 8, 9], 7)
    with RunCheckpoints(tmp_path, keep=2, measure="other rows") as run:  # by which nothing was scored yet
        assert run.best_step() is None
        run.save(10, make_state("8x1"), {}, 5.0)
        run.wait()
        assert (run.steps(), run.best_step()) == ([9, 10], 10)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> Path:
    path = largest(step)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def flip(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def remove(step: Path) -> Path:
    path = largest(step)
    path.unlink()
    return path


def rewrite(path: Path, pattern: str, new: str) -> Path:
    text = path.read_text()
    path.write_text(re.sub(pattern, new, text, count=1))
    assert path.read_text() != text
    json.loads(path.read_text())  # still JSON
    return path


DAMAGE = {
    "truncated": truncate,
    "flipped": lambda step: flip(largest(step)),
    "flipped in the meta": lambda step: flip(step / "meta" / "metadata"),
    "removed": remove,
    "no checksums": lambda step: (step / "checksums.json").unlink() or step / "checksums.json",
    "a checksum with a comma in it": lambda step: rewrite(step / "checksums.json", r"(\d\d)(\s*\])", r"\1,1\2"),
    "no sizes": lambda step: rewrite(step / "checksums.json", r"\[[^]]*\]", "7"),
    "half of the checksums": lambda step: (step / "checksums.json").write_text("{") and step / "checksums.json",
}


def big_state(step: int) -> dict[str, Any]:
    return {"weights": jnp.full((64, 1024), float(step)), "step": jnp.int32(step)}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_step_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any) -> None:
    with RunCheckpoints(tmp_path) as run:
        for step in (1, 2, 3):
            run.save(step, big_state(step), {"step": step, "note": "x" * 99}, score=1 / step)
    path = harm(tmp_path / "3")
    with caplog.at_level(logging.ERROR), RunCheckpoints(tmp_path) as run:
        state, meta = run.restore(abstract(big_state(0)))
        assert_equal(state, big_state(2))
        assert meta["step"] == 2
        assert run.steps() == [1, 2] and list(run.damaged) == [3] and run.best_step() == 2
        assert str(path) in run.damaged[3] and str(path) in caplog.text
        assert "resuming from step 2 instead; step 3 is now 3.damaged" in caplog.text
        # The run comes by that step again, and may save it.
        run.save(3, big_state(3), {"step": 3})
    with RunCheckpoints(tmp_path) as run:
        assert_equal(run.restore(abstract(big_state(0)))[0], big_state(3))
        assert run.damaged == {}
    assert (tmp_path / "3.damaged").is_dir()


def test_without_an_undamaged_step_nothing_is_put_aside(tmp_path: Path) -> None:
    with RunCheckpoints(tmp_path) as run:
        for step in (1, 2):
            run.save(step, big_state(step), {})
    truncate(tmp_path / "1")
    flip(largest(tmp_path / "2"))
    with RunCheckpoints(tmp_path) as run:
        with pytest.raises(ValueError, match=r"step 2: .* has CRC-32 .*; step 1: .* bytes, but .*; put a copy back"):
            run.restore(abstract(big_state(0)))
        with pytest.raises(ValueError, match=r"this checkpoint .* is damaged \(step 1: .* bytes, but .* another step"):
            run.restore(abstract(big_state(0)), step=1)
        assert run.steps() == [1, 2]


TERMINATED = """
import os, pathlib, signal, sys, time
import jax.numpy as jnp
from dream_jax import files
from dream_jax.checkpoint import RunCheckpoints
with RunCheckpoints(sys.argv[1]) as run:
    run.save(1, {"weights": jnp.full((64, 1024), 1.0), "step": jnp.int32(1)}, {})
    run.wait()
    write = files.write_checksums
    def slowly(*args, **more):
        print("writing", flush=True)
        time.sleep(60)
    files.write_checksums = slowly
    run.save(2, {"weights": jnp.full((64, 1024), 2.0), "step": jnp.int32(2)}, {})
    print("returned", flush=True)
    time.sleep(60)
"""


def test_sigterm_while_a_step_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    """Also: `save` returns while it is being written."""
    command = [sys.executable, "-c", TERMINATED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = {process.stdout.readline(), process.stdout.readline()}  # type: ignore[union-attr]
        assert said == {"returned\n", "writing\n"}
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    with RunCheckpoints(tmp_path) as run:
        assert run.steps() == [1]
        assert_equal(run.restore(abstract(big_state(0)))[0], big_state(1))
        run.save(2, big_state(2), {})
    with RunCheckpoints(tmp_path) as run:
        assert_equal(run.restore(abstract(big_state(0)))[0], big_state(2))
