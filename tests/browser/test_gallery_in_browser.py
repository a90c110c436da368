"""The reference gallery in ComfyUI's page, operated as a user does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
from comfy_page import MODES, ComfyPage, five_pictures, picture_file

FIVE = tuple(f"face {number}.png" for number in range(1, 6))
CROP = ".easyref-tile-bottom .easyref-tool"
REMOVE = ".easyref-tile-top .easyref-tool"

in_both_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def empty(page: ComfyPage) -> ComfyPage:
    """A node without a picture."""
    page.add_node()
    page.gallery.wait_for()
    return page


@pytest.fixture
def five(empty: ComfyPage) -> ComfyPage:
    """A node with five pictures."""
    empty.choose_files(five_pictures())
    empty.wait_for_files(*FIVE)
    return empty


@in_both_modes
def test_order_weights_crops_and_removals_survive_saving_and_loading(empty: ComfyPage) -> None:
    page = empty
    page.choose_files(five_pictures())
    page.wait_for_files(*FIVE)
    page.wait_for_thumbnails()
    assert page.state() == [{"file": f"easyref/{name}", "weight": 1} for name in FIVE]

    page.tile(1).hover()
    page.tab.mouse.down()
    for place in (2, 3):
        box = page.tile(place).bounding_box()
        page.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.tab.mouse.up()
    page.wait_for_files("face 2.png", "face 3.png", "face 1.png", "face 4.png", "face 5.png")

    page.tile(2).locator(".easyref-weight").fill("0.35")
    page.tile(2).locator(".easyref-weight").press("Enter")
    page.tile(4).hover()
    page.tile(4).locator(CROP).click()
    box = page.tab.locator(".easyref-crop-box")
    box.wait_for()
    corner = page.tab.locator("[data-handle=se]").bounding_box()
    whole = box.bounding_box()
    page.tab.mouse.move(corner["x"] + corner["width"] / 2, corner["y"] + corner["height"] / 2)
    page.tab.mouse.down()
    middle = (whole["x"] + whole["width"] / 2, whole["y"] + whole["height"] / 2)
    page.tab.mouse.move(*middle, steps=4)
    page.tab.mouse.up()
    page.tab.get_by_role("button", name="Apply").click()
    page.tile(1).hover()
    page.tile(1).locator(REMOVE).click()
    page.wait_for_files("face 3.png", "face 1.png", "face 4.png", "face 5.png")

    wanted = page.state()
    assert [p["weight"] for p in wanted] == [0.35, 1, 1, 1]
    assert wanted[2]["crop"] == pytest.approx([0, 0, 0.5, 0.5], abs=0.02)
    (node,) = page.prompt().values()
    assert json.loads(node["inputs"]["gallery"])["pictures"] == wanted
    assert set(node["inputs"]) == {"weight", "gallery"}, "only the text is in the API form"

    saved = page.workflow()
    page.open()
    page.load(saved)
    page.wait_for(lambda: page.tiles.count() == 4)
    page.wait_for_thumbnails()
    assert page.state() == wanted
    assert page.workflow()["nodes"][0]["widgets_values"] == saved["nodes"][0]["widgets_values"]
    assert page.tile(1).locator(".easyref-weight").input_value() == "0.35"


@in_both_modes
def test_undo_and_redo_work_between_clicks_and_copies_are_independent(empty: ComfyPage) -> None:
    page = empty
    page.choose_files(five_pictures()[:2])
    page.wait_for_files("face 1.png", "face 2.png")
    page.tile(1).focus()
    page.tab.keyboard.press("Alt+ArrowRight")
    page.wait_for_files("face 2.png", "face 1.png")
    page.tile(1).focus()
    page.tab.keyboard.press("Delete")
    page.wait_for_files("face 1.png")
    for down, key, *files in (
        (0, "Control+z", "face 2.png", "face 1.png"),
        (50, "Control+z", "face 1.png", "face 2.png"),
        (100, "Control+y", "face 2.png", "face 1.png"),
    ):
        page.click_beside(down)
        page.tab.keyboard.press(key)
        page.wait_for_files(*files)
        page.wait_for_undo_steps()

    page.evaluate("""() => {
        app.canvas.selectNode(app.graph.nodes[0]);
        app.canvas.copyToClipboard();
        app.canvas.pasteFromClipboard();
    }""")
    page.wait_for(lambda: page.tiles.count() == 4)
    assert page.files(0) == page.files(1) == ["face 2.png", "face 1.png"]
    page.tab.locator(".easyref-gallery").nth(1).locator(REMOVE).first.click(force=True)
    page.wait_for(lambda: page.tiles.count() == 3)
    assert sorted([len(page.files(0)), len(page.files(1))]) == [1, 2], "copies share nothing"


@in_both_modes
def test_the_gallery_can_be_used_by_keyboard_alone(five: ComfyPage) -> None:
    page = five

    def focused() -> str:
        return page.evaluate("() => document.activeElement.getAttribute('aria-label') ?? ''")

    page.gallery.get_by_role("button", name="Add files").focus()
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Tab")
    assert focused() == "Picture 1 of 5: face 1.png, weight 1"
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("Alt+ArrowRight")
    page.wait_for_files("face 1.png", "face 3.png", "face 2.png", "face 4.png", "face 5.png")
    assert focused() == "Picture 3 of 5: face 2.png, weight 1"
    live = page.gallery.locator("[aria-live]")
    assert live.inner_text() == "face 2.png is now picture 3 of 5."
    page.tab.keyboard.press("Alt+ArrowDown")
    page.wait_for_files("face 1.png", "face 3.png", "face 4.png", "face 5.png", "face 2.png")
    page.tab.keyboard.press("Alt+Home")
    page.wait_for_files("face 2.png", "face 1.png", "face 3.png", "face 4.png", "face 5.png")

    page.tab.keyboard.press("Tab")
    assert focused() == "Remove face 2.png"
    page.tab.keyboard.press("Tab")
    assert focused() == "Weight of face 2.png"
    page.tab.keyboard.type("0.5")
    page.tab.keyboard.press("Enter")
    assert page.state()[0]["weight"] == 0.5
    assert focused() == "Picture 1 of 5: face 2.png, weight 0.5"
    for _ in range(3):
        page.tab.keyboard.press("Tab")
    assert focused() == "Crop face 2.png"
    page.tab.keyboard.press("Enter")
    page.tab.locator(".easyref-crop-box").wait_for()
    assert focused() == "Crop box"
    page.tab.keyboard.press("Tab")
    assert focused() == "Top left corner"
    for _ in range(4):
        page.tab.keyboard.press("Shift+ArrowRight")
    page.tab.keyboard.press("ArrowDown")
    page.tab.locator(".easyref-crop-size", has_text="left 20 %, top 1 %").wait_for()
    page.tab.get_by_role("button", name="Apply").focus()
    page.tab.keyboard.press("Enter")
    page.wait_for(lambda: "crop" in page.state()[0])
    assert page.state()[0]["crop"] == [0.2, 0.01, 0.8, 0.99]
    assert focused() == "Crop face 2.png", "the focus is where it was"

    page.tab.keyboard.press("Delete")
    assert len(page.workflow()["nodes"]) == 1, "Delete in the gallery is not for the node"
    page.tile(1).focus()
    page.tab.keyboard.press("Delete")
    page.wait_for_files("face 1.png", "face 3.png", "face 4.png", "face 5.png")
    assert focused() == "Picture 1 of 4: face 1.png, weight 1"
    assert len(page.workflow()["nodes"]) == 1


@in_both_modes
def test_a_crop_can_be_square_or_reset_to_the_whole_picture(five: ComfyPage) -> None:
    page = five
    page.tile(1).hover()
    page.tile(1).locator(CROP).click()
    page.tab.get_by_label("Square").check()
    page.tab.get_by_role("button", name="Apply").click()
    page.wait_for(lambda: "crop" in page.state()[0])
    x, y, w, h = page.state()[0]["crop"]
    assert (y, h) == (0, 1)
    assert w == pytest.approx(2 / 3, abs=0.01)
    assert x == pytest.approx(1 / 6, abs=0.01)
    page.tile(1).locator(CROP).click()
    page.tab.get_by_role("button", name="Whole picture").click()
    page.tab.get_by_role("button", name="Apply").click()
    page.wait_for(lambda: "crop" not in page.state()[0])
    page.tile(1).locator(CROP).click()
    page.tab.keyboard.press("Escape")
    page.wait_for(lambda: page.tab.locator("dialog").count() == 0)
    assert "crop" not in page.state()[0]


@in_both_modes
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_dropped_and_pasted_pictures_are_added(empty: ComfyPage, kind: str) -> None:
    page = empty
    files = [picture_file(f"{kind} {number}.png", "teal") for number in range(7)]
    other = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"x"}
    page.drop_files(".easyref-gallery", [*files[:3], other, *files[3:]], kind)
    page.wait_for_files(*(f"{kind} {number}.png" for number in range(7)))
    page.gallery.get_by_text("Not a picture: notes.txt").wait_for()
    assert [n["type"] for n in page.workflow()["nodes"]] == ["EasyRefReferences"]


@in_both_modes
def test_files_are_judged_by_what_they_hold(empty: ComfyPage, screenshots: Path) -> None:
    page = empty
    picture = picture_file("photo", "teal")
    names = ("photo.jfif", "photo", "photo.apng", "photo.txt")
    others = {
        "phone.png": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0",
        "notes.png": b"text",
        "empty.png": b"",
    }
    files = [{**picture, "name": name, "mimeType": ""} for name in names]
    files += [
        {"name": name, "mimeType": "image/png", "buffer": content}
        for name, content in others.items()
    ]
    page.choose_files(files)
    page.wait_for_files(*names)
    note = page.gallery.get_by_role("status")
    note.get_by_text("Cannot be read (HEIC): phone.png. Save as PNG or JPEG.").wait_for()
    note.get_by_text("Cannot be read (PostScript): drawing.png.").wait_for()
    note.get_by_text("Not a picture: notes.png, empty.png").wait_for()
    page.wait_for_thumbnails()
    page.screenshot(screenshots, "judged")
    assert not (page.server.base / "input" / "easyref" / "phone.png").exists()


def shown(page: ComfyPage, folder: str, name: str) -> str:
    """Put a picture into one of ComfyUI's folders; returns its address in the page."""
    path = page.server.base / folder / "made here" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_file(name, "olive")["buffer"])
    query = {"filename": name, "subfolder": "made here", "type": folder, "rand": "0.5"}
    return f"{page.server.url}/api/view?{urlencode(query)}"


@in_both_modes
def test_pictures_of_the_page_can_be_dragged_onto_the_gallery(empty: ComfyPage) -> None:
    page = empty
    page.drop_data(".easyref-gallery", {"text/uri-list": shown(page, "output", "result.png")})
    page.wait_for(lambda: page.paths() == ["made here/result.png [output]"], page.paths)
    page.drop_data(".easyref-gallery", {"text/uri-list": shown(page, "input", "given.png")})
    page.wait_for(lambda: page.paths()[1:] == ["made here/given.png"], page.paths)
    page.drop_data(".easyref-gallery", {"text/uri-list": shown(page, "temp", "preview.png")})
    page.wait_for(lambda: page.paths()[2:] == ["easyref/preview.png"], page.paths)
    listed = {"filename": "result.png", "subfolder": "made here", "type": "output"}
    asset = {"application/x-comfy-asset-info": json.dumps(listed), "text/uri-list": "http://x/y"}
    page.drop_data(".easyref-gallery", asset)
    page.wait_for(lambda: page.paths()[3:] == ["made here/result.png [output]"], page.paths)
    page.wait_for_thumbnails()
    note = page.gallery.get_by_role("status")
    page.drop_data(".easyref-gallery", {"text/uri-list": "http://other.invalid/a.png"})
    note.get_by_text("On another site: http://other.invalid/a.png").wait_for()
    page.drop_data(".easyref-gallery", {"text/uri-list": f"{page.server.url}/system_stats"})
    note.get_by_text("Not a picture: system_stats").wait_for()
    assert len(page.paths()) == 4
    saved = page.workflow()
    page.open()
    page.load(saved)
    page.wait_for(lambda: page.tiles.count() == 4)
    page.wait_for_thumbnails()


SHOW_BESIDE = """src => {
    const image = document.createElement("img");
    Object.assign(image, {id: "beside", src});
    Object.assign(image.style, {position: "fixed", right: "40px", bottom: "40px", zIndex: 9999});
    document.body.append(image);
}"""


@in_both_modes
def test_a_picture_is_dragged_by_mouse_with_what_the_browser_adds_to_it(
    empty: ComfyPage, screenshots: Path
) -> None:
    page = empty
    page.evaluate(SHOW_BESIDE, shown(page, "output", "mouse.png"))
    try:
        page.tab.locator("#beside").drag_to(page.gallery)
        page.wait_for(lambda: page.paths() == ["made here/mouse.png [output]"], page.paths)
        page.wait_for_thumbnails()
        page.screenshot(screenshots, "dragged")
    finally:
        page.evaluate("() => document.querySelector('#beside').remove()")


@in_both_modes
def test_paste_goes_to_the_selected_node(page: ComfyPage) -> None:
    page.add_node()
    page.evaluate("() => app.canvas.selectNode(app.graph.nodes[0])")
    page.drop_files("#graph-canvas", [picture_file("selected.png", "teal")], "paste")
    page.wait_for_files("selected.png")
    assert len(page.workflow()["nodes"]) == 1
    page.evaluate("() => app.canvas.deselectAll()")
    page.drop_files("#graph-canvas", [picture_file("other.png", "teal")], "paste")
    page.wait_for(lambda: len(page.workflow()["nodes"]) == 2)
    assert page.files() == ["selected.png"], "without it ComfyUI does what it always does"


@in_both_modes
def test_a_folder_of_the_input_is_added_in_natural_order(page: ComfyPage) -> None:
    folder = page.server.base / "input" / "people & places"
    folder.mkdir(exist_ok=True)
    for name in ("ann 10.png", "ann 9.png", "bé'a.png"):
        (folder / name).write_bytes(picture_file(name, "navy")["buffer"])
    page.add_node()
    page.gallery.get_by_role("button", name="Folder").click()
    page.tab.get_by_label("Folder of ComfyUI's input").select_option("people & places")
    page.tab.get_by_role("button", name="Apply").click()
    page.wait_for(lambda: len(page.files()) == 3)
    assert page.files() == [f"people & places/{n}" for n in ("ann 9.png", "ann 10.png", "bé'a.png")]
    page.wait_for_thumbnails()


@in_both_modes
def test_a_workflow_whose_files_are_missing_says_which(five: ComfyPage, screenshots: Path) -> None:
    page = five
    page.wait_for_thumbnails()  # no thumbnail may still be loading when its file is removed
    saved = page.workflow()
    for name in ("face 2.png", "face 5.png"):
        (page.server.base / "input" / "easyref" / name).unlink()
    page.open()
    page.load(saved)
    page.wait_for(lambda: page.tab.locator("[data-lost=missing]").count() == 2)
    note = page.gallery.get_by_role("status")
    assert note.inner_text() == (
        "Missing in ComfyUI's folders: easyref/face 2.png, easyref/face 5.png"
    )
    assert "missing" in page.tile(2).get_attribute("aria-label")
    assert page.files() == list(FIVE), "nothing is lost"
    page.wait_for_thumbnails()
    page.screenshot(screenshots, "missing")
    page.choose_files([five_pictures()[1]])
    page.wait_for(lambda: page.tab.locator("[data-lost=missing]").count() == 1)
    page.tile(5).hover()
    page.tile(5).locator(REMOVE).click()
    page.wait_for(lambda: not note.is_visible())


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        (
            '{"version": 2, "pictures": [{"file": "a.png", "colour": 1}]}',
            "saved by a newer EasyRef",
        ),
        ("{", "cannot be parsed"),
    ],
)
def test_an_unreadable_gallery_text_is_kept(page: ComfyPage, text: str, notice: str) -> None:
    page.add_node()
    saved = page.workflow()
    saved["nodes"][0]["widgets_values"][1] = text
    page.load(saved)
    page.gallery.get_by_text(notice).wait_for()
    assert page.workflow()["nodes"][0]["widgets_values"][1] == text
    assert page.gallery.get_by_role("button", name="Add files").is_disabled() == ("newer" in notice)


LINK_A_PICTURE = """() => {
    const [group] = app.graph.nodes, picture = LiteGraph.createNode("LoadImage");
    app.graph.add(picture);
    picture.connect(0, group, group.findInputSlot("images.image_1"));
}"""


def test_old_workflows_without_a_gallery_text_keep_their_links(page: ComfyPage) -> None:
    page.add_node()
    page.evaluate(LINK_A_PICTURE)
    old = page.workflow()
    for node in old["nodes"]:
        if node["type"] == "EasyRefReferences":
            node["widgets_values"] = [0.75]
    page.load(old)
    page.wait_for(lambda: page.gallery.count() == 1)
    (group,) = (n for n in page.prompt().values() if n["class_type"] == "EasyRefReferences")
    links = [name for name, value in group["inputs"].items() if isinstance(value, list)]
    assert links == ["images.image_1"]
    assert (group["inputs"]["weight"], group["inputs"]["gallery"]) == (0.75, "")


@in_both_modes
def test_a_hundred_pictures_scroll(page: ComfyPage) -> None:
    page.add_node()
    page.choose_files([picture_file("one.png", "teal")])
    page.wait_for_files("one.png")
    saved = page.workflow()
    many = {"version": 1, "pictures": [{"file": "easyref/one.png", "weight": 1}] * 100}
    saved["nodes"][0]["widgets_values"][1] = json.dumps(many)
    start = time.monotonic()
    page.load(saved)
    page.wait_for(lambda: page.tiles.count() == 100)
    assert time.monotonic() - start < 10
    height = page.evaluate("() => app.graph.nodes[0].size[1]")
    assert height < 700, "three rows are shown, the others scroll"
    page.tile(100).focus()
    assert page.tile(100).is_visible()


WIDTHS = """() => {
    const gallery = document.querySelector(".easyref-gallery");
    const {width} = gallery.getBoundingClientRect();
    const node = gallery.closest("[data-node-id]")?.getBoundingClientRect();
    return [width, node?.width ?? app.graph.nodes[0].size[0] * app.canvas.ds.scale];
}"""


@in_both_modes
def test_the_gallery_is_as_wide_as_its_node_with_the_side_panel_open(
    five: ComfyPage, screenshots: Path
) -> None:
    page = five

    def fits() -> bool:
        """As wide as the node but for its margins."""
        gallery, node = page.evaluate(WIDTHS)
        return 0 <= node - gallery <= 30

    toggle = page.tab.get_by_role("button", name="Toggle properties panel").first
    page.evaluate("() => app.canvas.selectNode(app.graph.nodes[0])")
    toggle.click()
    page.tab.get_by_text("EasyRef References").last.wait_for()
    try:
        for width in (330, 500):
            page.evaluate("width => app.graph.nodes[0].setSize([width, 420])", width)
            page.evaluate("() => app.graph.setDirtyCanvas(true, true)")
            page.next_frames()
            page.wait_for(fits, lambda: page.evaluate(WIDTHS))
            page.screenshot(screenshots, f"panel_{width}")
    finally:
        toggle.click()


def test_a_request_of_this_pack_to_another_site_is_noticed(page: ComfyPage) -> None:
    """All other tests rely on this: requests of the page itself are ignored, ours are not."""
    site = "https://not-to-be-asked.invalid/"
    page.tab.route(
        "**/extensions/easyref/js/probe.js",
        lambda route: route.fulfill(
            content_type="text/javascript",
            body=f"fetch('{site}').catch(() => {{ window.easyrefRefused = true; }});",
        ),
    )
    page.evaluate("site => fetch(site).catch(() => {})", site)
    assert page.mistakes() == []
    page.evaluate("() => import('/extensions/easyref/js/probe.js')")
    # If the server forbids other sites, the browser blocks the request and logs its script.
    page.wait_for(lambda: any("not-to-be-asked.invalid" in text for text in page.mistakes()))
    page.tab.wait_for_function("() => window.easyrefRefused")
    page.start_anew("classic")


@in_both_modes
def test_the_gallery_is_shown_in_chinese(page: ComfyPage) -> None:
    page.setting("Comfy.Locale", "zh")
    try:
        page.open()
        page.add_node()
        page.gallery.get_by_text("将图像拖放或粘贴到此处").wait_for()
    finally:
        page.setting("Comfy.Locale", "en")
        page.open()


@in_both_modes
@pytest.mark.parametrize("palette", ["dark", "light"])
def test_texts_have_enough_contrast(empty: ComfyPage, screenshots: Path, palette: str) -> None:
    """Also saves screenshots for a visual check."""
    page = empty
    page.setting("Comfy.ColorPalette", palette)
    try:
        page.next_frames()
        page.screenshot(screenshots, f"empty_{palette}")
        page.choose_files(five_pictures())
        page.wait_for_files(*FIVE)
        page.wait_for_thumbnails()
        page.tile(3).locator(".easyref-weight").fill("0.5")
        page.tile(3).locator(".easyref-weight").press("Enter")
        page.tile(2).hover()
        page.screenshot(screenshots, f"five_{palette}")
        for selector in (".easyref-count", ".easyref-button", ".easyref-place", ".easyref-weight"):
            page.wait_for(
                lambda s=selector: contrast(page, s) >= 4.5,
                lambda s=selector: (s, contrast(page, s)),
            )
        page.tile(4).locator(CROP).click(force=True)
        page.tab.locator(".easyref-crop-box").wait_for()
        page.tab.locator("[data-handle=nw]").focus()
        for _ in range(5):
            page.tab.keyboard.press("Shift+ArrowRight")
        page.tab.locator(".easyref-crop-size", has_text="left 25 %").wait_for()
        page.screenshot(screenshots, f"crop_{palette}")
        page.tab.keyboard.press("Escape")
    finally:
        page.setting("Comfy.ColorPalette", "dark")


def contrast(page: ComfyPage, selector: str) -> float:
    """WCAG contrast of an element's text and its background, transparent colours as opaque."""
    text, background = page.evaluate(
        """selector => {
            const paint = document.createElement('canvas').getContext('2d');
            const rgb = (colour) => {
                paint.clearRect(0, 0, 1, 1);
                paint.fillStyle = colour;
                paint.fillRect(0, 0, 1, 1);
                return [...paint.getImageData(0, 0, 1, 1).data];
            };
            let element = document.querySelector(selector);
            const text = rgb(getComputedStyle(element).color);
            let background = [0, 0, 0, 0];
            while (element && background[3] < 128) {
                background = rgb(getComputedStyle(element).backgroundColor);
                element = element.parentElement;
            }
            if (LiteGraph.vueNodesMode || background[3] >= 128) return [text, background];
            return [text, rgb(LiteGraph.NODE_DEFAULT_BGCOLOR)];
        }""",
        selector,
    )
    first, second = sorted((_luminance(text), _luminance(background)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def _luminance(rgb: list[int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
