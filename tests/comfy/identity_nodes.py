"""What the tests of EasyRef Identity share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfyhost import Pack


def picture(seed: int, width: int = 128, height: int = 128) -> torch.Tensor:
    """ComfyUI's IMAGE of coloured patches, [1, H, W, 3]."""
    noise = torch.Generator().manual_seed(seed)
    small = torch.rand((1, 3, 8, 8), generator=noise)
    return torch.nn.functional.interpolate(small, (height, width)).movedim(1, -1)


def identity(pack: Pack, model: Any, vae: Any, **settings: Any) -> Any:
    """The Identity node with its defaults and one picture, save for `settings`."""
    if not {"images", "references"} & settings.keys():
        settings["images"] = picture(1)
    defaults = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "reuse_steps": 1}
    return pack.run("EasyRefIdentity", model, vae, **(defaults | settings))


class Calls:
    """Calls of a model's UNet.

    Attributes:
        inputs: latents of each call.
        others: its other arguments by name.
    """

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.others: list[dict[str, Any]] = []

    @property
    def rows(self) -> list[int]:
        return [x.shape[0] for x in self.inputs]


@contextmanager
def calls_of(model: Any) -> Iterator[Calls]:
    """Note all calls of the UNet inside."""
    calls = Calls()

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.inputs.append(args[0].clone())
        calls.others.append({"timesteps": args[1], **kwargs})

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class Projections:
    """What went into and came out of a self-attention layer's projections, call by call."""

    def __init__(self, attention: Any) -> None:
        self.heads = attention.heads
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        modules = {name: getattr(attention, name) for name in ("to_q", "to_k", "to_v")}
        modules["to_out"] = attention.to_out[0]
        self._handles = [
            module.register_forward_hook(self._note(name)) for name, module in modules.items()
        ]

    def _note(self, name: str) -> Any:
        def note(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self.inputs.setdefault(name, []).append(args[0].clone())
            self.outputs.setdefault(name, []).append(out.clone())

        return note

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def projections_of(pack: Pack, model: Any) -> Iterator[dict[str, Projections]]:
    """diffusers' layer name -> what its projections do inside."""
    layers = pack.part("nodes.host.unet_layers").self_attention_layers(model)
    unet = model.model.diffusion_model
    watched = {n: Projections(unet.get_submodule(one.module)) for n, one in layers.items()}
    try:
        yield watched
    finally:
        for one in watched.values():
            one.remove()


def attention64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of [B, T, C] tensors, in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
