"""Chat templates run in a process with limits: whatever they do, the answer is a text or one line that names the file."""

import concurrent.futures
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from marking import slow

from dream_jax import chat_template
from dream_jax.chat_template import ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": "b", "name": None}]


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Iterator[chat_template._Renderer]:
    """A process of this test alone, with a short deadline."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "_RENDERER", chat_template._Renderer())
    yield chat_template._RENDERER
    chat_template._RENDERER.close()


def render(text: str, messages: Any = MESSAGES, tools: Any = (), **more: Any) -> str:
    return ChatTemplate(Path("folder/chat_template.jinja"), text, {"eos_token": "</s>"}).render(messages, tools, **more)


def test_template_sees_what_templates_are_written_for() -> None:
    loop = "{% for m in messages %}\n  {{ m.role }}:{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    assert render(loop) == "  user:é <b></s>\n  assistant:b</s>\n"
    assert render("{{ tools is none }} {{ messages[1].name is defined }}") == "True False"
    assert render("{{ tools | tojson }} {{ add_generation_prompt }}", tools=[{"é": "<"}]) == '[{"é": "<"}] False'
    assert render("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(a=2).a }}") == "22"
    assert render("{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}") == "4"
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aé <b>b"
    assert render("{{ messages[0].reasoning_content }}", [{"role": "user", "thinking": "t"}]) == "t"
    assert render("{{ messages[0].content }}", [{"content": "\ud83d"}]) == "\ud83d"  # refused when it is encoded


HOSTILE = {
    "raise": ("a\n{{ raise_exception('no system turn') }}", "raises an error in line 2: TemplateError: no system turn"),
    "syntax": ("a\n{% if %}", "raises an error in line 2: TemplateSyntaxError"),
    "unknown name": ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
    "wrong type": ("{{ messages + 1 }}", "raises an error in line 1: TypeError"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "private attribute": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    "private attribute of a namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError"),
    "changed message": ("{{ messages.append(1) }}", "SecurityError"),
    "import": ("{% include '/etc/passwd' %}", "raises an error"),
    "large range": ("{{ range(10 ** 12) | list }}", "OverflowError: Range too big"),
    "memory": ("{{ 'x' * 10 ** 11 }}", "needs more than 2 GiB of memory"),
    "long text": ("{% for _ in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than 1,0"),
}


# Takes seconds, because all the memory is used before the limit is reached.
DOUBLING = "{% set n = namespace(s='x') %}{% for _ in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "message"),
    [*HOSTILE.values(), slow(DOUBLING, "needs more than 2 GiB of memory")],
    ids=[*HOSTILE, "doubling"],
)
def test_hostile_template_is_an_error_with_the_name_of_its_file(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"folder/chat_template\.jinja: the chat template ") as raised:
        render(text)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert chat_template._RENDERER._process is None  # no process keeps the memory of such a template
    assert render("after {{ messages[1].content }}") == "after b"


ENDLESS = {
    "loops": "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "one operation": "{{ 7 ** (10 ** 9) }}",  # no check between two operations could end it
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS.keys())
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("renderer")
def test_endless_template_ends_also_in_threads(text: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        good = [pool.submit(render, "{{ messages[1].content }}") for _ in range(5)]
        bad = pool.submit(render, text)
        good += [pool.submit(render, "{{ messages[1].content }}") for _ in range(5)]
        assert [one.result() for one in good] == ["b"] * 10
        with pytest.raises(ValueError, match=r"did not end within 0\.3 seconds"):
            bad.result()


def test_a_process_that_was_killed_is_replaced(renderer: chat_template._Renderer) -> None:
    assert render("a") == "a"
    process = renderer._process
    assert process is not None
    process.send_signal(signal.SIGINT)  # Ctrl-C reaches it too, and must not end it
    process.send_signal(signal.SIGTERM)
    assert render("b") == "b" and renderer._process is process
    process.kill()
    process.wait()  # so that the next request certainly meets a closed pipe
    with pytest.raises(ValueError, match=r"ended the process that renders it \(exit status -9\)"):
        render("c")
    assert render("d") == "d"


def test_chats_are_rendered_together_as_each_alone_and_the_first_error_ends_it() -> None:
    text = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}{{ tools }}"
    template = ChatTemplate(Path("t.jinja"), text, {})
    chats = [([{"role": "user", "content": f"{number}"}], [{"a": 1}] * (number % 2), False) for number in range(300)]
    assert template.render_all(chats) == [template.render(*chat) for chat in chats] and template.render_all([]) == []
    with pytest.raises(ChatTemplateError, match=r"t\.jinja: the chat template raises an error in line 1: .*no"):
        template.render_all([*chats[:3], ([{"role": "user", "content": "bad"}], [], False), *chats])
    # The limit of the length is that of each chat, not that of all together.
    long = ChatTemplate(Path("t.jinja"), "{{ 'a' * 600000 }}", {})
    assert [len(one) for one in long.render_all(chats[:4])] == [600_000] * 4


def test_the_process_ends_with_its_parent(renderer: chat_template._Renderer) -> None:
    assert renderer.ask(b'{"template": "a", "variables": {}, "sizes": [9], "chats": [{}]}', 1) == [{"text": "a"}]
    process = renderer._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 0
    renderer.close()


def test_a_chat_that_json_cannot_represent_is_refused() -> None:
    with pytest.raises(ValueError, match="a chat must consist of texts"):
        render("a", [{"content": time.gmtime}])
