"""Requests that are wrong are refused with the field and the remedy; requests that are right become tasks."""

import dataclasses
import json
import random
import runpy

import pytest
from commands import ROOT
from serving_client import MASK, TOKENIZER, maker
from tiny_tokenizer import TEMPLATE, write_tokenizer

from dream_jax.sampler import Threshold, WindowCache
from dream_jax.serving.requests import ChatRequest, CompletionRequest, InfillRequest, RequestError, parse
from dream_jax.serving.tasks import Gap
from dream_jax.serving.tool_calls import CallReader
from dream_jax.tokenizer import load_tokenizer

CHAT = {"model": "nano", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "nano", "prompt": "ab"}
GAPS = {"model": "nano", "parts": ["a", {"length": 2}, "b"]}


def tasks(kind, base, **fields):
    return maker().tasks(parse(kind, json.dumps(base | fields).encode()))


USER = {"role": "user", "content": "x"}
BROKEN_CALL = {"function": {"name": "f", "arguments": "{"}}

WRONG = [
    (ChatRequest, CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
    (ChatRequest, CHAT, {"max_tokens": -5}, "max_tokens", "got -5"),
    (ChatRequest, CHAT, {"max_tokens": "12"}, "max_tokens", "got '12'"),
    (ChatRequest, CHAT, {"max_tokens": 1.5}, "max_tokens", "1.5"),
    (ChatRequest, CHAT, {"max_tokens": True}, "max_tokens", "True"),
    (ChatRequest, CHAT, {"max_tokens": 10**30}, "max_tokens", "less than or equal"),
    (ChatRequest, CHAT, {"max_tokens": 127}, "max_tokens", "more than the 128 of this server"),
    (ChatRequest, CHAT, {"max_tokens": [10**50] * 5}, "max_tokens", "got [a number of more than 40 digits, "),
    (ChatRequest, CHAT, {"max_tokens": {"a": [[5]]}}, "max_tokens", "got {'a': [...]}"),
    (ChatRequest, CHAT, {"max_tokens": "9" * 10**6}, "max_tokens", "99..."),
    (ChatRequest, CHAT, {"m" * 10**6: 5}, "m" * 77 + "...", "unknown field"),
    (ChatRequest, CHAT, dict.fromkeys(map(str, range(10**4))), "None", "an object of 10002 fields; send only"),
    (ChatRequest, CHAT, {"metadata": dict.fromkeys(map(str, range(10**4)), 1)}, "metadata", "an object of 10000 fields"),
    (CompletionRequest, TEXT, {"prompt": [{}] * 10**4}, "prompt.0", "valid"),
    (CompletionRequest, TEXT, {"prompt": {"a": 1}}, "prompt", "prompt: Input should be a valid"),
    (CompletionRequest, TEXT, {"prompt": [10**50]}, "prompt.0", "less than or equal to"),
    (InfillRequest, GAPS, {"parts": [dict.fromkeys(map(str, range(10**4)))]}, "parts.0", "an object of 10000 fields"),
    (ChatRequest, CHAT, {"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "give either"),
    (ChatRequest, CHAT, {"temperature": -0.1}, "temperature", "greater than or equal"),
    (ChatRequest, CHAT, {"temperature": "hot"}, "temperature", "valid number"),
    (ChatRequest, CHAT, {"temperature": float("nan")}, "temperature", "finite"),
    (ChatRequest, CHAT, {"temperature": 1e308}, "temperature", "less than or equal"),
    (ChatRequest, CHAT, {"top_p": 0}, "top_p", "greater than 0"),
    (ChatRequest, CHAT, {"top_p": 1.5}, "top_p", "less than or equal to 1"),
    (ChatRequest, CHAT, {"n": 0}, "n", "greater than or equal to 1"),
    (ChatRequest, CHAT, {"n": 9}, "n", "more than 8 answers"),
    (ChatRequest, CHAT, {"seed": -1}, "seed", "greater than or equal to 0"),
    (ChatRequest, CHAT, {"seed": 2**31}, "seed", "less than or equal"),
    (ChatRequest, CHAT, {"stop": ""}, "stop", "at least 1 character"),
    (ChatRequest, CHAT, {"stop": ["a"] * 17}, "stop", "at most 16"),
    (ChatRequest, CHAT, {"stop": ["a", 5]}, "stop.1", "valid string, got 5"),
    (ChatRequest, CHAT, {"stream": "yes"}, "stream", "valid boolean"),
    (ChatRequest, CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    (ChatRequest, CHAT, {"logprobs": 5}, "logprobs", "valid boolean"),
    (ChatRequest, CHAT, {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    (ChatRequest, CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    (ChatRequest, CHAT, {"frequency_penalty": 0.5}, "frequency_penalty", "less than or equal to 0"),
    (ChatRequest, CHAT, {"logit_bias": {"5": 1}}, "logit_bias", "at most 0"),
    (ChatRequest, CHAT, {"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    (ChatRequest, CHAT, {"tools": [{"type": "function"}]}, "tools", "the byte tokenizer does not support tools"),
    (ChatRequest, CHAT, {"tools": ["f"]}, "tools.0", "got 'f'"),
    (ChatRequest, CHAT, {"tools": [{"a": float("inf")}]}, "tools", "JSON cannot represent"),
    (ChatRequest, CHAT, {"tools": [{"f": 1}], "tool_choice": "none"}, "tool_choice", "leave out the tools"),
    (ChatRequest, CHAT, {"tools": [{"f": 1}], "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    (ChatRequest, CHAT, {"tools": [{"f": 1}], "parallel_tool_calls": False}, "parallel_tool_calls", "leave it out"),
    (ChatRequest, CHAT, {"functions": []}, "functions", 'an earlier form of "tools"; send it under this name'),
    (ChatRequest, CHAT, {"max_token": 5}, "max_token", "did you mean 'max_tokens'"),
    (ChatRequest, CHAT, {"steps": 5}, "steps", 'put it under "dream"'),
    (ChatRequest, CHAT, {"messages": []}, "messages", "at least 1 item"),
    (ChatRequest, CHAT, {"messages": "hi"}, "messages", "valid array"),
    (ChatRequest, CHAT, {"messages": [{"role": "critic", "content": "x"}]}, "messages.0", "'critic' must be one of"),
    (ChatRequest, CHAT, {"messages": [{"role": "c" * 5000, "content": "x"}]}, "messages.0", " ... "),
    (ChatRequest, CHAT, {"messages": [5]}, "messages.0", "got 5"),
    (ChatRequest, CHAT, {"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages", "nothing to answer"),
    (ChatRequest, CHAT, {"messages": [USER | {"name": "Ada"}]}, "messages", "nothing reads: messages.name;"),
    (ChatRequest, CHAT, {"messages": [USER | {"images": ["y"]}]}, "messages.0", "'images' belongs to the prompt"),
    (ChatRequest, CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "does not support tools"),
    (ChatRequest, CHAT, {"messages": [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]}, "messages.0", "not JSON"),
    (ChatRequest, CHAT, {"messages": [{"role": "user"}]}, "messages.0", "'content'"),
    (ChatRequest, CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0", "'content'"),
    (ChatRequest, CHAT, {"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages.0", "parts of the type"),
    (ChatRequest, CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}, "max_tokens", "more than the 128"),
    (ChatRequest, CHAT, {"dream": 5}, "dream", "got 5"),
    (ChatRequest, CHAT, {"dream": {"preset": "best"}}, "dream.preset", "'exact', 'balanced' or 'fast'"),
    (ChatRequest, CHAT, {"dream": {"speed": 1}}, "dream.speed", "unknown field; did you mean"),
    (ChatRequest, CHAT, {"dream": {"steps": 500}}, "dream.steps", "more than the 12 tokens"),
    (ChatRequest, CHAT, {"dream": {"preset": "fast", "steps": 3}}, "dream", "no effect"),
    (ChatRequest, CHAT, {"dream": {"block_length": 0}}, "dream.block_length", "greater than or equal to 1"),
    (ChatRequest, CHAT, {"dream": {"commit": {"rule": "threshold"}}}, "dream", "needs a value"),
    (ChatRequest, CHAT, {"dream": {"commit": {"rule": "threshold", "value": 2}}}, "dream", "outside [0, 1]"),
    (ChatRequest, CHAT, {"dream": {"commit": {"rule": "count", "value": 2}}}, "dream", "has no value"),
    (ChatRequest, CHAT, {"dream": {"preset": "fast", "commit": {"rule": "count"}}}, "dream.commit", "preset 'exact'"),
    (ChatRequest, CHAT, {"dream": {"alg": "origin", "block_length": 4}}, "dream", "without blocks"),
    (ChatRequest, CHAT, {"dream": {"first_token_first": True}}, "dream", "is for models of block diffusion"),
    (ChatRequest, CHAT, {"dream": {"guidance": float("inf")}}, "dream.guidance", "finite"),
    (ChatRequest, CHAT, {"dream": {"denoise": True}}, "dream.denoise", "set stream to true"),
    (ChatRequest, CHAT, {"stream": True, "dream": {"runner_ups": 2}}, "dream.runner_ups", "set dream.denoise"),
    (ChatRequest, CHAT, {"dream": {"forced_tokens": [{"position": 12, "text": "x"}]}}, "dream.forced_tokens.0", "12"),
    (ChatRequest, CHAT, {"dream": {"forced_tokens": [{"position": 0}]}}, "dream.forced_tokens.0", "either"),
    (ChatRequest, CHAT, {"dream": {"forced_tokens": [{"position": 0, "token": MASK}]}}, "dream.forced_tokens.0", "mask"),
    (ChatRequest, CHAT, {"dream": {"forced_tokens": [{"position": 0, "text": "x" * 12}]}}, "dream.forced_tokens", "leave"),
    (ChatRequest, CHAT, {"model": 5}, "model", "valid string"),
    (CompletionRequest, TEXT, {"prompt": 5}, "prompt", "got 5"),
    (CompletionRequest, TEXT, {"prompt": [MASK]}, "prompt", "mask token"),
    (CompletionRequest, TEXT, {"prompt": [9999]}, "prompt", "not below 261"),
    (CompletionRequest, TEXT, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    (CompletionRequest, TEXT, {"prompt": ["a", 5]}, "prompt.", "valid"),
    (CompletionRequest, TEXT, {"prompt": ["a"] * 9}, "n", "more than 8 answers"),
    (CompletionRequest, TEXT, {"logprobs": 5, "echo": True}, "echo", "leave echo or logprobs out"),
    (CompletionRequest, TEXT, {"logprobs": True}, "logprobs", "True"),
    (CompletionRequest, TEXT, {"best_of": 3}, "best_of", "less than or equal to 1"),
    (CompletionRequest, TEXT, {"messages": []}, "messages", "unknown field"),
    (CompletionRequest, TEXT, {"suffix": "x", "dream": {"forced_tokens": [{"position": 0, "text": "x"}]}}, "dream.forced_tokens", "not with a suffix"),  # noqa: E501
    (InfillRequest, GAPS, {"parts": ["a"]}, "parts", "no gap"),
    (InfillRequest, GAPS, {"parts": []}, "parts", "at least 1"),
    (InfillRequest, GAPS, {"parts": [{"length": 0}]}, "parts.0.length", "greater than or equal to 1"),
    (InfillRequest, GAPS, {"parts": [{"length": 10**6}]}, "parts", "more than the 128"),
    (InfillRequest, GAPS, {"parts": [{"size": 2}]}, "parts.0", ""),
    (InfillRequest, GAPS, {"parts": ["a", {"length": 2}], "dream": {"end_penalty": 1.0}}, "dream.end_penalty", "up_to"),
    (InfillRequest, GAPS, {"stop": "x"}, "stop", "unknown field"),
    (InfillRequest, GAPS, {"max_tokens": 5}, "max_tokens", "unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "base", "fields", "param", "message"), WRONG)
def test_wrong_fields(kind, base, fields, param, message):
    with pytest.raises(RequestError) as error:
        tasks(kind, base, **fields)
    assert str(error.value.param).startswith(param) and message in str(error.value), (
        error.value.param,
        str(error.value),
    )
    assert len(str(error.value)) < 400 and error.value.status == 400


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "\\ud800"}',
    b'{"model": "a", }',
    b"{'model': 'a'}",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"model": 1e999}',
    b'{"model": ' + b"9" * 5000 + b"}",
    b'{"model": "a"} trailing',
    b'{"model": "a\x00"}',
    b"model=a&prompt=b",
    b"\x00",
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, InfillRequest])
def test_broken_bodies(kind, body):
    with pytest.raises(RequestError) as error:
        parse(kind, body)
    assert len(str(error.value)) < 400


MANY = [b"[]," * 10**5 + b"[]", b'{"":0},' * 5 * 10**4 + b"[]", b"{" + b'"\\"":0,' * 10**5 + b'"":0}']


@pytest.mark.parametrize("members", MANY, ids=["lists", "objects", "keys"])
def test_bodies_of_many_members_are_not_read(members):
    """They would take seconds, in which the server does nothing else."""
    with pytest.raises(RequestError, match="more than 100000 lists, objects and keys") as error:
        parse(CompletionRequest, b'{"model": "nano", "prompt": "a", "user": [%b]}' % members)
    assert error.value.status == 413


def test_brackets_in_strings_are_text():
    """Their number has no bound of its own, also after escaped quotes; a string without an end takes no longer."""
    text = '[{":\\' * 10**5
    body = json.dumps(TEXT | {"prompt": text}).encode()
    assert parse(CompletionRequest, body).prompt == text
    with pytest.raises(RequestError, match="not valid JSON"):
        parse(CompletionRequest, body[:-2])


def test_chat_is_what_sample_py_makes_of_messages():
    """Names of control tokens in the texts of users stay text."""
    messages = [
        {"role": "developer", "content": "be <|im_end|> brief"},
        {"role": "user", "content": [{"type": "text", "text": "<|mask|>"}, {"type": "text", "text": "<|endoftext|>"}]},
    ]
    [task] = tasks(ChatRequest, CHAT, messages=messages, max_tokens=4)
    told = [
        {"role": "system", "content": "be <|im_end|> brief"},
        {"role": "user", "content": "<|mask|><|endoftext|>"},
    ]
    assert list(task.prompt) == TOKENIZER.chat(told)
    assert MASK not in task.prompt and task.prompt.count(TOKENIZER.im_end_id) == 2
    assert task.gaps == (Gap(start=len(task.prompt), length=4),)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
CHATS = [
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "a"}],
    [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL, CALL | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "three"}]},
        {"role": "user", "content": "sure?"},
    ],
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    """A tokenizer whose template shows tools and calls."""
    template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=template))


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["without", "empty", "with tools"])
@pytest.mark.parametrize("messages", CHATS, ids=["parts", "system", "calls"])
def test_a_chat_is_asked_as_sample_py_asks_it(with_tools, messages, tools):
    request = parse(ChatRequest, json.dumps(CHAT | {"messages": messages, "tools": tools, "max_tokens": 1}).encode())
    [task] = dataclasses.replace(maker(longest=2000), tokenizer=with_tools).tasks(request)
    sample = runpy.run_path(str(ROOT / "sample.py"))
    asked = {"messages": messages} | ({} if tools is None else {"tools": tools})
    assert list(task.prompt) == sample["read_question_of"](asked, "here", "chat", with_tools).ids
    assert ("parameters" in with_tools.decode(task.prompt)) == bool(tools)


def test_an_error_of_the_template_names_no_folder_of_the_server(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template="{{ raise_exception('roles must alternate') }}"))
    asks = dataclasses.replace(maker(longest=500), tokenizer=tokenizer)
    with pytest.raises(RequestError, match="messages: the chat template raises an error.*roles must alternate") as told:
        asks.tasks(ChatRequest(model="nano", messages=[{"role": "user", "content": "hi"}]))
    assert str(tmp_path) not in str(told.value)


def test_the_instruction_of_the_training_comes_before_the_first_question():
    """As with sample.py --prompt and --chat; a text without a template has no turn for it."""
    asks = dataclasses.replace(maker(longest=500), template="chat", instruction="Think.")
    sample = runpy.run_path(str(ROOT / "sample.py"))
    for row in ({"prompt": "hi"}, {"prompt": "hi", "system": "Be kind."}):
        turns = [{"role": "system", "content": row["system"]}] if "system" in row else []
        [task] = asks.tasks(ChatRequest(model="nano", messages=[*turns, {"role": "user", "content": "hi"}]))
        assert list(task.prompt) == sample["read_question_of"](row, "here", "chat", TOKENIZER, "Think.").ids
    later = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    [task] = asks.tasks(ChatRequest(model="nano", messages=later))
    assert list(task.prompt) == TOKENIZER.chat([{"role": "user", "content": "Think.\n\nhi"}, *later[1:]])
    [raw] = asks.tasks(CompletionRequest(model="nano", prompt="hi"))
    assert raw.prompt == tuple(b"hi")


ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>", "b": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("no call", "no call", []),
        (ONE, "", ["f"]),
        (f"Let me see.\n{ONE}\n{ONE.replace('f', 'g', 1)}\n", "Let me see.", ["f", "g"]),
        (f" A \n{ONE}\nB {ONE} ", " A\nB", ["f", "f"]),
        (f" {ONE}\n\nB", "B", ["f"]),
        (f'<tool_call>{{"name": "f"}}</tool_call>{ONE} {{"na', '<tool_call>{"name": "f"}</tool_call> {"na', ["f"]),
        (f"<tool_call>{ONE}", "<tool_call>", ["f"]),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": []}</tool_call>', None, []),
        ("<tool_call>[]</tool_call> ", None, []),
        ("<tool_call>" + "[" * 100_000, None, []),
        ("<tool_call>" * 3, None, []),
    ],
)  # fmt: skip
def test_calls_in_an_answer(text, content, names):
    found, calls = CallReader().read(text, last=True)
    assert found == (text if content is None else content)
    assert [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert json.loads(call["function"]["arguments"]) == {"a": "</tool_call>", "b": "é"}


@pytest.mark.parametrize(
    "text",
    [
        f" Let me see.\n{ONE}\nB {ONE} \n",
        f'<tool_call>{{"name": "f"}}</tool_call>{ONE} {{"na',
        f"<tool_call>{ONE}<tool_call",
        '<tool_call>{"name": "f", "arguments": {"a": [-1.5e-7, true, null, "\\u00e9\\ud83d\\ude00"]}} </tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call> b',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 300 + "]" * 300 + "}}</tool_call>",
        "a <tool_call> \n",
    ],
)
def test_calls_do_not_depend_on_the_pieces_of_a_stream(text):
    wanted, calls = CallReader().read(text, last=True)
    rng = random.Random(0)
    for size in (1, 2, 7, 30):
        reader, found, told, begin = CallReader(), "", [], 0
        while begin < len(text):
            end = begin + rng.randint(1, size)
            more, new = reader.read(text[begin:end], last=False)
            found, told, begin = found + more, told + new, end
            assert wanted.startswith(found)
        more, new = reader.read("", last=True)
        assert found + more == wanted
        assert [call["function"] for call in told + new] == [call["function"] for call in calls]


def test_text_that_is_no_call_is_not_held_back():
    reader = CallReader()
    assert reader.read("A text <", last=False)[0] == "A text"
    assert reader.read("b> ", last=False)[0] == " <b>"
    assert reader.read("<tool_call>", last=False)[0] == ""
    assert reader.read('{"name": f', last=False)[0] == ""  # it may become "false"
    assert reader.read("x", last=False)[0] == ' <tool_call>{"name": fx'


def test_control_tokens_in_texts_stay_text():
    [task] = tasks(CompletionRequest, TEXT, prompt="<|mask|>", suffix="<|mask|>", max_tokens=3)
    assert task.prompt.count(MASK) == 3 and task.gaps == (Gap(start=8, length=3),)
    [task] = tasks(InfillRequest, GAPS, parts=["<|mask|>", {"length": 1}, "<|im_start|>"])
    assert task.prompt.count(MASK) == 1 and TOKENIZER.im_start_id not in task.prompt
    forced = [{"position": 0, "text": "<|mask|>"}]
    [task] = tasks(CompletionRequest, TEXT, max_tokens=20, dream={"forced_tokens": forced})
    assert [token for _, token in task.config.forced_tokens] == list(b"<|mask|>")


def test_settings_of_the_sampler():
    dream = {
        "preset": "fast",
        "commit": {"rule": "threshold", "value": 0.7},
        "block_length": 8,
        "top_k": 5,
        "eps": 0.01,
    }
    [task] = tasks(ChatRequest, CHAT, temperature=0.5, top_p=0.9, dream=dream | {"alg_temp": 0.1, "end_penalty": 1.0})
    config = task.config
    assert (config.temperature, config.top_p, config.top_k, config.eps) == (0.5, 0.9, 5, 0.01)
    assert (config.commit, config.block_length, config.cache) == (Threshold(0.7), 8, WindowCache())
    assert (config.alg_temp, config.end_penalty, config.stop_at_end) == (0.1, 1.0, True)
    assert config.forbidden_tokens == (MASK,) and config.vocab_limit == TOKENIZER.vocab_limit
    [exact] = tasks(CompletionRequest, TEXT, max_tokens=9)
    assert (exact.config.steps, exact.config.alg, exact.config.max_new_tokens) == (None, "entropy", 9)
    [between] = tasks(CompletionRequest, TEXT, suffix="c", max_tokens=9)
    assert (between.config.block_steps(9), between.config.max_new_tokens) == (9, 0)


def test_a_text_that_the_model_would_not_see_is_refused():
    """Under block diffusion a block sees nothing after it. A text before all gaps is seen, and an empty one is no text."""
    blocks = dataclasses.replace(maker(), trained_mask="block-diffusion:4")
    for kind, body, field in ((CompletionRequest, TEXT | {"suffix": "c"}, "suffix"), (InfillRequest, GAPS, "parts")):
        with pytest.raises(RequestError, match="a text after new tokens would be ignored; leave it out") as error:
            blocks.tasks(kind.model_validate(body))
        assert error.value.param == field
    assert blocks.tasks(CompletionRequest.model_validate(TEXT | {"suffix": ""}))
    assert blocks.tasks(InfillRequest.model_validate(GAPS | {"parts": ["a", {"length": 2}, {"length": 3}, ""]}))


def test_number_of_new_tokens():
    [short] = tasks(CompletionRequest, TEXT, prompt="a" * 120)
    assert short.config.max_new_tokens == 8  # the default, 12, does not fit
    with pytest.raises(RequestError, match="shorten the prompt"):
        tasks(CompletionRequest, TEXT, prompt="a" * 128)
    assert tasks(CompletionRequest, TEXT, prompt="")[0].length == 12


def test_seeds_and_samples():
    asked = tasks(CompletionRequest, TEXT, prompt=["a", "b"], n=3, seed=7)
    assert [(task.prompt, task.seed, task.sample) for task in asked] == [
        (tuple(prompt), 7, sample) for prompt in (b"a", b"b") for sample in range(3)
    ]
    drawn = {tasks(CompletionRequest, TEXT)[0].seed for _ in range(20)}
    assert len(drawn) > 10


def test_gaps_of_a_length_never_end_early():
    [fixed] = tasks(InfillRequest, GAPS)
    assert set(fixed.config.forbidden_tokens) == {MASK, TOKENIZER.eos_id, TOKENIZER.im_end_id}
    [opened] = tasks(InfillRequest, GAPS, parts=["a", {"up_to": 3}, "b", {"length": 2}], dream={"preset": "fast"})
    assert opened.config.forbidden_tokens == (MASK,) and not opened.config.stop_at_end
    assert opened.pieces == ("a", Gap(start=1, length=3), "b", Gap(start=5, length=2))
