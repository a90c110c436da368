"""Processes that train together: how they are joined, and what does not go with them."""

from __future__ import annotations

import dataclasses
import os
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
from .model import TrainedModel
from .state import is_sharded, is_spread

# The others wait while one writes a checkpoint or draws; NCCL's ten minutes are too few.
_PATIENCE = timedelta(hours=2)


def started() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(settings: Settings, cpu: bool, validates: bool) -> Accelerator:
    """
    Args:
        cpu: leave a GPU alone.
        validates: pictures are generated during the run.

    Raises:
        EasyRefError: what the settings ask for does not go with the processes that accelerate
            found, or with how it shares the model out among them.
    """
    processes = started()
    folder = Path(settings.output.folder)
    accelerator = Accelerator(
        # Without this accelerate takes several processes on a CPU for unrelated ones.
        cpu=cpu or (processes > 1 and not torch.cuda.is_available()),
        mixed_precision=settings.optimiser.precision,
        # As a plugin, or what `accelerate config` said would count instead.
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.optimiser.accumulation),
        log_with=list(settings.output.trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(folder / "logs")),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_PATIENCE),
            # Or the buckets that gradients travel in would be a second copy of them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != processes:
        raise EasyRefError(
            f"{processes} processes were started, but accelerate sees "
            f"{accelerator.num_processes}. Start them with accelerate launch, with a "
            "configuration for this computer."
        )
    _check_sharding(accelerator, settings, validates)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
        _keep_the_loss_whole(accelerator)
    return accelerator


def _check_sharding(accelerator: Accelerator, settings: Settings, validates: bool) -> None:
    """
    Raises:
        EasyRefError: some setting does not go with the device or with shared out weights.
    """
    optimiser = settings.optimiser
    if optimiser.precision == "fp16" and accelerator.device.type == "cpu":
        raise EasyRefError("optimiser.precision fp16 needs a GPU. Use bf16 or no on a CPU.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage >= 3:
        raise EasyRefError(
            "DeepSpeed ZeRO-3 gathers every layer by itself, also those that are not called "
            "equally often in every process, and cuts up the base model's text encoders. Use "
            "ZeRO-2, or FSDP."
        )
    if validates and is_spread(accelerator):
        raise EasyRefError(
            "output.validation needs a process that holds all weights, which FSDP does not have. "
            "Set output.validation=null, or use ZeRO-2."
        )
    if optimiser.ema is not None and is_sharded(accelerator):
        raise EasyRefError(
            "optimiser.ema needs every process to hold all weights, which DeepSpeed and "
            "FSDP do not. Set optimiser.ema=null."
        )
    if is_spread(accelerator) and settings.data.crop == "aspect" and optimiser.batch_size > 1:
        # One pass a size of target: the processes would wait for each other's weights for ever.
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

    plugin, known = accelerator.state.fsdp_plugin, TrainedModel._no_split_modules
    if plugin.fsdp_version != 2:
        raise EasyRefError(
            f"accelerate is configured for FSDP version {plugin.fsdp_version}, which cannot shard "
            "weights of several precisions. Set fsdp_version: 2 in its configuration (or start "
            "with accelerate launch --fsdp_version 2)."
        )
    # What is not called equally often in every process must not be gathered by itself: the vision
    # tower, once for each shape of picture.
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise EasyRefError(
            "FSDP's SIZE_BASED_WRAP wraps layers that are not called equally often in every "
            "process. Set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and name no classes."
        )
    other = [name for name in plugin.transformer_cls_names_to_wrap or () if name not in known]
    if other:
        raise EasyRefError(
            f"FSDP is configured to wrap {', '.join(other)}; only {' and '.join(known)} can be "
            "wrapped. Leave fsdp_transformer_layer_cls_to_wrap out, and these are."
        )


def _keep_the_loss_whole(accelerator: Accelerator) -> None:
    """FSDP rounds what the model returns, here the loss, to the precision it computes in."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None
        )


def allow_open_files() -> None:
    """As many as the system lets this process have: workers hand each picture over in a file."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # macOS names no limit, and then does not grant that
        return
