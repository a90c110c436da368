"""The adapter's weights for the UNet: key and value projections of the reference tokens, and LoRA.

Weights stay in their file and are read when needed, the projections layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import EasyRefError
from ..tokens.reference_tokens import ReferenceTokens, describe
from ..untrusted import escaped
from ..weight_file import GetTensor
from ..weight_file.tensors import all_finite, dtype_name
from .checkpoint import AdapterCheckpoint
from .identity import IdentityLora
from .parts import IDENTITY_LORA, KEY_VALUE


@dataclass(frozen=True, eq=False)
class TokenKeyValues:
    """Keys and values of reference tokens for every cross-attention layer. They do not depend on
    the timestep.

    Attributes:
        layers: layer -> (key, value), each [2 * B, N, C]: B groups of `uncond`, then of
            `cond`, the usual order of a batch for CFG.
        batch: B.
    """

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    batch: int


@torch.no_grad()
def project_tokens(
    checkpoint: AdapterCheckpoint,
    tokens: ReferenceTokens,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TokenKeyValues:
    """Keys and values of the tokens, computed in float32 and stored in `dtype` on `device`.

    Only one layer's projections are on the device at a time.

    Raises:
        EasyRefError: the adapter's file changed, or its weights are not numbers (named).
    """
    both = torch.cat((tokens.uncond, tokens.cond)).to(device, torch.float32)  # [2B, N, W]
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with checkpoint.file.open() as get:
        for layer, parts in checkpoint.cross_attention.items():
            key, value = (
                F.linear(both, _float32_on(both.device, get(parts[part]))).to(dtype)
                for part in KEY_VALUE
            )
            layers[layer] = (key, value)
    # One check for all layers: one for each would synchronise a GPU a hundred times.
    finite = torch.stack([torch.isfinite(t).all() for pair in layers.values() for t in pair])
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise EasyRefError(
            f"The reference tokens overflow in {escaped(list(layers)[number // 2])} "
            f"({KEY_VALUE[number % 2]}) of {checkpoint.name} as {dtype_name(dtype)}: the adapter's "
            "weights hold NaN, or the values are too large. Get the file again, or run the model "
            "in bf16."
        )
    return TokenKeyValues(layers, tokens.batch)


def projection_bytes(
    checkpoint: AdapterCheckpoint, tokens: ReferenceTokens, dtype: torch.dtype
) -> int:
    """Memory of `project_tokens` on the device: its result, and one projection in the file's dtype
    and in float32."""
    shapes = [
        checkpoint.file.tensors[parts[part]].shape
        for parts in checkpoint.cross_attention.values()
        for part in KEY_VALUE
    ]
    rows = 2 * tokens.batch * tokens.num_tokens
    result = sum(width for width, _ in shapes) * rows * dtype.itemsize
    largest = max((width * context for width, context in shapes), default=0)
    return result + largest * 8


def _float32_on(device: torch.device, weight: torch.Tensor) -> torch.Tensor:
    """A weight in float32 on the device, moved in the file's dtype: half precision takes half the
    transfer."""
    if not _has_dtype(device, weight.dtype):
        weight = weight.float()
    return weight.to(device).float()


def _has_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """MPS has no float64, and neither MPS nor DirectML every small dtype."""
    usual = dtype in (torch.float32, torch.float16)
    return usual or device.type not in ("mps", "privateuseone")


def lora_weights(checkpoint: AdapterCheckpoint) -> dict[str, torch.Tensor]:
    """LoRA under the official names (`unet.<layer>.processor.to_q_lora.up.weight`), without alpha:
    it adds exactly up @ down.

    Raises:
        EasyRefError: the file changed, or a weight is not a number (named).
    """
    names = {
        f"unet.{layer}.processor.{part}_lora.{half}.weight": name
        for layer, parts in checkpoint.lora.items()
        for part, halves in parts.items()
        for half, name in halves.items()
    }
    with checkpoint.file.open() as get:
        return {official: read_finite(checkpoint, get, name) for official, name in names.items()}


def identity_lora_weights(checkpoint: AdapterCheckpoint) -> dict[str, IdentityLora]:
    """The identity LoRA: self-attention layer -> its weights, in the file's dtype; empty without.

    Raises:
        EasyRefError: the file changed, or a weight is not a number (named).
    """
    if not checkpoint.identity_lora:
        return {}
    with checkpoint.file.open() as get:
        return {
            layer: IdentityLora(
                *(
                    read_finite(checkpoint, get, parts[part][half])
                    for part in IDENTITY_LORA
                    for half in ("down", "up")
                )
            )
            for layer, parts in checkpoint.identity_lora.items()
        }


def read_finite(checkpoint: AdapterCheckpoint, get: GetTensor, name: str) -> torch.Tensor:
    """One weight of the adapter by its name in the file.

    Args:
        get: of the opened file.

    Raises:
        EasyRefError: it holds values that are not numbers.
    """
    weight = get(name)
    if not all_finite(weight):
        raise EasyRefError(
            f"{checkpoint.name}: {escaped(name)} holds values that are not numbers (NaN or "
            "infinite). The file is damaged; download it again."
        )
    return weight


def check_model_layers(
    checkpoint: AdapterCheckpoint, layers: Mapping[str, tuple[int, int]], model: str
) -> None:
    """Raise EasyRefError unless the adapter was made for this UNet.

    Args:
        layers: the UNet's cross-attention layers -> (query width, context width).
        model: name of the UNet, for messages.
    """
    if not layers:
        raise EasyRefError(
            f"{model} has no cross-attention layers that EasyRef knows; the adapter steers SDXL. "
            "Connect an SDXL model."
        )
    contexts = {context for _, context in layers.values()}
    if contexts != {checkpoint.token_width}:
        widths = ", ".join(map(str, sorted(contexts)))
        kind = {
            768: " (Stable Diffusion 1.5's)",
            1024: " (Stable Diffusion 2's)",
            1280: " (the SDXL refiner's)",
        }.get(min(contexts), "")
        raise EasyRefError(
            f"{model} reads text of width {widths}{kind}, but {checkpoint.name} makes reference "
            f"tokens of width {checkpoint.token_width}. Connect an SDXL base model."
        )
    missing = sorted(checkpoint.cross_attention.keys() - layers.keys())
    extra = sorted(layers.keys() - checkpoint.cross_attention.keys())
    if missing or extra:
        raise EasyRefError(
            f"{model} has {len(layers)} cross-attention layers and {checkpoint.name} was made for "
            f"{len(checkpoint.cross_attention)}; they differ, first at "
            f"{escaped((missing + extra)[0])}. "
            "Connect a model of the architecture the adapter was trained on (SDXL base)."
        )
    for layer, parts in checkpoint.cross_attention.items():
        width = checkpoint.file.tensors[parts["to_k_ip"]].shape[0]
        if width != layers[layer][0]:
            raise EasyRefError(
                f"{model} is {layers[layer][0]} wide at {layer}, but {checkpoint.name} was made "
                f"for {width}. Connect a model of the architecture the adapter was trained on."
            )


def check_tokens(checkpoint: AdapterCheckpoint, tokens: ReferenceTokens) -> None:
    """Raise EasyRefError unless these tokens were made by this adapter."""
    own = (
        f"{checkpoint.name} ({checkpoint.identity}, {checkpoint.num_tokens} tokens of width "
        f"{checkpoint.token_width})"
    )
    fits = tokens.width == checkpoint.token_width and tokens.num_tokens % checkpoint.num_tokens == 0
    if not checkpoint.made(tokens.adapter) or not fits:
        same = fits and tokens.adapter.startswith(checkpoint.identity)
        mllm = " with an MLLM of another config.json" if same else ""
        raise EasyRefError(
            f"These reference tokens were made by {describe(tokens)}{mllm}, but the adapter here "
            f"is {own}. Load what made them, or encode the references again."
        )
