"""The adapter's LoRA is merged into the UNet when it changes, and only then."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    golden_unet,
    predict,
    put_adapter,
    random_tokens,
    stock,
    stock_lora,
)
from goldens import adapter_tensors

CFG = 5.0


class Merges:
    """Counts weights that ComfyUI merges."""

    def __init__(self) -> None:
        self._count = 0

    def note(self) -> None:
        self._count += 1

    def of(self, model: Any) -> tuple[int, torch.Tensor]:
        """How many a prediction merges, and the prediction."""
        self._count = 0
        result = predict(model, CFG)
        return self._count, result


@pytest.fixture
def merges(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Merges:
    from comfy.model_patcher import ModelPatcher

    counter, merge = Merges(), ModelPatcher.patch_weight_to_device

    def counted(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if key in self.patches:  # else it is only moved
            counter.note()
        return merge(self, key, *args, **kwargs)

    monkeypatch.setattr(ModelPatcher, "patch_weight_to_device", counted)
    return counter


def other_lora(pack: Pack, name: str, change: Any) -> Any:
    """The golden adapter with another LoRA."""
    tensors = {n: change(t.clone()) if "_lora." in n else t for n, t in adapter_tensors().items()}
    return pack.run("EasyRefLoader", put_adapter(pack, name, tensors), GOLDEN_MLLM, "auto")


def test_another_weight_prompt_mask_or_window_merges_nothing(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    first, _ = merges.of(apply(pack, unet, easyref, tokens))
    assert first > 0
    changes: list[dict[str, Any]] = [
        {"weight": 0.6},
        {"mask": torch.ones(1, 8, 8)},
        {"end_percent": 0.5},
        {"tokens": random_tokens(pack, easyref, seed=3)},
    ]
    for change in changes:
        given = {"tokens": tokens, **change}
        count, result = merges.of(apply(pack, unet, easyref, **given))
        assert count == 0
        assert torch.equal(result, predict(apply(pack, golden_unet(pack), easyref, **given), CFG))


def test_the_same_adapter_loaded_again_merges_nothing(
    pack: Pack, unet: Any, easyref: Any, fresh_easyref: Any, tokens: Any, merges: Merges
) -> None:
    merges.of(apply(pack, unet, easyref, tokens))
    assert merges.of(apply(pack, unet, fresh_easyref, tokens))[0] == 0


def test_another_strength_is_merged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    merges.of(apply(pack, unet, easyref, tokens))
    count, result = merges.of(apply(pack, unet, easyref, tokens, lora_strength=0.5))
    assert count > 0
    fresh = apply(pack, golden_unet(pack), easyref, tokens, lora_strength=0.5)
    assert torch.equal(result, predict(fresh, CFG))


def test_another_adapters_lora_is_merged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    merges.of(apply(pack, unet, easyref, tokens))
    other = other_lora(pack, "merged_other.safetensors", lambda t: t * 2)
    count, result = merges.of(apply(pack, unet, other, tokens))
    assert count > 0
    assert torch.equal(result, predict(apply(pack, golden_unet(pack), other, tokens), CFG))


def test_a_file_that_differs_outside_what_its_identity_hashes_is_merged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    merges.of(apply(pack, unet, easyref, tokens))

    def lower_rows(weight: torch.Tensor) -> torch.Tensor:
        weight[1:] *= 3
        return weight

    other = other_lora(pack, "same_first_rows.safetensors", lower_rows)
    assert other.checkpoint.lora_identity == easyref.checkpoint.lora_identity
    count, result = merges.of(apply(pack, unet, other, tokens))
    assert count > 0
    assert torch.equal(result, predict(apply(pack, golden_unet(pack), other, tokens), CFG))


def test_after_load_lora_another_weight_merges_nothing(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    loaded = stock_lora(unet)
    merges.of(apply(pack, loaded, easyref, tokens))
    count, result = merges.of(apply(pack, loaded, easyref, tokens, weight=0.6))
    assert count == 0
    fresh = apply(pack, stock_lora(golden_unet(pack)), easyref, tokens, weight=0.6)
    assert torch.equal(result, predict(fresh, CFG))
    count, result = merges.of(apply(pack, stock_lora(unet, 0.2), easyref, tokens))
    assert count > 0
    fresh = apply(pack, stock_lora(golden_unet(pack), 0.2), easyref, tokens)
    assert torch.equal(result, predict(fresh, CFG))


def test_before_load_lora_every_change_is_still_merged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    for strength in (0.7, 0.2):
        count, result = merges.of(stock_lora(apply(pack, unet, easyref, tokens), strength))
        assert count > 0
        fresh = stock_lora(apply(pack, golden_unet(pack), easyref, tokens), strength)
        assert torch.equal(result, predict(fresh, CFG))


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, 0.4)])
def test_two_apply_nodes_merge_once_whatever_their_weights(
    pack: Pack,
    unet: Any,
    easyref: Any,
    tokens: Any,
    merges: Merges,
    strengths: tuple[float, float],
) -> None:
    def both(model: Any, weight: float) -> Any:
        for strength in strengths:
            model = apply(pack, model, easyref, tokens, weight=weight, lora_strength=strength)
        return model

    assert merges.of(both(unet, 0.5))[0] > 0
    count, result = merges.of(both(unet, 0.3))
    assert count == 0
    assert torch.equal(result, predict(both(golden_unet(pack), 0.3), CFG))


def test_loras_of_two_adapters_are_merged_once_together(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    other = other_lora(pack, "merged_beside.safetensors", lambda t: -t)

    def both(model: Any, weight: float, strength: float = 1.0) -> Any:
        model = apply(pack, model, easyref, tokens, weight=weight)
        model = apply(pack, model, other, tokens, weight=weight)
        return apply(pack, model, easyref, tokens, weight=0.0, lora_strength=strength)

    assert merges.of(both(unet, 0.5))[0] > 0
    assert merges.of(both(unet, 0.3))[0] == 0
    # The first one's strength changes although another LoRA was added after it.
    assert merges.of(both(unet, 0.5, 0.5))[0] > 0
    count, result = merges.of(both(unet, 0.3, 0.5))
    assert count == 0
    assert torch.equal(result, predict(both(golden_unet(pack), 0.3, 0.5), CFG))


def test_removed_again_it_leaves_the_weights_of_the_model_before(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    loaded = stock_lora(unet)
    _, plain = merges.of(loaded)
    merged = apply(pack, loaded, easyref, tokens, weight=0.0)
    assert not torch.equal(merges.of(merged)[1], plain)
    removed = apply(pack, merged, easyref, tokens, weight=0.0, lora_strength=0.0)
    count, result = merges.of(removed)
    assert count > 0
    assert torch.equal(result, plain)
    assert merges.of(loaded)[0] == 0


def test_removed_after_another_lora_it_leaves_that_one(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    model = stock_lora(apply(pack, unet, easyref, tokens, weight=0.0))
    merges.of(model)
    removed = apply(pack, model, easyref, tokens, weight=0.0, lora_strength=0.0)
    count, result = merges.of(removed)
    assert count > 0
    assert torch.equal(result, predict(stock_lora(golden_unet(pack)), CFG))


def test_a_lora_is_read_once_for_all_models_of_one_kind(
    pack: Pack, unet: Any, fresh_easyref: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = pack.part("nodes.host.lora")
    reads, read = [], lora.lora_weights

    def counted(checkpoint: Any) -> Any:
        reads.append(checkpoint)
        return read(checkpoint)

    monkeypatch.setattr(lora, "lora_weights", counted)
    for model in (unet, unet, golden_unet(pack)):
        apply(pack, model, fresh_easyref, tokens)
        apply(pack, model, fresh_easyref, tokens, lora_strength=0.3)
    assert len(reads) == 1


@pytest.mark.parametrize(("half", "dim"), [("up", 0), ("down", 1)])
def test_a_lora_of_a_wrong_shape_is_refused_before_the_model_changes(
    pack: Pack, unet: Any, tokens: Any, half: str, dim: int
) -> None:
    tensors = adapter_tensors()
    name = next(n for n in tensors if n.endswith(f"to_k_lora.{half}.weight"))
    tensors[name] = torch.cat((tensors[name], tensors[name]), dim)
    file = put_adapter(pack, f"wrong_{half}.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", file, GOLDEN_MLLM, "auto")
    before, patches = unet.patches_uuid, dict(unet.patches)
    with pytest.raises(ValueError, match=re.escape(name.rpartition(f".{half}")[0])):
        apply(pack, unet, easyref, tokens)
    assert (unet.patches_uuid, unet.patches) == (before, patches)


def test_nodes_that_leave_the_weights_alone_do_not_merge_it_again(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, merges: Merges
) -> None:
    merges.of(apply(pack, unet, easyref, tokens))
    node = "comfy_extras.nodes_freelunch.FreeU_V2"
    changed = stock(node, apply(pack, unet, easyref, tokens, weight=0.5), 1.3, 1.4, 0.9, 0.2)
    assert merges.of(changed)[0] == 0
