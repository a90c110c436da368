"""ComfyUI's side of EasyRef: thin nodes over `easyref_core`. Only this package imports comfy."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..easyref_core.errors import EasyRefError
from .apply import EasyRefApply
from .combine import EasyRefCombineTokens
from .conditioning import EasyRefSetConditioning
from .crop import EasyRefCrop
from .demo import EasyRefDemoModels
from .encode import EasyRefEncode
from .gallery.routes import register_routes
from .host.folders import register_folders
from .identity import EasyRefIdentity
from .inspect_references import EasyRefInspect
from .layer_weights import EasyRefLayerWeights
from .loader import EasyRefLoader
from .mllm_layers import EasyRefMllmLayers
from .quick import EasyRefQuick
from .references import EasyRefReferences
from .region import EasyRefRegion
from .score import EasyRefScore
from .stages import EasyRefStages
from .tokens import EasyRefLoadTokens, EasyRefSaveTokens
from .weight_curve import EasyRefWeightCurve

NODES: list[type[io.ComfyNode]] = [
    EasyRefLoader,
    EasyRefReferences,
    EasyRefEncode,
    EasyRefApply,
    EasyRefSaveTokens,
    EasyRefLoadTokens,
    EasyRefDemoModels,
    EasyRefQuick,
    EasyRefCrop,
    EasyRefCombineTokens,
    EasyRefInspect,
    EasyRefIdentity,
    EasyRefRegion,
    EasyRefSetConditioning,
    EasyRefLayerWeights,
    EasyRefMllmLayers,
    EasyRefWeightCurve,
    EasyRefStages,
    EasyRefScore,
]


# ComfyUI shows an error's class with its module, whose name would begin with this pack's folder.
EasyRefError.__module__ = "easyref"


class EasyRefExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EasyRefExtension:
    register_folders()
    register_routes()
    return EasyRefExtension()
