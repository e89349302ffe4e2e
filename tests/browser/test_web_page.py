"""The web page in a real browser, over a whole system."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from scripts.launcher.cluster import Cluster
from tests.browser.conftest import DESKTOP, PHONE
from tests.systems import figures

PATIENCE_S = 30.0
pytestmark = pytest.mark.timeout(120)


def until(what: Callable[[], Any], why: str, timeout_s: float = PATIENCE_S) -> Any:
    give_up = time.monotonic() + timeout_s
    while True:
        if found := what():
            return found
        assert time.monotonic() < give_up, why
        time.sleep(0.03)


class Page:
    """What a user does and sees."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome = chrome
        chrome.get(url)
        chrome.execute_script("localStorage.clear()")
        chrome.get(url)
        until(lambda: self.text("#status") == "ready", "the page does not get ready")

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.chrome.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def settings(self, **values: str) -> None:
        self.one("#show-settings").click()
        for name, value in values.items():
            field = self.one(f"#settings [name={name}]")
            field.clear()
            field.send_keys(value)
        self.one("#settings button[value=done]").click()

    def say(self, words: str) -> None:
        self.one("#question").send_keys(words, Keys.ENTER)

    def done(self) -> None:
        until(
            lambda: not self.chrome.find_elements(By.CSS_SELECTOR, ".going") and self.chrome.find_elements(By.CSS_SELECTOR, ".told"),
            "no end",
        )

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        self.chrome.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        )
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


@pytest.fixture
def page(browser: Chrome, pair: Cluster, conserved: None) -> Iterator[Page]:
    found = Page(browser, pair.urls[0])
    found.size(*DESKTOP)
    yield found
    complaints = [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "/fleet" not in entry["message"]
    ]
    assert not complaints


def test_tokens_arrive_one_by_one_and_the_stages_are_shown(page: Page) -> None:
    page.settings(temperature="0", max_tokens="60")
    page.chrome.execute_script(
        "window.seen = new Set(); const talk = document.querySelector('#talk');"
        "new MutationObserver(() => { const said = document.querySelector('.answer:last-child .said');"
        " if (said) window.seen.add(said.textContent.length); }).observe(talk, {childList: true, subtree: true});"
    )
    page.say("What is the capital of France?")
    page.done()
    assert page.text(".answer .said") == "The capital of France is Paris."
    told = page.text(".told")
    assert all(word in told for word in ("TTFT", "TPOT", "tokens/s", "prefill", "transfer", "decode", "8 tokens"))
    assert len(page.chrome.find_elements(By.CSS_SELECTOR, ".bar i")) >= 4
    page.chrome.execute_script("window.seen.clear()")
    page.say("Write a long story about a dragon who learns to fly.")  # long enough, however late a frame is drawn
    page.done()
    assert len(page.chrome.execute_script("return [...window.seen]")) >= 5, "the text came in one piece"


def test_stop_frees_the_pages(page: Page, pair: Cluster) -> None:
    page.settings(temperature="0", max_tokens="1500")
    page.say("Write a long story about a dragon who learns to fly.")  # greedy, it is one: drawn answers end after ten tokens at times
    until(lambda: len(page.text(".answer .said")) > 20, "no text")
    until(lambda: figures(pair, "decode-0")["pages_held"] > 0, "no pages in use")
    page.one("#stop").click()
    page.done()
    until(lambda: figures(pair, "decode-0")["pages_held"] == 0, "pages are still held", 10.0)
    assert "Stopped." in page.text(".answer")
    assert page.one("#send").is_displayed() and not page.one("#stop").is_displayed()


def test_say_it_again_replaces_the_answer_and_a_conversation_goes_on(page: Page) -> None:
    page.settings(temperature="0", max_tokens="12")
    page.say("Say hello.")
    page.done()
    first = page.text(".answer .said")
    page.one(".again").click()
    page.done()
    assert len(page.chrome.find_elements(By.CSS_SELECTOR, ".answer")) == 1 and page.text(".answer .said") == first
    page.say("And now in French.")
    until(lambda: len(page.chrome.find_elements(By.CSS_SELECTOR, ".told")) == 2, "no second answer")
    page.one("#new-chat").click()
    assert not page.chrome.find_elements(By.CSS_SELECTOR, ".answer")


def test_the_models_words_are_text_and_never_markup(page: Page) -> None:
    page.settings(max_tokens="2")
    page.say("<img src=x onerror=\"document.title='gone'\"><b>bold</b>")
    page.done()
    assert page.chrome.title == "Baton" and not page.chrome.find_elements(By.CSS_SELECTOR, "#talk img, #talk b:not(.told b)")


def test_the_fleet_and_goodput_follow_the_objectives(page: Page, pair: Cluster) -> None:
    asked = {"model": "smollm2", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
    httpx.post(f"{pair.urls[0]}/v1/completions", json=asked, timeout=30).raise_for_status()
    page.settings(ttft_ms="100000", tpot_ms="100000")
    until(lambda: page.text("#attainment") not in ("–", "0 %") and float(page.text("#goodput")) > 0, "no goodput")
    assert sorted(one.text.split()[0] for one in page.chrome.find_elements(By.CSS_SELECTOR, "#workers .role")) == ["decode", "prefill"]
    assert "640 of 640 pages free" in page.text("#workers")
    page.settings(ttft_ms="1", tpot_ms="1")
    until(lambda: page.text("#attainment") == "0 %", "the objectives are not taken")


def test_by_keyboard_alone(page: Page) -> None:
    active = page.chrome.switch_to.active_element
    assert active.get_attribute("id") == "question"
    page.settings(max_tokens="400")
    page.one("#question").send_keys("Tell me a long story", Keys.SHIFT, Keys.ENTER, Keys.NULL, "about the sea.", Keys.ENTER)
    until(lambda: len(page.text(".answer .said")) > 5, "no text")
    assert "\n" in page.text(".mine p")
    page.chrome.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.done()


def test_readable_while_the_server_is_away(page: Page, pair: Cluster) -> None:
    gateway = pair.children["gateway-0"]
    assert gateway.process is not None
    page.settings(temperature="0", max_tokens="8")
    page.say("Hello")
    page.done()
    os.kill(gateway.process.pid, signal.SIGSTOP)
    try:
        until(lambda: page.one("#away").is_displayed(), "nobody says that the server is away")
        assert "cannot be reached" in page.text("#away") and page.text("#status") == "away"
        assert page.text(".answer .said"), "the conversation is gone"
    finally:
        os.kill(gateway.process.pid, signal.SIGCONT)
    until(lambda: page.text("#status") == "ready" and not page.one("#away").is_displayed(), "it does not come back")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_fits_both_sizes_and_themes(page: Page, shots: Path, size: tuple[int, int], scheme: str) -> None:
    page.settings(temperature="0", max_tokens="60")
    page.say("What is the capital of France?")
    page.done()
    page.size(*size, scheme)
    wide = page.chrome.execute_script("return document.documentElement.scrollWidth")
    assert wide <= size[0], "the page scrolls sideways"
    page.chrome.save_screenshot(str(shots / f"chat-{size[0]}-{scheme}.png"))
    colour = page.chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == (scheme == "dark")
    if size == PHONE:
        page.one("#show-fleet").click()
        assert page.one("#workers").is_displayed() and not page.one("#question").is_displayed()
        page.chrome.save_screenshot(str(shots / f"fleet-{size[0]}-{scheme}.png"))
    else:
        assert page.one("#workers").is_displayed() and page.one("#question").is_displayed()
