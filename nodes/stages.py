"""EasyRef Stages: when reference tokens act, and when identity does."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..easyref_core.adapter.stages import PRESETS, Stages, Window, check_order
from .checked import checked
from .inputs import share_input, weight_input
from .link_types import EasyRefCurve
from .newer_core import found_by
from .sampling.stage_window import StageWindow

CUSTOM = "custom"
_DEFAULT = "always"


@checked
class EasyRefStages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _boundaries(PRESETS[_DEFAULT])
        return io.Schema(
            node_id="EasyRefStages",
            display_name="EasyRef Stages",
            category="EasyRef",
            description="Divides the sampling into stages: reference tokens act in one part of it, "
            "identity in another.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=_DEFAULT,
                    tooltip="Where the parts start and end. always: both all the time. late: "
                    "tokens all the time, identity in the second half. noise and steps: as "
                    "published, for the same noise or the same share of the steps. custom: as set "
                    "below.",
                    extra_dict={"windows": {n: _boundaries(s) for n, s in PRESETS.items()}},
                ),
                share_input(
                    "tokens_start",
                    default["tokens_start"],
                    "From which part of the sampling on the tokens act, if preset is custom. "
                    "0 is the first step.",
                ),
                share_input(
                    "tokens_end",
                    default["tokens_end"],
                    "Until which part of the sampling the tokens act, if preset is custom.",
                ),
                weight_input("Multiplies the weight of the tokens in their part.", "tokens_weight"),
                share_input(
                    "identity_start",
                    default["identity_start"],
                    "From which part of the sampling on identity acts, if preset is custom. "
                    "Outside its part it costs no time.",
                ),
                share_input(
                    "identity_end",
                    default["identity_end"],
                    "Until which part of the sampling identity acts, if preset is custom. "
                    "1 is the last step.",
                ),
                weight_input("Multiplies the weight of identity in its part.", "identity_weight"),
                share_input(
                    "cross_fade",
                    0.0,
                    "Length of a linear fade around each start and end, as a part of the sampling. "
                    "0 switches at once.",
                ),
            ],
            outputs=[
                EasyRefCurve.Output(
                    display_name="tokens",
                    tooltip="For curve of EasyRef Apply or EasyRef Region.",
                ),
                EasyRefCurve.Output(
                    display_name="identity", tooltip="For curve of EasyRef Identity."
                ),
            ],
            **found_by(
                "schedule, multi-stage, staged denoising, window, timestep range, start end"
            ),
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        tokens_start: float,
        tokens_end: float,
        tokens_weight: float,
        identity_start: float,
        identity_end: float,
        identity_weight: float,
        cross_fade: float,
    ) -> io.NodeOutput:
        if preset == CUSTOM:
            check_order("tokens_start", tokens_start, "tokens_end", tokens_end)
            check_order("identity_start", identity_start, "identity_end", identity_end)
            tokens = Window(tokens_start, tokens_end)
            identity = Window(identity_start, identity_end)
        else:
            tokens, identity = PRESETS[preset].tokens, PRESETS[preset].identity
        return io.NodeOutput(
            StageWindow(tokens.start, tokens.end, tokens_weight, cross_fade),
            StageWindow(identity.start, identity.end, identity_weight, cross_fade),
        )


def _boundaries(stages: Stages) -> dict[str, Any]:
    """A preset as values of the node's inputs."""
    return {
        f"{name}_{side}": getattr(getattr(stages, name), side)
        for name in ("tokens", "identity")
        for side in ("start", "end")
    }
