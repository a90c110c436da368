"""References and a prompt become the official reference tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import CASES, Tensors
from PIL import Image

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference, plan_group
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.pictures.preprocessing import preprocess
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

CPU = torch.device("cpu")
FOUR = "four_refs_prompt"
Encoders = dict[str, EasyRefEncoder]


@pytest.fixture
def encode(encoder: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[..., ReferenceTokens]:
    """Encode the golden case of four references, with options changed."""

    def run(references: list[Reference] | None = None, **options: Any) -> ReferenceTokens:
        prompt = options.pop("prompt", goldens.user_prompt(FOUR))
        return goldens.encode(
            options.pop("encoder", encoder),
            tokenizer,
            goldens.references(FOUR) if references is None else references,
            prompt,
            **{"image_size": goldens.IMAGE_SIZE, **options},
        )

    return run


@torch.no_grad()
def embedded(encoder: EasyRefEncoder, tokenizer: PromptTokenizer, case: str) -> torch.Tensor:
    patches = [preprocess(p, goldens.IMAGE_SIZE) for p in goldens.pictures(case)]
    plan = tokenizer.tokenize([p.num_tokens for p in patches], goldens.user_prompt(case))
    return encoder.embed(plan, encoder.encode_images(patches, CPU), CPU)


@pytest.mark.parametrize("case", CASES)
def test_golden_visual_tokens(encoder: EasyRefEncoder, case: str) -> None:
    with torch.no_grad():
        patches = [preprocess(p, goldens.IMAGE_SIZE) for p in goldens.pictures(case)]
        seen = encoder.encode_images(patches, CPU)
    wanted = goldens.expected()[f"full.{case}.visual_tokens"]
    assert goldens.difference(torch.cat(seen), wanted) <= 2e-5


@torch.no_grad()
def test_pictures_of_any_sizes_in_one_call_equal_single_calls(encoder: EasyRefEncoder) -> None:
    pictures = [p.resize(s) for p in goldens.pictures(FOUR) for s in ((96, 96), (150, 90))]
    patches = [preprocess(p, goldens.IMAGE_SIZE) for p in pictures]
    assert len({(p.rows, p.columns) for p in patches}) == 2
    together = encoder.encode_images(patches, CPU)
    assert len(together) == len(patches)
    for picture, tokens in zip(patches, together, strict=True):
        assert goldens.difference(tokens, *encoder.encode_images([picture], CPU)) <= 1e-5


@torch.no_grad()
def test_a_batch_of_groups_of_any_length_equals_single_passes(
    encoder: EasyRefEncoder, tokenizer: PromptTokenizer
) -> None:
    embeds = [embedded(encoder, tokenizer, case) for case in CASES]
    assert len({e.shape[1] for e in embeds}) == len(CASES)
    rows = encoder.batch_reference_states(embeds)
    for group, found in zip(embeds, rows, strict=True):
        assert goldens.difference(found[None], encoder.reference_states(group)) <= 2e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tag", ["full", "adapter_only"])
@torch.no_grad()
def test_golden_states(encoders: Encoders, tokenizer: PromptTokenizer, tag: str, case: str) -> None:
    encoder, wanted = encoders[tag], goldens.expected()
    embeds = embedded(encoder, tokenizer, case)
    states = goldens.body_states(encoder, embeds)
    assert goldens.difference(states, wanted[f"{tag}.{case}.penultimate"]) <= 1e-4
    rows = encoder.reference_states(embeds)
    assert goldens.difference(rows, wanted[f"{tag}.{case}.reference_states"]) <= 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tag", ["full", "adapter_only"])
def test_golden_tokens(encode: Callable, encoders: Encoders, tag: str, case: str) -> None:
    found = encode(
        goldens.references(case), encoder=encoders[tag], prompt=goldens.user_prompt(case)
    )
    wanted = goldens.expected()
    assert goldens.difference(found.cond, wanted[f"{tag}.{case}.tokens"]) <= 1e-4
    assert goldens.difference(found.uncond, wanted[f"{tag}.uncond_black.tokens"]) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_golden_tokens_at_the_real_image_size(encode: Callable, case: str) -> None:
    found = encode(goldens.references(case), prompt=goldens.user_prompt(case), image_size=336)
    wanted = goldens.expected()[f"full_336.{case}.tokens"]
    assert goldens.difference(found.cond, wanted) <= 1e-4


def test_tokens_name_adapter_prompt_and_aggregation(encode: Callable) -> None:
    found = encode(prompt="a boat")
    assert (found.adapter[:3], found.adapter_name) == ("it-", "it.safetensors")
    assert found.prompt == "a boat"
    assert (found.num_references, found.aggregation) == (4, "easyref")
    assert found.cond.dtype == found.uncond.dtype == torch.float32
    assert not found.cond.requires_grad


def test_order_of_the_references_matters(encode: Callable) -> None:
    turned = encode(goldens.references(FOUR)[::-1])
    assert goldens.difference(turned.cond, encode().cond) > 0.5
    assert torch.equal(turned.uncond, encode().uncond)


def test_prompt_matters_but_not_to_the_unconditional_tokens(encode: Callable) -> None:
    other = encode(prompt="a boat")
    assert goldens.difference(other.cond, encode().cond) > 0.1
    assert torch.equal(other.uncond, encode().uncond)


@pytest.mark.parametrize("num_tokens", [16, 32, 64, 128])
def test_number_of_reference_tokens_is_the_adapters(
    encode: Callable, plan: Callable[..., EncoderPlan], num_tokens: int
) -> None:
    tensors = goldens.random_adapter(goldens.random_encoder(num_tokens))
    made = plan(tensors)
    assert made.checkpoint.num_tokens == num_tokens
    found = encode(encoder=made.build())
    assert found.cond.shape == found.uncond.shape == (1, num_tokens, goldens.TOKEN_WIDTH)


def test_reference_tokens_attend_to_each_other_causally(encode: Callable) -> None:
    """Causal: the first ones do not depend on how many follow."""
    long = goldens.random_encoder(32)
    short = goldens.random_encoder(16)
    state = long.state_dict()
    state["mllm_final_layer.reference_tokens"] = state["mllm_final_layer.reference_tokens"][:16]
    short.load_state_dict(state)
    difference = goldens.difference(encode(encoder=short).cond, encode(encoder=long).cond[:, :16])
    assert difference <= 1e-5


def test_bfloat16_lands_within_five_percent(
    encode: Callable, checkpoint: AdapterCheckpoint
) -> None:
    half = torch.bfloat16
    encoder = plan_encoder(checkpoint, goldens.MLLM).build(dtype=half, compute_dtype=half)
    found = encode(encoder=encoder)
    for name, tokens in ((FOUR, found.cond), ("uncond_black", found.uncond)):
        wanted = goldens.expected()[f"full.{name}.tokens"]
        assert 0 < float((tokens - wanted).norm() / wanted.norm()) < 0.05


def test_weights_can_keep_the_dtype_of_their_files(
    whole: Tensors, plan: Callable[..., EncoderPlan]
) -> None:
    body = {n: t.bfloat16() for n, t in whole.items() if n.startswith(goldens.BODY)}
    made = plan(whole | body)
    kept = made.build(dtype=None).state_dict()
    assert {t.dtype for n, t in kept.items() if n.startswith(goldens.BODY)} == {torch.bfloat16}
    assert kept["image_proj_model.proj.0.weight"].dtype == torch.float32
    assert {t.dtype for t in made.build().state_dict().values()} == {torch.float32}


def test_average_is_the_mean_of_single_encodings(encode: Callable) -> None:
    references = goldens.references(FOUR)
    single = [encode([r]).cond for r in references]
    found = encode(references, aggregation="average")
    assert goldens.difference(found.cond, sum(single) / 4) <= 1e-6
    assert torch.equal(found.uncond, encode().uncond)
    assert goldens.difference(found.cond, encode().cond) > 0.1


def test_concatenate_is_single_encodings_one_after_another(encode: Callable) -> None:
    references = goldens.references(FOUR)
    found = encode(references, aggregation="concatenate")
    assert torch.equal(found.cond, torch.cat([encode([r]).cond for r in references], dim=1))
    assert torch.equal(found.uncond, torch.cat([encode().uncond] * 4, dim=1))
    assert found.aggregation == "concatenate"


def test_baselines_weigh_whole_pictures(encode: Callable) -> None:
    references = goldens.references(FOUR)[:3]
    single = [encode([r]).cond for r in references]
    weighed = [replace(r, weight=w) for r, w in zip(references, (1.0, 3.0, 0.0), strict=True)]
    average = encode(weighed, aggregation="average")
    assert goldens.difference(average.cond, (single[0] + 3 * single[1]) / 4) <= 1e-6
    joined = encode(weighed, aggregation="concatenate")
    assert torch.equal(joined.cond, torch.cat(single[:2], dim=1))
    assert joined.uncond.shape == joined.cond.shape
    for aggregation in ("average", "concatenate"):
        with goldens.refused("weight 0", aggregation):
            encode([replace(r, weight=0.0) for r in references], aggregation=aggregation)


def test_one_reference_gives_the_same_tokens_with_every_aggregation(encode: Callable) -> None:
    one = goldens.references("one_ref_prompt")
    plain = encode(one).cond
    for aggregation in ("average", "concatenate"):
        assert torch.equal(encode(one, aggregation=aggregation).cond, plain)


def test_an_adapter_file_that_is_gone_is_refused_before_encoding(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors())
    encoder_plan = plan_encoder(load_checkpoint(path), goldens.MLLM)
    plan = plan_group(encoder_plan, tokenizer, goldens.references(FOUR), "", image_size=84)
    encoder = encoder_plan.build()
    path.rename(tmp_path / "b.safetensors")
    monkeypatch.setattr(EasyRefEncoder, "encode_images", lambda *_: pytest.fail("encoded"))
    with goldens.refused("There is no weight file", path):
        encode_references(encoder, plan)


def test_unknown_aggregation_and_empty_group(encode: Callable) -> None:
    with goldens.refused("'mean'", "easyref, dla, lap, average, concatenate"):
        encode(aggregation="mean")
    with goldens.refused("no reference picture"):
        encode([])


def test_cache_changes_nothing_and_saves_the_vision_tower(
    encode: Callable, encoder: EasyRefEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    see = type(encoder).encode_images

    def counted(self: EasyRefEncoder, pictures: Any, device: Any) -> list[torch.Tensor]:
        seen.extend((p.rows, p.columns) for p in pictures)
        return see(self, pictures, device)

    plain, other = encode(), encode(prompt="a boat")
    monkeypatch.setattr(type(encoder), "encode_images", counted)
    cache = EncodingCache()
    for wanted, prompt, looks in ((plain, None, 5), (plain, None, 5), (other, "a boat", 5)):
        found = encode(cache=cache, **({"prompt": prompt} if prompt else {}))
        assert goldens.difference(found.cond, wanted.cond) <= 1e-5
        assert torch.equal(found.uncond, wanted.uncond)
        assert len(seen) == looks
    changed = goldens.references(FOUR)
    changed[2] = Reference(Image.new("RGB", (70, 201), "teal"))
    assert not torch.equal(encode(changed, cache=cache).cond, plain.cond)
    assert len(seen) == 6


def test_cache_tells_insertion_layers_and_image_sizes_apart(encode: Callable) -> None:
    cache = EncodingCache()
    for options in ({}, {"insert_before": 2}, {"image_size": 112}, {}):
        found = encode(cache=cache, **options)
        assert goldens.difference(found.uncond, encode(**options).uncond) <= 1e-5


@pytest.mark.parametrize("asked", [None, 0])
def test_references_are_encoded_at_the_adapters_own_size(
    tokenizer: PromptTokenizer, tmp_path: Path, asked: int | None
) -> None:
    path = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors(), image_size="112")
    trained = plan_encoder(load_checkpoint(path), goldens.MLLM)
    for size, wanted in ((asked, 112), (84, 84)):
        found = plan_group(trained, tokenizer, goldens.references(FOUR), "", image_size=size)
        assert {image.image_size for image in found.passes[0].images} == {wanted}


def test_an_adapter_without_an_image_size_has_the_released_one(encode: Callable) -> None:
    assert torch.equal(encode(image_size=0).cond, encode(image_size=336).cond)


@pytest.mark.parametrize("size", [-1, 1, 28, 55])
def test_an_image_size_below_two_patches_is_refused(encode: Callable, size: int) -> None:
    with goldens.refused(f"image_size is {size}", "at least 56", "or 0", "(336)"):
        encode(image_size=size)


def test_a_group_that_fills_the_context_is_cached_whole() -> None:
    """Read in order, a group larger than the cache would lose each picture just before its use."""
    config = MllmConfig()  # Qwen2-VL-2B's
    picture = torch.zeros(144, config.hidden_size)
    group = [bytes([number]) for number in range(config.max_positions // 144)]
    cache = EncodingCache().image_features
    for name in group:
        cache.put(name, picture)
    assert all(cache.get(name) is not None for name in group)


@pytest.mark.parametrize("aggregation", ["easyref", "average", "concatenate"])
@pytest.mark.parametrize("cached", [False, True])
def test_progress_rises_to_its_total(encode: Callable, aggregation: str, cached: bool) -> None:
    cache = EncodingCache()
    if cached:
        encode(cache=cache, aggregation=aggregation)
    steps: list[tuple[int, int]] = []
    encode(cache=cache, aggregation=aggregation, progress=lambda *step: steps.append(step))
    done = [d for d, _ in steps]
    assert done == sorted(set(done))
    assert done[0] >= 1
    assert {total for _, total in steps} == {done[-1]}


def test_raising_from_progress_stops_at_once(encode: Callable) -> None:
    class Stop(Exception):
        pass

    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        encode(progress=stop)
    assert calls == [1, 2, 3, 4, 5, 6]
