"""Training of layer pooling, from adapters without it and with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.training.base import load_base
from easyref_core.training.build_model import build_model
from easyref_core.training.config import ModelSettings, Settings
from easyref_core.training.disk import save_weights
from easyref_core.training.loop import TrainingRun, dry_run, train

Make = Callable[..., Settings]
POOLING = "mllm_layer_pooling."


@pytest.fixture(scope="module")
def stage3(training_set: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without layer pooling, with the MLLM inside."""
    sizes = {"reference_tokens": 4, "lora_rank": 2}
    model = ModelSettings(str(training_set.base), str(training_set.mllm), **sizes)
    built = build_model(load_base(model.base).unet, model, ["mllm"], seed=0)
    path = tmp_path_factory.mktemp("stage3") / "easyref.safetensors"
    save_weights(built.checkpoint_state(), path, {"image_size": "56"})
    return path


@pytest.fixture
def pooled(settings: Make, stage3: Path, tmp_path: Path) -> Make:
    """Settings that train pools on that adapter."""

    def load(aggregation: str = "dla", **changes: Any) -> Settings:
        defaults = {
            "stage": "multi_reference",
            "model_adapter": str(stage3),
            "model_aggregation": aggregation,
            "optimiser_parts": ["layer_pooling"],
            "optimiser_steps": 2,
            "optimiser_learning_rate": 1e-2,
            "output_folder": str(tmp_path / aggregation),
        }
        return settings(**defaults | changes)

    return load


@pytest.mark.parametrize("shape", ["blocks", "scores"])
@pytest.mark.parametrize("aggregation", ["dla", "lap"])
@torch.no_grad()
def test_new_pools_start_where_the_plain_adapter_is(
    pooled: Make, aggregation: str, shape: str
) -> None:
    run = TrainingRun(pooled(aggregation, model_pooling=shape))
    plain = TrainingRun(
        pooled(
            model_aggregation="easyref", model_pooling="blocks", optimiser_parts=["cross_attention"]
        )
    )
    samples = [run.samples[0], run.samples[1]]
    references, captions = [s.references for s in samples], [s.text for s in samples]
    tokens = run.model.tokens(references, captions)
    assert torch.equal(tokens, plain.model.tokens(references, captions))


def test_only_the_pools_of_the_aggregation_change_and_the_rest_stays_to_the_bit(
    pooled: Make, stage3: Path, tmp_path: Path, training_set: Any
) -> None:
    dla = train(pooled(optimiser_ema=0.5)).exported
    after, before = load_file(dla), load_file(stage3)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    new = {name.removeprefix(POOLING).split(".")[0] for name in after.keys() - before.keys()}
    assert new == {"text", "image"}
    moved = [f"{POOLING}{pool}.weighted_sum.weight" for pool in ("text", "image")]
    assert all(0 < (after[name][-1] - 1).abs() < 0.1 for name in moved)
    averaged = load_checkpoint(dla.with_name("easyref_ema.safetensors"))
    plan_encoder(averaged, training_set.mllm).build()
    checkpoint = load_checkpoint(dla)
    count = len(after[moved[0]])
    assert checkpoint.file.metadata["mllm_layers"] == ",".join(map(str, range(count)))
    assert checkpoint.identity == load_checkpoint(stage3).identity

    both = load_file(train(pooled("lap", model_adapter=str(dla))).exported)
    assert all(torch.equal(both[name], weight) for name, weight in after.items())
    assert {n.split(".")[1] for n in both.keys() - after.keys()} == {"all"}


def test_a_killed_pool_training_resumes_to_the_same_losses(pooled: Make, tmp_path: Path) -> None:
    changes = {"model_pooling": "scores", "optimiser_ema": 0.9, "output_save_every": 1}
    whole = train(pooled(output_folder=str(tmp_path / "whole"), **changes))

    def die(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pooled(**changes), on_step=die)
    rest = train(pooled(**changes))
    assert rest.losses == {2: whole.losses[2]}
    first, second = load_file(whole.exported), load_file(rest.exported)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_body_runs_without_gradients_where_it_is_frozen(
    pooled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyref_core.qwen2vl import decoder, vision

    recorded: dict[type, list[bool]] = {decoder.DecoderLayer: [], vision.VisionTower: []}
    for kind, seen in recorded.items():
        original = kind.forward

        def spy(self, *inputs, _original=original, _seen=seen, **options):
            _seen.append(torch.is_grad_enabled())
            return _original(self, *inputs, **options)

        monkeypatch.setattr(kind, "forward", spy)
    for parts, frozen in ((["layer_pooling"], True), (["layer_pooling", "mllm"], False)):
        for seen in recorded.values():
            seen.clear()
        run = TrainingRun(pooled(optimiser_parts=parts))
        run.model(run.batches.make([run.samples[0]])).sum().backward()
        *body, final = recorded[decoder.DecoderLayer]
        assert final
        assert not any(body) if frozen else all(body)
        assert recorded[vision.VisionTower] == [not frozen]


def test_pools_and_mllm_are_trained_together(pooled: Make, stage3: Path) -> None:
    parts = ["layer_pooling", "mllm", "final_layers"]
    made = pooled(optimiser_parts=parts, optimiser_gradient_checkpointing=True)
    after, before = load_file(train(made).exported), load_file(stage3)
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert {name.split(".")[0] for name in changed} == {"mllm_final_layer", "multimodal_llm"}
    assert "multimodal_llm.model.embed_tokens.weight" in changed


def test_the_memory_of_the_pools_is_estimated(pooled: Make) -> None:
    def activations(**changes: Any) -> int:
        return TrainingRun(pooled(**changes)).estimate()["activations"]

    lap = activations(aggregation="lap")
    assert activations() == lap
    assert activations(model_mllm_layers=[1, 2, 3]) < lap


def test_a_dry_run_names_the_pools(pooled: Make) -> None:
    lines = dry_run(pooled()).splitlines()
    (line,) = [line for line in lines if line.startswith("layer_pooling")]
    _, total, trained = line.split()
    assert int(trained.replace(",", "")) > 1000
    assert total == trained


def test_settings_that_differ_from_the_adapters_pools_are_refused(
    pooled: Make, tmp_path: Path
) -> None:
    count = len(load_file(train(pooled()).exported)[f"{POOLING}text.weighted_sum.weight"])
    subset = f"{count - 2},{count - 1}"
    made = {"model_adapter": str(tmp_path / "dla" / "easyref.safetensors")}
    for changes, said in (
        ({"model_pooling": "scores"}, "by blocks; the recipe says scores"),
        ({"model_mllm_layers": [count - 2, count - 1]}, f"says {subset.replace(',', ', ')}"),
        ({"aggregation": "lap", "optimiser_parts": ["projector"]}, "has no layer pooling for"),
    ):
        with pytest.raises(EasyRefError, match=said):
            train(pooled(output_folder=str(tmp_path / "other"), **made | changes))
    with pytest.raises(EasyRefError, match=rf"end with {count - 1}.*Make model.mllm_layers"):
        train(pooled("lap", model_mllm_layers=[0, 1], output_folder=str(tmp_path / "other")))
    few = train(pooled("lap", model_mllm_layers=[count - 2, count - 1])).exported
    assert load_checkpoint(few).file.metadata["mllm_layers"] == subset


def test_an_aggregation_without_pools_carries_them_on(pooled: Make, tmp_path: Path) -> None:
    dla = train(pooled(optimiser_steps=1)).exported
    plain = pooled(
        model_aggregation="easyref",
        model_adapter=str(dla),
        optimiser_parts=["projector"],
        output_folder=str(tmp_path / "plain"),
    )
    before, after = load_checkpoint(dla), load_checkpoint(train(plain).exported)
    assert after.file.metadata == before.file.metadata
    pools = [name for name in load_file(dla) if name.startswith(POOLING)]
    assert all(torch.equal(load_file(dla)[n], load_file(after.path)[n]) for n in pools)
