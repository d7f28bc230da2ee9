"""The server's page in a real Chromium: a conversation is typed, streamed and stopped, and the figures are shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dspark_serve.page import FILES
from tests.serve.running import Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
browsing = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its chromedriver on this machine")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    """One browser for all tests."""
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Running) -> Iterator[webdriver.Chrome]:
    """The page, just opened; its console must stay without errors."""
    chromium.get_log("browser")
    chromium.set_window_size(1100, 850)
    chromium.get(f"{server.url}/")
    until(chromium, lambda: "up to" in chromium.find_element(By.ID, "model").text)
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")] == []
    assert server.idle()


def until(page: webdriver.Chrome, true: Callable[[], object]) -> None:
    WebDriverWait(page, 60, 0.05).until(lambda _: true())


def find(page: webdriver.Chrome, selector: str) -> list[webdriver.remote.webelement.WebElement]:
    return page.find_elements(By.CSS_SELECTOR, selector)


def set_field(page: webdriver.Chrome, name: str, value: str) -> None:
    if not page.find_element(By.ID, "fields").is_displayed():
        page.find_element(By.CSS_SELECTOR, "#settings summary").click()
    field = page.find_element(By.ID, name)
    field.clear()
    field.send_keys(value)


def test_the_files_come_with_a_policy_and_others_do_not_exist(server: Running) -> None:
    for path in ("", *(f"page/{name}" for name in FILES)):
        with urlopen(f"{server.url}/{path}") as reply:
            assert "script-src 'self'" in reply.headers["Content-Security-Policy"]
            assert "http" not in reply.read().decode().replace("https://goo.gl", "")  # nothing is loaded from elsewhere
    for path in ("page/__init__.py", "page/..%2Fapp.py", "page/nothing"):
        with pytest.raises(HTTPError) as caught:
            urlopen(f"{server.url}/{path}")
        assert caught.value.code == 404


@browsing
def test_a_conversation_is_typed_and_streamed(page: webdriver.Chrome) -> None:
    set_field(page, "most", "40")
    page.find_element(By.ID, "prompt").send_keys("one two one two", Keys.ENTER)
    until(page, lambda: "first after" in find(page, ".assistant .figures")[0].text)
    until(page, lambda: page.find_element(By.ID, "send").text == "Send")
    figures = find(page, ".assistant .figures")[0].text
    assert "drafts accepted" in figures and not find(page, ".failed")
    spans = find(page, ".assistant .token")
    assert figures.startswith(f"{len(spans)} tokens") and 1 < len(spans) <= 40
    drafted = find(page, ".assistant .token[data-by]")
    accepted = int(figures.split(" drafts accepted")[0].split(" ")[-1])
    assert len(drafted) == accepted
    page.find_element(By.ID, "prompt").send_keys("and again", Keys.ENTER)
    until(page, lambda: len(find(page, ".assistant")) == 2 and page.find_element(By.ID, "send").text == "Send")
    page.find_element(By.ID, "clear").click()
    assert not find(page, ".message")


@browsing
def test_an_answer_is_stopped_and_an_error_is_shown(page: webdriver.Chrome, server: Running) -> None:
    set_field(page, "most", "200")
    page.find_element(By.ID, "prompt").send_keys("go on", Keys.ENTER)
    until(page, lambda: find(page, ".assistant .token") or find(page, ".figures"))
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(page, lambda: page.find_element(By.ID, "send").text == "Send")
    assert server.idle()
    set_field(page, "most", "99999")
    page.find_element(By.ID, "prompt").send_keys("too long", Keys.ENTER)
    until(page, lambda: any("limit" in line.text or "at most" in line.text for line in find(page, ".failed")))
    page.get_log("browser")  # the browser reports the status 400 by itself


@browsing
def test_the_status_is_reached_by_keys_and_shows_the_metrics(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "tab-chat").send_keys(Keys.ARROW_RIGHT)
    until(page, lambda: len(find(page, "#tiles .tile")) == 9)
    assert page.switch_to.active_element.get_attribute("id") == "tab-status"
    assert not page.find_element(By.ID, "chat").is_displayed()
    tiles = {tile.find_element(By.TAG_NAME, "span").text: tile.text for tile in find(page, "#tiles .tile")}
    assert tiles["running"].startswith("0 of 4")
    until(page, lambda: find(page, "#drafters tbody tr"))


@browsing
def test_it_fits_a_phone(page: webdriver.Chrome) -> None:
    page.set_window_size(500, 800)
    width = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    assert page.find_element(By.ID, "send").is_displayed()
