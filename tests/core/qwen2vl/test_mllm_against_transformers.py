"""The MLLM computes what transformers' own Qwen2-VL computes, with plain positions.

Runs for the installed transformers, and for an older one in a folder of its own: where the
variable EASYREF_TRANSFORMERS_4 says, or in the environment's `transformers-4.57`. As a program it
prints the largest differences as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from torch import nn

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.pictures.preprocessing import preprocess
from easyref_core.qwen2vl.config import VisionConfig
from easyref_core.qwen2vl.prompt import IMAGE_PAD, PromptTokenizer

ROOT = Path(__file__).parents[3]
OLDER = Path(os.environ.get("EASYREF_TRANSFORMERS_4") or Path(sys.prefix, "transformers-4.57"))
STAGES = ("visual", "embeds", "penultimate", "reference_states", "layout")
# Two query heads share one key head, as heads share in the real model.
SIZES = replace(
    goldens.TINY,
    hidden_size=256,
    num_heads=2,
    vision=VisionConfig(embed_dim=160, num_heads=2, depth=2, mlp_dim=320, hidden_size=256),
)


def whole_model(encoder: EasyRefEncoder) -> goldens.Tensors:
    """The encoder's weights as an untruncated Qwen2-VL, its final layer being the last one."""
    tensors = goldens.random_adapter(encoder)
    last = f"model.layers.{encoder.config.num_layers - 1}."
    final = "mllm_final_layer.layers.0."
    found = {n.removeprefix(final): t for n, t in tensors.items() if n.startswith(final)}
    model = {last + n: t for n, t in found.items()}
    body = {n.removeprefix(goldens.BODY): t for n, t in tensors.items()}
    return model | {n: t for n, t in body.items() if n.startswith(("visual.", "model."))}


def theirs(directory: Path) -> tuple[nn.Module, nn.Module]:
    """Vision tower and language model as transformers builds them."""
    from transformers import Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    inner = model.eval().model
    return inner.visual, inner.language_model


def their_vision(tower: nn.Module, pixels: torch.Tensor, grid: list[list[int]]) -> torch.Tensor:
    out = tower(pixels, grid_thw=torch.tensor(grid))
    return out if isinstance(out, torch.Tensor) else out.pooler_output


def their_decoder(model: nn.Module, layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Some layers and the norm, positions 0..L-1 on all three rotary axes."""
    part = copy.copy(model)
    part._modules = {**model._modules, "layers": nn.ModuleList(layers)}
    positions = torch.arange(x.shape[1]).expand(3, 1, -1)
    out = part(inputs_embeds=x, position_ids=positions, use_cache=False)
    return out.last_hidden_state


def layout_difference(directory: Path, visual: nn.Module, language: nn.Module) -> float:
    """Weights saved under the names transformers has in memory against the directory's own."""
    with tempfile.TemporaryDirectory() as folder:
        renamed = Path(folder) / "renamed"
        renamed.mkdir()
        for file in directory.iterdir():
            if file.suffix == ".json":
                (renamed / file.name).write_bytes(file.read_bytes())
        state = {f"model.visual.{n}": t for n, t in visual.state_dict().items()}
        state |= {f"model.language_model.{n}": t for n, t in language.state_dict().items()}
        goldens.write(renamed / "model.safetensors", state)
        adapter = goldens.without(goldens.adapter_tensors(), goldens.BODY)
        if (directory / "adapter").is_file():
            adapter = goldens.load_file(directory / "adapter")
        checkpoint = load_checkpoint(goldens.write(Path(folder) / "adapter", adapter))
        states = [plan_encoder(checkpoint, d).build().state_dict() for d in (directory, renamed)]
        return max(goldens.difference(states[1][n], t) for n, t in states[0].items())


@torch.no_grad()
def compare(encoder: EasyRefEncoder, directory: Path, image_size: int) -> dict[str, float]:
    """Largest differences, every stage given the same input; four pictures of other shapes."""
    visual, language = theirs(directory)
    tokenizer = PromptTokenizer.from_directory(directory)
    patches = [preprocess(p, image_size) for p in goldens.pictures("four_refs_prompt")]
    prompt = tokenizer.tokenize([p.num_tokens for p in patches], "a red cube")
    device = torch.device("cpu")

    seen = encoder.encode_images(patches, device)
    grid = [[1, p.rows, p.columns] for p in patches]
    wanted = their_vision(visual, torch.cat([p.pixels for p in patches]), grid)
    found = {"visual": goldens.difference(torch.cat(seen), wanted)}

    embeds = encoder.embed(prompt, seen, device)
    words = language.embed_tokens(prompt.ids)
    words[prompt.ids == tokenizer.special_ids[IMAGE_PAD]] = torch.cat(seen)
    found["embeds"] = goldens.difference(embeds, words[None])

    body = list(language.layers)[:-1]
    states = their_decoder(language, body, embeds)
    found["penultimate"] = goldens.difference(goldens.body_states(encoder, embeds), states)

    last = copy.deepcopy(language)
    last.layers[-1].load_state_dict(encoder.mllm_final_layer.layers[0].state_dict())
    last.norm.load_state_dict(encoder.mllm_final_layer.norm.state_dict())
    tokens = encoder.mllm_final_layer.reference_tokens[None]
    rows = their_decoder(last, [last.layers[-1]], torch.cat((states, tokens), dim=1))
    rows = rows[:, -encoder.num_tokens :]
    found["reference_states"] = goldens.difference(encoder.reference_states(embeds), rows)
    found["layout"] = layout_difference(directory, visual, language)
    return found


def compare_all() -> dict[str, Any]:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        small = goldens.random_encoder(**vars(SIZES))
        weights = whole_model(small)
        directory = goldens.mllm_directory(Path(folder) / "mllm", SIZES, weights)
        adapter = goldens.without(goldens.random_adapter(small), goldens.BODY)
        goldens.write(directory / "adapter", adapter)
        bare = goldens.without(goldens.adapter_tensors(), goldens.BODY)
        golden = plan_encoder(
            load_checkpoint(goldens.write(Path(folder) / "golden", bare)), goldens.MLLM
        ).build()
        return {
            "version": transformers.__version__,
            "golden": compare(golden, goldens.MLLM, goldens.IMAGE_SIZE),
            "random": compare(small, directory, 168),
        }


def check(found: dict[str, Any]) -> None:
    for model in ("golden", "random"):
        assert set(found[model]) == set(STAGES)
        for stage, difference in found[model].items():
            limit = 0.0 if stage == "layout" else 1e-5
            assert difference <= limit, f"{model} {stage}: {difference} ({found['version']})"


def test_installed_transformers_computes_the_same() -> None:
    check(compare_all())


@pytest.mark.slow
def test_older_transformers_computes_the_same() -> None:
    if not (OLDER / "transformers").is_dir():
        pytest.skip(f"no transformers 4.57 in {OLDER} (see EASYREF_TRANSFORMERS_4)")
    path = os.pathsep.join((str(OLDER), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.")
    check(found)


def test_rotary_axes_are_plain_positions_and_that_matters() -> None:
    """Multimodal positions would be far off, so the comparison above can tell them apart."""
    _, language = theirs(goldens.MLLM)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 64, generator=generator)
    plain = torch.arange(12).expand(3, 1, -1)
    axes = torch.stack((plain[0], plain[0] // 3, plain[0] % 3))
    with torch.no_grad():
        states = [
            language(inputs_embeds=x, position_ids=p, use_cache=False).last_hidden_state
            for p in (plain, axes)
        ]
    assert goldens.difference(*states) > 0.1


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compare_all()))
