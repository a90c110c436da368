"""A ControlNet in the same graph: it gets the text only, and both act."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import (
    Pack,
    apply,
    euler,
    guider,
    latents,
    predict,
    random_text,
    random_tokens,
    sigmas,
    stock,
)
from goldens import difference

CFG = 5.0
EXACT = 2e-5


class ControlSpy:
    """What goes into a ControlNet and what comes out, call by call."""

    def __init__(self, control_net: Any) -> None:
        self.calls: list[tuple[dict[str, Any], list[torch.Tensor]]] = []
        self._network = control_net.control_model

    def __enter__(self) -> ControlSpy:
        self._handle = self._network.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        result = [t.clone() for name in sorted(out) for t in out[name]]
        self.calls.append((dict(kwargs), result))


@pytest.fixture
def texts(demo: Any) -> tuple[Any, Any]:
    """Positive and negative with the ControlNet attached, as ComfyUI's node does it."""
    noise = torch.Generator().manual_seed(6)
    hint = torch.rand((1, 128, 128, 3), generator=noise)
    positive, negative = random_text(1, pooled=64), random_text(2, pooled=64)
    positive = stock("nodes.ControlNetApply", positive, demo.control_net, hint, 1.0)
    for side in (positive, negative):
        side[0][1]["control_apply_to_uncond"] = True
    return positive, negative


def test_both_act_and_the_controlnet_gets_only_the_text(
    pack: Pack, demo: Any, demo_easyref: Any, texts: tuple[Any, Any]
) -> None:
    positive, negative = texts
    tokens = random_tokens(pack, demo_easyref, seed=3)
    x = latents(1)
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, tokens)
    with ControlSpy(demo.control_net) as with_references:
        both = predict(spy.watch(model), CFG, x, positive=positive, negative=negative)
    assert spy.max_error([(positive[0][0], tokens.cond), (negative[0][0], tokens.uncond)]) < EXACT
    with ControlSpy(demo.control_net) as without:
        control = predict(demo.model, CFG, x, positive=positive, negative=negative)
    for (given, out), (given_before, out_before) in zip(
        with_references.calls, without.calls, strict=True
    ):
        assert given["context"].shape[1:] == (77, 96)
        assert torch.equal(given["context"], given_before["context"])
        assert all(torch.equal(*pair) for pair in zip(out, out_before, strict=True))
    plain = random_text(1, pooled=64)
    references = predict(model, CFG, x, positive=plain, negative=negative)
    assert difference(both, control) > 0.01
    assert difference(both, references) > 0.01


def test_a_mask_and_a_window_beside_a_controlnet(
    pack: Pack, demo: Any, demo_easyref: Any, texts: tuple[Any, Any]
) -> None:
    positive, negative = texts
    tokens = random_tokens(pack, demo_easyref, seed=3)

    def run(**settings: Any) -> torch.Tensor:
        model = apply(pack, demo.model, demo_easyref, tokens, **settings)
        return predict(model, CFG, latents(1), positive=positive, negative=negative)

    everywhere = run()
    assert difference(run(mask=torch.ones(1, 8, 8), end_percent=0.9), everywhere) < 1e-4
    assert difference(run(end_percent=0.1), run(weight=0.0)) < 1e-4
    assert difference(run(weight=0.0), everywhere) > 0.01


class TypeEmbedding(torch.nn.Module):
    """What a union ControlNet adds to the time embedding for the kinds of its hints."""

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(kinds, width))

    def forward(self, kinds: list[int], dtype: Any, device: Any) -> torch.Tensor:
        return self.weights[kinds].sum(0, keepdim=True).to(device, dtype)


def as_union(control_net: Any, kinds: int = 6) -> Any:
    """A copy with the parts that make it a union ControlNet, for hints of several kinds."""
    from comfy.cldm.cldm import ResBlockUnionControlnet

    union = control_net.copy()
    network = union.control_model = copy.deepcopy(control_net.control_model)
    width = network.model_channels
    with torch.random.fork_rng():
        torch.manual_seed(12)
        network.num_control_type = kinds
        network.task_embedding = torch.nn.Parameter(torch.randn(kinds, width))
        block = ResBlockUnionControlnet(width, 1, operations=torch.nn)
        network.transformer_layes = torch.nn.Sequential(block)
        network.spatial_ch_projs = torch.nn.Linear(width, width)
        network.control_add_embedding = TypeEmbedding(kinds, 4 * width)
    union.control_model_wrapped = type(control_net.control_model_wrapped)(
        network, load_device=control_net.load_device, offload_device=torch.device("cpu")
    )
    return union


def test_two_controlnets_in_windows_of_their_own_one_of_union_kind(
    pack: Pack, demo: Any, demo_easyref: Any
) -> None:
    noise = torch.Generator().manual_seed(6)
    hints = [torch.rand((1, 128, 128, 3), generator=noise) for _ in range(2)]
    nodes = "comfy_extras.nodes_controlnet.SetUnionControlNetType"
    first, union = demo.control_net, stock(nodes, as_union(demo.control_net), "depth")
    node = importlib.import_module("nodes").ControlNetApplyAdvanced()
    sides = (random_text(1, pooled=64), random_text(2, pooled=64))
    sides = node.apply_controlnet(*sides, first, hints[0], 0.9, 0.0, 0.5)
    sides = node.apply_controlnet(*sides, union, hints[1], 0.8, 0.3, 1.0)
    # Places 0.1, 0.4, 0.6 and 0.9 of the schedule.
    steps = sigmas(demo.model, 899.0, 599.0, 399.0, 99.0)
    tokens = random_tokens(pack, demo_easyref, seed=3)

    def run(model: Any) -> tuple[torch.Tensor, list[Any], list[Any]]:
        with ControlSpy(first) as one, ControlSpy(union) as two:
            return euler(guider(model, CFG, *sides), latents(1), steps), one.calls, two.calls

    spy = Spy(pack, demo_easyref, demo.model)
    steered = apply(pack, demo.model, demo_easyref, tokens)
    both, *calls = run(spy.watch(steered))
    truth = [(sides[0][0][0], tokens.cond), (sides[1][0][0], tokens.uncond)]
    assert spy.max_error(truth) < EXACT
    control, *before = run(demo.model)
    assert [len(of_net) for of_net in calls] == [len(of_net) for of_net in before] == [2, 3]
    for of_net, of_net_before in zip(calls, before, strict=True):
        for (given, _), (given_before, _) in zip(of_net, of_net_before, strict=True):
            assert torch.equal(given["context"], given_before["context"])
    # In the first step the latents are still the same, so must be the ControlNet's output.
    assert all(torch.equal(*pair) for pair in zip(calls[0][0][1], before[0][0][1], strict=True))
    references = euler(
        guider(steered, CFG, random_text(1, pooled=64), random_text(2, pooled=64)),
        latents(1),
        steps,
    )
    assert difference(both, control) > 0.01
    assert difference(both, references) > 0.01
