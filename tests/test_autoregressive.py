"""From an autoregressive Qwen2 checkpoint to a Dream to be: weights, mask token, tokenizer, and training from there."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run_script
from marking import slow
from safetensors.numpy import load_file, save_file
from tiny_tokenizer import save_again, write_tokenizer

import dream_jax
from dream_jax import hf, masks
from dream_jax.pretrained import adapt_qwen2, dream_config
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer
from dream_jax.trainer import TrainSettings, train

ROOT = Path(__file__).parent.parent
MASK, PAD = ByteTokenizer.mask_id, ByteTokenizer.pad_id
# As transformers 5 writes it.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": PAD,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 264,
}
TOKENS = {"mask_token_id": MASK, "pad_token_id": PAD}


def qwen2_checkpoint(folder, **fields):
    """Random weights in the published layout, with biases and norms that are not what they begin as."""
    folder.mkdir(parents=True)
    fields = QWEN2 | fields
    (folder / "config.json").write_text(json.dumps(fields))
    config = dream_config(fields, **TOKENS)
    random = np.random.default_rng(0)
    tensors = {
        name: (random.normal(0, 0.08, place.source_shape) + (1.0 if "norm" in name else 0.0)).astype(np.float32)
        for name, place in hf.destinations(config).items()
    }
    save_file(tensors, folder / hf.SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def qwen2(tmp_path):
    return qwen2_checkpoint(tmp_path / "qwen2")


def test_the_weights_stay_and_the_mask_token_gets_a_row(qwen2, tmp_path):
    config = adapt_qwen2(qwen2, tmp_path / "kept", **TOKENS)
    assert (config.mask_token_id, config.pad_token_id, config.rope_theta) == (MASK, PAD, 10000.0)
    before, kept = load_file(qwen2 / hf.SINGLE), load_file(tmp_path / "kept" / hf.SINGLE)
    assert before.keys() == kept.keys()
    assert all(before[name].tobytes() == kept[name].tobytes() for name in before)
    adapt_qwen2(qwen2, tmp_path / "mean", mask_row="mean", **TOKENS)
    table, mean = before.pop("model.embed_tokens.weight"), load_file(tmp_path / "mean" / hf.SINGLE)
    changed = mean.pop("model.embed_tokens.weight")
    np.testing.assert_allclose(changed[MASK], table[:MASK].mean(axis=0), atol=1e-7)
    np.testing.assert_array_equal(np.delete(changed, MASK, axis=0), np.delete(table, MASK, axis=0))
    assert all(before[name].tobytes() == mean[name].tobytes() for name in before)
    assert dream_jax.load(tmp_path / "mean").config == config


def test_tied_tables_stay_equal(tmp_path):
    source = qwen2_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(source / hf.SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / hf.SINGLE, metadata={"format": "pt"})
    adapt_qwen2(source, tmp_path / "out", mask_row="mean", **TOKENS)
    found = load_file(tmp_path / "out" / hf.SINGLE)
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    dream_jax.load(tmp_path / "out")  # which compares them, too


def test_logits_under_the_causal_mask_are_those_of_transformers(qwen2, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity test needs torch (the extra bench)")
    from transformers import Qwen2ForCausalLM

    adapt_qwen2(qwen2, tmp_path / "dream", **TOKENS)
    tokens = np.random.default_rng(1).integers(0, 256, (3, 40), dtype=np.int32)
    ours = dream_jax.load(tmp_path / "dream")(tokens, attention_mask=masks.Causal())
    theirs = Qwen2ForCausalLM.from_pretrained(qwen2, dtype=torch.float32)
    with torch.inference_mode():
        wanted = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), wanted, atol=1e-4)
    # The mask matters, so the agreement says something.
    assert np.abs(np.asarray(dream_jax.load(tmp_path / "dream")(tokens)) - wanted).max() > 1e-2


def test_causal_logits_hear_nothing_of_later_tokens(qwen2, tmp_path):
    adapt_qwen2(qwen2, tmp_path / "dream", **TOKENS)
    model = dream_jax.load(tmp_path / "dream")
    tokens = np.random.default_rng(1).integers(0, 256, (1, 12), dtype=np.int32)
    other = tokens.copy()
    other[0, 8:] = 7
    one, two = (np.asarray(model(x, attention_mask=masks.Causal())) for x in (tokens, other))
    np.testing.assert_allclose(one[0, :8], two[0, :8], atol=1e-6)
    assert np.abs(one[0, 8:] - two[0, 8:]).max() > 1e-3


@pytest.mark.parametrize("anneal_steps", [0, slow(8)])
def test_training_begins_from_it(qwen2, tmp_path, anneal_steps):
    """Under the bidirectional mask from the first step on, or annealed: the loss is the model's own, and falls."""
    adapt_qwen2(qwen2, tmp_path / "dream", **TOKENS)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n % 7} {n % 7} " * 6}) + "\n" for n in range(60)))
    settings = TrainSettings.flat(
        model=str(tmp_path / "dream"), tokenizer="bytes", data=str(texts), out=tmp_path / "run", steps=16, batch_size=16,
        learning_rate=3e-3, anneal_steps=anneal_steps, eval_rows=2, eos_tail=0,
    )  # fmt: skip
    summary = train(settings)
    losses = [float(line.split(",")[2]) for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    # nll: of random weights of this size, near the uniform log(264); afterwards clearly below.
    assert losses[0] == pytest.approx(np.log(264), abs=0.7)
    assert losses[-1] < 0.7 * losses[0]
    assert summary["eval"]["rows"] == 0 and summary["eval"]["nll"] < losses[0]


def test_a_plain_qwen2_says_what_to_do_with_it(qwen2):
    with pytest.raises(ValueError, match=r"model_type='qwen2'.*convert/qwen2_to_dream.py SRC DST"):
        dream_jax.load(qwen2)


def test_transformers_4_wrote_the_base_elsewhere():
    old = {key: value for key, value in QWEN2.items() if key not in ("rope_parameters", "layer_types")}
    assert dream_config(old | {"rope_theta": 1e6}, **TOKENS).rope_theta == 1e6
    with pytest.raises(ValueError, match="neither rope_theta nor rope_parameters"):
        dream_config(old, **TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"vocab_size": 200}, "mask_token_id=260 is outside the embedding table of vocab_size=200"),
        ({"qk_norm": True}, "unknown key qk_norm"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"layer_types": [["full_attention"]]}, "layer_types="),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\], which must be an object"),
        ({"rope_parameters": {"factor": 2.0, "rope_theta": 1e4}}, "factor=2.0"),
        ({"rope_theta": 5.0}, "rope_theta=5.0 and rope_parameters with rope_theta=10000.0"),
        ({"vocab_size": None}, "vocab_size=None, which must be a positive integer"),
        ({"vocab_size": "264"}, "vocab_size='264'"),
    ],
)
def test_what_cannot_become_a_dream(change, message):
    with pytest.raises(ValueError, match=message):
        dream_config(QWEN2 | change, **TOKENS)


def test_refusals_leave_nothing(qwen2, tmp_path):
    with pytest.raises(ValueError, match="mask_row='zero' is not one of keep, mean"):
        adapt_qwen2(qwen2, tmp_path / "out", mask_row="zero", **TOKENS)
    with pytest.raises(ValueError, match=r"qwen2/config.json: mask_token_id=151666 is outside"):
        adapt_qwen2(qwen2, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        adapt_qwen2(tmp_path, tmp_path / "out")
    adapt_qwen2(qwen2, tmp_path / "out", **TOKENS)
    with pytest.raises(FileExistsError, match="--overwrite"):
        adapt_qwen2(qwen2, tmp_path / "out", **TOKENS)
    rewritten = json.loads((qwen2 / "config.json").read_text()) | {"intermediate_size": 128}
    (qwen2 / "config.json").write_text(json.dumps(rewritten))
    with pytest.raises(ValueError, match="config.json asks for"):
        adapt_qwen2(qwen2, tmp_path / "other", **TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "qwen2"]


def without_dreams_tokens(source, target):
    """Dream's tokenizer files without what Dream added to Qwen2.5's."""
    target.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(source / name, target / name)
    config = json.loads((target / "tokenizer_config.json").read_text())
    for number in ("151665", "151666"):
        del config["added_tokens_decoder"][number]
    config |= {
        "bos_token": None,
        "mask_token": None,
        "additional_special_tokens": [],
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    added = json.loads((target / "added_tokens.json").read_text())
    added = {name: number for name, number in added.items() if number < 151665}
    (target / "added_tokens.json").write_text(json.dumps(added))
    return target


def test_the_tokenizer_gets_the_tokens_of_dreams(assets, tmp_path):
    published = assets / "dream-v0-instruct-7b"
    source = without_dreams_tokens(published, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="mask_token"):
        load_tokenizer(source)
    shutil.copytree(qwen2_checkpoint(tmp_path / "small", vocab_size=151_680), tmp_path / "qwen2")
    for file in source.iterdir():
        shutil.copyfile(file, tmp_path / "qwen2" / file.name)
    adapt_qwen2(tmp_path / "qwen2", tmp_path / "out")
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(published)
    assert (ours.mask_id, ours.bos_id, ours.pad_id) == (151666, 151665, 151643)
    assert ours.vocab_limit == theirs.vocab_limit
    text = "A diffusion model <|mask|> <|im_end|> 数据 3.14"
    for special in (False, True):
        assert ours.encode(text, special) == theirs.encode(text, special)
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (published / "vocab.json").read_bytes()
    # A Dream tokenizer is copied as it is, and one with other tokens in these places is refused.
    adapt_qwen2(tmp_path / "qwen2", tmp_path / "again", tokenizer=tmp_path / "out")
    assert load_tokenizer(tmp_path / "again").mask_id == 151666
    with pytest.raises(ValueError, match="cannot be token 151670"):
        adapt_qwen2(tmp_path / "qwen2", tmp_path / "far", mask_token_id=151670)


def test_a_configuration_without_vocab_size():
    with pytest.raises(ValueError, match="config.json lacks vocab_size"):
        dream_config({key: value for key, value in QWEN2.items() if key != "vocab_size"}, **TOKENS)


def with_tokenizer(checkpoint, tokenizer, target):
    """Returns a copy of a checkpoint with the files of a tokenizer."""
    shutil.copytree(checkpoint, target)
    shutil.copytree(tokenizer, target, dirs_exist_ok=True)
    return target


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5", "both"])
def test_added_tokens_in_any_layout(layout, qwen2, tmp_path):
    """transformers 5 lists the added tokens in tokenizer.json alone, and writes neither vocab.json nor merges.txt."""
    dream = load_tokenizer(write_tokenizer(tmp_path / "dream"))
    source = write_tokenizer(tmp_path / "files", dream=False)
    if layout != "transformers 4":
        again = save_again(source, tmp_path / "again")
        names = {path.name for path in again.iterdir()}
        assert "tokenizer.json" in names and not names & {"vocab.json", "merges.txt", "added_tokens.json"}
        if layout == "both":
            shutil.copyfile(again / "tokenizer.json", source / "tokenizer.json")
        else:
            source = again
    given = with_tokenizer(qwen2, source, tmp_path / "given")
    adapt_qwen2(given, tmp_path / "out", mask_token_id=260, pad_token_id=256)
    ours = load_tokenizer(tmp_path / "out")
    assert (ours.mask_id, ours.bos_id, ours.pad_id, ours.vocab_limit) == (260, 259, 256, 261)
    text, chat = "a <|mask|> é<|im_end|>", [{"role": "user", "content": "a<|mask|>"}]
    assert ours.encode(text, True) == dream.encode(text, True) and ours.encode(text) == dream.encode(text)
    assert ours.chat(chat) == dream.chat(chat)
    # A Dream tokenizer that transformers 5 has saved is one, and is copied as it is.
    last = with_tokenizer(qwen2, save_again(tmp_path / "out", tmp_path / "saved"), tmp_path / "given again")
    assert load_tokenizer(last).chat(chat) == dream.chat(chat)
    adapt_qwen2(last, tmp_path / "copied", mask_token_id=260, pad_token_id=256)
    assert (tmp_path / "copied" / "tokenizer.json").read_bytes() == (last / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "[]", r"tokenizer.json: Expected `object`, got `array`"),
        ("tokenizer.json", "{}", r"tokenizer.json: Object missing required field `added_tokens`"),
        ("tokenizer.json", '{"added_tokens": [{"content": "x"}]}', "a token in added_tokens has no id"),
        (
            "tokenizer.json",
            '{"added_tokens": [{"id": 300, "content": "<|im_end|>"}]}',
            "gives the token <|im_end|> the id",
        ),
        ("added_tokens.json", '{"x": "1"}', "added_tokens.json: .*Expected `int`, got `str`"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "has the key 'x', which is no id",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder: Expected `object`"),
    ],
)
def test_tokenizer_files_of_another_form_are_named(file, content, message, qwen2, tmp_path):
    given = with_tokenizer(qwen2, write_tokenizer(tmp_path / "files", dream=False), tmp_path / "given")
    (given / file).write_text(content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        adapt_qwen2(given, tmp_path / "out", mask_token_id=260, pad_token_id=256)
    assert not (tmp_path / "out").exists()


def test_the_command(qwen2, tmp_path):
    command = ["convert/qwen2_to_dream.py", qwen2, tmp_path / "out", "--mask-row", "mean"]
    command += ["--mask-token-id", MASK, "--pad-token-id", PAD]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "mask token 260 (the mean of the rows before it)" in done.stdout
    again = run_script(*command)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr
    assert jax.tree.leaves(dream_jax.load(tmp_path / "out"))
