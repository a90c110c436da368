"""ComfyUI in this process with the pack loaded as ComfyUI loads it, and what the tests run in it.

Nothing here imports ComfyUI before `start` was called, so that every test is collected (and then
skipped) where there is none.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from goldens import UNET, difference, expected, write

ROOT = Path(__file__).resolve().parents[2]
NAME = "easyref_custom_node"
GOLDEN = "golden.safetensors"
CASE = "four_refs_prompt"  # the golden group
GOLDEN_MLLM = "golden"
ADAPTER_ONLY = "adapter_only.safetensors"
CLIP_MODEL, DINO_MODEL = "small_clip", "openly/small_dino"  # in models/easyref_score
TIMESTEP = 601.0


@dataclass(frozen=True)
class Pack:
    """The pack inside ComfyUI.

    Attributes:
        base: ComfyUI's base directory of this test session.
        nodes: node id -> class.
    """

    base: Path
    nodes: Mapping[str, Any]

    def part(self, name: str) -> ModuleType:
        """One of the pack's modules, such as `nodes.sampling.patch`."""
        return importlib.import_module(f"{NAME}.{name}")

    def run(self, node: str, *args: Any, **kwargs: Any) -> Any:
        """A node's first output (its only one, for most)."""
        result = self.nodes[node].execute(*args, **kwargs)
        return result[0] if result.result else result

    @property
    def error(self) -> type[Exception]:
        """The pack's EasyRefError; the installed package's is another class."""
        return self.part("easyref_core.errors").EasyRefError

    @contextmanager
    def refused(self, *parts: object) -> Iterator[None]:
        """The code inside must raise an EasyRefError that names all of `parts`."""
        with pytest.raises(self.error) as raised:
            yield
        text = str(raised.value)
        for part in parts:
            assert str(part) in text, f"{part!r} is not said in: {text}"
        assert "Traceback" not in text
        assert text.endswith((".", ")")), text


class Prompt:
    """A graph as ComfyUI's caches ask for it."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self._graph = graph

    def has_node(self, number: str) -> bool:
        return number in self._graph

    def get_node(self, number: str) -> dict[str, Any]:
        return self._graph[number]


def start(comfyui: Path, base: Path) -> Pack:
    """Import ComfyUI, on the CPU and with its folders in `base`, and load the pack into it."""
    sys.path.insert(0, str(comfyui))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import utils.extra_config  # claims the name `utils`, as main.py does

        import nodes
    finally:
        sys.argv = arguments
    for module in (utils, nodes, comfy.options):
        assert Path(module.__file__).is_relative_to(comfyui), f"{module} shadows ComfyUI's"
    return load_pack(base)


def load_pack(base: Path) -> Pack:
    """Load the pack as ComfyUI's `load_custom_node` does."""
    spec = importlib.util.spec_from_file_location(
        NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    found = asyncio.run(extension.get_node_list())
    return Pack(base, {node.GET_SCHEMA().node_id: node for node in found})


def golden(name: str) -> torch.Tensor:
    """A golden tensor, fresh, so that no test can change another's."""
    return expected()[name].clone()


def off_golden(tokens: Any) -> float:
    """How far tokens are from those of the golden group."""
    return max(
        difference(tokens.cond, golden(f"full.{CASE}.tokens")),
        difference(tokens.uncond, golden("full.uncond_black.tokens")),
    )


def golden_unet(pack: Pack) -> Any:
    """The golden UNet as a MODEL of its own."""
    return pack.part("nodes.host.demo_models").load_unet_directory(UNET)


def random_tokens(pack: Pack, easyref: Any, seed: int, batch: int = 1) -> Any:
    """Random reference tokens of this adapter, cond and uncond far apart."""
    checkpoint = easyref.checkpoint
    noise = torch.Generator().manual_seed(seed)
    shape = (batch, checkpoint.num_tokens, checkpoint.token_width)
    cond, uncond = (torch.randn(shape, generator=noise) for _ in range(2))
    tokens = pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens
    return tokens(cond, uncond, checkpoint.identity, checkpoint.name)


def gathered(pack: Pack, *pictures: torch.Tensor, **inputs: Any) -> Any:
    """A group of references of these pictures, each on a socket of EasyRef References."""
    images = {f"image_{number}": picture for number, picture in enumerate(pictures, start=1)}
    return pack.run("EasyRefReferences", images=images, **inputs)


def sizes(values: Sequence[float]) -> dict[str, float]:
    """SDXL's sizes and crops as the settings of a CONDITIONING."""
    names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
    return dict(zip(names, values, strict=True))


def text(kind: str = "positive", **settings: Any) -> list[list[Any]]:
    """A golden text as ComfyUI's CONDITIONING, with the golden sizes."""
    prefix = "" if kind == "positive" else "negative_"
    details = {"pooled_output": golden(f"unet.{prefix}pooled_text")}
    details |= sizes(golden("unet.time_ids")[0].tolist())
    return [[golden(f"unet.{prefix}text_states"), details | settings]]


def random_text(seed: int, pooled: int = 32, **settings: Any) -> list[list[Any]]:
    """A random text for the golden UNet; for the demo's, `pooled` is 64."""
    noise = torch.Generator().manual_seed(seed)
    states = torch.randn((1, 77, 96), generator=noise)
    return [[states, {"pooled_output": torch.randn((1, pooled), generator=noise), **settings}]]


def combine(first: Any, second: Any) -> Any:
    return stock("nodes.ConditioningCombine", first, second)


def area(conditioning: Any, part: tuple[float, float, float, float], strength: float = 1.0) -> Any:
    """On (width, height, x, y) of the picture, as parts of it."""
    return stock("nodes.ConditioningSetAreaPercentage", conditioning, *part, strength)


def apply(pack: Pack, model: Any, easyref: Any, tokens: Any, **settings: Any) -> Any:
    """The Apply node with its defaults, save for `settings`."""
    defaults = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
    return pack.run("EasyRefApply", model, easyref, tokens, **(defaults | settings))


def sigmas(model: Any, *timesteps: float) -> torch.Tensor:
    """Sigmas of these timesteps, then 0."""
    sampling = model.get_model_object("model_sampling")
    steps = [sampling.sigma(torch.tensor([t]))[0] for t in timesteps]
    return torch.stack([*steps, torch.zeros(())])


def guider(model: Any, cfg: float, positive: Any = None, negative: Any = None) -> Any:
    import comfy.samplers

    cfg_guider = comfy.samplers.CFGGuider(model)
    cfg_guider.set_conds(positive or text(), negative or text("negative"))
    cfg_guider.set_cfg(cfg)
    return cfg_guider


def euler(cfg_guider: Any, x: torch.Tensor, steps: torch.Tensor, **options: Any) -> torch.Tensor:
    """ComfyUI's Euler sampler from the noisy latents x, in the UNet's own scale."""
    import comfy.samplers

    base = cfg_guider.model_patcher.model
    samples = cfg_guider.sample(
        torch.zeros_like(x),
        base.process_latent_out(x),
        comfy.samplers.ksampler("euler"),
        steps,
        disable_pbar=True,
        **options,
    )
    return base.process_latent_in(samples.to(x.device))  # a GPU's, where there is one


def latents(batch: int = 1, height: int = 16, width: int = 16, seed: int = 3) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 4, height, width), generator=noise)


def predict(
    model: Any,
    cfg: float = 1.0,
    x: torch.Tensor | None = None,
    timestep: float = TIMESTEP,
    **texts: Any,
) -> torch.Tensor:
    """The guided noise prediction, through the whole sampling stack: one Euler step to 0."""
    return predict_with(guider(model, cfg, **texts), x, timestep)


def predict_with(
    cfg_guider: Any, x: torch.Tensor | None = None, timestep: float = TIMESTEP
) -> torch.Tensor:
    """What a guider predicts as noise at a timestep, for latents x (the golden ones)."""
    steps = sigmas(cfg_guider.model_patcher, timestep)
    x = golden("unet.latents") if x is None else x
    noisy = x * torch.sqrt(steps[0] ** 2 + 1)
    return (noisy - euler(cfg_guider, noisy, steps)) / steps[0]


def stock(node: str, *args: Any) -> Any:
    """The first output of one of ComfyUI's own nodes ("module.Class"), whichever API it has."""
    module, name = node.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    if hasattr(found, "define_schema"):
        return found.execute(*args)[0]
    return getattr(found(), found.FUNCTION)(*args)[0]


def stock_lora_weights() -> dict[str, torch.Tensor]:
    """A LoRA on cross-attention queries and outputs, named as trainers name them."""
    noise = torch.Generator().manual_seed(4)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_"
    return {
        f"{layer}{part}.lora_{half}.weight": torch.randn(shape, generator=noise) * 0.3
        for part in ("to_q", "to_out_0")
        for half, shape in (("down", (4, 64)), ("up", (64, 4)))
    }


def stock_lora(model: Any, strength: float = 0.8) -> Any:
    """The same merged, as Load LoRA does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, stock_lora_weights(), strength, 0)[0]


def put_adapter(pack: Pack, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write an adapter to models/easyref; returns its name in the graph."""
    write(pack.base / "models" / "easyref" / name, tensors)
    return name
