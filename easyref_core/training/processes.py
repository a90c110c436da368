"""Processes that train together: how they are joined, and which settings they rule out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from ..errors import EasyRefError
from .config import Settings

# One process writes a checkpoint or generates images while the others wait; NCCL's default of
# ten minutes is too short.
_TIMEOUT = timedelta(hours=2)
WHOLE_STATE = "whole in each process"
# Layers that FSDP may gather one at a time, because every process calls them equally often: one
# UNet pass and one of the decoder per batch. The vision tower takes as many passes as a batch's
# images have shapes.
FSDP_LAYERS = ("DecoderLayer", "BasicTransformerBlock")


def world_size() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the first; also before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole state, so that accelerate must gather it."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def has_sharded_weights(accelerator: Accelerator) -> bool:
    """Whether no process holds all weights, not only not all of the optimiser's state."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return plugin.zero_stage >= 3
    return accelerator.distributed_type == DistributedType.FSDP


def sharding_name(accelerator: Accelerator) -> str:
    """How the state is sharded, in words; a checkpoint can only be resumed in the same way."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"DeepSpeed ZeRO-{plugin.zero_stage}"
    return "FSDP" if is_sharded(accelerator) else WHOLE_STATE


def shard_counts(accelerator: Accelerator) -> tuple[int, int]:
    """Over how many processes the weights, and the optimiser's state, are sharded."""
    processes = accelerator.num_processes
    weights = processes if has_sharded_weights(accelerator) else 1
    return weights, processes if is_sharded(accelerator) else 1


def make_accelerator(
    folder: Path,
    precision: str,
    *,
    accumulation: int = 1,
    trackers: Sequence[str] = (),
    cpu: bool = False,
) -> Accelerator:
    """Join the processes that the launcher has started.

    Args:
        folder: of the run; trackers write to its `logs`.
        precision: "no", "bf16" or "fp16".
        cpu: do not use a GPU.

    Raises:
        EasyRefError: accelerate sees another number of processes.
    """
    processes = world_size()
    accelerator = Accelerator(
        # Otherwise accelerate takes several processes on a CPU for unrelated ones.
        cpu=cpu or (processes > 1 and not torch.cuda.is_available()),
        mixed_precision=precision,
        # As a plugin, because `accelerate config` would override the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulation),
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(folder / "logs")),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_TIMEOUT),
            # Otherwise the buckets that gradients are exchanged in are a second copy of them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != processes:
        raise EasyRefError(
            f"{processes} processes were started, but accelerate sees "
            f"{accelerator.num_processes}. Start them with accelerate launch, with a "
            "configuration for this computer."
        )
    return accelerator


def join_processes(settings: Settings, cpu: bool, validates: bool) -> Accelerator:
    """Join the processes, and check that they can train with these settings.

    Args:
        cpu: do not use a GPU.
        validates: images are generated during the run.

    Raises:
        EasyRefError: the settings need something else than the processes that accelerate joined, or
            than the way in which it shards the model.
    """
    accelerator = make_accelerator(
        Path(settings.output.folder),
        settings.optimiser.precision,
        accumulation=settings.optimiser.accumulation,
        trackers=settings.output.trackers,
        cpu=cpu,
    )
    _check_sharding(accelerator, settings, validates)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
        _keep_loss_in_float32(accelerator)
    return accelerator


def _check_sharding(accelerator: Accelerator, settings: Settings, validates: bool) -> None:
    """
    Raises:
        EasyRefError: a setting does not work on the device or with sharded weights.
    """
    optimiser = settings.optimiser
    if optimiser.precision == "fp16" and accelerator.device.type == "cpu":
        raise EasyRefError("optimiser.precision fp16 needs a GPU. Use bf16 or no on a CPU.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage >= 3:
        raise EasyRefError(
            "DeepSpeed ZeRO-3 gathers every layer by itself, also those that are not called "
            "equally often in every process, and shards the base model's text encoders. Use "
            "ZeRO-2, or FSDP."
        )
    if validates and has_sharded_weights(accelerator):
        raise EasyRefError(
            "output.validation needs a process that holds all weights, which FSDP does not have. "
            "Set output.validation=null, or use ZeRO-2."
        )
    if optimiser.ema is not None and is_sharded(accelerator):
        raise EasyRefError(
            "optimiser.ema needs every process to hold all weights, which DeepSpeed and "
            "FSDP do not. Set optimiser.ema=null."
        )
    if has_sharded_weights(accelerator) and settings.model.identity_references:
        # Reference passes: one per size of reference, none for a batch without references.
        raise EasyRefError(
            "model.identity_references calls the UNet another number of times in each process, "
            "which FSDP cannot do. Use ZeRO-2."
        )
    if (
        has_sharded_weights(accelerator)
        and settings.data.crop == "aspect"
        and optimiser.batch_size > 1
    ):
        # One pass per size of target: processes would wait for each other's weights forever.
        raise EasyRefError(
            f"data.crop aspect with optimiser.batch_size {optimiser.batch_size} calls the UNet "
            "another number of times in each process, which FSDP cannot do. "
            f"Set optimiser.batch_size=1 and optimiser.accumulation="
            f"{optimiser.accumulation * optimiser.batch_size}, or use ZeRO-2."
        )


def _check_fsdp(accelerator: Accelerator) -> None:
    """
    Raises:
        EasyRefError: accelerate is configured to wrap the model in a way that cannot train it.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise EasyRefError(
            f"accelerate is configured for FSDP version {plugin.fsdp_version}, which cannot shard "
            "weights of several precisions. Set fsdp_version: 2 in its configuration (or start "
            "with accelerate launch --fsdp_version 2)."
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise EasyRefError(
            "FSDP's SIZE_BASED_WRAP wraps layers that are not called equally often in every "
            "process. Set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and name no classes."
        )
    other = [name for name in plugin.transformer_cls_names_to_wrap or () if name not in FSDP_LAYERS]
    if other:
        raise EasyRefError(
            f"FSDP is configured to wrap {', '.join(other)}; only {' and '.join(FSDP_LAYERS)} can "
            "be wrapped. Leave fsdp_transformer_layer_cls_to_wrap out, and these are."
        )


def _keep_loss_in_float32(accelerator: Accelerator) -> None:
    """Keep FSDP from rounding the model's output, the loss, to the precision it computes in."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None
        )


def allow_open_files() -> None:
    """Raise the open-file limit: DataLoader workers pass each image through a file descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS reports no limit, then refuses it
        return
