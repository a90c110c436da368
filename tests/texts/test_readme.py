"""README: its links, commands, Python example and messages are those of the project."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from documents import (
    README,
    assert_is_a_message,
    assert_links_lead_somewhere,
    assert_named_files_exist,
    project,
    read,
)
from node_texts import ROOT, NodeTexts, node_texts


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(README), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("node", node_texts(), ids=lambda node: node.node_id)
def test_readme_names_every_node(node: NodeTexts) -> None:
    assert f"[{node.display_name}](web/docs/{node.node_id}.md)" in read(README)


@pytest.mark.parametrize("document", [README, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_and_named_files_exist(document: Path) -> None:
    assert_links_lead_somewhere(document)
    assert_named_files_exist(document)


def test_command_examples_are_accepted_and_complete() -> None:
    """Every `easyref` example parses, and every option of a command that is shown is shown too;
    those of the benchmark are its help's.
    """
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
        if of_command and command != "bench":
            assert shown == options - {"--help"}, command


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


@pytest.mark.slow
def test_python_example_runs_and_gives_the_official_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    details = goldens.description()["cases"]["four_refs_prompt"]
    example, identity = blocks("python")
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
    (tmp_path / "example.py").write_text(f"{example}\n{identity}", encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"))
    wanted = goldens.expected()["full_336.four_refs_prompt.tokens"]
    assert goldens.difference(names["tokens"].cond, wanted) <= 1e-4
    assert names["image"].size == (128, 128)
    assert (tmp_path / "picture.png").is_file()
    assert 0 < names["run"].passes < 30


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


def troubleshooting() -> list[str]:
    """The messages of the README's last table."""
    table = read(README).partition("## Troubleshooting")[2]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("message", troubleshooting())
def test_quoted_messages_are_those_of_the_source(message: str) -> None:
    assert_is_a_message(message)


def test_install_commands_name_this_project() -> None:
    metadata = project()
    name, readme = metadata["project"]["name"], read(README)
    assert f"comfy node install {name}" in readme
    assert f"git clone {metadata['project']['urls']['Repository']} {name}" in readme
    minimum = metadata["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert f"ComfyUI {minimum} or newer" in readme
    assert metadata["project"]["requires-python"] == ">=3.10"
    assert "Python 3.10 or newer" in readme
