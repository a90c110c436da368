"""Memory of a ComfyUI that runs prompt after prompt, none like the one before.

    python -m benchmarks.speed.growth COMFYUI FOLDER PROMPTS

Two adapters and two checkpoints take turns, in a graph in which all four have a loader, so that
ComfyUI keeps their outputs; references and prompt change each time, and what was made of them is
dropped, as ComfyUI drops it. Prints JSON. Models are small and random, with UNets that have SDXL's
layers, and LoRAs.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from easyref_core.encode.encoder import EasyRefEncoder

from .comfyui_models import part, random_adapter, random_unet, start
from .processes import give_back_free, in_process, resident_bytes
from .timing import Amount

PROMPTS = 60
SETTLED = 5
"""Prompts until what is kept has its size."""
CACHE_MB = 8
"""What EasyRef keeps of each kind, such that nearly all of it is full by then."""
BAR = 32.0  # MB
_SOME = 10  # prompts whose median is taken
_REFERENCES, _MLLM_WIDTH = 16, 512
_UNET = {"model_channels": 64, "transformer_depth": [0, 0, 1, 1, 2, 2]}
_UNET |= {"transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2}
_SIDE = 16


def growth(comfyui: Path, work: Path, prompts: int = PROMPTS) -> list[Amount]:
    """Amounts of the table."""
    settings = {"EASYREF_CACHE_MB": str(CACHE_MB)}
    arguments = (str(comfyui), str(work), str(prompts))
    return as_amounts(in_process("growth", *arguments, environment=settings))


def as_amounts(found: list[dict[str, float]]) -> list[Amount]:
    """Of what was found after each prompt.

    What grows from prompt to prompt is held against the bar. The highest is shown beside it: some
    of it is held for a moment only.
    """
    resident = [one["resident"] / 1e6 for one in found[SETTLED - 1 :]]
    first, last = (statistics.median(part) for part in (resident[:_SOME], resident[-_SOME:]))
    cached = max(one["cached"] / one["newest"] for one in found)
    name = f"{len(found)} prompts"
    return [
        Amount(f"{name}: the last {_SOME} beyond those from the fifth", last - first, "MB", BAR),
        Amount(f"{name}: the highest beyond these", max(resident) - first, "MB"),
        Amount("resident from the fifth prompt", first, "MB"),
        Amount("keys and values kept, of each adapter's newest run", cached, "", 1.0),
    ]


def _measure(comfyui: Path, work: Path, prompts: int) -> Iterator[dict[str, float]]:
    nodes = start(comfyui, work)
    torch.set_num_threads(1)
    with torch.inference_mode():
        unets = [random_unet(_UNET, seed) for seed in (1, 2)]
        loaders = [_easyref(nodes, work, unets[0], seed) for seed in (1, 2)]
        newest: dict[int, int] = {}
        for number in range(prompts):
            easyref = loaders[number % 2]
            newest[number % 2] = _run(nodes, easyref, unets[number // 2 % 2], number)
            gc.collect()
            give_back_free()
            stores = [one.key_values._cached for one in loaders]
            kept = [held for store in stores for sets in store.values() for held in sets.values()]
            yield {
                "resident": resident_bytes(),
                "cached": sum(held.nbytes for held in kept),
                "newest": sum(newest.values()),
            }


def _run(nodes: Any, easyref: Any, unet: Any, number: int) -> int:
    """A prompt; returns the bytes of the keys and values that its run used."""
    import comfy.sample

    noise = torch.Generator().manual_seed(number)
    images = {
        f"image_{n}": torch.rand(1, 8, 8, 3, generator=noise).repeat(1, 42, 42, 1)
        for n in range(1, _REFERENCES + 1)
    }
    references = nodes["EasyRefReferences"].execute(weight=1.0, images=images)[0]
    given = {"aggregation": "easyref", "image_size": 336, "references": references}
    tokens = nodes["EasyRefEncode"].execute(easyref, prompt=f"prompt {number}", **given)[0]
    model = nodes["EasyRefApply"].execute(unet, easyref, tokens)[0]
    text = [[torch.randn(1, 77, 2048, generator=noise), {"pooled_output": torch.zeros(1, 1280)}]]
    latent = torch.zeros(1, 4, _SIDE, _SIDE)
    settings = (1, 7.5, "euler", "normal", text, text, latent)
    comfy.sample.sample(model, latent, *settings, seed=1, disable_pbar=True)
    (held,) = easyref.key_values._cached[tokens].values()
    return held.nbytes


def _easyref(nodes: Any, work: Path, unet: Any, seed: int) -> Any:
    """A loader's output for a random adapter, its MLLM inside; the tokenizer is the golden one."""
    import goldens

    heads = _MLLM_WIDTH // 128
    vision = replace(goldens.TINY.vision, hidden_size=_MLLM_WIDTH)
    sizes = replace(goldens.TINY, hidden_size=_MLLM_WIDTH, num_heads=heads, vision=vision)
    encoder = goldens.randomise(EasyRefEncoder(sizes, 64, 2048), seed)
    layers = part("nodes.host.unet_layers").cross_attention_layers(unet)
    adapter = work / "models" / "easyref" / f"random_{seed}.safetensors"
    save_file(random_adapter(encoder, layers, rank=8, seed=seed), adapter)
    mllm = work / "models" / "LLM" / "golden"
    if not mllm.exists():
        mllm.parent.mkdir(exist_ok=True)
        goldens.mllm_directory(mllm, sizes)
    given = {"adapter": adapter.name, "mllm": "golden", "precision": "fp32"}
    return nodes["EasyRefLoader"].execute(**given)[0]


if __name__ == "__main__":
    folder, into, count = sys.argv[1:]
    prompts = islice(_measure(Path(folder), Path(into), int(count)), int(count))
    print(json.dumps(list(prompts)))
