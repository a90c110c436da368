"""EasyRef Combine Tokens on models: what is combined acts as the arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import Pack, apply, latents, predict, random_tokens, text
from goldens import difference

METHODS = ("concatenate", "average", "add", "subtract", "avoid")


def combine(pack: Pack, method: str, *tokens: Any, **settings: Any) -> Any:
    """The node with its defaults; None leaves an input free."""
    given = {f"tokens_{n}": t for n, t in enumerate(tokens, start=1) if t is not None}
    inputs = {"method": method, "weights": "1, 1", "tokens": given, **settings}
    return pack.run("EasyRefCombineTokens", **inputs)


@pytest.fixture
def groups(pack: Pack, easyref: Any) -> list[Any]:
    return [random_tokens(pack, easyref, seed) for seed in (1, 2)]


@pytest.mark.parametrize("method", METHODS)
def test_combined_tokens_act_as_their_formula_says(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, groups: list[Any], method: str
) -> None:
    combined = combine(pack, method, *groups)
    predict(spy.watch(apply(pack, unet, easyref, combined)), cfg=5.0)
    a, b = groups
    truth = {
        "concatenate": (torch.cat((a.cond, b.cond), 1), torch.cat((a.uncond, b.uncond), 1)),
        "average": ((a.cond + b.cond) / 2, (a.uncond + b.uncond) / 2),
        "add": (a.cond + b.cond, (a.uncond + b.uncond) / 2),
        "subtract": (a.cond - b.cond, (a.uncond + b.uncond) / 2),
        "avoid": (a.cond, b.cond),
    }[method]
    texts = [text()[0][0], text("negative")[0][0]]
    assert spy.max_error(list(zip(texts, truth, strict=True))) < 1e-4


def test_a_batch_gives_each_latent_its_own_tokens(pack: Pack, unet: Any, easyref: Any) -> None:
    """Five of them, by two nodes: each latent of a batch is what it is alone with its tokens."""
    groups = [random_tokens(pack, easyref, seed) for seed in range(5)]
    batch = combine(pack, "batch", combine(pack, "batch", *groups[:3]), *groups[3:])
    at_once = combine(pack, "batch", *groups)
    assert torch.equal(at_once.cond, batch.cond)
    x = latents(5)
    found = predict(apply(pack, unet, easyref, batch), 5.0, x)
    for number, group in enumerate(groups):
        alone = predict(apply(pack, unet, easyref, group), 5.0, x[number : number + 1])
        assert difference(found[number], alone[0]) < 1e-4
        assert difference(found[number], found[number - 1]) > 0.1


def test_a_batch_of_another_size_than_the_latents_is_refused(
    pack: Pack, unet: Any, easyref: Any, groups: list[Any]
) -> None:
    model = apply(pack, unet, easyref, combine(pack, "batch", *groups))
    with pack.refused("2 groups", "3 latents"):
        predict(model, 5.0, latents(3))
    with pack.refused("cannot be put into one batch"):
        combine(pack, "batch", groups[0], combine(pack, "concatenate", *groups))


def test_a_group_combined_with_itself_is_unchanged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Twice the same keys share the attention that one had."""
    expected = predict(apply(pack, unet, easyref, tokens), cfg=5.0)
    for method in ("concatenate", "average"):
        twice = combine(pack, method, tokens, tokens, weights="0.5")
        assert difference(predict(apply(pack, unet, easyref, twice), cfg=5.0), expected) < 1e-4


def test_weights_belong_to_inputs_and_gaps_are_allowed(pack: Pack, easyref: Any) -> None:
    a, b, c = (random_tokens(pack, easyref, seed) for seed in range(3))
    found = combine(pack, "subtract", a, b, None, c, weights="1, 0.5, 9, 2")
    assert difference(found.cond, a.cond - 0.5 * b.cond - 2 * c.cond) < 1e-5
    assert found.aggregation == "subtract of 3"


def test_one_group_a_latent_can_be_combined(pack: Pack, unet: Any, easyref: Any) -> None:
    batch = random_tokens(pack, easyref, 1, batch=3)
    found = combine(pack, "concatenate", random_tokens(pack, easyref, 2), batch)
    x = torch.randn((3, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    assert predict(apply(pack, unet, easyref, found), x=x).isfinite().all()


@pytest.mark.parametrize("method", [*METHODS, "batch"])
def test_combined_tokens_are_saved_and_loaded(
    pack: Pack, easyref: Any, groups: list[Any], method: str
) -> None:
    combined = combine(pack, method, *groups)
    result = pack.nodes["EasyRefSaveTokens"].execute(combined, f"combined/{method}", "output")
    path = Path(result.ui["text"][0]).relative_to(pack.base / "output/easyref_tokens")
    found = pack.run("EasyRefLoadTokens", f"{path.as_posix()} [output]")
    assert torch.equal(found.cond, combined.cond)
    assert torch.equal(found.uncond, combined.uncond)


def test_mistakes_name_the_inputs(pack: Pack, easyref: Any, groups: list[Any]) -> None:
    from dataclasses import replace

    a, b = groups
    with pack.refused("tokens_1", "golden", "tokens_4", "other.safetensors"):
        other = replace(b, adapter="else", adapter_name="other.safetensors")
        combine(pack, "add", a, b, None, other)
    with pack.refused("tokens_1 hold", "tokens_2", "'average'"):
        combine(pack, "average", a, combine(pack, "concatenate", a, b))
    with pack.refused("2 groups", "3"):
        combine(
            pack, "average", *(random_tokens(pack, easyref, 1, batch=batch) for batch in (2, 3))
        )
    with pack.refused("(1, -1)", "add up to 0"):
        combine(pack, "average", a, b, weights="1, -1")
    with pack.refused("3 numbers (1, 2, 3)", "tokens_2"):
        combine(pack, "add", a, b, weights="1, 2, 3")
    with pack.refused("tokens.tokens_1"):
        pack.run("EasyRefCombineTokens", method="add", weights="", tokens=a)


def test_missing_weights_are_one(pack: Pack, easyref: Any) -> None:
    groups = [random_tokens(pack, easyref, seed) for seed in range(3)]
    for weights in ("", " ", "1", "1, 1", "1,1,1"):
        found = combine(pack, "add", *groups, weights=weights)
        assert torch.equal(found.cond, combine(pack, "add", *groups).cond)


def test_weights_are_checked_before_the_run_and_used_by_some_methods(
    pack: Pack, groups: list[Any]
) -> None:
    validate = pack.nodes["EasyRefCombineTokens"].validate_inputs
    assert validate(weights="1, 0.5", tokens={"tokens_1": None}) is True
    assert validate(weights=None) is True
    assert "'half'" in validate(weights="1, half")
    plain = combine(pack, "concatenate", *groups)
    assert torch.equal(combine(pack, "concatenate", *groups, weights="1, 2, 3").cond, plain.cond)
