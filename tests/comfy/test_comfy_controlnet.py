"""A ControlNet in the same graph: it sees the text only, and both act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import Pack, apply, latents, predict, random_text, random_tokens, stock
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
        found = [t.clone() for name in sorted(out) for t in out[name]]
        self.calls.append((dict(kwargs), found))


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


def test_both_act_and_the_controlnet_sees_only_the_text(
    pack: Pack, demo: Any, demo_easyref: Any, texts: tuple[Any, Any]
) -> None:
    positive, negative = texts
    tokens = random_tokens(pack, demo_easyref, seed=3)
    x = latents(1)
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, tokens)
    with ControlSpy(demo.control_net) as with_references:
        both = predict(spy.watch(model), CFG, x, positive=positive, negative=negative)
    assert spy.wrong_by([(positive[0][0], tokens.cond), (negative[0][0], tokens.uncond)]) < EXACT
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
