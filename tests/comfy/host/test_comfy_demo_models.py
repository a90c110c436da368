"""Model directories as ComfyUI objects, on the plain and on the dynamic patcher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
from comfyhost import Pack, stock
from dynamic_vram import Gpu
from goldens import UNET
from safetensors.torch import load_file, save_file


@pytest.fixture
def load(pack: Pack) -> Callable[[str, Path], Any]:
    """Loads one of the demo set's directories by its name."""
    models = pack.part("nodes.host.demo_models")
    loaders = {
        "unet": models.load_unet_directory,
        "controlnet": models.load_controlnet,
        "text_encoders": models.load_text_encoders,
        "vae": models.load_vae,
    }
    return lambda kind, directory: loaders[kind](directory)


CASES = [
    ("unet", "", "mid_block.attentions.0.proj_in.weight"),
    ("unet", "", "conv_in.weight"),
    ("unet", "", "time_embedding.linear_1.bias"),
    ("controlnet", "", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    ("controlnet", "", "controlnet_mid_block.weight"),
    ("text_encoders", "clip_g", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ("text_encoders", "clip_l", "text_model.embeddings.position_embedding.weight"),
    ("text_encoders", "clip_g", "text_projection.weight"),
    ("vae", "", "encoder.layers.0.weight"),
]


def check_wrong_shape(
    pack: Pack,
    load: Callable[[str, Path], Any],
    copied: Path,
    kind: str,
    part: str,
    weight: str,
) -> None:
    (file,) = (copied / part).glob("*.safetensors")
    state = load_file(file)
    tensor, last = state[weight], weight.split(".", 2)[-1]
    save_file({**state, weight: tensor.repeat(*[1] * (tensor.ndim - 1), 2)}, file)
    with pack.refused(last, list(tensor.shape), f"{2 * tensor.shape[-1]}]"):
        load(kind, copied)
    save_file({name: tensor for name, tensor in state.items() if name != weight}, file)
    with pack.refused("missing", last):
        load(kind, copied)
    save_file({**state, "one.more.weight": torch.zeros(1)}, file)
    with pack.refused("unexpected", "one.more.weight"):
        load(kind, copied)


@pytest.fixture
def copied(demo: Any, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(demo.directory / kind, tmp_path / kind))


@pytest.mark.parametrize(("kind", "part", "weight"), CASES)
def test_a_weight_that_does_not_fit_is_named(
    pack: Pack, load: Any, copied: Any, kind: str, part: str, weight: str
) -> None:
    check_wrong_shape(pack, load, copied(kind), kind, part, weight)


@pytest.mark.parametrize(("kind", "part", "weight"), CASES)
def test_a_weight_that_does_not_fit_is_named_under_dynamic_vram(
    pack: Pack, load: Any, copied: Any, gpu: Gpu, kind: str, part: str, weight: str
) -> None:
    check_wrong_shape(pack, load, copied(kind), kind, part, weight)


def test_every_model_can_be_built_again(pack: Pack, gpu: Gpu, load: Any, demo: Any) -> None:
    """As ComfyUI does it to compile a model, to put hooks on it, and for another GPU."""
    for kind in ("unet", "text_encoders", "vae"):
        loaded = load(kind, demo.directory / kind)
        patcher = getattr(loaded, "patcher", loaded)
        assert patcher.is_dynamic()
        plain = patcher.clone(disable_dynamic=True)
        assert not plain.is_dynamic()
        copy = patcher.deepclone_multigpu()
        assert copy.is_dynamic()
        for other in (plain, copy):
            assert other.model is not patcher.model
            theirs, ours = other.model.state_dict(), patcher.model.state_dict()
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[name].float(), ours[name].float()) for name in ours), kind


def test_the_demo_model_can_be_compiled(pack: Pack, gpu: Gpu, load: Any, demo: Any) -> None:
    """ComfyUI compiles plain models only, so it builds one again."""
    compiled = stock(
        "comfy_extras.nodes_torch_compile.TorchCompileModel",
        load("unet", demo.directory / "unet"),
        "inductor",
    )
    assert not compiled.is_dynamic()


def test_a_plain_model_beside_dynamic_ones_computes_in_one_dtype(pack: Pack, gpu: Gpu) -> None:
    """Layers that ComfyUI fills when it loads them would keep the file's."""
    load = pack.part("nodes.host.demo_models").load_unet_directory
    model = load(UNET, torch.float16).clone(disable_dynamic=True)
    unet = model.model.diffusion_model
    assert {weight.dtype for weight in unet.parameters()} == {torch.float16}


def test_the_demo_graph_runs_under_dynamic_vram(pack: Pack, gpu: Gpu, load: Any, demo: Any) -> None:
    """Texts, ControlNet, references, sampling and decoding; devices never mix."""
    model, clip, vae, control_net = (
        load(kind, demo.directory / kind) for kind in ("unet", "text_encoders", "vae", "controlnet")
    )
    easyref = pack.part("nodes.link_types").EasyRefModel.of(demo.adapter_file, demo.mllm_directory)
    tokens = comfyhost.random_tokens(pack, easyref, seed=1)
    steered = comfyhost.apply(pack, model, easyref, tokens, lora_strength=0.0)
    with gpu.waiting_allowed():
        positive = stock("nodes.CLIPTextEncode", clip, "a fox at sea")
        hint = torch.rand(1, 128, 128, 3)
        positive = stock("nodes.ControlNetApply", positive, control_net, hint, 1.0)
        negative = stock("nodes.CLIPTextEncode", clip, "")
    x = comfyhost.latents(1, 16, 16)

    def later(model: Any) -> dynamic_vram.Record:
        guider = comfyhost.guider(model, 5.0, positive, negative)
        return dynamic_vram.sample(gpu, guider, x, (10.0, 1.0), strict=False)[1]

    # ComfyUI itself asks a ControlNet for its part of the sampling, call by call.
    assert later(steered) == later(model)
    with gpu.waiting_allowed():
        assert stock("nodes.VAEDecode", vae, {"samples": x}).shape == hint.shape
    for handle in (model, clip.patcher, vae.patcher, control_net.control_model_wrapped):
        assert handle.is_dynamic()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_out_channels", []),
        ("block_out_channels", [0, 64, 128]),
        ("block_out_channels", [1e9, 64, 128]),
        ("down_block_types", None),
        ("down_block_types", [1, 2, 3]),
        ("layers_per_block", "two"),
        ("transformer_layers_per_block", [1, 2]),
        ("attention_head_dim", {}),
        ("cross_attention_dim", True),
        ("in_channels", -4),
    ],
)
def test_a_configuration_of_wrong_kinds_is_refused(
    pack: Pack, load: Any, copied: Any, field: str, value: Any
) -> None:
    folder = copied("unet")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"num_attention_heads": None, field: value}
    path.write_text(json.dumps(config), "utf-8")
    with pack.refused(folder):
        load("unet", folder)
    path.write_text("[]", "utf-8")
    with pack.refused(path, "a list"):
        load("unet", folder)
