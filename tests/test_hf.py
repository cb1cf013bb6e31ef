"""Published checkpoints: the table, opening and refusing files, loading onto meshes, writing back."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from marking import slow
from safetensors.numpy import load_file, save_file

from dream_jax import hf, pretrained
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.hf import source as hf_source
from dream_jax.hf import table
from dream_jax.model import Dream, split_params
from dream_jax.sharding import make_mesh

Tensors = dict[str, np.ndarray]


@pytest.fixture
def tiny(golden_dir: Path, tmp_path: Path) -> Path:
    """A copy of the single-file checkpoint, to damage."""
    return Path(shutil.copytree(golden_dir / "tiny_a" / "hf", tmp_path / "tiny"))


@pytest.fixture
def sharded(golden_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in 12 shards, to damage."""
    return Path(shutil.copytree(golden_dir / "tiny_b" / "hf", tmp_path / "sharded"))


def read_tensors(directory: Path) -> Tensors:
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = read_tensors(directory)
    change(tensors)
    save_file(tensors, directory / hf.SINGLE, metadata={"format": "pt"})


def reindex(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / hf.INDEX).read_text())
    change(index["weight_map"])
    (directory / hf.INDEX).write_text(json.dumps(index))


def set_config(directory: Path, **fields: object) -> DreamConfig:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return DreamConfig.from_file(directory)


def assert_same_bits(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert (x.shape, x.dtype) == (right[name].shape, right[name].dtype), name
        assert x.tobytes() == right[name].tobytes(), name


# The table


def test_table_is_one_to_one_with_the_published_index(assets: Path) -> None:
    index = json.loads((assets / "dream-v0-instruct-7b" / hf.INDEX).read_text())
    config = PRESETS["dream-7b"]
    names = index["weight_map"]
    assert len(names) == 339
    assert set(hf.destinations(config)) == set(names)
    hf.check_names(names, config)
    assert index["metadata"]["total_size"] == 2 * config.num_parameters


def test_every_weight_of_the_7b_tree_is_written_once() -> None:
    config = PRESETS["dream-7b"]
    places = hf.destinations(config)
    assert len(places) == 339
    targets = [(place.rule.target, place.layer) for place in places.values()]
    assert len(set(targets)) == len(targets)
    shapes = hf.parameter_shapes(config)
    written = {
        (name, layer)
        for name, shape in shapes.items()
        for layer in (range(shape[0]) if name.startswith("layers.") else [None])
    }
    assert set(targets) == written
    assert sum(int(np.prod(place.source_shape)) for place in places.values()) == 7_615_616_512
    for name, place in places.items():
        assert place.rule.source_name(place.layer) == name


def test_rule_that_is_missing_or_double_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=7)
    monkeypatch.setattr(table, "RULES", (*hf.RULES[:-1], hf.RULES[1]))
    with pytest.raises(ValueError, match=r"layers\.attn_norm\.scale.*lm_head\.kernel"):
        hf.destinations(config)


LAYOUTS = [
    (table.VECTOR, (6,), (6,)),
    (table.TABLE, (5, 6), (5, 6)),
    (table.LINEAR, (6, 8), (8, 6)),
    (table.TO_HEADS, (6, 4, 2), (8, 6)),
    (table.HEADS, (4, 2), (8,)),
    (table.FROM_HEADS, (4, 2, 6), (6, 8)),
]


@pytest.mark.parametrize(("layout", "shape", "source_shape"), LAYOUTS)
def test_layout_and_its_inverse(layout: hf.TensorLayout, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> None:
    assert layout.source_shape(shape) == source_shape
    source = np.arange(np.prod(shape)).reshape(source_shape)
    target = layout.forward(source, shape)
    assert target.shape == shape
    np.testing.assert_array_equal(layout.inverse(target), source)
    # The part of the source that a part of the target comes from.
    for axis, size in enumerate(shape):
        if any(group.index(axis) for group in layout.groups if axis in group):
            continue
        slices = tuple(slice(1, size) if i == axis else slice(None) for i in range(len(shape)))
        part = source[layout.source_slices(slices, shape)]
        np.testing.assert_array_equal(layout.forward(part, target[slices].shape), target[slices])


def test_layout_refuses_to_cut_a_head() -> None:
    with pytest.raises(ValueError, match="cuts axis 2"):
        table.TO_HEADS.source_slices((slice(0, 6), slice(0, 4), slice(0, 1)), (6, 4, 2))
    with pytest.raises(ValueError, match="has 2 axes"):
        table.TO_HEADS.source_shape((6, 8))


def test_layer_of_a_rule_must_fit() -> None:
    with pytest.raises(ValueError, match="layer=0"):
        hf.RULES[0].source_name(0)
    with pytest.raises(ValueError, match="layer=None"):
        hf.RULES[1].source_name(None)


# What the published code computes


@pytest.mark.parametrize(("name", "mesh"), [("tiny_a", None), ("tiny_b", None), ("tiny_a", "4x2"), ("tiny_b", "8x1")])
@pytest.mark.optimised
def test_logits_are_those_of_the_published_code(golden_dir: Path, name: str, mesh: str | None) -> None:
    golden = np.load(golden_dir / name / "golden.npz")
    model = pretrained.load(golden_dir / name / "hf", mesh=mesh)
    np.testing.assert_allclose(model(golden["fwd_tokens"]), golden["fwd_logits"], atol=1e-4, rtol=0)
    tokens, mask, positions = (golden[f"pad_{key}"] for key in ("tokens", "mask", "positions"))
    real = mask.astype(bool)
    for logits in (model(tokens, mask), model(tokens, mask, positions)):
        np.testing.assert_allclose(np.asarray(logits)[real], golden["pad_logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mesh", [slow("8x1"), "4x2", slow("2x4")])
def test_mesh_divides_every_array_and_changes_no_bit(golden_dir: Path, mesh: str) -> None:
    directory = golden_dir / "tiny_a" / "hf"
    whole = split_params(pretrained.load(directory))[1]
    divided = split_params(pretrained.load(directory, mesh=mesh))[1]
    shardings = hf.flat_shardings(hf.parameter_shapes(DreamConfig.from_file(directory)), make_mesh(mesh))
    for name, array in hf.flat(divided).items():
        assert array.sharding == shardings[name], name
        np.testing.assert_array_equal(array, hf.flat(whole)[name])
        if name.endswith("kernel"):
            assert array.addressable_shards[0].data.size < array.size, name


def test_perturbing_any_tensor_moves_the_logits(golden_dir: Path, sharded: Path) -> None:
    golden = np.load(golden_dir / "tiny_b" / "golden.npz")
    original = read_tensors(sharded)
    assert set(original) == set(hf.destinations(DreamConfig.from_file(sharded)))
    rng = np.random.default_rng(0)
    before = np.asarray(pretrained.load(sharded)(golden["fwd_tokens"]))
    for name, x in original.items():  # from here on a single file, which is looked for first
        changed = original | {name: x + rng.normal(size=x.shape).astype(np.float32)}
        save_file(changed, sharded / hf.SINGLE)
        after = np.asarray(pretrained.load(sharded)(golden["fwd_tokens"]))
        assert np.abs(after - before).max() > 1e-3, name


# Dtypes


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_loads_any_dtype_as_any_other(tiny: Path, stored: str, wanted: str) -> None:
    stored_dtype, wanted_dtype = np.dtype(stored), np.dtype(wanted)
    rewrite(tiny, lambda tensors: tensors.update({k: x.astype(stored_dtype) for k, x in tensors.items()}))
    tensors = read_tensors(tiny)
    config = DreamConfig.from_file(tiny)
    params = hf.flat(hf.load_params(tiny, config, wanted))
    for name, place in hf.destinations(config).items():
        array = params[place.rule.target]
        found = np.asarray(array if place.layer is None else array[place.layer])
        expected = place.rule.layout.forward(tensors[name].astype(wanted_dtype), place.shape)
        assert found.dtype == wanted_dtype
        np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def test_mixed_dtypes_have_no_one_dtype(tiny: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.float16)}))
    with hf.open_source(tiny) as opened, pytest.raises(ValueError, match="float16 and float32"):
        opened.dtype  # noqa: B018


def test_wide_matrices_are_turned_and_cast_exactly(tmp_path: Path) -> None:
    # Larger than a block in both directions, so that every loop runs more than once.
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, (1300, 900)).astype(np.uint16)  # every bfloat16, NaNs and infinities among them
    for target_dtype in (ml_dtypes.bfloat16, np.float32):
        for turned in (False, True):
            target = np.empty((900, 1300) if turned else (1300, 900), target_dtype)
            hf_source.copy_cast(target.T if turned else target, bits.view(ml_dtypes.bfloat16))
            found = target.T if turned else target
            if target_dtype == np.float32:
                np.testing.assert_array_equal(found.view(np.uint32), bits.astype(np.uint32) << 16)
            else:
                np.testing.assert_array_equal(found.view(np.uint16), bits)


# Reading no more than is needed


def test_reads_only_the_rows_and_columns_that_are_wanted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DreamConfig.from_file(tiny)
    tensors = read_tensors(tiny)
    seen: list[int] = []
    read = hf_source.SafetensorsSource._read

    def counting(self: hf.SafetensorsSource, tensor: hf.Tensor, offset: int, out: np.ndarray) -> None:
        seen.append(out.nbytes)
        read(self, tensor, offset, out)

    monkeypatch.setattr(hf_source.SafetensorsSource, "_read", counting)
    name = "model.layers.1.mlp.down_proj.weight"  # [64, 160] in the file, [160, 64] here
    place = hf.destinations(config)[name]
    with hf.open_source(tiny) as opened:
        for slices in (
            (slice(0, 160), slice(8, 16)),
            (slice(40, 60), slice(0, 64)),
            (slice(0, 9), slice(3, 4)),
        ):
            out = np.empty([part.stop - part.start for part in slices], np.float32)
            seen.clear()
            for job in opened.fill_jobs(name, place, [(slices, out)]):
                job()
            np.testing.assert_array_equal(out, tensors[name].T[slices])
            assert sum(seen) == out.nbytes
        name = "model.layers.1.self_attn.q_proj.weight"
        scattered = np.empty((16, 4, 64), np.float32).T
        with pytest.raises(ValueError, match=f"{name}: the array to fill must be contiguous"):
            whole = (slice(0, 64), slice(0, 4), slice(0, 16))
            list(opened.fill_jobs(name, hf.destinations(config)[name], [(whole, scattered)]))


def test_replicas_share_one_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read = hf_source.SafetensorsSource._read

    def counting(self: hf.SafetensorsSource, tensor: hf.Tensor, offset: int, out: np.ndarray) -> None:
        seen.append(out.nbytes)
        read(self, tensor, offset, out)

    monkeypatch.setattr(hf_source.SafetensorsSource, "_read", counting)
    config = DreamConfig.from_file(tiny)
    hf.load_params(tiny, config, "float32", make_mesh("8x1"))
    assert sum(seen) == 4 * config.num_parameters


def test_buffers_are_used_again() -> None:
    buffers = hf.Buffers()
    first = buffers.take(1000)
    assert first.ctypes.data % 64 == 0
    buffers.give_back([first])
    assert buffers.take(1000) is first
    assert buffers.take(1000) is not first


# Refusals of files


def open_and_check(directory: Path) -> None:
    config = DreamConfig.from_file(directory)
    with hf.open_source(directory) as opened:
        opened.check(config)


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        hf.open_source(tmp_path)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00007-of-00012.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: model-00007-of-00012\.safetensors"):
        open_and_check(sharded)


def test_tensor_in_index_but_not_in_file(sharded: Path) -> None:
    reindex(sharded, lambda names: names.update({"model.layers.0.bogus": "model-00001-of-00012.safetensors"}))
    with pytest.raises(ValueError, match=r"model-00001-of-00012\.safetensors lacks .*model\.layers\.0\.bogus"):
        open_and_check(sharded)


def test_tensor_in_file_but_not_in_index(sharded: Path) -> None:
    reindex(sharded, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"holds tensor model\.norm\.weight, but .* does not list it"):
        open_and_check(sharded)


def test_tensor_twice(sharded: Path) -> None:
    extra = {"model.norm.weight": np.ones(112, np.float32), "model.other": np.ones(1, np.float32)}
    save_file(extra, sharded / "model-00013-of-00013.safetensors")
    reindex(sharded, lambda names: names.update({"model.other": "model-00013-of-00013.safetensors"}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in both|holds tensor model\.norm\.weight"):
        open_and_check(sharded)


def test_name_twice_in_index(sharded: Path) -> None:
    text = (sharded / hf.INDEX).read_text()
    (sharded / hf.INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",'))
    with pytest.raises(ValueError, match=r"lm_head\.weight' occurs twice"):
        open_and_check(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "not the name of a file"),
        ('{"weight_map": {"a": 3}}', "lists a in 3"),
    ],
)
def test_bad_index(sharded: Path, text: str, message: str) -> None:
    (sharded / hf.INDEX).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        open_and_check(sharded)
    assert hf.INDEX in str(raised.value)


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.001])
def test_truncated_shard_names_file_and_tensor(sharded: Path, keep: float) -> None:
    path = sharded / "model-00005-of-00012.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    message = r"model-00005-of-00012\.safetensors is not a complete safetensors file"
    if keep > 0.01:  # else not even the header is there
        message += r".*model\.layers\.0\.mlp\.up_proj\.weight|.*mlp\.\w+_proj\.weight"
    with pytest.raises(ValueError, match=message):
        open_and_check(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 64, b"\x10" + b"\0" * 7 + b"not json at all!", b"\x02" + b"\0" * 7 + b"[]"],
)
def test_garbage_shard(tiny: Path, content: bytes) -> None:
    (tiny / hf.SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        open_and_check(tiny)


def test_file_cut_while_it_is_read(tiny: Path) -> None:
    config = DreamConfig.from_file(tiny)
    with hf.open_source(tiny) as opened:
        with open(tiny / hf.SINGLE, "r+b") as file:
            file.truncate(20_000)
        with pytest.raises(ValueError, match="truncated after it was opened"):
            hf.load_params(opened, config, "float32")


def test_extra_and_missing_tensors_are_named(tiny: Path) -> None:
    rewrite(
        tiny,
        lambda tensors: tensors.update({"model.bogus": tensors.pop("model.layers.2.self_attn.v_proj.bias")}),
    )
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.self_attn\.v_proj\.bias; .*model\.bogus"):
        open_and_check(tiny)


def test_layers_beyond_the_configuration_are_named(tiny: Path) -> None:
    set_config(tiny, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"num_hidden_layers=2, but the checkpoint holds 3 layers"):
        open_and_check(tiny)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_wrong_shape_names_tensor_found_and_expected(tiny: Path, name: str) -> None:
    found = [5, 64] if name == "lm_head.weight" else [5]
    expected = [128, 64] if name == "lm_head.weight" else [32]
    rewrite(tiny, lambda tensors: tensors.update({name: np.zeros(found, np.float32)}))
    with pytest.raises(ValueError) as raised:
        open_and_check(tiny)
    assert all(part in str(raised.value) for part in (name, str(found), str(expected)))


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.int32])
def test_wrong_dtype_names_the_tensor(tiny: Path, dtype: type) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tiny, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} has dtype [IF]\d+, expected one of BF16, F16, F32"):
        open_and_check(tiny)


# Tied embeddings


def test_tied_head_must_equal_the_embedding(tiny: Path, golden_dir: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    tokens = np.load(golden_dir / "tiny_a" / "golden.npz")["fwd_tokens"]
    untied = pretrained.load(tiny)(tokens)
    set_config(tiny, tie_word_embeddings=True)
    tied = pretrained.load(tiny)
    assert tied.lm_head is None
    np.testing.assert_allclose(tied(tokens), untied, atol=1e-4, rtol=0)

    rewrite(tiny, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 5), 7.0))
    with pytest.raises(ValueError, match=r"ties the embeddings, but lm_head\.weight differs"):
        open_and_check(tiny)
    rewrite(tiny, lambda tensors: tensors.pop("lm_head.weight"))
    np.testing.assert_array_equal(pretrained.load(tiny)(tokens), tied(tokens))


def test_tied_export_has_no_head(tiny: Path, tmp_path: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.pop("lm_head.weight"))
    set_config(tiny, tie_word_embeddings=True)
    pretrained.export_hf(pretrained.load(tiny), tmp_path / "out")
    assert_same_bits(read_tensors(tmp_path / "out"), read_tensors(tiny))


# Writing


@pytest.mark.parametrize("mesh", [None, "4x2"])
def test_single_file_export_equals_the_published_one(golden_dir: Path, tmp_path: Path, mesh: str | None) -> None:
    directory = golden_dir / "tiny_a" / "hf"
    pretrained.export_hf(pretrained.load(directory, mesh=mesh), tmp_path / "out")
    assert (tmp_path / "out" / hf.SINGLE).read_bytes() == (directory / hf.SINGLE).read_bytes()


def test_sharded_export(golden_dir: Path, tmp_path: Path) -> None:
    directory = golden_dir / "tiny_b" / "hf"
    model = pretrained.load(directory)
    pretrained.export_hf(model, tmp_path / "out", max_shard_size=60_000)
    assert_same_bits(read_tensors(tmp_path / "out"), read_tensors(directory))
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    published = json.loads((directory / hf.INDEX).read_text())
    assert list(index["weight_map"]) == list(published["weight_map"])
    assert index["metadata"] == published["metadata"]
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 60_000
    open_and_check(tmp_path / "out")


def test_export_refuses_what_is_no_dream(golden_dir: Path, tmp_path: Path) -> None:
    directory = golden_dir / "tiny_a" / "hf"
    config = DreamConfig.from_file(directory)
    params = hf.load_params(directory, config, "float32")
    adapted = params | {"adapter": params["norm"]}
    with pytest.raises(ValueError, match=r"adapter\.scale"):
        hf.export(adapted, config, tmp_path)
    with pytest.raises(ValueError, match="bfloat16 and float32"):
        half = jax.tree.map(lambda x: x.astype("bfloat16"), params["norm"])
        hf.export(params | {"norm": half}, config, tmp_path)
    with pytest.raises(ValueError, match="max_shard_size=0"):
        hf.export(params, config, tmp_path, max_shard_size=0)
    with pytest.raises(ValueError, match="is not one of"):
        hf.export(jax.tree.map(lambda x: x.astype("int8"), params), config, tmp_path)
    with pytest.raises(ValueError, match=r"embed\.embedding: got float32\[3\]"):
        hf.export_from(lambda target, layer: np.zeros(3, np.float32), config, np.dtype("float32"), tmp_path)


# The hub


def test_hub_gets_numbers_and_text_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], **_: object) -> str:
        asked.append((repo_id, sorted(allow_patterns)))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert isinstance(pretrained.load("org/tiny"), Dream)
    text = ["*.jinja", "*.json", "*.txt"]
    # First what says whether the weights are wanted at all.
    assert asked == [("org/tiny", text), ("org/tiny", sorted([*text, "*.safetensors"]))]


def test_hub_out_of_reach() -> None:
    # conftest.py sets HF_HUB_OFFLINE
    message = "there is no local directory org/nothing, and .*: the cache of this machine does not have it"
    with pytest.raises(ConnectionError, match=message):
        pretrained.load("org/nothing")
