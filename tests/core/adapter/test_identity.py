"""Identity: self-attention over a layer's own and the references' keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import goldens
import pytest
import torch
from goldens import Tensors

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.identity import (
    IdentityLora,
    IdentityShare,
    add_identity,
    passes,
    reference_noise,
    reference_size,
    relative_error,
)
from easyref_core.adapter.key_values import identity_lora_weights
from easyref_core.errors import EasyRefError

HEADS, WIDTH, OWN, REFERENCES = 2, 8, 6, 5
LAYER = next(iter(goldens.LAYERS)).replace("attn2", "attn1")
NAME = f"unet.{LAYER}.processor.to_{{}}_identity_lora.{{}}.weight"


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head, in float64."""
    out = []
    for q, k, v in zip(
        *(x.double().chunk(HEADS, dim=-1) for x in (query, key, value)), strict=True
    ):
        scores = torch.einsum("btc,bsc->bts", q, k) / q.shape[-1] ** 0.5
        out.append(torch.einsum("bts,bsc->btc", scores.softmax(-1), v))
    return torch.cat(out, dim=-1)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def layer() -> tuple[torch.Tensor, ...]:
    """own, query, key, value of three rows."""
    query, key, value = (random(3, OWN, WIDTH, seed=n) for n in range(3))
    return plain_attention(query, key, value), query, key, value


def references(rows: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return random(rows, REFERENCES, WIDTH, seed=seed), random(
        rows, REFERENCES, WIDTH, seed=seed + 1
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weight", [1.0, 0.4, -0.5, 1.5])
def test_output_is_blended_with_joint_attention(
    layer: tuple[torch.Tensor, ...], rows: int, weight: float
) -> None:
    own, query, key, value = layer
    keys, values = references(rows)
    found = add_identity(*layer, [IdentityShare(keys, values, weight)], plain_attention)
    for row in range(3):
        of = min(row, rows - 1)
        joint = plain_attention(
            query[[row]],
            torch.cat((key[[row]], keys[[of]]), 1),
            torch.cat((value[[row]], values[[of]]), 1),
        )
        wanted = own[[row]] + weight * (joint - own[[row]])
        torch.testing.assert_close(found[[row]], wanted, rtol=0, atol=1e-12)


def test_a_reference_like_the_sample_changes_nothing(layer: tuple[torch.Tensor, ...]) -> None:
    """Every position twice has the same softmax."""
    own, _, key, value = layer
    found = add_identity(*layer, [IdentityShare(key, value, 1.0)], plain_attention)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-12)


def test_weight_one_everywhere_is_joint_attention_alone(layer: tuple[torch.Tensor, ...]) -> None:
    """`own` has no part in it, so a backward pass leaves it out."""
    _, query, key, value = layer
    keys, values = references(1)
    broken = torch.full_like(query, float("nan"))
    for rows in (None, slice(0, 3)):
        share = IdentityShare(keys, values, 1.0, rows)
        found = add_identity(broken, query, key, value, [share], plain_attention)
        wanted = plain_attention(
            query,
            torch.cat((key, keys.expand(3, -1, -1)), 1),
            torch.cat((value, values.expand(3, -1, -1)), 1),
        )
        assert torch.equal(found, wanted)


def test_only_its_rows_and_positions_change(layer: tuple[torch.Tensor, ...]) -> None:
    own = layer[0]
    before = [x.clone() for x in layer]
    keys, values = references(1)
    everywhere = add_identity(*layer, [IdentityShare(keys, values, 0.7)], plain_attention)
    positions = torch.tensor([1, 4])
    for rows, where in ((slice(1, 2), None), (None, positions), (slice(1, 2), positions)):
        share = IdentityShare(keys, values, 0.7, rows, where)
        found = add_identity(*layer, [share], plain_attention)
        acted = torch.zeros(3, OWN, 1, dtype=torch.bool)
        acted[slice(None) if rows is None else rows, slice(None) if where is None else where] = True
        assert torch.equal(found, torch.where(acted, everywhere, own))
    assert all(torch.equal(x, y) for x, y in zip(before, layer, strict=True))


def test_positions_in_another_order_change_their_own(layer: tuple[torch.Tensor, ...]) -> None:
    keys, values = references(1)
    order = torch.arange(OWN).flip(0)
    found, wanted = (
        add_identity(*layer, [IdentityShare(keys, values, 1.0, None, where)], plain_attention)
        for where in (order, None)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_weight_for_each_row_and_position(layer: tuple[torch.Tensor, ...]) -> None:
    own = layer[0]
    keys, values = references(1)
    full = add_identity(*layer, [IdentityShare(keys, values, 1.0)], plain_attention)
    weight = random(3, OWN, 1, seed=20)
    found = add_identity(*layer, [IdentityShare(keys, values, weight)], plain_attention)
    torch.testing.assert_close(found, own + weight * (full - own), rtol=0, atol=1e-12)


def test_two_sets_of_references_add_up_in_any_order(layer: tuple[torch.Tensor, ...]) -> None:
    own = layer[0]
    shares = [IdentityShare(*references(1, seed), 0.5, slice(0, 2)) for seed in (7, 30)]
    alone = [add_identity(*layer, [share], plain_attention) - own for share in shares]
    for order in (shares, shares[::-1]):
        found = add_identity(*layer, order, plain_attention)
        torch.testing.assert_close(found, own + alone[0] + alone[1], rtol=0, atol=1e-12)


def test_weight_zero_computes_nothing(layer: tuple[torch.Tensor, ...]) -> None:
    def attend(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    keys, values = references(1)
    assert add_identity(*layer, [], attend) is layer[0]
    assert add_identity(*layer, [IdentityShare(keys, values, 0)], attend) is layer[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_keeps_its_dtype(layer: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    halves = [x.to(dtype) for x in layer]
    keys, values = references(1)

    def attend(*states: torch.Tensor) -> torch.Tensor:
        assert {x.dtype for x in states} == {dtype}
        return plain_attention(*states).to(dtype)

    weight = torch.full((3, OWN, 1), 0.5)
    share = IdentityShare(keys.float(), values.float(), weight)
    assert add_identity(*halves, [share], attend).dtype == dtype


def test_gradients_reach_the_references_and_the_weight(layer: tuple[torch.Tensor, ...]) -> None:
    keys, values = (x.requires_grad_() for x in references(1))
    share = IdentityShare(keys, values, 0.7, slice(1, 3), torch.tensor([0, 2]))
    assert torch.autograd.gradcheck(
        lambda k, v: add_identity(
            *layer,
            [IdentityShare(k, v, share.weight, share.rows, share.positions)],
            plain_attention,
        ),
        (keys, values),
    )


@pytest.mark.parametrize(
    ("size", "area", "wanted"),
    [
        ((512, 512), 1024 * 1024, (1024, 1024)),
        ((1500, 1000), 1024 * 1024, (1280, 832)),
        ((1000, 1500), 1024 * 1024, (832, 1280)),
        ((4000, 40), 1024 * 1024, (10240, 128)),
        ((10000, 1), 256 * 256, (25600, 64)),
        ((3, 4), 128 * 128, (128, 128)),
        ((1, 1), 8 * 8, (64, 64)),
    ],
)
def test_a_reference_has_the_samples_area_and_its_own_shape(
    size: tuple[int, int], area: int, wanted: tuple[int, int]
) -> None:
    assert reference_size(*size, area) == wanted


def test_references_of_one_size_share_a_pass() -> None:
    assert passes([(64, 64), (64, 128), (64, 64), (128, 64)]) == [[0, 2], [1], [3]]
    assert passes([]) == []


def test_noise_is_of_the_seed_and_the_reference_alone() -> None:
    first = reference_noise((4, 8, 8), 5, 0)
    torch.manual_seed(1)
    assert torch.equal(first, reference_noise((4, 8, 8), 5, 0))
    assert not torch.equal(first, reference_noise((4, 8, 8), 5, 1))
    assert not torch.equal(first, reference_noise((4, 8, 8), 6, 0))
    assert reference_noise((4, 8, 8), 2**64 - 1, 3).shape == (4, 8, 8)


def test_relative_error_is_over_all_layers() -> None:
    new = [random(2, 3, 4, seed=n) for n in (1, 2)]
    old = [x + 0.25 * random(*x.shape, seed=9) for x in new]
    off = sum((a - b).square().sum() for a, b in zip(old, new, strict=True))
    wanted = (off / sum(x.square().sum() for x in new)).sqrt()
    torch.testing.assert_close(
        relative_error(zip(new, old, strict=True)).double(), wanted, rtol=1e-6, atol=0
    )
    assert relative_error(zip(new, new, strict=True)) == 0
    assert relative_error([(torch.zeros(3), torch.zeros(3))]) == 0
    assert relative_error([]) == 0


def with_identity(whole: Tensors, rank: int = 3, layer: str = LAYER) -> Tensors:
    width = goldens.LAYERS[layer.replace("attn1", "attn2")]
    shapes = {"down": (rank, width), "up": (width, rank)}
    return whole | {
        NAME.replace(LAYER, layer).format(part, half): random(*shape, seed=n).float()
        for n, (part, half, shape) in enumerate((p, h, s) for p in "kv" for h, s in shapes.items())
    }


def test_an_identity_lora_is_recognised(whole: Tensors, tmp_path: Path) -> None:
    tensors = with_identity(whole)
    plain = load_checkpoint(goldens.write(tmp_path / "plain.safetensors", whole))
    found = load_checkpoint(goldens.write(tmp_path / "adapter.safetensors", tensors))
    assert (found.identity, found.lora_identity) == (plain.identity, plain.lora_identity)
    assert found.lora == plain.lora
    assert not found.ignored
    report = found.report()
    assert (report["identity_lora_layers"], report["identity_lora_rank"]) == (1, 3)
    assert plain.identity_lora_rank == 0
    (weights,) = identity_lora_weights(found).values()
    assert torch.equal(weights.key_down, tensors[NAME.format("k", "down")])
    assert torch.equal(weights.value_up, tensors[NAME.format("v", "up")])
    assert identity_lora_weights(plain) == {}
    tensors[NAME.format("v", "up")] += 1
    other = load_checkpoint(goldens.write(tmp_path / "other.safetensors", tensors))
    assert other.identity == found.identity


def test_an_identity_lora_adds_to_keys_and_values() -> None:
    weights = [random(2, WIDTH, seed=1), random(WIDTH, 2, seed=2)]
    lora = IdentityLora(*weights, *(w + 1 for w in weights))
    features = random(1, REFERENCES, WIDTH, seed=3)
    torch.testing.assert_close(lora.key(features), features @ (weights[1] @ weights[0]).T)
    wanted = features @ ((weights[1] + 1) @ (weights[0] + 1)).T
    torch.testing.assert_close(lora.value(features), wanted)
    assert lora.to(torch.zeros((), dtype=torch.bfloat16)).key_up.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME.format("v", "up")), ("lacks 1 weights", "to_v_identity_lora.up")),
        (
            lambda t: t.update(
                {NAME.format("k", "down"): torch.zeros(4, goldens.LAYERS[_cross()])}
            ),
            ("identity LoRA has ranks 3, 4",),
        ),
        (
            lambda t: t.update({NAME.format("k", "up"): torch.zeros(7, 3)}),
            ("identity LoRA for", "7", "wide"),
        ),
        (lambda t: t.update({NAME.format("k", "up"): torch.zeros(())}), ("[]", "matrix")),
        (
            lambda t: t.update(
                {NAME.replace("attn1", "attn2").format("k", "up"): torch.zeros(8, 3)}
            ),
            ("does not know", "attn2.processor.to_k_identity_lora"),
        ),
        (
            lambda t: t.update({NAME.format("q", "up"): torch.zeros(8, 3)}),
            ("does not know", "to_q_identity_lora"),
        ),
    ],
    ids=["part missing", "two ranks", "two widths", "no matrix", "cross-attention", "queries"],
)
def test_a_bad_identity_lora_is_refused_by_name(
    whole: Tensors, tmp_path: Path, change: Callable[[Tensors], None], said: tuple[str, ...]
) -> None:
    tensors = with_identity(whole)
    change(tensors)
    with goldens.refused("adapter.safetensors", *said):
        load_checkpoint(goldens.write(tmp_path / "adapter.safetensors", tensors))


def test_nan_in_an_identity_lora_is_named(whole: Tensors, tmp_path: Path) -> None:
    tensors = with_identity(whole)
    tensors[NAME.format("v", "down")][0, 0] = float("nan")
    found = load_checkpoint(goldens.write(tmp_path / "adapter.safetensors", tensors))
    with pytest.raises(EasyRefError, match="to_v_identity_lora"):
        identity_lora_weights(found)


def _cross() -> str:
    return LAYER.replace("attn1", "attn2")
