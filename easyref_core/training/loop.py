"""A training run: the same losses for the same seed, in one process or in many."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..adapter.checkpoint import IMAGE_SIZE
from ..files import check_place, new_name
from ..files import writing as writing_to
from .base import Base, fingerprint, load_base
from .batches import Batches, TensorCache
from .build_model import build_model
from .checkpoints import Checkpoints, gathered_state
from .config import Settings
from .disk import writing
from .divergence import check_weights, loss_error
from .engine import Ema, StepOptions, is_finite, run_optimiser
from .memory import check_fits, estimate_bytes, explaining_lack_of_memory, parameters_by_part
from .model import TrainedModel
from .outputs import check_results, keep_logs
from .preview import batch_sheet, generate, save_image, validation_groups
from .processes import (
    allow_open_files,
    has_sharded_weights,
    join_processes,
    shard_counts,
    world_size,
)
from .progress import LOSSES, Bar, Losses, start_trackers
from .records import read_records
from .samples import PositionSampler, SafeSamples, Sample, TrainingSamples, raise_errors
from .schedule import learning_rate

_SHOWN = 64  # samples of the first batch
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Summary:
    """Results of a run: losses by step, skipped records (name -> reason), the exported file."""

    losses: dict[int, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    exported: Path | None = None


def train(
    settings: Settings,
    *,
    overwrite: bool = False,
    force: bool = False,
    cpu: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Summary:
    """Run one stage to its last step, from its newest checkpoint if there is one.

    Args:
        overwrite: start from step 0, and replace what an earlier run has left in output.folder.
        force: resume even if settings differ.
        cpu: do not use a GPU.
        on_step: called after each optimiser step with its number and mean loss.

    Raises:
        EasyRefError: anything in the settings, data or checkpoints that cannot be used; a GPU
            that is too small; results of another run that would be replaced; a full disk;
            a loss that is not a number (the batch's records are saved).
    """
    checkpoints = run_checkpoints(settings)
    checkpoint = None if overwrite else checkpoints.newest(world_size(), force)
    checkpoints.check_own()
    check_results(settings, overwrite or checkpoint is not None)
    with explaining_lack_of_memory():
        return TrainingRun(settings, cpu, checkpoint).train(on_step, overwrite)


def dry_run(settings: Settings) -> str:
    """The trained parts and the memory they need, as text; draws the first batch as an image.

    Raises:
        EasyRefError: see `train`.
    """
    with explaining_lack_of_memory():
        run = TrainingRun(settings)
    lines = ["part              parameters        trained"]
    for part, (total, trained) in parameters_by_part(run.model).items():
        lines.append(f"{part:<16}{total:>12,}   {trained:>12,}")
    needed = run.estimate()
    lines.append(f"memory about {sum(needed.values()) / 1e9:.2f} GB a process: ")
    lines[-1] += ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    shown = min(settings.optimiser.batch_size, _SHOWN)
    samples = [run.samples[position] for position in range(shown)]
    path = new_name(Path(settings.output.folder) / "first_batch.png")
    with writing_to(path):
        lines.append(f"first batch: {save_image(batch_sheet(samples), path)}")
    return "\n".join(lines)


def run_checkpoints(settings: Settings) -> Checkpoints:
    """The checkpoints of a run with these settings."""
    free = ["output", "data.workers"]
    if settings.optimiser.learning_rate_schedule == "constant":
        free.append("optimiser.steps")  # a cosine falls towards the last step
    return Checkpoints(
        Path(settings.output.folder),
        settings,
        settings.output.keep,
        "to train on from it, name its easyref.safetensors as model.adapter, and another "
        "output.folder",
        "begin anew with --overwrite",
        free,
        metadata={IMAGE_SIZE: str(settings.data.image_size)},
    )


class TrainingRun:
    """Data, models and processes of a run.

    Args:
        cpu: do not use a GPU.
        checkpoint: (step, folder) of the checkpoint to resume.

    Raises:
        EasyRefError: see `train`.
    """

    def __init__(
        self, settings: Settings, cpu: bool = False, checkpoint: tuple[int, Path] | None = None
    ) -> None:
        self.settings = settings
        self.checkpoints = run_checkpoints(settings)
        self._checkpoint = checkpoint
        output, data, optimiser = settings.output, settings.data, settings.optimiser
        check_place(Path(output.folder) / LOSSES)
        if data.cache is not None:
            check_place(Path(data.cache) / "new")
        self.samples = TrainingSamples(
            read_records(data.files, data.root),
            data,
            settings.seed,
            settings.model.identity_references,
        )
        _ = self.samples[0]  # fails here, before models are loaded, if nothing can be read
        self.validation = []
        if output.validation is not None:
            self.validation = validation_groups(read_records([output.validation], data.root), data)
        self.accelerator = join_processes(settings, cpu, bool(self.validation))
        self.checkpoints.check(self.accelerator, checkpoint)
        set_seed(settings.seed)
        self.base: Base = load_base(settings.model.base)
        self.model: TrainedModel = build_model(
            self.base.unet, settings.model, optimiser.parts, settings.seed
        )
        metadata = {**self.checkpoints.metadata, **self.model.metadata}
        self.checkpoints = replace(self.checkpoints, metadata=metadata)
        if optimiser.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            self.model.encoder.gradient_checkpointing = True
            self.model.encoder.multimodal_llm.visual.gradient_checkpointing = True
        self.dtype = _DTYPES[optimiser.precision]
        for parameter in self.model.parameters():
            if not parameter.requires_grad:  # trained weights stay in float32
                parameter.data = parameter.data.to(self.dtype)
        self.model.encoder.compute_dtype = self.dtype
        cache = TensorCache(data.cache, fingerprint(settings.model.base))
        self.batches = Batches(self.base, cache, settings, self.accelerator.device, self.dtype)
        self.summary = Summary()

    def estimate(self) -> dict[str, int]:
        """Bytes that one process needs, by purpose."""
        largest, shards = self.samples.most_references, shard_counts(self.accelerator)
        return estimate_bytes(self.model, self.base, self.settings, largest, shards)

    def train(self, on_step: Callable[[int, float], None], overwrite: bool = False) -> Summary:
        """See `train`."""
        settings, accelerator, checkpoint = self.settings, self.accelerator, self._checkpoint
        check_fits(self.estimate(), accelerator.device)
        self.base.to(accelerator.device, self.dtype)
        optimiser = torch.optim.AdamW(
            self.model.trained_parameters().values(),
            lr=settings.optimiser.learning_rate,
            weight_decay=settings.optimiser.weight_decay,
        )
        if accelerator.state.deepspeed_plugin is not None:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = settings.optimiser.batch_size
            config["gradient_accumulation_steps"] = settings.optimiser.accumulation
            # DeepSpeed clips by itself, and at 1 if accelerate is not told otherwise.
            config["gradient_clipping"] = settings.optimiser.max_grad_norm or 0.0
        ema = None
        if settings.optimiser.ema is not None:
            self.model.to(accelerator.device)
            ema = Ema(self.model)
        model, optimiser = accelerator.prepare(self.model, optimiser)
        if accelerator.is_main_process:
            self.checkpoints.clear(overwrite)
            self.batches.cache.sweep()
            if checkpoint is None and not overwrite:
                keep_logs(Path(settings.output.folder))
        accelerator.wait_for_everyone()
        if checkpoint is not None:
            self.checkpoints.restore(accelerator, model, optimiser, ema, checkpoint[1])
        start_trackers(accelerator, settings)
        self._optimise(model, optimiser, ema, checkpoint[0] if checkpoint else 0, on_step)
        whole = gathered_state(accelerator, model)
        if accelerator.is_main_process:
            folder = Path(settings.output.folder)
            self.summary.exported = self.checkpoints.save_weights(self.model, whole, ema, folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return self.summary

    def _optimise(
        self,
        model: torch.nn.Module,
        optimiser: Any,
        ema: Ema | None,
        first: int,
        on_step: Callable[[int, float], None],
    ) -> None:
        settings, accelerator = self.settings, self.accelerator
        batches = iter(self._loader(first))
        bar = Bar(settings, accelerator, first)
        folder = Path(settings.output.folder)
        whole = None if has_sharded_weights(accelerator) else self.model
        losses = Losses(folder, first) if accelerator.is_main_process else None

        def loss(step: int) -> torch.Tensor:
            samples = raise_errors(next(batches))
            self._report_skipped(samples)
            value = self._loss(model, samples)
            if not is_finite(accelerator, value):
                file = f"nan_step{step}_process{accelerator.process_index}.json"
                raise loss_error(whole, samples, step, step == first + 1, folder / file)
            return value

        def after_step(step: int, local_loss: torch.Tensor) -> None:
            mean = float(accelerator.gather(local_loss[None]).mean())
            self.summary.losses[step] = mean
            bar.show(step, mean)
            if losses is not None:
                losses.write(step, mean)
            on_step(step, mean)
            self._periodic(model, optimiser, ema, step, mean)

        options = StepOptions(
            settings.optimiser.steps,
            lambda step: learning_rate(settings.optimiser, step),
            settings.optimiser.accumulation,
            settings.optimiser.max_grad_norm,
            lambda step: settings.optimiser.ema or 0.0,
        )
        run_optimiser(accelerator, model, optimiser, ema, options, first, loss, after_step)

    def _periodic(
        self, model: Any, optimiser: Any, ema: Ema | None, step: int, loss: float
    ) -> None:
        """Log, save and validate, where it is time."""
        output, last = self.settings.output, step == self.settings.optimiser.steps
        if step % output.log_every == 0 or last:
            self.accelerator.log({"loss": loss, "skipped": len(self.summary.skipped)}, step=step)
        if step % output.save_every == 0 or last:
            if not has_sharded_weights(self.accelerator):
                check_weights(self.model, step)
            self.checkpoints.save(self.accelerator, model, optimiser, ema, step)
        validate = step % output.validate_every == 0 or last
        if self.validation and validate and self.accelerator.is_main_process:
            self.validate(step)

    def _loader(self, first: int) -> DataLoader[Any]:
        optimiser, workers = self.settings.optimiser, self.settings.data.workers
        if workers:
            allow_open_files()
        positions = PositionSampler(
            optimiser.batch_size,
            optimiser.accumulation,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            first,
            optimiser.steps,
        )
        return DataLoader(
            SafeSamples(self.samples),
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=list,
        )

    def _loss(self, model: torch.nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
        """Mean over a batch; targets of different sizes take one UNet pass per size."""
        sizes: dict[torch.Size, list[Sample]] = {}
        for sample in samples:
            sizes.setdefault(sample.target.shape, []).append(sample)
        total = torch.zeros((), device=self.accelerator.device)
        for number, group in enumerate(sizes.values(), 1):
            # Gradients are exchanged once per batch, in the last group's backward pass.
            wait = number < len(sizes)
            with self.accelerator.no_sync(model) if wait else nullcontext():
                total = total + model(self.batches.make(group)).sum()
        return total / len(samples)

    def _report_skipped(self, samples: Sequence[Sample]) -> None:
        for name, reason in (s for sample in samples for s in sample.skipped):
            if name not in self.summary.skipped:
                self.summary.skipped[name] = reason
                count = len(self.summary.skipped)
                print(f"skipped record {name} ({count} so far): {reason}", file=sys.stderr)

    def validate(self, step: int) -> None:
        """Generate the validation images, and hand them to the trackers."""
        settings = self.settings
        with self.accelerator.autocast():
            image = generate(
                self.base,
                self.model,
                self.validation,
                settings.data,
                self.accelerator.device,
                settings.seed,
                settings.model.identity_references,
            )
        path = Path(settings.output.folder) / "validation" / f"{step:07}.png"
        with writing(path):
            save_image(image, path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.writer.add_image("validation", np.asarray(image), step, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [image]}, step=step)
