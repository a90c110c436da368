"""How much of TorchCompileModel's gain a model keeps with one EasyRef Apply.

    python -m benchmarks.speed.compiling COMFYUI FOLDER [CHANNELS SIDE]

times model calls of the plain and of a steered model, each as it is and compiled by inductor, on
one CPU thread, and prints JSON. It needs a C++ compiler. The UNet has SDXL's levels, with one block
of each kind; compiling its two graphs takes two minutes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .comfyui_models import part, random_tokens, random_unet, start
from .sampling import random_easyref, sample_once

_UNET = {
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
_CHANNELS, _SIDE = 64, 32  # of the first level, where SDXL has 320, and of the latent
_ROUNDS, _STEPS = 20, 4
_PARTS = ("plain", "steered", "plain, compiled", "steered, compiled")


def summary(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each, the gain as a share of the plain model call, and the share of it that
    is kept; the latter says something only where the gain is well above the spread."""
    medians = {name: statistics.median(found[name]) for name in _PARTS}
    plain, steered, plain_compiled, steered_compiled = medians.values()
    gain = plain - plain_compiled
    return medians | {"gain": gain / plain, "kept": (steered - steered_compiled) / gain}


def _measure(
    comfyui: Path, work: Path, channels: int = _CHANNELS, side: int = _SIDE
) -> dict[str, list[float]]:
    # ComfyUI's default attention for a CPU cannot be traced; this is its default for most GPUs.
    nodes = start(comfyui, work, "--use-pytorch-cross-attention")
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    torch.set_num_threads(1)
    with torch.inference_mode():
        model = random_unet(_UNET | {"model_channels": channels})
        layers = part("nodes.host.unet_layers").cross_attention_layers(model)
        easyref = random_easyref(nodes, work, layers, channels)
        steered = nodes["EasyRefApply"].execute(model, easyref, random_tokens(easyref, 1))[0]
        uncompiled = model, steered
        compiled = (TorchCompileModel.execute(one, "inductor")[0] for one in uncompiled)
        times: dict[str, list[float]] = {name: [] for name in _PARTS}
        models = zip(_PARTS, (*uncompiled, *compiled), strict=True)
        runs = [_timed(one, times[name]) for name, one in models]
        for run in runs:  # compiled, with keys and values
            sample_once(side, run, _STEPS)
        for found in times.values():
            found.clear()
        for _ in range(_ROUNDS):
            for run in runs:
                sample_once(side, run, _STEPS)
    return times


def _timed(model: Any, seconds: list[float]) -> Any:
    """A clone that notes what each model call takes, all wrappers included."""

    def timed(call: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        begin = time.process_time()
        result = call(given["input"], given["timestep"], **given["c"])
        seconds.append(time.process_time() - begin)
        return result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(timed)
    return clone


if __name__ == "__main__":
    folders, numbers = map(Path, sys.argv[1:3]), map(int, sys.argv[3:])
    print(json.dumps(summary(_measure(*folders, *numbers))))
