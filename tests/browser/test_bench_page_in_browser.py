"""The page of a benchmark run in a real browser: nothing is fetched, nothing overflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_run
import pytest

from easyref_core.evaluation.page.write import write_page

SIZES = ((1280, 900), (390, 800))
# Elements that reach beyond the window, unless their box scrolls.
_TOO_WIDE = """() => [...document.querySelectorAll("body *")]
    .filter((e) => !e.closest(".scroll, .marks"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => e.outerHTML.slice(0, 80))"""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("run")
    variants = (*bench_run.TABLE[1:], *bench_run.WEIGHTS[:-1])
    preferences = list(bench_run.PREFERENCES)
    bench_run.write_run(folder, variants, groups=6, preferences=preferences)
    return write_page(folder)


@pytest.fixture
def opened(browser: Any, written: Path) -> Open:
    """Opens the page; what went wrong on it is raised in the end."""

    @contextmanager
    def open_page(size: tuple[int, int] = SIZES[0], **options: Any) -> Iterator[Any]:
        options["viewport"] = {"width": size[0], "height": size[1]}
        context = browser.new_context(**options)
        tab = context.new_page()
        mistakes: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: mistakes.append(message.text))
        tab.on("pageerror", lambda error: mistakes.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        try:
            tab.goto(written.as_uri())
            yield tab
        finally:
            context.close()
        assert mistakes == []
        assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]

    return open_page


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(opened: Open, size: tuple[int, int], scheme: str) -> None:
    with opened(size, color_scheme=scheme) as tab:
        for scope in tab.locator("[name=scope]").all():
            scope.check(force=True)
            assert tab.evaluate(_TOO_WIDE) == []
            assert tab.evaluate("() => document.documentElement.scrollWidth") == size[0]


def test_every_picture_is_drawn(opened: Open) -> None:
    with opened() as tab:
        for picture in tab.locator(".group img").all():
            picture.scroll_into_view_if_needed()
            picture.evaluate("image => image.decode()")
            assert picture.evaluate("image => image.naturalWidth") > 0


def test_a_click_on_a_column_sorts_by_it(opened: Open) -> None:
    with opened() as tab:
        table = tab.locator("table.scores:visible")
        values = "rows => rows.map(row => Number(row.cells[1].dataset.order))"

        def column() -> list[float]:
            return table.locator("tbody tr").evaluate_all(values)

        before = column()
        button = table.get_by_role("button", name="CLIP-I", exact=False).first
        button.click()
        assert column() == sorted(before, reverse=True) != before
        button.press("Enter")
        assert column() == sorted(before)
        table.get_by_role("button", name="Method").click()
        assert column() == before


def test_scales_and_groups_are_chosen_from_the_keyboard(opened: Open) -> None:
    with opened() as tab:
        cells = tab.locator("table.scores:visible tbody")

        def views() -> list[bool]:
            """Which of the views the table shows."""
            keys = ("stored", "scale0", "scale1", "difference")
            return [cells.locator(f".v-{key}:visible").count() > 0 for key in keys]

        assert views() == [True, False, False, False]
        tab.locator("#view-stored").focus()
        for number in (1, 2, 3, 0):
            tab.keyboard.press("ArrowRight")
            assert views() == [number == shown for shown in range(4)]
        tab.locator("#scope-0").focus()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("table.scores:visible").count() == 1
        assert "Held-in" in tab.locator("table.scores:visible caption").text_content()
        assert "held-in" in tab.locator("#plots .tag:visible").first.text_content()


def test_pictures_are_filtered(opened: Open) -> None:
    with opened() as tab:
        groups, filters = tab.locator(".group:visible"), tab.locator(".filters")
        assert groups.count() == 6
        filters.get_by_label("Split").select_option("held-out")
        assert groups.count() == 3
        assert "3 of 6 groups" in filters.locator("output").text_content()
        filters.get_by_label("Split").select_option("")
        filters.get_by_label("Find").fill("FLOWER")
        assert groups.count() == 1
        filters.get_by_label("Method").select_option("lora")
        assert groups.locator("[data-method]:visible").count() == 1
        assert groups.locator(".given:visible").count() == 2


def test_without_scripts_everything_is_there(opened: Open) -> None:
    with opened(java_script_enabled=False) as tab:
        assert tab.locator(".group").count() == 6
        assert not tab.locator(".filters:visible").count()
        assert tab.locator("table.scores:visible").count() == 1
        assert tab.locator("#plots svg:visible").count() > 2
