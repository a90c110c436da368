"""Aggregations over the MLLM's layers in the benchmark: tokens of their own, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
from generation_methods import generate, load, pixels
from safetensors.torch import load_file, save_file

from easyref_core import load_checkpoint
from easyref_core.adapter.layer_pooling import POOLING
from easyref_core.encode.layer_pooling import add_layer_pools
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.settings import GenerationSettings
from easyref_core.evaluation.trials import Trial

MakeTrial = Callable[..., Trial]


@pytest.fixture
def pooled(tiny: Any, tmp_path: Path) -> Path:
    """The tiny adapter with random pools for dla."""
    encoder = plan_encoder(load_checkpoint(tiny.adapter), tiny.mllm).build()
    add_layer_pools(encoder, "dla", "blocks")
    goldens.randomise(encoder.mllm_layer_pooling, 0)
    pools = {n: t for n, t in encoder.state_dict().items() if n.startswith(POOLING)}
    save_file(load_file(tiny.adapter) | pools, tmp_path / "pooled.safetensors")
    return tmp_path / "pooled.safetensors"


def test_each_aggregation_has_tokens_and_pictures_of_its_own(
    pooled: Path, settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    last, dla = (
        make_trial("easyref", adapter=str(pooled), aggregation=name) for name in ("easyref", "dla")
    )
    method = load(settings, last, dla)
    first = pixels(generate(method, tmp_path, last))
    assert pixels(generate(method, tmp_path, dla)) != first
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 2
    assert pixels(generate(method, tmp_path, last)) == first
    method.close()
    plain = make_trial("easyref")  # of the adapter without pools
    assert pixels(generate(load(settings, plain), tmp_path, plain)) == first


@pytest.mark.parametrize("method", ["easyref", "easyref-other"])
def test_an_aggregation_that_the_adapter_lacks_is_refused_before_anything_is_made(
    method: str, pooled: Path, settings: GenerationSettings, make_trial: MakeTrial
) -> None:
    trials = [
        make_trial(method, group, adapter=str(pooled), aggregation=aggregation)
        for aggregation in ("dla", "lap")
        for group in (0, 1)
    ]
    with goldens.refused("pooled.safetensors has no weights for aggregation 'lap'", "for dla"):
        load_methods(settings, trials)
    with goldens.refused("has no weights for aggregation 'dla': it pools no layers"):
        load_methods(settings, [make_trial(method, n, aggregation="dla") for n in (0, 1)])
