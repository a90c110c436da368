"""The training loop, on accelerate: one process or many, the same losses for the same seed."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..errors import EasyRefError
from ..files import check_place
from ..files import writing as writing_to
from .base import Base, TensorCache, fingerprint, load_base
from .config import Settings
from .disk import writing
from .ema import Average
from .export import official_state, write_whole
from .memory import SMALLER, check_fits, estimate_bytes, parameters_by_part
from .model import Batch, TrainedModel, build_model
from .preview import ValidationGroup, batch_sheet, generate, save_picture, validation_groups
from .processes import allow_open_files, join_processes, started
from .progress import Bar, Losses, start_trackers
from .records import read_records
from .samples import (
    SafeSamples,
    Sample,
    TrainingSamples,
    Walk,
    noise_generator,
    unless_failed,
)
from .schedule import learning_rate, loss_weights, spread_timesteps
from .state import (
    check_resume,
    find_resume,
    forget,
    gathered,
    restore,
    save_state,
    shares_of,
)


@dataclass
class Summary:
    """What a run did: losses by step, records skipped (name -> reason), the exported file."""

    losses: dict[int, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    exported: Path | None = None


def train(
    settings: Settings,
    *,
    resume: bool = True,
    force: bool = False,
    cpu: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Summary:
    """Run one stage to its last step, from its newest checkpoint if there is one.

    Args:
        resume: continue the checkpoint in output.folder; False removes what is there and starts
            anew.
        force: resume even though settings differ.
        cpu: leave a GPU alone.
        on_step: called after each optimiser step with its number and mean loss.

    Raises:
        EasyRefError: anything in the settings, data or checkpoints that cannot be used; a GPU
            that is too small; a full disk; a loss that is not a number (the batch's records are
            saved).
    """
    found = find_resume(settings, started(), force) if resume else None
    run = _Run(settings, cpu, found)
    try:
        return run.go(on_step)
    except torch.cuda.OutOfMemoryError as error:
        raise EasyRefError(
            f"The GPU has not enough memory ({str(error).splitlines()[0]}). {SMALLER}"
        ) from error


def dry_run(settings: Settings) -> str:
    """What would be trained, with how much memory, and the first batch as a picture."""
    run = _Run(settings)
    lines = ["part              parameters        trained"]
    for part, (total, trained) in parameters_by_part(run.model).items():
        lines.append(f"{part:<16}{total:>12,}   {trained:>12,}")
    needed = run.estimate()
    lines.append(f"memory about {sum(needed.values()) / 1e9:.2f} GB a process: ")
    lines[-1] += ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    samples = [run.samples[position] for position in range(settings.optimiser.batch_size)]
    path = Path(settings.output.folder) / "first_batch.png"
    with writing_to(path):
        lines.append(f"first batch: {save_picture(batch_sheet(samples), path)}")
    return "\n".join(lines)


class _Run:
    """Everything a run holds."""

    def __init__(
        self, settings: Settings, cpu: bool = False, found: tuple[int, Path] | None = None
    ) -> None:
        self.settings = settings
        self._found = found
        optimiser = settings.optimiser
        check_place(Path(settings.output.folder) / "losses.jsonl")
        records = read_records(settings.data.files, settings.data.root)
        self.samples = TrainingSamples(records, settings.data, settings.seed)
        _ = self.samples[0]  # stops here, before models are loaded, where nothing can be read
        self._validation = self._validation_groups()
        self.accelerator = join_processes(settings, cpu, bool(self._validation))
        check_resume(self.accelerator, found)
        set_seed(settings.seed)
        self.base: Base = load_base(settings.model.base)
        self.model: TrainedModel = build_model(
            self.base.unet, settings.model, optimiser.parts, settings.seed
        )
        if optimiser.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            self.model.encoder.gradient_checkpointing = True
            self.model.encoder.multimodal_llm.visual.gradient_checkpointing = True
        self.cache = TensorCache(settings.data.cache, fingerprint(settings.model.base))
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = half.get(optimiser.precision, torch.float32)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:  # what is trained stays in float32
                parameter.data = parameter.data.to(self.dtype)
        self.model.encoder.compute_dtype = self.dtype
        self.summary = Summary()

    def estimate(self) -> dict[str, int]:
        """Bytes that one process needs, by purpose."""
        longest, shares = self.samples.most_references, shares_of(self.accelerator)
        return estimate_bytes(self.model, self.base, self.settings, longest, shares)

    def _validation_groups(self) -> list[ValidationGroup]:
        output, data = self.settings.output, self.settings.data
        if output.validation is None:
            return []
        return validation_groups(read_records([output.validation], data.root), data)

    def go(self, on_step: Callable[[int, float], None]) -> Summary:
        settings, accelerator, found = self.settings, self.accelerator, self._found
        check_fits(self.estimate(), accelerator.device)
        self.base.to(accelerator.device, self.dtype)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            trained,
            lr=settings.optimiser.learning_rate,
            weight_decay=settings.optimiser.weight_decay,
        )
        if accelerator.state.deepspeed_plugin is not None:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = settings.optimiser.batch_size
            config["gradient_accumulation_steps"] = settings.optimiser.accumulation
            # DeepSpeed clips by itself; accelerate would have it clip at 1.
            config["gradient_clipping"] = settings.optimiser.max_grad_norm or 0.0
        average = None
        if settings.optimiser.ema is not None:
            self.model.to(accelerator.device)
            average = Average(self.model, settings.optimiser.ema)
        model, optimiser = accelerator.prepare(self.model, optimiser)
        first = 0
        if found is None:
            if accelerator.is_main_process:
                forget(Path(settings.output.folder))
            accelerator.wait_for_everyone()
        else:
            first = found[0]
            restore(accelerator, model, optimiser, average, found[1])
        start_trackers(accelerator, settings)
        self._loop(model, optimiser, average, first, on_step)
        whole = gathered(accelerator, model)
        if accelerator.is_main_process:
            self._export(whole, average)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return self.summary

    def _loop(
        self,
        model: torch.nn.Module,
        optimiser: Any,
        average: Average | None,
        first: int,
        on_step: Callable[[int, float], None],
    ) -> None:
        settings, accelerator = self.settings, self.accelerator
        batches = iter(self._loader(first))
        bar = Bar(settings, accelerator, first)
        folder = Path(settings.output.folder)
        losses = Losses(folder) if accelerator.is_main_process else None
        for step in range(first + 1, settings.optimiser.steps + 1):
            for parameters in optimiser.param_groups:
                parameters["lr"] = learning_rate(settings.optimiser, step)
            total = torch.zeros((), device=accelerator.device)
            for _ in range(settings.optimiser.accumulation):
                samples = unless_failed(next(batches))
                self._note_skipped(samples)
                with accelerator.accumulate(model):
                    loss = self._loss(model, samples)
                    self._stop_at_nan(loss, samples, step)
                    accelerator.backward(loss)
                    limit = settings.optimiser.max_grad_norm
                    if limit is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), limit)
                    optimiser.step()
                    optimiser.zero_grad()
                total += loss.detach()
            mean = accelerator.gather(total[None]).mean() / settings.optimiser.accumulation
            value = float(mean)
            self.summary.losses[step] = value
            if average is not None:
                average.update(accelerator.unwrap_model(model))
            bar.show(step, value)
            if losses is not None:
                losses.write(step, value)
            on_step(step, value)
            self._periodic(model, optimiser, average, step, value)

    def _periodic(
        self, model: Any, optimiser: Any, average: Average | None, step: int, loss: float
    ) -> None:
        settings, accelerator, output = self.settings, self.accelerator, self.settings.output
        last = step == settings.optimiser.steps
        if step % output.log_every == 0 or last:
            accelerator.log({"loss": loss, "skipped": len(self.summary.skipped)}, step=step)
        if step % output.save_every == 0 or last:
            save_state(accelerator, model, optimiser, average, settings, step)
        validate = step % output.validate_every == 0 or last
        if self._validation and validate and accelerator.is_main_process:
            self._validate(step)

    def _loader(self, first: int) -> DataLoader[Any]:
        optimiser, workers = self.settings.optimiser, self.settings.data.workers
        if workers:
            allow_open_files()
        walk = Walk(
            optimiser.batch_size,
            optimiser.accumulation,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            first,
            optimiser.steps,
        )
        return DataLoader(
            SafeSamples(self.samples),
            batch_sampler=walk,
            num_workers=workers,
            collate_fn=list,
        )

    def _loss(self, model: torch.nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
        """Mean over a batch; targets of other sizes pass the UNet one after the other."""
        sizes: dict[torch.Size, list[Sample]] = {}
        for sample in samples:
            sizes.setdefault(sample.target.shape, []).append(sample)
        groups = list(sizes.values())
        total = torch.zeros((), device=self.accelerator.device)
        for number, group in enumerate(groups):
            # Gradients are exchanged once a batch, in the last group's backward pass.
            wait = number < len(groups) - 1
            with self.accelerator.no_sync(model) if wait else nullcontext():
                total = total + model(self._batch(group)).sum()
        return total / len(samples)

    @torch.no_grad()
    def _batch(self, samples: Sequence[Sample]) -> Batch:
        device, scheduler = self.accelerator.device, self.base.scheduler
        levels, count = self.settings.optimiser.noise_levels, scheduler.config.num_train_timesteps
        latents, noises, steps, texts, pooled = [], [], [], [], []
        for sample in samples:
            generator = noise_generator(self.settings.seed, sample.position)
            latent = self._latent(sample).to(device).expand(levels, -1, -1, -1)
            latents.append(latent)
            noises.append(torch.randn(latent.shape, generator=generator).to(device))
            steps.append(spread_timesteps(count, levels, generator))
            key = f"text {self.dtype} {sample.text}"
            text = self.cache.get(key, lambda s=sample: self._text(s.text))
            texts.append(text["states"].to(device))
            pooled.append(text["pooled"].to(device))
        noise, timesteps = torch.cat(noises), torch.cat(steps).to(device)
        noisy = scheduler.add_noise(torch.cat(latents), noise, timesteps)
        weighting, gamma = self.settings.optimiser.loss_weighting, self.settings.optimiser.snr_gamma
        return Batch(
            noisy.to(self.dtype),
            noise,
            timesteps,
            loss_weights(scheduler.alphas_cumprod, timesteps, weighting, gamma).to(device),
            torch.stack(texts).to(self.dtype),
            torch.stack(pooled).to(self.dtype),
            torch.tensor([s.time_ids for s in samples], device=device, dtype=self.dtype),
            [s.references for s in samples],
            [s.text for s in samples],
        )

    def _latent(self, sample: Sample) -> torch.Tensor:
        seed, shape = self.settings.seed, tuple(sample.target.shape)
        key = f"latent {seed} {sample.source} {shape} {sample.time_ids}"
        number = sample.position
        if self.settings.data.cache:  # it must not depend on which sample needed it first
            number = zlib.crc32(key.encode(errors="surrogateescape"))
        generator = noise_generator(seed + 1, number)

        def make() -> dict[str, torch.Tensor]:
            return {"latent": self.base.encode_picture(sample.target, generator)}

        return self.cache.get(key, make)["latent"]

    def _text(self, text: str) -> dict[str, torch.Tensor]:
        states, pooled = self.base.encode_text([text])
        return {"states": states[0], "pooled": pooled[0]}

    def _note_skipped(self, samples: Sequence[Sample]) -> None:
        for name, reason in (s for sample in samples for s in sample.skipped):
            if name not in self.summary.skipped:
                self.summary.skipped[name] = reason
                count = len(self.summary.skipped)
                print(f"skipped record {name} ({count} so far): {reason}", file=sys.stderr)

    def _stop_at_nan(self, loss: torch.Tensor, samples: Sequence[Sample], step: int) -> None:
        # Every process must stop together, or the others would wait for ever.
        bad = self.accelerator.gather((~torch.isfinite(loss.detach()))[None])
        if not bad.any():
            return
        process = self.accelerator.process_index
        path = Path(self.settings.output.folder) / f"nan_step{step}_process{process}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = [{"record": s.record, "position": s.position, "text": s.text} for s in samples]
        path.write_text(json.dumps(batch, indent=2), encoding="utf-8")
        raise EasyRefError(
            f"The loss of step {step} is not a number. The batch's records are in {path}. Look "
            "at them, lower optimiser.learning_rate or set max_grad_norm, and resume from the "
            "last checkpoint."
        )

    def _validate(self, step: int) -> None:
        settings = self.settings
        with self.accelerator.autocast():
            picture = generate(
                self.base,
                self.model,
                self._validation,
                settings.data,
                self.accelerator.device,
                settings.seed,
            )
        path = Path(settings.output.folder) / "validation" / f"{step:07}.png"
        with writing(path):
            save_picture(picture, path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [picture]}, step=step)

    def _export(self, whole: dict[str, torch.Tensor] | None, average: Average | None) -> None:
        folder, size = Path(self.settings.output.folder), self.settings.data.image_size
        self.summary.exported = folder / "easyref.safetensors"
        write_whole(official_state(self.model, whole), self.summary.exported, size)
        if average is not None:
            state = official_state(self.model, replaced=average.weights)
            write_whole(state, folder / "easyref_ema.safetensors", size)
