"""References on models that ComfyUI builds again: for hooks on conditionings, for several GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
from comfyhost import (
    Pack,
    apply,
    area,
    combine,
    euler,
    guider,
    latents,
    predict,
    random_text,
    random_tokens,
    sigmas,
    stock_lora,
    stock_lora_weights,
    text,
)
from dynamic_vram import Gpu
from goldens import difference
from identity_nodes import identity

CFG = 5.0
CLOSE = 5e-5
TOO_OLD = "this ComfyUI is from before several GPUs"


def hooked(conditioning: Any, strength: float = 0.8) -> Any:
    """A conditioning with a LoRA of its own, as Create Hook LoRA and Set Hooks give it."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(stock_lora_weights(), strength, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)


def test_a_lora_as_hook_is_the_same_as_loaded(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """ComfyUI then merges it during the sampling, on top of the adapter's own."""
    settings = {"weight": 0.7, "mask": torch.ones(1, 8, 8), "end_percent": 0.9}
    expected = predict(apply(pack, stock_lora(unet), easyref, tokens, **settings), CFG)
    model = apply(pack, unet, easyref, tokens, **settings)
    texts = {"positive": hooked(text()), "negative": hooked(text("negative"))}
    for _ in range(2):
        assert difference(predict(model, CFG, **texts), expected) < CLOSE
    assert difference(predict(model, CFG), expected) > 0.01
    again = apply(pack, unet, easyref, tokens, **settings)
    assert difference(predict(model, CFG), predict(again, CFG)) < CLOSE


def test_hooks_under_dynamic_vram_use_a_plain_model_with_the_same_references(
    pack: Pack, gpu: Gpu, fresh_easyref: Any
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, comfyhost.golden_unet(pack), fresh_easyref, tokens, weight=0.7)
    cfg_guider = guider(model, CFG, hooked(text()), hooked(text("negative")))
    delegate = cfg_guider.model_patcher
    assert not delegate.is_dynamic()
    assert delegate.patches.keys() == model.patches.keys()
    _, later = dynamic_vram.sample(gpu, cfg_guider, latents(), (10.0, 1.0))
    assert not later.waits


@pytest.fixture
def split(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """MultiGPU CFG Split on two devices: the CPU by two names, so that results can be compared."""
    import comfy.model_management as mm

    module = pytest.importorskip(
        "comfy_extras.nodes_multigpu", reason=TOO_OLD, exc_type=ImportError
    )
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: devices)
    yield lambda model: module.MultiGPUCFGSplitNode.execute(model, 2)[0]
    mm.unload_all_models()  # as long as the second device is known


def test_work_split_over_two_gpus_gives_the_same_picture(
    pack: Pack, unet: Any, easyref: Any, split: Callable[[Any], Any]
) -> None:
    """The node may stand before or after EasyRef Apply."""
    steps, x = sigmas(unet, 901.0, 601.0, 301.0), latents(2) * 14
    one, other = random_tokens(pack, easyref, seed=1, batch=2), random_tokens(pack, easyref, seed=2)
    carrying = pack.run("EasyRefSetConditioning", text(), other, 0.5)
    masks = torch.rand((2, 40, 70), generator=torch.Generator().manual_seed(0))

    def steer(model: Any) -> Any:
        settings = {"mask": masks, "end_percent": 0.7, "curve": curve(pack)}
        model = apply(pack, model, easyref, one, **settings)
        return apply(pack, model, easyref, other, weight=0.4, mask=torch.ones(1, 8, 8))

    expected = euler(guider(steer(unet), CFG, carrying), x, steps)
    plain = euler(guider(unet, CFG), x, steps)
    assert difference(expected, plain) > 0.1
    for model in (split(steer(unet)), steer(split(unet))):
        calls = watch_devices(model)
        # Latents of about 30 after three steps.
        assert difference(euler(guider(model, CFG, carrying), x, steps), expected) < 20 * CLOSE
        assert calls == {torch.device("cpu"): 3, torch.device("cpu", 0): 3}


def test_identity_over_two_gpus_gives_the_same_picture(
    pack: Pack, unet: Any, demo: Any, split: Callable[[Any], Any]
) -> None:
    """Each device that has conditional rows reads the references itself."""
    steps, x = sigmas(unet, 901.0, 601.0, 301.0), latents(2, 16, 32) * 14
    halves = ((0.5, 1.0, 0.0, 0.0), (0.5, 1.0, 0.5, 0.0))
    areas = combine(*(area(random_text(n), half) for n, half in enumerate(halves, 1)))

    def read(model: Any) -> Any:
        given = {"mask": torch.ones(2, 8, 8), "reuse_steps": 2, "end_percent": 0.7}
        return identity(pack, model, demo.vae, **given)

    for positive, model in ((text(), split(read(unet))), (areas, read(split(unet)))):
        expected = euler(guider(read(unet), CFG, positive), x, steps)
        assert difference(expected, euler(guider(unet, CFG, positive), x, steps)) > 0.1
        found = euler(guider(model, CFG, positive), x, steps)
        assert difference(found, expected) < 20 * CLOSE


def test_identity_with_hooks_reads_the_references_with_the_weights_of_the_hooks(
    pack: Pack, unet: Any, demo: Any
) -> None:
    expected = predict(identity(pack, stock_lora(unet), demo.vae), CFG)
    texts = {"positive": hooked(text()), "negative": hooked(text("negative"))}
    assert difference(predict(identity(pack, unet, demo.vae), CFG, **texts), expected) < CLOSE
    assert difference(predict(identity(pack, unet, demo.vae), CFG), expected) > 0.01


def watch_devices(model: Any) -> Counter[torch.device]:
    """Counts the model calls of each device."""
    from comfy.patcher_extension import WrappersMP

    calls: Counter[torch.device] = Counter()

    def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or args[5]
        calls[options["multigpu_thread_device"]] += 1
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    return calls


def test_hooks_on_two_gpus(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, split: Callable[[Any], Any]
) -> None:
    expected = predict(apply(pack, stock_lora(unet), easyref, tokens), CFG)
    texts = {"positive": hooked(text()), "negative": hooked(text("negative"))}
    model = split(apply(pack, unet, easyref, tokens))
    assert difference(predict(model, CFG, **texts), expected) < CLOSE


def curve(pack: Pack) -> Any:
    inputs = pack.nodes["EasyRefWeightCurve"].GET_SCHEMA().inputs
    settings = {"shape": "linear", "end_value": 0.2}
    return pack.run("EasyRefWeightCurve", **({i.id: i.default for i in inputs} | settings))


def test_a_model_built_again_for_another_device_has_the_lora_once(
    pack: Pack, gpu: Gpu, fresh_easyref: Any
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, comfyhost.golden_unet(pack), fresh_easyref, tokens, lora_strength=0.8)
    for other in (model.clone(disable_dynamic=True), model.deepclone_multigpu()):
        assert other.model is not model.model
        assert other.patches.keys() == model.patches.keys()
        again = apply(pack, other, fresh_easyref, tokens, lora_strength=0.8)
        assert [len(found) for found in again.patches.values()] == [1] * len(again.patches)
        weaker = apply(pack, other, fresh_easyref, tokens, lora_strength=0.5)
        assert {found[0][0] for found in weaker.patches.values()} == {0.5}
