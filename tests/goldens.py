"""The golden set, and small random adapters made on the spot, for every test of the core.

`data/official_a/README.md` says what each golden value is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.layer_pooling import POOLING
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import GroupPlan, Reference, plan_group
from easyref_core.encode.layer_pooling import add_layer_pools
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.qwen2vl.config import MllmConfig, VisionConfig
from easyref_core.qwen2vl.decoder import rope
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "official_a"
ADAPTER = GOLDEN / "easyref.safetensors"
MLLM = GOLDEN / "mllm"
UNET = GOLDEN / "unet"
IMAGE_SIZE = 84
CASES = ("one_ref_prompt", "four_refs_prompt", "four_refs_empty", "uncond_black")
BODY = "multimodal_llm."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

Tensors = dict[str, torch.Tensor]

# A model so small that it costs nothing, with Qwen2-VL's head sizes (128 and 80), so that its
# sizes can be told from its weights. Its vocabulary is the golden tokenizer's.
TINY = MllmConfig(
    hidden_size=128,
    intermediate_size=96,
    num_layers=4,
    num_heads=1,
    num_kv_heads=1,
    vocab_size=448,
    vision=VisionConfig(embed_dim=80, depth=1, num_heads=1, mlp_dim=160, hidden_size=128),
)
TOKEN_WIDTH = 48
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2": 32,
    "mid_block.attentions.0.transformer_blocks.0.attn2": 64,
}


@cache
def description() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


@cache
def expected() -> Tensors:
    return load_file(GOLDEN / "expected.safetensors")


def adapter_tensors() -> Tensors:
    """A fresh copy of the golden adapter's tensors."""
    return load_file(ADAPTER)


def pooled_adapter(*aggregations: str, shape: str = "blocks", seed: int | None = 0) -> Tensors:
    """The golden adapter's tensors with layer pooling: random, or new where there is no seed."""
    encoder = plan_encoder(load_checkpoint(ADAPTER), MLLM).build()
    for aggregation in aggregations:
        add_layer_pools(encoder, aggregation, shape)
    if seed is not None:
        randomise(encoder.mllm_layer_pooling, seed)
    pools = {n: t for n, t in encoder.state_dict().items() if n.startswith(POOLING)}
    return adapter_tensors() | pools


def user_prompt(case: str) -> str:
    """What the person typed in a golden case, without the instruction before it."""
    details = description()
    return details["cases"][case]["system_prompt"].removeprefix(details["prompt_prefix"])


def pictures(case: str) -> list[Image.Image]:
    refs = description()["cases"][case]["refs"]
    if isinstance(refs, str):
        return [Image.new("RGB", (512, 512))]
    return [Image.open(GOLDEN / ref).convert("RGB") for ref in refs]


def references(case: str, **options: Any) -> list[Reference]:
    return [Reference(picture, **options) for picture in pictures(case)]


def plan_of(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    group: Sequence[Reference],
    prompt: str = "",
    **settings: Any,
) -> GroupPlan:
    """Plan a group for an encoder, which need not have files."""
    pools = encoder.mllm_layer_pooling
    checkpoint: Any = SimpleNamespace(
        pools=pools.sizes.pools if pools is not None else (),
        mllm_layers=pools.sizes.layers if pools is not None else None,
        identity="it",
        name="it.safetensors",
        num_tokens=encoder.num_tokens,
        final_layers=len(encoder.mllm_final_layer.layers),
        image_size=336,
    )
    encoder_plan = EncoderPlan(checkpoint, encoder.config, None, {})
    return plan_group(encoder_plan, tokenizer, group, prompt, **settings)


def encode(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    group: Sequence[Reference],
    prompt: str = "",
    **options: Any,
) -> ReferenceTokens:
    """Plan and encode a group; `options` are those of `plan_group` and `encode_references`."""
    names = options.keys() & {"device", "progress", "cache"}
    run = {name: options.pop(name) for name in names}
    return encode_references(encoder, plan_of(encoder, tokenizer, group, prompt, **options), **run)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference; shapes must agree (broadcasting would hide a mistake)."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max())


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The code inside must refuse with one clean sentence or two that name all of `parts`."""
    with pytest.raises(EasyRefError) as raised:
        yield
    text = str(raised.value)
    for part in parts:
        assert str(part) in text, f"{part!r} is not said in: {text}"
    assert "Traceback" not in text
    assert text.endswith((".", ")")), text


def without(tensors: Mapping[str, torch.Tensor], *parts: str) -> Tensors:
    """The tensors whose names contain none of `parts`."""
    return {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or None)
    return path


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill a module with random weights that neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * weight.flatten(1).shape[1] ** -0.5)
            else:
                weight.copy_(0.1 * noise + float("norm" in name or "ln_q" in name))
    return module.eval()


def random_encoder(
    num_tokens: int = 16, final_layers: int = 1, seed: int = 0, **sizes: Any
) -> EasyRefEncoder:
    """A tiny encoder with random weights; `sizes` replace those of `TINY`."""
    config = replace(TINY, **sizes)
    encoder = EasyRefEncoder(config, num_tokens, TOKEN_WIDTH, final_layers)
    randomise(encoder, seed)
    with torch.no_grad():
        encoder.mllm_final_layer.reference_tokens.mul_(config.hidden_size**0.5)
    return encoder


def body_states(encoder: EasyRefEncoder, embeds: torch.Tensor) -> torch.Tensor:
    """Hidden states after the body's norm ("penultimate"): [B, L, hidden], like `embeds`."""
    model = encoder.multimodal_llm.model
    position = rope(encoder.config, embeds.shape[1], embeds.device, embeds.dtype)
    for layer in model.layers:
        embeds = layer(embeds, position)
    return model.norm(embeds)


def random_adapter(encoder: EasyRefEncoder, rank: int = 0, seed: int = 0) -> Tensors:
    """A whole adapter file's tensors around an encoder, in the official layout."""
    tensors = {n: t.clone() for n, t in encoder.state_dict().items()}
    patch = BODY + "visual.patch_embed.proj.weight"
    tensors[patch] = tensors[patch].unflatten(1, (3, 2, 14, 14))
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    for layer, width in LAYERS.items():
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"unet.{layer}.processor.{part}.weight"] = noise(width, TOKEN_WIDTH)
        if rank:
            for part in ("to_q", "to_k", "to_v", "to_out"):
                inputs = TOKEN_WIDTH if part in ("to_k", "to_v") else width
                name = f"unet.{layer}.processor.{part}_lora"
                tensors[f"{name}.down.weight"] = noise(rank, inputs)
                tensors[f"{name}.up.weight"] = noise(width, rank)
    return tensors


def newer_layout(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The MLLM's names as transformers 5 writes them."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = BODY if name.startswith(BODY) else ""
        local = name.removeprefix(BODY)
        if local.startswith("visual."):
            local = f"model.{local}"
        elif local.startswith("model."):
            local = f"model.language_model.{local.removeprefix('model.')}"
        renamed[prefix + local] = tensor
    return renamed


def mllm_directory(path: Path, config: MllmConfig = TINY, weights: Tensors | None = None) -> Path:
    """A Qwen2-VL directory for `config`, with the golden tokenizer."""
    path.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(MLLM / name, path / name)
    vision = config.vision
    sixteenth = config.head_dim // 16
    content = {
        "model_type": "qwen2_vl",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [2 * sixteenth, 3 * sixteenth, 3 * sixteenth],
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "embed_dim": vision.embed_dim,
            "depth": vision.depth,
            "num_heads": vision.num_heads,
            "mlp_ratio": vision.mlp_dim // vision.embed_dim,
            "hidden_size": vision.hidden_size,
        },
    }
    (path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    if weights is not None:
        write(path / "model.safetensors", weights)
    return path


def bare_mllm(adapter: Mapping[str, torch.Tensor]) -> Tensors:
    """The MLLM's own weights as in its folder, last layer included, out of a whole adapter's."""
    body = {n.removeprefix(BODY): t for n, t in adapter.items() if n.startswith(BODY)}
    last = f"model.layers.{TINY.num_layers - 1}."
    first = "mllm_final_layer.layers.0."
    return body | {
        last + n.removeprefix(first): t for n, t in adapter.items() if n.startswith(first)
    }


def sparse_file(
    path: Path, shapes: Mapping[str, list[int]], dtype: str = "BF16", fp8: bool = False
) -> Path:
    """A safetensors file of these shapes, all zeros, that takes no room on the disk.

    Args:
        fp8: matrices in one byte, with a scale a row.
    """
    header: dict[str, Any] = {}
    end = 0

    def add(name: str, dtype: str, shape: list[int]) -> None:
        nonlocal end
        width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        start, end = end, end + torch.Size(shape).numel() * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    for name, shape in shapes.items():
        small = fp8 and len(shape) == 2 and name.endswith(".weight")
        add(name, "F8_E4M3" if small else dtype, shape)
        if small:
            add(name.removesuffix("weight") + "scale_weight", "F32", [shape[0], 1])
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return path


@cache
def real_shapes(lora: bool = True) -> dict[str, list[int]]:
    """Every key and shape of an adapter of the released size, its MLLM included."""

    def read(name: str) -> Any:
        return json.loads((DATA / name).read_text(encoding="utf-8"))

    shapes = dict(read("state_dict_keys_qwen2vl2b.json"))
    first = f"{BODY}model.layers.0."
    shapes |= {
        f"mllm_final_layer.layers.0.{name.removeprefix(first)}": shape
        for name, shape in list(shapes.items())
        if name.startswith(first)
    }
    shapes |= {
        "mllm_final_layer.norm.weight": [1536],
        "mllm_final_layer.reference_tokens": [64, 1536],
        "image_proj_model.proj.0.weight": [1536, 1536],
        "image_proj_model.proj.0.bias": [1536],
        "image_proj_model.proj.2.weight": [2048, 1536],
        "image_proj_model.proj.2.bias": [2048],
        "image_proj_model.proj.3.weight": [2048],
        "image_proj_model.proj.3.bias": [2048],
    }
    return shapes | read("state_dict_keys_sdxl_processors.json")[f"use_lora_{lora}"]
