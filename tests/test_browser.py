"""The replay files in a real browser, from the disk and without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsers
import pytest

from dream_jax.player import pages

HOSTILE = "</script><img src=x onerror=document.title='broken'>\u2028\u202eabc"


def entry(position: int, text: str, step: int, confidence: float | None = None, **more: Any) -> dict[str, Any]:
    return {"position": position, "token": position, "text": text, "step": step, "confidence": confidence, **more}


RECORD: dict[str, Any] = {
    "version": 1,
    "model": "nano",
    "prompt": f"2+2= {HOSTILE}",
    "parts": [{"length": 5}],
    "forced": [{"position": 0, "token": 1, "text": "It"}],
    "tokens": [
        entry(4, "<|endoftext|>", 1, 0.99),
        entry(1, " is", 3, 0.5, logprob=-0.5, runner_ups=[{"token": 9, "text": " was", "logprob": -1.5}]),
        entry(2, HOSTILE, 3, 0.25),
        entry(3, "\n", 7),
    ],
    "text": f"It is{HOSTILE}\n",
    "forwards": 8,
    "settings": {"seed": 0, HOSTILE: HOSTILE},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from browsers.start()


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("replay") / "answer.html"
    pages.write_replay(path, RECORD)
    return path.as_uri()


def canvas(page: Any) -> list[str]:
    return page.locator(".canvas .cell").all_text_contents()


def scrub(page: Any, frame: int) -> None:
    page.locator('input[type="range"]').evaluate(
        "(slider, frame) => { slider.value = frame; slider.dispatchEvent(new Event('input')); }", frame
    )


def test_a_replay_shows_every_step(browser: Any, replay: str) -> None:
    with browsers.page_of(browser, offline=True, reduced_motion="reduce") as page:
        page.goto(replay)
        assert page.title() == "An answer, as it was denoised: nano"
        assert page.locator("#text").text_content() == RECORD["text"]
        assert page.locator("#prompt").text_content() == RECORD["prompt"]
        assert page.locator("img").count() == 0 and page.locator("script").count() == 3
        hostile = RECORD["text"][5:-1].replace("\u202e", "\ufffd")  # a sign for what would turn the text around
        assert canvas(page) == ["It", " is", hostile, "↵\n", "∎"]  # without motion, the end is shown
        scrub(page, 0)
        assert canvas(page) == ["It", "░", "░", "░", "░"]
        scrub(page, 1)
        assert canvas(page) == ["It", "░", "░", "░", "∎"]
        scrub(page, 2)
        assert canvas(page) == ["It", " is", hostile, "░", "∎"]
        assert page.locator("output").text_content() == "step 2 of 3"


def test_a_replay_plays_and_pauses(browser: Any, replay: str) -> None:
    with browsers.page_of(browser, offline=True) as page:
        page.goto(replay)
        page.locator(".speed").select_option("16")
        page.locator(".play", has_text="Play").wait_for()  # it has played to the end by itself
        assert canvas(page)[-1] == "∎"
        page.locator(".speed").select_option("0.25")
        page.locator(".play").click()
        assert canvas(page) == ["It", "░", "░", "░", "░"]
        page.locator(".play", has_text="Pause").click()
        page.locator(".play", has_text="Play").wait_for()
        assert page.locator("output").text_content() == "blank canvas"


def test_a_replay_is_used_with_the_keyboard(browser: Any, replay: str) -> None:
    with browsers.page_of(browser, offline=True, reduced_motion="reduce") as page:
        page.goto(replay)
        page.locator(".cell").first.focus()
        about = page.locator(".about")
        assert "given" in about.inner_text()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == 'position 2: " is"'
        assert "written in step 2" in about.inner_text() and "confidence 0.50" in about.inner_text()
        assert "probability 0.61" in about.inner_text() and '" was"' in about.inner_text()
        page.keyboard.press("End")
        assert "end of text" in about.inner_text()
        page.keyboard.press("Tab")  # the canvas is one stop
        assert page.evaluate("document.activeElement.className") == "play"
        page.keyboard.press("Tab")
        page.keyboard.press("Home")  # the slider
        assert canvas(page) == ["It", "░", "░", "░", "░"]
        assert page.locator('input[type="range"]').get_attribute("aria-valuetext") == "blank canvas, 1 of 5 tokens"


def test_colours_are_those_of_step_and_confidence(browser: Any, replay: str) -> None:
    with browsers.page_of(browser, offline=True, reduced_motion="reduce") as page:
        page.goto(replay)
        colours = "nodes => nodes.map(node => getComputedStyle(node).backgroundColor)"
        by_step = page.locator(".cell").evaluate_all(colours)
        assert by_step[1] == by_step[2] and len(set(by_step)) == 4  # given, and three steps
        page.locator(".colour").select_option("confidence")
        by_confidence = page.locator(".cell").evaluate_all(colours)
        assert by_confidence[3] == by_confidence[0], "a token without a confidence has no colour"
        assert len(set(by_confidence)) == 4
        page.locator(".colour").select_option("none")
        assert len(set(page.locator(".cell").evaluate_all(colours))) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(browser: Any, replay: str, scheme: str) -> None:
    """Contrast of at least 4.5 between text and ground, at both ends of both scales; narrow screens do not scroll."""
    with browsers.page_of(
        browser, offline=True, reduced_motion="reduce", color_scheme=scheme, viewport={"width": 320, "height": 600}
    ) as page:
        page.goto(replay)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.evaluate(CONTRAST)
        for colour in ("step", "confidence"):
            page.locator(".colour").select_option(colour)
            for value in (0, 0.25, 0.5, 0.75, 1):
                page.locator(".cell").evaluate_all(
                    "(nodes, value) => nodes.forEach(node => { node.style.setProperty('--step', value);"
                    " node.style.setProperty('--confidence', value); })",
                    value,
                )
                assert page.evaluate("contrast(document.querySelector('.cell.written'))") >= 4.5, (colour, value)
        for selector in (".facts", ".about", ".scale", "h2", ".cell.given"):
            assert page.evaluate(f"contrast(document.querySelector({selector!r}))") >= 4.5, selector


CONTRAST = """() => {
  const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (colours) => {
    pixel.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  window.contrast = (node) => {
    const grounds = [];
    for (let one = node; one; one = one.parentElement) grounds.unshift(getComputedStyle(one).backgroundColor);
    const [high, low] = [light(grounds), light([...grounds, getComputedStyle(node).color])].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
}"""


def test_a_replay_in_chinese(browser: Any, replay: str) -> None:
    with browsers.page_of(browser, offline=True, reduced_motion="reduce", locale="zh-CN") as page:
        page.goto(replay)
        assert page.locator("h1").text_content() == "一个回答的去噪过程"
        assert page.get_attribute("html", "lang") == "zh-Hans"
        assert page.locator("output").text_content() == "第 3 步，共 3 步"  # noqa: RUF001 - a comma of Chinese
        page.locator("#language").select_option("en")
        assert page.locator("output").text_content() == "step 3 of 3"
        assert page.locator(".cell").nth(1).get_attribute("aria-label") == 'position 2: " is"'


@pytest.mark.parametrize("page_text", [pages.chat_page(), pages.replay_page(RECORD)], ids=["chat", "replay"])
def test_both_languages_have_the_same_words(browser: Any, page_text: str, tmp_path: Path) -> None:
    """The same keys, with the same values to insert; and every key in the page has words."""
    path = tmp_path / "page.html"
    path.write_text(page_text, encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    form = "words => Object.entries(words).map(([key, text]) => [key, (text.match(/{\\w+}/g) ?? []).sort()]).sort()"
    assert page.evaluate(f"({form})(WORDS.en)") == page.evaluate(f"({form})(WORDS.zh)")
    keys = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(node => [node.dataset.say, node.dataset.sayLabel,"
        " node.dataset.sayHint]).filter(key => key !== undefined)"
    )
    assert keys and set(keys) <= set(page.evaluate("Object.keys(WORDS.en)"))
    context.close()
