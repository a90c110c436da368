"""Types of the links between EasyRef's nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from ..easyref_core.encode.group import Reference
from ..easyref_core.errors import EasyRefError
from ..easyref_core.qwen2vl.config_file import read_config
from ..easyref_core.tokens.reference_tokens import describe
from .host.encoder import HostedEncoder
from .host.key_value_cache import KeyValueStore
from .host.lora import AdapterLora
from .host.patcher import is_dynamic
from .sampling.weights import Effect

EasyRef = io.Custom("EASYREF")
EasyRefReferenceGroup = io.Custom("EASYREF_REFERENCES")
EasyRefTokens = io.Custom("EASYREF_TOKENS")
EasyRefLayerWeightsLink = io.Custom("EASYREF_LAYER_WEIGHTS")
EasyRefMllmLayersLink = io.Custom("EASYREF_MLLM_LAYERS")
EasyRefCurve = io.Custom("EASYREF_CURVE")
EasyRefRegions = io.Custom("EASYREF_REGIONS")

References = tuple[Reference, ...]
Regions = tuple[Effect, ...]

MAX_REGIONS = 16


@dataclass(frozen=True, eq=False)
class EasyRefModel:
    """A chosen adapter with its encoder. No weights are loaded until they are needed.

    Attributes:
        checkpoint: names and shapes in the adapter's file.
        encoder: builds the MLLM on first use and runs it.
        key_values: cached keys and values of reference tokens.
        lora: the adapter's LoRA as weight patches.
    """

    checkpoint: AdapterCheckpoint
    encoder: HostedEncoder
    key_values: KeyValueStore
    lora: AdapterLora

    @property
    def patcher(self) -> ModelPatcher | None:
        """The encoder, under the name by which ComfyUI finds the model of a value: it keeps those
        that the running prompt needs, and drops those of older prompts first when memory is short.
        None until the first encoding.
        """
        return self.encoder.patcher

    def is_dynamic(self) -> bool:
        """Whether ComfyUI frees no memory by dropping this value: weights stay in their files, and
        nothing is kept of earlier groups."""
        dynamic = self.patcher is not None and is_dynamic(self.patcher)
        return dynamic and not self.encoder.kept_bytes

    @classmethod
    def of(
        cls,
        adapter: Path,
        mllm_directory: Path | None,
        precision: str = "auto",
    ) -> EasyRefModel:
        """From an adapter's file, without loading weights.

        Args:
            mllm_directory, precision: see `HostedEncoder`.

        Raises:
            EasyRefError: see `load_checkpoint` and `read_config`.
        """
        checkpoint = load_checkpoint(adapter)
        mark = read_config(mllm_directory).mark if mllm_directory is not None else None
        checkpoint = replace(checkpoint, mllm_mark=mark)
        return cls(
            checkpoint,
            HostedEncoder(checkpoint, mllm_directory, precision),
            KeyValueStore(checkpoint),
            AdapterLora(checkpoint),
        )


def check_regions(regions: Regions) -> None:
    """Raise EasyRefError unless one Apply node can take these regions."""
    if not regions:
        raise EasyRefError(
            "The list of regions is empty. Connect EasyRef Region, or disconnect regions."
        )
    if len(regions) > MAX_REGIONS:
        raise EasyRefError(
            f"There are {len(regions)} regions; one EasyRef Apply takes up to {MAX_REGIONS}. Give "
            "the others to a second EasyRef Apply."
        )
    first = regions[0].tokens
    for number, region in enumerate(regions[1:], 2):
        if region.tokens.adapter != first.adapter:
            raise EasyRefError(
                f"Region {number} has tokens of {describe(region.tokens)}, region 1 of "
                f"{describe(first)}. The regions of one EasyRef Apply need one adapter; give each "
                "adapter an EasyRef Apply of its own."
            )
