"""Settings of a training run: one recipe per stage, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from ..pictures.sizes import MIN_IMAGE_SIZE
from .check_settings import check_settings
from .recipe import (
    STRICT,
    Bool,
    Count,
    Decay,
    Float,
    Int,
    Names,
    NonNegativeInt,
    Positive,
    Probability,
    as_tuple,
    override,
    parse_settings,
    read_recipe,
)

_MOST_TOKENS = 4096  # the UNet attends to all of them in every layer
_LARGEST_SIDE = 8192  # pixels

Part = Literal[
    "final_layers", "projector", "cross_attention", "mllm", "lora", "layer_pooling", "identity"
]
PARTS: tuple[str, ...] = get_args(Part)

Tokens = Annotated[Count, Field(le=_MOST_TOKENS)]
Side = Annotated[Int, Field(ge=32, le=_LARGEST_SIDE)]
Batch = Annotated[Count, Field(le=4096)]
# YAML reads no as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
]


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The models that training starts from.

    Attributes:
        base: SDXL directory in the diffusers layout (unet, vae, text encoders, tokenizers,
            scheduler).
        mllm: Qwen2-VL directory.
        adapter: EasyRef checkpoint of the stage before; None starts from a new adapter.
        reference_tokens, final_layers, lora_rank: of a new adapter.
        aggregation: "easyref" encodes a group's images in one MLLM pass; "dla" and "lap" do, too,
            and pool the hidden states of all its layers, with one pool for text and one for images
            or with one for both; "average" encodes each image alone and averages their reference
            tokens, as a baseline.
        pooling, mllm_layers: of the pools of an adapter that has none yet: their shape, and the
            numbers of the hidden states that they read (0 is the embedding output); None for all.
        identity_references: how many references of a sample self-attention attends to, through a
            reference pass of the UNet; 0 for no such pass.
        identity_rank: of a new identity LoRA.
    """

    base: str
    mllm: str
    adapter: str | None = None
    reference_tokens: Tokens = 64
    final_layers: Count = 1
    lora_rank: Annotated[NonNegativeInt, Field(le=4096)] = 128
    aggregation: Literal["easyref", "dla", "lap", "average"] = "easyref"
    pooling: Literal["blocks", "scores"] = "blocks"
    mllm_layers: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(as_tuple)] | None = None
    identity_references: Annotated[NonNegativeInt, Field(le=1000)] = 0
    identity_rank: Annotated[Count, Field(le=4096)] = 16


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """The training data, and its augmentation.

    Attributes:
        files: JSON lists in the official layout, or WebDataset tar shards.
        root: folder that image names in JSON lists are relative to.
        resolution: of the target, in pixels.
        crop: "random" or "center" square of the target (and of its single reference, alike);
            "aspect" keeps its aspect ratio, in multiples of 64.
        image_size: of the references, in pixels (the official `cond_image_size`).
        max_references: references per group, at most.
        subset_probability: of using only a random subset of a group, at least 2 references.
        drop_image, drop_text, drop_both: probabilities that the references become the black image,
            the text becomes empty, or both. The black image has no identity references.
        drop_identity, drop_tokens: where there are identity references, probabilities that the
            sample has none, or that its reference tokens are left out, as where a schedule lets
            only one of the two act.
        workers: DataLoader worker processes.
        cache: folder for VAE latents and text states; only where every target and text comes out
            the same each time (crop "center" or "aspect").
    """

    files: Names
    root: str = "."
    resolution: Side = 1024
    crop: Literal["random", "center", "aspect"] = "random"
    image_size: Annotated[Int, Field(ge=MIN_IMAGE_SIZE, le=_LARGEST_SIDE)] = 336
    max_references: Annotated[Count, Field(le=1000)] = 28
    subset_probability: Probability = 0.0
    drop_image: Probability = 0.05
    drop_text: Probability = 0.05
    drop_both: Probability = 0.05
    drop_identity: Probability = 0.0
    drop_tokens: Probability = 0.0
    workers: Annotated[NonNegativeInt, Field(le=256)] = 4
    cache: str | None = None


@dataclass(frozen=True, config=STRICT)
class OptimiserSettings:
    """How the weights are trained.

    Attributes:
        parts: trained parts; everything else is frozen.
        learning_rate_schedule: "constant", or "cosine" down to a fiftieth at the last step.
        warmup_steps: in which the learning rate rises linearly to its full value.
        loss_weighting: of noise levels: "none" as officially, "min_snr" (with `snr_gamma`) or
            "debiased", which weight strong noise more.
        noise_levels: timesteps per sample, spread evenly over the schedule, that share one
            encoding of its references: 1 as officially.
        batch_size: samples per process and accumulation step.
        accumulation: batches per optimiser step.
        ema: decay of an exponential moving average that is exported too; None for none.
    """

    parts: Annotated[tuple[Part, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    steps: Count
    learning_rate: Annotated[Positive, Field(le=10)]
    weight_decay: Annotated[Float, Field(ge=0, le=100)] = 0.0
    batch_size: Batch = 8
    accumulation: Count = 1
    max_grad_norm: Positive | None = None
    precision: Precision = "bf16"
    gradient_checkpointing: Bool = True
    ema: Decay | None = None
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    loss_weighting: Literal["none", "min_snr", "debiased"] = "none"
    snr_gamma: Positive = 5.0
    noise_levels: Annotated[Count, Field(le=1000)] = 1


@dataclass(frozen=True, config=STRICT)
class OutputSettings:
    """Where results go.

    Attributes:
        folder: of checkpoints, logs and validation images.
        save_every, validate_every, log_every: in optimiser steps.
        keep: newest checkpoints kept.
        validation: JSON list of groups for validation images; None for none.
    """

    folder: str
    save_every: Count = 1000
    keep: Count = 2
    log_every: Count = 10
    validate_every: Count = 1000
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_tuple)] = (
        "tensorboard",
    )
    validation: str | None = None


@dataclass(frozen=True, config=STRICT)
class Settings:
    """One stage of training."""

    stage: Literal["alignment", "single_reference", "multi_reference", "identity"]
    model: ModelSettings
    data: DataSettings
    optimiser: OptimiserSettings
    output: OutputSettings
    seed: Annotated[NonNegativeInt, Field(le=2**32 - 1)] = 0


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply `section.key=value` overrides.

    Relative paths in the recipe are relative to the folder the command runs in.

    Raises:
        EasyRefError: no such file, not YAML, unknown or missing keys (with the nearest known
            one), values of a wrong type or out of range.
    """
    return make_settings(read_recipe(path), overrides)


def make_settings(content: dict[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Settings from a recipe's content; see `load_settings`."""
    override(content, overrides)
    settings = parse_settings(Settings, content)
    check_settings(settings)
    return settings
