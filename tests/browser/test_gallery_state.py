"""The gallery's state in JavaScript, tested with Node's test runner and compared with Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from easyref_core.errors import EasyRefError
from easyref_core.pictures.gallery import parse_gallery

HERE = Path(__file__).parent
STATE = HERE.parents[1] / "web" / "js" / "gallery_state.js"
MIN_NODE = 20  # the first release with toSpliced, which browsers have
PARSE = """
import { parse, toText } from %s;
const texts = JSON.parse(process.argv[1]);
console.log(JSON.stringify(texts.map((text) => {
  const { pictures, problem } = parse(text);
  return problem ?? JSON.parse(toText(pictures) || "null");
})));
"""
TEXTS = (
    "",
    "{",
    "[]",
    '{"version": 1, "pictures": []}',
    '{"version": 2, "pictures": []}',
    '{"version": "1", "pictures": []}',
    '{"version": 1, "pictures": {}}',
    '{"version": 1, "pictures": [{"file": "ü/a b.png", "weight": 0.35, "crop": [0.1, 0, 0.5, 1]}]}',
    '{"version": 1, "pictures": [{"file": "a.png"}, {"file": "a.png", "crop": [0, 0, 1, 1]}]}',
    '{"version": 1, "pictures": [{"file": ""}]}',
    '{"version": 1, "pictures": [{"file": "a.png", "weight": true}]}',
    '{"version": 1, "pictures": [{"file": "a.png", "weight": -1}]}',
    '{"version": 1, "pictures": [{"file": "a.png", "crop": [0, 0, 1]}]}',
    '{"version": 1, "pictures": [{"file": "a.png", "crop": [0.5, 0, 0.6, 1]}]}',
    '{"version": 1, "pictures": [{"file": "a.png", "crop": [0.5, 0, 0, 1]}]}',
)


@pytest.fixture(scope="module")
def node() -> str:
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node.js on the PATH")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.strip().lstrip("v").split(".")[0]) < MIN_NODE:
        pytest.skip(f"Node.js {version.stdout.strip()} is older than {MIN_NODE}")
    return program


def test_the_javascript_unit_tests_pass(node: str) -> None:
    result = subprocess.run(
        [node, "--test", str(HERE / "gallery_state.test.mjs")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_the_page_and_python_parse_gallery_texts_alike(node: str) -> None:
    script = PARSE % json.dumps(STATE.as_uri())
    result = subprocess.run(
        [node, "--input-type=module", "--eval", script, json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for text, parsed in zip(TEXTS, json.loads(result.stdout), strict=True):
        assert parsed == read_by_python(text), text


def read_by_python(text: str) -> object:
    """The gallery's content, or the page's name for the problem."""
    try:
        pictures = [asdict(picture) for picture in parse_gallery(text)]
    except EasyRefError as error:
        return "newer" if "newer" in str(error) else "unreadable"
    for picture in pictures:
        if picture["crop"] is None:
            del picture["crop"]
        else:
            picture["crop"] = list(picture["crop"])
    return {"version": 1, "pictures": pictures} if pictures else None


def test_the_packs_web_files_load_nothing_from_other_sites() -> None:
    web = STATE.parents[1]
    files = [*web.glob("js/*.js"), *web.glob("css/*.css")]
    assert len(files) > 10
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.lower(), path.name
        for forbidden in ("//cdn", "@import", "eval(", "innerHTML"):
            assert forbidden not in text, f"{path.name}: {forbidden}"


def test_both_languages_have_the_same_texts_and_placeholders(node: str) -> None:
    script = f"""
        import {{ TABLES, texts }} from {json.dumps((STATE.parent / "gallery_texts.js").as_uri())};
        const placeholders = (text) => (text.match(/{{\\w+}}/g) ?? []).sort();
        const of = (table) => Object.fromEntries(
          Object.entries(table).map(([name, text]) => [name, placeholders(text)]));
        console.log(JSON.stringify([of(TABLES.ENGLISH), of(TABLES.CHINESE),
          texts("zh-TW")("missing"), texts("en")("missing"), texts(undefined)("missing")]));
    """
    result = subprocess.run(
        [node, "--input-type=module", "--eval", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    english, chinese, *missing = json.loads(result.stdout)
    assert english == chinese
    assert missing == ["缺失", "missing", "missing"]
