"""Training of identity: the LoRA on the features of references that a reference pass reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.errors import EasyRefError
from easyref_core.training.base import load_base
from easyref_core.training.build_model import build_model
from easyref_core.training.config import ModelSettings, Settings
from easyref_core.training.disk import save_weights
from easyref_core.training.loop import TrainingRun, dry_run, train

Make = Callable[..., Settings]
KEPT = {"data_drop_image": 0.0, "data_drop_text": 0.0, "data_drop_both": 0.0}


@pytest.fixture(scope="module")
def stage3(training_set: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without identity, with the MLLM inside."""
    sizes = {"reference_tokens": 4, "lora_rank": 2}
    model = ModelSettings(str(training_set.base), str(training_set.mllm), **sizes)
    built = build_model(load_base(model.base).unet, model, ["mllm"], seed=0)
    path = tmp_path_factory.mktemp("stage3") / "easyref.safetensors"
    save_weights(built.checkpoint_state(), path, {"image_size": "56"})
    return path


@pytest.fixture
def identity(settings: Make, stage3: Path) -> Make:
    """Settings that train identity on that adapter."""

    def load(**changes: Any) -> Settings:
        defaults = {
            "stage": "identity",
            "model_adapter": str(stage3),
            "model_identity_references": 1,
            "model_identity_rank": 2,
            "optimiser_parts": ["identity"],
            "optimiser_steps": 2,
        }
        return settings(**defaults | KEPT | changes)

    return load


def test_only_the_identity_lora_is_trained_and_saved_beside_the_adapter(
    identity: Make, stage3: Path
) -> None:
    done = train(identity(optimiser_ema=0.5))
    after, before = load_file(done.exported), load_file(stage3)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    new = after.keys() - before.keys()
    assert new
    assert all("attn1.processor.to_" in n and "_identity_lora." in n for n in new)
    assert all(after[name].any() for name in new if name.endswith("up.weight"))
    checkpoint = load_checkpoint(done.exported.with_name("easyref_ema.safetensors"))
    assert checkpoint.identity_lora_rank == 2
    assert checkpoint.identity == load_checkpoint(stage3).identity


def test_the_loss_of_a_memorised_batch_falls(identity: Make) -> None:
    run = TrainingRun(identity(model_identity_references=2, optimiser_noise_levels=2))
    samples = [run.samples[0], run.samples[1]]
    batch = run.batches.make(samples)
    assert [len(sample.identity) for sample in samples] == [2, 2]
    optimiser = torch.optim.AdamW(run.model.trained_parameters().values(), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = run.model(batch).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@torch.no_grad()
def test_references_get_the_noise_level_of_their_rows_and_noise_of_their_sample(
    identity: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(identity(optimiser_noise_levels=3))
    samples = [run.samples[0], run.samples[1]]
    batch = run.batches.make(samples)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = run.model.unet.forward

    def spy(sample: torch.Tensor, timestep: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        seen.append((sample, timestep))
        return original(sample, timestep, *inputs, **options)

    monkeypatch.setattr(run.model.unet, "forward", spy)
    run.model(batch)
    (references, times), (_, own_times) = seen
    assert torch.equal(times, own_times)
    alphas = run.base.scheduler.alphas_cumprod[times].sqrt()[:, None, None, None]
    latents = [run.base.encode_image(sample.identity[0]) for sample in samples]
    clean = torch.stack([latent for latent in latents for _ in range(3)])
    noises = (references - alphas * clean) / (1 - alphas**2).sqrt()
    assert torch.allclose(noises[:3], noises[:1].expand(3, -1, -1, -1), atol=1e-3)
    assert (noises[0] - noises[3]).abs().max() > 1
    again = run.batches.make(samples)
    assert torch.equal(run.model(again), run.model(batch))


def test_dropped_references_act_neither_as_tokens_nor_as_identity(identity: Make) -> None:
    def samples(**drops: float) -> list[Any]:
        run = TrainingRun(identity(**drops))
        return [run.samples[position] for position in range(24)]

    assert all(len(s.identity) == 1 and not s.without_tokens for s in samples())
    assert not any(s.identity for s in samples(data_drop_image=1.0))
    assert not any(s.identity for s in samples(data_drop_both=1.0))
    assert all(s.identity for s in samples(data_drop_text=1.0))
    either = samples(data_drop_identity=0.5, data_drop_tokens=0.5)
    assert {(bool(s.identity), s.without_tokens) for s in either} == {(True, True), (False, False)}


@torch.no_grad()
def test_left_out_tokens_add_nothing(identity: Make) -> None:
    run = TrainingRun(identity(data_drop_tokens=1.0))
    batch = run.batches.make([run.samples[0]])
    assert batch.token_weights.tolist() == [0]
    other = replace(batch, captions=["something else"])
    assert torch.equal(run.model(batch), run.model(other))
    shown = replace(batch, token_weights=None)
    assert not torch.equal(run.model(shown), run.model(batch))


def test_a_batch_without_references_trains_nothing(identity: Make) -> None:
    run = TrainingRun(identity(data_drop_identity=1.0))
    batch = run.batches.make([run.samples[0]])
    assert batch.identity is None
    run.model(batch).sum().backward()
    assert all(not p.grad.any() for p in run.model.trained_parameters().values())


def test_a_killed_identity_training_resumes_to_the_same_losses_with_cached_latents(
    identity: Make, tmp_path: Path
) -> None:
    changes = {"output_save_every": 1, "data_cache": str(tmp_path / "cache")}
    changes["optimiser_gradient_checkpointing"] = True
    whole = train(identity(output_folder=str(tmp_path / "whole"), **changes))

    def die(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(identity(**changes), on_step=die)
    rest = train(identity(**changes))
    assert rest.losses == {2: whole.losses[2]}
    plain = identity(output_folder=str(tmp_path / "plain"), **changes)
    plain = replace(plain, optimiser=replace(plain.optimiser, gradient_checkpointing=False))
    assert train(plain).losses == pytest.approx(whole.losses, abs=1e-6)


def test_pools_and_identity_are_trained_at_once(identity: Make, stage3: Path) -> None:
    parts = ["layer_pooling", "identity"]
    done = train(identity(model_aggregation="dla", optimiser_parts=parts, optimiser_steps=1))
    new = load_file(done.exported).keys() - load_file(stage3).keys()
    assert {n.split(".")[0] for n in new} == {"mllm_layer_pooling", "unet"}


def test_validation_pictures_are_drawn_with_identity(
    identity: Make, training_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyref_core.training.preview._STEPS", 2)
    drawn = []
    for references in (1, 2):
        made = identity(
            optimiser_steps=1,
            output_validation=str(training_set.records),
            model_identity_references=references,
            output_folder=str(tmp_path / str(references)),
        )
        train(made)
        drawn.append((tmp_path / str(references) / "validation" / "0000001.png").read_bytes())
    assert drawn[0] != drawn[1]


class _Saved:
    """Bytes of tensors saved for the backward pass, weights excluded."""

    def __init__(self, run: TrainingRun) -> None:
        weights = {p.untyped_storage()._cdata for p in run.model.parameters()}
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        batch = run.batches.make([run.samples[0], run.samples[1]])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _ = run.model(batch)
        self.bytes = sum(s.nbytes() for key, s in storages.items() if key not in weights)


class _Fused(torch.autograd.Function):
    """Attention that saves what a GPU's fused kernel saves."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def test_the_memory_of_identity_is_estimated(
    identity: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = "easyref_core.attention_kernels.attend"
    monkeypatch.setattr(attend, lambda q, k, v, *_, **__: _Fused.apply(q, k, v))

    def run(references: int, **changes: Any) -> TrainingRun:
        parts = ["final_layers", *(["identity"] if references else [])]
        stage = "identity" if references else "multi_reference"
        named = {"stage": stage, "optimiser_parts": parts, "optimiser_batch_size": 2}
        return TrainingRun(identity(model_identity_references=references, **named, **changes))

    plain, one, two = (run(count) for count in (0, 1, 2))
    wanted = _Saved(one).bytes - _Saved(plain).bytes
    estimates = [r.estimate()["activations"] for r in (plain, one, two)]
    assert estimates[1] - estimates[0] == pytest.approx(wanted, rel=0.25)
    assert estimates[2] - estimates[1] == pytest.approx((estimates[1] - estimates[0]) / 2, rel=0.01)
    saving = run(1, optimiser_gradient_checkpointing=True).estimate()["activations"]
    assert saving < estimates[1]


def test_a_dry_run_names_the_identity_lora(identity: Make) -> None:
    (line,) = [s for s in dry_run(identity()).splitlines() if s.startswith("identity ")]
    _, total, trained = line.split()
    assert total == trained != "0"


def test_an_identity_lora_of_another_rank_is_refused(identity: Make, tmp_path: Path) -> None:
    first = train(identity(optimiser_steps=1)).exported
    other = identity(
        model_adapter=str(first),
        model_identity_rank=4,
        output_folder=str(tmp_path / "other"),
    )
    with pytest.raises(EasyRefError, match=r"identity LoRA of rank 2; the recipe says 4"):
        train(other)
