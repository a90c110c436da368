"""The subgraph of a template as a blueprint: what the editor lists among nodes to add.

ComfyUI reads blueprints of a node pack from its folder `subgraphs`; a file's name is shown.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any

TEMPLATE = "easyref_subgraph"
_DESCRIPTION = (
    "EasyRef Loader, Encode and Apply in one: a model steered by what the reference pictures "
    "have in common. Open it to change any part."
)
_SEARCH_WORDS = ["reference images", "consistent character", "style reference", "ip adapter"]
# Texts that belong to the template's picture, not to the subgraph.
_CLEARED = "prompt"


def blueprint(template: dict[str, Any]) -> dict[str, Any]:
    """A graph of the template's one subgraph alone, with nothing linked to it.

    Args:
        template: in the editor's form, with one subgraph.
    """
    (definition,) = copy.deepcopy(template["definitions"]["subgraphs"])
    (outer,) = (n for n in copy.deepcopy(template["nodes"]) if n["type"] == definition["id"])
    definition |= {"description": _DESCRIPTION, "category": "EasyRef"}
    definition["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, "easyref/blueprint"))
    outer |= {"id": 1, "type": definition["id"], "pos": [0, 0], "order": 0}
    for slot in outer["inputs"]:
        slot["link"] = None
    for slot in outer["outputs"]:
        slot["links"] = None
    for node in (outer, *definition["nodes"]):
        widgets = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
        if _CLEARED in widgets:
            node["widgets_values"][widgets.index(_CLEARED)] = ""
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintSearchAliases": _SEARCH_WORDS},
    }
