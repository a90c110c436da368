"""Learning rates, timesteps and loss weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from easyref_core.errors import EasyRefError
from easyref_core.training.checkpoints import list_checkpoints
from easyref_core.training.config import OptimiserSettings, Settings
from easyref_core.training.loop import train
from easyref_core.training.model import Batch, TrainedModel
from easyref_core.training.schedule import learning_rate, loss_weights, spread_timesteps

Make = Callable[..., Settings]


def rates(**changes: object) -> list[float]:
    optimiser = OptimiserSettings(parts=("lora",), steps=8, learning_rate=1.0, **changes)
    return [learning_rate(optimiser, step) for step in range(1, 9)]


def test_a_constant_rate_after_a_linear_warm_up() -> None:
    assert rates() == [1.0] * 8
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_a_cosine_falls_to_a_fiftieth_at_the_last_step() -> None:
    falling = rates(learning_rate_schedule="cosine", warmup_steps=2)
    assert falling[:2] == [0.5, 1.0]
    assert falling[4] == pytest.approx(0.51)  # half way between warm-up and end
    assert falling[-1] == pytest.approx(0.02)
    assert all(a > b for a, b in itertools.pairwise(falling[1:]))


def test_the_optimiser_steps_at_the_scheduled_rate(settings: Make, tmp_path: Path) -> None:
    def exported(**changes: object) -> dict[str, torch.Tensor]:
        folder = str(tmp_path / str(changes["optimiser_learning_rate"]))
        return load_file(
            train(settings(optimiser_steps=1, output_folder=folder, **changes)).exported
        )

    constant = exported(optimiser_learning_rate=2e-5)
    # Its only step is its last one.
    falling = exported(optimiser_learning_rate=1e-3, optimiser_learning_rate_schedule="cosine")
    for name, weight in constant.items():
        assert torch.allclose(weight, falling[name], rtol=0, atol=1e-8), name


def test_loss_weights_follow_their_papers() -> None:
    levels = torch.tensor([0.9, 0.5, 0.1])  # signal to noise 9, 1, 1/9
    timesteps = torch.tensor([2, 1, 0, 0])
    assert loss_weights(levels, timesteps, "none", 5.0).tolist() == [1, 1, 1, 1]
    minimum = loss_weights(levels, timesteps, "min_snr", 5.0)
    assert minimum.tolist() == pytest.approx([1, 1, 5 / 9, 5 / 9])
    debiased = loss_weights(levels, timesteps, "debiased", 5.0)
    assert debiased.tolist() == pytest.approx([3, 1, 1 / 3, 1 / 3])


def test_a_debiased_loss_weights_strong_noise_more(settings: Make, tmp_path: Path) -> None:
    """With batches of one sample, so that each loss is of one timestep."""

    def losses(weighting: str) -> list[float]:
        folder = str(tmp_path / weighting)
        made = settings(
            optimiser_loss_weighting=weighting,
            optimiser_batch_size=1,
            optimiser_learning_rate=1e-12,
            output_folder=folder,
        )
        return list(train(made).losses.values())

    plain, debiased = losses("none"), losses("debiased")
    found = [d / p for d, p in zip(debiased, plain, strict=True)]
    levels = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    known = (levels / (1 - levels)).rsqrt()
    assert len(set(found)) == 4
    for ratio in found:
        assert (known - ratio).abs().min() < 1e-3 * ratio


def test_timesteps_are_spread_evenly_over_the_schedule() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [spread_timesteps(1000, 4, generator).tolist() for _ in range(200)]
    for row in drawn:
        assert sorted(step // 250 for step in row) == [0, 1, 2, 3]
    assert len({row[0] for row in drawn}) > 100
    assert sorted({row[0] // 250 for row in drawn}) == [0, 1, 2, 3]


def test_more_noise_levels_give_the_mean_of_their_losses(settings: Make, tmp_path: Path) -> None:
    """Compared with each level alone, with the same tokens."""
    batches: list[Batch] = []

    def losses(levels: int) -> dict[int, float]:
        forward = TrainedModel.forward

        def seen(self: TrainedModel, batch: Batch) -> torch.Tensor:
            found = forward(self, batch)
            batches.append(batch)
            rows = []
            with torch.no_grad():
                for level in range(levels):
                    own = {
                        name: getattr(batch, name)[level::levels]
                        for name in ("noisy", "noise", "timesteps", "weights")
                    }
                    rows.append(forward(self, dataclasses.replace(batch, **own)))
            assert torch.allclose(found.detach(), torch.stack(rows).mean(0), rtol=1e-4)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainedModel, "forward", seen)
            folder = str(tmp_path / str(levels))
            changes = {"optimiser_noise_levels": levels, "optimiser_steps": 2}
            return train(settings(output_folder=folder, **changes)).losses

    assert losses(3) != losses(1)
    several, alone = batches[0], batches[2]
    assert len(several.noisy) == 3 * len(alone.noisy) == 3 * len(several.text)
    assert len(set(several.timesteps.tolist())) == len(several.timesteps)
    assert several.timesteps[::3].shape == alone.timesteps.shape


def test_a_cosine_resumes_to_the_same_losses(settings: Make, tmp_path: Path) -> None:
    changes = {
        "optimiser_learning_rate_schedule": "cosine",
        "optimiser_warmup_steps": 1,
        "optimiser_loss_weighting": "min_snr",
    }
    whole = train(settings(**changes)).losses
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert train(settings(**changes)).losses == {n: whole[n] for n in (3, 4)}


def test_a_cosine_resumes_with_other_steps_only_if_forced(settings: Make) -> None:
    falling = {"optimiser_learning_rate_schedule": "cosine"}
    train(settings(optimiser_steps=2, **falling))
    with pytest.raises(EasyRefError, match=r"optimiser\.steps: 2 -> 3"):
        train(settings(optimiser_steps=3, **falling))
    assert list(train(settings(optimiser_steps=3, **falling), force=True).losses) == [3]


def test_a_checkpoint_from_before_a_setting_existed_resumes(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    ((_, folder),) = list_checkpoints(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    later = "learning_rate_schedule warmup_steps loss_weighting snr_gamma noise_levels"
    for name in later.split():
        del state["settings"]["optimiser"][name]
    del state["files"], state["checksum"]  # neither existed
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert list(train(settings(optimiser_steps=3)).losses) == [3]


def test_the_defaults_are_the_official_ones(settings: Make) -> None:
    made = dataclasses.asdict(settings().optimiser)
    assert made["learning_rate_schedule"] == "constant"
    assert made["loss_weighting"] == "none"
    assert made["warmup_steps"] == 0
    assert made["noise_levels"] == 1
