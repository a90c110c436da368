"""The texts of the nodes in English and Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from documents import read
from node_texts import ENGLISH, ROOT, english_locale, node_texts

LANGUAGES = ("en", "zh")
NODES = node_texts()


def locale(language: str) -> dict[str, Any]:
    return json.loads(read(ROOT / "locales" / language / "nodeDefs.json"))


def test_node_texts_are_parsed_for_all_nodes() -> None:
    source = read(ROOT / "nodes" / "__init__.py")
    listed = re.search(r"NODES.*= \[(.*?)\]", source, re.DOTALL)
    assert listed
    assert sorted(re.findall(r"\w+", listed[1])) == sorted(node.node_id for node in NODES)


def test_node_texts_of_autogrow_inputs_are_parsed() -> None:
    references = next(node for node in NODES if node.node_id == "EasyRefReferences")
    assert list(references.inputs) == ["previous", "images", "weight", "gallery"]


def test_english_locale_equals_the_schemas() -> None:
    assert locale("en") == english_locale(), f"run python tests/texts/node_texts.py: {ENGLISH}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_covers_exactly_the_nodes(language: str) -> None:
    translated = locale(language)
    assert translated.keys() == {node.node_id for node in NODES}
    for node in NODES:
        texts = translated[node.node_id]
        assert texts.keys() == {"display_name", "description", "inputs", "outputs"}
        assert texts["inputs"].keys() == node.inputs.keys(), node.node_id
        assert list(texts["outputs"]) == [str(n) for n in range(len(node.outputs))], node.node_id
        for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
            assert slot.keys() == {"name", "tooltip"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_has_no_characters_that_the_frontend_interprets(language: str) -> None:
    """vue-i18n takes these for placeholders, links and plurals."""
    for text in strings(locale(language)):
        assert text.strip()
        assert not set("{}@|$%") & set(text), text


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    else:
        yield value


def test_descriptions_and_tooltips_are_translated() -> None:
    for node_id, texts in locale("zh").items():
        sentences = [texts["description"]]
        for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
            sentences.append(slot["tooltip"])
        for sentence in sentences:
            assert re.search("[\u4e00-\u9fff]", sentence), f"{node_id}: {sentence}"
