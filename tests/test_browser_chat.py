"""The page of the server in a real browser: asking, watching, stopping, infilling, keys and errors."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import browsers
import pytest
from serving_client import TOKENIZER, expected_text, maker, nano, running, until

import dream_jax
from dream_jax.serving import server
from dream_jax.serving.app import AppSettings, make_app
from dream_jax.serving.engine import Engine, EngineSettings

REFUSED = "error: Failed to load resource"  # what a browser says of every status above 399


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from browsers.start()


@pytest.fixture(scope="module")
def model(browser: Any) -> dream_jax.Dream:
    """A model; not made where there is no browser."""
    return nano()


@contextlib.contextmanager
def serving(model: dream_jax.Dream, template: str = "raw", **settings: Any) -> Iterator[tuple[str, Engine]]:
    """The address of a server in this process, and its engine."""
    # The loop returns after every few steps, so that the page gets many events.
    with running(model, EngineSettings(rows=2, longest=128, interval=0.001)) as engine:
        bound = server.bind("127.0.0.1", 0)
        options = {"model": "nano", "trained_mask": "bidirectional"} | settings
        app = make_app(engine, maker(template=template), AppSettings(**options), 0.0)
        ready = threading.Event()
        thread = threading.Thread(target=server.run, args=(app, bound, engine, ready.set, 1.0))
        thread.start()
        assert ready.wait(60)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/", engine
        engine.drain(0.0)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(model: dream_jax.Dream) -> Iterator[tuple[str, Engine]]:
    with serving(model) as found:
        yield found


def opened(page: Any, address: str, **settings: Any) -> None:
    """Opens the page and sets values in its settings."""
    page.goto(address)
    page.locator("#model", has_text="nano").wait_for()
    for name, value in ({"max-tokens": 24, "seed": 3} | settings).items():
        page.locator(f"#{name}").fill(str(value))


WATCH = """() => {
  window.canvases = new Set();
  new MutationObserver(() => {
    const canvas = document.querySelector(".canvas");
    if (canvas) window.canvases.add(canvas.textContent);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def test_ask_and_watch_the_canvas(browser: Any, model: dream_jax.Dream, served: tuple[str, Engine]) -> None:
    with browsers.page_of(browser) as page:
        opened(page, served[0])
        page.evaluate(WATCH)
        page.locator("#question").fill("2+2=")
        page.keyboard.press("Control+Enter")
        page.locator(".facts").wait_for()
        wanted = expected_text(model, [*b"2+2=\n"], 24, seed=3)
        assert page.locator(".asked").text_content() == "2+2=\n"
        assert page.locator(".text").text_content() == wanted
        assert "· seed: 3 ·" in page.locator(".facts").text_content()
        masks = sorted({text.count("░") for text in page.evaluate("[...canvases]")})
        assert masks[0] == 0 and masks[-1] == 24 and len(masks) >= 4, "the canvas has not changed step by step"
        # A screen reader hears the end, once.
        assert page.locator("#live").text_content().startswith(wanted)
        # The player plays it again.
        page.locator('input[type="range"]').focus()
        page.keyboard.press("Home")
        assert page.locator(".canvas").text_content() == "░" * 24


def test_stop_and_infill(browser: Any, served: tuple[str, Engine]) -> None:
    address, engine = served
    with browsers.page_of(browser) as page:
        opened(page, address, **{"max-tokens": 100})
        page.locator("#question").fill("x")
        page.locator("#send").click()
        page.locator(".canvas").wait_for()  # the program of this length is being compiled
        page.keyboard.press("Escape")
        page.locator(".error", has_text="Stopped.").wait_for()
        assert page.locator("#send").is_enabled() and page.locator("#stop").is_disabled()
        assert page.locator("#question").input_value() == "x"  # nothing has to be typed again
        until(lambda: engine.counts.busy_rows == 0 and engine.counts.waiting == 0)

        page.locator("#tab-infill").click()
        first = page.locator("#parts textarea").first
        first.fill("abcd")
        first.press("End")
        first.press("ArrowLeft")
        page.locator("#add-gap").click()
        assert [one.input_value() for one in page.locator("#parts textarea").all()] == [
            "abc",
            "d",
            " who lived by the sea.",
        ]
        page.locator("#parts .gap button").nth(1).click()  # removed: the texts on its sides are one
        assert [one.input_value() for one in page.locator("#parts textarea").all()] == [
            "abc",
            "d who lived by the sea.",
        ]
        page.locator("#parts .gap input").fill("7")
        page.locator("#fill").click()
        page.locator(".facts").wait_for()
        text = page.locator("#filled .text").text_content()
        assert text.startswith("abc") and text.endswith("d who lived by the sea.")
        assert page.locator("#filled .cell.written").count() == 7


@pytest.mark.slow
def test_a_chat_with_a_key_and_a_mistake(browser: Any, model: dream_jax.Dream) -> None:
    with (
        serving(model, "chat", keys=("0123456789abcdef",)) as (address, _),
        browsers.page_of(browser, expected=REFUSED) as page,
    ):
        page.goto(address)
        for key in ("wrong", "0123456789abcdef"):
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
        page.locator("#model", has_text="nano").wait_for()
        bodies: list[Any] = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
        page.locator("#max-tokens").fill("12")
        page.locator("#seed").fill("4")
        page.locator("#system").fill("Be short.")
        page.locator("#question").fill("hi")
        page.keyboard.press("Enter")
        page.locator(".facts").wait_for()
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
        answer = page.locator(".turn .text").text_content()
        assert answer == expected_text(model, TOKENIZER.chat(messages), 12, seed=4)

        page.locator("#question").fill("more")
        page.keyboard.press("Enter")
        page.locator(".facts").nth(1).wait_for()
        said = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
        assert bodies[-1]["messages"] == said

        page.locator("#temperature").fill("1000")
        page.locator("#question").fill("hot")
        page.keyboard.press("Enter")
        page.locator(".error").wait_for()
        assert "temperature" in page.locator(".error").text_content()
        page.locator("#max-tokens").fill("0")
        page.keyboard.press("Enter")
        page.locator("#send").click()
        assert (
            page.locator("#failure").text_content() == "New tokens: 0 is not possible here; use a number from 1 to 128"
        )


def test_a_server_that_has_gone(browser: Any, served: tuple[str, Engine]) -> None:
    with browsers.page_of(browser, expected="error: Failed to load resource: net::ERR_CONNECTION_REFUSED") as page:
        opened(page, served[0])
        page.route("**/v1/completions", lambda route: route.abort("connectionrefused"))
        page.locator("#question").fill("x")
        page.locator("#send").click()
        page.locator(".error", has_text="cannot be reached").wait_for()
        # A stream that ends before its end, and a comment in it.
        page.unroute("**/v1/completions")
        chunk = 'data: {"choices": [{"index": 0, "text": "beg"}]}\r\n\r\n: ping\n\n'
        page.route("**/v1/completions", lambda route: route.fulfill(body=chunk, content_type="text/event-stream"))
        page.locator("#send").click()
        page.locator(".error", has_text="ended before the answer was complete").wait_for()
        assert page.locator(".text").text_content() == "beg"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_narrow_screen(browser: Any, served: tuple[str, Engine], scheme: str) -> None:
    viewport = {"width": 320, "height": 640}
    with browsers.page_of(browser, viewport=viewport, color_scheme=scheme, locale="zh-CN") as page:
        page.goto(served[0])
        page.locator("#settings summary").click()
        page.locator("#max-tokens").fill("24")
        page.locator("#question").fill("2+2=" * 10)
        page.locator("#send").click()
        page.locator(".facts").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.locator("#tab-infill").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
