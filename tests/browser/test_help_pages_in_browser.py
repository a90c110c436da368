"""The help page of a node in ComfyUI's side panel: in the page's language, with its picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_page import ComfyPage

SELECT = """() => {
    app.canvas.selectNode(app.graph.nodes[0]);
    app.graph.setDirtyCanvas(true, true);
}"""
PICTURE = """() => [...document.querySelectorAll("img")]
    .some((image) => image.src.includes("/docs/images/apply.") && image.naturalWidth > 0)"""


@pytest.fixture
def another_language(page: ComfyPage) -> Iterator[ComfyPage]:
    yield page
    page.setting("Comfy.Locale", "en")
    page.open()


@pytest.mark.parametrize(
    ("locale", "heading"),
    [
        pytest.param("zh", "常见问题", id="chinese"),
        pytest.param("fr", "Common mistakes", id="other"),
    ],
)
def test_help_is_shown_in_the_pages_language_or_in_english(
    another_language: ComfyPage, locale: str, heading: str, screenshots: Path
) -> None:
    page = another_language
    page.setting("Comfy.Locale", locale)
    page.open()
    page.add_node("EasyRefApply")
    page.look_at("EasyRefApply")  # leaves room for the toolbox above it
    page.evaluate(SELECT)
    page.tab.get_by_test_id("info-button").click()
    page.tab.get_by_role("heading", name=heading).wait_for()
    page.tab.wait_for_function(PICTURE)
    page.screenshot(screenshots, f"help_{locale}")
