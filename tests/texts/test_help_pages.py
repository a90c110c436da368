"""Each node has a help page in every language, with pictures, and what it says is so.

ComfyUI's page asks for docs/NODE/LANGUAGE.md first, then for docs/NODE.md, which is the English
one; it looks for pictures of both from docs/ on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from documents import (
    PAGES,
    assert_is_a_message,
    assert_links_lead_somewhere,
    assert_named_files_exist,
    read,
)
from node_texts import ROOT, NodeTexts, node_texts
from PIL import Image

NODES = node_texts()
ENGLISH_HEADINGS = ("## Inputs", "## Outputs", "## Example", "## Common mistakes")
CHINESE_HEADINGS = ("## 输入", "## 输出", "## 示例", "## 常见问题")
PICTURE_BYTES = 60_000
PICTURE_WIDTH = 900
PAGE_FILES = sorted(PAGES.rglob("*.md"))


def node_id(node: NodeTexts) -> str:
    return node.node_id


def page_name(page: Path) -> str:
    return page.relative_to(PAGES).as_posix()


def pictures(page: Path) -> list[str]:
    return re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", read(page), re.MULTILINE)


def slots(node: NodeTexts) -> list[str]:
    return [*node.inputs, *(name for name, _ in node.outputs)]


@pytest.mark.parametrize("node", NODES, ids=node_id)
def test_help_page_explains_every_input_and_output(node: NodeTexts) -> None:
    page = read(PAGES / f"{node.node_id}.md")
    for name in slots(node):
        assert f"`{name}`" in page, f"{name} is not explained"
    for heading in ENGLISH_HEADINGS:
        assert heading in page
    assert len(page.splitlines()) <= 60, "longer than a page"


@pytest.mark.parametrize("node", NODES, ids=node_id)
def test_chinese_help_page_names_inputs_and_outputs_as_the_node_shows_them(node: NodeTexts) -> None:
    page = read(PAGES / node.node_id / "zh.md")
    texts = json.loads(read(ROOT / "locales" / "zh" / "nodeDefs.json"))[node.node_id]
    for name in slots(node):
        assert f"`{name}`" in page, f"{name} is not explained"
    for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
        assert slot["name"] in page, f"{slot['name']} is not explained"
    for heading in CHINESE_HEADINGS:
        assert heading in page
    assert len(page.splitlines()) <= 60, "longer than a page"


@pytest.mark.parametrize("node", NODES, ids=node_id)
def test_both_languages_say_as_much(node: NodeTexts) -> None:
    english, chinese = (
        read(PAGES / path) for path in (f"{node.node_id}.md", f"{node.node_id}/zh.md")
    )
    for rows in (r"^\| ", r"^- \*\*", r"^\d\. "):
        counts = [len(re.findall(rows, page, re.MULTILINE)) for page in (english, chinese)]
        assert counts[0] == counts[1], rows
    messages = [re.findall(r"\*\*\"([^\"]+)\"", page) for page in (english, chinese)]
    assert messages[0] == messages[1]


def test_chinese_help_pages_call_nodes_by_their_chinese_names() -> None:
    locale = json.loads(read(ROOT / "locales" / "zh" / "nodeDefs.json"))
    names = {texts["display_name"] for texts in locale.values()}
    for page in PAGES.glob("*/zh.md"):
        for name in re.findall(r"“(EasyRef [^”]+)”", read(page)):
            assert name in names, f"{page.parent.name}: {name}"


def test_no_help_page_without_a_node() -> None:
    nodes = {node.node_id for node in NODES}
    assert {path.stem for path in PAGES.glob("*.md")} == nodes
    assert {path.parent.name for path in PAGES.glob("*/*.md")} == nodes


@pytest.mark.parametrize("page", PAGE_FILES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert_links_lead_somewhere(page, PAGES)


@pytest.mark.parametrize("page", PAGE_FILES, ids=page_name)
def test_named_files_of_the_project_exist(page: Path) -> None:
    assert_named_files_exist(page)


def test_every_node_has_its_own_picture_and_both_languages_show_it() -> None:
    shown = {node.node_id: pictures(PAGES / f"{node.node_id}.md") for node in NODES}
    for name, paths in shown.items():
        assert len(paths) == 1
        assert pictures(PAGES / name / "zh.md") == paths
    paths = [path for (path,) in shown.values()]
    assert len(set(paths)) == len(paths)
    assert {PAGES / path for path in paths} == set((PAGES / "images").iterdir())
    for path in paths:
        with Image.open(PAGES / path) as picture:
            assert picture.width <= PICTURE_WIDTH, path
        assert (PAGES / path).stat().st_size < PICTURE_BYTES, path


def quoted_messages() -> list[str]:
    """The messages that help pages quote in bold."""
    return sorted({text for p in PAGE_FILES for text in re.findall(r"\*\*\"([^\"]+)\"", read(p))})


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_those_of_the_source(message: str) -> None:
    assert_is_a_message(message)
