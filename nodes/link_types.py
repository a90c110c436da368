"""What travels along the links between EasyRef's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..easyref_core.aggregation import Reference
from ..easyref_core.checkpoint import AdapterCheckpoint
from .host.encoder import HostedEncoder
from .host.key_values import KeyValueStore
from .host.parts import Part

EasyRef = io.Custom("EASYREF")
EasyRefReferenceGroup = io.Custom("EASYREF_REFERENCES")
EasyRefTokens = io.Custom("EASYREF_TOKENS")
EasyRefLayerWeightsLink = io.Custom("EASYREF_LAYER_WEIGHTS")
EasyRefCurve = io.Custom("EASYREF_CURVE")
EasyRefRegions = io.Custom("EASYREF_REGIONS")

References = tuple[Reference, ...]
Regions = tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class EasyRefModel:
    """A chosen adapter with its encoder. Neither holds weights until they are needed.

    Attributes:
        checkpoint: the adapter's file, looked at.
        encoder: builds and runs the MLLM when first asked to.
        key_values: what the adapter made of tokens so far, per device.
    """

    checkpoint: AdapterCheckpoint
    encoder: HostedEncoder
    key_values: KeyValueStore
