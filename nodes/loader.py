"""EasyRef Loader: which adapter, which MLLM, which precision."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .checked import checked
from .host.encoder_weights import PRECISIONS
from .host.folders import (
    FROM_ADAPTER,
    adapter_names,
    adapter_path,
    file_stamps,
    mllm_names,
    mllm_path,
)
from .inputs import accepted
from .link_types import EasyRef, EasyRefModel
from .newer_core import ADVANCED, found_by


@checked
class EasyRefLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLoader",
            display_name="EasyRef Loader",
            category="EasyRef",
            description="Chooses an EasyRef adapter and the Qwen2-VL model that encodes the "
            "references. No weights are loaded until then.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=adapter_names(),
                    tooltip="EasyRef adapter file in models/easyref, recognised by its contents.",
                ),
                io.Combo.Input(
                    "mllm",
                    options=mllm_names(),
                    default=FROM_ADAPTER,
                    tooltip="Source of the tokenizer, the configuration and missing weights: the "
                    "adapter file itself, or a Qwen2-VL folder in models/LLM. Weights in the "
                    "adapter file take precedence.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Precision of the MLLM. auto: bf16 where the device supports it well, "
                    "else fp32. int8: computes likewise, with most weights in one byte.",
                    **ADVANCED,
                ),
            ],
            outputs=[EasyRef.Output(display_name="easyref", tooltip="Adapter with its encoder.")],
            **found_by("ip-adapter, ipadapter, load ip-adapter, reference, qwen2-vl, mllm"),
        )

    @classmethod
    def validate_inputs(cls, adapter: str | None) -> bool | str:
        # None if it is linked. ComfyUI repeats the answer for every input named here, so mllm is
        # not: ComfyUI looks it up among its options.
        return adapter is None or accepted(lambda: adapter_path(adapter))

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None, mllm: str | None, precision: str) -> Any:
        file = adapter_path(adapter) if adapter is not None else None
        directory = mllm_path(mllm) if mllm is not None else None
        return adapter, mllm, precision, file_stamps(file), file_stamps(directory)

    @classmethod
    def execute(cls, adapter: str, mllm: str, precision: str) -> io.NodeOutput:
        directory = mllm_path(mllm)
        easyref = EasyRefModel.of(adapter_path(adapter), directory, precision)
        if directory is not None or easyref.checkpoint.has_mllm:
            easyref.encoder.plan()
        # Otherwise saved tokens can be applied; encoding reports what is missing.
        return io.NodeOutput(easyref)
