"""EasyRef Save Tokens and EasyRef Load Tokens: files of reference tokens, used without the MLLM."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..easyref_core.tokens.reference_tokens import ReferenceTokens, load_tokens, save_tokens
from .checked import checked
from .host.folders import TOKENS, file_stamps, new_tokens_path, token_names, tokens_path
from .inputs import accepted
from .link_types import EasyRefTokens
from .newer_core import found_by

_FOLDERS = ("output", "models")


@checked
class EasyRefSaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSaveTokens",
            display_name="EasyRef Save Tokens",
            category="EasyRef",
            description="Saves reference tokens to a small .safetensors file, which can be "
            "loaded, shared and applied without the MLLM.",
            inputs=[
                EasyRefTokens.Input("tokens", tooltip="From EasyRef Encode."),
                io.String.Input(
                    "filename_prefix",
                    default="EasyRef",
                    tooltip="Start of the file name; / creates subfolders. A number is appended. "
                    "Dates and values of nodes are filled in as in Save Image; the help lists "
                    "them.",
                ),
                io.Combo.Input(
                    "folder",
                    options=list(_FOLDERS),
                    default=_FOLDERS[0],
                    optional=True,
                    tooltip="output: ComfyUI's output/easyref_tokens. models: "
                    "models/easyref_tokens, with your models.",
                ),
            ],
            outputs=[],
            **found_by("save reference, save embeds, ip-adapter embeds"),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, tokens: ReferenceTokens, filename_prefix: str, folder: str = _FOLDERS[0]
    ) -> io.NodeOutput:
        to_output = folder == "output"
        path, subfolder = new_tokens_path(filename_prefix, to_output)
        save_tokens(tokens, path)
        shown = {
            "filename": path.name,
            "subfolder": f"{TOKENS}/{subfolder}".rstrip("/") if to_output else subfolder,
            "type": folder,
        }
        return io.NodeOutput(ui={"tokens": [shown], "text": [str(path)]})


@checked
class EasyRefLoadTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLoadTokens",
            display_name="EasyRef Load Tokens",
            category="EasyRef",
            description="Loads saved reference tokens. The MLLM is not needed to apply them.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=token_names(),
                    tooltip="Files in models/easyref_tokens, then those saved to "
                    "output/easyref_tokens.",
                ),
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="Reference tokens to apply.")
            ],
            **found_by("load reference, load embeds, ip-adapter embeds"),
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        # None if it is linked.
        return file is None or accepted(lambda: tokens_path(file))

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> Any:
        return file, file_stamps(tokens_path(file) if file is not None else None)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_tokens(tokens_path(file)))
