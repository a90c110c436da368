"""Self-attention of a diffusers UNet attends to the references' features, exactly, nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import goldens
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from golden_unet import TOLERANCE, golden, is_golden, made, modules, predict
from goldens import Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.adapter.identity import reference_noise
from easyref_core.adapter.layer_weights import LayerWeights
from easyref_core.adapter.stages import Window
from easyref_core.sdxl_diffusers.adapter import append_tokens, attach_adapter, detach_adapter
from easyref_core.sdxl_diffusers.identity import attach_identity, detach_identity
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents
from easyref_core.sdxl_diffusers.identity_run import IdentityRun

ALPHAS = EulerDiscreteScheduler().alphas_cumprod
SIZES = ((16, 16), (24, 8), (16, 16))
RANK = 3
GUIDED = {"conditional": lambda rows: [slice(rows // 2, rows)]}


def references(*sizes: tuple[int, int], seed: int = 0) -> IdentityLatents:
    generator = torch.Generator().manual_seed(seed)
    return IdentityLatents(tuple(torch.randn(4, *s, generator=generator) for s in sizes), seed)


def with_identity_lora(unet: UNet2DConditionModel) -> Tensors:
    """The golden adapter and a random identity LoRA for all self-attention layers but one."""
    generator = torch.Generator().manual_seed(3)
    tensors = dict(goldens.adapter_tensors())
    layers = [n.removesuffix(".processor") for n in unet.attn_processors if "attn1" in n]
    for layer in layers[1:]:
        width = unet.get_submodule(layer).to_q.in_features
        for part in ("to_k", "to_v"):
            for half, shape in (("down", (RANK, width)), ("up", (width, RANK))):
                name = f"unet.{layer}.processor.{part}_identity_lora.{half}.weight"
                tensors[name] = torch.randn(shape, generator=generator) * 0.3
    return tensors


@pytest.fixture
def trained(unet: UNet2DConditionModel, save: Callable) -> AdapterCheckpoint:
    return save(with_identity_lora(unet))


def call(
    unet: UNet2DConditionModel,
    run: IdentityRun | None,
    text: torch.Tensor | None = None,
    timestep: Any = None,
    sample: torch.Tensor | None = None,
) -> torch.Tensor:
    """One prediction of [negative, conditional] rows, or of `text`'s."""
    if text is None:
        text = torch.cat((golden("negative_text_states"), golden("text_states")))
        pooled = torch.cat((golden("negative_pooled_text"), golden("pooled_text")))
    else:
        pooled = golden("pooled_text").expand(len(text), -1)
    dtype = unet.dtype
    sample = golden("latents").repeat(len(text), 1, 1, 1) if sample is None else sample
    return unet(
        sample.to(dtype),
        golden("timestep") if timestep is None else timestep,
        encoder_hidden_states=text.to(dtype),
        added_cond_kwargs={
            "text_embeds": pooled.to(dtype),
            "time_ids": golden("time_ids").repeat(len(text), 1).to(dtype),
        },
        cross_attention_kwargs=None if run is None else {"identity": run},
    ).sample


class PlainAttention:
    """An attention layer with adapter and identity, written out in einsum."""

    def __init__(self, layer: str, weights: Tensors, seen: dict, text: int, weight: float) -> None:
        self.layer, self.weights, self.seen = layer, weights, seen
        self.text, self.weight = text, weight

    def linear(self, attn: Any, part: str, x: torch.Tensor) -> torch.Tensor:
        module = attn.to_out[0] if part == "to_out" else getattr(attn, part)
        return module(x) + self.lora(f"{part}_lora", x)

    def lora(self, part: str, x: torch.Tensor) -> torch.Tensor | float:
        down, up = (
            self.weights.get(f"unet.{self.layer}.processor.{part}.{half}.weight")
            for half in ("down", "up")
        )
        return 0.0 if down is None else x @ down.double().T @ up.double().T

    def attend(self, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = []
        for head in range(attn.heads):
            width = q.shape[-1] // attn.heads
            own = slice(head * width, (head + 1) * width)
            scores = torch.einsum("btc,bsc->bts", q[..., own], k[..., own]) / width**0.5
            out.append(torch.einsum("bts,bsc->btc", scores.softmax(-1), v[..., own]))
        return torch.cat(out, -1)

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> torch.Tensor:
        crosses = encoder_hidden_states is not None
        context = encoder_hidden_states[:, : self.text] if crosses else hidden_states
        q, k, v = (
            self.linear(attn, part, x)
            for part, x in (("to_q", hidden_states), ("to_k", context), ("to_v", context))
        )
        out = self.attend(attn, q, k, v)
        tokens = encoder_hidden_states[:, self.text :] if crosses else None
        if crosses and tokens.shape[1]:
            own = [
                tokens @ self.weights[f"unet.{self.layer}.processor.{part}_ip.weight"].double().T
                for part in ("to_k", "to_v")
            ]
            out = out + self.attend(attn, q, *own)
        if not crosses and self.seen["reading"]:
            self.seen.setdefault(self.layer, []).append(hidden_states)
        elif not crosses:
            found = torch.cat(self.seen[self.layer], 1)  # [1, S, C]
            keys = self.linear(attn, "to_k", found) + self.lora("to_k_identity_lora", found)
            values = self.linear(attn, "to_v", found) + self.lora("to_v_identity_lora", found)
            joint = self.attend(
                attn, q[1:], torch.cat((k[1:], keys), 1), torch.cat((v[1:], values), 1)
            )
            out = torch.cat((out[:1], out[1:] + self.weight * (joint - out[1:])))
        return self.linear(attn, "to_out", out)


def plainly(
    unet: UNet2DConditionModel,
    weights: Tensors,
    group: IdentityLatents,
    tokens: bool,
    weight: float,
) -> torch.Tensor:
    """`call` without EasyRef: one pass for each reference, then the sample's."""
    unet = copy.deepcopy(unet).double()
    rows = golden("text_states").shape[1]
    seen: dict[str, Any] = {"reading": True}
    unet.set_attn_processor(
        {
            name: PlainAttention(name.removesuffix(".processor"), weights, seen, rows, weight)
            for name in unet.attn_processors
        }
    )
    alpha = ALPHAS[int(golden("timestep"))].double()
    for number, latent in enumerate(group.latents):
        noise = reference_noise(latent.shape, group.seed, number).double()
        noised = alpha.sqrt() * latent.double() + (1 - alpha).sqrt() * noise
        call(unet, None, golden("text_states"), sample=noised[None])
    seen["reading"] = False
    text = torch.cat((golden("negative_text_states"), golden("text_states")))
    if not tokens:
        return call(unet, None)
    both = torch.cat((golden("uncond_ref_tokens"), golden("ref_tokens")))
    unet_text = torch.cat((text, both), 1)
    return _guided(unet, unet_text, None)


def _guided(
    unet: UNet2DConditionModel, text: torch.Tensor, run: IdentityRun | None
) -> torch.Tensor:
    dtype = unet.dtype
    return unet(
        golden("latents").repeat(2, 1, 1, 1).to(dtype),
        golden("timestep"),
        encoder_hidden_states=text.to(dtype),
        added_cond_kwargs={
            "text_embeds": torch.cat((golden("negative_pooled_text"), golden("pooled_text"))).to(
                dtype
            ),
            "time_ids": golden("time_ids").repeat(2, 1).to(dtype),
        },
        cross_attention_kwargs=None if run is None else {"identity": run},
    ).sample


@torch.no_grad()
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES], ids=["one", "three"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_prediction_equals_a_plain_computation(
    unet: UNet2DConditionModel, sizes: tuple[tuple[int, int], ...], weight: float
) -> None:
    group = references(*sizes)
    wanted = plainly(unet, {}, group, tokens=False, weight=weight)
    attach_identity(unet.double())
    run = IdentityRun(group, ALPHAS, Window(weight=weight), **GUIDED)
    found = call(unet, run)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert (found[1] - call(unet, None)[1]).abs().max() > 0.05
    assert torch.equal(found[0], call(unet, None)[0])


@torch.no_grad()
@pytest.mark.parametrize("first", ["adapter", "identity"])
def test_prediction_with_an_adapter_equals_a_plain_computation(
    unet: UNet2DConditionModel, trained: AdapterCheckpoint, first: str
) -> None:
    """Tokens act on the sample alone; LoRA and identity LoRA on the references too."""
    group = references(*SIZES)
    wanted = plainly(unet, with_identity_lora(unet), group, tokens=True, weight=0.7)
    unet.double()
    if first == "identity":
        attach_identity(unet)
    attach_adapter(unet, trained)
    attach_identity(unet)
    text, negative = append_tokens(
        unet, made(), golden("text_states"), golden("negative_text_states")
    )
    run = IdentityRun(group, ALPHAS, Window(weight=0.7), **GUIDED)
    found = _guided(unet, torch.cat((negative, text)), run)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@torch.no_grad()
def test_each_prompt_has_its_own_references(unet: UNet2DConditionModel) -> None:
    """As each prompt alone; groups may be of any sizes, and empty."""
    attach_identity(unet)
    groups = [references(*SIZES), IdentityLatents(()), references((8, 24), seed=5)]
    text = golden("text_states") * torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1)
    found = call(unet, IdentityRun(groups, ALPHAS), text)
    for row, group in enumerate(groups):
        run = IdentityRun(group, ALPHAS) if group.latents else None
        alone = call(unet, run, text[row : row + 1])
        assert goldens.difference(found[row : row + 1], alone) <= TOLERANCE
    shared = call(unet, IdentityRun(groups[0], ALPHAS), text)
    for row in range(3):
        alone = call(unet, IdentityRun(groups[0], ALPHAS), text[row : row + 1])
        assert goldens.difference(shared[row : row + 1], alone) <= TOLERANCE


@torch.no_grad()
def test_each_row_has_its_own_noise_level_and_weight(unet: UNet2DConditionModel) -> None:
    """As in training: samples in consecutive rows, some of them outside the window."""
    attach_identity(unet)
    groups = [references((16, 16)), references((16, 16), seed=1)]
    times = torch.tensor([700.0, 0.0, 650.5, 500.0])
    window = Window(0.25, 0.9, 0.8, 0.1)
    text = golden("text_states").expand(4, -1, -1)
    found = call(unet, IdentityRun(groups, ALPHAS, window), text, times)
    for row, time in enumerate(times):
        run = IdentityRun(groups[row // 2], ALPHAS, window)
        alone = call(unet, run, text[:1], time)
        assert goldens.difference(found[row : row + 1], alone) <= TOLERANCE
        assert run.passes == (row != 1)


@pytest.fixture
def passes(unet: UNet2DConditionModel) -> list[int]:
    """Rows of each pass through the UNet, the references' too."""
    rows: list[int] = []
    unet.conv_in.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    return rows


@torch.no_grad()
def test_references_of_one_size_and_rows_alike_share_a_pass(
    unet: UNet2DConditionModel, passes: list[int]
) -> None:
    attach_identity(unet)
    text = golden("text_states").expand(4, -1, -1)
    call(unet, IdentityRun(references(*SIZES), ALPHAS), text)
    assert passes == [2, 1, 4]
    passes.clear()
    other = torch.cat((text[:2], text[:1] * 0.5, text[:1]))
    call(unet, IdentityRun(references((16, 16)), ALPHAS), other)
    assert passes == [2, 4]
    passes.clear()
    many = references(*[(16, 16)] * 6)  # no more at once than a few, or than the call's rows
    found = call(unet, IdentityRun(many, ALPHAS), text[:1])
    assert passes == [4, 2, 1]
    passes.clear()
    rows = call(unet, IdentityRun(many, ALPHAS), text.repeat(2, 1, 1))
    assert passes == [6, 8]
    assert goldens.difference(rows[:1], found) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "acts"),
    [
        (Window(weight=0), False),
        (Window(0, 0.1), False),
        (Window(0.9, 1), False),
        (Window(0.5, 0.5), False),
        (Window(), True),
    ],
    ids=["weight 0", "before", "after", "empty", "inside"],
)
def test_nothing_is_read_outside_the_window_or_at_weight_zero(
    unet: UNet2DConditionModel, passes: list[int], window: Window, acts: bool
) -> None:
    attach_identity(unet)
    plain = call(unet, None)
    passes.clear()
    run = IdentityRun(references((16, 16)), ALPHAS, window, **GUIDED)
    assert torch.equal(call(unet, run), plain) != acts
    assert passes == ([1, 2] if acts else [2])
    assert run.passes == acts


@torch.no_grad()
def test_layer_weights_choose_layers(unet: UNet2DConditionModel) -> None:
    from easyref_core.sdxl_diffusers import unet_layers

    attach_identity(unet)
    names = unet_layers.layer_groups(unet)
    assert set(names.values()) == {"input_3", "middle", "output_0", "output_1"}
    group = references((16, 16))
    weights = LayerWeights({"middle": 0.0, "output_0": 0.5})
    run = IdentityRun(group, ALPHAS, layer_weights=weights)
    found = {
        names[n]: f
        for n in names
        for a, f in run.layers(unet).items()
        if unet.get_submodule(n) is a
    }
    assert found == {"input_3": 1.0, "output_0": 0.5, "output_1": 1.0}
    wrong = LayerWeights({"input_7": 0.5})
    with goldens.refused("input_7", "has no such layers"):
        call(unet, IdentityRun(group, ALPHAS, layer_weights=wrong))


@torch.no_grad()
def test_a_pass_serves_several_steps_and_its_error_is_measured(
    unet: UNet2DConditionModel, passes: list[int]
) -> None:
    attach_identity(unet)
    text = golden("text_states")
    group = references((16, 16))
    times = [900, 800, 800, 700, 600, 500, 400]

    def sample(run: IdentityRun) -> list[torch.Tensor]:
        passes.clear()
        return [call(unet, run, text, time) for time in times]

    once = IdentityRun(group, ALPHAS)
    exact = sample(once)
    assert (once.passes, once.errors, len(passes)) == (6, [], 13)
    every = IdentityRun(group, ALPHAS, reuse_steps=2)
    reused = sample(every)
    assert (every.passes, len(passes)) == (3, 10)
    assert [torch.equal(a, b) for a, b in zip(exact, reused, strict=True)] == [
        True, False, False, True, False, True, False,
    ]  # fmt: skip
    assert len(every.errors) == 2
    assert all(0 < error < 1 for error in every.errors)
    again = IdentityRun(group, ALPHAS, reuse_steps=100)
    sample(again)
    assert (again.passes, again.errors) == (1, [])
    sample(again)  # another sampling starts with a pass of its own
    assert (again.passes, again.errors) == (2, [])


@torch.no_grad()
def test_runs_share_nothing(unet: UNet2DConditionModel) -> None:
    attach_identity(unet)
    groups = [references((16, 16), seed=n) for n in range(3)]
    text = golden("text_states")
    alone = [call(unet, IdentityRun(group, ALPHAS), text) for group in groups]
    runs = [IdentityRun(group, ALPHAS, reuse_steps=3) for group in groups]

    def repeated(run: IdentityRun) -> torch.Tensor:
        with torch.no_grad():
            first, _ = (call(unet, run, text, time) for time in (golden("timestep"), 5))
            return first

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(repeated, runs))
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert torch.equal(call(copy.deepcopy(unet), IdentityRun(groups[0], ALPHAS), text), alone[0])


@torch.no_grad()
def test_identity_comes_and_goes_with_or_without_an_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    before = modules(unet)
    plain = predict(unet, None)
    attach_identity(unet)
    attach_identity(unet)
    assert torch.equal(predict(unet, None), plain)
    attach_adapter(unet, checkpoint)
    assert is_golden(unet)
    detach_identity(unet)
    assert is_golden(unet)
    attach_identity(unet)
    detach_adapter(unet)
    text = golden("text_states")
    found = call(unet, IdentityRun(references((16, 16)), ALPHAS), text)
    assert not torch.equal(found, call(unet, None, text))
    detach_identity(unet)
    assert modules(unet) == before
    assert not unet._forward_pre_hooks
    assert not unet._forward_pre_hooks_with_kwargs
    assert torch.equal(predict(unet, None), plain)
    with goldens.refused("not attached", "attach_identity"):
        detach_identity(unet)


def test_an_identity_lora_of_another_unet_is_refused(
    unet: UNet2DConditionModel, save: Callable
) -> None:
    tensors = with_identity_lora(unet)
    name = next(n for n in tensors if "mid_block" in n and "_identity_lora" in n)
    before = modules(unet)
    moved = {
        n.replace("mid_block.attentions.0", "mid_block.attentions.7"): t
        for n, t in tensors.items()
        if "_identity_lora" in n
    }
    with goldens.refused("LoRA for mid_block.attentions.7", "does not have"):
        attach_adapter(unet, save(goldens.without(tensors, "_identity_lora") | moved))
    layer = name.split(".processor")[0]
    wide = {
        n: torch.zeros((RANK, 8) if "down" in n else (8, RANK))
        for n in tensors
        if n.startswith(layer) and "_identity_lora" in n
    }
    with goldens.refused("identity_lora", "has the shape", "needs"):
        attach_adapter(unet, save(tensors | wide))
    assert modules(unet) == before


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            lambda: IdentityRun([references((8, 8))] * 3, ALPHAS, **GUIDED),
            ("1 conditional rows", "3 groups"),
        ),
        (
            lambda: IdentityRun(IdentityLatents((torch.zeros(9, 8, 8),)), ALPHAS),
            ("4 channels", "9", "inpainting"),
        ),
        (lambda: "ann", ("identity that is", "identity_run")),
    ],
    ids=["rows", "channels", "no run"],
)
def test_calls_that_do_not_fit_are_refused(
    unet: UNet2DConditionModel, run: Callable, said: tuple[str, ...]
) -> None:
    attach_identity(unet)
    with goldens.refused(*said):
        call(unet, run())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"references": []}, ("references are none", "encode_identity")),
        ({"references": None}, ("references are nothing", "encode_identity")),
        ({"references": [torch.zeros(4, 8, 8)]}, ("are a Tensor", "encode_identity")),
        ({"reuse_steps": 0}, ("reuse_steps is 0",)),
        ({"reuse_steps": 1.5}, ("reuse_steps is 1.5",)),
    ],
    ids=["none", "nothing", "tensors", "zero", "fraction"],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: tuple[str, ...]) -> None:
    with goldens.refused(*said):
        IdentityRun(**{"references": references((8, 8)), "alphas_cumprod": ALPHAS} | settings)


def test_a_unet_without_identity_says_so(steered: UNet2DConditionModel) -> None:
    text, _ = append_tokens(steered, made(), golden("text_states"))
    with goldens.refused("attach_identity"), torch.no_grad():
        call(steered, IdentityRun(references((8, 8)), ALPHAS), text)
