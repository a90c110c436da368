"""What a model call needs on a GPU beyond the plain model's, at real size, without computing.

    python -m benchmarks.speed.sampling_memory COMFYUI FOLDER

runs SDXL's UNet in bf16 at 1024x1024 pixels with CFG on PyTorch's meta device, inside ComfyUI, and
prints JSON: the peak of bytes allocated during two model calls, and the keys and values held. All
attention counts as a fused kernel, which allocates only its result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from .comfyui_models import random_tokens, start
from .processes import ROOT, in_process
from .timing import Amount

BAR = 100.0  # MB, keys and values included
_SIDE = 128  # of the latent
_SIGMAS = (10.0, 1.0)
PLAIN, KEY_VALUES = "plain", "keys and values"


def sampling_memory(comfyui: Path, work: Path) -> list[Amount]:
    """Amounts of the table."""
    return as_amounts(in_process("sampling_memory", str(comfyui), str(work)))


def as_amounts(found: dict[str, dict[str, float]]) -> list[Amount]:
    """What each steered model needs more than the plain one, keys and values included."""
    plain = found[PLAIN]["peak"]
    result = []
    for name, one in found.items():
        if name == PLAIN:
            continue
        held = one[KEY_VALUES]
        more = (one["peak"] - plain + held) / 1e6
        result.append(Amount(f"a step's memory: {name}", more, "MB", BAR))
        result.append(Amount(f"its keys and values: {name}", held / 1e6, "MB"))
    return result


def _measure(comfyui: Path, work: Path) -> dict[str, dict[str, float]]:
    nodes = start(comfyui, work, "--use-pytorch-cross-attention")
    sys.path.append(str(ROOT / "tests" / "comfy"))
    import dynamic_vram
    from goldens import real_shapes, sparse_file

    adapter = sparse_file(work / "models" / "easyref" / "empty.safetensors", real_shapes())
    easyref = nodes["EasyRefLoader"].execute(adapter.name, "from adapter", "auto")[0]
    with torch.no_grad(), dynamic_vram.dynamic_vram(dynamic=False) as gpu, gpu.waiting_allowed():
        unet = _unet()

        def apply(to: Any, seed: int, mask: torch.Tensor | None) -> Any:
            # The LoRA is merged into the weights before sampling, and adds nothing to a call.
            settings = {"lora_strength": 0.0, "mask": mask}
            return nodes["EasyRefApply"].execute(
                to, easyref, random_tokens(easyref, seed), **settings
            )[0]

        left = torch.zeros(1, 1024, 1024)
        left[:, :, :512] = 1
        models = {
            PLAIN: unet,
            "one EasyRef Apply": apply(unet, 1, None),
            "two with masks": apply(apply(unet, 1, left), 2, 1 - left),
        }
        found = {name: _peak(model) for name, model in models.items()}
    adapter.unlink()
    if not all(found[name][KEY_VALUES] for name in models if name != PLAIN):
        raise SystemExit("a steered model used no keys and values")
    return found


def _unet() -> Any:
    """SDXL's without memory for its weights."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models
    from random_models import SDXL

    config = comfy.supported_models.SDXL(SDXL)
    config.set_inference_dtype(torch.bfloat16, None)
    device = mm.get_torch_device()
    model = config.get_model({}, "", device=device)
    # Its offload device is the same, so that nothing moves.
    return comfy.model_patcher.ModelPatcher(model, device, device)


def _peak(model: Any) -> dict[str, float]:
    import comfy.model_management as mm
    import comfy.samplers
    from encoding_memory import PeakMemory

    memory = PeakMemory()
    held: list[int] = []

    class Sampler(comfy.samplers.Sampler):
        def sample(self, wrapped: Any, _: Any, extra: Any, *args: Any, **kwargs: Any) -> Any:
            loaded = [one.model for one in mm.current_loaded_models if one.model is not None]
            kept = [one for one in loaded if type(one.model).__name__ == "EasyRefKeyValues"]
            held.append(sum(one.model_size() for one in kept))
            x = torch.empty(1, 4, _SIDE, _SIDE, device=mm.get_torch_device())
            with memory:
                for sigma in _SIGMAS:
                    x = wrapped(x, torch.full((1,), sigma, device=x.device), **extra)
            return x

    text = [[torch.empty(1, 77, 2048), {"pooled_output": torch.empty(1, 1280)}]]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text, text)
    guider.set_cfg(7.5)
    latent = torch.zeros(1, 4, _SIDE, _SIDE)
    mm.current_loaded_models.clear()  # keys and values of the model before
    with patch("torch.nn.functional.scaled_dot_product_attention", _fused):
        steps = torch.tensor([*_SIGMAS, 0.0])
        guider.sample(latent, latent, Sampler(), steps, disable_pbar=True)
    return {"peak": memory.peak, KEY_VALUES: held[0]}


def _fused(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(query)


if __name__ == "__main__":
    print(json.dumps(_measure(*map(Path, sys.argv[1:]))))
