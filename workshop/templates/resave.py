"""Opens the templates and the blueprint in ComfyUI's page and writes them as the page saves them.

    python -m workshop.templates.resave              # all of workflows/ and subgraphs/
    python -m workshop.templates.resave easyref_try  # some of them

To change a template, edit it in ComfyUI, export it over its file in workflows/ and run this: the
file is written in one form, and its API form goes to workflows/api. Needs ComfyUI, playwright and a
Chromium (tests/browser/install_chromium.sh).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comfyui.find_comfyui import PACK
from ..comfyui.page import PATIENCE, Page, newest_page
from ..demo.workflow import WORKFLOWS

BLUEPRINTS = PACK / "subgraphs"
_SAVED = "() => JSON.stringify(app.graph.serialize())"
_API_FORM = "async () => (await app.graphToPrompt()).output"


def save(page: Page, graph: dict[str, Any]) -> dict[str, Any]:
    """Open a graph and return what the page would save, once it changes no more."""
    page.clear()
    page.load(graph)
    page.tab.wait_for_function("n => app.graph.nodes.length === n", arg=len(graph["nodes"]))
    before = None
    for _ in range(PATIENCE // 500):
        page.tab.wait_for_timeout(500)  # widgets of the pack settle after a frame or two
        if (saved := page.evaluate(_SAVED)) == before:
            break
        before = saved
    content = json.loads(saved)
    if "ds" in graph.get("extra", {}):  # where the view opens; the page may have moved
        content["extra"]["ds"] = graph["extra"]["ds"]
    for definition, given in zip(_subgraphs(content), _subgraphs(graph), strict=True):
        if "category" in given:  # of a blueprint, among the nodes to add; the page drops it
            definition["category"] = given["category"]
    return content


def _subgraphs(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return graph.get("definitions", {}).get("subgraphs", [])


def resave(page: Page, path: Path) -> None:
    """Write one file anew; of a template, its API form, too."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    _write(path, save(page, graph))
    if path.parent == WORKFLOWS:
        _write(WORKFLOWS / "api" / path.name, page.evaluate(_API_FORM))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(names: Sequence[str]) -> None:
    files = {path.stem: path for path in (*WORKFLOWS.glob("*.json"), *BLUEPRINTS.glob("*.json"))}
    unknown = sorted(set(names) - files.keys())
    if unknown:
        raise SystemExit(f"No such template: {', '.join(unknown)}. There are {', '.join(files)}.")
    with newest_page() as page:
        for name in names or sorted(files):
            resave(page, files[name])
            print(files[name])


if __name__ == "__main__":
    main(sys.argv[1:])
