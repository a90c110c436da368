"""The page of a blind comparison: votes by keyboard and touch, goes on after a reload."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rated_run import lines_of, write_rated_run

LABELS = ("easyref", "none", "ip-adapter, weight 0.6")


class Comparison:
    """The command, with the page's address."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "easyref_core.cli", "bench", "--rate", str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = re.search(r"http\S+", line)
        assert found, self.process.communicate()[1]
        self.address = found[0]

    def close(self) -> str:
        """What the command says at its end."""
        out, _ = self.process.communicate(timeout=60)
        return out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_rated_run(tmp_path / "run", LABELS, groups=2, side=256)


@pytest.fixture
def comparison(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparison]:
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    started = Comparison(run)
    yield started
    started.process.kill()
    started.process.communicate()


def opened(browser: Any, comparison: Comparison, **options: Any) -> Any:
    """The page, whose errors fail the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.mistakes = []
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.on("console", lambda said: said.type == "error" and page.mistakes.append(said.text))
    page.goto(comparison.address)
    wait(page, 0)
    return page


def wait(page: Any, done: int, total: int = 6) -> None:
    """Until the page shows so many votes and takes the next one."""
    page.wait_for_selector(f"#count:text-is('{done} of {total}')")
    if done < total:
        page.wait_for_selector(".votes [aria-disabled=false] >> nth=2")


def shown(page: Any) -> list[str]:
    return [page.locator(name).get_attribute("src") for name in ("#left", "#right")]


def fits(page: Any) -> bool:
    """Whether nothing lies beyond the right edge."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_votes_by_keyboard_go_on_after_a_reload_and_end_with_the_results(
    browser: Any, comparison: Comparison, run: Path, screenshots: Path
) -> None:
    page = opened(browser, comparison)
    assert page.locator("#references img").count() in (0, 3)
    page.screenshot(path=screenshots / "rating.png")
    first = shown(page)
    page.keyboard.press("1")
    wait(page, 1)
    assert shown(page) != first
    page.keyboard.press("x")
    page.keyboard.press("Control+2")
    page.keyboard.press("0")
    wait(page, 2)
    third = page.locator("#prompt").text_content(), shown(page)
    page.reload()
    wait(page, 2)
    assert (page.locator("#prompt").text_content(), shown(page)) == third
    page.keyboard.press("2")
    wait(page, 3)
    page.keyboard.press("u")
    wait(page, 2)
    assert shown(page) == third[1]
    for done in (3, 4, 5, 6):
        page.keyboard.press("1")
        wait(page, done)
    text = page.locator("body").inner_text()
    assert not [label for label in LABELS if label in text or label in page.content()]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results:not([hidden])")
    rows = page.locator("#rows tr")
    assert rows.count() == 3
    assert "ip-adapter, weight 0.6" in rows.nth(1).inner_text()
    assert page.mistakes == []
    page.context.close()
    said = comparison.close()
    assert "easyref over none" in said
    winners = [line["winner"] for line in lines_of(run)]
    assert len(winners) == 8  # seven votes, one of them taken back
    assert winners.count("tie") == 1
    assert len(json.loads((run / "results.json").read_text())["preferences"]) == 3
    assert "Blind comparison" in (run / "index.html").read_text()


def test_votes_by_touch_on_a_narrow_screen(
    browser: Any, comparison: Comparison, run: Path, screenshots: Path
) -> None:
    size = {"width": 390, "height": 844}
    page = opened(browser, comparison, viewport=size, has_touch=True, is_mobile=True)
    assert fits(page)
    page.screenshot(path=screenshots / "rating_narrow.png")
    for name in ("#left", "#right", "[data-choice='1']", "[data-choice='2']"):
        box = page.locator(name).bounding_box()
        assert box["y"] + box["height"] <= 844, name
        assert box["height"] >= 44, name
    page.tap("#right")
    page.wait_for_selector("#enlarged[open]")
    assert page.locator("#large").bounding_box()["width"] > 250
    page.keyboard.press("1")  # an enlarged image takes no vote
    page.tap("#large")
    page.wait_for_selector("#enlarged:not([open])", state="hidden")
    page.tap("[data-choice='2']")
    wait(page, 1)
    page.tap("#stop")
    page.tap("#sure button[value=on]")
    page.tap("[data-choice='0']")
    wait(page, 2)
    page.tap("#undo")
    wait(page, 1)
    page.tap("#stop")
    page.tap("#sure button[value=end]")
    page.wait_for_selector("#results:not([hidden])")
    assert fits(page)
    page.screenshot(path=screenshots / "rating_results_narrow.png")
    assert page.mistakes == []
    page.context.close()
    assert "1 votes" in comparison.close()
    assert len(lines_of(run)) == 3


def test_every_image_and_button_has_a_name_and_the_keyboard_reaches_them(
    browser: Any, comparison: Comparison
) -> None:
    page = opened(browser, comparison)
    assert page.evaluate("[...document.images].every((image) => image.alt || image.id === 'large')")
    for name in ("Left image", "Right image", "1 Left", "0 Tie", "2 Right", "End", "Undo U"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim()"))
        focused = page.locator(":focus")
        if focused.get_attribute("data-choice") == "0":
            page.keyboard.press("Enter")
            wait(page, 1)
            # The focus stays, so that Enter can be pressed again.
            assert page.locator(":focus").get_attribute("data-choice") == "0"
            break
    assert "1 Left" in reached
    page.context.close()


def test_a_command_that_has_ended_is_said(browser: Any, comparison: Comparison) -> None:
    page = opened(browser, comparison)
    comparison.process.kill()
    comparison.process.wait()
    page.keyboard.press("1")
    page.wait_for_selector("#problem:not([hidden])")
    assert "has the command in the terminal ended" in page.locator("#problem").inner_text()
    page.context.close()
