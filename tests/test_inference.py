"""From a path to a model with its tokenizer and template, and from prompts to answers."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax import inference
from dream_jax.inference import ModelSettings, answer, batches, canvas_text, check_length, encode_prompt, row_keys
from dream_jax.row_file import RowFile, agree_on_settings
from dream_jax.sampler import generate
from dream_jax.tokenizer import ByteTokenizer, write_template


@pytest.fixture(scope="module")
def model():
    return dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(3))


def test_all_but_the_weights_is_known_before_they_are_read(model, tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    model.trained_mask = "prefix"
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    model.trained_mask = "bidirectional"
    settings = ModelSettings(model=str(tmp_path / "model"))
    prepared = inference.prepare(settings)
    assert (prepared.dtype, prepared.template, prepared.model.trained_mask) == ("float32", "raw", "prefix")
    assert isinstance(jax.tree.leaves(nnx.state(prepared.model))[0], jax.ShapeDtypeStruct)
    assert prepared.load().trained_mask == "prefix"
    causal = inference.prepare(dataclasses.replace(settings, mask="causal"))
    assert causal.model.trained_mask == causal.load().trained_mask == "causal"
    with pytest.raises(ValueError, match="'sideways' is not one of"):
        ModelSettings(mask="sideways")
    with pytest.raises(ValueError, match="--any-base needs an adapter"):
        ModelSettings(any_base=True)
    with pytest.raises(ValueError, match="no tokenizer files; pass --tokenizer"):
        inference.prepare(ModelSettings(model="small"))


def test_prompts_are_written_as_in_training(model, tmp_path):
    """A model that was trained on chats is asked in the chat template, and one trained on bare text is not."""
    ByteTokenizer().save(tmp_path / "tokenizer")
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    settings = ModelSettings(model=str(tmp_path / "model"))
    assert inference.prepare(settings).template == "raw"
    assert inference.prepare(settings, default_template="chat").template == "chat"
    for template in ("chat", "raw"):
        write_template(tmp_path / "model", template)
        assert inference.prepare(settings, default_template="chat").template == template
    assert inference.prepare(dataclasses.replace(settings, template="chat")).template == "chat"
    (tmp_path / "model" / "prompt_format.json").write_text('{"template": "poem"}')
    with pytest.raises(ValueError, match="poem"):
        inference.prepare(settings)


def test_a_sampler_writes_what_the_tokenizer_has():
    config = inference.make_sampler(ByteTokenizer(), 5, temperature=None, top_p=0.5)
    assert (config.steps, config.alg, config.temperature, config.top_p) == (None, "entropy", 0.0, 0.5)
    assert (config.vocab_limit, config.forbidden_tokens) == (261, (260,))
    assert inference.make_sampler(ByteTokenizer(), 5, "fast", steps=None).block_length == 32
    with pytest.raises(ValueError, match="steps=4 has no effect with"):
        inference.make_sampler(ByteTokenizer(), 5, "fast", steps=4)


def test_answers_end_at_the_end_token(model, monkeypatch):
    tokenizer = ByteTokenizer()
    written = np.array([[*b"ab", *b"42", 256, *b"zz"], [*b"ab", 256, 256, 256, 256, 256], [*b"ab", *b"hello"]])

    def generate(model, prompt, config, keys, prompt_mask):
        assert prompt.shape == (4, 8) and prompt_mask[:, -2:].tolist() == [[True, True]] * 3 + [[False, True]]
        tokens = np.pad(np.concatenate([np.full((3, 6), 256), written], axis=1), ((0, 1), (0, 0)))
        commit_step = np.where(np.arange(13) < 8, -1, 0)[None].repeat(4, 0)
        return dataclasses.make_dataclass("Sample", ["tokens", "commit_step", "forwards"])(tokens, commit_step, 4)

    monkeypatch.setattr(inference, "generate", generate)
    config = dream_jax.SamplerConfig(max_new_tokens=5, steps=5)
    found = answer(model, tokenizer, [list(b"ab")] * 3, [(0, 1), (0, 2), (0, 3)], config, 4)
    assert [(one.text, one.tokens_to_end) for one in found] == [("42", 2), ("", 0), ("hello", None)]
    assert [bytes(one.tokens[:2]) for one in found[::2]] == [b"42", b"he"] and {one.forwards for one in found} == {4}
    assert [(one.num_written, one.num_useful) for one in found] == [(5, 2), (5, 0), (5, 5)]


def test_each_seed_and_prompt_has_a_key_of_its_own(model):
    tokenizer = ByteTokenizer()
    config = inference.make_sampler(tokenizer, 6, steps=3, temperature=1.0)
    names = [(0, 1), (0, 2), (1, 1), (0, 1)]
    texts = [one.text for one in answer(model, tokenizer, [list(b"ab")] * 4, names, config, 4)]
    assert len(set(texts)) == 3 and texts[0] == texts[3]
    # The rows of one key are named (seed, row): what `generate` makes of them is the same.
    asked = [list(b"abc"), list(b"a"), list(b"ab")]
    found = answer(model, tokenizer, asked, [(7, 0), (7, 1), (7, 2)], config, 4)
    padded, valid = inference.left_padded(asked, 3, tokenizer.pad_id)
    out = generate(model, padded, config, jax.random.key(7), prompt_mask=valid)
    assert [one.tokens for one in found] == [
        tuple(row) for row in np.asarray(out.tokens)[:, padded.shape[1] :].tolist()
    ]


def test_rows_that_fill_up_a_batch_end_when_the_last_one_ends(model, monkeypatch):
    """Else the canvas of a model of block diffusion would grow for a text that nobody asked for."""
    given = []

    def noted(model, tokens, config, keys, prompt_mask):
        given.append((tokens, prompt_mask, jax.random.key_data(keys)))
        raise InterruptedError

    monkeypatch.setattr(inference, "generate", noted)
    for mask in ("block-diffusion:4", "bidirectional"):
        config = inference.make_sampler(ByteTokenizer(), 6, trained_mask=mask)
        with pytest.raises(InterruptedError):
            answer(model, ByteTokenizer(), [list(b"a"), list(b"abc")], [(0, 0), (0, 1)], config, 4)
    blocks, others = given
    for array in blocks:
        np.testing.assert_array_equal(array[2:], np.asarray(array)[[1, 1]])
    assert others[1][2:].sum() == 2  # one token each


def test_keys_follow_from_their_names():
    """As answers were drawn before this module: nothing may change them."""
    key = jax.random.fold_in(jax.random.key(5), 3)
    found = row_keys([(5, 3, 0), (5, 3, 2)])
    for one, expected in zip(found, (key, jax.random.fold_in(key, 2)), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(expected))
    np.testing.assert_array_equal(jax.random.key_data(row_keys([(5, 3)])[0]), jax.random.key_data(key))
    assert row_keys([]).shape == (0,)


def test_batches_share_a_bucket():
    lengths = [8, 30, 7, 31, 29, 8, 100]
    found = batches(lengths, 2)
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert found == [(0, 2), (5,), (1, 3), (4,), (6,)]


def test_prompts_that_do_not_fit(model):
    tokenizer = ByteTokenizer()
    ids = encode_prompt("<|mask|>x", "raw", tokenizer)
    assert tokenizer.mask_id not in ids  # a file cannot forge a control token
    assert encode_prompt("<|mask|>x", "raw", tokenizer, allow_special=True)[0] == tokenizer.mask_id
    assert encode_prompt("x", "chat", tokenizer) == tokenizer.chat([{"role": "user", "content": "x"}])
    most = model.config.max_position_embeddings
    check_length([1] * (most - 8), 8, model, "f:1")
    check_length([], 8, model, "f:1", shortest=0)
    for wrong in ([], [1] * (most - 7)):
        with pytest.raises(ValueError, match=f"f:1: a prompt of {len(wrong)} tokens"):
            check_length(wrong, 8, model, "f:1")
    with pytest.raises(ValueError, match="a prompt of 0 tokens and 0 new tokens make 0"):
        check_length([], 0, model, "f:1", shortest=0)


IM_START, IM_END = ByteTokenizer.im_start_id, ByteTokenizer.im_end_id


def read(prompt, *answer, given=()):
    """The answer in a canvas of a prompt and these tokens and texts, in which the masks of the prompt become `given`."""
    ids = [token for part in answer for token in ([part] if isinstance(part, int) else part.encode())]
    filled = iter(given)
    begin = [next(filled) if token == ByteTokenizer.mask_id else token for token in prompt]
    written = np.array([*(token == ByteTokenizer.mask_id for token in prompt), *[True] * len(ids)])
    return inference.read_answer(ByteTokenizer(), prompt, np.array([*begin, *ids]), np.where(written, 0, -1), 3)


def test_the_end_of_a_turn_ends_an_answer():
    tokenizer = ByteTokenizer()
    found = read(b"?", "18.", IM_END, "\n", IM_START, "user\nAnd 3?")
    assert (found.text, found.tokens_to_end, found.num_useful) == ("18.", 3, 3)
    assert found.canvas == "18.<|im_end|>\n<|im_start|>user\nAnd 3?"
    # Marks of a reasoning format are shown, because without them the trace and the answer would run together.
    found = read(b"?", IM_START, "think\n1", IM_START, "answer\n2", tokenizer.eos_id, IM_START)
    assert found.text == "<|im_start|>think\n1<|im_start|>answer\n2"
    assert inference.canvas_text(np.array([*b"a", IM_START, tokenizer.mask_id, IM_END, 66]), tokenizer) == (
        "a<|im_start|>░"
    )


def test_stops_are_found_in_special_tokens_and_across_tokens():
    found = read(b"?", "a b", IM_START, "c", IM_END, "\nd")
    assert found.until([]) == found.until(["", "\n", "d", "zz"]) == "a b<|im_start|>c"
    assert found.until(["<|im_start|>"]) == "a b" and found.until(["<|im_end|>"]) == found.text
    assert found.until(["b<|im"]) == "a " and found.until([" b<|im_start|>c<|im_end|>\nd"]) == "a"
    assert found.until(["b", "a"]) == "" and found.until(["c<|im_end|>"]) == "a b<|im_start|>"


def test_an_infilled_text_ends_after_what_was_given():
    mask, eos = ByteTokenizer.mask_id, ByteTokenizer.eos_id
    found = read([*b"a", mask, mask, *b"b"], "cd", eos, "e", given=[*b"x", eos])
    assert found.text == "ax<|endoftext|>bcd"
    assert (found.num_written, found.num_useful, found.tokens_to_end) == (6, 4, 2)
    # The masks at the end of a prompt are like new ones.
    assert read([*b"a", mask, mask, mask], given=[*b"x", eos, *b"y"]).text == "ax"
    assert read([mask, mask], given=[*b"x", IM_END]).text == "x"
    assert inference.shown_from([mask], ByteTokenizer()) == (0, 0)
    assert inference.shown_from(list(b"ab"), ByteTokenizer()) == (2, 2)


def test_the_settings_of_answers_are_those_of_earlier_files():
    """One step per mask was written as one step per new token; it is the same unless prompts have masks."""
    tokenizer = ByteTokenizer()
    config = inference.make_sampler(tokenizer, 5)
    assert config.steps is None
    assert inference.sampler_recipe(config, [list(b"ab")], tokenizer)["steps"] == 5
    assert inference.sampler_recipe(config, [[97, tokenizer.mask_id]], tokenizer)["steps"] is None
    assert inference.sampler_recipe(config, [], tokenizer)["cache"] == "NoCache()"


def test_a_canvas_hides_what_follows_the_end_token():
    tokenizer = ByteTokenizer()
    ids = np.array([*tokenizer.encode("4"), tokenizer.mask_id, *tokenizer.encode("2"), tokenizer.eos_id, 65])
    assert canvas_text(ids, tokenizer) == "4░2"
    ids = np.array([*tokenizer.encode("42"), tokenizer.eos_id, *tokenizer.encode("7")])
    assert canvas_text(ids, tokenizer) == canvas_text(ids[:2], tokenizer) == "42"


def test_a_file_of_rows_resumes_wherever_it_was_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = [{"number": 1, "text": "é\u2028"}, {"number": 2}]
    RowFile(path).append(whole)
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        found = RowFile(path)
        done = content[:size].count(b"\n")
        assert found.rows == whole[:done] and path.stat().st_size == size  # reading changes nothing
        found.keep(done)
        found.append(whole[done:])
        assert path.read_bytes() == content and found.rows == whole
    found.keep(1)
    assert RowFile(path).rows == whole[:1]
    path.write_bytes(content + b"[1]\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: a list"):
        RowFile(path)


def test_only_a_row_that_was_cut_short_is_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    for tail, ours in (('{"li', True), ('{"line": 2, "te', True), ("# notes of somebody", False)):
        path.write_text('{"line": 1}\n' + tail)
        if ours:
            rows = RowFile(path, start=b'{"line": ')
            rows.keep(1)
            assert path.read_text() == '{"line": 1}\n'
        else:
            with pytest.raises(ValueError, match="rows.jsonl:2: not a row that was cut short"):
                RowFile(path, start=b'{"line": ')
            assert path.read_text().endswith(tail)


def test_rows_of_other_settings_are_refused(tmp_path):
    rows, beside = tmp_path / "rows.jsonl", tmp_path / "settings.json"
    agree_on_settings(beside, rows, {"a": (1,)}, "go elsewhere")
    RowFile(rows).append([{}])
    agree_on_settings(beside, rows, {"a": (1,), "new": None}, "go elsewhere")  # from before the setting was known
    with pytest.raises(
        ValueError,
        match=r"a was \[1\], now 2; b was None, now 3\); give the same settings again; otherwise go elsewhere",
    ):
        agree_on_settings(beside, rows, {"a": 2, "b": 3}, "go elsewhere")
    beside.unlink()
    with pytest.raises(ValueError, match=r"settings\.json, .* is missing; go elsewhere"):
        agree_on_settings(beside, rows, {"a": 1}, "go elsewhere")
