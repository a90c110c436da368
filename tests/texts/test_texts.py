"""What people read says what the code does: README, help pages, locales, changelog."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import goldens
import pytest
import torch
from node_texts import ENGLISH, ROOT, NodeTexts, english_locale, node_texts
from PIL import Image

README = ROOT / "README.md"
PAGES = ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
NODES = node_texts()
PICTURE_BYTES = 60_000
PICTURE_WIDTH = 900


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    toml = pytest.importorskip("tomlkit")  # comfy-cli brings it; tomllib is not in Python 3.10
    return toml.loads(read(ROOT / "pyproject.toml")).unwrap()


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(README), re.MULTILINE | re.DOTALL)


def named(node: NodeTexts) -> str:
    return node.node_id


# Nodes: help pages, locales, README


def test_the_nodes_are_found() -> None:
    source = read(ROOT / "nodes" / "__init__.py")
    listed = re.search(r"NODES.*= \[(.*?)\]", source, re.DOTALL)
    assert listed
    assert sorted(re.findall(r"\w+", listed[1])) == sorted(node.node_id for node in NODES)


def test_inputs_that_grow_are_read() -> None:
    references = next(node for node in NODES if node.node_id == "EasyRefReferences")
    assert list(references.inputs) == ["previous", "images", "weight", "gallery"]


@pytest.mark.parametrize("node", NODES, ids=named)
def test_help_page(node: NodeTexts) -> None:
    page = read(PAGES / f"{node.node_id}.md")
    for name in (*node.inputs, *(name for name, _ in node.outputs)):
        assert f"`{name}`" in page, f"{name} is not explained"
    for heading in ("## Inputs", "## Outputs", "## Example", "## Common mistakes"):
        assert heading in page
    assert len(page.splitlines()) <= 60, "longer than a page"


def test_no_help_page_without_a_node() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {node.node_id for node in NODES}


def test_english_locale_is_what_the_nodes_say() -> None:
    assert json.loads(read(ENGLISH)) == english_locale(), "run python tests/texts/node_texts.py"


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_covers_exactly_the_nodes(language: str) -> None:
    locale = json.loads(read(ROOT / "locales" / language / "nodeDefs.json"))
    assert locale.keys() == {node.node_id for node in NODES}
    for node in NODES:
        texts = locale[node.node_id]
        assert texts.keys() == {"display_name", "description", "inputs", "outputs"}
        assert texts["inputs"].keys() == node.inputs.keys(), node.node_id
        assert list(texts["outputs"]) == [str(n) for n in range(len(node.outputs))], node.node_id
        for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
            assert slot.keys() == {"name", "tooltip"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_has_no_characters_that_the_frontend_interprets(language: str) -> None:
    """vue-i18n takes these for placeholders, links and plurals."""
    for text in _texts(json.loads(read(ROOT / "locales" / language / "nodeDefs.json"))):
        assert text.strip()
        assert not set("{}@|$%") & set(text), text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    else:
        yield value


def test_chinese_is_chinese() -> None:
    locale = json.loads(read(ROOT / "locales" / "zh" / "nodeDefs.json"))
    for node_id, texts in locale.items():
        sentences = [texts["description"]]
        for slot in (*texts["inputs"].values(), *texts["outputs"].values()):
            sentences.append(slot["tooltip"])
        for sentence in sentences:
            assert re.search("[\u4e00-\u9fff]", sentence), f"{node_id}: {sentence}"


@pytest.mark.parametrize("node", NODES, ids=named)
def test_readme_names_every_node(node: NodeTexts) -> None:
    assert f"[{node.display_name}](web/docs/{node.node_id}.md)" in read(README)


# Links, pictures, paths


def documents() -> list[Path]:
    return [README, ROOT / "CHANGELOG.md", *sorted(PAGES.glob("*.md"))]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not urlparse(link).scheme:
            assert (document.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_named_files_of_the_project_exist(document: Path) -> None:
    for path in re.findall(
        r"`((?:tests|docs|web|locales|workflows|benchmarks)/[^`\s]+)`", read(document)
    ):
        assert (ROOT / path).exists(), path


def test_every_help_page_has_its_own_picture() -> None:
    from PIL import Image

    shown = {}
    for page in PAGES.glob("*.md"):
        (shown[page.stem],) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", read(page), re.MULTILINE)
    assert len(set(shown.values())) == len(shown)
    assert {PAGES / path for path in shown.values()} == set((PAGES / "images").iterdir())
    for path in shown.values():
        with Image.open(PAGES / path) as picture:
            assert picture.width <= PICTURE_WIDTH, path
        assert (PAGES / path).stat().st_size < PICTURE_BYTES, path


# Commands


def test_command_examples_are_accepted_and_complete() -> None:
    """Every `easyref` example parses, and every option of a command that is shown is shown too."""
    from easyref_core.cli import _parser

    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    examples = [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("easyref ")
    ]
    parser = _parser()
    for example in examples:
        parser.parse_args(example)
    assert {"inspect", "encode"} <= {example[0] for example in examples}
    for command, options in commands(parser).items():
        of_command = [example for example in examples if example[0] == command]
        shown = {word for example in of_command for word in example if word.startswith("--")}
        assert not of_command or shown == options - {"--help"}, command


def commands(parser: Any) -> dict[str, set[str]]:
    """Command -> its long options."""
    (choice,) = (action for action in parser._actions if isinstance(action.choices, dict))
    return {
        name: {o for a in command._actions for o in a.option_strings if o.startswith("--")}
        for name, command in choice.choices.items()
    }


def test_make_commands_exist() -> None:
    makefile = read(ROOT / "Makefile")
    for block in blocks("sh"):
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_example_runs_and_gives_the_official_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    details = goldens.description()["cases"]["four_refs_prompt"]
    (example,) = blocks("python")
    for name, value in {
        "ADAPTER": str(goldens.ADAPTER),
        "MLLM": str(goldens.MLLM),
        "SDXL": str(write_pipeline(tmp_path / "sdxl")),
        "PICTURES": [str(goldens.GOLDEN / path) for path in details["refs"]],
        "PROMPT": goldens.user_prompt("four_refs_prompt"),
    }.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        assert len(line.findall(example)) == 1, name
        example = line.sub(lambda _, n=name, v=value: f"{n} = {v!r}", example)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"))
    wanted = goldens.expected()["full_336.four_refs_prompt.tokens"]
    assert goldens.difference(names["tokens"].cond, wanted) <= 1e-4
    assert names["image"].size == (128, 128)
    assert (tmp_path / "picture.png").is_file()


def write_pipeline(path: Path) -> Path:
    """An SDXL pipeline around the golden UNet, the rest small and random."""
    from diffusers import (
        AutoencoderTiny,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = path / "vocabulary"
    vocabulary.mkdir(parents=True)
    content = json.dumps({word: number for number, word in enumerate(words)})
    (vocabulary / "vocab.json").write_text(content, encoding="utf-8")
    (vocabulary / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary, model_max_length=77)

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )

    StableDiffusionXLPipeline(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        ),
        text_encoder=CLIPTextModel(text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(64)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(goldens.UNET),
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(path)
    return path


# Messages


@cache
def messages() -> tuple[str, ...]:
    """Every piece of text in the source, with an ellipsis for what is filled in."""
    found = []
    for folder in ("easyref_core", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(read(path))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[ds]", "…", node.value))
    return tuple(found)


def quoted() -> list[str]:
    """The messages in the README's last table, and those that help pages quote in bold."""
    table = read(README).partition("## Troubleshooting")[2]
    found = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    for page in PAGES.glob("*.md"):
        found += re.findall(r"\*\*\"([^\"]+)\"", read(page))
    return found


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_are_those_of_the_source(message: str) -> None:
    fragments = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(fragments), re.DOTALL)
    assert any(pattern.search(text) for text in messages())


# Metadata


def test_changelog_starts_with_the_current_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\] - ", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions
    assert versions[0] == project()["project"]["version"]


def test_install_commands_name_this_project() -> None:
    metadata = project()
    name, readme = metadata["project"]["name"], read(README)
    assert f"comfy node install {name}" in readme
    assert f"git clone {metadata['project']['urls']['Repository']} {name}" in readme
    minimum = metadata["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert f"ComfyUI {minimum} or newer" in readme
    assert metadata["project"]["requires-python"] == ">=3.10"
    assert "Python 3.10 or newer" in readme


def test_the_registry_shows_pictures_of_the_repository_in_its_sizes() -> None:
    metadata = project()
    urls = metadata["project"]["urls"]
    repository = urls["Repository"]
    assert urls.keys() == {"Repository", "Documentation", "Bug Tracker"}
    assert all(url.startswith(repository) for url in urls.values())
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    comfy = metadata["tool"]["comfy"]
    pictures = {}
    for name in ("Icon", "Banner"):
        assert comfy[name].startswith(raw)
        with Image.open(ROOT / comfy[name].removeprefix(raw)) as picture:
            pictures[name] = picture.size
            assert picture.format in ("PNG", "JPEG", "GIF")
    width, height = pictures["Icon"]
    assert width == height <= 400
    width, height = pictures["Banner"]
    assert width * 9 == height * 21


def test_what_runs_it_is_said_in_the_registrys_words() -> None:
    parser = pytest.importorskip("comfy_cli.registry.config_parser")
    classifiers = project()["project"]["classifiers"]
    assert parser.validate_and_extract_os_classifiers(classifiers) == ["OS Independent"]
    assert "GPU :: NVIDIA CUDA" in parser.validate_and_extract_accelerator_classifiers(classifiers)


def test_licence_is_the_whole_apache_licence() -> None:
    licence = read(ROOT / "LICENSE")
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "   9. Accepting Warranty or Additional Liability." in licence


def test_package_keeps_what_it_needs_and_leaves_out_the_rest() -> None:
    pathspec = pytest.importorskip("pathspec")
    lines = [line for line in read(ROOT / ".comfyignore").splitlines() if line[:1] not in ("", "#")]
    assert all(line.startswith("/") for line in lines), "anchor the patterns"
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", lines).match_file
    kept = ["__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"]
    kept += [p.relative_to(ROOT).as_posix() for p in PAGES.parent.rglob("*") if p.is_file()]
    assert {"web/js/gallery.js", "web/css/gallery.css"} <= set(kept)
    kept += [f"locales/{language}/nodeDefs.json" for language in LANGUAGES]
    kept += ["easyref_core/demo_set.py", "nodes/sampling/patch.py", "workflows/any.json"]
    for path in kept:
        assert not ignored(path), path
    for path in (
        "tests/goldens.py",
        "workshop/pages/make_pictures.py",
        "Makefile",
        "recipes/1_alignment.yaml",
        "benchmarks/any.py",
    ):
        assert ignored(path), path


def tracked() -> list[Path]:
    """The files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_file_names_a_registry_or_a_folder_of_somebodys_computer() -> None:
    hosts = ("py" + "pi.org", "python" + "hosted.org", "registry." + "comfy.org", "npm" + "js.org")
    hosts += ("api." + "comfy.org", "pypi" + "-more", "test.py" + "pi")
    folders = (
        r"/(?:root|work)/\w",
        r"/home/(?!\.)\w+/",
        r"/Users/\w",
        r"[A-Z]:\\\\?Users",
        r"/mnt/\w",
    )
    hosts_pattern = "|".join(map(re.escape, hosts))
    unwanted = re.compile(rf"{hosts_pattern}|(?<![\w.~$}}>)-])(?:{'|'.join(folders)})")
    for path in tracked():
        if path == Path(__file__) or not path.is_file() or b"\0" in path.read_bytes()[:8192]:
            continue
        found = unwanted.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"
