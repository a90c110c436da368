"""Writes the templates in workflows/, in the form of the graph editor and in API form, and the
blueprint in subgraphs/.

    python -m workshop.templates.make_workflows [NAME ...]

A ComfyUI is started for a moment and asked how its nodes look, so that widget values and slots
stand in the order of the nodes as they are. Templates are described in `workflow_templates.py`, the
blueprint in `workflow_blueprint.py`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.find_comfyui import PACK, comfyui_version, find_comfyui
from workshop.demo.workflow import WORKFLOWS

from .workflow_blueprint import blueprint
from .workflow_editor import editor_form
from .workflow_graph import api_form
from .workflow_subgraph import with_subgraph
from .workflow_templates import templates

BLUEPRINT = PACK / "subgraphs" / "EasyRef.json"


def main(names: list[str]) -> int:
    comfyui = find_comfyui()
    if comfyui is None:
        print("There is no ComfyUI: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    with (
        tempfile.TemporaryDirectory(prefix="easyref_workflows_") as base,
        ComfyServer(comfyui, Path(base), arguments=["--cpu"]) as server,
    ):
        object_info = server.get_json("/object_info")
    versions = {"comfy-core": comfyui_version(comfyui), "easyref": _own_version()}
    for template in templates():
        if names and template.name not in names:
            continue
        file = f"{template.name}.json"
        _write(WORKFLOWS / "api" / file, api_form(template.graph, object_info))
        form = editor_form(template, object_info, versions)
        if template.subgraph is not None:
            form = with_subgraph(form, template.subgraph, object_info)
        _write(WORKFLOWS / file, form)
        print(WORKFLOWS / file)
    _write(BLUEPRINT, blueprint(object_info, versions))
    print(BLUEPRINT)
    return 0


def _own_version() -> str:
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found
    return found[1]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
