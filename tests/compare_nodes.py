"""Compares two descriptions of the nodes, as `tests/comfy/released_nodes.json` holds them.

    python tests/compare_nodes.py OLD.json NEW.json

Prints what would break saved workflows and ends with status 1 if there is anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Nodes = Mapping[str, Mapping[str, Any]]


def broken(old: Nodes, new: Nodes) -> list[str]:
    """What workflows saved with `old` lose with `new`, a sentence each."""
    found: list[str] = []
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            found.append(f"{name}: the node is gone")
            continue
        found += [f"{name}: {sentence}" for sentence in _broken_inputs(before, after)]
        outputs, later = before["outputs"], after["outputs"]
        if [kind for _, kind in later[: len(outputs)]] != [kind for _, kind in outputs]:
            found.append(f"{name}: its outputs were {outputs} and are {later}")
    return found


def _broken_inputs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    inputs, later = before["inputs"], after["inputs"]
    for name, given in inputs.items():
        now = later.get(name)
        if now is None:
            found.append(f"the input {name} is gone")
            continue
        if now["type"] != given["type"]:
            found.append(f"the input {name} was {given['type']} and is {now['type']}")
        if given["optional"] and not now["optional"]:
            found.append(f"the input {name} was optional and is required")
        lost = [option for option in given.get("options", ()) if option not in now["options"]]
        if lost:
            found.append(f"the input {name} has lost {', '.join(map(str, lost))}")
        for part in ("sockets", "first"):
            if given.get(part) != now.get(part):
                found.append(f"the sockets of {name} were {given[part]} and are {now.get(part)}")
        for limit, narrower in (("min", 1), ("max", -1), ("count", -1)):
            if limit in given and (now.get(limit, given[limit]) - given[limit]) * narrower > 0:
                found.append(f"the input {name} had {limit} {given[limit]} and has {now[limit]}")
    # Widget values are saved in the order of the inputs.
    kept = [name for name in later if name in inputs]
    if kept != [name for name in inputs if name in later]:
        found.append("its inputs have changed places")
    added = [name for name in later if name not in inputs]
    if added and list(later)[-len(added) :] != added:
        found.append(f"new inputs ({', '.join(added)}) stand before old ones")
    found += [f"the new input {n} is required" for n in added if not later[n]["optional"]]
    return found


def main(arguments: list[str]) -> int:
    """Compare the two named files; returns the exit status."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    old, new = (json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments)
    found = broken(old, new)
    print("\n".join(found) or f"{len(old)} nodes are as they were, {len(new) - len(old)} are new")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
