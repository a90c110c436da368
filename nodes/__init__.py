"""ComfyUI's side of EasyRef: thin nodes over `easyref_core`. Only this package imports comfy."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import EasyRefApply
from .demo import EasyRefDemoModels
from .encode import EasyRefEncode
from .host.folders import register_folders
from .loader import EasyRefLoader
from .references import EasyRefReferences
from .tokens import EasyRefLoadTokens, EasyRefSaveTokens

NODES: list[type[io.ComfyNode]] = [
    EasyRefLoader,
    EasyRefReferences,
    EasyRefEncode,
    EasyRefApply,
    EasyRefSaveTokens,
    EasyRefLoadTokens,
    EasyRefDemoModels,
]


class EasyRefExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EasyRefExtension:
    register_folders()
    return EasyRefExtension()
