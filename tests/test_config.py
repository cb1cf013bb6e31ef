"""The configuration is read key by key, and nothing that it cannot mean passes."""

import dataclasses
import json

import pytest

from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import abstract_model, parameter_count

SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
]
NUMBERS = ["rope_theta", "rms_norm_eps"]
REQUIRED = [*SIZES, *NUMBERS, "tie_word_embeddings", "mask_token_id", "pad_token_id"]


def published(**changes):
    """A valid `config.json` dictionary with some keys changed."""
    return PRESETS["nano"].to_dict() | changes


@pytest.mark.parametrize(
    ("name", "parameters"),
    # dream-0.5b: Qwen2.5-0.5B's number.
    [("nano", None), ("small", None), ("dream-0.5b", 494_032_768), ("dream-7b", 7_615_616_512)],
)
def test_preset_has_the_parameters_it_counts(name, parameters):
    config = PRESETS[name]
    assert parameter_count(abstract_model(config)) == config.num_parameters
    assert parameters in (None, config.num_parameters)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    config = dataclasses.replace(PRESETS[name], initializer_range=0.03)
    assert DreamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_published_config_is_the_preset(assets):
    assert DreamConfig.from_file(assets / "dream-v0-instruct-7b") == PRESETS["dream-7b"]
    assert DreamConfig.from_file(assets / "dream-v0-instruct-7b" / "config.json") == PRESETS["dream-7b"]


@pytest.mark.parametrize("key", REQUIRED)
def test_every_required_key_is_read(key):
    """Another value in the file is another value in the config: none is taken from a default."""
    changed = {
        "vocab_size": 300,
        "hidden_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    value = changed.get(key, 7)
    assert getattr(DreamConfig.from_dict(published(**{key: value})), key) == value


@pytest.mark.parametrize("key", [*REQUIRED, "model_type"])
def test_missing_key_raises(key):
    fields = published()
    del fields[key]
    with pytest.raises(ValueError, match=f"lacks.*'{key}'"):
        DreamConfig.from_dict(fields)


def test_optional_keys_may_be_absent():
    fields = {key: value for key, value in published().items() if key in (*REQUIRED, "model_type")}
    assert DreamConfig.from_dict(fields) == dataclasses.replace(PRESETS["nano"], initializer_range=0.02)


def test_unknown_key_raises_unless_ignored():
    fields = published(logit_softcap=30.0)
    with pytest.raises(ValueError, match=r"unknown key logit_softcap=30.0.*--ignore-config-key logit_softcap"):
        DreamConfig.from_dict(fields)
    assert DreamConfig.from_dict(fields, ignore=["logit_softcap"]) == PRESETS["nano"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2"),
        ("model_type", "dream"),
        ("architectures", ["Qwen2ForCausalLM"]),
        ("architectures", ["DreamModel", "Other"]),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("head_dim", 32),
    ],
)
def test_unsupported_architecture_raises(key, value):
    with pytest.raises(ValueError) as error:
        DreamConfig.from_dict(published(**{key: value}))
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", None),
        ("attention_dropout", 0),
        ("use_mrope", None),
        ("sliding_window", 4096),
        ("head_dim", 16),
        ("torch_dtype", "bfloat16"),
        ("auto_map", {"AutoModel": "modeling_dream.DreamModel"}),
    ],
)
def test_what_changes_nothing_passes(key, value):
    assert DreamConfig.from_dict(published(**{key: value})) == PRESETS["nano"]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, bad) for key in SIZES for bad in ("128", 0, -8, 128.0, True, None)]
    + [(key, bad) for key in NUMBERS for bad in ("1e6", 0, -1.0, True, None, float("nan"))]
    + [("tie_word_embeddings", bad) for bad in ("false", 0, None)]
    + [(key, bad) for key in ("mask_token_id", "pad_token_id") for bad in ("260", -1, 264, 1.0, True, None)],
)
def test_wrong_value_raises(key, value):
    with pytest.raises(ValueError) as error:
        DreamConfig.from_dict(published(**{key: value}))
    assert key in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 130}, ["hidden_size=130", "num_attention_heads=8"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=8", "num_key_value_heads=3"]),
        ({"num_key_value_heads": 16}, ["num_attention_heads=8", "num_key_value_heads=16"]),
        ({"hidden_size": 120}, ["head_dim=15"]),
        ({"initializer_range": 0.0}, ["initializer_range=0.0"]),
        ({"mask_token_id": 256}, ["mask_token_id=256", "is also the padding token"]),
    ],
)
def test_inconsistent_sizes_raise(changes, named):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(PRESETS["nano"], **changes)
    assert all(name in str(error.value) for name in named)


def test_rope_theta_of_transformers_5():
    fields = published()
    theta = fields.pop("rope_theta")
    for parameters in ({"rope_theta": theta}, {"rope_type": "default", "rope_theta": theta}, {"type": "default"}):
        given = fields | {"rope_parameters": parameters} | ({} if "rope_theta" in parameters else {"rope_theta": theta})
        assert DreamConfig.from_dict(given) == PRESETS["nano"]
    assert DreamConfig.from_dict(published(rope_parameters={"rope_theta": theta})) == PRESETS["nano"]
    assert DreamConfig.from_dict(published(rope_parameters=None)) == PRESETS["nano"]
    assert DreamConfig.from_dict(published(rope_parameters=5), ignore=["rope_parameters"]) == PRESETS["nano"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([10000.0], r"rope_parameters=\[10000.0\], which must be an object"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rope_type='yarn', but only 'default'"),
        ({"type": "linear"}, "type='linear', but only 'default'"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but only rope_theta"),
        ({"full_attention": {"rope_theta": 1e4}}, "full_attention="),
        ({"rope_theta": 1e6}, r"rope_theta=10000.0 and rope_parameters with rope_theta=1000000.0; keep the one"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"rope_theta": {}}, r"rope_theta=\{\}"),
    ],
)
def test_rope_parameters_that_are_refused(parameters, message):
    fields = published(rope_parameters=parameters)
    with pytest.raises(ValueError, match=message):
        DreamConfig.from_dict(fields)


def test_rope_theta_nowhere():
    fields = published(rope_parameters={"rope_type": "default"})
    del fields["rope_theta"]
    with pytest.raises(ValueError, match=r"config.json lacks \['rope_theta'\]"):
        DreamConfig.from_dict(fields)


@pytest.mark.parametrize("value", [[], [1], "x", 5, True])
def test_auto_map_must_be_an_object(value):
    if value:
        with pytest.raises(ValueError, match="auto_map=.*which must be an object"):
            DreamConfig.from_dict(published(auto_map=value))
    else:
        assert DreamConfig.from_dict(published(auto_map=value)) == PRESETS["nano"]


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["nano"].hidden_size = 1
    with pytest.raises(TypeError, match="positional"):
        DreamConfig(264)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a config.json"):
        DreamConfig.from_file(tmp_path)
    path = tmp_path / "config.json"
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        (json.dumps(published(hidden_act="gelu")), "hidden_act='gelu'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            DreamConfig.from_file(tmp_path)
        assert str(path) in str(error.value)
    path.write_text(json.dumps(published(extra=1)))
    assert DreamConfig.from_file(tmp_path, ignore=["extra"]) == PRESETS["nano"]
