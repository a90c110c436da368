"""Models are read from the folder that is named: nothing is fetched, no code there is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = "local_files_only"


def loading_calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(place, call, the file's text) of each call that loads a model or a tokenizer by name."""
    for part in ("easyref_core", "nodes", "workshop"):
        for path in sorted((ROOT / part).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                if is_call and node.func.attr == "from_pretrained":
                    yield f"{path}:{node.lineno}", node, text


def test_every_model_is_loaded_from_its_folder_alone() -> None:
    calls = list(loading_calls())
    assert len(calls) >= 10
    for place, call, text in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        spread = None in given and OFFLINE in text  # **OPTIONS of the same file
        no_folder = ast.unparse(call.args[0]) == "None"
        assert given.get(OFFLINE) == "True" or spread or no_folder, place
        assert given.get("trust_remote_code", "False") == "False", place
        # The only classes that could run code of the folder.
        if re.match(r"(transformers\.)?Auto[MTPC]", ast.unparse(call.func)):
            assert "trust_remote_code" in given, place
