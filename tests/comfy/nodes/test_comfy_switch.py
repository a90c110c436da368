"""EasyRef Demo Models between the loaders and the graph: yours, or the demo's, never both."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from comfyhost import Pack

NEEDED = ("model", "clip", "vae", "easyref")


@pytest.fixture
def yours() -> dict[str, Any]:
    """What loaders give; the node must not look into it."""
    return {name: object() for name in NEEDED}


def test_connected_models_are_passed_on_as_they_are(pack: Pack, yours: dict[str, Any]) -> None:
    others = {"control_net": object(), "latent": {"samples": torch.zeros(1, 4, 128, 128)}}
    outputs = pack.nodes["EasyRefDemoModels"].execute(**yours, **others).result
    wanted = [*yours.values(), *others.values()]
    assert all(found is given for found, given in zip(outputs, wanted, strict=True))


def test_what_is_not_connected_beside_your_models_stops_only_what_needs_it(
    pack: Pack, yours: dict[str, Any]
) -> None:
    from comfy_execution.graph_utils import ExecutionBlocker

    *models, control_net, latent = pack.nodes["EasyRefDemoModels"].execute(**yours).result
    assert models == [*yours.values()]
    for output, remedy in ((control_net, "Load ControlNet Model"), (latent, "Empty Latent Image")):
        assert isinstance(output, ExecutionBlocker)
        assert output.message.endswith(".")
        assert remedy in output.message


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((128, 128), (16, 16)),  # 1024 x 1024 pixels
        ((152, 104), (20, 12)),
        ((160, 80), (24, 12)),
        ((1024, 16), (128, 4)),
        ((16, 16), (16, 16)),
        ((20, 12), (20, 12)),
        ((4, 9), (4, 9)),
    ],
)
def test_a_latent_for_the_demo_models_keeps_its_shape_and_loses_its_size(
    pack: Pack, size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    latent = {"samples": torch.rand(3, 4, *size), "batch_index": [4, 5, 6]}
    found = pack.part("nodes.host.demo_latents").shrink_latent(latent, 128)
    assert found["samples"].shape == (3, 4, *wanted)
    assert found["batch_index"] == [4, 5, 6]
    assert latent["samples"].shape == (3, 4, *size)
    if size == wanted:
        assert torch.equal(found["samples"], latent["samples"])
    else:
        means = [one["samples"].mean().item() for one in (found, latent)]
        assert means[0] == pytest.approx(means[1], abs=0.02)


def test_the_demo_models_bring_a_latent_of_their_size(pack: Pack) -> None:
    latent = pack.nodes["EasyRefDemoModels"].execute().result[5]
    assert latent["samples"].shape == (1, 4, 16, 16)
    given = {"samples": torch.zeros(2, 4, 128, 128)}
    smaller = pack.nodes["EasyRefDemoModels"].execute(latent=given).result[5]
    assert torch.equal(smaller["samples"], torch.zeros(2, 4, 16, 16))


def test_your_latent_is_passed_on_beside_your_adapter(pack: Pack, easyref: Any) -> None:
    latent = {"samples": torch.zeros(2, 4, 128, 128)}
    assert pack.run("EasyRefDemoLatent", latent, easyref) is latent


def test_a_latent_is_made_to_fit_the_demo_adapter(pack: Pack) -> None:
    """Img2img latents and the mask of an inpainting go along."""
    easyref = pack.nodes["EasyRefDemoModels"].execute().result[3]
    mask = torch.zeros(1, 1, 1024, 1024)
    latent = {"samples": torch.rand(3, 4, 128, 128), "noise_mask": mask}
    found = pack.run("EasyRefDemoLatent", latent, easyref)
    assert found["samples"].shape == (3, 4, 16, 16)
    assert found["samples"].mean() == pytest.approx(latent["samples"].mean().item(), abs=0.02)
    assert found["noise_mask"] is mask
    small = {"samples": torch.rand(1, 4, 16, 16)}
    assert pack.run("EasyRefDemoLatent", small, easyref)["samples"] is small["samples"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_gap_is_named(pack: Pack, yours: dict[str, Any], count: int) -> None:
    for missing in combinations(NEEDED, count):
        given = {name: value for name, value in yours.items() if name not in missing}
        with pack.refused(f"has {', '.join(given)} connected, but not {', '.join(missing)}:"):
            pack.nodes["EasyRefDemoModels"].execute(**given)


def test_a_controlnet_alone_is_refused(pack: Pack) -> None:
    with pack.refused("has control_net connected, but not model, clip, vae, easyref"):
        pack.nodes["EasyRefDemoModels"].execute(control_net=object())
