"""Writes the templates in workflows/, in the form of the graph editor and in API form, and the
blueprint in subgraphs/.

    python docs/make_workflows.py [NAME ...]

A ComfyUI is started for a moment and asked how its nodes look, so that widget values and slots
stand in the order of the nodes as they are. Templates are described in `workflow_templates.py`; the
one with a subgraph was drawn in the editor, and the blueprint is that subgraph alone.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from workflow_blueprint import TEMPLATE, blueprint
from workflow_editor import editor_form
from workflow_graph import api_form
from workflow_templates import templates

from easyref_core.demo.comfy_server import ComfyServer
from easyref_core.demo.find_comfyui import PACK, comfyui_version, find_comfyui
from easyref_core.demo.workflow import WORKFLOWS

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
        _write(WORKFLOWS / file, editor_form(template, object_info, versions))
        print(WORKFLOWS / file)
    drawn = json.loads((WORKFLOWS / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    _write(BLUEPRINT, blueprint(drawn))
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
